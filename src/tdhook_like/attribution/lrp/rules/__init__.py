"""Rules of modules. They know modules, and neither functions, mappers nor methods."""

from tdhook_like.attribution.lrp.rules.as_is import (
    AHQKVRule,
    EpsilonRule,
    IgnoreRule,
    LayerNormRule,
    PassRule,
    PseudoIdentityRule,
    SoftmaxEpsilonRule,
    StopRule,
    UniformEpsilonRule,
    UniformRule,
)
from tdhook_like.attribution.lrp.rules.masks import (
    MaskRule,
)
from tdhook_like.attribution.lrp.rules.picking import (
    ArgmaxRule,
)
from tdhook_like.attribution.lrp.rules.pooling import (
    NormRule,
)
from tdhook_like.attribution.lrp.rules.rectifiers import (
    BetaSmoothRule,
    DeconvReLURule,
    ExcitationRule,
    GuidedReLURule,
)
from tdhook_like.attribution.lrp.rules.rule import (
    Inputs,
    RemovableRuleHandle,
    Rule,
    RuleMapper,
)
from tdhook_like.attribution.lrp.rules.stabilizer import (
    ClippedStabilizer,
    RelativeStabilizer,
    Stabilizer,
)
from tdhook_like.attribution.lrp.rules.weights import (
    AlphaBetaRule,
    FlatRule,
    GammaRule,
    ModifiedRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)

__all__ = [
    "AHQKVRule",
    "AlphaBetaRule",
    "ArgmaxRule",
    "BetaSmoothRule",
    "ClippedStabilizer",
    "DeconvReLURule",
    "EpsilonRule",
    "ExcitationRule",
    "FlatRule",
    "GammaRule",
    "GuidedReLURule",
    "IgnoreRule",
    "Inputs",
    "LayerNormRule",
    "MaskRule",
    "ModifiedRule",
    "NormRule",
    "PassRule",
    "PseudoIdentityRule",
    "RelativeStabilizer",
    "RemovableRuleHandle",
    "Rule",
    "RuleMapper",
    "SoftmaxEpsilonRule",
    "Stabilizer",
    "StopRule",
    "UniformEpsilonRule",
    "UniformRule",
    "WSquareRule",
    "ZBoxRule",
    "ZPlusRule",
]
