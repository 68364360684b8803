"""Attributions of chains of layers, carried back step by step from the papers' formulas.

A *chain* is a list of steps between one vector and the next: a matrix with a bias, a function of one
number, or a factor. One sample at a time, in float64, without autograd; nothing of the library is
called. What the steps' back-ends carry is a slope, a multiplier or a relevance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Dense:
    """``z = W x + b``."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum(1) + self.bias


@dataclass(frozen=True)
class Bent:
    """A function of one number, ``"relu"`` or ``"tanh"``."""

    name: str

    def __call__(self, x: Tensor) -> Tensor:
        return x * (x > 0) if self.name == "relu" else (x.exp() - (-x).exp()) / (2 * x.cosh())

    def slope(self, x: Tensor) -> Tensor:
        return (x > 0).to(x) if self.name == "relu" else 1 / x.cosh() ** 2


@dataclass(frozen=True)
class Times:
    """A factor that has nothing to do with the input."""

    factor: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.factor * x


Chain = list[Dense | Bent | Times]


def followed(chain: Chain, x: Tensor) -> list[Tensor]:
    """The vectors before every step, and the last one's."""
    seen = [x]
    for step in chain:
        seen.append(step(seen[-1]))
    return seen


def score(chain: Chain, output: int) -> Score:
    return lambda x: followed(chain, x)[-1][output]


def carried(
    chain: Chain, x: Tensor, output: int, bend: Callable[[Bent, Tensor, Tensor, int], Tensor]
) -> Tensor:
    """A slope from an output back to the input, ``bend`` saying what functions do to it."""
    seen = followed(chain, x)
    g = torch.zeros_like(seen[-1])
    g[output] = 1.0
    for i, step in reversed(list(enumerate(chain))):
        if isinstance(step, Dense):
            g = (g.unsqueeze(1) * step.weight).sum(0)
        elif isinstance(step, Times):
            g = step.factor * g
        else:
            g = bend(step, seen[i], g, i)
    return g


def gradient(chain: Chain, x: Tensor, output: int) -> Tensor:
    return carried(chain, x, output, lambda step, z, g, i: step.slope(z) * g)


def guided(chain: Chain, x: Tensor, output: int) -> Tensor:
    """Springenberg et al. 2015: ``(z > 0) · (g > 0) · g`` at ReLUs."""

    def bend(step: Bent, z: Tensor, g: Tensor, i: int) -> Tensor:
        return (z > 0) * g.clamp(min=0) if step.name == "relu" else step.slope(z) * g

    return carried(chain, x, output, bend)


def deconvolution(chain: Chain, x: Tensor, output: int) -> Tensor:
    """Zeiler & Fergus 2014: ``(g > 0) · g`` at ReLUs."""

    def bend(step: Bent, z: Tensor, g: Tensor, i: int) -> Tensor:
        return g.clamp(min=0) if step.name == "relu" else step.slope(z) * g

    return carried(chain, x, output, bend)


def deeplift(chain: Chain, x: Tensor, base: Tensor, output: int) -> Tensor:
    """Shrikumar et al. 2017, section 3.4: ``Δy / Δz`` at every function of one number.

    Where nothing changes, the slope.
    """
    there = followed(chain, base)

    def bend(step: Bent, z: Tensor, g: Tensor, i: int) -> Tensor:
        change = z - there[i]
        return g * torch.where(change == 0, step.slope(z), (step(z) - step(there[i])) / change)

    return carried(chain, x, output, bend) * (x - base)


def relevance(chain: Chain, x: Tensor, output: int, epsilon: float) -> Tensor:
    """Bach et al. 2015, eq. 58: epsilon on matrices; functions of one number pass relevance on."""
    seen = followed(chain, x)
    R = torch.zeros_like(seen[-1])
    R[output] = seen[-1][output]
    for i, step in reversed(list(enumerate(chain))):
        if isinstance(step, Dense):
            z = seen[i + 1]
            share = R / (z + epsilon * torch.where(z >= 0, 1.0, -1.0))
            R = (seen[i] * step.weight * share.unsqueeze(1)).sum(0)
    return R


def integrated(chain: Chain, x: Tensor, base: Tensor, output: int, n: int) -> Tensor:
    """Sundararajan et al. 2017, eq. 3, at the middles of n steps."""
    total = torch.zeros_like(x)
    for k in range(n):
        total = total + gradient(chain, base + (k + 0.5) / n * (x - base), output)
    return (x - base) * total / n


def ablated(f: Score, x: Tensor, base: Tensor) -> Tensor:
    found = torch.zeros_like(x)
    for i in range(len(x)):
        changed = x.clone()
        changed[i] = base[i]
        found[i] = f(x) - f(changed)
    return found


def occluded(f: Score, x: Tensor, base: Tensor, parts: list[range], window: int) -> Tensor:
    """Zeiler & Fergus 2014: the mean over the windows that cover a feature; parts one by one."""
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    for part in parts:
        for start in range(part.start, part.stop - window + 1):
            changed = x.clone()
            changed[start : start + window] = base[start : start + window]
            total[start : start + window] += f(x) - f(changed)
            count[start : start + window] += 1
    return total / count


def shapley(f: Score, x: Tensor, base: Tensor) -> Tensor:
    """Shapley 1953: what each feature adds, over all orders."""
    found = torch.zeros_like(x)
    for order in itertools.permutations(range(len(x))):
        reached = base.clone()
        for i in order:
            before = f(reached)
            reached[i] = x[i]
            found[i] += f(reached) - before
    return found / math.factorial(len(x))
