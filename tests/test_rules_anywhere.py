"""A rule may sit on any module, as often as one likes, and stays the same rule."""

from __future__ import annotations

import copy
import threading
import warnings
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
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MultiAgentMLP, NoisyLinear

import reference_lrp as ref
from pristine import assert_same, bits, snapshot
from rule_records import AFFINE_RULES, RECORDS, SITE_IDS, SITES, Record
from rule_samples import Product, Sample, assert_close, explain, grid, only
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    AlphaBetaRule,
    BaseRuleMapper,
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    GammaRule,
    LayerNormRule,
    PassRule,
    RemovableRuleHandle,
    Rule,
    RuleMapper,
    StopRule,
    UniformRule,
    WSquareRule,
    ZBoxRule,
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


def made(name: str, build: Callable[[], nn.Module]) -> Any:
    """A module with parameters from the grid, in float64."""
    return Sample(name, build, ()).module()


def affine(mapped: Rule) -> RuleMapper:
    """One rule on all layers with weights; relevance passes the rest."""
    return BaseRuleMapper(
        rule_mapper=lambda name, m: mapped if isinstance(m, nn.Linear | nn.Conv2d) else None
    )


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


@pytest.mark.parametrize("path", ["", "0", "1", "1.0", "1.1"])
def test_epsilon_sits_on_the_root_a_leaf_a_container_or_an_activation(path: str):
    net = made(
        "nested", lambda: nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 2)))
    )
    x, R, module = grid((2, 4), "x"), grid((2, 2), "R") + 0.125, net.get_submodule(path)
    got = explain(net, only(module, EpsilonRule()), [x], R)[0][0]
    # Elsewhere the plain gradient: epsilon on the whole, what this module absorbs taken off.
    into = {"": x, "0": x, "1": net[0](x), "1.0": net[0](x), "1.1": net[1][0](net[0](x))}[path]
    y = module(into.detach()).detach()
    if path in ("", "1", "1.1"):
        R = R * y.abs() / (y.abs() + ref.EPSILON)
        slope = jacobian_epsilon(net, x, R * (1 + ref.EPSILON / net(x).abs()).detach())
    else:
        held = (y.abs() / (y.abs() + ref.EPSILON)).detach()
        behind = net[1] if path == "0" else net[1][1]
        slope = _with_factor(net, path, behind, held, x, R)
    assert_close(got, slope.detach(), 1e-9)


def _with_factor(
    net: Any, path: str, behind: nn.Module, factor: Tensor, x: Tensor, R: Tensor
) -> Tensor:
    """Input × gradient, the gradient scaled behind the module at ``path``."""
    x = x.clone().requires_grad_()
    middle = net[0](x) if path == "0" else net[1][0](net[0](x))
    cut = middle.detach().requires_grad_()
    y = behind(cut)
    at_cut = torch.autograd.grad(y, cut, R / y.detach())[0]
    return x * torch.autograd.grad(middle, x, at_cut * factor)[0]


def test_a_rule_on_a_container_and_rules_inside_it_both_act():
    net = made("inside", lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    whole = nn.Sequential(net, nn.Identity())
    x, R = grid((2, 4), "x"), grid((2, 2), "R") + 0.125

    def mapper(name: str, module: nn.Module) -> Rule | None:
        return {"0": EpsilonRule(0.5), "0.0": ZPlusRule()}.get(name)

    y = whole(x).detach()
    kept = R * y.abs() / (y.abs() + 0.5)
    hidden = net[0](x).detach()
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
    x, R = grid((2, 4), "x"), grid((2, 3), "R") + 0.125
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


# --- in place -------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """An in-place activation and in-place functions behind a ruled layer."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.first, self.last, self.by = nn.Linear(4, 5), nn.Linear(5, 2), by
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.by == "keyword":
            h = self.relu(input=h)
        elif self.by == "function":
            F.relu_(h)
        elif self.by == "method":
            h.mul_(2).clamp_(min=0)
            h *= 0.5
        else:
            self.relu(h)  # the caller goes on with what was overwritten
        return self.last(h)


RULED = {"epsilon": AFFINE_RULES["epsilon"], "gamma": AFFINE_RULES["gamma"]}


@pytest.mark.parametrize("name", RULED)
@pytest.mark.parametrize("by", ["module", "function", "method", "keyword"])
def test_what_works_in_place_behind_a_rule_gives_what_a_copy_gives(by: str, name: str):
    rule, reference = RULED[name]
    net = made("in place", lambda: InPlace(by))
    x, R = grid((2, 4), "x"), grid((2, 2), "R") + 0.125
    want = ref.propagate([net.first, nn.ReLU(), net.last], x, R, [reference, None, reference])
    kept = x.clone()
    found, y = explain(net, affine(rule), [x], R)
    assert_close(found[0], want, 1e-9)
    assert bits(y) == bits(net(x)) and x.equal(kept)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardtanh, nn.Dropout])
@pytest.mark.parametrize("feeding", [False, True])
def test_an_activation_in_place_passes_relevance_as_its_twin_does(kind: Any, feeding: bool):
    net = made("twin", lambda: nn.Sequential(nn.Linear(4, 6), kind(inplace=True), nn.Linear(6, 2)))
    x, R = grid((3, 4), "x"), grid((3, 2), "R") + 0.125
    last = FlatRule() if feeding else EpsilonRule()
    mapper = EpsilonPlus(rule_mapper=lambda name, m: last if name == "2" else None)
    net.eval()
    in_place = explain(net, mapper, [x], R)[0][0]
    net[1].inplace = False
    assert_close(in_place, explain(net, mapper, [x], R)[0][0], 1e-12)
    assert in_place.any()


# --- functions between modules --------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_functional_residual_sum_shares_by_the_terms_and_conserves(blocks: int):
    net = made("residual", lambda: Residual(blocks))
    x, R = grid((2, 4), "x"), grid((2, 4), "R") + 0.125
    activations = [x]
    for block in net.blocks:
        activations.append(activations[-1] + block(activations[-1]).detach())
    want = R
    for block, a in zip(reversed(net.blocks), reversed(activations[:-1]), strict=True):
        y = a + block(a).detach()
        share = want / y
        want = a * share + ref.relevance(
            block, a, block(a).detach() * share, ref.epsilon, eps=1e-12
        )
    got = explain(net, lambda n, m: EpsilonRule(1e-12) if n.startswith("blocks.") else None, [x], R)
    assert_close(got[0][0], want, 1e-9)
    torch.testing.assert_close(got[0][0].sum(1), R.sum(1), atol=1e-7, rtol=1e-7)


def test_concatenation_slices_and_differences_need_no_rule():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(8, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.last(torch.cat([self.left(a), self.right(b).neg()], -1)[:, :8])

    net, R = made("cat", Net), grid((2, 2), "R") + 0.125
    a, b = grid((2, 3), "a"), grid((2, 2), "b")
    hidden = torch.cat([net.left(a), -net.right(b)], -1).detach()
    behind = ref.relevance(net.last, hidden, R, ref.gamma)
    got = explain(net, affine(GammaRule()), [a, b], R)[0]
    assert_close(got[0], ref.relevance(net.left, a, behind[:, :4], ref.gamma), 1e-9)
    assert_close(got[1], ref.relevance(net.right, b, behind[:, 4:], ref.gamma), 1e-9)


def test_a_dueling_head_is_right_without_a_rule_for_its_combination():
    class Dueling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.advantage = nn.Linear(4, 1, bias=False), nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            a = self.advantage(x)
            return self.value(x) + a - a.mean(-1, keepdim=True)

    net, x, R = made("dueling", Dueling), grid((2, 4), "x"), grid((2, 3), "R") + 0.125
    whole = nn.Linear(4, 3, bias=False, dtype=F64)
    rows = net.advantage.weight.detach()
    whole.weight.data = net.value.weight.detach() + rows - rows.mean(0)
    got = explain(net, affine(EpsilonRule(1e-13)), [x], R)[0][0]
    assert_close(got, ref.relevance(whole, x, R, ref.epsilon, eps=0.0), 1e-9)


def test_a_product_of_modules_is_shared_by_a_uniform_rule_on_the_module_that_multiplies():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.gate = nn.Linear(4, 3), nn.Linear(4, 3)
            self.product = Product()

        def forward(self, x: Tensor) -> Tensor:
            return self.product(self.value(x), self.gate(x))

    net, x, R = made("gated", Gated), grid((2, 4), "x"), grid((2, 3), "R") + 0.125
    rules = {"product": UniformRule(), "value": ZPlusRule(), "gate": ZPlusRule()}
    got = explain(net, lambda name, m: rules.get(name), [x], R)[0][0]
    halves = [ref.relevance(net.get_submodule(n), x, R / 2, ref.zplus) for n in ("value", "gate")]
    assert_close(got, halves[0] + halves[1], 1e-9)


# --- rules as objects -----------------------------------------------------------------------------


@pytest.mark.parametrize(("record", "sample"), SITES, ids=SITE_IDS)
def test_one_rule_object_serves_models_contexts_and_precisions_and_stays_as_it_is(
    record: Record, sample: Sample
):
    if sample is not record.samples[0]:
        others = record.samples[0], sample
    else:
        others = sample, record.samples[-1]
    rule = record.rule()
    before = copy.deepcopy(vars(rule))
    found = []
    for other in (*others, others[0]):
        module, inputs = other.module(), other.inputs("mixed")
        R = record.start(module(*inputs).detach(), other.name)
        if record.name != "stop":
            found.append(explain(module, only(module, rule), inputs, R)[0])
    if found:
        assert all(a.equal(b) for a, b in zip(found[0], found[2], strict=True))
    assert (
        vars(rule).keys() == before.keys()
        and repr(rule) == repr(record.rule())
        or (record.name == "modified")
    )


@pytest.mark.parametrize("record", RECORDS, ids=[record.name for record in RECORDS])
def test_a_rule_used_by_many_threads_gives_each_its_own(record: Record):
    if record.name == "stop":
        pytest.skip("gives every thread the same")
    rule, sample = record.rule(), record.samples[0]
    module = sample.module()
    given = [[x * (1 + i) for x in sample.inputs("mixed")] for i in range(4)]
    starts = [record.start(module(*xs).detach(), str(i)) for i, xs in enumerate(given)]
    alone = [
        explain(module, only(module, rule), xs, R)[0] for xs, R in zip(given, starts, strict=True)
    ]
    found: dict[int, list[list[Tensor]]] = {}

    def work(i: int) -> None:
        found[i] = [explain(module, only(module, rule), given[i], starts[i])[0] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(alone):
        for got in found[i]:
            assert all(a.equal(b) for a, b in zip(got, want, strict=True))


def test_two_contexts_with_other_rules_on_one_model_do_not_mix():
    net, x = made("two", lambda: nn.Linear(4, 2)), grid((2, 4), "x")
    td, methods = TensorDict({"x": x}, [2]), {}
    for rule, reference in AFFINE_RULES.values():
        methods[reference] = LRP(only(net, rule), ("y", 0)).prepare(net, ["x"], ["y"])
    opened = {reference: context.__enter__() for reference, context in methods.items()}
    R = torch.zeros(2, 2, dtype=F64)
    R[:, 0] = net(x).detach()[:, 0]
    for _ in range(2):
        for reference, hooked in opened.items():
            found = hooked(td.clone())["attr", "x"]
            assert_close(found, ref.relevance(net, x, R, reference), 1e-9)
    for context in methods.values():
        context.__exit__(None, None, None)


# --- rules put on by hand -------------------------------------------------------------------------


def test_a_rule_by_hand_leaves_nothing_on_its_module():
    net = made("hand", lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    before, td = snapshot(net), TensorDict({"x": grid((2, 4), "x")}, [2])
    with FlatRule().register(net[0]) as handle:
        assert isinstance(handle, RemovableRuleHandle)
        assert_same(before, snapshot(net))
        with LRP(lambda n, m: None, ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
            hooked(td)
            assert_same(before, snapshot(net))
        other = copy.deepcopy(net)
        assert vars(other[0]).keys() == vars(nn.Linear(4, 3)).keys()
    assert_same(before, snapshot(net))


def test_a_rule_by_hand_counts_from_the_moment_it_is_on_to_the_moment_it_is_off():
    net, x = made("moment", lambda: nn.Linear(4, 2)), grid((2, 4), "x")
    td = TensorDict({"x": x}, [2])
    R = torch.zeros(2, 2, dtype=F64)
    R[:, 0] = net(x).detach()[:, 0]
    flat = ref.relevance(net, x, R, ref.flat)

    def is_flat(hooked: Any) -> bool:
        return torch.allclose(hooked(td.clone())["attr", "x"], flat)

    with LRP(lambda n, m: None, ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        assert not is_flat(hooked)
        with FlatRule().register(net):
            assert is_flat(hooked)
        assert not is_flat(hooked)
        handle = RemovableRuleHandle(FlatRule(), net)
        assert is_flat(hooked)
        handle.remove()
        assert not is_flat(hooked)
    with FlatRule().register(net):
        context = LRP(lambda n, m: None, ("y", 0)).prepare(net, ["x"], ["y"])
    with context as hooked:
        assert not is_flat(hooked)


def test_a_rule_by_hand_ends_with_its_block_also_when_that_raises():
    net = nn.Linear(4, 2)
    with pytest.raises(ZeroDivisionError), StopRule().register(net):
        raise ZeroDivisionError
    td = TensorDict({"x": torch.randn(2, 4)}, [2])
    with LRP(lambda n, m: None, ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        assert hooked(td)["attr", "x"].any()


def test_a_rule_by_hand_is_refused_where_it_cannot_sit():
    with pytest.raises(RuleError, match="cannot sit on ReLU"):
        ZPlusRule().register(nn.ReLU())
    with pytest.raises(RuleError, match="registers on a module"):
        EpsilonRule().register("0")  # pyright: ignore[reportArgumentType]


def test_a_rule_by_hand_does_not_keep_its_module_alive():
    import gc
    import weakref

    net = nn.Linear(2, 2)
    handle, alive = FlatRule().register(net), weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None
    handle.remove()


class Equal(nn.Linear):
    """Equal to every other layer of its size, as value objects are."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal) and self.in_features == other.in_features

    def __hash__(self) -> int:
        return hash(self.in_features)


def test_modules_that_are_equal_are_told_apart():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Equal(4, 2), Equal(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    net, x, R = made("equal", Net), grid((2, 4), "x"), grid((2, 2), "R") + 0.125
    mapper: RuleMapper = lambda n, m: {"a": ZPlusRule(), "b": FlatRule()}.get(n)  # noqa: E731
    got = explain(net, mapper, [x], R)[0][0]
    share = R / net(x).detach()
    to_a = ref.relevance(net.a, x, net.a(x).detach() * share, ref.zplus)
    to_b = ref.relevance(net.b, x, net.b(x).detach() * share, ref.flat)
    assert_close(got, to_a + to_b, 1e-9)
    with FlatRule().register(net.a), GammaRule().register(net.b):
        by_hand = explain(net, lambda n, m: None, [x], R)[0][0]
    to_a = ref.relevance(net.a, x, net.a(x).detach() * share, ref.flat)
    to_b = ref.relevance(net.b, x, net.b(x).detach() * share, ref.gamma)
    assert_close(by_hand, to_a + to_b, 1e-9)
