"""Which arithmetic targets have: contrasts; sums, multiples and negatives are refused with advice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_like import (
    AtStep,
    AttributionSum,
    Channel,
    Each,
    Function,
    Greedy,
    InputXGradient,
    LogProb,
    Output,
    Saliency,
    Taken,
    Target,
    TargetError,
    Unit,
)

TARGETS: list[Target] = [
    Output("y", 0),
    Taken("logits"),
    Greedy("logits"),
    LogProb(),
    Output("y", 0) - ("y", 1),
    Each("y"),
    AtStep("y"),
    Function(torch.sum),
    Unit("0", 1),
    Channel("0", 1),
    Unit("0")[1],
]
ARITHMETIC: dict[str, Callable[[Any], Any]] = {
    "a sum": lambda a: a + a,
    "a sum with a short form": lambda a: "y" + a,
    "sum()": lambda a: sum([a, a]),
    "a multiple": lambda a: 2 * a,
    "a multiple from the right": lambda a: a * 0.5,
    "a negative": lambda a: -a,
}


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("written", ARITHMETIC)
def test_sums_and_multiples_of_every_target_are_refused_with_what_to_write_instead(written, target):
    with pytest.raises(TargetError) as caught:
        ARITHMETIC[written](target)
    assert repr(target) in str(caught.value)
    assert "AttributionSum" in str(caught.value) and "a - b" in str(caught.value)


def test_what_the_message_says_to_write_gives_the_sum_of_units():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    a, b = InputXGradient(Unit("1", 0)), InputXGradient(Unit("1", 2))
    with AttributionSum(a, b, weights=[1.0, -2.0]).prepare(net, ["x"], ["y"]) as hooked:
        found = hooked.observe(TensorDict({"x": x}, [5]))["attr", "x"]
    leaf = x.clone().requires_grad_()
    units = net[:2](leaf)
    (gradient,) = torch.autograd.grad((units[:, 0] - 2 * units[:, 2]).sum(), leaf)
    torch.testing.assert_close(found, x * gradient)


def test_differences_of_units_are_what_they_were():
    net, x = nn.Linear(3, 4).double(), torch.randn(5, 3, dtype=torch.float64)
    contrast = Saliency(Unit("", 0) - Unit("", 2), abs=False)
    with contrast.prepare(net, ["x"], ["y"]) as hooked:
        found = hooked.observe(TensorDict({"x": x}, [5]))["attr", "x"]
    torch.testing.assert_close(found, (net.weight[0] - net.weight[2]).detach().expand(5, 3))
