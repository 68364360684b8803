"""Rules by type and by name."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from planned import reasons, rules, two_parts
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    GammaRule,
    IgnoreRule,
    PassRule,
    Rule,
    StopRule,
    WSquareRule,
    ZPlusRule,
)
from tdhook_like.attribution.lrp.mappers.choosing import Mapper
from tdhook_like.attribution.lrp.mappers.composites import EpsilonPlusFlat
from tdhook_like.attribution.lrp.mappers.patterns import FirstLayer, NameMapper, TypeMapper
from tdhook_like.errors import PathError, RuleError

# --- by type --------------------------------------------------------------------------------------


class Narrow(nn.Linear):
    pass


class Narrower(Narrow):
    pass


def test_the_most_specific_type_counts_in_whatever_order_types_are_given():
    net = nn.Sequential(nn.Linear(2, 2), Narrow(2, 2), Narrower(2, 2), nn.Tanh())
    table: dict[Any, Rule] = {nn.Linear: EpsilonRule(), Narrow: FlatRule()}
    expected = {"0": EpsilonRule, "1": FlatRule, "2": FlatRule}
    assert rules(TypeMapper(table), net) == expected
    assert rules(TypeMapper(dict(reversed(table.items()))), net) == expected
    table[nn.Module] = IgnoreRule()
    found = rules(TypeMapper(table), net)
    assert found == {"": IgnoreRule, **expected, "3": IgnoreRule}


def test_one_rule_may_stand_for_several_types_of_which_one_is_enough():
    mapper = TypeMapper({(nn.Linear, nn.Conv1d): EpsilonRule(), nn.Tanh: PassRule()})
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    assert rules(mapper, net) == {"0": EpsilonRule, "1": PassRule, "2": EpsilonRule}
    assert reasons(mapper, net)["0"] == "type Linear"
    assert repr(mapper) == (
        "TypeMapper({Linear/Conv1d: EpsilonRule(epsilon=1e-06), Tanh: PassRule()})"
    )


def test_a_type_that_no_module_has_is_an_error_that_lists_the_types():
    mapper = TypeMapper({nn.Linear: EpsilonRule(), nn.Conv2d: ZPlusRule()})
    with pytest.raises(PathError, match=r"no Conv2d\. Types here: 'Sequential', 'Linear', 'ReLU'"):
        mapper.bind(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(PathError, match="Conv1d or Conv3d"):
        TypeMapper({(nn.Conv1d, nn.Conv3d): ZPlusRule()}).plan(nn.Linear(2, 2))


def test_the_output_projection_of_attention_is_no_linear_layer_that_is_called():
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(PathError, match="no Linear"):
        TypeMapper({nn.Linear: EpsilonRule()}).bind(attention)
    named = TypeMapper({type(attention.out_proj): EpsilonRule()})
    assert rules(named, attention) == {"out_proj": EpsilonRule}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({nn.Linear: EpsilonRule}, "an instance is needed where this is a class"),
        ({nn.Linear: "epsilon"}, "Linear needs a Rule.*got 'epsilon'"),
        ({"0": EpsilonRule()}, "'0' is no module type"),
        ({int: EpsilonRule()}, "<class 'int'> is no module type"),
    ],
)
def test_what_is_no_type_or_no_rule_is_refused(table: Any, words: str):
    with pytest.raises(RuleError, match=words):
        TypeMapper(table)


# --- by name --------------------------------------------------------------------------------------


def test_a_glob_means_the_layers_inside_on_which_the_rule_can_sit():
    mapper = NameMapper({"encoder.*": ZPlusRule(), "head.[02]": FlatRule()})
    assert rules(mapper, two_parts()) == {
        **{"encoder.0": ZPlusRule, "encoder.2": ZPlusRule},
        **{"head.0": FlatRule, "head.2": FlatRule},
    }
    assert reasons(mapper, two_parts())["encoder.0"] == "pattern 'encoder.*'"
    assert rules(NameMapper({"encoder*": PassRule()}), two_parts()) == {
        f"encoder.{i}": PassRule for i in range(3)
    }


def test_an_exact_path_means_that_very_module_be_it_a_container():
    mapper = NameMapper({"encoder": EpsilonRule(), "head.0": FlatRule()})
    assert rules(mapper, two_parts()) == {"encoder": EpsilonRule, "head.0": FlatRule}
    assert reasons(mapper, two_parts())["head.0"] == "name 'head.0'"
    assert rules(NameMapper({"": EpsilonRule()}), nn.Linear(2, 2)) == {"": EpsilonRule}


def test_an_exact_path_goes_before_globs_and_the_first_glob_before_the_next():
    mapper = NameMapper(
        {"encoder.*": ZPlusRule(), "*.0": FlatRule(), "head.*": GammaRule(), "head.0": StopRule()}
    )
    assert rules(mapper, two_parts()) == {
        **{"encoder.0": ZPlusRule, "encoder.2": ZPlusRule},
        **{"head.0": StopRule, "head.2": GammaRule},
    }


def test_a_name_that_looks_like_a_glob_is_one_only_where_no_module_has_it():
    net = nn.Module()
    net.add_module("0", nn.Linear(2, 2))
    net.add_module("[0]", nn.Linear(2, 2))
    assert rules(NameMapper({"[0]": FlatRule()}), net) == {"[0]": FlatRule}


def test_none_keeps_the_own_gradient_of_everything_that_is_meant():
    mapper = NameMapper({"head": None}) | EpsilonPlus()
    found = rules(mapper, two_parts())
    assert found == {
        **{"encoder.0": ZPlusRule, "encoder.1": PassRule, "encoder.2": ZPlusRule},
        **dict.fromkeys(("head", "head.0", "head.1", "head.2"), IgnoreRule),
    }
    assert reasons(mapper, two_parts())["head.1"] == "name 'head': its own gradient is this rule"
    some = rules(NameMapper({"head.*": None}), two_parts())
    assert some == dict.fromkeys(("head.0", "head.1", "head.2"), IgnoreRule)


def test_a_mapper_may_stand_for_a_part_of_the_model():
    inner = TypeMapper({nn.Linear: WSquareRule()})
    mapper = NameMapper({"head": inner, "encoder": EpsilonPlusFlat()})
    assert rules(mapper, two_parts()) == {
        **{"encoder.0": FlatRule, "encoder.1": PassRule, "encoder.2": ZPlusRule},
        **{"head.0": WSquareRule, "head.2": WSquareRule},
    }
    found = reasons(mapper, two_parts())
    assert found["encoder.0"] == "name 'encoder', first layer"
    assert found["head.2"] == "name 'head', type Linear"
    # Patterns of the inner mapper are for its part.
    with pytest.raises(PathError, match="the model has no Linear"):
        NameMapper({"encoder": inner}).bind(two_parts())
    assert rules(NameMapper({"head.*": EpsilonPlusFlat()}), two_parts()) == {
        **{"head.0": FlatRule, "head.1": PassRule, "head.2": EpsilonRule},
    }


def test_a_part_of_a_name_is_not_the_part_of_the_model():
    net = nn.ModuleDict({"head": nn.Linear(2, 2), "head2": nn.Linear(2, 2)})
    assert rules(NameMapper({"head": EpsilonPlus()}), net) == {"head": EpsilonRule}


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("xyz.*", r"'xyz\.\*' matches no submodule\. Paths here: 'encoder', 'encoder\.0'"),
        ("encodr.0", r"Did you mean 'encoder\.0'"),
        ("2", r"Did you mean 'encoder\.2', 'head\.2'"),
        ("head.*.weight", "matches no submodule"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_a_guess(pattern: str, words: str):
    for value in (FlatRule(), None, EpsilonPlus()):
        mapper = NameMapper({"head.0": EpsilonRule(), pattern: value})
        for wrapped in (mapper, mapper | EpsilonPlus(), EpsilonPlus(rule_mapper=mapper)):
            with pytest.raises(PathError, match=words):
                LRP(wrapped, "y").prepare(two_parts(), ["x"], ["y"])


def test_a_glob_that_matches_only_what_its_rule_cannot_sit_on_says_why():
    with pytest.raises(RuleError, match=r"'\*.1' matches.*'encoder.1', 'head.1'.*this has none"):
        NameMapper({"*.1": ZPlusRule()}).bind(two_parts())
    with pytest.raises(RuleError, match="these are containers"):
        NameMapper({"hea?": EpsilonRule()}).bind(two_parts())


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"0": EpsilonRule}, "'0' must be a rule, None or callable.*An instance is needed"),
        ({"0": EpsilonPlus}, "An instance is needed where this is a class"),
        ({"0": 3}, "got 3"),
        ({nn.Linear: EpsilonRule()}, "is no path or glob. Rules by type: TypeMapper"),
    ],
)
def test_what_is_no_path_no_rule_and_no_mapper_is_refused(table: Any, words: str):
    with pytest.raises(RuleError, match=words):
        NameMapper(table)


def test_a_shared_module_is_found_under_each_of_its_paths():
    shared = nn.Linear(2, 2)
    net = nn.ModuleDict({"a": shared, "b": nn.Linear(2, 2), "c": shared})
    assert rules(NameMapper({"c": FlatRule()}), net) == {"a": FlatRule}


def test_what_makes_a_weight_is_not_meant_by_a_glob():
    net = nn.Sequential(weight_norm(nn.Linear(2, 2)))
    assert rules(NameMapper({"*": PassRule()}), net) == {"0": PassRule}
    assert rules(FirstLayer(FlatRule(), "*"), net) == {"0": FlatRule}


def test_a_mapper_serves_the_next_model_as_it_served_the_first():
    mapper = NameMapper({"0": FlatRule()}) | FirstLayer(StopRule()) | EpsilonPlus()
    for net in (nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU())):
        assert rules(mapper, net)["0"] is FlatRule
    with pytest.raises(RuleError, match="does not know the model"):
        mapper("0", nn.Linear(2, 2))


@pytest.mark.parametrize(
    "mapper", [NameMapper({"0": FlatRule()}), FirstLayer(FlatRule()), EpsilonPlusFlat()], ids=repr
)
def test_what_has_to_know_the_model_does_not_guess_without_it(mapper: Mapper):
    with pytest.raises(RuleError, match=r"bind it: mapper.bind\(model\)"):
        mapper("0", nn.Linear(2, 2))
    net = nn.Sequential(nn.Linear(2, 2))
    assert isinstance(mapper.bind(net)("0", net[0]), FlatRule)
