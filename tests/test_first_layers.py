"""Rules by position: the layers that read the inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn

from planned import reasons, rules, td_module, two_parts
from tdhook_like.attribution.lrp import FlatRule, ZPlusRule
from tdhook_like.attribution.lrp.mappers.composites import EpsilonPlusFlat
from tdhook_like.attribution.lrp.mappers.patterns import FirstLayer
from tdhook_like.errors import PathError, RuleError
from torchrl_records import FAMILIES

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
