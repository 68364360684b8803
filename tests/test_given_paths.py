"""Integrated gradients along paths of one's own: closed forms and a slow sum."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from explaining import BATCHES, explained
from method_references import DOUBLE, Formula, Joined, integrated
from tdhook_like import IntegratedGradients
from tdhook_like.attribution.given_path import PathIntegratedGradients


def test_a_straight_path_is_integrated_gradients():
    net, x = Joined([3, 2], 2).double(), torch.randn(4, 3, dtype=DOUBLE)
    b, z = torch.randn(4, 2, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    path = {"a": z[None], "b": torch.zeros(1, 2, dtype=DOUBLE)}
    td = explained(PathIntegratedGradients(("y", 0), path=path), net, (4,), a=x, b=b)
    same = explained(IntegratedGradients(("y", 0), baselines={"a": z}), net, (4,), a=x, b=b)
    for key in "ab":
        torch.testing.assert_close(td["attr", key], same["attr", key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch", BATCHES)
def test_way_points_are_gone_through_piece_by_piece(batch):
    net, x = Joined([3], 1).double(), torch.randn(*batch, 3, dtype=DOUBLE)
    stops = torch.randn(3, *batch, 3, dtype=DOUBLE)
    method = PathIntegratedGradients("y", path=stops, n_steps=40, internal_batch_size=7)
    td = explained(method, net, batch, x=x)
    ends = [*stops, x]
    pieces = [integrated(net, [b], [a], 0, n=3000)[0] for a, b in pairwise(ends)]
    torch.testing.assert_close(td["attr", "x"], sum(pieces), rtol=0, atol=1e-6)
    change = (net(x) - net(stops[0]))[..., 0].detach()
    torch.testing.assert_close(td["attr", "x"].sum(-1), change, rtol=0, atol=1e-9)
    assert td["attr_gap"].abs().max() < 1e-9


def test_way_points_may_be_alike_for_all_elements():
    net, x = Joined([3], 1).double(), torch.randn(2, 3, dtype=DOUBLE)
    stops = torch.randn(2, 3, dtype=DOUBLE)  # as many as elements, which they are none the less not
    alike, each = (
        explained(PathIntegratedGradients("y", path=given), net, (2,), x=x)["attr", "x"]
        for given in (stops, stops.unsqueeze(1).expand(2, 2, 3))
    )
    torch.testing.assert_close(alike, each, rtol=0, atol=1e-12)


def test_a_falling_score_along_the_path_is_no_gap():
    net, x = Formula(lambda x: -x.square().sum(-1)), torch.rand(4, 3) + 1
    method = PathIntegratedGradients("y", path=torch.zeros(1, 3), gap_tolerance=1e-3)
    td = explained(method, net, (4,), x=x)  # a warning would be an error
    torch.testing.assert_close(td["attr", "x"], -x.square(), rtol=1e-4, atol=1e-5)


def test_a_function_that_stays_at_the_input_moves_nothing():
    net, x = Joined([3], 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    method = PathIntegratedGradients("y", path=lambda times, x: x.expand(len(times), *x.shape))
    assert not explained(method, net, (4,), x=x)["attr", "x"].any()


def test_of_a_product_the_path_decides_who_gets_it():
    a, b = torch.rand(5, 1, dtype=DOUBLE), torch.rand(5, 1, dtype=DOUBLE)
    product = Formula(lambda a, b: a * b)

    def bent(times: Tensor, x: Tensor) -> Tensor:  # t²: slow first
        return times.reshape(-1, *[1] * x.ndim) ** 2 * x

    def straight(times: Tensor, x: Tensor) -> Tensor:
        return times.reshape(-1, *[1] * x.ndim) * x

    td = explained(
        PathIntegratedGradients("y", path={"a": bent, "b": straight}), product, (5,), a=a, b=b
    )
    # ∫ t · 2t dt = 2/3 to a, ∫ t² dt = 1/3 to b
    torch.testing.assert_close(td["attr", "a"], 2 / 3 * a * b, rtol=0, atol=1e-10)
    torch.testing.assert_close(td["attr", "b"], 1 / 3 * a * b, rtol=0, atol=1e-10)


def test_keys_that_do_not_move_get_nothing():
    net, x = Joined([3, 2], 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    b = torch.randn(4, 2, dtype=DOUBLE)
    method = PathIntegratedGradients("y", path={"a": torch.zeros(1, 3)})
    td = explained(method, net, (4,), a=x, b=b)
    expected, _ = integrated(net, [x, b], [torch.zeros_like(x), b], 0, n=2000)
    torch.testing.assert_close(td["attr", "a"], expected, rtol=0, atol=1e-6)
    assert not td["attr", "b"].any()
