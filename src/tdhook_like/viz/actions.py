"""The strip below an episode: what the agent did at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from tdhook_like.errors import InputError
from tdhook_like.viz.figure import INK, QUALITATIVE, Axes, Figure, bare, finite_array, plain

__all__ = ["draw_actions", "drawable_actions", "strip_rows"]

# Not red and blue, which mean relevance beside this strip.
_COLOURS = ("#E69F00", "#009E73", "#4D4D4D", "#CC79A7", "#F0E442", "#999999")


def drawable_actions(actions: Any, steps: int) -> np.ndarray:
    """Actions to draw as cells, as integers [T]; those to draw as lines, as [T, A].

    Raises:
        InputError: NaN, or not one action for each of the steps.

    >>> drawable_actions(torch.tensor([[0, 1], [1, 0], [0, 1]]), 3)
    array([1, 0, 1])
    """
    array = finite_array(actions, "actions")
    if array.ndim not in (1, 2) or len(array) != steps or not array.size:
        raise InputError(
            f"'actions' has the shape {tuple(array.shape)}, but one action for each of {steps} "
            f"time steps is drawn: [T] or [T, A]."
        )
    discrete = not torch.as_tensor(actions).is_floating_point()
    if array.ndim == 2 and array.shape[1] > 1:
        if not ((array == 0) | (array == 1)).all() or not (array.sum(1) == 1).all():
            return array
        array, discrete = array.argmax(1), True
    # More actions than there are colours to tell apart become one line over their numbers.
    if discrete and len(np.unique(array)) <= len(_COLOURS):
        return array.reshape(steps).astype(int)
    return array.reshape(steps, 1)


def strip_rows(actions: np.ndarray, names: Sequence[str] | None) -> float:
    """How high the strip is, in rows of the heat map."""
    if actions.ndim == 1:
        return 1
    return max(3, 0.5 * len(names)) if names is not None and actions.shape[1] == 1 else 3


def draw_actions(
    figure: Figure, axes: Axes, actions: np.ndarray, names: Sequence[str] | None
) -> None:
    """Coloured cells for actions [T], lines for [T, A]; their legend below the figure."""
    bare(axes, "left", "right", "top", "bottom")
    axes.set_xlabel("time step", fontsize=10, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.set_ylabel(
        "action", rotation=0, ha="right", va="center", fontsize=10.5, fontweight="bold", color=INK
    )
    handles = (_cells if actions.ndim == 1 else _lines)(axes, actions, names)
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower right",
            ncols=min(len(handles), 8),
            frameon=False,
            fontsize=9,
            handlelength=1,
            handleheight=1,
            columnspacing=1.2,
        )


def _cells(axes: Axes, actions: np.ndarray, names: Sequence[str] | None) -> list[Any]:
    taken = np.unique(actions)
    colours = _COLOURS[: len(taken)]
    axes.imshow(
        np.searchsorted(taken, actions)[None],
        aspect="auto",
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=len(taken) - 0.5,
        interpolation="nearest",
    )
    axes.set_yticks([])
    labels = [_name(int(action), names) for action in taken]
    return [Patch(color=colour, label=label) for colour, label in zip(colours, labels, strict=True)]


def _lines(axes: Axes, actions: np.ndarray, names: Sequence[str] | None) -> list[Any]:
    cycle = [*_COLOURS, *QUALITATIVE]
    single = actions.shape[1] == 1
    handles = [
        axes.plot(
            line,
            drawstyle="steps-mid",
            lw=1.1,
            color=INK if single else cycle[place % len(cycle)],
            label=None if single else _name(place, names),
        )[0]
        for place, line in enumerate(actions.T)
    ]
    axes.margins(y=0.15)
    if single and names is not None:
        axes.set_yticks(range(len(names)), [plain(name) for name in names])
        axes.tick_params(axis="y", labelsize=7.5)
    return [] if single else handles


def _name(action: int, names: Sequence[str] | None) -> str:
    if names is None:
        return f"action {action}"
    if not 0 <= action < len(names):
        raise InputError(
            f"action_names has {len(names)} names, but there is an action {action} to be named."
        )
    return plain(names[action])
