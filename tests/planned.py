"""What a mapper plans for a model: which rules, and why."""

from __future__ import annotations

from typing import Any

from tensordict.nn import TensorDictModule
from torch import nn

from tdhook_like.attribution.lrp import Rule
from tdhook_like.attribution.lrp.mappers.choosing import Mapper


def rules(mapper: Mapper, model: nn.Module) -> dict[str, type[Rule]]:
    """Which rule every path gets."""
    return {line.path: type(line.rule) for line in mapper.plan(model).lines}


def reasons(mapper: Mapper, model: nn.Module) -> dict[str, str]:
    return {line.path: line.why for line in mapper.plan(model).lines}


def two_parts() -> nn.Module:
    """An encoder of three modules and a head of two."""
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.Conv1d(2, 2, 1)),
            "head": nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)),
        }
    )


def td_module(layer: nn.Module, in_keys: list[Any], out_keys: list[Any]) -> TensorDictModule:
    return TensorDictModule(layer, in_keys=in_keys, out_keys=out_keys)
