"""Where relevance went: from the start, past all that was absorbed, to the inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.patches import Patch
from torch import Tensor

from tdhook_like.attribution.lrp.ledger.accounts import Ledger
from tdhook_like.errors import InputError
from tdhook_like.viz.figure import (
    FAINT,
    INK,
    NEUTRAL,
    QUALITATIVE,
    Axes,
    Figure,
    bare,
    finite_array,
    new_figure,
    number,
    plain,
    saved,
)

__all__ = ["ledger_bars"]

_COLOURS: dict[str, str] = dict(
    zip(
        ("bias", "stabiliser", "constant", "softmax", "rule", "no rule", "target", "stop"),
        QUALITATIVE,
        strict=True,
    )
)
_OTHER = "#b5b5b5"
# What is missing is rounding below this part of the largest bar; and smaller bars cannot be seen.
_ROUNDING = 1e-3
_LONGEST = 34
# Under a number, so that no line runs through it.
_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


@dataclass(frozen=True)
class _Step:
    """One bar, from ``start`` to ``end``."""

    label: str
    start: float
    end: float
    colour: str
    cause: str | None = None
    hatch: str | None = None


def ledger_bars(
    ledger: Ledger,
    *,
    target: str,
    element: int | Sequence[int] | None = None,
    column: int = 0,
    max_bars: int = 14,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Bars from the relevance that was started with down to what arrived at the inputs.

    One bar for each cause in each row of the ledger, from the model's output to its inputs, as long
    as what was absorbed there, in the cause's colour. What no row accounts for is hatched, never
    hidden.

    Args:
        ledger: what ``hooked.ledger`` holds after a call.
        target: what is explained, for the title.
        element: which batch element; the mean over all of them if None.
        column: which of several targets.
        max_bars: draw at most that many, the largest, and the sum of all others; bars too small to
            be seen are among these.
        path: where to save the picture.

    Raises:
        InputError: an element or column that does not exist, nothing to draw, NaN.

    Example:
        >>> import torch
        >>> from tdhook_like.attribution.lrp.ledger.accounts import Ledger, Row
        >>> from tdhook_like.viz import ledger_bars
        >>> one = torch.ones(2, 1)
        >>> row = Row("0", "Linear", "EpsilonRule()", one, 0.75 * one, {"bias": 0.25 * one})
        >>> figure = ledger_bars(Ledger([row], one, 0.75 * one), target="state_value")
        >>> [(float(bar.get_x()), float(bar.get_width())) for bar in figure.axes[0].patches]
        [(0.0, 1.0), (1.0, -0.25), (0.0, 0.75)]
    """
    if max_bars < 1:
        raise InputError(f"max_bars={max_bars!r} must be at least 1.")
    one = _Chosen(ledger, element, column)
    steps, remark = _steps(ledger, one, max_bars)
    title = f"Where the relevance of {target} went"
    figure = new_figure(9, 1.95 + 0.33 * len(steps), title)
    axes = figure.subplots()
    _draw(axes, steps)
    axes.set_title(plain(f"{one.what}; {remark}"), loc="left", fontsize=9, color=FAINT)
    axes.set_xlabel("relevance that is left      (to the left: taken, to the right: added)")
    axes.xaxis.label.set(fontsize=10, color=INK)
    causes = {step.cause: step.colour for step in steps if step.cause is not None}
    if causes:
        figure.legend(
            handles=[Patch(color=colour, label=plain(cause)) for cause, colour in causes.items()],
            loc="outside lower left",
            ncols=min(len(causes), 6),
            frameon=False,
            fontsize=9.5,
            labelcolor=INK,
            handlelength=1.1,
        )
    return saved(figure, path)


class _Chosen:
    """One number of each of a ledger's tensors ``[*B, T]``."""

    def __init__(self, ledger: Ledger, element: int | Sequence[int] | None, column: int) -> None:
        shape = tuple(ledger.start.shape)
        if not ledger.start.numel():
            raise InputError(f"The ledger's start has the shape {shape}: there is nothing to draw.")
        place = (
            () if element is None else (element,) if isinstance(element, int) else tuple(element)
        )
        try:
            if element is not None and len(place) != len(shape) - 1:
                raise IndexError
            ledger.start[(*place, ..., column)]
        except IndexError:
            raise InputError(
                f"element={element!r}, column={column!r} is none of a ledger of shape {shape} (batch "
                "dimensions, then targets)."
            ) from None
        self._place, self._column = place, column
        n = ledger.start[..., 0].numel()
        self.what = f"mean over {n} elements" if element is None else f"element {element}"
        if element is None and n == 1:
            self.what = "one element"

    def of(self, value: Tensor, name: str) -> float:
        """The number of ``value``."""
        array = finite_array(value.to(torch.float64)[(*self._place, ..., self._column)], name)
        return float(array.mean())


def _steps(ledger: Ledger, one: _Chosen, max_bars: int) -> tuple[list[_Step], str]:
    """The bars in the order of drawing, and a remark on how they add up."""
    start, arrived = one.of(ledger.start, "start"), one.of(ledger.arrived, "arrived")
    found = [
        (f"{_shown(row.where, row.kind)}", cause, one.of(value, row.where))
        for row in reversed(ledger.rows)
        for cause, value in row.absorbed.items()
    ]
    sizes = sorted((abs(value) for _, _, value in found), reverse=True)
    # A single leftover takes no more room than "1 other" would.
    least = sizes[max_bars] if len(sizes) > max_bars + 1 else 0.0
    least = max(least, _ROUNDING * max(abs(start), abs(arrived), *sizes, 0.0))
    kept = [item for item in found if abs(item[2]) > least]
    rest = [value for _, _, value in found if abs(value) <= least]
    steps, level = [_Step("start", 0.0, start, NEUTRAL)], start
    for label, cause, value in kept:
        steps.append(_Step(label, level, level - value, _COLOURS.get(cause, _OTHER), cause))
        level -= value
    if rest:
        others = f"{len(rest)} other{'s' * (len(rest) > 1)}"
        steps.append(_Step(others, level, level - sum(rest), _OTHER, "all others"))
        level -= sum(rest)
    gap = level - arrived
    largest = max(abs(step.end - step.start) for step in steps)
    remark = f"start = inputs + all bars within {abs(gap):.1g}" if gap else "the bars add up"
    if abs(gap) > _ROUNDING * largest:
        steps.append(_Step("gap", level, arrived, "#ffffff", "unaccounted for", "////"))
        remark = f"{number(gap, '+.3g')} is not accounted for (hatched)"
    steps.append(_Step("inputs", 0.0, arrived, INK))
    return steps, remark


def _shown(where: str, kind: str) -> str:
    """A row's name: ``add()`` of a function, ``encoder.0 (Linear)`` of a module, if there is room."""
    if kind == "target":
        return where
    if kind == "function":
        return f"{where}()"
    where = where or "(root)"
    shown = f"{where} ({kind})"
    if len(shown) <= _LONGEST:
        return shown
    return where if len(where) <= _LONGEST else f"…{where[1 - _LONGEST :]}"


def _draw(axes: Axes, steps: list[_Step]) -> None:
    ends = [end for step in steps for end in (step.start, step.end)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = 0.13 * (high - low) or 1.0
    axes.set_xlim(low - room, high + room)
    for row, step in enumerate(steps):
        axes.barh(
            row,
            step.end - step.start,
            0.64,
            left=step.start,
            color=step.colour,
            hatch=step.hatch,
            edgecolor=FAINT if step.hatch else step.colour,
            linewidth=0.8,
        )
        if row + 1 < len(steps):
            axes.plot([step.end] * 2, [row - 0.32, row + 1.32], color=FAINT, lw=0.8, zorder=0)
        right = step.end >= step.start
        change = step.end - step.start
        axes.annotate(
            number(change, ".3g" if step.cause is None else "+.3g"),
            (step.end, row),
            (5 if right else -5, 0),
            textcoords="offset points",
            va="center",
            ha="left" if right else "right",
            fontsize=9.5,
            fontweight="bold" if step.cause is None else "normal",
            color=INK,
            bbox=_PAPER,
        )
    axes.set_yticks(range(len(steps)), [plain(step.label) for step in steps])
    axes.set_ylim(len(steps) - 0.4, -0.6)
    bare(axes, "bottom")
    axes.axvline(0, color=FAINT, lw=0.8, zorder=0)
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.grid(axis="x", color="#ececec", lw=0.8)
    axes.set_axisbelow(True)
