"""A rule may sit on any module, as often as one likes, and stays the same rule."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

import reference_lrp as ref
from pristine import bits
from rule_records import AFFINE_RULES
from rule_samples import assert_close, explain, grid, made, only
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    EpsilonRule,
    FlatRule,
    GammaRule,
    PassRule,
    PseudoIdentityRule,
    Rule,
    RuleMapper,
    StopRule,
    UniformEpsilonRule,
    UniformRule,
    ZPlusRule,
)
from tdhook_like.errors import RuleError
from tdhook_like.targets import Each

F64 = torch.float64


def jacobian_epsilon(net: Callable[..., Tensor], x: Tensor, R: Tensor) -> Tensor:
    """Epsilon on any module of one input, from its Jacobian: ``x Σ_j J_j R_j / st(y_j)``."""
    rows = []
    for sample, R_sample in zip(x, R, strict=True):
        slope = torch.autograd.functional.jacobian(lambda s: net(s[None])[0].flatten(), sample)
        y = net(sample[None])[0].flatten().detach()
        share = R_sample.flatten() / ref.stabilised(y, ref.EPSILON)
        rows.append(sample * torch.tensordot(share, slope, 1))
    return torch.stack(rows)


# --- containers -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with one head, all of it by functions but the projections."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / x.shape[-1] ** 0.5
        return scores.softmax(-1) @ self.value(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = Attention(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x))


def test_epsilon_on_an_attention_module_of_ones_own_is_its_jacobian_shared_out_and_stays_so():
    net = made("block", Block)
    x, R, rule = grid((2, 3, 4), "x"), grid((2, 3, 2), "R"), EpsilonRule()

    def mapper(name: str, module: nn.Module) -> Rule | None:
        return rule if name in ("attention", "head") else None

    behind = jacobian_epsilon(net.head, net.attention(x).detach(), R)
    expected = jacobian_epsilon(net.attention, x, behind)
    runs = [explain(net, mapper, [x], R)[0][0] for _ in range(3)]
    assert_close(runs[0], expected, 1e-9)
    assert runs[1].equal(runs[0]) and runs[2].equal(runs[0])
    td = TensorDict({"x": x}, [2])
    with LRP(mapper, Each("y"), start=R.flatten(1)).prepare(net, ["x"], ["y"]) as hooked:
        again = [hooked(td.clone())["attr", "x"].sum(1) for _ in range(2)]
    assert again[0].equal(again[1])
    assert_close(again[0], expected, 1e-9)


def absorbed(y: Tensor, R: Tensor, epsilon: float = 0.5) -> Tensor:
    """What an epsilon large enough to be seen leaves of relevance."""
    return R * y.abs() / (y.abs() + epsilon)


@pytest.mark.parametrize("path", ["", "0", "1", "1.0", "1.1"])
def test_a_rule_sits_on_the_root_on_a_leaf_or_on_a_container(path: str):
    net = made(
        "nested",
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 2))
        ),
    )
    x, R = grid((2, 4), "x"), grid((2, 2), "R") + 0.125
    got = explain(net, only(net.get_submodule(path), EpsilonRule(0.5)), [x], R)[0][0]
    # LRP-0 everywhere; behind the module with the rule, what it absorbs is taken off.
    first, middle, last = net[0], net[1][0], net[1][1]
    one, two = first(x).detach(), middle(first(x)).detach()
    if path in ("", "1", "1.1"):
        R = absorbed(net(x).detach(), R)
    R = ref.relevance(last, two, R, ref.epsilon, eps=0.0)
    R = absorbed(two, R) if path == "1.0" else R
    R = ref.relevance(middle, one, R, ref.epsilon, eps=0.0)
    R = absorbed(one, R) if path == "0" else R
    assert_close(got, ref.relevance(first, x, R, ref.epsilon, eps=0.0), 1e-9)


def test_a_rule_on_a_container_and_rules_inside_it_both_act():
    net = made("inside", lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    whole = nn.Sequential(net, nn.Identity())
    x, R = grid((2, 4), "x"), grid((2, 2), "R") + 0.125

    def mapper(name: str, module: nn.Module) -> Rule | None:
        return {"0": EpsilonRule(0.5), "0.0": ZPlusRule()}.get(name)

    kept, hidden = absorbed(whole(x).detach(), R), net[0](x).detach()
    behind = ref.relevance(net[1], hidden, kept, ref.epsilon, eps=0.0)
    want = ref.relevance(net[0], x, behind, ref.zplus)
    assert_close(explain(whole, mapper, [x], R)[0][0], want, 1e-9)


def test_a_rule_on_a_tensordict_module_is_the_rule_on_the_module_in_it():
    first = TensorDictModule(made("first", lambda: nn.Linear(4, 3)), ["x"], ["h"])
    last = TensorDictModule(made("last", lambda: nn.Linear(3, 1)), ["h"], ["y"])
    model, td = TensorDictSequential(first, last), TensorDict({"x": grid((2, 4), "x")}, [2])

    def found(path: str) -> Tensor | str:
        mapper: RuleMapper = lambda name, m: EpsilonRule(0.5) if name == path else None  # noqa: E731
        try:
            with LRP(mapper, "y").prepare(model) as hooked:
                return hooked(td.clone())["attr", "x"]
        except RuleError as error:
            return str(error)

    inside, outside = found("module.0.module"), found("module.0")
    assert isinstance(inside, Tensor)
    # Said in so many words, if it is not done; the plain gradient would be silence.
    if isinstance(outside, str):
        assert "module.0" in outside
    else:
        assert_close(outside, inside, 1e-9)


# --- calls of every form --------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


@pytest.mark.parametrize("name", AFFINE_RULES)
def test_a_module_called_twice_is_two_layers(name: str):
    rule, reference = AFFINE_RULES[name]
    net, x, R = made("twice", Twice), grid((2, 4), "x"), grid((2, 4), "R") + 0.125
    stack = [net.layer, nn.ReLU(), net.layer]
    want = ref.propagate(stack, x, R, [reference, None, reference])
    if name in ("flat", "w-square"):  # what reaches dead units is lost in a functional ReLU
        hidden = net.layer(x).detach()
        behind = ref.relevance(net.layer, hidden.clamp(min=0), R, reference)
        want = ref.relevance(net.layer, x, behind * (hidden > 0), reference)
    assert_close(explain(net, only(net.layer, rule), [x], R)[0][0], want, 1e-9)


def test_layers_that_share_one_weight_are_layers_of_their_own():
    net = made("tied", lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    net[2].weight = net[0].weight
    x, R = grid((2, 4), "x"), grid((2, 4), "R") + 0.125
    want = ref.propagate(net, x, R, [ref.gamma, None, ref.zplus])
    mapper: RuleMapper = lambda name, m: {"0": GammaRule(), "2": ZPlusRule()}.get(name)  # noqa: E731
    assert_close(explain(net, mapper, [x], R)[0][0], want, 1e-9)


class Calls(nn.Module):
    """A layer called by position, by keyword, and inside structures."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 3), how
        self.box = Box()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "keyword":
            return self.layer(input=x)
        if self.how == "position":
            return self.layer(x)
        packed = self.box({"x": [x, None]}, scale=2)
        y, (z, one) = packed["sum"], packed["rest"]
        assert one == 1
        return self.layer(y) - 0.5 * self.layer(z)


class Box(nn.Module):
    """Takes and returns tensors inside dicts, lists and tuples, among other things."""

    def forward(self, packed: dict[str, list[Any]], scale: int) -> dict[str, Any]:
        x = packed["x"][0]
        assert packed["x"][1] is None
        return {"sum": x * scale, "rest": (x + 1, 1)}


@pytest.mark.parametrize("name", AFFINE_RULES)
def test_arguments_by_keyword_are_arguments(name: str):
    rule, reference = AFFINE_RULES[name]
    x, R = grid((2, 4), "x"), grid((2, 3), "R") + 0.125
    net = made("calls", lambda: Calls("keyword"))
    got = explain(net, only(net.layer, rule), [x], R)[0][0]
    assert_close(got, ref.relevance(net.layer, x, R, reference), 1e-9)
    net.how = "position"
    assert got.equal(explain(net, only(net.layer, rule), [x], R)[0][0])


def test_tensors_inside_tuples_lists_and_dicts_are_ruled_too():
    x, R = grid((2, 4), "x").abs() + 0.25, grid((2, 3), "R") + 0.125
    net = made("calls", lambda: Calls("packed"))
    got = explain(net, only(net.box, EpsilonRule()), [x], R)[0][0]
    plain = explain(net, lambda name, m: None, [x], R)[0][0]
    assert_close(got, plain, 1e-3)
    assert not got.equal(plain)  # what epsilon absorbs
    td = TensorDict({"x": x}, [2])
    with LRP(only(net.box, StopRule()), ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        assert not hooked(td)["attr", "x"].any()


class Fields(OrderedDict):
    """A dict whose items are attributes too, as model libraries return them."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass
class Dataclass:
    hidden: Tensor


class Encoder(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 3), kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(hidden=self.layer(x))


class Reads(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.encoder, self.kind = Encoder(kind), kind

    def forward(self, x: Tensor) -> Tensor:
        out = self.encoder(x)
        assert type(out) is self.kind
        return out.hidden


def test_a_dict_of_a_users_own_type_keeps_its_type_under_a_rule():
    net, x, R = made("fields", lambda: Reads(Fields)), grid((2, 4), "x"), grid((2, 3), "R") + 0.125
    got = explain(net, only(net.encoder, EpsilonRule()), [x], R)[0][0]
    assert_close(got, ref.relevance(net.encoder.layer, x, R, ref.epsilon), 1e-9)


def test_a_rule_on_a_module_whose_output_it_cannot_see_into_is_not_silent():
    net, x, R = made("data", lambda: Reads(Dataclass)), grid((2, 4), "x"), grid((2, 3), "R") + 0.125
    try:
        got = explain(net, only(net.encoder, EpsilonRule(0.5)), [x], R)[0][0]
    except RuleError as error:
        assert "encoder" in str(error)
    else:
        assert_close(got, ref.relevance(net.encoder.layer, x, R, ref.epsilon, eps=0.5), 1e-9)


def test_inputs_without_a_share_in_the_output_get_zeros():
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.layer(x)

    net, x, R = made("first", First), grid((2, 4), "x"), grid((2, 3), "R")
    got = explain(net, only(net.layer, FlatRule()), [x, grid((2, 5), "other")], R)[0]
    assert_close(got[0], ref.relevance(net.layer, x, R, ref.flat), 1e-9)
    assert got[1].shape == (2, 5) and not got[1].any()


# --- outputs and forwards of rarer kinds ----------------------------------------------------------


class MaskedLogits(nn.Module):
    """Adds minus infinity to what must not be chosen."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([0.0, -torch.inf, 0.0], dtype=x.dtype)


@pytest.mark.parametrize(
    "rule",
    [EpsilonRule(), UniformEpsilonRule(), PassRule(), UniformRule(), PseudoIdentityRule()],
    ids=lambda rule: type(rule).__name__,
)
def test_masked_entries_of_minus_infinity_do_not_spoil_the_others(rule: Rule):
    net = made("masked", lambda: nn.Sequential(nn.Linear(4, 3), MaskedLogits()))
    x = grid((2, 4), "x")
    R = torch.zeros(2, 3, dtype=F64)
    R[:, 2] = net(x).detach()[:, 2]
    td = TensorDict({"x": x}, [2])
    with LRP(only(net[1], rule), ("y", 2)).prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(td)
    assert bits(td["y"]) == bits(net(x))
    assert_close(td["attr", "x"], ref.relevance(net[0], x, R, ref.epsilon, eps=0.0), 1e-5)


class Dropping(nn.Linear):
    """A layer with dropout in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("rule", [EpsilonRule(), ZPlusRule(), FlatRule()], ids=repr)
def test_a_layer_that_draws_in_its_forward_draws_once(rule: Rule):
    net, x = made("dropping", lambda: Dropping(8, 2)).train(), torch.ones(3, 8, dtype=F64)
    torch.manual_seed(0)
    plain, after = net(x), torch.rand(1)
    torch.manual_seed(0)
    td = TensorDict({"x": x}, [3])
    with LRP(only(net, rule), ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        try:
            assert bits(hooked(td)["y"]) == bits(plain)
        except RuleError as error:  # said, where it cannot be done
            assert "Dropping" in str(error)
        else:
            assert torch.rand(1).equal(after)
