"""Sums without weights: shared by contribution, whatever the pooling is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rule_samples import Sum, assert_close, explain, grid, only
from tdhook_like.attribution.lrp import EpsilonPlus, Rule
from tdhook_like.attribution.lrp.rules.pooling import NormRule
from tdhook_like.errors import RuleError


def relevance(module: nn.Module, x: Tensor, R: Tensor, rule: Rule | None = None) -> Tensor:
    return explain(module, only(module, rule or NormRule(1e-13)), [x], R)[0][0]


POOLS = (
    *(nn.AvgPool1d(4), nn.LPPool1d(2, 4), nn.AdaptiveAvgPool1d(1)),
    *(nn.AvgPool2d(2), nn.LPPool2d(3, 2), nn.AdaptiveAvgPool2d(1)),
    *(nn.AvgPool3d((1, 2, 2)), nn.LPPool3d(2, (1, 2, 2)), nn.AdaptiveAvgPool3d(1)),
)


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_a_window_shares_in_proportion_to_its_entries(pool: Any):
    rank = next(n for n in (1, 2, 3) if f"{n}d" in type(pool).__name__)
    shape = (1, 1, *{1: (4,), 2: (2, 2), 3: (1, 2, 2)}[rank])
    x = torch.tensor([1.0, 2.0, 0.0, 5.0], dtype=torch.float64).reshape(shape)
    R = torch.full(pool(x).shape, 16.0)
    assert relevance(pool, x, R).flatten().tolist() == pytest.approx([2.0, 4.0, 0.0, 10.0])


def test_powers_are_pooled_by_what_is_pooled_and_not_by_their_powers():
    x = torch.tensor([[[1.0, 3.0]]], dtype=torch.float64)
    by_rule = relevance(nn.LPPool1d(2, 2), x, torch.ones(1, 1, 1))
    by_gradient = explain(nn.LPPool1d(2, 2), lambda n, m: None, [x], torch.ones(1, 1, 1))[0][0]
    assert by_rule.flatten().tolist() == pytest.approx([1 / 4, 3 / 4])
    assert by_gradient.flatten().tolist() == pytest.approx([1 / 10, 9 / 10])


def test_an_operand_that_nothing_flows_through_absorbs_its_share():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sum = Sum()
            self.register_buffer("shift", torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.sum(x, self.shift)

    net = Shifted()
    x = torch.tensor([[1.0, 2.0, 1.0]])
    found = explain(net, only(net.sum, NormRule(1e-13)), [x], torch.tensor([[2.0, 2.0, 4.0]]))[0][0]
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 1.0]]))


def test_what_cancels_is_absorbed_by_the_stabiliser_alone():
    pool, x = nn.AvgPool1d(2), torch.tensor([[[1.0, -1.0, 2.0, 2.0]]])
    found = relevance(pool, x, torch.tensor([[[0.0, 4.0]]]), NormRule(2.0))
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]))


@pytest.mark.parametrize(
    "module",
    [nn.Linear(2, 2), nn.PReLU(), nn.MaxPool2d(2), nn.AdaptiveMaxPool1d(1)],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_sum_is_refused_with_what_to_use(module: nn.Module):
    with pytest.raises(RuleError, match=r"cannot sit on .*Use (EpsilonRule|IgnoreRule)"):
        NormRule().register(module)


def test_the_rule_goes_with_a_mapper_on_pooling_and_on_residual_sums():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.sum = nn.Conv1d(2, 2, 3, padding=1).double(), Sum()
            self.pool = nn.AdaptiveAvgPool1d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.sum(x, self.conv(x))).flatten(1)

    net, x, R = Residual(), grid((2, 2, 5), "x"), grid((2, 2), "R") + 0.125
    rule = NormRule()
    ruled = EpsilonPlus(rule_mapper=lambda name, m: rule if name in ("sum", "pool") else None)
    # Sums and averages are linear: their gradient is the rule, up to what the stabiliser takes.
    assert_close(explain(net, ruled, [x], R)[0][0], explain(net, EpsilonPlus(), [x], R)[0][0], 1e-3)
