"""The ledger's picture, read back from what was drawn."""

# Artists are read back through attributes that matplotlib's own types leave open.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_like import LRP, EpsilonPlus
from tdhook_like.attribution.lrp.ledger.accounts import CAUSES, Ledger, Row
from tdhook_like.errors import InputError

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from tdhook_like.viz import ledger_bars


def number(*values: float) -> Tensor:
    """``[B, 1]``."""
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


def a_ledger() -> Ledger:
    """Two elements: 4 and 8 start; a bias and ε take some, a constant adds some, 0.5 goes missing."""
    first = Row(
        "0",
        "Linear",
        "r",
        number(3, 5),
        number(1, 2),
        {"bias": number(2, 2), "stabiliser": number(0, 1)},
    )
    second = Row("add", "function", "", number(4, 8), number(5, 9), {"constant": number(-1, -1)})
    return Ledger([first, second], number(4, 8), number(2.5, 5.5))


def bars(figure: Any) -> list[tuple[str, float, float, str]]:
    """Label, start, end and colour of each bar, from above."""
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return [
        (label, bar.get_x(), bar.get_x() + bar.get_width(), to_hex(bar.get_facecolor()))
        for label, bar in zip(labels, axes.patches, strict=True)
    ]


def words(figure: Any) -> str:
    axes = figure.axes[0]
    texts = [axes.get_title(loc="left"), figure._suptitle.get_text(), axes.get_xlabel()]
    texts += [text.get_text() for text in axes.texts]
    texts += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return "\n".join(texts)


def test_bars_lead_from_the_start_past_every_cause_to_the_inputs_and_hide_no_gap():
    found = bars(ledger_bars(a_ledger(), target="y", element=1))
    assert [(label, start, end) for label, start, end, _ in found] == [
        ("start", 0.0, 8.0),
        ("add()", 8.0, 9.0),
        ("0 (Linear)", 9.0, 7.0),
        ("0 (Linear)", 7.0, 6.0),
        ("gap", 6.0, 5.5),
        ("inputs", 0.0, 5.5),
    ]


def test_without_an_element_it_is_the_mean_of_all():
    figure = ledger_bars(a_ledger(), target="y")
    assert [(start, end) for _, start, end, _ in bars(figure)] == [
        (0.0, 6.0),
        (6.0, 7.0),
        (7.0, 5.0),
        (5.0, 4.5),
        (4.5, 4.0),
        (0.0, 4.0),
    ]
    assert "mean over 2 elements; +0.5 is not accounted for" in words(figure)


def test_each_cause_has_a_colour_of_its_own_which_the_legend_tells():
    one = number(1.0)
    rows = [Row(str(i), "m", "r", one, one, {cause: one}) for i, cause in enumerate(CAUSES)]
    figure = ledger_bars(Ledger(rows, number(9.0), one), target="y")
    colours = [colour for _, _, _, colour in bars(figure)[1:-1]]
    assert len(set(colours)) == len(CAUSES)
    (legend,) = figure.legends
    told = {
        text.get_text(): to_hex(patch.get_facecolor())
        for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
    }
    assert told == dict(zip(reversed(CAUSES), colours, strict=True))


def test_a_cause_of_ones_own_is_drawn_and_told_too():
    row = Row("0", "m", "r", number(1.0), number(0.5), {"two thirds": number(0.5)})
    figure = ledger_bars(Ledger([row], number(1.0), number(0.5)), target="y")
    assert "two thirds" in words(figure)


def test_small_bars_and_those_beyond_the_limit_are_added_up():
    sizes = [5.0, 1e-5, 3.0, 1.0, 0.5, 0.25]
    rows = [
        Row(f"l{i}", "m", "r", number(1), number(1), {"bias": number(s)})
        for i, s in enumerate(sizes)
    ]
    ledger = Ledger(rows, number(sum(sizes) + 1), number(1.0))
    labels = [label for label, *_ in bars(ledger_bars(ledger, target="y"))]
    assert labels == [
        "start",
        "l5 (m)",
        "l4 (m)",
        "l3 (m)",
        "l2 (m)",
        "l0 (m)",
        "1 other",
        "inputs",
    ]
    found = bars(ledger_bars(ledger, target="y", max_bars=2))
    assert [label for label, *_ in found] == ["start", "l2 (m)", "l0 (m)", "4 others", "inputs"]
    assert found[-2][2] == pytest.approx(1.0)


def test_names_that_leave_no_room_for_the_bars_lose_their_type_and_then_their_beginning():
    one, long = number(1.0), "encoder.layers.0.self_attn.out_proj.inner"
    rows = [
        Row(
            "encoder.layers.0.linear1",
            "NonDynamicallyQuantizableLinear",
            "r",
            one,
            one,
            {"bias": one},
        ),
        Row(long, "Linear", "r", one, one, {"bias": one}),
        Row("", "Linear", "r", one, one, {"bias": one}),
    ]
    figure = ledger_bars(Ledger(rows, number(4.0), one), target="y")
    labels = [label for label, *_ in bars(figure)]
    assert labels[1] == "(root) (Linear)" and labels[3] == "encoder.layers.0.linear1"
    assert labels[2].startswith("…") and long.endswith(labels[2][1:]) and len(labels[2]) <= 34


@pytest.mark.parametrize("column", [0, 1, -1])
def test_a_real_ledger_is_drawn_for_each_target_and_saved(column: int, tmp_path: Path):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    method = LRP(EpsilonPlus(), {"a": ("y", 0), "b": ("y", 1)}, ledger=True)
    with method.prepare(net, ["x"], ["y"]) as hooked:
        hooked(TensorDict({"x": torch.randn(3, 2, 4)}, [3, 2]))
        ledger = hooked.ledger
    assert ledger is not None
    place = tmp_path / "ledger.png"
    figure = ledger_bars(ledger, target="y", element=(2, 1), column=column, path=place)
    assert place.stat().st_size > 0 and "element (2, 1)" in words(figure)
    found = bars(figure)
    assert found[0][2] == pytest.approx(float(ledger.start[2, 1, column]))
    assert found[-1][2] == pytest.approx(float(ledger.arrived[2, 1, column]))
    for (_, _, end, _), (_, start, _, _) in pairwise(found[:-1]):
        assert start == pytest.approx(end)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"element": 2}, r"element=2, column=0 is none of a ledger of shape \(2, 1\)"),
        ({"element": (0, 0)}, "element="),
        ({"column": 1}, "column=1"),
        ({"max_bars": 0}, "max_bars=0 must be at least 1"),
    ],
)
def test_what_is_not_there_is_refused(options: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        ledger_bars(a_ledger(), target="y", **options)


def test_numbers_that_are_none_are_refused_with_their_place_and_nothing_is_nothing():
    row = Row("0", "Linear", "r", number(1), number(1), {"bias": number(float("nan"))})
    with pytest.raises(InputError, match="'0' cannot be drawn"):
        ledger_bars(Ledger([row], number(1), number(1)), target="y")
    with pytest.raises(InputError, match="nothing to draw"):
        ledger_bars(Ledger([], torch.zeros(0, 1), torch.zeros(0, 1)), target="y")
    figure = ledger_bars(Ledger([], number(0.0), number(0.0)), target="$y$")
    assert len(bars(figure)) == 2 and not figure.legends
