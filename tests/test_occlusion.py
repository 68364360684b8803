"""Occlusion: windows by a slow loop, overlaps, blurred covers, and what is no window."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from method_references import DOUBLE, Formula, Joined, occlusion
from tdhook_like import AtStep, Each, InputError, KeyNotFoundError
from tdhook_like.attribution.ablation import FeatureAblation
from tdhook_like.attribution.occlusion import Blurred, Occlusion


def explained(method: Any, net: Any, batch: tuple[int, ...], **inputs: Tensor) -> TensorDict:
    model = net if isinstance(net, TensorDictModule) else TensorDictModule(net, list(inputs), ["y"])
    with method.prepare(model) as hooked:
        return hooked(TensorDict(inputs, batch))


# --- windows ----------------------------------------------------------------------------------------

SHAPES = [
    ((7,), (3,), (1,)),
    ((7,), (3,), (2,)),
    ((7,), (3,), (3,)),  # the last window is cut off
    ((7,), (7,), (1,)),
    ((7,), (1,), (1,)),
    ((3, 4), (2, 2), (1, 2)),
    ((2, 4, 5), (1, 3, 2), (1, 2, 2)),
    ((2, 4, 5), (2, 4, 5), (1, 1, 1)),
]


@pytest.mark.parametrize("rows", [None, 1, 5])
@pytest.mark.parametrize(("shape", "window", "stride"), SHAPES, ids=str)
def test_every_window_is_that_of_a_slow_loop(shape, window, stride, rows):
    net = Joined([math.prod(shape)], 2, dims=[len(shape)]).double()
    x, base = torch.randn(3, *shape, dtype=DOUBLE), torch.randn(*shape, dtype=DOUBLE)
    options = {"window": window, "stride": stride, "baselines": base, "internal_batch_size": rows}
    td = explained(Occlusion(("y", 1), **options), net, (3,), x=x)
    for row in range(3):
        expected = occlusion(net, x[row], base, window, stride, output=1)
        torch.testing.assert_close(td["attr", "x"][row], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("largest", [1, 20])
@pytest.mark.parametrize(("shape", "window", "stride"), SHAPES, ids=str)
def test_too_many_windows_to_be_listed_are_worked_out(shape, window, stride, largest, monkeypatch):
    net = Joined([math.prod(shape)], 1, dims=[len(shape)]).double()
    x = torch.randn(2, *shape, dtype=DOUBLE)
    options = {"window": window, "stride": stride, "internal_batch_size": 6}
    listed = explained(Occlusion("y", **options), net, (2,), x=x)
    monkeypatch.setattr("tdhook_like.attribution.occlusion._LARGEST_TABLE", largest)
    found = explained(Occlusion("y", **options), net, (2,), x=x)
    assert torch.equal(found["attr", "x"], listed["attr", "x"])


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_inputs_and_baselines_are_as_they_were(rows):
    net = Joined([6], 1, dims=[2]).double()
    x, base = torch.randn(1, 2, 3, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE)
    copies = x.clone(), base.clone()
    method = Occlusion("y", window=2, baselines=base, internal_batch_size=rows)
    td = explained(method, net, (1,), x=x)
    assert torch.equal(x, copies[0]) and torch.equal(base, copies[1])
    assert torch.equal(td["x"], copies[0])


@settings(max_examples=40)
@given(st.data())
def test_any_window_and_stride_cover_every_feature(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    window = tuple(data.draw(st.integers(1, n)) for n in shape)
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    net = Joined([math.prod(shape)], 1, dims=[len(shape)]).double()
    x = torch.randn(1, *shape, dtype=DOUBLE)
    td = explained(Occlusion("y", window=window, stride=stride), net, (1,), x=x)
    expected = occlusion(net, x[0], 0 * x[0], window, stride)
    torch.testing.assert_close(td["attr", "x"][0], expected, rtol=0, atol=1e-10)


def test_of_a_linear_model_it_is_the_mean_of_the_windows_sums():
    net, x = nn.Linear(5, 1).double(), torch.randn(4, 5, dtype=DOUBLE)
    part = (x * net.weight).detach()
    td = explained(Occlusion("y", window=2), net, (4,), x=x)
    pairs = part[:, 1:] + part[:, :-1]
    expected = torch.cat([pairs[:, :1], (pairs[:, 1:] + pairs[:, :-1]) / 2, pairs[:, -1:]], 1)
    torch.testing.assert_close(td["attr", "x"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)])
def test_shapes_and_dtypes_are_those_of_the_input(batch, dtype):
    x = torch.randn(*batch, 2, 4).to(dtype)
    net = Formula(lambda x: x[..., 1, 2:].sum(-1, keepdim=True) * 2)
    td = explained(Occlusion("y", window=(1, 1)), net, batch, x=x)
    expected = torch.zeros_like(x)
    expected[..., 1, 2:] = 2 * x[..., 1, 2:]
    assert td["attr", "x"].dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(td["attr", "x"], expected, rtol=0, atol=tolerance)


def test_a_tuple_is_of_the_last_dimensions_and_spans_those_before():
    net = Joined([24], 1, dims=[3]).double()
    x = torch.randn(2, 2, 3, 4, dtype=DOUBLE)
    short = explained(Occlusion("y", window=(2, 2), stride=(1, 2)), net, (2,), x=x)["attr", "x"]
    for row in range(2):
        expected = occlusion(net, x[row], 0 * x[row], (2, 2, 2), (1, 1, 2))
        torch.testing.assert_close(short[row], expected, rtol=0, atol=1e-10)
    assert torch.equal(short[:, 0], short[:, 1])  # both channels are covered at once


def test_a_number_is_for_every_dimension_and_keys_may_have_windows_of_their_own():
    net = Joined([9, 4], 1, dims=[2, 1]).double()
    a, b = torch.randn(2, 3, 3, dtype=DOUBLE), torch.randn(2, 4, dtype=DOUBLE)
    td = explained(Occlusion("y", window={"a": 2}, stride={"a": 1}), net, (2,), a=a, b=b)
    alone = explained(FeatureAblation("y"), net, (2,), a=a, b=b)
    torch.testing.assert_close(td["attr", "b"], alone["attr", "b"], rtol=0, atol=1e-12)
    for row in range(2):

        def of_image(x: Tensor, row: int = row) -> Tensor:
            return net(x, b[row])

        expected = occlusion(of_image, a[row], 0 * a[row], (2, 2), (1, 1))
        torch.testing.assert_close(td["attr", "a"][row], expected, rtol=0, atol=1e-10)


def test_a_key_that_is_a_number_per_element_is_covered_like_any_other():
    net = Formula(lambda x, z: (x * z).unsqueeze(-1))
    x, z = torch.randn(5), torch.randn(5)
    td = explained(Occlusion("y"), net, (5,), x=x, z=z)
    torch.testing.assert_close(td["attr", "x"], x * z)
    torch.testing.assert_close(td["attr", "z"], x * z)


def test_windows_that_tile_are_groups_of_features():
    net, x = Joined([6], 3).double(), torch.randn(4, 6, dtype=DOUBLE)
    masks = {"x": torch.tensor([0, 0, 1, 1, 2, 2])}
    tiled = explained(Occlusion(Each("y"), window=2, stride=2), net, (4,), x=x)
    method = FeatureAblation(Each("y"), masks=masks, divide=False)
    grouped = explained(method, net, (4,), x=x)
    assert tiled["attr", "x"].shape == (4, 3, 6)
    torch.testing.assert_close(tiled["attr", "x"], grouped["attr", "x"], rtol=0, atol=1e-12)


def test_evaluations_are_one_per_window_in_chunks_of_the_size_that_was_asked_for():
    net, x = Joined([9, 2], 1, dims=[2, 1]), torch.randn(4, 3, 3)
    method = Occlusion("y", window={"a": (2, 2)}, internal_batch_size=12)
    model = TensorDictModule(net, ["a", "b"], ["y"])
    with method.prepare(model) as hooked:
        hooked(TensorDict({"a": x, "b": torch.randn(4, 2)}, [4]))
        net.seen.shapes.clear()
        hooked(TensorDict({"a": x, "b": torch.randn(4, 2)}, [4]))
    rows = [torch.Size(shape[:-2]).numel() for shape in net.seen.shapes]
    # The plain call; for each key its windows and the input, at most three at a time.
    assert rows == [4, 12, 8, 12]


def test_a_window_may_span_time_steps_of_a_trajectory():
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(-2)[..., :1]

    x = torch.randn(3, 4, 2, dtype=DOUBLE)
    model = TensorDictModule(Last(), ["x"], ["y"])
    with Occlusion(AtStep("y", -1), window=(2, 1), stride=(2, 1)).prepare(model) as hooked:
        td = hooked(TensorDict({"x": x}, [3, 4]))
    sums = x[..., 0].unflatten(1, (2, 2)).sum(-1).repeat_interleave(2, 1)
    torch.testing.assert_close(td["attr", "x"][..., 0], sums)
    assert not td["attr", "x"][..., 1].any()


def test_an_image_network_finds_the_patch_that_it_looks_at():
    looks = nn.Conv2d(1, 1, 3, bias=False).double()
    nn.init.ones_(looks.weight)
    net = nn.Sequential(looks, nn.Flatten(), Formula(lambda x: x[..., :1]))
    x = torch.ones(2, 1, 8, 8, dtype=DOUBLE)
    with Occlusion("y", window=(1, 3, 3), stride=(1, 3, 3)).prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, [2]))
        assert "folded" in str(hooked.context)
    expected = torch.zeros_like(x)
    expected[..., :3, :3] = 9
    torch.testing.assert_close(td["attr", "x"], expected)


# --- blurred covers ---------------------------------------------------------------------------------


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Pixel by pixel: the Gaussian mean over all the pixels that there are."""
    found = torch.zeros_like(x)
    rows, columns = x.shape
    for i in range(rows):
        for j in range(columns):
            weights = torch.tensor(
                [
                    [
                        math.exp(-((i - k) ** 2 + (j - m) ** 2) / (2 * sigma**2))
                        for m in range(columns)
                    ]
                    for k in range(rows)
                ],
                dtype=DOUBLE,
            )
            found[i, j] = (weights * x).sum() / weights.sum()
    return found


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_a_blurred_input_is_its_gaussian_mean(sigma):
    x = torch.randn(3, 2, 5, 4, dtype=DOUBLE)
    found = Blurred(sigma)(x)
    for place in ((0, 0), (1, 1), (2, 0)):
        torch.testing.assert_close(found[place], blurred(x[place], sigma), rtol=0, atol=1e-12)


@settings(max_examples=20)
@given(st.floats(0.1, 20), st.integers(1, 3), st.floats(-5, 5))
def test_what_is_even_stays_as_it_is(sigma, dims, value):
    x = torch.full((2, 3, 4), value, dtype=DOUBLE)
    torch.testing.assert_close(Blurred(sigma, dims)(x), x, rtol=0, atol=1e-12)


def test_windows_may_be_covered_with_the_input_out_of_focus():
    net, x = Joined([12], 1, dims=[2]).double(), torch.randn(2, 3, 4, dtype=DOUBLE)
    td = explained(Occlusion("y", window=2, baselines=Blurred(1.0)), net, (2,), x=x)
    for row in range(2):
        expected = occlusion(net, x[row], blurred(x[row], 1.0), (2, 2), (1, 1))
        torch.testing.assert_close(td["attr", "x"][row], expected, rtol=0, atol=1e-10)


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 5}, r"window \(5, 5\) is larger than the features of 'x', \(3, 4\)"),
        ({"window": (4, 1)}, r"window \(4, 1\) is larger"),
        ({"window": {"x": (1, 5)}}, r"window \(1, 5\) is larger"),
        (
            {"window": (2, 2), "stride": (1, 3)},
            r"stride \(1, 3\) is larger than the window \(2, 2\)",
        ),
        ({"stride": 2}, r"stride \(2, 2\) is larger than the window \(1, 1\) on 'x'"),
        ({"window": (1, 1, 1)}, r"window=\(1, 1, 1\) has 3 dimensions.*'x' have 2"),
        ({"stride": {"x": (1, 1, 1)}}, r"stride=\(1, 1, 1\) has 3 dimensions"),
    ],
    ids=str,
)
def test_windows_that_do_not_fit_are_refused_with_the_key_and_both_sizes(options, message):
    net = Joined([12], 1, dims=[2])
    with pytest.raises(InputError, match=message):
        explained(Occlusion("y", **options), net, (5,), x=torch.randn(5, 3, 4))


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "2", None, (2, 0), {"x": (1.5,)}], ids=str)
@pytest.mark.parametrize("name", ["window", "stride"])
def test_what_is_no_extent_is_refused_at_once(name, wrong):
    with pytest.raises(InputError, match=f"{name} must be a whole number of at least 1"):
        Occlusion("y", **{name: wrong})


@pytest.mark.parametrize("name", ["window", "stride"])
def test_extents_of_unknown_keys_are_refused_when_prepared(name):
    with pytest.raises(KeyNotFoundError, match=r"'other' is not among the attributed keys: 'x'"):
        Occlusion("y", **{name: {"other": 1}}).prepare(nn.Linear(2, 1), ["x"], ["y"])


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"sigma": math.inf}, {"dims": 0}], ids=str)
def test_what_blurs_nothing_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Blurred(**options)
    with pytest.raises(InputError, match="no 2 dimensions"):
        Blurred()(torch.ones(3))
