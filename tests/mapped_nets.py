"""Small nets whose weights come from their layout, for mappers to give rules to."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from rule_samples import Sample


def net_of(*layers: Callable[[], nn.Module]) -> nn.Sequential:
    module = Sample("mapped", lambda: nn.Sequential(*(layer() for layer in layers)), ()).module()
    assert isinstance(module, nn.Sequential)
    return module


def mlp() -> nn.Sequential:
    return net_of(lambda: nn.Linear(4, 5), nn.ReLU, lambda: nn.Linear(5, 2))
