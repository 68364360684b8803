"""Parameters in a rule: modified as temporaries, fresh at every call, never assigned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MultiAgentMLP, NoisyLinear

import reference_lrp as ref
from pristine import assert_same, snapshot
from rule_samples import Sample, assert_close, explain, grid, only
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    AlphaBetaRule,
    FlatRule,
    ModifiedRule,
    ParamModifier,
    Rule,
    WSquareRule,
    ZPlusRule,
)
from tdhook_like.errors import RuleError


def positive(name: str, p: Tensor) -> Tensor:
    return p.clamp(min=0)


def is_weight(name: str, p: Tensor) -> bool:
    return name == "weight"


ABSOLUTE = ModifiedRule(ParamModifier(lambda name, p: p.abs()))
RULES: dict[str, Rule] = {
    "modified": ABSOLUTE,
    "z-plus": ZPlusRule(),
    "alpha beta": AlphaBetaRule(),
    "w-square": WSquareRule(),
    "flat": FlatRule(),
}


def layer(bias: bool = True) -> nn.Linear:
    module = Sample("layer", lambda: nn.Linear(4, 3, bias=bias), ()).module()
    assert isinstance(module, nn.Linear)
    return module


# --- what it says ---------------------------------------------------------------------------------


def test_without_functions_it_leaves_every_parameter():
    found = ParamModifier()(layer())
    torch.testing.assert_close(found, {k: v.detach() for k, v in layer().named_parameters()})


def test_modify_fn_sees_names_and_values_and_select_fn_says_which():
    seen: list[tuple[str, str, tuple[int, ...]]] = []

    def modify(name: str, p: Tensor) -> Tensor:
        seen.append(("modify", name, tuple(p.shape)))
        return 2 * p

    def choose(name: str, p: Tensor) -> bool:
        seen.append(("select", name, tuple(p.shape)))
        return name == "weight"

    module = layer()
    found = ParamModifier(modify, choose)(module)
    assert seen == [
        ("select", "weight", (3, 4)),
        ("modify", "weight", (3, 4)),
        ("select", "bias", (3,)),
    ]
    torch.testing.assert_close(found["weight"], 2 * module.weight.detach())
    torch.testing.assert_close(found["bias"], module.bias.detach())


def test_select_fn_may_choose_by_value():
    module = layer()
    found = ParamModifier(lambda name, p: 0 * p, lambda name, p: p.ndim > 1)(module)
    assert not found["weight"].any() and found["bias"].equal(module.bias)


def test_modified_values_have_no_graph():
    assert not any(p.requires_grad for p in ParamModifier(positive)(layer()).values())


def test_several_modifiers_apply_in_order_each_to_what_the_last_one_left():
    add, double = ParamModifier(lambda name, p: p + 1), ParamModifier(lambda name, p: 2 * p)
    one = torch.ones(2)
    assert ParamModifier.from_modifiers([add, double]).modify("weight", one).tolist() == [4.0, 4.0]
    assert ParamModifier.from_modifiers((double, add)).modify("weight", one).tolist() == [3.0, 3.0]
    assert ParamModifier.from_modifiers([]).modify("weight", one).equal(one)
    on_weight = ParamModifier(lambda name, p: 0 * p, is_weight)
    both = ParamModifier.from_modifiers([on_weight, add])
    assert (
        both.modify("weight", one).tolist() == both.modify("bias", 0 * one).tolist() == [1.0, 1.0]
    )


def test_a_later_modifier_selects_by_what_the_earlier_ones_made():
    halves = ParamModifier(lambda name, p: p / 2)
    zeros = ParamModifier(lambda name, p: 0 * p, lambda name, p: bool(p.max() < 1))
    both = ParamModifier.from_modifiers([halves, zeros])
    assert both.modify("weight", torch.ones(1)).item() == 0.0
    assert both.modify("weight", torch.full((1,), 4.0)).item() == 2.0


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [3, "positive", torch.ones(1)])
def test_what_cannot_be_called_is_refused(given: Any):
    with pytest.raises(RuleError, match="modify_fn must be callable"):
        ParamModifier(given)
    with pytest.raises(RuleError, match="select_fn must be callable"):
        ParamModifier(positive, given)


@pytest.mark.parametrize("given", [positive, None, nn.Linear(1, 1)])
def test_a_list_of_other_things_than_modifiers_is_refused_at_once(given: Any):
    with pytest.raises(RuleError, match="ParamModifier"):
        ParamModifier.from_modifiers([ParamModifier(), given])


@pytest.mark.parametrize(
    ("modify", "words"),
    [
        (lambda name, p: p[:1], r"\(1, 4\).*'weight'.*\(3, 4\)"),
        (lambda name, p: None, "NoneType of parameter 'weight'"),
        (lambda name, p: 0.5, "float of parameter 'weight'"),
        (lambda name, p: p.sum() if name == "bias" else p, r"'bias'.*\(3,\)"),
        (lambda name, p: p.float(), "float32.*'weight'.*float64"),
    ],
    ids=["shape", "nothing", "number", "bias", "dtype"],
)
def test_a_modified_value_of_another_kind_is_refused_with_the_module_and_the_parameter(
    modify: Callable[[str, Tensor], Any], words: str
):
    net = nn.Sequential(nn.Tanh(), layer())
    rule = ModifiedRule(ParamModifier(modify))
    with pytest.raises(RuleError, match=words) as caught:
        explain(net, only(net[1], rule), [grid((2, 4), "x")], torch.ones(2, 3))
    assert "'1'" in str(caught.value)


# --- nothing is assigned --------------------------------------------------------------------------

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "weight norm": lambda: weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda: spectral_norm(nn.Linear(4, 3)).eval(),
    "noisy": lambda: NoisyLinear(4, 3),
    "noisy without bias": lambda: NoisyLinear(4, 3, bias=False),
    "in training with a buffer": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3).eval()),
    "shared by agents": lambda: MultiAgentMLP(
        *(4, 3, 2), centralized=False, share_params=False, depth=0
    ),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", MODULES)
def test_no_parameter_buffer_or_attribute_is_touched(name: str, rule: Rule):
    net = MODULES[name]()
    shape = (5, 2, 4) if isinstance(net, MultiAgentMLP) else (5, 4)
    target = ("y", 0, 0) if isinstance(net, MultiAgentMLP) else ("y", 0)
    td = TensorDict({"x": torch.randn(shape)}, [5])

    def mapper(path: str, module: nn.Module) -> Rule | None:
        return rule if isinstance(module, nn.Linear) else None

    for parameter in net.parameters():  # as in the middle of training
        parameter.grad = torch.ones_like(parameter)
    with LRP(mapper, target).prepare(net, ["x"], ["y"]) as hooked:
        hooked(td.clone())  # whatever a first run initialises
        before = snapshot(net)
        hooked(td.clone())
        hooked.observe(td.clone())
        # torchrl's own parameter container notes its last use, in plain calls too.
        assert_same(before, snapshot(net), ignoring=["_last_op"])


def test_a_modifier_that_works_in_place_works_on_a_copy():
    module, x = layer(), grid((2, 4), "x")
    before = snapshot(module)
    R = grid((2, 3), "R")
    in_place = ModifiedRule(ParamModifier(lambda name, p: p.abs_()))
    got = explain(module, only(module, in_place), [x], R)[0][0]
    assert_same(before, snapshot(module))
    assert_close(got, ref.relevance(module, x, R, ref.modified_params, torch.abs), 1e-10)


# --- nothing is stale -----------------------------------------------------------------------------


def twice(module: nn.Linear) -> None:
    with torch.no_grad():
        module.weight.mul_(2).add_(0.25)


def through_data(module: nn.Linear) -> None:
    module.weight.data.neg_()  # leaves _version as it is


def replaced_data(module: nn.Linear) -> None:
    module.weight.data = module.weight.data.roll(1, 0)


def replaced(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.detach().flip(1))


def step(module: nn.Linear) -> None:
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    module(torch.ones(1, 4).double()).square().sum().backward()
    optimiser.step()


def fused_step(module: nn.Linear) -> None:
    optimiser = torch.optim.Adam(module.parameters(), lr=0.5, foreach=True)
    module(torch.ones(1, 4).double()).square().sum().backward()
    optimiser.step()


def loaded(module: nn.Linear) -> None:
    module.load_state_dict({k: 1 - v for k, v in module.state_dict().items()})


def loaded_by_assignment(module: nn.Linear) -> None:
    module.load_state_dict({k: 1 - v for k, v in module.state_dict().items()}, assign=True)


CHANGES = [
    *(twice, through_data, replaced_data, replaced, step, fused_step, loaded),
    loaded_by_assignment,
]
REFERENCES: dict[str, Any] = {
    "modified": (ref.modified_params, torch.abs),
    "z-plus": (ref.zplus, None),
    "alpha beta": (ref.alpha_beta, None),
    "w-square": (ref.wsquare, None),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", REFERENCES)
def test_a_rule_reads_the_weights_as_they_are_at_the_call(name: str, change: Callable[[Any], None]):
    rule, (reference, modify) = RULES[name], REFERENCES[name]
    module, x = layer(), grid((2, 4), "x")
    td = TensorDict({"x": x}, [2])
    before = None
    with LRP(only(module, rule), ("y", 1)).prepare(module, ["x"], ["y"]) as hooked:
        for _ in range(2):
            found = hooked(td.clone())["attr", "x"]
            R = torch.zeros(2, 3, dtype=x.dtype)
            R[:, 1] = module(x).detach()[:, 1]
            assert_close(found, ref.relevance(module, x, R, reference, modify), 1e-10)
            assert before is None or not torch.allclose(before, found)
            before = found
            change(module)


def test_the_noise_of_a_noisy_layer_is_the_one_of_the_call():
    module, x = NoisyLinear(4, 3).double(), grid((2, 4), "x")
    td = TensorDict({"x": x}, [2])
    found = []
    method = LRP(only(module, ZPlusRule()), ("y", 0))
    exploring = set_exploration_type(ExplorationType.RANDOM)
    with exploring, method.prepare(module, ["x"], ["y"]) as hooked:
        for _ in range(3):
            module.reset_noise()
            R = torch.zeros(2, 3, dtype=x.dtype)
            R[:, 0] = module(x).detach()[:, 0]
            found.append(hooked(td.clone())["attr", "x"])
            assert_close(found[-1], ref.relevance(module, x, R, ref.zplus), 1e-10)
    assert not torch.allclose(found[0], found[1])


def test_a_rule_on_a_copy_of_a_model_reads_the_copys_weights():
    module, x, R = layer(), grid((2, 4), "x"), grid((2, 3), "R")
    rule = ZPlusRule()
    explain(module, only(module, rule), [x], R)
    other = copy.deepcopy(module)
    other.weight.data.neg_()
    got = explain(other, only(other, rule), [x], R)[0][0]
    assert_close(got, ref.relevance(other, x, R, ref.zplus), 1e-10)
