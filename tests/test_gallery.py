"""The gallery shows every rule and every mapper, and its pictures are of what its page computes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tdhook_like import LRP
from tdhook_like.attribution import lrp
from tdhook_like.attribution.lrp import MaskRule, NameMapper, Rule, RulePlan, ZPlusRule
from tdhook_like.attribution.lrp.mappers.choosing import Mapper

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FOLDER = DOCS / "gallery.md", DOCS / "gallery"
ROW = re.compile(r"^\| `(\w+)\(.*$", re.MULTILINE)
NUMBER = re.compile(r"\d+")
MOST_BYTES = 60_000

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="there are no pages in this distribution")


def exported(kind: type) -> list[type]:
    """The subclasses of ``kind`` that users can import."""
    found = [getattr(lrp, name) for name in lrp.__all__]
    return [f for f in found if isinstance(f, type) and issubclass(f, kind) and f is not kind]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_gallery", DOCS / "make_gallery.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(script: ModuleType) -> dict[str, Any]:
    """What the page computes."""
    with torch.random.fork_rng():
        return script.computed()


def panels(found: dict[str, Any]) -> Iterator[tuple[str, str, Any, Tensor]]:
    """Sheet, title, mapper and relevance of every panel."""
    for sheet, of_sheet in found["panels"].items():
        for title, (mapper, relevance) in of_sheet.items():
            yield sheet, title, mapper, relevance


def sum_of(found: dict[str, Any], sheet: str, title: str) -> float:
    return found["panels"][sheet][title][1].sum().item()


# --- everything is shown ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", exported(Rule), ids=lambda rule: rule.__name__)
def test_every_rule_has_a_panel_that_names_it_and_in_which_it_sits(rule, found):
    shown = []
    for sheet, title, mapper, _ in panels(found):
        named = title.startswith(f"{rule.__name__}(") or sheet == "gradients"
        if named and sheet != "methods":
            plan = RulePlan(found["net"], mapper)
            shown += [title for line in plan.lines if type(line.rule) is rule]
    assert shown


@pytest.mark.parametrize("mapper", exported(Mapper), ids=lambda mapper: mapper.__name__)
def test_every_mapper_is_part_of_a_panel(mapper, found):
    assert any(f"{mapper.__name__}(" in repr(used) for _, _, used, _ in panels(found))


@pytest.mark.parametrize("rule", exported(Rule), ids=lambda rule: rule.__name__)
def test_every_rule_has_its_formula_as_the_list_of_rules_has_it(rule):
    here, there = (
        {row[1]: row[0] for row in ROW.finditer(page.read_text(encoding="utf-8"))}
        for page in (PAGE, DOCS / "writing-a-rule.md")
    )
    assert here[rule.__name__] == there[rule.__name__]


# --- the pictures -----------------------------------------------------------------------------------


def test_every_sheet_has_a_small_picture_in_the_page_that_shows_its_panels(script, found):
    from PIL import Image

    text = PAGE.read_text(encoding="utf-8")
    assert {path.stem for path in FOLDER.glob("*")} == set(found["panels"])
    for sheet, of_sheet in found["panels"].items():
        path = FOLDER / f"{sheet}.png"
        assert f"](gallery/{sheet}.png)" in text
        assert path.stat().st_size < MOST_BYTES
        with Image.open(path) as image:
            described = image.info["Description"]
        # Which channels a mask lets pass depends on the training.
        assert NUMBER.sub("#", described) == NUMBER.sub("#", script.titles(of_sheet))


def test_the_script_writes_a_picture_for_each_sheet(script, found, tmp_path):
    paths = script.written(found, tmp_path / "pictures")
    assert {path.stem for path in paths} == set(found["panels"])
    assert all(10_000 < path.stat().st_size < MOST_BYTES for path in paths)


def test_a_panel_has_a_scale_around_zero_and_says_its_sum_and_where_it_ends(script, found):
    relevance = torch.zeros(12, 12)
    relevance[0, 0], relevance[1, 0], relevance[2, 0] = 4.0, -1.0, 0.5
    figure = script.picture("any", {"a rule": (None, relevance)}, relevance, 3.5)
    image, panel = figure.axes[:2]
    drawn = panel.images[0]
    assert drawn.norm.vmin == -drawn.norm.vmax < 0 < drawn.norm.vmax < 4.0
    assert panel.get_title() == "a rule" and image.get_title() == "the image"
    assert panel.get_xlabel().startswith("sum +3.5\nends at ±")
    assert panel.get_xlabel().endswith(" 2 beyond")
    assert "“cross”, +3.5" in figure.get_suptitle()


# --- what the page says of them ---------------------------------------------------------------------


def test_the_net_finds_both_strokes_and_passes_the_blob_by(found):
    relevance = found["panels"]["methods"]["LRP(PolicyMapper())"][1]
    dark = found["image"][0, 0] > 0.65
    rows = dark.nonzero()[:, 0]
    blob = dark & (torch.arange(12)[:, None] > 7)  # the image's strokes end above it
    assert rows.max() > 7 and 0 < blob.sum() <= 9
    strokes = dark & ~blob
    assert relevance[strokes].sum() > 4 * relevance[blob].abs().sum()
    assert relevance[strokes].sum() > 0.6 * relevance.sum() > 0


def test_rules_of_first_layers_differ_in_where_and_not_in_how_much(found):
    sums = [sum_of(found, "first", f"{rule}") for rule in ("ZBoxRule(0, 1)", "WSquareRule()")]
    assert sums == pytest.approx([sum_of(found, "first", "FlatRule()")] * 2, rel=1e-3)


def test_masks_on_all_channels_make_up_the_panel_without_a_mask(found):
    total = torch.zeros(12, 12)
    for channel in range(16):
        mask = NameMapper({"second": MaskRule(channel, ZPlusRule())})
        method = LRP(mask | found["base"], found["cross"])
        total += found["explained"](method)[0]
    whole = found["panels"]["methods"]["LRP(PolicyMapper())"][1]
    assert torch.allclose(total, whole, atol=1e-4 * whole.abs().max().item())


def test_a_product_s_own_gradient_gives_twice_as_much(found):
    whole = sum_of(found, "attention", "UniformRule() on multiply")
    assert sum_of(found, "attention", "IgnoreRule() on multiply") == pytest.approx(2 * whole)
