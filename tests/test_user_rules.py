"""Rules of a user's own: both doors, several inputs and outputs, and what is refused."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import MultiAgentMLP

import reference_lrp as ref
from pristine import assert_same, bits, snapshot
from rule_samples import AFFINE, Product, Sample, assert_close, explain, grid, only
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    Inputs,
    Rule,
    UniformEpsilonRule,
)
from tdhook_like.errors import RuleError
from tdhook_like.hooks.surrogate import nonzero, stabilised, unit


class ByRelevance(Rule):
    """Epsilon as the papers write it: the output's relevance in, the input's out."""

    def __init__(self, epsilon: float = 1e-6) -> None:
        self.epsilon = epsilon

    def relevance(self, module: nn.Module, inputs: Inputs, output: Tensor, R_out: Tensor) -> Tensor:
        ratio = R_out / stabilised(output, self.epsilon)
        x = inputs[0].clone().requires_grad_()
        with torch.enable_grad():
            back = torch.autograd.grad(module.forward(x), x, ratio)[0]
        return inputs[0] * back


class BySurrogate(Rule):
    """The same by the other door."""

    feeds_zeros = False

    def __init__(self, epsilon: float = 1e-6) -> None:
        self.epsilon = epsilon

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Tensor) -> Tensor:
        return output * (nonzero(output) / stabilised(output, self.epsilon))


class FlatByRelevance(Rule):
    """Equal shares for all inputs of a dense layer."""

    def relevance(self, module: nn.Module, inputs: Inputs, output: Tensor, R_out: Tensor) -> Tensor:
        x = inputs[0]
        ratio = R_out / (x.shape[-1] + 1e-6)
        return ratio.sum(-1, keepdim=True).expand(x.shape)


DOORS = [ByRelevance(), BySurrogate()]
DOOR_IDS = ["relevance", "surrogate"]


# --- one rule, both doors -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", DOORS, ids=DOOR_IDS)
@pytest.mark.parametrize("sample", AFFINE, ids=lambda sample: sample.name)
def test_epsilon_by_either_door_is_the_built_in_rule(rule: Rule, sample: Sample):
    module, x = sample.module(), sample.inputs("mixed")[0]
    plain = module(x).detach()
    R = torch.where(plain == 0, 1e-6, grid(plain.shape, "R") + 0.125)
    found, y = explain(module, only(module, rule), [x], R)
    assert_close(found[0], ref.relevance(module, x, R, ref.epsilon), 1e-10)
    assert_close(found[0], explain(module, only(module, EpsilonRule()), [x], R)[0][0], 1e-12)
    assert bits(y) == bits(plain)


@pytest.mark.parametrize("rule", [ByRelevance(1e-9), BySurrogate(1e-9)], ids=DOOR_IDS)
def test_a_whole_network_may_be_ruled_by_either_door(rule: Rule):
    net = Sample(
        "net", lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), ()
    ).module()
    x, R = grid((3, 4), "x"), grid((3, 3), "R")
    mapper = EpsilonPlus(rule_mapper=lambda n, m: rule if isinstance(m, nn.Linear) else None)
    got = explain(net, mapper, [x], R)[0][0]
    assert_close(got, explain(net, EpsilonPlus(1e-9), [x], R)[0][0], 1e-9)


def test_relevance_for_dead_units_passes_the_activation_before_them():
    net = Sample(
        "flat", lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)), ()
    ).module()
    td = TensorDict({"x": grid((3, 4), "x")}, [3])
    assert (net[:2](td["x"]) == 0).any()
    found = []
    for rule in (FlatRule(), FlatByRelevance()):
        mapper = EpsilonPlus(rule_mapper=lambda name, m, rule=rule: rule if name == "2" else None)
        with LRP(mapper, "y").prepare(net, ["x"], ["y"]) as hooked:
            found.append(hooked(td.clone())["attr", "x"])
    assert_close(found[1], found[0], 1e-10)


def test_relevance_arrives_as_it_was_started_and_leaves_as_it_was_returned():
    seen: list[tuple[Tensor, ...]] = []
    given = grid((2, 4), "given") + 10

    class Spy(Rule):
        def relevance(self, module: Any, inputs: Inputs, output: Any, R_out: Any) -> Tensor:
            seen.append((inputs[0], output, R_out))
            assert not any(t.requires_grad for t in seen[-1])
            return given

    layer, x, R = Sample("spy", lambda: nn.Linear(4, 3), ()).module(), grid((2, 4), "x"), None
    x[:, 0] = 0.0
    layer.weight.data[1], layer.bias.data[1] = 0.0, 0.0  # an output of exactly zero
    R = grid((2, 3), "R") + 0.125
    alone = torch.zeros_like(R)
    alone[:, 1] = R[:, 1]
    td = TensorDict({"x": x}, [2])
    with LRP(only(layer, Spy()), ("y", 1), start=R[:, 1:2]).prepare(layer, ["x"], ["y"]) as hooked:
        found = hooked(td)["attr", "x"]
    (x_seen, y_seen, R_seen), y = seen[0], layer(x).detach()
    assert x_seen.equal(x) and bits(y_seen) == bits(y)
    assert R_seen.equal(alone)
    torch.testing.assert_close(found, given, rtol=1e-15, atol=0)


# --- several inputs, several outputs --------------------------------------------------------------


class Pair(NamedTuple):
    total: Tensor
    parts: dict[str, Tensor]


class Mix(nn.Module):
    """Reads positional and keyword tensors, an integer and a flag; returns nested tensors."""

    def forward(self, a: Tensor, *, b: Tensor, index: Tensor, flag: bool = True) -> Pair:
        assert flag
        return Pair(a + b, {"product": a * b, "picked": a[:, index]})


class MixNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.index = Mix(), torch.tensor([2, 0])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total, parts = self.mix(a, b=b, index=self.index)
        return torch.cat([total, parts["product"], parts["picked"]], -1)


class MixByRelevance(Rule):
    """Sums by share, products half and half, picked entries where they came from."""

    def relevance(self, module: nn.Module, inputs: Inputs, output: Any, R_out: Any) -> Any:
        a, b = inputs.tensors
        assert a is inputs[0] and b is inputs.kwargs["b"]
        assert not inputs.kwargs["index"].is_floating_point()
        total, product, picked = R_out
        assert total.shape == output.total.shape and picked.shape == (len(a), 2)
        to_a = a * total / (a + b) + product / 2
        to_a = to_a.index_add(1, inputs.kwargs["index"], picked)
        return to_a, b * total / (a + b) + product / 2


class MixBySurrogate(Rule):
    """The same by the other door."""

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        half = output.parts["product"] / 2
        return Pair(output.total, {"product": half, "picked": output.parts["picked"]})


@pytest.mark.parametrize("rule", [MixByRelevance(), MixBySurrogate()], ids=DOOR_IDS)
def test_a_rule_sees_every_input_and_every_output(rule: Rule):
    net = MixNet()
    a, b = grid((2, 3), "a").abs() + 0.25, grid((2, 3), "b").abs() + 0.25
    R = grid((2, 8), "R")
    found, y = explain(net, only(net.mix, rule), [a, b], R)
    assert bits(y) == bits(net(a, b))
    total, product, picked = R.split([3, 3, 2], -1)
    to_a = a * total / (a + b) + product / 2
    to_a[:, 2] += picked[:, 0]
    to_a[:, 0] += picked[:, 1]
    assert_close(found[0], to_a, 1e-12)
    assert_close(found[1], b * total / (a + b) + product / 2, 1e-12)


@pytest.mark.parametrize("rule", [MixByRelevance(), MixBySurrogate()], ids=DOOR_IDS)
def test_outputs_keep_their_structure_under_a_rule(rule: Rule):
    kinds: list[Any] = []

    class Looking(MixNet):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            pair = self.mix(a, b=b, index=self.index)
            kinds.append((type(pair), type(pair.parts), list(pair.parts)))
            return pair.total

    net = Looking()
    explain(net, only(net.mix, rule), [torch.ones(1, 3), torch.ones(1, 3)], torch.ones(1, 3))
    assert set(map(str, kinds)) == {str((Pair, dict, ["product", "picked"]))}


def test_an_input_that_is_not_attributed_may_be_given_relevance_that_goes_nowhere():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product, self.scale = Product(), nn.Parameter(torch.full((3,), 2.0).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.product(x, self.scale)

    class Halves(Rule):
        def relevance(self, module: Any, inputs: Any, output: Any, R_out: Tensor) -> Any:
            return R_out / 2, (R_out / 2).sum(0)

    net, x, R = Scaled(), grid((2, 3), "x"), grid((2, 3), "R")
    before = snapshot(net)
    assert_close(explain(net, only(net.product, Halves()), [x], R)[0][0], R / 2, 1e-12)
    assert_same(before, snapshot(net))


def test_a_surrogate_of_none_keeps_the_modules_own_gradient():
    class Nothing(Rule):
        def surrogate(self, module: Any, inputs: Any, output: Any) -> None:
            return None

    layer, x, R = Sample("none", lambda: nn.Linear(3, 2), ()).module(), grid((2, 3), "x"), None
    R = layer(x).detach()
    got = explain(layer, only(layer, Nothing()), [x], R)[0][0]
    assert_close(got, x * layer.weight.detach().sum(0), 1e-12)


# --- parameters, repeats --------------------------------------------------------------


class Learned(Rule):
    """Shares between two operands by a number that could be learned."""

    def __init__(self, share: Tensor) -> None:
        self.share = share

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Tensor) -> Tensor:
        a, b = inputs
        share = self.share.detach()
        return share * a * b.detach() + (1 - share) * a.detach() * b


def test_a_rule_may_have_parameters_of_its_own():
    net, inputs = Product(), [grid((2, 3), "a"), grid((2, 3), "b")]
    R = torch.where(net(*inputs) == 0, 0.0, grid((2, 3), "R"))
    rule = Learned(nn.Parameter(torch.tensor(0.25).double()))
    to_a, to_b = explain(net, only(net, rule), inputs, R)[0]
    assert_close(to_a, R / 4, 1e-12)
    assert_close(to_b, 3 * R / 4, 1e-12)
    assert rule.share.grad is None
    with torch.no_grad():
        rule.share.fill_(1.0)
    to_a, to_b = explain(net, only(net, rule), inputs, R)[0]
    assert_close(to_a, R, 1e-12)
    assert not to_b.any()
    assert repr(ByRelevance(0.5)) == "ByRelevance(epsilon=0.5)"


def test_a_product_by_relevance_agrees_with_the_uniform_rule():
    class Evenly(Rule):
        def relevance(self, module: Any, inputs: Any, output: Any, R_out: Tensor) -> Sequence[Any]:
            return [R_out.sum_to_size(x.shape) / 2 for x in inputs]

    sample = Sample("product that broadcasts", Product, ((2, 3), (2, 1)))
    net, inputs = sample.module(), sample.inputs("mixed")
    R = torch.where(net(*inputs) == 0, 0.0, grid((2, 2, 3), "R"))
    mine = explain(net, only(net, Evenly()), inputs, R)[0]
    built_in = explain(net, only(net, UniformEpsilonRule(1e-13)), inputs, R)[0]
    for got, want in zip(mine, built_in, strict=True):
        assert_close(got, want, 1e-10)


def test_relevance_is_asked_once_for_each_call_and_each_target():
    asked: list[int] = []

    class Counts(Rule):
        def relevance(self, module: Any, inputs: Any, output: Any, R_out: Tensor) -> Tensor:
            asked.append(1)
            return R_out

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tanh = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.tanh(self.tanh(x))

    net, td = Twice(), TensorDict({"x": torch.randn(2, 3)}, [2])
    with LRP(only(net.tanh, Counts()), {"a": ("y", 0), "b": ("y", 1)}).prepare(
        net, ["x"], ["y"]
    ) as hooked:
        found = hooked(td)
    assert len(asked) == 4
    torch.testing.assert_close(found["attr", "a", "x"][:, 0], td["y"][:, 0])
    torch.testing.assert_close(found["attr", "b", "x"][:, 1], td["y"][:, 1])


class FlatBySurrogate(Rule):
    """Equal shares by the other door, which is open under vmap too."""

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Tensor) -> Tensor:
        n = inputs[0].shape[-1]
        return unit(inputs[0]).sum(-1, keepdim=True) * (nonzero(output) / (n + 1e-6))


@pytest.mark.parametrize("rule", [FlatBySurrogate(), FlatByRelevance()], ids=DOOR_IDS[::-1])
def test_agents_with_weights_of_their_own_are_ruled_by_surrogates(rule: Rule):
    net = MultiAgentMLP(3, 2, 2, centralized=False, share_params=False, depth=0).double()
    td = TensorDict({"x": torch.randn(4, 2, 3).double()}, [4])

    def mapper(name: str, module: nn.Module) -> Rule | None:
        return rule if isinstance(module, nn.Linear) else None

    with LRP(mapper, ("y", 1, 0)).prepare(net, ["x"], ["y"]) as hooked:
        if isinstance(rule, FlatByRelevance):
            with pytest.raises(RuleError, match=r"vmap.*surrogate"):
                hooked(td)
            return
        found = hooked(td)["attr", "x"]
    y = td["y"][:, 1, 0].detach()
    assert_close(found[:, 1], (y / (3 + 1e-6))[:, None].expand(4, 3), 1e-10)
    assert not found[:, 0].any()


@pytest.mark.parametrize("rule", DOORS, ids=DOOR_IDS)
def test_a_call_leaves_no_object_to_the_collector(rule: Rule):
    net, td = nn.Linear(4, 3), TensorDict({"x": torch.randn(2, 4)}, [2])
    with LRP(only(net, rule), ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        for _ in range(3):
            hooked(td.clone())
        gc.collect()
        gc.disable()
        try:
            hooked(td.clone())
            assert gc.collect() == 0
        finally:
            gc.enable()
