"""Modules and functions that work in place, under rules and behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference_lrp as ref
from pristine import bits
from rule_records import AFFINE_RULES
from rule_samples import assert_close, explain, grid, made, on_dense, only
from tdhook_like.attribution.lrp import (
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    RuleMapper,
)
from tdhook_like.errors import RuleError


class InPlace(nn.Module):
    """An in-place activation and in-place functions behind a ruled layer."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.first, self.last, self.by = nn.Linear(4, 5), nn.Linear(5, 2), by
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.by == "keyword":
            h = self.relu(input=h)
        elif self.by == "function":
            F.relu_(h)
        elif self.by == "method":
            h.mul_(2).clamp_(min=0)
            h *= 0.5
        else:
            self.relu(h)  # the caller goes on with what was overwritten
        return self.last(h)


RULED = {"epsilon": AFFINE_RULES["epsilon"], "gamma": AFFINE_RULES["gamma"]}


@pytest.mark.parametrize("name", RULED)
@pytest.mark.parametrize("by", ["module", "function", "method", "keyword"])
def test_what_works_in_place_behind_a_rule_gives_what_a_copy_gives(by: str, name: str):
    rule, reference = RULED[name]
    net = made("in place", lambda: InPlace(by))
    x, R = grid((2, 4), "x"), grid((2, 2), "R") + 0.125
    want = ref.propagate([net.first, nn.ReLU(), net.last], x, R, [reference, None, reference])
    kept = x.clone()
    mapper: RuleMapper = lambda name, m: rule if name in ("first", "last") else None  # noqa: E731
    for mapped in (mapper, on_dense(rule)) if by == "module" else (mapper,):
        found, y = explain(net, mapped, [x], R)
        assert_close(found[0], want, 1e-9)
    assert bits(y) == bits(net(x)) and x.equal(kept)


def test_a_rule_on_a_module_that_overwrites_its_keyword_argument_says_so():
    net, R = made("keyword", lambda: InPlace("keyword")), torch.ones(2, 2)
    with pytest.raises(RuleError, match=r"'relu'.*positional"):
        explain(net, only(net.relu, EpsilonRule()), [grid((2, 4), "x")], R)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardtanh, nn.Dropout])
@pytest.mark.parametrize("feeding", [False, True])
def test_an_activation_in_place_passes_relevance_as_its_twin_does(kind: Any, feeding: bool):
    net = made("twin", lambda: nn.Sequential(nn.Linear(4, 6), kind(inplace=True), nn.Linear(6, 2)))
    x, R = grid((3, 4), "x"), grid((3, 2), "R") + 0.125
    last = FlatRule() if feeding else EpsilonRule()
    mapper = EpsilonPlus(rule_mapper=lambda name, m: last if name == "2" else None)
    net.eval()
    in_place = explain(net, mapper, [x], R)[0][0]
    net[1].inplace = False
    assert_close(in_place, explain(net, mapper, [x], R)[0][0], 1e-12)
    assert in_place.any()
