"""Every example of the documentation runs as it stands, and prints what its page shows."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
import types
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tdhook_like.attribution import lrp
from tdhook_like.attribution.lrp import Rule

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCES = ROOT / "src" / "tdhook_like"
PAGES = [page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if page.is_file()]

FENCE = re.compile(r"^```(\w*) *([\w-]*) *$\n(.*?)^``` *$\n?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]+))?\)")
# Whole numbers are counts, which no machine rounds.
ROUNDED = re.compile(r"-?\d+\.\d*(?:e[+-]\d+)?")
ANY_NUMBER = re.compile(r"[+-]?\d[\d,.]*(?:e[+-]\d+)?")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
needs_docs = pytest.mark.skipif(not DOCS.is_dir(), reason="there are no pages in this distribution")


@dataclass(frozen=True)
class Example:
    """A ``python`` block and the ``text`` block right behind it, if there is one.

    Attributes:
        code: The block, preceded by as many empty lines as stand above it in the page.
        shown: What the page says it prints, or None.
        varies: Whether the numbers in it are those of a model that was trained or played, which
            come out otherwise on another machine: then words are compared, numbers not.
        line: Where the block begins.
    """

    code: str
    shown: str | None
    varies: bool
    line: int


def examples(page: str) -> list[Example]:
    found: list[Example] = []
    for block, after in pairwise([*FENCE.finditer(page), None]):
        if block is None or block[1] != "python" or block[2] == "no-run":
            continue
        follows = after is not None and not page[block.end() : after.start()].strip()
        output = after if after is not None and follows and after[1] == "text" else None
        line = page.count("\n", 0, block.start(3))
        found.append(
            Example(
                code="\n" * line + block[3],
                shown=None if output is None else output[3],
                varies=output is not None and output[2] == "varies",
                line=line + 1,
            )
        )
    return found


def assert_same_text(found: str, shown: str, varies: bool = False) -> None:
    """The same words, white space apart; decimals may differ by one in their last digit."""
    if varies:
        found, shown = ANY_NUMBER.sub("#", found), ANY_NUMBER.sub("#", shown)
    found, shown = " ".join(found.split()), " ".join(shown.split())
    numbers = zip(ROUNDED.findall(found), ROUNDED.findall(shown), strict=False)
    if ROUNDED.sub("#", found) != ROUNDED.sub("#", shown) or any(
        abs(float(one) - float(other)) > 1.01 * last_digit(other) for one, other in numbers
    ):
        assert found == shown


def last_digit(number: str) -> float:
    """What one counts in the last digit of a decimal number.

    >>> last_digit("1.50"), last_digit("2.0e-03")
    (0.01, 0.0001)
    """
    mantissa, _, exponent = number.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(f"1e{int(exponent or 0) - decimals}")


@every_page
def test_the_examples_of_a_page_run_in_order_and_print_what_it_shows(page, monkeypatch):
    # A module of its own, so that what the examples define can be pickled and looked up.
    module = types.ModuleType("example_of_the_documentation")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for example in examples(page.read_text(encoding="utf-8")):
        code = compile(example.code, str(page), "exec", dont_inherit=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, vars(module))
        if example.shown is not None:
            assert_same_text(printed.getvalue(), example.shown, example.varies)
        else:
            assert not printed.getvalue(), f"line {example.line} prints what the page does not show"


@every_page
def test_links_lead_to_pages_and_headings_that_exist(page):
    for path, anchor in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor:
            assert anchor in headings(target), f"{page.name} links to {path}#{anchor}"


def headings(page: Path) -> set[str]:
    """The anchors that renderers make of a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@needs_docs
def test_the_index_leads_to_every_page():
    linked = {path for path, _ in LINK.findall((DOCS / "index.md").read_text(encoding="utf-8"))}
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= linked


@needs_docs
def test_every_rule_has_a_row_in_the_table_of_rules():
    page = (DOCS / "writing-a-rule.md").read_text(encoding="utf-8")
    rules = [name for name in lrp.__all__ if _is_rule(getattr(lrp, name))]
    assert len(rules) > 10
    assert [name for name in rules if f"| `{name}" not in page] == []


def _is_rule(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Rule) and value is not Rule


@needs_docs
def test_the_list_of_rooms_names_every_file_and_nothing_else():
    rooms = listed_rooms()
    assert [room for room in rooms if not (SOURCES / room).exists()] == []
    files = {path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.py")}
    assert sorted(file for file in files if "__" not in file and room_of(file, rooms) is None) == []


@needs_docs
def test_imports_point_down_the_list_of_rooms():
    rooms = listed_rooms()
    upwards = []
    for path in SOURCES.rglob("*.py"):
        file = path.relative_to(SOURCES).as_posix()
        room = room_of(file, rooms)
        for imported in imports(path):
            other = room_of(imported, rooms)
            if room and other and rooms.index(other) < rooms.index(room):
                upwards.append(f"{file} imports {imported}")
    assert upwards == []


def listed_rooms() -> list[str]:
    """Files and directories (with a slash behind) in the order of the tables of the design."""
    page = (DOCS / "design.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([a-z_/]+(?:/|\.py))` \|", page, re.MULTILINE)


def room_of(file: str, rooms: list[str]) -> str | None:
    """Where in the list a file or a package stands: by itself, or within a directory."""
    return next((r for r in rooms if r == file or (r[-1] == "/" and file.startswith(r))), None)


def imports(path: Path) -> list[str]:
    """The files and packages of the library that a file imports as it is loaded."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tdhook_like."):
            name = str(node.module).removeprefix("tdhook_like.").replace(".", "/")
            found.append(f"{name}/" if (SOURCES / name).is_dir() else f"{name}.py")
    return found


def test_numbers_may_differ_by_one_in_their_last_digit_and_words_not_at_all():
    assert_same_text("a  0.125\n", "a 0.126")
    assert_same_text("a -3, 1,000.5", "a 4, 0.1", varies=True)
    for found, shown in (("a 0.125", "a 0.127"), ("a 0.125", "b 0.125"), ("a 3", "a 4")):
        with pytest.raises(AssertionError):
            assert_same_text(found, shown)


def test_a_text_block_belongs_to_the_example_right_above_it():
    page = "```python\na\n```\n\n```text varies\nb\n```\nwords\n```text\nc\n```\n"
    assert examples(page) == [Example("\na\n", "b\n", varies=True, line=2)]
    assert examples("```python no-run\na\n```\n```sh\nb\n```\n") == []
