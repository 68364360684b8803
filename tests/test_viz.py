"""Claims about the pictures, read back from what was drawn."""

# Artists are read back through attributes that matplotlib's own types leave open.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tdhook_like.errors import InputError
from tdhook_like.metrics import key_shares

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text

from tdhook_like.viz import episode_heatmap, key_bars, symmetric_scale, waterfall


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


# Key bars


def test_bars_are_as_long_as_the_shares():
    methods = {"LRP": shares_of(0), "IG": shares_of(1)}
    figure = key_bars(methods, target="state_value")
    panel = figure.axes[0]
    keys = [label.get_text() for label in panel.get_yticklabels()]
    for container, shares in zip(panel.containers, methods.values(), strict=True):
        drawn = dict(zip(keys, (bar.get_width() for bar in container), strict=True))
        expected = {
            key if isinstance(key, str) else ".".join(key): summary.share
            for key, summary in shares.summary.items()
        }
        assert drawn == pytest.approx(expected)


def test_whiskers_end_where_the_bootstrap_intervals_end():
    shares = shares_of(0)
    panel = key_bars({"LRP": shares}, target="v").axes[0]
    drawn = sorted(tuple(line.get_xdata()) for line in panel.lines if line.get_marker() == "None")
    expected = sorted(summary.share_interval for summary in shares.summary.values())
    np.testing.assert_allclose(drawn, expected)


def test_signed_bars_are_signed_relevance_over_all_absolute_relevance():
    shares = shares_of(0)
    panel = key_bars({"LRP": shares}, target="v").axes[1]
    unit = sum(absolute.mean().item() for absolute in shares.absolute.values())
    drawn = sorted(bar.get_width() for bar in panel.patches)
    expected = sorted(value.mean().item() / unit for value in shares.relevance.values())
    np.testing.assert_allclose(drawn, expected, rtol=1e-5)


def test_the_signed_axis_is_symmetric_and_holds_every_interval():
    methods = {"LRP": shares_of(0), "IG": shares_of(1)}
    panel = key_bars(methods, target="v").axes[1]
    low, high = panel.get_xlim()
    assert low == -high
    assert all(abs(x) <= high for line in panel.lines[1:] for x in line.get_xdata())


def test_the_truth_has_its_own_panel_and_sorts_the_keys():
    truth = {"cart": 3.0, "pole": 471.0, ("agents", "noise"): -1.0}
    figure = key_bars({"LRP": shares_of(0)}, target="v", truth=truth, truth_label="drop")
    panel = figure.axes[-1]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["pole", "cart", "agents.noise"]
    assert [bar.get_width() for bar in panel.patches] == [471.0, 3.0, -1.0]
    assert panel.get_xlabel() == "drop"


def test_without_a_truth_the_largest_share_is_on_top():
    shares = shares_of(0)
    figure = key_bars({"LRP": shares}, target="v", signed=False)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == sorted(widths, reverse=True)
    assert len(figure.axes) == 1


def test_methods_with_different_keys_are_refused_by_name():
    with pytest.raises(InputError, match=r"'IG' and 'LRP' differ.*'echo'"):
        key_bars({"LRP": shares_of(0, ("a",)), "IG": shares_of(0, ("a", "echo"))}, target="v")
    with pytest.raises(InputError, match=r"truth and 'LRP' differ.*'b'"):
        key_bars({"LRP": shares_of(0, ("a",))}, target="v", truth={"a": 1.0, "b": 1.0})
    with pytest.raises(InputError, match=r"'truth', 'a'.*NaN"):
        key_bars({"LRP": shares_of(0, ("a",))}, target="v", truth={"a": float("nan")})


# Episode heat map


def test_the_heat_map_shows_features_by_time_for_each_key():
    relevance = episode()
    figure = episode_heatmap(relevance, torch.arange(40) % 2, target="q")
    for axes, (key, values) in zip(figure.axes, relevance.items(), strict=False):
        np.testing.assert_allclose(axes.images[0].get_array(), values.T, rtol=1e-6)
        label = key if isinstance(key, str) else ".".join(key)
        assert label in axes.get_ylabel()


def test_every_key_has_the_same_symmetric_colour_scale_with_white_at_zero():
    figure = episode_heatmap(episode(), torch.arange(40) % 2, target="q")
    images = [axes.images[0] for axes in figure.axes[:2]]
    (limit,) = {image.norm.vmax for image in images}
    assert {image.norm.vmin for image in images} == {-limit}
    assert min(images[0].cmap(images[0].norm(0.0))) > 0.95
    red, blue = (images[0].cmap(images[0].norm(at)) for at in (limit, -limit))
    assert red[0] > red[2]
    assert blue[2] > blue[0]


def test_the_picture_says_where_and_how_much_the_colours_clip():
    relevance = episode()
    figure = episode_heatmap(relevance, torch.arange(40) % 2, target="q")
    magnitudes = torch.cat([values.flatten() for values in relevance.values()]).abs().double()
    limit = torch.quantile(magnitudes, 0.99).item()
    assert figure.axes[0].images[0].norm.vmax == pytest.approx(limit)
    assert f"colour clips at ±{limit:.3g} (99th percentile of |R|; 1 %" in words(figure)


def test_an_explicit_clip_and_no_clip_are_named_too():
    relevance = {"a": torch.tensor([[0.5], [-2.0]])}
    clipped = episode_heatmap(relevance, torch.tensor([0, 1]), target="q", clip=1.0)
    assert "clips at ±1 (given; 50 % of values lie beyond, largest |R| 2)" in words(clipped)
    whole = episode_heatmap(relevance, torch.tensor([0, 1]), target="q", percentile=100)
    assert "colour scale ±2 (largest |R|), nothing is clipped" in words(whole)


def test_the_action_strip_shares_the_time_axis_and_shows_what_was_done():
    actions = torch.randint(3, (40,), generator=torch.Generator().manual_seed(0)) + 2
    names = ["", "", "left", "noop", "right"]
    figure = episode_heatmap(episode(), actions, target="q", action_names=names)
    band, strip = figure.axes[0], figure.axes[2]
    assert band.get_xlim() == strip.get_xlim() == (-0.5, 39.5)
    assert strip.images[0].get_array()[0].tolist() == (actions - 2).tolist()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["left", "noop", "right"]


def test_one_hot_actions_are_drawn_as_the_action_that_they_mean():
    actions = torch.arange(40) % 3
    one_hot = torch.nn.functional.one_hot(actions, 3)
    figures = [
        episode_heatmap(episode(), a, target="q") for a in (actions, one_hot, one_hot.bool())
    ]
    drawn = [figure.axes[2].images[0].get_array() for figure in figures]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] == drawn[2]).all()


def test_continuous_actions_are_drawn_as_lines():
    actions = torch.randn(40, 2)
    strip = episode_heatmap(episode(), actions, target="loc").axes[2]
    for line, values in zip(strip.lines, actions.T, strict=True):
        np.testing.assert_allclose(line.get_ydata(), values)
    assert strip.get_xlim() == (-0.5, 39.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attributions": {}}, "attributions is empty"),
        ({"attributions": {"a": torch.ones(40, 1), "b": torch.ones(7, 1)}}, "'b' has 7 time"),
        ({"attributions": {"pixels": torch.ones(40, 3, 8, 8)}}, "'pixels' has the shape"),
        ({"attributions": {"pixels": torch.ones(40, 300)}}, r"300 rows.*'pixels'"),
        ({"attributions": {"a": torch.full((40, 1), torch.nan)}}, r"'a' cannot.*40 of its 40"),
        ({"actions": torch.zeros(7)}, r"'actions' has the shape \(7,\)"),
        ({"actions": torch.full((40,), torch.inf)}, "'actions' cannot be drawn"),
        ({"feature_names": {"cart": ["x"]}}, r"feature_names\['cart'\] has 1 names for 2"),
        ({"feature_names": {"wheel": ["x"]}}, "feature_names has 'wheel'"),
        ({"action_names": ["only one"]}, "action_names has 1 names"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"percentile": 0.0}, "percentile=0.0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(changed, message):
    given = {"attributions": episode(), "actions": torch.arange(40) % 2, "target": "q", **changed}
    with pytest.raises(InputError, match=message):
        episode_heatmap(**given)


# Waterfall


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


# The scale


def test_the_scale_ends_at_a_percentile_of_the_magnitudes():
    values = torch.cat([torch.arange(1, 100.0), -torch.tensor([1000.0])])
    scale = symmetric_scale(values, percentile=50)
    assert scale.limit == np.median(np.abs(values.numpy()))
    assert scale.beyond == 0.5
    assert scale.largest == 1000.0


def test_sparse_relevance_is_not_clipped_away():
    values = torch.zeros(1000)
    values[3] = 7.0
    scale = symmetric_scale(values)
    assert scale.limit == 7.0
    assert not scale.clips


def test_a_scale_for_zeros_is_still_a_scale():
    scale = symmetric_scale(torch.zeros(4))
    assert scale.limit == 1.0
    assert "every value is 0" in scale.note()


# All pictures


PICTURES = {
    "bars": lambda target, **more: key_bars(
        {"LRP": shares_of(0), "Integrated gradients": shares_of(1), "Saliency": shares_of(2)},
        target=target,
        truth={"cart": 3.0, "pole": 471.0, ("agents", "noise"): -1.0},
        **more,
    ),
    "heat map": lambda target, **more: episode_heatmap(
        episode(),
        torch.arange(40) % 2,
        target=target,
        feature_names={"cart": ["position", "angular velocity"]},
        **more,
    ),
    "waterfall": lambda target, **more: waterfall(
        {"pole.angular velocity": -0.55, "cart": 0.13, "noise": -0.05, "echo": 0.007},
        total=0.01,
        target=target,
        bias=0.31,
        **more,
    ),
}


@pytest.fixture(params=PICTURES)
def picture(request):
    return PICTURES[request.param]


def test_every_picture_names_its_target_in_the_title(picture):
    assert "logits[left]" in picture("logits[left]").get_suptitle()


def test_every_picture_says_what_it_clips(picture):
    assert "clip" in words(picture("state_value"))


@pytest.mark.parametrize("target", ["v", "log-probability of the action of the left agent " * 2])
def test_no_text_is_drawn_over_another(picture, target):
    assert overlapping(picture(target)) == []


def test_every_picture_is_saved_as_png(picture, tmp_path):
    for name in ("picture.png", "picture"):
        figure = picture("v", path=tmp_path / name)
        assert isinstance(figure, Figure)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_dollars_in_names_are_not_formulas():
    figure = waterfall({"cash $x_1$": 1.0}, total=1.0, target="gain in $ and $")
    figure.canvas.draw()
    assert r"gain in \$ and \$" in figure.get_suptitle()


def test_threads_draw_the_same_pictures_at_the_same_time(tmp_path):
    def draw(number: int) -> bytes:
        path = tmp_path / f"{number}.png"
        PICTURES["heat map"]("q", path=path)
        return path.read_bytes()

    alone = draw(-1)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(draw, range(8))) == {alone}


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_metrics_import_no_matplotlib_and_pictures_no_global_figure_state():
    printed = run(
        "import sys, tdhook_like.metrics; print('matplotlib' in sys.modules)\n"
        "import tdhook_like.viz as viz\n"
        "viz.waterfall({'a': 1.0}, total=1.0, target='q').canvas.draw()\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert printed.split() == ["False", "False"]


def test_a_missing_matplotlib_is_reported_in_words():
    printed = run(
        "import sys; sys.modules['matplotlib'] = None\n"
        "from tdhook_like.errors import TdhookLikeError\n"
        "try:\n    import tdhook_like.viz\n"
        "except ImportError as error:\n"
        "    print(isinstance(error, TdhookLikeError), error)\n"
    )
    assert printed.startswith("True")
    assert "pip install tdhook_like[viz]" in printed
