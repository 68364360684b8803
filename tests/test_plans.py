"""The plan that prints which module gets which rule, rules that are never reached, precedence."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import NoisyLinear

import reference_lrp as ref
from mapped_nets import mlp, net_of
from rule_samples import assert_close, explain, grid
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    BaseRuleMapper,
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    IgnoreRule,
    PassRule,
    Rule,
    RuleMapper,
    RulePlan,
    StopRule,
    WSquareRule,
)
from tdhook_like.errors import RuleError

NO_RULE: RuleMapper = lambda name, module: None  # noqa: E731


# --- the plan -------------------------------------------------------------------------------------


def test_a_plan_prints_which_module_gets_which_rule_and_why():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Softplus(), nn.Flatten(), nn.Linear(2, 1))
    with FlatRule().register(net[4]):
        shown = str(RulePlan(net, EpsilonPlus()))
    rows = [row.split(maxsplit=3) for row in shown.splitlines()]
    assert rows[0] == ["path", "type", "rule", "why"]
    assert [row[:3] for row in rows[1:]] == [
        ["0", "Linear", "EpsilonRule(epsilon=1e-06)"],
        ["1", "ReLU", "PassRule()"],
        ["2", "Softplus", "PassRule()"],
        ["3", "Flatten", "IgnoreRule()"],
        ["4", "Linear", "FlatRule(stabilizer=1e-06)"],
    ]
    assert rows[1][3] == "type Linear" and rows[3][3] == "type Softplus"
    assert rows[4][3] == "type Flatten: its own gradient is this rule"
    assert rows[5][3] == "by hand"


def test_a_plan_gives_the_types_name_the_inner_mappers_reason_or_its_name():
    class Because:
        def __call__(self, name: str, module: nn.Module) -> Rule | None:
            return FlatRule() if name == "0" else None

        def why(self, name: str, module: nn.Module) -> str:
            return "because"

    def squares(name: str, module: nn.Module) -> Rule | None:
        return WSquareRule() if name == "0" else None

    def nameless(name: str, module: nn.Module) -> Rule | None:
        return squares(name, module)

    nameless.__name__ = "<lambda>"
    net = nn.Sequential(NoisyLinear(2, 2), nn.Tanh(), nn.BatchNorm1d(2), nn.Conv1d(1, 1, 1))
    reasons = []
    for inner in (None, Because(), squares, nameless):
        lines = RulePlan(net, EpsilonPlus(rule_mapper=inner)).lines
        reasons.append([line.why for line in lines])
    types = ["type Tanh", "type BatchNorm1d", "type Conv1d"]
    assert reasons[0] == ["type Linear", *types]
    assert reasons[1] == ["because", *types]
    assert reasons[2] == ["by squares", *types]
    assert reasons[3] == ["by the mapper", *types]


def test_a_mapper_that_gives_no_reasons_is_the_reason_itself():
    plan = RulePlan(nn.Linear(2, 2), lambda name, module: EpsilonRule())
    assert [line.why for line in plan.lines] == ["by the mapper"]


def test_a_mapper_with_bind_is_bound_to_the_model_of_the_plan():
    class Knows:
        model: nn.Module | None = None

        def bind(self, model: nn.Module) -> Knows:
            twin = Knows()
            twin.model = model
            return twin

        def __call__(self, name: str, module: nn.Module) -> Rule | None:
            assert self.model is not None
            return FlatRule() if module is next(self.model.children(), None) else None

    net, mapper = mlp(), Knows()
    assert [line.path for line in RulePlan(net, mapper).lines] == ["0"]
    inner = RulePlan(net, EpsilonPlus(rule_mapper=mapper)).lines
    assert [type(line.rule) for line in inner] == [FlatRule, PassRule, EpsilonRule]
    assert mapper.model is None


def test_a_mapper_prints_its_plan_before_anything_runs_and_serves_the_next_model_too():
    mapper = EpsilonPlus(rule_mapper=lambda name, module: None)
    for net in (mlp(), net_of(lambda: nn.Conv1d(1, 2, 1), nn.Tanh)):
        assert str(mapper.plan(net)) == str(RulePlan(net, EpsilonPlus()))


def test_a_mapper_shows_what_was_given_to_it():
    assert repr(EpsilonPlus()) == "EpsilonPlus()"
    assert repr(EpsilonPlus(0.25, batch_norm="pass")) == (
        "EpsilonPlus(epsilon=0.25, batch_norm='pass')"
    )
    inner = BaseRuleMapper(0.5)
    assert repr(BaseRuleMapper(rule_mapper=inner)) == (
        "BaseRuleMapper(rule_mapper=BaseRuleMapper(stabilizer=0.5))"
    )


def test_a_plan_has_one_line_for_a_shared_module_and_calls_the_root_by_a_name():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    plan = RulePlan(net, lambda name, m: EpsilonRule() if name != "1" else None)
    assert [line.path for line in plan.lines] == ["", "0"]
    assert "(root)" in str(plan)


def asked_paths(model: nn.Module, target: str, *keys: list[str]) -> list[str]:
    asked: list[str] = []
    LRP(lambda name, module: asked.append(name), target).prepare(model, *keys)
    return asked


def test_the_mapper_is_asked_with_the_paths_of_the_module_that_was_given():
    plain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 1)))
    paths = ["", "0", "1", "1.0", "1.1"]
    assert asked_paths(plain, "y", ["x"], ["y"]) == paths
    first = TensorDictModule(plain, ["x"], ["h"])
    assert asked_paths(first, "h") == ["", *(f"module.{p}".rstrip(".") for p in paths)]
    both = TensorDictSequential(first, TensorDictModule(nn.Linear(1, 1), ["h"], ["y"]))
    assert asked_paths(both, "y") == [path for path, _ in both.named_modules()]


def test_a_context_prints_the_plan_before_anything_was_run():
    net = mlp()
    shown = str(LRP(EpsilonPlus(), ("y", 0)).prepare(net, ["x"], ["y"]))
    for row in str(RulePlan(net, EpsilonPlus())).splitlines():
        assert row in shown
    bare = str(LRP(NO_RULE, ("y", 0)).prepare(net, ["x"], ["y"]))
    assert "Linear" not in bare and "rule" in bare


# --- rules that are never reached -----------------------------------------------------------------


class Bypassed(nn.Module):
    """Uses the weights of one layer without calling it, and forgets another."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.weights, self.forgotten = nn.Linear(3, 3), nn.Linear(3, 2), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.used(x), self.weights.weight)


def test_a_rule_whose_module_is_never_called_is_an_error_that_names_it():
    net, td = Bypassed(), TensorDict({"x": torch.randn(2, 3)}, [2])
    with LRP(EpsilonPlus(), ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        with pytest.raises(RuleError, match="'weights', 'forgotten' were never reached"):
            hooked(td)
        with pytest.raises(RuleError, match="unreached='ignore'"):
            hooked.observe(td)
        assert set(td.keys()) == {"x"}


def test_unreached_rules_are_ignored_where_that_is_asked_for():
    net, td = Bypassed(), TensorDict({"x": torch.randn(2, 3)}, [2])
    with LRP(EpsilonPlus(), ("y", 0), unreached="ignore").prepare(net, ["x"], ["y"]) as hooked:
        got = hooked(td.clone())["attr", "x"]

    def mapper(name: str, module: nn.Module) -> Rule | None:
        return EpsilonRule() if name == "used" else None

    with LRP(mapper, ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        assert got.equal(hooked(td.clone())["attr", "x"])


def test_a_rule_by_hand_that_is_never_reached_is_an_error_too():
    net, td = Bypassed(), TensorDict({"x": torch.randn(2, 3)}, [2])
    with (
        FlatRule().register(net.weights),
        LRP(NO_RULE, ("y", 0)).prepare(net, ["x"], ["y"]) as hooked,
        pytest.raises(RuleError, match="'weights'"),
    ):
        hooked(td)


def test_a_module_that_was_reached_once_does_not_count_for_the_next_call():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    td = TensorDict({"x": torch.ones(2, 3)}, [2])
    with LRP(EpsilonPlus(), ("y", 0)).prepare(Sometimes(), ["x"], ["y"]) as hooked:
        hooked(td.clone())
        with pytest.raises(RuleError, match="'layer'"):
            hooked(TensorDict({"x": -torch.ones(2, 3)}, [2]))


# --- precedence -----------------------------------------------------------------------------------


def test_a_rule_by_hand_goes_before_the_mappers_and_ends_with_its_block():
    net, x, R = mlp(), grid((2, 4), "x"), grid((2, 2), "R")

    def found() -> Tensor:
        return explain(net, EpsilonPlus(), [x], R)[0][0]

    before = found()
    with FlatRule().register(net[0]) as handle:
        behind = ref.propagate(list(net)[1:], net[0](x), R, [None, ref.epsilon])
        assert_close(found(), ref.relevance(net[0], x, behind, ref.flat), 1e-9)
        assert isinstance(handle.rule, FlatRule)
    assert found().equal(before)


def test_ignore_by_hand_takes_the_mappers_rule_off():
    net, x, R = mlp(), grid((2, 4), "x"), grid((2, 2), "R")

    def mapper(name: str, module: nn.Module) -> Rule | None:
        return StopRule() if name == "1" else None

    with IgnoreRule().register(net[1]):
        got = explain(net, mapper, [x], R)[0][0]
    assert got.equal(explain(net, NO_RULE, [x], R)[0][0]) and got.any()


def test_the_last_rule_put_on_counts_and_the_one_before_comes_back():
    net, x, R = mlp(), grid((2, 4), "x"), grid((2, 2), "R")

    def found() -> Tensor:
        return explain(net, EpsilonPlus(), [x], R)[0][0]

    first = FlatRule().register(net[0])
    flat = found()
    second = WSquareRule().register(net[0])
    square = found()
    assert not torch.allclose(flat, square)
    second.remove()
    assert found().equal(flat)
    second.remove()  # once more does nothing
    third = WSquareRule().register(net[0])
    first.remove()  # the one underneath
    assert found().equal(square)
    third.remove()
    assert not torch.allclose(found(), square)
