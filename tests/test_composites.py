"""The composites: which rule lands where, and what their numbers are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import LSTMModule

from composite_nets import mlp, resnet, vgg
from tdhook_like import LRP
from tdhook_like.attribution.lrp import EpsilonPlus, EpsilonRule, FlatRule, Rule
from tdhook_like.attribution.lrp.mappers.choosing import Mapper
from tdhook_like.attribution.lrp.mappers.composites import (
    CPLRP,
    AttnLRP,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlusFlat,
)
from tdhook_like.attribution.lrp.mappers.patterns import NameMapper
from tdhook_like.attribution.lrp.mappers.policies import PolicyMapper
from tdhook_like.errors import RuleError
from torchrl_records import FAMILIES
from torchrl_records.nets import HIDDEN, OBS


def rules(mapper: Mapper, model: nn.Module) -> dict[str, str]:
    """Which rule every path gets, by name."""
    return {line.path: type(line.rule).__name__ for line in mapper.plan(model).lines}


# --- which rule lands where -----------------------------------------------------------------------

COMPOSITES: dict[str, tuple[Mapper, str, str]] = {
    "EpsilonPlus": (EpsilonPlus(), "ZPlusRule", ""),
    "EpsilonPlusFlat": (EpsilonPlusFlat(), "ZPlusRule", "FlatRule"),
    "EpsilonGammaBox": (EpsilonGammaBox(0.0, 1.0), "GammaRule", "ZBoxRule"),
    "EpsilonAlpha2Beta1": (EpsilonAlpha2Beta1(), "AlphaBetaRule", ""),
    "EpsilonAlpha2Beta1Flat": (EpsilonAlpha2Beta1Flat(), "AlphaBetaRule", "FlatRule"),
    "AttnLRP": (AttnLRP(), "EpsilonRule", ""),
    "CPLRP": (CPLRP(), "EpsilonRule", ""),
    "PolicyMapper": (PolicyMapper(), "ZPlusRule", ""),
}
"""Each with its rule on convolutions, and on the layer that reads the inputs if that is another."""

every_composite = pytest.mark.parametrize("name", COMPOSITES)


@every_composite
def test_dense_layers_have_epsilon_and_the_first_one_may_have_another(name: str):
    mapper, _, first = COMPOSITES[name]
    assert rules(mapper, mlp()) == {
        **{"0": first or "EpsilonRule", "1": "PassRule", "2": "EpsilonRule"},
        **{"3": "PassRule", "4": "EpsilonRule"},
    }


@every_composite
def test_convolutions_have_the_composites_rule_and_pooling_its_own(name: str):
    mapper, conv, first = COMPOSITES[name]
    assert rules(mapper, vgg()) == {
        **{"0": first or conv, "1": "PassRule", "2": conv, "3": "PassRule"},
        **{"4": "IgnoreRule", "5": "EpsilonRule", "6": "IgnoreRule"},
        **{"7": "EpsilonRule", "8": "PassRule", "9": "IgnoreRule", "10": "EpsilonRule"},
    }


@every_composite
def test_blocks_have_no_rule_but_what_is_inside_has(name: str):
    mapper, conv, first = COMPOSITES[name]
    assert rules(mapper, resnet()) == {
        **{"0": first or conv, "1": "PassRule"},
        **{"2.conv1": conv, "2.bn1": "BatchNormRule", "2.relu": "PassRule", "2.conv2": conv},
        **{"3": "EpsilonRule", "4": "IgnoreRule", "5": "EpsilonRule"},
    }


TORCHRL: dict[str, dict[str, str]] = {
    "Categorical": {
        **{"module.0.module.0": "first", "module.0.module.1": "PassRule"},
        **{"module.0.module.2": "EpsilonRule", "module.0.module.3": "PassRule"},
        **{"module.0.module.4": "EpsilonRule"},
    },
    "ActorValueOperator": {
        **{"module.0.module.0": "first", "module.0.module.1": "PassRule"},
        **{f"module.1.module.0.module.{i}": "EpsilonRule" for i in (0, 2, 4)},
        **{f"module.1.module.0.module.{i}": "PassRule" for i in (1, 3)},
        **{f"module.2.module.{i}": "EpsilonRule" for i in (0, 2, 4)},
        **{f"module.2.module.{i}": "PassRule" for i in (1, 3)},
    },
    "QValueActor": {
        "module.0.module.0": "first",
        **{f"module.0.module.{i}": "EpsilonRule" for i in (2, 4)},
        **{f"module.0.module.{i}": "PassRule" for i in (1, 3)},
    },
    "NoisyLinear": {
        "module.0.module.0": "first",
        **{f"module.0.module.{i}": "EpsilonRule" for i in (2, 4)},
        **{f"module.0.module.{i}": "PassRule" for i in (1, 3)},
    },
    "DuelingCnnDQNet": {
        **{"module.0.module.features.0": "first conv", "module.0.module.features.2": "conv"},
        **{f"module.0.module.features.{i}": "PassRule" for i in (1, 3)},
        **{f"module.0.module.{head}.0": "EpsilonRule" for head in ("advantage", "value")},
        **{f"module.0.module.{head}.1": "PassRule" for head in ("advantage", "value")},
        **{f"module.0.module.{head}.2": "EpsilonRule" for head in ("advantage", "value")},
    },
    "MultiAgentMLP, own weights": {
        **{"module._empty_net.0": "first", "module._empty_net.1": "PassRule"},
        **{"module._empty_net.2": "EpsilonRule"},
    },
    "MultiAgentConvNet, shared weights": {
        **{"module._empty_net.0": "first conv", "module._empty_net.1": "PassRule"},
    },
}


@every_composite
@pytest.mark.parametrize("family", TORCHRL)
def test_the_layers_of_torchrls_models_have_the_composites_rules(family: str, name: str):
    mapper, conv, first = COMPOSITES[name]
    words = {"first": first or "EpsilonRule", "first conv": first or conv, "conv": conv}
    expected = {path: words.get(rule, rule) for path, rule in TORCHRL[family].items()}
    found = rules(mapper, FAMILIES[family].build())
    assert {path: found[path] for path in expected} == expected
    # Beside these stand containers and reshapings alone.
    assert set(found.values()) <= {*expected.values(), "IgnoreRule"}


def test_recurrent_layers_have_a_rule_under_the_policies_mapper():
    for name in ("LSTMModule over time", "python LSTMModule over time"):
        found = rules(PolicyMapper(), FAMILIES[name].build())
        assert found == {"module.0.lstm": "SignalTakesAllRule", "module.1.module": "EpsilonRule"}
    found = rules(PolicyMapper(), FAMILIES["GRUModule, step by step"].build())
    assert found["module.0.gru"] == "SignalTakesAllRule"


def lstm_policy(backend: str) -> TensorDictSequential:
    torch.manual_seed(0)
    memory = LSTMModule(
        *(OBS, HIDDEN),
        in_keys=["observation", "h", "c"],
        out_keys=["embed", ("next", "h"), ("next", "c")],
    )
    memory.recurrent_backend = backend  # some need packages of their own to be made with
    head = TensorDictModule(nn.Linear(HIDDEN, 1), ["embed"], ["value"])
    return TensorDictSequential(memory, head).double()


def test_a_recurrent_module_that_may_not_call_its_inner_layer_has_the_rule_itself():
    mapper = PolicyMapper()
    assert rules(mapper, lstm_policy("pad"))["module.0.lstm"] == "SignalTakesAllRule"
    found = rules(mapper, lstm_policy("auto"))
    assert found == {"module.0": "SignalTakesAllRule", "module.1.module": "EpsilonRule"}
    td = TensorDict(
        {
            "observation": torch.randn(3, OBS).double(),
            "h": torch.randn(3, 1, HIDDEN).double(),
            "c": torch.randn(3, 1, HIDDEN).double(),
            "is_init": torch.zeros(3, 1, dtype=torch.bool),
        },
        [3],
    )
    results = []
    for backend in ("pad", "auto"):
        with LRP(mapper, "value").prepare(lstm_policy(backend)) as hooked:
            results.append(hooked(td.clone())["attr", "observation"])
    assert results[0].abs().max() > 0
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_model_of_torchrl_is_explained_under_the_policies_mapper(name: str):
    family = FAMILIES[name]
    torch.manual_seed(3)
    model, td = family.build(), family.td()
    method = LRP(PolicyMapper(), family.target, unhandled="ignore")
    with (
        method.prepare(model) as hooked,
        family.scope(),
        set_exploration_type(ExplorationType.RANDOM),
    ):
        td = hooked(td)
    found = [td[("attr", key) if isinstance(key, str) else ("attr", *key)] for key in family.keys]
    assert all(torch.isfinite(value).all() for value in found)
    assert all(value.any() for value in found)


def test_softmax_is_followed_by_attnlrp_and_constant_in_cplrp():
    net = nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1), nn.LayerNorm(2), nn.GELU())
    shared = {"0": "EpsilonRule", "2": "LayerNormRule", "3": "PassRule"}
    assert rules(AttnLRP(), net) == {**shared, "1": "SoftmaxEpsilonRule"}
    assert rules(CPLRP(), net) == {**shared, "1": "StopRule"}
    assert repr(AttnLRP().functions) == "FunctionRules(attention='gradient', gates='half')"
    assert repr(CPLRP().functions) == "FunctionRules(attention='constant', gates='signal')"
    assert EpsilonPlus().functions is PolicyMapper().functions is None


@every_composite
def test_a_mapper_of_ones_own_goes_before_the_first_layer_and_the_types(name: str):
    mapper = COMPOSITES[name][0]
    own = NameMapper({"0": EpsilonRule(0.5), "10": FlatRule()})
    options: dict[str, Any] = {"low": 0.0, "high": 1.0} if name == "EpsilonGammaBox" else {}
    found = rules(type(mapper)(**options, rule_mapper=own), vgg())
    assert found == {**rules(mapper, vgg()), "0": "EpsilonRule", "10": "FlatRule"}


def test_every_number_goes_to_the_rules_it_is_for():
    own = {"epsilon": 0.5, "stabilizer": 0.25}
    net = nn.Sequential(
        nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1), nn.Linear(1, 1), nn.Bilinear(1, 1, 1)
    )
    shown = {
        type(mapper).__name__: [repr(line.rule) for line in mapper.plan(net).lines]
        for mapper in (
            EpsilonPlusFlat(**own),
            EpsilonGammaBox(-2.0, 3.0, gamma=0.125, **own),
            EpsilonAlpha2Beta1Flat(**own),
            AttnLRP(**own),
        )
    }
    dense = ["EpsilonRule(epsilon=0.5)", "UniformEpsilonRule(epsilon=0.5)"]
    flat = "FlatRule(stabilizer=0.25)"
    assert shown == {
        "EpsilonPlusFlat": [flat, "ZPlusRule(stabilizer=0.25)", *dense],
        "EpsilonGammaBox": [
            "ZBoxRule(stabilizer=0.25, low=-2.0, high=3.0)",
            "GammaRule(stabilizer=0.25, gamma=0.125)",
            *dense,
        ],
        "EpsilonAlpha2Beta1Flat": [
            *(flat, "AlphaBetaRule(stabilizer=0.25, alpha=2.0, beta=1.0)", *dense),
        ],
        "AttnLRP": ["EpsilonRule(epsilon=0.5)"] * 3 + dense[1:],
    }


def test_composites_show_what_was_given_to_them():
    assert repr(EpsilonGammaBox(0.0, 1.0, first="0")) == (
        "EpsilonGammaBox(low=0.0, high=1.0, first='0')"
    )
    assert repr(EpsilonPlusFlat()) == "EpsilonPlusFlat()"


@pytest.mark.parametrize("given", [EpsilonPlusFlat, AttnLRP, PolicyMapper])
def test_a_class_in_place_of_a_composite_is_refused(given: Any):
    with pytest.raises(RuleError, match="An instance is needed where it is a class"):
        LRP(given, "y").prepare(nn.Linear(2, 1), ["x"], ["y"])


def test_wrong_numbers_are_refused_when_a_composite_is_made():
    for make, words in (
        (lambda: EpsilonPlusFlat(epsilon=0), "epsilon"),
        (lambda: EpsilonGammaBox(1.0, 0.0), "low"),
        (lambda: EpsilonGammaBox(0.0, 1.0, gamma=-1), "gamma"),
    ):
        with pytest.raises(RuleError, match=words):
            make()


def test_extending_a_composite_by_type_is_one_line():
    class Mine(EpsilonPlusFlat):
        def rules_by_type(self) -> dict[type[nn.Module], Rule]:
            return {**super().rules_by_type(), nn.Linear: FlatRule(self.stabilizer)}

    assert rules(Mine(), mlp()) == {
        **{f"{i}": "FlatRule" for i in (0, 2, 4)},
        **{f"{i}": "PassRule" for i in (1, 3)},
    }
