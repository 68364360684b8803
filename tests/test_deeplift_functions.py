"""How differences pass through functions of several numbers, worked out by hand with pairs of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from method_references import Formula
from tdhook_like.attribution.deeplift import DeepLift

DOUBLE = torch.float64


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def explained(net: nn.Module, x: Tensor, baselines: Tensor) -> TensorDict:
    method = DeepLift("y", baselines=baselines, gap_tolerance=1e-9, unhandled="raise")
    with method.prepare(net, ["x"], ["y"]) as hooked:
        return hooked(TensorDict({"x": x}, x.shape[:1]))


def shares(x: list[float], x0: list[float], function: Callable[[Any], Any]) -> list[float]:
    """Attributions of ``function`` of duals: pairs of values and of linear shares of the inputs."""
    inputs = [Dual(a, b, {i: 1.0}) for i, (a, b) in enumerate(zip(x, x0, strict=True))]
    found = function(inputs)
    return [found.m.get(i, 0.0) * (a - b) for i, (a, b) in enumerate(zip(x, x0, strict=True))]


class Dual:
    """A number at the input, the same at the baseline, and its multipliers of the inputs."""

    def __init__(self, x: float, x0: float, m: dict[int, float]) -> None:
        self.x, self.x0, self.m = x, x0, m

    def scaled(self, x: float, x0: float, factor: float) -> Dual:
        return Dual(x, x0, {i: factor * v for i, v in self.m.items()})

    def __add__(self, other: Dual | float) -> Dual:
        if isinstance(other, float):
            return self.scaled(self.x + other, self.x0 + other, 1.0)
        m = {i: self.m.get(i, 0.0) + other.m.get(i, 0.0) for i in {*self.m, *other.m}}
        return Dual(self.x + other.x, self.x0 + other.x0, m)

    def __mul__(self, other: Dual | float) -> Dual:
        if isinstance(other, float):
            return self.scaled(self.x * other, self.x0 * other, other)
        here = self.scaled(0.0, 0.0, (other.x + other.x0) / 2)
        there = other.scaled(0.0, 0.0, (self.x + self.x0) / 2)
        return Dual(self.x * other.x, self.x0 * other.x0, (here + there).m)

    def map(self, f: Callable[[float], float]) -> Dual:
        y, y0 = f(self.x), f(self.x0)
        return self.scaled(y, y0, (y - y0) / (self.x - self.x0))


def total(values: list[Dual]) -> Dual:
    found = values[0]
    for value in values[1:]:
        found = found + value
    return found


def softmax_by_hand(z: list[Dual], which: int) -> Dual:
    log = total([v.map(math.exp) for v in z]).map(math.log)
    return (z[which] + log * -1.0).map(math.exp)


def norm_by_hand(z: list[Dual], which: int, eps: float = 1e-5, centre: bool = True) -> Dual:
    n = len(z)
    mean = total(z) * (-1 / n)
    d = [v + mean for v in z] if centre else z
    power = total([v.map(lambda t: t * t) for v in d]) * (1 / n) + eps
    return d[which] * power.map(lambda t: t**-0.5)


def largest_by_hand(z: list[Dual]) -> Dual:
    p, q = max(z, key=lambda v: v.x), max(z, key=lambda v: v.x0)
    carrier = p if p.x >= q.x0 else q
    return carrier.scaled(p.x, q.x0, (p.x - q.x0) / (carrier.x - carrier.x0))


BY_HAND: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[list[Dual]], Dual]]] = {
    "softmax": (lambda x: F.softmax(x, -1)[..., 1], lambda z: softmax_by_hand(z, 1)),
    "x.softmax": (lambda x: x.softmax(dim=-1)[..., 0], lambda z: softmax_by_hand(z, 0)),
    "log_softmax": (
        lambda x: F.log_softmax(x, -1)[..., 1],
        lambda z: z[1] + total([v.map(math.exp) for v in z]).map(math.log) * -1.0,
    ),
    "logsumexp": (
        lambda x: torch.logsumexp(x, -1),
        lambda z: total([v.map(math.exp) for v in z]).map(math.log),
    ),
    "layer_norm": (lambda x: F.layer_norm(x, (4,))[..., 2], lambda z: norm_by_hand(z, 2)),
    "rms_norm": (
        lambda x: F.rms_norm(x, (4,), eps=1e-5)[..., 2],
        lambda z: norm_by_hand(z, 2, centre=False),
    ),
    "quotient": (
        lambda x: x[..., 0].exp() / x[..., 1].cosh(),
        lambda z: z[0].map(math.exp) * z[1].map(math.cosh).map(lambda t: 1 / t),
    ),
    "max": (lambda x: x.max(-1).values, largest_by_hand),
    "amax": (lambda x: x.amax(-1), largest_by_hand),
    "max_pool1d": (lambda x: F.max_pool1d(x.unsqueeze(-2), 4).flatten(-2)[..., 0], largest_by_hand),
    "maximum": (
        lambda x: torch.maximum(x[..., 0], x[..., 1] * x[..., 2]),
        lambda z: largest_by_hand([z[0], z[1] * z[2]]),
    ),
    "min": (
        lambda x: x.amin(-1),
        lambda z: largest_by_hand([v * -1.0 for v in z]) * -1.0,
    ),
    "norm": (
        lambda x: x.norm(dim=-1),
        lambda z: total([v.map(lambda t: t * t) for v in z]).map(math.sqrt),
    ),
    "glu": (
        lambda x: F.glu(x, -1)[..., 0],
        lambda z: z[0] * z[2].map(lambda t: 1 / (1 + math.exp(-t))),
    ),
    "where": (
        lambda x: torch.where(x > 0, x, 0.1 * x).sum(-1),
        lambda z: total([v.map(lambda t: t if t > 0 else 0.1 * t) for v in z]),
    ),
    "masked_fill": (
        lambda x: x.masked_fill(x < 0, 0.0).sum(-1),
        lambda z: total([v.map(lambda t: max(t, 0.0)) for v in z]),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_functions_of_several_numbers_are_shared_as_by_hand(name):
    function, by_hand = BY_HAND[name]
    x, base = rand(20, 4) * 1.5, rand(4)
    td = explained(Formula(function), x, baselines=base)
    for row in range(20):
        expected = shares(x[row].tolist(), base.tolist(), by_hand)
        torch.testing.assert_close(td["attr", "x"][row].tolist(), expected, rtol=1e-9, atol=1e-11)


def test_max_pooling_over_two_dimensions_is_that_of_each_window_by_hand():
    x, base = rand(3, 2, 4, 6), rand(2, 4, 6)
    weight = rand(2, 3, 4)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.MaxPool2d(2, stride=1, padding=1, dilation=2)

        def forward(self, x: Tensor) -> Tensor:
            return (
                self.pool(x) * weight[..., :, : self.pool(x).shape[-1]][:, : self.pool(x).shape[-2]]
            ).sum((-1, -2, -3))

    rows, columns = nn.MaxPool2d(2, 1, 1, 2)(x).shape[-2:]
    weight = rand(2, rows, columns)
    td = explained(Pooled(), x, baselines=base)
    expected = torch.zeros_like(x)
    for b in range(3):
        for c in range(2):
            for i in range(rows):
                for j in range(columns):
                    places = [
                        (r, s)
                        for r in (i - 1, i + 1)
                        for s in (j - 1, j + 1)
                        if 0 <= r < 4 and 0 <= s < 6
                    ]
                    p = max(places, key=lambda t: x[(b, c, *t)])
                    q = max(places, key=lambda t: base[(c, *t)])
                    y, y0 = x[(b, c, *p)], base[(c, *q)]
                    expected[(b, c, *(p if y >= y0 else q))] += weight[c, i, j] * (y - y0)
    torch.testing.assert_close(td["attr", "x"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("apart", [1.0, 20.0, 40.0, 200.0])
@pytest.mark.parametrize(
    "function", [F.softmax, F.log_softmax, F.softmin], ids=lambda function: function.__name__
)
def test_sums_of_exponentials_that_are_orders_of_magnitude_apart_keep_the_difference(
    function, apart
):
    class Weighed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (function(x, -1) * torch.tensor([1.0, 2.0, 3.0])).sum(-1, keepdim=True)

    x, x0 = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([apart, 0.0, 0.3])
    found = []
    for shift in (0.0, 3.0):  # no constant that all logits are shifted by has a part in it
        method = DeepLift("y", baselines=x0 + shift)
        with method.prepare(Weighed(), ["x"], ["y"]) as hooked:
            found.append(hooked(TensorDict({"x": x + shift}, [1]))["attr", "x"])
    change = (Weighed()(x) - Weighed()(x0))[:, 0]
    torch.testing.assert_close(found[0].sum(-1), change, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert found[0].abs().max() < 6 * max(apart, 1.0)
