"""Methods, rules and mappers that claims about torchrl's modules are tried with."""

from __future__ import annotations

import pytest
from torch import nn

from tdhook_like import Saliency
from tdhook_like.attribution.lrp import (
    AlphaBetaRule,
    FlatRule,
    GammaRule,
    Rule,
    RuleMapper,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)

WEIGHT_RULES = [
    ZPlusRule(),
    GammaRule(),
    AlphaBetaRule(),
    FlatRule(),
    WSquareRule(),
    ZBoxRule(-3.0, 3.0),
]
every_weight_rule = pytest.mark.parametrize(
    "rule", WEIGHT_RULES, ids=lambda rule: type(rule).__name__
)


def signed(target: object = None) -> Saliency:
    """The gradient as it is."""
    return Saliency(target, abs=False)  # pyright: ignore[reportArgumentType]


def only_linear(rule: Rule) -> RuleMapper:
    return lambda path, module: rule if isinstance(module, nn.Linear) else None
