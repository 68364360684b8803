"""Values at the input beside those at the baseline, and the two rules that everything is made of.

Elementwise functions are *rescaled* (Shrikumar et al. 2017, section 3.4, eq. 8): the multiplier is
``Δy / Δx``. Products of two things that both change are shared evenly between the two orders of
changing them, ``ab − a⁰b⁰ = ½(b + b⁰) Δa + ½(a + a⁰) Δb``. With sums, which are linear, these make
softmax, normalisations and norms, and each composition keeps the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tdhook_like.hooks.surrogate import attach, constant

__all__ = ["Pair", "multiplier", "near", "rescaled"]

Map = Callable[[Tensor], Tensor]


def tolerance(dtype: torch.dtype) -> float:
    """What share of its size a difference may be to count as none.

    Below it, the slope of a smooth function is nearer to its multiplier than the quotient of two
    differences that have lost their digits; both are off by about this much there.

    >>> tolerance(torch.float64) < 2e-8
    True
    """
    return math.sqrt(torch.finfo(dtype).eps)


def near(x: Tensor, x0: Tensor, scale: float = 1.0) -> Tensor:
    """Where so little changes that a function's slope is taken for its multiplier.

    Args:
        x: At the input.
        x0: At the baseline.
        scale: Over how much of its argument the function bends at least; 0 for one that bends the
            more sharply the nearer to zero (a kink, a power), where differences are relative.

    >>> near(torch.tensor([1.0, 1e-9]), torch.tensor([2.0, 0.0]))
    tensor([False,  True])
    """
    size = torch.maximum(x.abs(), x0.abs())
    size = size.clamp(min=scale) if scale else size
    return ~((x - x0).abs() > tolerance(x.dtype) * size)


def multiplier(change: Tensor, of: Tensor, still: Tensor, slope: Tensor | float) -> Tensor:
    """``change / of``, the slope where nothing changes.

    >>> multiplier(*torch.tensor([[8.0, 0.0], [2.0, 0.0]]), torch.tensor([False, True]), 6.0)
    tensor([4., 6.])
    """
    quotient = (change / of.masked_fill(still, 1.0)).nan_to_num(nan=0.0)
    return torch.where(still, slope, quotient)


def rescaled(x: Tensor, x0: Tensor, change: Tensor, function: Map, scale: float) -> Tensor:
    """A surrogate of an elementwise function, whose gradient is the multiplier.

    Args:
        x: At the input, with its graph.
        x0: At the baseline.
        change: What the function's result changes by.
        function: The function, for its slope where nothing changes.
        scale: See :func:`near`.
    """
    here = constant(x)
    still = near(here, x0, scale)
    # Elsewhere the function is looked at where no usual one has an infinite slope: 0 · ∞ is not 0.
    flat = function(torch.where(still, x, 0.5))
    return torch.where(still, flat, x * multiplier(change, here - x0, still, 0.0))


class Pair(NamedTuple):
    """A value at the input, with its graph, and at the baseline.

    >>> a = torch.tensor(3.0, requires_grad=True)
    >>> y = Pair(a, torch.tensor(1.0)).map(torch.square) * Pair(a, torch.tensor(1.0))
    >>> y.x.item(), y.x0.item(), torch.autograd.grad(y.x, a)[0].item()
    (27.0, 1.0, 13.0)
    """

    x: Tensor
    x0: Tensor

    def map(self, function: Map, scale: float = 1.0) -> Pair:
        """An elementwise function, rescaled."""
        y, y0 = function(constant(self.x)), function(self.x0)
        return Pair(attach(y, rescaled(self.x, self.x0, y - y0, function, scale), fresh=True), y0)

    def linear(self, function: Map) -> Pair:
        """A linear function."""
        return Pair(function(self.x), function(self.x0))

    def __mul__(self, other: Pair) -> Pair:  # pyright: ignore[reportIncompatibleMethodOverride]
        here = constant(self.x) * constant(other.x)
        mean, others = (self.x + self.x0) * 0.5, (other.x + other.x0) * 0.5
        shared = self.x * constant(others) + constant(mean) * other.x
        return Pair(attach(here, shared, fresh=True), self.x0 * other.x0)
