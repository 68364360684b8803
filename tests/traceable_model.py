"""A model that a call could leave traces in, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_like import LRP, EpsilonPlus, InputXGradient, IntegratedGradients, Saliency

METHODS: dict[str, Callable[..., Any]] = {
    "saliency": lambda target, **o: Saliency(target, abs=False, **o),
    "input x gradient": InputXGradient,
    "integrated gradients": lambda t, **o: IntegratedGradients(
        t, n_steps=4, gap_tolerance=None, **o
    ),
    "lrp": lambda target, **o: LRP(EpsilonPlus(), target, **o),
}
MODES = {"driving": True, "observing": False}


class Net(nn.Module):
    """What a call could leave traces in: statistics, dropout, in-place, weight norm, a counter."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.body = nn.Sequential(
            nn.Conv1d(1, 2, 2), nn.ReLU(inplace=True), nn.Flatten(-2), nn.Linear(6, 6),
            nn.Identity() if plain else nn.BatchNorm1d(6), nn.Tanh(),
            nn.Linear(6, 6) if plain else normed, nn.Dropout(0.3), nn.LayerNorm(6),
        )  # fmt: skip
        self.head = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
        return self.head(self.body(x.unsqueeze(-2)) + 0.1)


def model(training: bool = False, plain: bool = False) -> Any:
    return TensorDictModule(Net(plain), ["x"], ["y"]).train(training)


def inputs(n: int = 6) -> TensorDict:
    return TensorDict({"x": torch.randn(n, 4)}, [n])


def run(hooked: Any, drive: bool, td: TensorDict) -> TensorDict:
    return (hooked if drive else hooked.observe)(td)
