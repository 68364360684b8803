"""Draws the pictures of docs/gallery.md from what the blocks on that page compute.

``python docs/make_gallery.py [FOLDER]`` runs the page and writes one picture per sheet of panels into
the folder, ``docs/gallery`` by default. The page is the one source of what is shown: a panel that is
added to one of its blocks is in its picture the next time.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdhook_like.viz.figure import (
    DIVERGING,
    FAINT,
    INK,
    Axes,
    Figure,
    finite_array,
    new_figure,
    number,
    plain,
)
from tdhook_like.viz.scale import symmetric_scale

PAGE = Path(__file__).with_name("gallery.md")
BLOCK = re.compile(r"^```python *\n(.*?)^```", re.MULTILINE | re.DOTALL)
COLUMNS = (5, 6)
PANEL = 1.95  # inches
DPI = 110
GRADIENTS = ("gradients", "methods")

Panels = Mapping[str, tuple[Any, Tensor]]


def computed(page: Path = PAGE) -> dict[str, Any]:
    """What the page's blocks define: ``panels``, the ``image``, the ``score`` and the net."""
    module = types.ModuleType("gallery")
    sys.modules[module.__name__] = module  # classes of the page are looked up there
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for block in BLOCK.findall(page.read_text(encoding="utf-8")):
                exec(compile(block, str(page), "exec", dont_inherit=True), vars(module))
    finally:
        del sys.modules[module.__name__]
    return vars(module)


def picture(name: str, panels: Panels, image: Tensor, score: float) -> Figure:
    """One sheet: the image, then a panel for each mapper, every one on its own symmetric scale.

    Args:
        name: Of the sheet.
        panels: By title, the mapper (or method) and its relevance [height, width].
        image: [height, width], between 0 and 1.
        score: What is explained.
    """
    count = len(panels) + 1
    columns = min(COLUMNS, key=lambda columns: -(-count // columns))
    rows = -(-count // columns)
    what = "Gradient or relevance" if name in GRADIENTS else "Relevance"
    figure = new_figure(
        columns * PANEL,
        rows * (PANEL + 0.42) + 0.4,
        f"{what} for the logit of “cross”, {number(score, '+.3g')}: red raises it, blue lowers it",
    )
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    first, *rest = places
    _drawn(first, image, "the image", "white 0, black 1", "gray_r", (0.0, 1.0))
    for axes, (title, (_, relevance)) in zip(rest, panels.items(), strict=False):
        scale = symmetric_scale(relevance)
        beyond = round(scale.beyond * relevance.numel())
        note = (
            f"sum {number(relevance.sum().item(), '+.3g')}\nends at ±{number(scale.limit, '.2g')}"
        )
        note += f", {beyond} beyond" if scale.clips else ""
        _drawn(axes, relevance, title, note, DIVERGING, (-scale.limit, scale.limit))
    for axes in places[count:]:
        axes.set_visible(False)
    return figure


def _drawn(
    axes: Axes, values: Tensor, title: str, note: str, cmap: str, limits: tuple[float, float]
) -> None:
    axes.imshow(finite_array(values, title), cmap=cmap, vmin=limits[0], vmax=limits[1])
    axes.set_title(plain(title), fontsize=7.6, color=INK)
    axes.set_xlabel(note, fontsize=7.2, color=FAINT)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(FAINT)
        spine.set_linewidth(0.5)


def titles(panels: Panels) -> str:
    """What a picture's file says of itself: the titles of its panels."""
    return "; ".join(panels)


def written(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes what the page computed as one picture per sheet; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, panels in found["panels"].items():
        figure = picture(name, panels, found["image"][0, 0], found["score"])
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI, metadata={"Description": titles(panels)})
    return paths


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE.with_suffix("")
    for path in written(computed(), target):
        print(f"{path}  {path.stat().st_size / 1024:.0f} kB")
