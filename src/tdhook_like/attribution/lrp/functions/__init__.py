"""Rules of functions: what a model computes without a module."""

from tdhook_like.attribution.lrp.functions.lookup import (
    FunctionRules,
)
from tdhook_like.attribution.lrp.functions.operations import (
    FunctionRule,
)

__all__ = [
    "FunctionRule",
    "FunctionRules",
]
