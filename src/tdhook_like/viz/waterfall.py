"""One decision, added up: from the bias over each contribution to the score."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tdhook_like.errors import InputError
from tdhook_like.viz.figure import (
    FAINT,
    INK,
    NEGATIVE,
    NEUTRAL,
    POSITIVE,
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

__all__ = ["waterfall"]

# What is missing to the total is rounding below this part of the largest contribution, or below
# this part of the score, which float32 cannot tell apart.
_ROUNDING = 1e-3
_FLOAT32 = 1e-6
# Under a number, so that no line runs through it.
_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}


@dataclass(frozen=True)
class _Step:
    """One bar: from ``start`` to ``end``."""

    label: str
    start: float
    end: float
    colour: str
    hatch: str | None = None

    @property
    def change(self) -> float:
        return self.end - self.start


def waterfall(
    contributions: Mapping[Any, float],
    *,
    total: float,
    target: str,
    bias: float | None = None,
    max_bars: int = 10,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Bars that add up to the score of one decision, the largest contribution first.

    Red raises the score, blue lowers it. What the contributions and the bias leave open to the
    total is drawn as a hatched bar, never hidden.

    Args:
        contributions: relevance of each feature or key for one element.
        total: the score that is explained.
        target: what is explained, for the title.
        bias: what the score is without any contribution: the score at the baseline, or the
            relevance that biases took. Drawn first, from 0.
        max_bars: draw that many contributions and the sum of all others.
        path: where to save the picture.

    Raises:
        InputError: nothing to draw, NaN, or ``max_bars`` below 1; names the contribution.

    Example:
        >>> from tdhook_like.viz import waterfall
        >>> figure = waterfall({"pole": 3.0, "cart": -1.0}, total=2.5, target="state_value",
        ...                    bias=0.5)
        >>> [(float(bar.get_x()), float(bar.get_width())) for bar in figure.axes[0].patches]
        [(0.0, 0.5), (0.5, 3.0), (3.5, -1.0)]
    """
    refuse_empty(contributions, "contributions")
    if max_bars < 1:
        raise InputError(f"max_bars={max_bars!r} must be at least 1.")
    parts = {key: _number(value, key) for key, value in contributions.items()}
    score = _number(total, "total")
    start = None if bias is None else _number(bias, "bias")
    steps, remark = _steps(parts, score, start, max_bars)
    figure = new_figure(9, 1.75 + 0.36 * len(steps), f"Why {target} = {number(score, '.4g')}")
    axes = figure.subplots()
    axis_remark = _set_limits(axes, steps if start is None else steps[1:], score)
    _draw_steps(axes, steps)
    _draw_total(axes, score, len(steps))
    axes.set_title(plain(f"{axis_remark}; {remark}"), loc="left", fontsize=9, color=FAINT)
    axes.set_xlabel(plain(f"{target}      (red raises it, blue lowers it)"), fontsize=10, color=INK)
    return saved(figure, path)


def _number(value: object, name: object) -> float:
    array = finite_array(value, name)
    if array.size != 1:
        raise InputError(
            f"{name!r} has the shape {tuple(array.shape)}, but one decision is drawn: pass one "
            f"number, such as the sum over the features of one batch element."
        )
    return float(array.item())


def _steps(
    parts: Mapping[Any, float], total: float, bias: float | None, max_bars: int
) -> tuple[list[_Step], str]:
    """The bars in the order of drawing, and a remark on how they add up."""
    ordered = sorted(parts.items(), key=lambda item: -abs(item[1]))
    # A single leftover takes no more room than "1 other" would.
    cut = max_bars if len(ordered) > max_bars + 1 else len(ordered)
    shown = [(key_label(key), value) for key, value in ordered[:cut]]
    if ordered[cut:]:
        shown.append((f"{len(ordered) - cut} others", sum(value for _, value in ordered[cut:])))
    steps = [] if bias is None else [_Step("bias", 0.0, bias, NEUTRAL)]
    level = 0.0 if bias is None else bias
    for label, value in shown:
        steps.append(_Step(label, level, level + value, POSITIVE if value >= 0 else NEGATIVE))
        level += value
    gap = total - level
    largest = abs(ordered[0][1])
    if abs(gap) <= max(_ROUNDING * largest, _FLOAT32 * abs(total)):
        within = f" within {abs(gap):.1g}" if gap else ""
        return steps, f"the bars add up to the score{within}"
    label = "bias or gap" if bias is None else "gap"
    steps.append(_Step(label, level, total, "#ffffff", "////"))
    return steps, f"{number(gap, '+.3g')} of the score is not attributed (hatched)"


def _set_limits(axes: Axes, body: list[_Step], total: float) -> str:
    """Limits with room for the numbers; cuts a bias bar that would dwarf the rest, and says so."""
    ends = [total, *(step.start for step in body), *(step.end for step in body)]
    low, high = min(ends), max(ends)
    span = high - low
    if span > 0 and low > 2 * span:
        low = low - 0.26 * span
        axes.set_xlim(low, high + 0.13 * span)
        return f"axis clips at {number(low, '.4g')}: the first bar reaches on to 0"
    if span > 0 and high < -2 * span:
        high = high + 0.26 * span
        axes.set_xlim(low - 0.13 * span, high)
        return f"axis clips at {number(high, '.4g')}: the first bar reaches on to 0"
    low, high = min(low, 0.0), max(high, 0.0)
    room = 0.13 * (high - low) or 1.0
    # Zero needs no room for numbers where nothing lies beyond it.
    axes.set_xlim(
        low - room if low < 0 or low == high else low,
        high + room if high > 0 or low == high else high,
    )
    return "axis from 0, nothing is clipped"


def _draw_steps(axes: Axes, steps: list[_Step]) -> None:
    left, right = axes.get_xlim()
    for row, step in enumerate(steps):
        axes.barh(
            row,
            step.change,
            0.66,
            left=step.start,
            color=step.colour,
            hatch=step.hatch,
            edgecolor=FAINT if step.hatch else step.colour,
            linewidth=0.8,
        )
        if row + 1 < len(steps):
            axes.plot([step.end] * 2, [row - 0.33, row + 1.33], color=FAINT, lw=0.8, zorder=0)
        positive = step.change >= 0
        end = min(max(step.end, left), right)
        axes.annotate(
            number(step.change, "+.3g"),
            (end, row),
            (5 if positive else -5, 0),
            textcoords="offset points",
            va="center",
            ha="left" if positive else "right",
            fontsize=9.5,
            color=INK,
            bbox=_PAPER,
        )
        _mark_clipped(axes, row, step)
    axes.set_yticks(range(len(steps)), [step.label for step in steps])
    axes.set_ylim(len(steps) + 0.15, -0.7)
    bare(axes, "bottom")
    axes.tick_params(axis="y", length=0, labelsize=10.5)
    axes.grid(axis="x", color="#ececec", lw=0.8)
    axes.set_axisbelow(True)


def _mark_clipped(axes: Axes, row: int, step: _Step) -> None:
    """Two white strokes through a bar that goes on outside."""
    left, right = axes.get_xlim()
    for edge, sign in ((left, 1), (right, -1)):
        if min(step.start, step.end) < edge < max(step.start, step.end):
            for gap in (0.020, 0.032):
                x, slant = edge + sign * gap * (right - left), 0.006 * (right - left)
                axes.plot([x - slant, x + slant], [row + 0.4, row - 0.4], color="white", lw=2.5)


def _draw_total(axes: Axes, total: float, rows: int) -> None:
    """A line at the score, named below the last bar."""
    axes.axvline(total, color=INK, lw=1.3, ls=(0, (4, 2)), zorder=0.5)
    left, right = axes.get_xlim()
    if left < 0 < right:
        axes.axvline(0, color=FAINT, lw=0.8, zorder=0)
    right_half = total > (left + right) / 2
    axes.annotate(
        f"score {number(total, '.4g')}",
        (total, rows),
        (-5 if right_half else 5, 0),
        textcoords="offset points",
        ha="right" if right_half else "left",
        va="bottom",
        fontsize=10,
        fontweight="bold",
        color=INK,
        bbox=_PAPER,
    )
