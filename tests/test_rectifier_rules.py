"""Rules that change the gradient of rectifiers, through whole networks; and excitation backprop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import reference_lrp as ref
import rule_references as want_of
from pristine import bits
from rule_samples import assert_close, explain, grid, made, only
from tdhook_like import LRP, Saliency
from tdhook_like.attribution.lrp import BaseRuleMapper, Inputs, Rule, RuleMapper
from tdhook_like.attribution.lrp.rules.rectifiers import (
    BetaSmoothRule,
    DeconvReLURule,
    ExcitationRule,
    GuidedReLURule,
)
from tdhook_like.errors import RuleError
from tdhook_like.hooks.surrogate import Twice

F64 = torch.float64
RULES: dict[str, tuple[Rule, Any]] = {
    "guided": (GuidedReLURule(), want_of.guided),
    "deconv": (DeconvReLURule(), want_of.deconvolved),
    "beta smooth": (BetaSmoothRule(10), want_of.smoothed),
}
every_rule = pytest.mark.parametrize("name", RULES)


def net_of(inplace: bool = False) -> nn.Sequential:
    return made(
        "rectified",
        lambda: nn.Sequential(
            *(nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 5), nn.ReLU(inplace)),
            nn.Linear(5, 2),
        ),
    )


def on_relus(rule: Rule) -> RuleMapper:
    return lambda name, module: rule if isinstance(module, nn.ReLU) else None


def by_hand(net: nn.Sequential, x: Tensor, passes: Any, column: int) -> Tensor:
    """The gradient of one output, layer by layer, each rectifier's replaced by ``passes``."""
    inputs = []
    for layer in net:
        inputs.append(x)
        x = layer(x.clone()).detach()
    gradient = torch.zeros_like(x)
    gradient[:, column] = 1
    for layer, z in zip(reversed(net), reversed(inputs), strict=True):
        linear = isinstance(layer, nn.Linear)
        gradient = gradient @ layer.weight.detach() if linear else passes(z, gradient)
    return gradient


@every_rule
@pytest.mark.parametrize("inplace", [False, True], ids=["copying", "in place"])
def test_a_networks_saliency_under_a_rule_is_its_paper_layer_by_layer(name: str, inplace: bool):
    rule, passes = RULES[name]
    net, x = net_of(inplace), grid((5, 4), "x")
    plain, td = net(x).detach(), TensorDict({"x": x.clone()}, [5])
    method = Saliency(("y", 1), abs=False, rules=on_relus(rule))
    with method.prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(td)
    assert bits(td["y"]) == bits(plain)
    assert_close(td["attr", "x"], by_hand(net, x, passes, 1), 1e-12)
    assert not torch.allclose(td["attr", "x"], by_hand(net, x, lambda z, g: g * (z > 0), 1))


@every_rule
def test_under_lrp_the_same_gradient_is_multiplied_by_the_input(name: str):
    rule, passes = RULES[name]
    net, x = net_of(), grid((5, 4), "x")
    R = torch.zeros(5, 2, dtype=F64)
    R[:, 0] = net(x).detach()[:, 0]
    found = explain(net, on_relus(rule), [x], R)[0][0]
    assert_close(found, x * by_hand(net, x, passes, 0), 1e-10)


@every_rule
def test_an_in_place_rectifier_keeps_what_it_needs_under_vmap_and_twice_backward(name: str):
    rule, passes = RULES[name]
    net, x = net_of(True), torch.randn(3, 4, dtype=F64)

    def ruled(row: Tensor) -> Tensor:
        for layer in net:
            kept = row.clone()
            row = layer(row)
            row = rule.apply(layer, Inputs((kept,)), row) if isinstance(layer, nn.ReLU) else row
        return row[..., 1].sum()

    want = by_hand(net, x, passes, 1)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(ruled))(x), want)
    x.requires_grad_()
    with Twice() as twice:
        score = ruled(x)
    twice.relevance = True
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    twice.relevance = False
    torch.testing.assert_close(gradient.detach(), want)
    if name != "beta smooth":
        assert not torch.autograd.grad(gradient.sum(), x, materialize_grads=True)[0].any()
        return
    (slope,) = torch.autograd.grad(gradient.sum(), x)
    step = torch.full_like(x, 1e-6)
    ends = [by_hand(net, x.detach() + sign * step, passes, 1).sum(1) for sign in (1, -1)]
    torch.testing.assert_close(slope.sum(1), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("x", [-1e3, -3.0, 0.0, 3.0, 1e3])
def test_the_smooth_slope_is_the_logistic_function_also_far_out(x: float):
    value = torch.tensor([x], dtype=F64, requires_grad=True)
    y = BetaSmoothRule(2.5).apply(nn.ReLU(), Inputs((value,)), torch.relu(value))
    (slope,) = torch.autograd.grad(y.sum(), value)
    torch.testing.assert_close(slope, torch.special.expit(2.5 * value.detach()), rtol=1e-15, atol=0)


@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), float("inf"), "sharp", None])
def test_a_beta_that_bends_nothing_is_refused(beta: Any):
    with pytest.raises(RuleError, match="BetaSmoothRule: beta must be a finite number above 0"):
        BetaSmoothRule(beta)


# --- excitation backprop --------------------------------------------------------------------------


def test_the_probability_to_win_is_the_number_worked_out_by_hand():
    layer = nn.Linear(3, 2).double()
    layer.weight.data = torch.tensor([[1.0, -2.0, 3.0], [2.0, 1.0, -1.0]], dtype=F64)
    x = torch.tensor([[1.0, 2.0, 1.0]], dtype=F64)
    found = explain(layer, only(layer, ExcitationRule(1e-13)), [x], torch.tensor([[0.4, 0.6]]))
    # Output 0 is won 1:3 by inputs 0 and 2, output 1 is won 2:2 by inputs 0 and 1.
    want = torch.tensor([[0.1 + 0.3, 0.3, 0.3]], dtype=F64)
    torch.testing.assert_close(found[0][0], want, rtol=1e-6, atol=1e-6)


def test_probabilities_add_up_to_one_through_a_network():
    net = made("excited", lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    for layer in (net[0], net[2]):
        layer.weight.data[:, 0] = 0.5  # every unit has an excitatory input
    x = torch.rand(6, 5, dtype=F64) + 0.1
    net[0].bias.data.fill_(2.0)
    mapper = BaseRuleMapper(
        rule_mapper=lambda name, m: ExcitationRule(1e-13) if isinstance(m, nn.Linear) else None
    )
    with LRP(mapper, ("y", 2), start="one").prepare(net, ["x"], ["y"]) as hooked:
        found = hooked(TensorDict({"x": x}, [6]))["attr", "x"]
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(6, dtype=F64))
    start = torch.tensor([[0.0, 0.0, 1.0]] * 6, dtype=F64)
    rules = [want_of.excitation, None, want_of.excitation]
    assert_close(found, ref.propagate(list(net), x, start, rules), 1e-5)


def test_inhibited_inputs_and_inputs_below_zero_win_nothing():
    layer = made("layer", lambda: nn.Linear(6, 3))
    x, R = grid((4, 6), "x"), torch.ones(4, 3)
    found = explain(layer, only(layer, ExcitationRule()), [x], R)[0][0]
    assert found[x <= 0].abs().max() < 1e-9 and (found >= 0).all() and found.any()
