"""Pictures of attributions: which key, which feature, which moment.

Every picture names the target that it explains, gives the same length or saturation to the same
amount of positive and negative relevance, and says where its scale clips. Functions return a
``matplotlib.figure.Figure`` and save it where ``path=`` says; they use no global figure state, so
no display is needed and threads may draw at the same time.

Needs matplotlib: ``pip install tdhook_like[viz]``.
"""

from __future__ import annotations

# First of all, so that a missing matplotlib is reported in words.
from tdhook_like.viz.availability import MissingMatplotlibError
from tdhook_like.viz.bars import key_bars
from tdhook_like.viz.heatmap import episode_heatmap
from tdhook_like.viz.ledger import ledger_bars
from tdhook_like.viz.scale import SymmetricScale, symmetric_scale
from tdhook_like.viz.waterfall import waterfall

__all__ = [
    "MissingMatplotlibError",
    "SymmetricScale",
    "episode_heatmap",
    "key_bars",
    "ledger_bars",
    "symmetric_scale",
    "waterfall",
]
