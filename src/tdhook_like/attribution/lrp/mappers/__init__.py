"""Mappers: which module gets which rule, and why."""

from tdhook_like.attribution.lrp.mappers.by_type import (
    BaseRuleMapper,
    EpsilonPlus,
)
from tdhook_like.attribution.lrp.mappers.choosing import (
    LayeredMapper,
    Mapper,
)
from tdhook_like.attribution.lrp.mappers.composites import (
    CPLRP,
    AttnLRP,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlusFlat,
)
from tdhook_like.attribution.lrp.mappers.gradients import (
    BetaSmoothMapper,
    DeconvnetMapper,
    ExcitationMapper,
    GuidedBackpropMapper,
)
from tdhook_like.attribution.lrp.mappers.patterns import (
    FirstLayer,
    NameMapper,
    TypeMapper,
)
from tdhook_like.attribution.lrp.mappers.policies import (
    PolicyMapper,
)

__all__ = [
    "CPLRP",
    "AttnLRP",
    "BaseRuleMapper",
    "BetaSmoothMapper",
    "DeconvnetMapper",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "ExcitationMapper",
    "FirstLayer",
    "GuidedBackpropMapper",
    "LayeredMapper",
    "Mapper",
    "NameMapper",
    "PolicyMapper",
    "TypeMapper",
]
