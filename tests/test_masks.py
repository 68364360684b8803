"""Concepts: relevance that passes by some channels of a submodule's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import reference_lrp as ref
from pristine import bits
from rule_samples import assert_close, explain, grid, made, only
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    IgnoreRule,
    Inputs,
    PassRule,
    Rule,
    UniformRule,
    ZPlusRule,
)
from tdhook_like.attribution.lrp.rules.masks import MaskRule
from tdhook_like.errors import RuleError

F64 = torch.float64


def net_of() -> nn.Sequential:
    return made(
        "concepts",
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(16, 2)),
        ),
    )


def conditional(net: nn.Sequential, x: Tensor, R: Tensor, mask: Tensor, at: int) -> Tensor:
    """EpsilonPlus by hand, the relevance behind layer ``at`` times ``mask``."""
    layers = list(net)
    rules = [
        {nn.Conv2d: ref.zplus, nn.Linear: ref.epsilon}.get(type(layer))  # pyright: ignore
        for layer in layers
    ]
    hidden = nn.Sequential(*layers[: at + 1])(x).detach()
    behind = ref.propagate(layers[at + 1 :], hidden, R, rules[at + 1 :])
    return ref.propagate(layers[: at + 1], x, behind.reshape(hidden.shape) * mask, rules[: at + 1])


def planes(*kept: float) -> Tensor:
    return torch.tensor(kept, dtype=F64)[:, None, None]


@pytest.mark.parametrize(
    ("channels", "mask"),
    [
        (1, planes(0, 1, 0, 0)),
        (-1, planes(0, 0, 0, 1)),
        ([0, 2], planes(1, 0, 1, 0)),
        ((3, 3, 0), planes(1, 0, 0, 1)),
        (torch.tensor([0, 2]), planes(1, 0, 1, 0)),
        (torch.tensor(2), planes(0, 0, 1, 0)),
        (torch.tensor([True, False, False, True]), planes(1, 0, 0, 1)),
        (torch.tensor([0.5, 0.0, 2.0, 1.0]), planes(0.5, 0, 2, 1)),
        (planes(1, 0, 1, 0).bool(), planes(1, 0, 1, 0)),
        (torch.eye(2).expand(4, 2, 2), torch.eye(2, dtype=F64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("at", ["2", "3"], ids=["layer", "rectifier"])
def test_relevance_passes_a_mapper_by_the_chosen_channels_alone(channels: Any, mask: Tensor, at):
    net, x = net_of(), grid((2, 1, 4, 4), "x")
    R = torch.where(net(x) == 0, 0.0, grid((2, 2), "R") + 0.125)
    plain = net(x).detach()
    inner = {"2": ZPlusRule(), "3": None}[at]
    rule = MaskRule(channels, inner)
    mapper = EpsilonPlus(rule_mapper=lambda name, m: rule if name == at else None)
    found, y = explain(net, mapper, [x], R)
    assert bits(y) == bits(plain)
    assert_close(found[0], conditional(net, x, R, mask, int(at)), 1e-9)


def test_the_parts_of_all_channels_add_up_to_the_whole():
    net, x = net_of(), grid((2, 1, 4, 4), "x")
    R = grid((2, 2), "R") + 0.125
    whole = explain(net, EpsilonPlus(), [x], R)[0][0]
    parts = []
    for channel in range(4):
        rules = {"2": MaskRule(channel, ZPlusRule())}
        mapper = EpsilonPlus(rule_mapper=lambda name, m, rules=rules: rules.get(name))
        parts.append(explain(net, mapper, [x], R)[0][0])
    assert_close(torch.stack(parts).sum(0), whole, 1e-10)


def test_masks_at_several_modules_are_concepts_under_concepts():
    net, x = net_of(), grid((1, 1, 4, 4), "x").abs()
    R = grid((1, 2), "R") + 0.125
    rules = {"0": MaskRule(1, ZPlusRule()), "2": MaskRule([0, 3], ZPlusRule())}
    mapper = EpsilonPlus(rule_mapper=lambda name, m: rules.get(name))
    hidden = net[1](net[0](x)).detach()
    rest = list(net)[2:]
    at_hidden = conditional(nn.Sequential(*rest), hidden, R, planes(1, 0, 0, 1), 0)
    want = ref.relevance(net[0], x, at_hidden * planes(0, 1, 0), ref.zplus)
    assert_close(explain(net, mapper, [x], R)[0][0], want, 1e-9)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("rule", [None, IgnoreRule()], ids=str)
def test_without_a_rule_of_its_own_the_module_keeps_its_gradient(dim: int, rule: Rule | None):
    layer, x = made("layer", lambda: nn.Linear(4, 3)), grid((2, 4), "x")
    y = layer(x).detach()
    R = y.clone()
    found = explain(layer, only(layer, MaskRule([0, 2], rule, dim)), [x], R)[0][0]
    gradient = layer.weight.detach()[[0, 2]].sum(0)
    assert_close(found, x * gradient, 1e-10)


@pytest.mark.parametrize("dim", [-3, 1])
def test_a_dimension_counted_from_the_end_holds_under_vmap(dim: int):
    conv = made("conv", lambda: nn.Conv2d(1, 3, 2))
    x = torch.randn(2, 4, 1, 3, 3, dtype=F64)
    rule = MaskRule([2], FlatRule(), -3)

    def ruled(sample: Tensor) -> Tensor:
        return rule.apply(conv, Inputs((sample,)), conv(sample)).sum()

    found = torch.func.vmap(torch.func.vmap(torch.func.grad(ruled)))(x)
    fixed = MaskRule([2], FlatRule(), dim)
    for i, batch in enumerate(x):
        batch = batch.clone().requires_grad_()
        y = fixed.apply(conv, Inputs((batch,)), conv(batch))
        torch.testing.assert_close(found[i], torch.autograd.grad(y.sum(), batch)[0])


def test_what_passes_a_dead_unit_is_not_lost_when_a_pass_rule_is_masked():
    net = made("dead", lambda: nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 2)))
    net[0].weight.data[:2] = 0
    net[0].bias.data[:2] = 0  # the sigmoid's input is exactly zero, its output is not
    x, R = grid((2, 4), "x"), grid((2, 2), "R") + 0.125
    rules = {"0": FlatRule(), "1": MaskRule([0, 4], PassRule()), "2": FlatRule()}
    found = explain(net, lambda name, m: rules.get(name), [x], R)[0][0]
    want = R.sum(1, keepdim=True) * (2 / 5) / 4
    torch.testing.assert_close(found, want.expand(2, 4), rtol=1e-5, atol=1e-5)
    assert MaskRule(0, PassRule()).feeds_zeros and MaskRule(0, FlatRule()).feeds_zeros
    assert not MaskRule(0).feeds_zeros and not MaskRule(0, EpsilonRule()).feeds_zeros


def test_a_mask_goes_with_rules_of_operands_and_with_rules_written_as_relevance():
    class Twofold(Rule):
        def relevance(self, module, inputs, output, R_out):
            return 2 * R_out

    x, R = grid((2, 3), "x") + 1 / 8, grid((2, 3), "R")
    module = nn.Identity()
    kept = R * torch.tensor([0.0, 1.0, 0.0])
    for rule, want in ((Twofold(), 2 * kept), (UniformRule(), kept)):
        found = explain(module, only(module, MaskRule(1, rule)), [x], R)[0][0]
        assert_close(found, want, 1e-10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MaskRule([]), "index, several of them"),
        (lambda: MaskRule("all"), "index, several of them"),  # pyright: ignore
        (lambda: MaskRule([0, 1.5]), "index, several of them"),  # pyright: ignore
        (lambda: MaskRule(True), "index, several of them"),
        (lambda: MaskRule(None), "index, several of them"),  # pyright: ignore
        (lambda: MaskRule(torch.tensor([], dtype=torch.long)), "index, several of them"),
        (lambda: MaskRule(torch.tensor([1.0, float("nan")])), "finite"),
        (lambda: MaskRule(torch.tensor(1.0)), "has a dimension"),
        (lambda: MaskRule(0, EpsilonRule), "Rule instance or None"),  # pyright: ignore
        (lambda: MaskRule(0, dim=1.0), "dim must be a whole number"),  # pyright: ignore
    ],
)
def test_what_is_no_mask_is_refused(make: Callable[[], Rule], words: str):
    with pytest.raises(RuleError, match=words):
        make()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (MaskRule([0, 4, -5]), r"no channel 4, -5.*shape \(2, 4\).*dimension 1"),
        (MaskRule(0, dim=2), r"no dimension 2.*\(2, 4\)"),
        (MaskRule(torch.ones(3)), r"mask of 3 entries.*\(2, 4\)"),
        (MaskRule(torch.ones(3, 1, 4)), r"shape \(3, 1, 4\) does not broadcast.*\(2, 4\)"),
    ],
    ids=["channels", "dimension", "length", "shape"],
)
def test_channels_that_the_output_does_not_have_are_refused_with_path_and_shape(rule, words: str):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    with pytest.raises(RuleError, match=f"'0'.*MaskRule on Linear.*{words}"):
        explain(net, only(net[0], rule), [torch.ones(2, 3)], torch.ones(2, 1))


def test_a_mask_can_sit_where_its_rule_can_and_says_why_not():
    with pytest.raises(RuleError, match=r"MaskRule.*cannot sit on ReLU.*has none"):
        MaskRule(0, ZPlusRule()).register(nn.ReLU())
    lstm = nn.LSTM(3, 2, batch_first=True)
    td = TensorDict({"x": torch.ones(2, 4, 3)}, [2])

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = lstm

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0][:, -1]

    method = LRP(lambda name, m: MaskRule(0) if name == "lstm" else None, ("y", 0))
    with (
        method.prepare(Last(), ["x"], ["y"]) as hooked,
        pytest.raises(RuleError, match=r"'lstm'.*returns a tuple"),
    ):
        hooked(td)
