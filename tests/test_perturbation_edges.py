"""Perturbation methods at the edges: keys without features, windows that span a dimension."""

from __future__ import annotations

import torch
from torch import nn

from explaining import explained
from method_references import DOUBLE, Formula
from tdhook_like.attribution.occlusion import Occlusion
from tdhook_like.attribution.shapley import ShapleyValues


def test_a_key_without_features_is_no_group():
    net = Formula(lambda a, b: 3 * a.sum(-1) + b.sum(-1))
    inputs = {"a": torch.randn(4, 2, dtype=DOUBLE), "b": torch.zeros(4, 0, dtype=DOUBLE)}
    # Two groups would be one too many.
    td = explained(ShapleyValues("y", groups="keys", max_groups=1), net, (4,), **inputs)
    torch.testing.assert_close(td["attr", "a"].sum(-1), 3 * inputs["a"].sum(-1))
    assert td["attr", "b"].shape == (4, 0)


def test_a_stride_has_no_say_where_the_window_spans_a_dimension():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(8, 1)).double(), torch.randn(3, 2, 4).double()
    far, near = (
        explained(Occlusion("y", window=(2, 2), stride=stride), net, (3,), x=x)["attr", "x"]
        for stride in ((5, 2), (1, 2))
    )
    assert torch.equal(far, near)
    weight = net[1].weight.detach().reshape(2, 4)
    loss = (weight * x).unflatten(-1, (2, 2)).sum((1, 3))  # of two windows side by side
    torch.testing.assert_close(near, loss.repeat_interleave(2, -1).unsqueeze(1).expand(3, 2, 4))
