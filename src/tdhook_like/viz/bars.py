"""Which key carries the relevance: bars per key and method, beside what is known to be true."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.ticker import FuncFormatter, MaxNLocator
from tensordict import NestedKey

from tdhook_like.errors import InputError, listed
from tdhook_like.metrics import KeyShares, KeySummary
from tdhook_like.viz.figure import (
    FAINT,
    INK,
    NEUTRAL,
    QUALITATIVE,
    Axes,
    Figure,
    bare,
    finite_array,
    key_label,
    new_figure,
    number,
    plain,
    refuse_empty,
    saved,
)

__all__ = ["key_bars"]

_GROUP = 0.8


def key_bars(
    shares_by_method: Mapping[str, KeyShares],
    *,
    target: str,
    truth: Mapping[Any, float] | None = None,
    truth_label: str = "ground truth",
    signed: bool = True,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Bars of each key's share of relevance, one colour per method, with bootstrap intervals.

    The first panel shows shares of absolute relevance. The second shows the signed relevance in
    the same unit, the mean of all absolute relevance: the shorter its bar against the first, the
    more do positive and negative relevance of that key cancel. The last shows the truth.

    Args:
        shares_by_method: what :func:`~tdhook_like.metrics.key_shares` found, per method.
        target: what is explained, for the title.
        truth: per key, how much the key is known to matter, such as the drop in return when its
            values are permuted. Keys are sorted by it, else by their mean share.
        truth_label: what the truth is and its unit.
        signed: whether to draw the panel of signed relevance.
        path: where to save the picture.

    Returns:
        The figure; its axes are the panels in that order.

    Raises:
        InputError: nothing to draw, NaN, or methods and truth that differ in their keys.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tdhook_like.metrics import key_shares
        >>> from tdhook_like.viz import key_bars
        >>> td = TensorDict({"attr": {"pole": torch.ones(8, 2), "cart": -torch.ones(8, 1)}}, [8])
        >>> figure = key_bars({"LRP": key_shares(td)}, target="state_value")
        >>> [round(float(bar.get_width()), 2) for bar in figure.axes[0].patches]
        [0.67, 0.33]
    """
    keys = _ordered_keys(shares_by_method, truth)
    panels = 1 + signed + (truth is not None)
    widths = [1.5] + [1.25] * signed + [1.0] * (truth is not None)
    row = 0.30 + 0.20 * len(shares_by_method)
    figure = new_figure(
        3.2 + 2.9 * panels, 1.9 + row * len(keys), f"Which keys does {target} rest on?"
    )
    grid = figure.subplots(1, panels, sharey=True, squeeze=False, width_ratios=widths)
    axes = list(grid[0])
    _draw_shares(axes[0], shares_by_method, keys)
    if signed:
        _draw_signed(axes[1], shares_by_method, keys)
    if truth is not None:
        _draw_truth(axes[-1], [float(truth[key]) for key in keys], truth_label)
    axes[0].set_yticks(range(len(keys)), [key_label(key) for key in keys], fontsize=11)
    axes[0].set_ylim(len(keys) - 0.45, -0.55)
    for panel in axes:
        panel.tick_params(axis="y", length=0, labelsize=11)
        panel.set_axisbelow(True)
    handles: Any = axes[0].containers
    # A letter is about 0.09 inches wide, the coloured patch before a name 0.7.
    room = figure.get_figwidth() / (0.7 + 0.09 * max(map(len, shares_by_method)))
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=min(len(shares_by_method), max(1, int(room))),
        frameon=False,
        fontsize=10,
    )
    return saved(figure, path)


def _ordered_keys(
    shares_by_method: Mapping[str, KeyShares], truth: Mapping[Any, float] | None
) -> list[NestedKey]:
    """The keys that all methods and the truth have, the most important first."""
    refuse_empty(shares_by_method, "shares_by_method")
    first = next(iter(shares_by_method))
    keys = shares_by_method[first].keys
    for method, shares in shares_by_method.items():
        odd = set(shares.keys).symmetric_difference(keys)
        if odd:
            raise InputError(f"{method!r} and {first!r} differ in their keys: {listed(odd)}.")
        for key, summary in shares.summary.items():
            finite_array([summary.share, summary.relevance], (method, key))
    if truth is None:
        return sorted(keys, key=lambda key: -sum(_shares_of(shares_by_method, key)))
    odd = set(truth).symmetric_difference(keys)
    if odd:
        raise InputError(f"truth and {first!r} differ in their keys: {listed(odd)}.")
    for key in keys:
        finite_array(truth[key], ("truth", key))
    return sorted(keys, key=lambda key: -float(truth[key]))


def _shares_of(shares_by_method: Mapping[str, KeyShares], key: NestedKey) -> list[float]:
    return [shares.summary[key].share for shares in shares_by_method.values()]


def _draw_shares(
    axes: Axes, shares_by_method: Mapping[str, KeyShares], keys: Sequence[NestedKey]
) -> None:
    """Shares of absolute relevance, from 0."""
    furthest = 0.0
    for place, (method, shares) in enumerate(shares_by_method.items()):
        colour = _colour(place, len(shares_by_method))
        ends = _draw_group(
            axes,
            place,
            len(shares_by_method),
            [shares.summary[key].share for key in keys],
            [shares.summary[key].share_interval for key in keys],
            colour,
            plain(method),
        )
        furthest = max(furthest, *ends)
    # Room for the numbers; a share never lies beyond 100 %.
    axes.set_xlim(0, furthest * 1.18 or 1)
    axes.set_xlabel("share of absolute relevance", fontsize=10, color=INK)
    any_shares = next(iter(shares_by_method.values()))
    axes.set_title(
        f"mean over states ({any_shares.n_elements:,}), {100 * any_shares.confidence:g} % "
        f"bootstrap interval",
        loc="left",
        fontsize=9,
        color=FAINT,
    )
    _finish(axes)


def _draw_signed(
    axes: Axes, shares_by_method: Mapping[str, KeyShares], keys: Sequence[NestedKey]
) -> None:
    """Signed relevance in units of all absolute relevance, on an axis symmetric about 0."""
    furthest = 0.0
    for place, shares in enumerate(shares_by_method.values()):
        unit = sum(summary.absolute for summary in shares.summary.values()) or 1.0
        colour = _colour(place, len(shares_by_method))
        scaled = [_in_units(shares.summary[key], unit) for key in keys]
        ends = _draw_group(
            axes,
            place,
            len(shares_by_method),
            [mean for mean, _ in scaled],
            [bounds for _, bounds in scaled],
            colour,
        )
        furthest = max(furthest, *map(abs, ends))
    limit = furthest * 1.35 or 1.0
    axes.set_xlim(-limit, limit)
    axes.axvline(0, color=INK, lw=0.9)
    axes.set_xlabel("← lowers      signed relevance      raises →", fontsize=10, color=INK)
    axes.set_title(
        f"same unit, axis ±{100 * limit:.0f} %, nothing is clipped",
        loc="left",
        fontsize=9,
        color=FAINT,
    )
    _finish(axes)


def _in_units(summary: KeySummary, unit: float) -> tuple[float, tuple[float, float]]:
    low, high = summary.relevance_interval
    return summary.relevance / unit, (low / unit, high / unit)


def _draw_group(
    axes: Axes,
    place: int,
    of: int,
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    colour: Any,
    label: str | None = None,
) -> list[float]:
    """The bars of one method, with whiskers and numbers; returns how far they reach."""
    height = _GROUP / of
    places = [i + (place - (of - 1) / 2) * height for i in range(len(values))]
    axes.barh(places, values, height * 0.86, color=colour, label=label)
    ends = []
    for at, value, (low, high) in zip(places, values, intervals, strict=True):
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [at, at], color=INK, lw=1.1, solid_capstyle="butt")
            axes.plot([low, high], [at, at], "|", color=INK, ms=4.5, mew=1.1)
        else:
            low = high = value
        end = max(high, value, 0.0) if value >= 0 else min(low, value)
        axes.annotate(
            f"{number(100 * value, '.1f')} %",
            (end, at),
            (5 if value >= 0 else -5, 0),
            textcoords="offset points",
            va="center",
            ha="left" if value >= 0 else "right",
            fontsize=8.5,
            color=INK,
        )
        ends += [min(low, value), max(high, value)]
    return ends


def _draw_truth(axes: Axes, values: Sequence[float], label: str) -> None:
    """What is known, in its own unit."""
    axes.barh(range(len(values)), values, 0.5, color=NEUTRAL)
    for at, value in enumerate(values):
        axes.annotate(
            number(value, ".4g"),
            (value, at),
            (5 if value >= 0 else -5, 0),
            textcoords="offset points",
            va="center",
            ha="left" if value >= 0 else "right",
            fontsize=8.5,
            color=INK,
        )
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.22 * (high - low) or 1.0
    axes.set_xlim(low - (room if low < 0 else 0), high + (room if high > 0 or low == 0 else 0))
    axes.axvline(0, color=INK, lw=0.9)
    axes.set_xlabel(plain(label), fontsize=10, color=INK)
    axes.set_title("ground truth", loc="left", fontsize=9, color=FAINT)
    bare(axes, "bottom")
    axes.grid(axis="x", color="#e6e6e6", lw=0.8)


def _finish(axes: Axes) -> None:
    bare(axes, "bottom")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_percent))
    axes.grid(axis="x", color="#e6e6e6", lw=0.8)


def _percent(share: float, _: int | None = None) -> str:
    return f"{number(100 * share)} %"


def _colour(place: int, of: int) -> Any:
    """A colour for a method; a longer map where there are many."""
    if of <= len(QUALITATIVE):
        return QUALITATIVE[place]
    return matplotlib.colormaps["turbo"]((place + 0.5) / of)
