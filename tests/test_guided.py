"""Guided backpropagation and the deconvnet as methods, against gradients carried back by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from pristine import assert_same, snapshot
from tdhook_like import Each, PathError, RuleError, Saliency
from tdhook_like.attribution.rectified import Deconvolution, GuidedBackprop

RULES: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "guided": (GuidedBackprop, lambda x, g: g * (x > 0) * (g > 0)),
    "deconvolution": (Deconvolution, lambda x, g: g * (g > 0)),
}


class Net(nn.Module):
    """ReLUs as modules and in every spelling of the function, one module used twice, a squashing."""

    def __init__(self, relus: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in relus)
        self.modules_ = nn.ModuleList(r for r in relus if isinstance(r, nn.Module))
        self.relus, self.top = relus, nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer, relu in zip(self.layers, self.relus, strict=True):
            x = relu(torch.tanh(layer(x)) + 0.1)
        return self.top(x)


def by_hand(net: Net, x: Tensor, output: int, passes: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    inputs, squashed = [], []
    with torch.no_grad():
        for layer in net.layers:
            squashed.append(torch.tanh(layer(x)))
            inputs.append(squashed[-1] + 0.1)
            x = inputs[-1].clamp(min=0)
        g = net.top.weight[output].expand(len(x), -1)
        for layer, a, t in reversed(list(zip(net.layers, inputs, squashed, strict=True))):
            g = (passes(a, g) * (1 - t**2)) @ layer.weight
    return g


twice = nn.ReLU()
SPELLINGS: dict[str, list[Any]] = {
    "modules": [nn.ReLU(), nn.ReLU(), nn.ReLU()],
    "a module used twice": [twice, nn.ReLU(), twice],
    "modules in place": [nn.ReLU(inplace=True), nn.ReLU(inplace=True)],
    "functions": [F.relu, torch.relu, Tensor.relu],
    "functions in place": [Tensor.relu_, lambda x: F.relu(x, inplace=True)],
    "both": [nn.ReLU(), F.relu, nn.ReLU()],
}


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", RULES)
def test_gradients_are_rectified_at_relus_and_nowhere_else(name, spelling, drive):
    make, passes = RULES[name]
    net, x = Net(SPELLINGS[spelling]).double(), torch.randn(6, 5, dtype=torch.float64)
    before = snapshot(net)
    functional = "functions" in spelling
    with make(Each("y"), functional=functional, unhandled="raise").prepare(
        net, ["x"], ["y"]
    ) as hooked:
        td = (hooked if drive else hooked.observe)(TensorDict({"x": x}, [6]))
    assert_same(before, snapshot(net))
    expected = torch.stack([by_hand(net, x, i, passes) for i in range(2)], 1)
    torch.testing.assert_close(td["attr", "x"], expected, rtol=1e-11, atol=1e-13)
    with Saliency(Each("y"), abs=False).prepare(net, ["x"], ["y"]) as hooked:
        plain = hooked(TensorDict({"x": x}, [6]))["attr", "x"]
    assert not torch.allclose(plain, expected)


@pytest.mark.parametrize("make", [GuidedBackprop, Deconvolution])
def test_it_is_given_at_submodules_as_well(make):
    net, x = (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double(),
        torch.randn(5, 3).double(),
    )
    with make("y", at="0").prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, [5]))
    g = net[2].weight.detach().clamp(min=0).expand(5, -1)
    if make is GuidedBackprop:
        g = g * (net[0](x) > 0)
    torch.testing.assert_close(td["attr_at", "0"], g)
    torch.testing.assert_close(td["attr", "x"], g @ net[0].weight.detach())


@pytest.mark.parametrize("make", [GuidedBackprop, Deconvolution])
def test_what_would_be_a_plain_gradient_is_refused(make):
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU())
    with pytest.raises(PathError, match=r"no nn.ReLU.*functional=True"):
        make(("y", 0)).prepare(net, ["x"], ["y"])
    with pytest.raises(RuleError, match="rule of its own"):
        make("y", rules=lambda name, module: None)
    assert make("y").replaced(root="why").root == "why"
