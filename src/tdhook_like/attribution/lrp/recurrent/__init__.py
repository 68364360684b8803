"""Rules of recurrent modules: which part of a gated product is the signal."""

from tdhook_like.attribution.lrp.recurrent.rules import (
    HalfRule,
    ProportionalRule,
    SignalTakesAllRule,
)

__all__ = [
    "HalfRule",
    "ProportionalRule",
    "SignalTakesAllRule",
]
