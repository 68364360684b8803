"""The look that all pictures share, and the checks of what they draw."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensordict import NestedKey

from tdhook_like.errors import InputError

__all__ = [
    "Axes",
    "Figure",
    "bare",
    "finite_array",
    "key_label",
    "new_figure",
    "number",
    "plain",
    "refuse_empty",
    "saved",
]

# Ends of the diverging map RdBu_r, so that bars and heat maps speak the same language.
POSITIVE = "#b2182b"
NEGATIVE = "#2166ac"
DIVERGING = "RdBu_r"
NEUTRAL = "#8c8c8c"
INK = "#222222"
FAINT = "#6e6e6e"
# Okabe & Ito's colours, told apart by colour-blind readers; those next to the diverging pair last.
QUALITATIVE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#4D4D4D",
)

_DPI = 160


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of that many inches, with its title at the upper left."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    # Without a canvas of its own, a figure cannot be drawn until it is saved.
    FigureCanvasAgg(figure)
    engine: Any = figure.get_layout_engine()
    # The rectangle leaves room for the title, whose place is fixed rather than laid out.
    engine.set(w_pad=0.08, h_pad=0.05, rect=(0, 0, 1, 1 - 0.34 / height))
    # A bold letter is about 0.65 of its size wide: long targets get smaller letters.
    size = min(13.0, 72 * (width - 0.3) / (0.65 * len(title)))
    figure.suptitle(
        plain(title),
        x=0.012,
        y=1 - 0.07 / height,
        va="top",
        ha="left",
        fontsize=size,
        fontweight="bold",
        color=INK,
    )
    return figure


def saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, written to ``path`` if there is one; PNG unless the suffix says otherwise."""
    if path is not None:
        form = None if Path(path).suffix else "png"
        figure.savefig(path, dpi=_DPI, format=form)
    return figure


def bare(axes: Axes, *keep: str) -> None:
    """Take away the frame of ``axes``, but for the named sides."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, length=3, color=FAINT)


def number(value: float, form: str = ".3g") -> str:
    """A number as one reads it: a true minus sign, no minus zero, powers of ten when needed.

    >>> number(-0.5, "+.2f"), number(-0.001, ".1f"), number(123456.7), number(1.5e9)
    ('−0.50', '0.0', '123,457', '1.5e+09')
    """
    text = f"{value:{form}}"
    if "e+" in text and abs(value) < 1e7:
        text = f"{value:{'+' if form.startswith('+') else ''},.0f}"
    if text[0] in "+-" and not text.strip("+-0.,"):
        text = text[1:]
    return text.replace("-", "−")


def plain(text: object) -> str:
    r"""Text in which matplotlib finds no formulas and no line breaks.

    >>> print(plain("cash in $"))
    cash in \$
    """
    return " ".join(str(text).split("\n")).replace("$", r"\$")


def key_label(key: NestedKey) -> str:
    """A key as it is written in pictures.

    >>> key_label(("agents", "observation"))
    'agents.observation'
    """
    return plain(key if isinstance(key, str) else ".".join(map(key_label, key)))


def finite_array(values: Any, name: object) -> np.ndarray:
    """A tensor, array or number as float64, or an error that names it."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name!r} cannot be drawn: {values!r} is not numeric.") from error
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise InputError(
            f"{name!r} cannot be drawn: {bad} of its {array.size} values are NaN or infinite."
        )
    return array


def refuse_empty(given: Mapping[Any, Any], name: str) -> None:
    """An error where there is nothing to draw."""
    if not given:
        raise InputError(f"{name} is empty: there is nothing to draw.")
