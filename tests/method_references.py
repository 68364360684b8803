"""Methods a second time: one element, one group, one evaluation after another.

Slow and plain, in float64, from the papers' formulas; nothing of the library is called. A *game* is a
function from the set of groups that are present to a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

DOUBLE = torch.float64
Game = Callable[[frozenset[int]], float]


# --- models -----------------------------------------------------------------------------------------


class Formula(nn.Module):
    """Any function of tensors as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)


class Seen:
    """The shapes that a model is called with. Not a list: a copied model shall write here too."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []


class Joined(nn.Module):
    """A small network over the features of several keys, with interactions of all orders."""

    def __init__(
        self, sizes: Sequence[int], outputs: int, dims: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(sum(sizes) + outputs)
        self.dims = list(dims or [1] * len(sizes))
        self.first, self.second = nn.Linear(sum(sizes), 7), nn.Linear(7, outputs)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7, generator=generator)
        self.seen = Seen()

    def forward(self, *x: Tensor) -> Tensor:
        self.seen.shapes.append(tuple(x[0].shape))
        flat = [t.flatten(-d) for t, d in zip(x, self.dims, strict=True)]
        return self.second(torch.tanh(self.first(torch.cat(flat, -1))))


def module(net: nn.Module, keys: Sequence[Any], dtype: torch.dtype = DOUBLE) -> TensorDictModule:
    return TensorDictModule(net.to(dtype), list(keys), ["y"])


# --- games ------------------------------------------------------------------------------------------


def game(
    net: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    baselines: Sequence[Tensor],
    ids: Sequence[Tensor],
    output: int = 0,
) -> Game:
    """The game of one element: what ``net`` gives where only some groups are as they are.

    Args:
        net: From one element's tensors ``[*F]`` to ``[outputs]``.
        inputs: ``[*F]`` for each key.
        baselines: Of the same shapes.
        ids: The group of every feature, of the same shapes.
        output: Which output is the score.
    """

    def worth(present: frozenset[int]) -> float:
        points = []
        for x, b, group in zip(inputs, baselines, ids, strict=True):
            point = b.double().clone()
            for place in itertools.product(*map(range, x.shape)):
                if int(group[place]) in present:
                    point[place] = x[place]
            points.append(point)
        with torch.no_grad():
            return float(net(*points)[output])

    return worth


def ablation(worth: Game, n: int) -> list[float]:
    everybody = frozenset(range(n))
    return [worth(everybody) - worth(everybody - {g}) for g in range(n)]


def shapley(worth: Game, n: int) -> list[float]:
    """By the definition: over all orders, what each adds to those before it."""
    values = {
        frozenset(s): worth(frozenset(s))
        for size in range(n + 1)
        for s in itertools.combinations(range(n), size)
    }
    found = [0.0] * n
    for order in itertools.permutations(range(n)):
        before: frozenset[int] = frozenset()
        for g in order:
            found[g] += values[before | {g}] - values[before]
            before |= {g}
    return [total / math.factorial(n) for total in found]


def lime(worth: Game, n: int, kernel_width: float, ridge: float, samples: int) -> list[float]:
    """Ridge regression on all coalitions, each as often as it would be drawn, by one big solve."""
    rows, targets, weights = [], [], []
    for size in range(n + 1):
        for members in itertools.combinations(range(n), size):
            rows.append([1.0 if g in members else 0.0 for g in range(n)] + [1.0])
            targets.append(worth(frozenset(members)))
            distance = 1 - math.sqrt(size / n)
            often = samples / (n + 1) / math.comb(n, size)
            weights.append(often * math.exp(-(distance**2) / kernel_width**2))
    design, y = torch.tensor(rows, dtype=DOUBLE), torch.tensor(targets, dtype=DOUBLE)
    root = torch.tensor(weights, dtype=DOUBLE).sqrt()
    # Ridge regression is least squares with a row for each penalty.
    penalty = torch.eye(n + 1, dtype=DOUBLE)[:n] * math.sqrt(ridge)
    design = torch.cat([design * root.unsqueeze(1), penalty])
    y = torch.cat([y * root, torch.zeros(n, dtype=DOUBLE)])
    return torch.linalg.lstsq(design, y.unsqueeze(1), driver="gelsd").solution[:n, 0].tolist()


# --- windows and permutations -----------------------------------------------------------------------


def occlusion(
    net: Callable[[Tensor], Tensor],
    x: Tensor,
    baseline: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    output: int = 0,
) -> Tensor:
    """Of one element of one key: every window covered in turn, changes averaged where they overlap."""
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    starts = []
    for n, size, step in zip(x.shape, window, stride, strict=True):
        starts.append([0])
        while starts[-1][-1] + size < n:
            starts[-1].append(starts[-1][-1] + step)
    with torch.no_grad():
        for corner in itertools.product(*starts):
            place = tuple(slice(c, c + size) for c, size in zip(corner, window, strict=True))
            point = x.clone()
            point[place] = baseline[place]
            total[place] += net(x)[output] - net(point)[output]
            count[place] += 1
    return total / count


def permutation(
    net: Callable[[Tensor], Tensor], x: Tensor, ids: Tensor, n: int, output: int = 0
) -> Tensor:
    """The mean over all orders of a batch: for each group and element ``[n, B]``."""
    batch = len(x)
    found = torch.zeros(n, batch, dtype=DOUBLE)
    orders = list(itertools.permutations(range(batch)))
    with torch.no_grad():
        for g, order in itertools.product(range(n), orders):
            point = torch.where(ids == g, x[list(order)], x)
            found[g] += (net(x) - net(point))[:, output]
    return found / len(orders)


# --- paths ------------------------------------------------------------------------------------------


def integrated(
    net: Any, x: list[Tensor], b: list[Tensor], output: int, n: int = 400
) -> list[Tensor]:
    """Integrated gradients by a midpoint sum, one point after another."""
    total = [torch.zeros_like(t) for t in x]
    for i in range(n):
        t = (i + 0.5) / n
        point = [(u + t * (v - u)).requires_grad_() for u, v in zip(b, x, strict=True)]
        grads = torch.autograd.grad(net(*point)[..., output].sum(), point)
        total = [s + g / n for s, g in zip(total, grads, strict=True)]
    return [s * (v - u) for s, u, v in zip(total, b, x, strict=True)]
