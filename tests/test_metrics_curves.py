"""Deletion and insertion curves against slow loops and areas by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from explaining import BATCHES
from explaining import explained as measured
from method_references import DOUBLE, Formula, Joined
from tdhook_like import Each, InputXGradient
from tdhook_like.metrics import Deletion, Insertion, area
from tdhook_like.metrics.curves import first_ranks


def slow_curve(
    net: Any, x: Tensor, fill: Tensor, relevance: Tensor, counts: Any, comes: bool
) -> Any:
    """One element: features in order of relevance, as many as each step says, one step at a time."""
    order = sorted(range(len(x)), key=lambda i: (-relevance[i].item(), i))
    found = []
    for count in counts:
        point = (fill if comes else x).clone()
        for i in order[:count]:
            point[i] = x[i] if comes else fill[i]
        with torch.no_grad():
            found.append(net(point).item())
    return found


@pytest.mark.parametrize("kind", [Deletion, Insertion])
@pytest.mark.parametrize("n_steps", [3, 100])
@pytest.mark.parametrize("batch", BATCHES)
def test_features_of_all_keys_go_in_one_order(batch, n_steps, kind):
    net, fill = Joined([3, 2], 1).double(), torch.randn(5, dtype=DOUBLE)
    a, b = torch.randn(*batch, 3, dtype=DOUBLE), torch.randn(*batch, 2, dtype=DOUBLE)
    method = kind(
        InputXGradient("y"),
        fill={"a": fill[:3], "b": fill[3:]},
        n_steps=n_steps,
        internal_batch_size=4,
    )
    td = measured(method, net, batch, a=a, b=b)
    place = "deletion" if kind is Deletion else "insertion"
    counts = [0, 2, 3, 5] if n_steps == 3 else range(6)  # thirds of 5, rounded
    whole = lambda p: net(p[:3], p[3:])  # noqa: E731
    x, relevance = torch.cat([a, b], -1), torch.cat([td["attr", "a"], td["attr", "b"]], -1)
    curves = td[place].reshape(-1, len(counts))
    rows = zip(x.reshape(-1, 5), relevance.reshape(-1, 5), curves, strict=True)
    for one, rel, curve in rows:
        expected = slow_curve(whole, one, fill, rel, counts, kind is Insertion)
        torch.testing.assert_close(curve, torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=1e-10)


def test_whole_keys_go_in_the_order_of_their_sums():
    net = Formula(lambda a, b, c: a.sum(-1) + 10 * b.sum(-1) + 5 * c.sum(-1))
    inputs = {"a": torch.ones(2, 3), "b": torch.ones(2, 1), "c": torch.ones(2, 1)}
    td = measured(Deletion(InputXGradient("y"), by="keys"), net, (2,), **inputs)
    assert td["deletion"][0].tolist() == [18.0, 8.0, 3.0, 0.0]
    td = measured(Insertion(InputXGradient("y"), by="keys"), net, (2,), **inputs)
    assert td["insertion"][0].tolist() == [0.0, 10.0, 15.0, 18.0]


def test_sizes_count_if_asked_and_equal_features_keep_their_order():
    net = Formula(lambda x: x @ torch.tensor([1.0, -5.0, 1.0]))
    x = torch.ones(1, 3)
    signed = measured(Deletion(InputXGradient("y")), net, (1,), x=x)["deletion"]
    sizes = measured(Deletion(InputXGradient("y"), absolute=True), net, (1,), x=x)["deletion"]
    assert signed[0].tolist() == [-3.0, -4.0, -5.0, 0.0]
    assert sizes[0].tolist() == [-3.0, 2.0, 1.0, 0.0]


def test_each_target_has_the_curve_of_its_own_order():
    net, x = Joined([4], 3).double(), torch.randn(5, 4, dtype=DOUBLE)
    td = measured(Deletion(InputXGradient(Each("y"))), net, (5,), x=x)
    named = {"a": ("y", 0), "b": ("y", 2)}
    both = measured(Deletion(InputXGradient(named), internal_batch_size=7), net, (5,), x=x)
    assert td["deletion"].shape == (5, 3, 5)
    for i, name in ((0, "a"), (2, "b")):
        alone = measured(Deletion(InputXGradient(("y", i))), net, (5,), x=x)["deletion"]
        torch.testing.assert_close(td["deletion"][:, i], alone)
        torch.testing.assert_close(both["deletion", name], alone)


def test_the_area_is_that_of_the_broken_line():
    curve = torch.tensor([[3.0, 1.0, 1.0], [0.0, 4.0, 0.0]], dtype=DOUBLE)
    torch.testing.assert_close(area(curve), torch.tensor([1.5, 2.0], dtype=DOUBLE))


def test_a_good_order_has_a_smaller_deletion_area_than_a_bad_one():
    weights = torch.arange(10.0, dtype=DOUBLE)
    net, x = Formula(lambda x: x @ weights), torch.rand(6, 10, dtype=DOUBLE)
    good = measured(Deletion(InputXGradient("y")), net, (6,), x=x)["deletion"]
    # Relevance turned upside down: the least relevant features go first.
    bad = measured(Deletion(InputXGradient(lambda td: -td["y"]), target="y"), net, (6,), x=x)
    assert torch.equal(bad["deletion"], good)  # the measure's target is the method's, too
    order = (x * weights).argsort(-1)
    worst = torch.stack(
        [
            torch.stack([(row * weights)[o[k:]].sum() for k in range(11)])
            for row, o in zip(x, order, strict=True)
        ]
    )
    assert (area(good) < area(worst)).all()


def test_ranks_of_keys_are_shared_by_their_features():
    values = [torch.tensor([[1.0, 1.0]]), torch.tensor([[5.0]]), torch.tensor([[0.0, 1.0]])]
    ranks, count = first_ranks(values, 1, "keys")
    assert count == 3 and [r.tolist() for r in ranks] == [[[1, 1]], [[0]], [[2, 2]]]
