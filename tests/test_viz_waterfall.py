"""Claims about the waterfall, read back from what was drawn."""

# Artists are read back through attributes that matplotlib's own types leave open.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

from __future__ import annotations

import numpy as np
import pytest
import torch

from tdhook_like.errors import InputError

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from drawn import words
from tdhook_like.viz import waterfall


def bars_of(figure: Figure) -> dict[str, tuple[float, float]]:
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    return dict(zip(labels, bars, strict=True))


def test_each_bar_starts_where_the_one_before_it_ended_and_the_last_ends_at_the_score():
    parts = {"a": 0.5, "b": -2.0, ("c", "d"): 1.0}
    bars = bars_of(waterfall(parts, total=0.0, target="q", bias=0.5))
    assert bars == {"bias": (0, 0.5), "b": (0.5, -1.5), "c.d": (-1.5, -0.5), "a": (-0.5, 0.0)}


def test_what_is_not_attributed_is_a_bar_of_its_own():
    figure = waterfall({"a": 1.0, "b": -0.5}, total=0.8, target="q", bias=0.1)
    assert bars_of(figure)["gap"] == pytest.approx((0.6, 0.8))
    assert figure.axes[0].patches[-1].get_hatch()
    assert "+0.2 of the score is not attributed" in words(figure)
    without_bias = bars_of(waterfall({"a": 1.0}, total=0.8, target="q"))
    assert without_bias["bias or gap"] == pytest.approx((1.0, 0.8))


def test_a_large_bias_does_not_hide_a_gap():
    figure = waterfall({"a": 0.1}, total=480.15, target="v", bias=480.0)
    assert bars_of(figure)["gap"] == pytest.approx((480.1, 480.15))


def test_small_contributions_are_summed_up_as_others():
    parts = {f"f{i}": 2.0**-i for i in range(8)}
    total = sum(parts.values())
    bars = bars_of(waterfall(parts, total=total, target="q", max_bars=3))
    assert list(bars) == ["f0", "f1", "f2", "5 others"]
    assert bars["5 others"] == pytest.approx((1.75, total))
    assert "others" not in "".join(bars_of(waterfall(parts, total=total, target="q", max_bars=7)))


def test_what_raises_the_score_is_red_and_what_lowers_it_is_blue():
    bars = waterfall({"up": 2.0, "down": -1.0}, total=1.0, target="q").axes[0].patches
    up, down = (np.asarray(bar.get_facecolor()) for bar in bars)
    assert up[0] > 2 * up[2]
    assert down[2] > 2 * down[0]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_bias_that_dwarfs_the_rest_is_cut_and_the_picture_says_where(sign):
    parts = {"a": sign * 0.5, "b": sign * -0.2}
    figure = waterfall(parts, total=sign * 97.3, target="v", bias=sign * 97.0)
    low, high = figure.axes[0].get_xlim()
    assert 0 < low < 97.0 or -97.0 < high < 0
    edge = f"{low if sign > 0 else high:.4g}".replace("-", "−")
    assert f"axis clips at {edge}: the first bar reaches on to 0" in words(figure)
    uncut = waterfall(parts, total=sign * 0.8, target="v", bias=sign * 0.5)
    assert "nothing is clipped" in words(uncut)


def test_a_contribution_called_bias_is_not_the_bias():
    figure = waterfall({"bias": 3.0, "a": 1.0}, total=4.0, target="v")
    assert figure.axes[0].get_xlim()[1] > 4.0


def test_a_waterfall_refuses_what_is_no_single_number():
    with pytest.raises(InputError, match="'a' has the shape"):
        waterfall({"a": torch.ones(3)}, total=1.0, target="q")
    with pytest.raises(InputError, match=r"'a' cannot be drawn.*NaN"):
        waterfall({"a": float("nan")}, total=1.0, target="q")
    with pytest.raises(InputError, match="'total' cannot be drawn"):
        waterfall({"a": 1.0}, total=float("inf"), target="q")
    with pytest.raises(InputError, match="contributions is empty"):
        waterfall({}, total=1.0, target="q")
    with pytest.raises(InputError, match="max_bars=0"):
        waterfall({"a": 1.0}, total=1.0, target="q", max_bars=0)
