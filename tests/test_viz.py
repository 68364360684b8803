"""Claims about bars, heat maps and their scale, read back from what was drawn."""

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


from drawn import episode, shares_of, words
from tdhook_like.viz import episode_heatmap, key_bars, symmetric_scale

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
