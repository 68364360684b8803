"""Every module class of torch.nn: which rule it gets by its type, or why none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrl.modules import ConsistentDropout, NoisyLinear

from rule_samples import assert_close, explain, grid
from tdhook_like.attribution.lrp import (
    EpsilonPlus,
    EpsilonRule,
    IgnoreRule,
    LayerNormRule,
    PassRule,
    Rule,
    SoftmaxEpsilonRule,
    UniformEpsilonRule,
    ZPlusRule,
)
from tdhook_like.attribution.lrp.batchnorm import BatchNormRule
from tdhook_like.attribution.lrp.mappers.policies import PolicyMapper
from tdhook_like.attribution.lrp.recurrent.rules import SignalTakesAllRule


def names(text: str) -> list[str]:
    return text.split()


# The rule of every class that has one, in words of the table's own.
RULES: dict[type[Rule], list[str]] = {
    EpsilonRule: names(
        """Linear LazyLinear
        AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d"""
    ),
    ZPlusRule: names(
        """Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
        LazyConv1d LazyConv2d LazyConv3d
        LazyConvTranspose1d LazyConvTranspose2d LazyConvTranspose3d"""
    ),
    UniformEpsilonRule: ["Bilinear"],
    PassRule: names(
        """ReLU LeakyReLU PReLU RReLU ReLU6 ELU CELU SELU GELU SiLU Mish Tanh Tanhshrink Sigmoid
        LogSigmoid Softplus Softsign Softshrink Hardshrink Hardtanh Hardsigmoid Hardswish Threshold
        LocalResponseNorm CrossMapLRN2d"""
    ),
    BatchNormRule: names(
        """BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm
        LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d"""
    ),
    LayerNormRule: ["LayerNorm", "RMSNorm"],
    SoftmaxEpsilonRule: ["Softmax", "Softmax2d", "Softmin"],
    IgnoreRule: names(
        """Identity Flatten Unflatten Fold Unfold Upsample UpsamplingNearest2d UpsamplingBilinear2d
        PixelShuffle PixelUnshuffle ChannelShuffle
        ConstantPad1d ConstantPad2d ConstantPad3d ZeroPad1d ZeroPad2d ZeroPad3d
        CircularPad1d CircularPad2d CircularPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d
        ReplicationPad1d ReplicationPad2d ReplicationPad3d
        MaxPool1d MaxPool2d MaxPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
        FractionalMaxPool2d FractionalMaxPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d
        LPPool1d LPPool2d LPPool3d LogSoftmax
        Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"""
    ),
}

# Of these, the policies' mapper looks at more than the class.
RECURRENT = names("RNN LSTM GRU RNNCell LSTMCell GRUCell RNNBase RNNCellBase")

NONE = {
    "they hold others, which have rules": names(
        """Module Container Sequential ModuleList ModuleDict ParameterList ParameterDict DataParallel
        Transformer TransformerEncoder TransformerDecoder TransformerEncoderLayer
        TransformerDecoderLayer AdaptiveLogSoftmaxWithLoss"""
    ),
    "the functions that they are made of have rules": names(
        """MultiheadAttention GLU GroupNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d
        LazyInstanceNorm1d LazyInstanceNorm2d LazyInstanceNorm3d"""
    ),
    "their inputs are indices": ["Embedding", "EmbeddingBag"],
    "they compare two inputs, and are no layers of a policy": names(
        """CosineSimilarity PairwiseDistance
        L1Loss NLLLoss NLLLoss2d KLDivLoss MSELoss BCELoss BCEWithLogitsLoss PoissonNLLLoss
        GaussianNLLLoss HingeEmbeddingLoss MultiLabelMarginLoss SmoothL1Loss HuberLoss SoftMarginLoss
        CrossEntropyLoss MultiLabelSoftMarginLoss CosineEmbeddingLoss MarginRankingLoss
        MultiMarginLoss TripletMarginLoss TripletMarginWithDistanceLoss CTCLoss
        LinearCrossEntropyLoss"""
    ),
}

EVERY = {
    name: kind
    for name, kind in vars(nn).items()
    if isinstance(kind, type) and issubclass(kind, nn.Module)
}


def unmade(kind: type[nn.Module]) -> nn.Module:
    """A module of a class, of which nothing but the class can be asked."""
    made = object.__new__(kind)  # some classes that are out of use would warn
    nn.Module.__init__(made)
    return made


def given(mapper: PolicyMapper, kind: type[nn.Module]) -> type[Rule] | None:
    rule = mapper("any", unmade(kind))
    return None if rule is None else type(rule)


def test_every_module_of_torch_stands_in_the_table_once():
    groups = (RECURRENT, *RULES.values(), *NONE.values())
    listed = [name for group in groups for name in group]
    assert len(listed) == len(set(listed))
    # Another version of torch may lack some; it has none of which nobody thought.
    assert set(EVERY) - set(listed) == set()


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for kind, group in RULES.items() for name in group]
)
def test_a_module_of_torch_has_the_rule_of_the_table(name: str, kind: type[Rule]):
    assert given(PolicyMapper(), EVERY[name]) is kind


@pytest.mark.parametrize(
    "name", [name for group in NONE.values() for name in group if name in EVERY]
)
def test_a_module_of_torch_that_the_table_leaves_out_has_no_rule(name: str):
    assert given(PolicyMapper(), EVERY[name]) is None


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_recurrent_modules_have_a_rule_under_the_policies_mapper_alone(kind: Any):
    module = kind(2, 3)
    assert isinstance(PolicyMapper()("any", module), SignalTakesAllRule)
    assert EpsilonPlus()("any", module) is None


def test_an_unknown_recurrent_module_keeps_its_own_gradient():
    class Mine(nn.RNNCellBase):
        def __init__(self) -> None:
            super().__init__(2, 2, True, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x

    assert PolicyMapper()("any", Mine()) is None


def test_layers_of_torchrl_have_the_rules_of_what_they_derive_from():
    assert isinstance(PolicyMapper()("any", NoisyLinear(2, 2)), EpsilonRule)
    assert isinstance(PolicyMapper()("any", ConsistentDropout(0.5)), IgnoreRule)


# --- that "its own gradient" is the rule -----------------------------------------------------------

KEEPS_ALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Upsample": (lambda: nn.Upsample(scale_factor=2), (2, 3, 3)),
    "bilinear Upsample": (lambda: nn.Upsample(5, mode="bilinear"), (2, 3, 3)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (4, 2, 2)),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), (1, 4, 4)),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), (4, 2, 2)),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), (1, 2, 2)),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(1), (1, 3, 3)),
    "ReplicationPad1d": (lambda: nn.ReplicationPad1d(2), (1, 3)),
    "CircularPad1d": (lambda: nn.CircularPad1d(1), (2, 3)),
    "Unfold": (lambda: nn.Unfold(2), (2, 3, 3)),
    "FractionalMaxPool2d": (
        lambda: nn.FractionalMaxPool2d(2, 2, _random_samples=torch.full((2, 2, 2), 0.5).double()),
        (2, 4, 4),
    ),
    "LPPool1d": (lambda: nn.LPPool1d(3, 2), (2, 4)),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 2)), (4,)),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.5).eval(), (4,)),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(3), (4, 3)),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), (1, 4, 4)),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), (1, 3, 3)),
}


@pytest.mark.parametrize("name", KEEPS_ALL)
def test_what_has_no_weights_and_no_bias_conserves_relevance(name: str):
    build, shape = KEEPS_ALL[name]
    x = grid((2, *shape), name).abs() + 0.25
    net = copy.deepcopy(build())
    R = grid(net(x).shape, f"{name} R")
    if name == "ZeroPad2d":  # a padding's zeros are no relevance's to share
        R = R * (net(x) != 0)
    got = explain(net, EpsilonPlus(1e-12, 1e-12), [x], R)[0][0]
    assert_close(got.flatten(1).sum(1, keepdim=True), R.flatten(1).sum(1, keepdim=True), 1e-8)


def test_a_log_probability_is_its_logit_against_their_mean():
    # log s_j = x_j - log Σ exp x, whose gradient holds the mean under s constant.
    x, j = grid((2, 4), "log softmax"), 1
    R = torch.zeros(2, 4).double()
    R[:, j] = torch.log_softmax(x, -1)[:, j]
    s = torch.softmax(x, -1)
    want = -s * x
    want[:, j] += x[:, j]
    assert_close(explain(nn.LogSoftmax(-1), EpsilonPlus(), [x], R)[0][0], want, 1e-9)
