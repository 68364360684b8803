"""A batch without elements has attributions without elements, whatever baselines are drawn from."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_like import (
    DeepLift,
    ExpectedGradients,
    FromBuffer,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    OverBaselines,
)

ROWS = torch.randn(4, 3)


class Buffer:
    """Rows by the number, as of a replay buffer; it gives none where none are asked for."""

    def sample(self, n: int) -> TensorDict:
        assert n > 0
        return TensorDict({"x": ROWS[torch.arange(n) % 4]}, [n])


METHODS = {
    "input × gradient": InputXGradient("y"),
    "integrated gradients": IntegratedGradients("y"),
    "integrated gradients, from a buffer": IntegratedGradients("y", baselines=FromBuffer(Buffer())),
    "DeepLift": DeepLift("y"),
    "expected gradients": ExpectedGradients("y", baselines=ROWS),
    "expected gradients, from a buffer": ExpectedGradients("y", baselines=FromBuffer(Buffer())),
    "gradient SHAP": GradientShap("y", baselines=ROWS),
    "over baselines": OverBaselines(IntegratedGradients("y"), over=ROWS),
}


@pytest.mark.parametrize("batch", [(0,), (2, 0)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_explained_of_an_empty_batch(name, batch):
    with METHODS[name].prepare(nn.Linear(3, 1), ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": torch.zeros(*batch, 3)}, list(batch)))
    assert td["y"].shape == (*batch, 1)
    assert td["attr", "x"].shape == (*batch, 3)
