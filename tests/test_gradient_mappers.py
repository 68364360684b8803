"""Guided backprop, deconvnet, beta-smooth and excitation backprop as mappers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from rule_samples import assert_close, explain, grid, made
from tdhook_like import InputXGradient, Saliency
from tdhook_like.attribution.lrp.mappers.choosing import Mapper
from tdhook_like.attribution.lrp.mappers.gradients import (
    BetaSmoothMapper,
    DeconvnetMapper,
    ExcitationMapper,
    GuidedBackpropMapper,
)
from tdhook_like.errors import PathError, RuleError


def rules(mapper: Mapper, model: nn.Module) -> dict[str, str]:
    """Which rule every path gets, by name."""
    return {line.path: type(line.rule).__name__ for line in mapper.plan(model).lines}


def test_mappers_show_what_was_given_to_them_and_refuse_wrong_numbers():
    assert repr(GuidedBackpropMapper()) == "GuidedBackpropMapper()"
    assert repr(BetaSmoothMapper(3.0, functional=True)) == (
        "BetaSmoothMapper(beta=3.0, functional=True)"
    )
    with pytest.raises(RuleError, match="beta must be a finite number above 0"):
        BetaSmoothMapper(0.0)


class Functional(nn.Module):
    """A net whose rectifiers and squashing are functions."""

    def __init__(self, relu: Any) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.relu(self.first(x)))
        return self.third(self.relu(self.second(h)) * h)


GRADIENTS: dict[str, tuple[Any, Any]] = {
    "guided": (GuidedBackpropMapper, lambda x, g: g * (x > 0) * (g > 0)),
    "deconvnet": (DeconvnetMapper, lambda x, g: g * (g > 0)),
    "beta-smooth": (
        functools.partial(BetaSmoothMapper, 2.0),
        lambda x, g: g * torch.sigmoid(2.0 * x),
    ),
}


def backward(net: Functional, x: Tensor, passes: Any) -> Tensor:
    """The gradient written out by hand, one batch of rows, with another way through ReLUs."""
    w1, w2, w3 = (layer.weight.detach() for layer in (net.first, net.second, net.third))
    a1 = net.first(x).detach()
    h = torch.tanh(a1.clamp(min=0))
    a2 = net.second(h).detach()
    g_product = w3.expand(len(x), -1)
    g_h = g_product * a2.clamp(min=0) + passes(a2, g_product * h) @ w2
    return passes(a1, g_h * (1 - h**2)) @ w1


@pytest.mark.parametrize(
    "relu",
    [nn.ReLU(), F.relu, torch.relu, Tensor.relu],
    ids=["module", "F.relu", "torch.relu", "x.relu"],
)
@pytest.mark.parametrize("name", GRADIENTS)
def test_only_rectifiers_pass_gradients_in_another_way(name: str, relu: Any):
    make, passes = GRADIENTS[name]
    net = made("functional", lambda: Functional(relu))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()
    want = backward(net, x, passes)
    functional = not isinstance(relu, nn.ReLU)
    mapper = make(functional=functional)
    for method, expected in (
        (Saliency("y", abs=False, rules=mapper, unhandled="raise"), want),
        (InputXGradient("y", rules=mapper), x * want),
    ):
        with method.prepare(net, ["x"], ["y"]) as hooked:
            td = hooked(TensorDict({"x": x}, [6]))
        torch.testing.assert_close(td["attr", "x"], expected)
        torch.testing.assert_close(td["y"], net(x).detach(), rtol=0, atol=0)
    plain = torch.autograd.grad(net(x.requires_grad_()).sum(), x)[0]
    assert not torch.allclose(want, plain)


@pytest.mark.parametrize("make", [GuidedBackpropMapper, DeconvnetMapper, BetaSmoothMapper])
def test_a_model_without_rectifiers_is_refused_unless_they_are_functions(make: Any):
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with pytest.raises(PathError, match=r"the model has no nn.ReLU.*'Tanh'.*functional=True"):
        Saliency("y", rules=make()).prepare(net, ["x"], ["y"])
    assert make(functional=True).plan(net).lines == ()


def test_gradient_mappers_give_rectifiers_their_rule_and_nothing_else_any():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Conv1d(2, 2, 1), nn.ReLU(), nn.Tanh())
    assert rules(GuidedBackpropMapper(), net) == dict.fromkeys("13", "GuidedReLURule")
    assert rules(DeconvnetMapper(), net) == dict.fromkeys("13", "DeconvReLURule")
    assert rules(BetaSmoothMapper(), nn.Sequential(nn.Softmax(-1), net)) == {
        "1.1": "BetaSmoothRule",
        "1.3": "BetaSmoothRule",
    }


def test_excitation_gives_probabilities_that_an_input_is_the_winner():
    net = made("excited", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    x = grid((3, 4), "excited x").abs() + 0.25
    with torch.no_grad():
        net[0].bias.fill_(2.0)
    R = torch.tensor([1.0, 0.0]).double().expand(3, 2)
    got = explain(net, ExcitationMapper(1e-12), [x], R)[0][0]
    # Zhang et al. 2016, eq. 3 to 5, unit by unit, from the output down.
    P = R.clone()
    for layer, inputs in ((net[2], net[:2](x)), (net[0], x)):
        weights, found = layer.weight.detach().clamp(min=0), torch.zeros(3, layer.in_features)
        found = found.double()
        for b in range(3):
            for j in range(layer.out_features):
                z = inputs[b].detach() * weights[j]
                if z.sum() > 0:
                    found[b] += z / z.sum() * P[b, j]
        P = found
    assert_close(got, P, 1e-8)
    torch.testing.assert_close(got.sum(1), torch.ones(3).double())
    assert rules(ExcitationMapper(), nn.Conv1d(1, 1, 1)) == {"": "ExcitationRule"}
