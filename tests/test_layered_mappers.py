"""One mapper over another, and mappers of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import reference_lrp as ref
from planned import reasons, rules, td_module, two_parts
from rule_samples import assert_close, explain, grid, made
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    GammaRule,
    IgnoreRule,
    Rule,
    WSquareRule,
    ZBoxRule,
)
from tdhook_like.attribution.lrp.mappers.choosing import LayeredMapper, Mapper
from tdhook_like.attribution.lrp.mappers.composites import CPLRP, AttnLRP
from tdhook_like.attribution.lrp.mappers.patterns import FirstLayer, NameMapper, TypeMapper
from tdhook_like.errors import PathError, RuleError


def test_the_first_mapper_that_has_a_rule_gives_it_and_the_reason():
    def squares(name: str, module: nn.Module) -> Rule | None:
        return WSquareRule() if name == "head.2" else None

    first, types = FirstLayer(ZBoxRule(0.0, 1.0)), TypeMapper({nn.Linear: GammaRule()})
    mapper = squares | first | (types | EpsilonPlus())
    net = two_parts()
    assert reasons(mapper, net) == {
        "encoder.0": "first layer",
        "encoder.1": "type ReLU",
        "encoder.2": "type Conv1d",
        "head.0": "type Linear",
        "head.1": "type Tanh",
        "head.2": "by squares",
    }
    found = rules(mapper, net)
    assert found["head.0"] is GammaRule and found["head.2"] is WSquareRule
    assert rules(EpsilonPlus() | types, net)["head.0"] is EpsilonRule
    assert rules(LayeredMapper(squares, first, types, EpsilonPlus()), net) == found


def test_ignore_says_its_own_gradient_look_no_further():
    mapper = TypeMapper({nn.Linear: None}) | EpsilonPlus()
    assert rules(mapper, two_parts())["head.0"] is IgnoreRule


def test_layers_take_function_rules_from_the_first_mapper_that_has_some():
    plain, named = EpsilonPlus(), NameMapper({"0": None})
    assert (named | plain).functions is None
    assert (named | AttnLRP() | CPLRP()).functions is AttnLRP.functions
    assert (named | CPLRP() | AttnLRP()).functions is CPLRP.functions
    assert EpsilonPlus(rule_mapper=CPLRP()).functions is CPLRP.functions
    assert AttnLRP(rule_mapper=CPLRP()).functions is CPLRP.functions
    assert AttnLRP(rule_mapper=plain).functions is AttnLRP.functions
    assert NameMapper({"0": CPLRP()}).functions is CPLRP.functions


@pytest.mark.parametrize("given", [EpsilonPlus, EpsilonRule(), 3, None])
def test_only_mappers_are_layered(given: Any):
    with pytest.raises(RuleError, match="LayeredMapper must be callable"):
        LayeredMapper(EpsilonPlus(), given)
    with pytest.raises(RuleError, match="must be callable"):
        EpsilonPlus() | given
    with pytest.raises(RuleError, match="at least one"):
        LayeredMapper()


def test_a_layered_mapper_that_gives_no_rule_names_the_module_and_what_it_gave():
    mapper = LayeredMapper(lambda name, module: "epsilon", EpsilonPlus())  # pyright: ignore
    with pytest.raises(RuleError, match="gave 'epsilon' for module ''"):
        mapper.plan(nn.Linear(2, 2))


def test_a_mapper_of_ones_own_must_say_which_rules_it_gives():
    with pytest.raises(RuleError, match=r"Mapper must override __call__"):
        Mapper().plan(nn.Linear(2, 2))


def test_relevance_under_a_mixed_mapper_is_that_of_its_rules_layer_by_layer():
    net = made(
        "mixed",
        lambda: nn.Sequential(
            *(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
        ),
    )
    x, R = grid((2, 4), "x"), grid((2, 2), "R")
    mapper = FirstLayer(FlatRule()) | NameMapper({"2": GammaRule()}) | EpsilonPlus()
    want = ref.propagate(net, x, R, [ref.flat, None, ref.gamma, None, ref.epsilon])
    assert_close(explain(net, mapper, [x], R)[0][0], want, 1e-9)


def test_names_are_those_of_the_model_that_was_given_to_the_context():
    net = td_module(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), ["x"], ["y"])
    with pytest.raises(PathError, match=r"Did you mean 'module\.0'"):
        LRP(NameMapper({"0": FlatRule()}), "y").prepare(net)
    td = TensorDict({"x": torch.tensor([[1.0, 3.0]])}, [1])
    mapper = NameMapper({"module.0": FlatRule()}) | EpsilonPlus()
    with LRP(mapper, "y").prepare(net) as hooked:
        found = hooked(td)["attr", "x"]
    torch.testing.assert_close(found[0, 0], found[0, 1])
    assert "name 'module.0'" in str(LRP(mapper, "y").prepare(net))
