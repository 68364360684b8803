"""What the pictures are drawn of, and what is written in them."""

# Artists are read back through attributes that matplotlib's own types leave open.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from tdhook_like.metrics import key_shares

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text


def shares_of(seed: int, keys: Any = ("cart", "pole", ("agents", "noise"))):
    generator = torch.Generator().manual_seed(seed)
    leaves = {key: torch.randn(30, 2, generator=generator) + 0.3 * i for i, key in enumerate(keys)}
    return key_shares(TensorDict({"attr": TensorDict(leaves, [30])}, [30]))


def episode(steps: int = 40) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "cart": torch.randn(steps, 2, generator=generator),
        ("agents", "noise"): 0.1 * torch.randn(steps, 3, generator=generator),
    }


def words(figure: Figure) -> str:
    """Everything that is written in a figure."""
    figure.canvas.draw()
    found = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible())
    return "\n".join(artist.get_text() for artist in found if artist.get_text())


def overlapping(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts that are drawn over each other."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = []
    for axes in figure.axes:
        texts = [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        texts += [label for label in axes.get_yticklabels() if axes.yaxis.get_visible()]
        low, high = sorted(axes.get_xlim())
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=False)
        texts += [label for at, label in ticks if low <= at <= high]
        boxes += [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text()]
    for legend in figure.legends:
        boxes += [(t.get_text(), t.get_window_extent(renderer)) for t in legend.get_texts()]
    title = figure._suptitle
    boxes.append((title.get_text(), title.get_window_extent(renderer)))
    pairs = itertools.combinations(boxes, 2)
    return [(a, b) for (a, box), (b, other) in pairs if box.overlaps(other) and a != b]
