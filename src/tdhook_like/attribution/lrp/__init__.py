"""Layer-wise relevance propagation: rules, mappers, and the plan of a model.

Import the method itself from ``tdhook_like``: ``from tdhook_like import LRP``.
"""

from tdhook_like.attribution.lrp.mappers import BaseRuleMapper, EpsilonPlus
from tdhook_like.attribution.lrp.modifiers import ParamModifier
from tdhook_like.attribution.lrp.plan import RulePlan
from tdhook_like.attribution.lrp.rule import Inputs, RemovableRuleHandle, Rule, RuleMapper
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
    "AHQKVRule",
    "AlphaBetaRule",
    "BaseRuleMapper",
    "EpsilonPlus",
    "EpsilonRule",
    "FlatRule",
    "GammaRule",
    "IgnoreRule",
    "Inputs",
    "LayerNormRule",
    "ModifiedRule",
    "ParamModifier",
    "PassRule",
    "PseudoIdentityRule",
    "RemovableRuleHandle",
    "Rule",
    "RuleMapper",
    "RulePlan",
    "SoftmaxEpsilonRule",
    "StopRule",
    "UniformEpsilonRule",
    "UniformRule",
    "WSquareRule",
    "ZBoxRule",
    "ZPlusRule",
]
