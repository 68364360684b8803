"""Rules by type, by name, by position, and one mapper over another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import reference_lrp as ref
from rule_samples import assert_close, explain, grid, made
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
    ZBoxRule,
    ZPlusRule,
)
from tdhook_like.attribution.lrp.mappers.choosing import LayeredMapper, Mapper
from tdhook_like.attribution.lrp.mappers.composites import CPLRP, AttnLRP, EpsilonPlusFlat
from tdhook_like.attribution.lrp.mappers.patterns import FirstLayer, NameMapper, TypeMapper
from tdhook_like.errors import PathError, RuleError
from torchrl_records import FAMILIES


def rules(mapper: Mapper, model: nn.Module) -> dict[str, type[Rule]]:
    """Which rule every path gets."""
    return {line.path: type(line.rule) for line in mapper.plan(model).lines}


def reasons(mapper: Mapper, model: nn.Module) -> dict[str, str]:
    return {line.path: line.why for line in mapper.plan(model).lines}


def two_parts() -> nn.Module:
    """An encoder of three modules and a head of two."""
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.Conv1d(2, 2, 1)),
            "head": nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)),
        }
    )


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


# --- by position ----------------------------------------------------------------------------------

FIRST = {
    "SafeModule": ["module.0"],
    "ConvNet": ["module.0.0"],
    "ActorValueOperator": ["module.0.module.0"],
    "ActorCriticOperator": ["module.0.module.0"],
    "ActorCriticWrapper": ["module.0.module.0.module.0", "module.1.module.0"],
    "composite distribution": ["module.0.module.net.0"],
    "DuelingCnnDQNet": ["module.0.module.features.0"],
    "NoisyLinear": ["module.0.module.0"],
    "SAC's critics": ["member.module.0"],
    "gSDEModule": ["module.0.module.0.module.0"],
    "DecisionTransformerInferenceWrapper": ["td_module.module.0.module.step.0"],
    "a policy of several agents": ["module.0.module._empty_net.0"],
    "MultiAgentConvNet, shared weights": ["module._empty_net.0"],
}


@pytest.mark.parametrize("name", FIRST)
def test_the_layers_that_read_the_inputs_of_torchrls_models_are_found(name: str):
    found = rules(FirstLayer(FlatRule()), FAMILIES[name].build())
    assert found == dict.fromkeys(FIRST[name], FlatRule)


def td_module(layer: nn.Module, in_keys: list[Any], out_keys: list[Any]) -> TensorDictModule:
    return TensorDictModule(layer, in_keys=in_keys, out_keys=out_keys)


class Joined(nn.Module):
    """Its inputs side by side."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, -1)


def test_every_encoder_of_a_sequence_that_reads_inputs_has_a_first_layer():
    camera = nn.Sequential(nn.Flatten(-3), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(2, 2))
    net = TensorDictSequential(
        td_module(camera, ["camera"], ["seen"]),
        td_module(nn.Linear(3, 2), [("robot", "joints")], ["felt"]),
        td_module(Joined(), ["seen", "felt"], ["hidden"]),
        td_module(nn.Linear(4, 2), ["hidden"], ["logits"]),
        td_module(nn.Linear(5, 1), [("robot", "joints"), "logits"], ["value"]),
    )
    assert set(rules(FirstLayer(FlatRule()), net)) == {"module.0.module.2", "module.1.module"}


def test_what_a_module_without_weights_makes_of_inputs_still_counts_as_input():
    inner = TensorDictSequential(
        td_module(Joined(), ["a", "b"], ["both"]), td_module(nn.Linear(4, 2), ["both"], ["h"])
    )
    net = TensorDictSequential(inner, td_module(nn.Linear(2, 2), ["h"], ["y"]))
    assert set(rules(FirstLayer(FlatRule()), net)) == {"module.0.module.1.module"}


def test_an_input_that_was_overwritten_is_no_input():
    net = TensorDictSequential(
        td_module(nn.Linear(2, 2), ["x"], ["x"]), td_module(nn.Linear(2, 2), ["x"], ["y"])
    )
    assert set(rules(FirstLayer(FlatRule()), net)) == {"module.0.module"}


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(2)),
        lambda: nn.ModuleList([nn.GRU(2, 2), nn.Linear(2, 2)]),
        lambda: nn.TransformerEncoderLayer(4, 2),
        FAMILIES["LSTMModule over time"].build,
    ],
    ids=["no weights", "a GRU first", "attention first", "LSTMModule"],
)
def test_a_model_that_no_affine_layer_reads_first_is_an_error_that_asks_for_paths(build: Any):
    for mapper in (FirstLayer(FlatRule()), EpsilonPlusFlat()):
        with pytest.raises(PathError, match=r"no dense layer or convolution.*first='encoder.0'"):
            mapper.bind(build())


def test_first_layers_may_be_named():
    net = two_parts()
    named = FirstLayer(FlatRule(), ("encoder.0", "head.0"))
    assert rules(named, net) == {"encoder.0": FlatRule, "head.0": FlatRule}
    assert rules(FirstLayer(FlatRule(), "head.0"), net) == {"head.0": FlatRule}
    assert rules(FirstLayer(FlatRule(), "head.*"), net) == {"head.0": FlatRule, "head.2": FlatRule}
    assert rules(EpsilonPlusFlat(first="encoder.2"), net)["encoder.0"] is ZPlusRule
    assert set(reasons(named, net).values()) == {"first layer"}
    with pytest.raises(PathError, match=r"FirstLayer: 'body\.0' matches no submodule"):
        FirstLayer(FlatRule(), "body.0").bind(net)
    with pytest.raises(PathError, match=r"'\*.1' matches no layer with weights"):
        FirstLayer(FlatRule(), "*.1").bind(net)


def test_the_rule_of_the_first_layer_is_a_rule():
    with pytest.raises(RuleError, match="an instance is needed"):
        FirstLayer(FlatRule)  # pyright: ignore[reportArgumentType]
    assert repr(FirstLayer(FlatRule(), "0")) == (
        "FirstLayer(rule=FlatRule(stabilizer=1e-06), first=('0',))"
    )


# --- one over another -----------------------------------------------------------------------------


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
    with pytest.raises(RuleError):
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
