"""Layer-wise relevance propagation: rules, mappers, function rules, the plan and the ledger.

Import the method itself from ``tdhook_like``: ``from tdhook_like import LRP``.
"""

from tdhook_like.attribution.lrp.batchnorm import BatchNormRule
from tdhook_like.attribution.lrp.choosing import LayeredMapper, Mapper
from tdhook_like.attribution.lrp.composites import (
    CPLRP,
    AttnLRP,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlusFlat,
)
from tdhook_like.attribution.lrp.functions import FunctionRules
from tdhook_like.attribution.lrp.gradient_mappers import (
    BetaSmoothMapper,
    DeconvnetMapper,
    ExcitationMapper,
    GuidedBackpropMapper,
)
from tdhook_like.attribution.lrp.ledger import Ledger, Row
from tdhook_like.attribution.lrp.mappers import BaseRuleMapper, EpsilonPlus
from tdhook_like.attribution.lrp.masks import MaskRule
from tdhook_like.attribution.lrp.modifiers import ParamModifier
from tdhook_like.attribution.lrp.operations import FunctionRule
from tdhook_like.attribution.lrp.patterns import FirstLayer, NameMapper, TypeMapper
from tdhook_like.attribution.lrp.picking import ArgmaxRule
from tdhook_like.attribution.lrp.plan import RulePlan
from tdhook_like.attribution.lrp.policies import PolicyMapper
from tdhook_like.attribution.lrp.pooling import NormRule
from tdhook_like.attribution.lrp.rectifiers import (
    BetaSmoothRule,
    DeconvReLURule,
    ExcitationRule,
    GuidedReLURule,
)
from tdhook_like.attribution.lrp.recurrent import HalfRule, ProportionalRule, SignalTakesAllRule
from tdhook_like.attribution.lrp.rule import Inputs, RemovableRuleHandle, Rule, RuleMapper
from tdhook_like.attribution.lrp.ruled import RuledModel, relevance
from tdhook_like.attribution.lrp.rules import (
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
from tdhook_like.attribution.lrp.stabilizer import ClippedStabilizer, RelativeStabilizer, Stabilizer
from tdhook_like.attribution.lrp.weights import (
    AlphaBetaRule,
    FlatRule,
    GammaRule,
    ModifiedRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)

__all__ = [
    "CPLRP",
    "AHQKVRule",
    "AlphaBetaRule",
    "ArgmaxRule",
    "AttnLRP",
    "BaseRuleMapper",
    "BatchNormRule",
    "BetaSmoothMapper",
    "BetaSmoothRule",
    "ClippedStabilizer",
    "DeconvReLURule",
    "DeconvnetMapper",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "EpsilonRule",
    "ExcitationMapper",
    "ExcitationRule",
    "FirstLayer",
    "FlatRule",
    "FunctionRule",
    "FunctionRules",
    "GammaRule",
    "GuidedBackpropMapper",
    "GuidedReLURule",
    "HalfRule",
    "IgnoreRule",
    "Inputs",
    "LayerNormRule",
    "LayeredMapper",
    "Ledger",
    "Mapper",
    "MaskRule",
    "ModifiedRule",
    "NameMapper",
    "NormRule",
    "ParamModifier",
    "PassRule",
    "PolicyMapper",
    "ProportionalRule",
    "PseudoIdentityRule",
    "RelativeStabilizer",
    "RemovableRuleHandle",
    "Row",
    "Rule",
    "RuleMapper",
    "RulePlan",
    "RuledModel",
    "SignalTakesAllRule",
    "SoftmaxEpsilonRule",
    "Stabilizer",
    "StopRule",
    "TypeMapper",
    "UniformEpsilonRule",
    "UniformRule",
    "WSquareRule",
    "ZBoxRule",
    "ZPlusRule",
    "relevance",
]
