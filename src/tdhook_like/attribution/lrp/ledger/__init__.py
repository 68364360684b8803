"""Where relevance went: what is taken down of a run, and the account that it closes to."""

from tdhook_like.attribution.lrp.ledger.accounts import (
    Ledger,
    Row,
)
from tdhook_like.attribution.lrp.ledger.recorder import (
    Recorder,
)

__all__ = [
    "Ledger",
    "Recorder",
    "Row",
]
