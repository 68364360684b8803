"""One episode at a glance: which feature mattered when, above what the agent did."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from tensordict import NestedKey
from torch import Tensor

from tdhook_like.errors import InputError, listed
from tdhook_like.viz.actions import draw_actions, drawable_actions, strip_rows
from tdhook_like.viz.figure import (
    DIVERGING,
    FAINT,
    INK,
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
from tdhook_like.viz.scale import SymmetricScale, symmetric_scale

__all__ = ["episode_heatmap"]

_ROW = 0.27
_LEAST_HEIGHT = 1.1
_MOST_ROWS = 200
# A step needs about a pixel: long episodes get wider pictures, up to this many steps.
_STEPS_PER_INCH = 110
_MOST_STEPS = 2600


def episode_heatmap(
    attributions: Mapping[Any, Tensor],
    actions: Tensor,
    *,
    target: str,
    feature_names: Mapping[Any, Sequence[str]] | None = None,
    action_names: Sequence[str] | None = None,
    clip: float | None = None,
    percentile: float = 99.0,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Feature × time heat map of one episode, one band per key, with the actions below.

    Red raises the target, blue lowers it, white does neither. Beside each key stands its share of
    the episode's absolute relevance.

    Args:
        attributions: per key, relevance of shape [T, F] (or [T] for a single feature).
        actions: what was done at each step: integers [T] or one-hot rows [T, A] are drawn as
            coloured cells, floating actions [T] or [T, A] as lines.
        target: what is explained, for the title.
        feature_names: per key, a name for each of its features; numbers by default.
        action_names: names of the actions 0, 1, …
        clip: where the colour scale ends, at ±clip; otherwise ``percentile`` of |R| decides.
        percentile: see :func:`~tdhook_like.viz.scale.symmetric_scale`.
        path: where to save the picture.

    Returns:
        The figure, with one axes per key, one for the actions and one for the colour bar.

    Raises:
        InputError: nothing to draw, NaN, or lengths that do not match; names the key.

    Example:
        >>> import torch
        >>> from tdhook_like.viz import episode_heatmap
        >>> figure = episode_heatmap({"pole": torch.randn(50, 2)}, torch.arange(50) % 2,
        ...                          target="state_value")
        >>> figure.get_suptitle()
        'Relevance for state_value over one episode of 50 steps'
    """
    refuse_empty(attributions, "attributions")
    rows = {key: _features_by_time(values, key) for key, values in attributions.items()}
    steps = next(iter(rows.values())).shape[1]
    _check_lengths(rows, steps)
    names = _feature_names(rows, feature_names)
    done = drawable_actions(actions, steps)
    scale = symmetric_scale(
        np.concatenate([band.ravel() for band in rows.values()]),
        clip=clip,
        percentile=percentile,
    )
    # Few rows get taller, so that the colour bar keeps its length.
    row = max(_ROW, _LEAST_HEIGHT / sum(map(len, rows.values())))
    heights = [len(band) * row for band in rows.values()]
    heights.append(_ROW * strip_rows(done, action_names))
    figure = new_figure(
        max(10.0, min(steps, _MOST_STEPS) / _STEPS_PER_INCH),
        sum(heights) + 1.75,
        f"Relevance for {target} over one episode of {steps} steps",
    )
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    *bands, strip = grid[:, 0]
    _draw_bands(bands, rows, names, scale)
    draw_actions(figure, strip, done, action_names)
    crowded = "" if steps <= _MOST_STEPS else "; neighbouring steps are averaged"
    bands[0].set_title(plain(scale.note() + crowded), loc="left", fontsize=9, color=FAINT)
    _draw_colour_bar(figure, bands, scale)
    figure.align_ylabels(list(grid[:, 0]))
    engine: Any = figure.get_layout_engine()
    engine.set(hspace=0, h_pad=0.025)
    return saved(figure, path)


def _features_by_time(values: Any, key: NestedKey) -> np.ndarray:
    """Relevance [T, F] or [T] as rows [F, T]."""
    array = finite_array(values, key)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size:
        raise InputError(
            f"{key!r} has the shape {tuple(array.shape)}, but [time, features] is drawn: pick one "
            f"episode, and sum or flatten what comes after its time dimension."
        )
    return array.T


def _check_lengths(rows: Mapping[Any, np.ndarray], steps: int) -> None:
    for key, band in rows.items():
        if band.shape[1] != steps:
            raise InputError(
                f"{key!r} has {band.shape[1]} time steps, but the first key has {steps}."
            )
    total = sum(map(len, rows.values()))
    if total > _MOST_ROWS:
        largest = max(rows, key=lambda key: len(rows[key]))
        raise InputError(
            f"{total} rows cannot be told apart (at most {_MOST_ROWS}); most are of {largest!r}: "
            f"sum it over features that belong together."
        )


def _feature_names(
    rows: Mapping[Any, np.ndarray],
    given: Mapping[Any, Sequence[str]] | None,
) -> dict[NestedKey, list[str]]:
    """A name for every row; numbers where none are given."""
    given = {} if given is None else given
    for key in given:
        if key not in rows:
            raise InputError(f"feature_names has {key!r}, but drawn are {listed(rows)}.")
    names = {}
    for key, band in rows.items():
        default = [str(i) for i in range(len(band))] if len(band) > 1 else [""]
        names[key] = [plain(name) for name in given.get(key, default)]
        if len(names[key]) != len(band):
            raise InputError(
                f"feature_names[{key!r}] has {len(names[key])} names for {len(band)} features."
            )
    return names


def _draw_bands(
    bands: Sequence[Axes],
    rows: Mapping[Any, np.ndarray],
    names: Mapping[Any, Sequence[str]],
    scale: SymmetricScale,
) -> None:
    """One image per key, all on the same scale."""
    whole = sum(float(np.abs(band).sum()) for band in rows.values())
    for axes, (key, band) in zip(bands, rows.items(), strict=True):
        axes.imshow(
            band,
            aspect="auto",
            cmap=DIVERGING,
            vmin=-scale.limit,
            vmax=scale.limit,
            interpolation="nearest" if band.shape[1] <= _MOST_STEPS else "auto",
        )
        bare(axes, "left", "right", "top", "bottom")
        axes.tick_params(bottom=False, labelbottom=False)
        axes.set_yticks([row for row, name in enumerate(names[key]) if name])
        axes.set_yticklabels([name for name in names[key] if name])
        share = float(np.abs(band).sum()) / whole if whole else 0.0
        axes.set_ylabel(
            f"{key_label(key)}  {100 * share:.0f} %",
            rotation=0,
            ha="right",
            va="center",
            fontsize=10.5,
            fontweight="bold",
            color=INK,
        )


def _draw_colour_bar(figure: Figure, bands: Sequence[Axes], scale: SymmetricScale) -> None:
    norm = Normalize(-scale.limit, scale.limit)
    bar = figure.colorbar(
        ScalarMappable(norm, DIVERGING),
        ax=list(bands),
        pad=0.012,
        fraction=0.025,
        aspect=14,
        extend="both" if scale.clips else "neither",
        ticks=[-scale.limit, 0, scale.limit],
    )
    bar.ax.set_yticklabels(
        [number(-scale.limit, ".2g"), "0", number(scale.limit, "+.2g")], fontsize=9
    )
    bar.set_label("relevance R", fontsize=9.5, color=INK, labelpad=-8)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
