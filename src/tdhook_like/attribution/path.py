"""Methods along a path from a baseline: integrated gradients and its quadratures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite
from typing import ClassVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.method import Attribution, PathMethod
from tdhook_like.baselines import BaselineSpec
from tdhook_like.errors import InputError, TargetError
from tdhook_like.score import Score

__all__ = ["IntegratedGradients", "quadrature"]

QUADRATURES = (
    "gausslegendre",
    "riemann_middle",
    "riemann_left",
    "riemann_right",
    "riemann_trapezoid",
)


@lru_cache(maxsize=64, typed=True)
def quadrature(method: str, n: int) -> tuple[Tensor, Tensor]:
    """Nodes in [0, 1] and weights that sum to one, both ``[n]`` in float64.

    Args:
        method: ``"gausslegendre"``, ``"riemann_middle"``, ``"riemann_left"``, ``"riemann_right"`` or
            ``"riemann_trapezoid"``.
        n: The number of nodes, at least 1 (2 for the trapezoid).

    Raises:
        InputError: If the method is unknown or ``n`` too small.

    >>> nodes, weights = quadrature("riemann_trapezoid", 3)
    >>> nodes.tolist(), weights.tolist()
    ([0.0, 0.5, 1.0], [0.25, 0.5, 0.25])
    """
    if method not in QUADRATURES:
        raise InputError(f"Unknown quadrature {method!r}: choose one of {', '.join(QUADRATURES)}.")
    least = 2 if method == "riemann_trapezoid" else 1
    if isinstance(n, bool) or not isinstance(n, int) or n < least:
        raise InputError(f"n_steps must be a whole number of at least {least}, got {n!r}.")
    if method == "gausslegendre":
        return _gauss_legendre(n)
    steps = torch.arange(n, dtype=torch.float64)
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    if method == "riemann_trapezoid":
        weights = torch.full((n,), 1 / (n - 1), dtype=torch.float64)
        weights[0] = weights[-1] = 0.5 / (n - 1)
        return steps / (n - 1), weights
    offset = {"riemann_left": 0.0, "riemann_middle": 0.5, "riemann_right": 1.0}[method]
    return (steps + offset) / n, weights


_LARGE = 2**13
"""Numbers in all inputs together from which a model's run outweighs what surrounds it."""

_ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)


@lru_cache(maxsize=64, typed=True)
def _with_ends(method: str, n: int) -> tuple[Tensor, Tensor]:
    """The nodes behind both ends of the path, which have no weight."""
    nodes, weights = quadrature(method, n)
    return torch.cat([_ENDS, nodes]), torch.cat([torch.zeros_like(_ENDS), weights])


def _gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    # Golub & Welsch 1969: the nodes are the eigenvalues of the Jacobi matrix of the Legendre
    # polynomials, the weights come from the first components of its eigenvectors.
    k = torch.arange(1, n, dtype=torch.float64)
    beside = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (nodes + 1) / 2, vectors[0] ** 2


@dataclass(frozen=True)
class IntegratedGradients(PathMethod):
    """Gradients averaged along the straight path from a baseline, times the way.

    Attributions sum to ``score(input) − score(baseline)``, up to the quadrature's error, which is
    written at ``gap_root`` (attributions' sum minus that difference, one number per element and
    target) and warned about when it is large. On networks of ReLUs the midpoint and Gauss-Legendre
    rules err alike, about 0.45 / n_steps.

    Source: Sundararajan et al. 2017, eq. 1 and 3.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        baselines: One for all keys or a dict by key: a number, a tensor, a callable, ``FromKey``,
            ``FromBuffer``; zeros by default.
        n_steps: Evaluations along the path. Peak memory does not grow with them.
        method: The quadrature, see :func:`quadrature`.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        gap_tolerance: A warning is given where the gap exceeds this share of the larger of the
            score's change and the mean size of such changes in the batch. None for no warning.

    Raises:
        InputError: If ``n_steps``, ``method`` or ``internal_batch_size`` make no sense.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, 2.0)
    >>> with IntegratedGradients("y").prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[1.0, 3.0]])}, [1]))
    >>> td["attr", "x"].round(decimals=4), td["attr_gap"].abs() < 1e-5
    (tensor([[2., 6.]]), tensor([True]))
    """

    baselines: BaselineSpec | Mapping[NestedKey, BaselineSpec] | None = field(
        default=None, kw_only=True
    )
    n_steps: int = field(default=50, kw_only=True)
    method: str = field(default="gausslegendre", kw_only=True)
    internal_batch_size: int | None = field(default=None, kw_only=True)
    gap_tolerance: float | None = field(default=0.1, kw_only=True)

    complete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the quadrature."""
        super().__post_init__()
        quadrature(self.method, self.n_steps)
        rows = self.internal_batch_size
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise InputError(f"internal_batch_size must be a whole number above 0, got {rows!r}.")
        if self.gap_tolerance is not None and not self.gap_tolerance > 0:
            raise InputError(f"gap_tolerance must be above 0 or None, got {self.gap_tolerance!r}.")

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Integrates the gradient between the baselines and ``score.inputs``."""
        ways = [x - b for x, b in zip(score.inputs, baselines, strict=True)]
        nodes, weights = quadrature(self.method, self.n_steps)

        def path(part: Tensor) -> list[Tensor]:
            return [
                torch.addcmul(b, part.to(b).reshape(-1, *[1] * b.ndim), way)
                for b, way in zip(baselines, ways, strict=True)
            ]

        large = sum(x.numel() for x in score.inputs) >= _LARGE
        if large or score.chunk() < len(nodes):
            # The ends of the path, for the gap: without a graph where that saves real work, along
            # with the nodes where a call of its own would cost more.
            scores = score.scores(path(_ENDS))
            grads, _ = score.path_gradient(path, nodes, weights)
        else:
            grads, scores = score.path_gradient(path, *_with_ends(self.method, self.n_steps))
        if not isfinite(scores[:2].sum().item()) and not torch.isfinite(scores[:2]).all():
            end = "input" if torch.isfinite(scores[0]).all() else "baseline"
            raise TargetError(
                f"{score.what} is NaN or Inf at the {end}, so there is no change of it to attribute. "
                "Take another baseline, or explain other elements."
            )
        found = [way * g for way, g in zip(ways, grads, strict=True)]
        dims = scores.ndim - 2  # fewer than the batch has where a trajectory is one element
        total = sum(a.flatten(dims + 1).sum(-1) if a.ndim > dims + 1 else a for a in found)
        assert isinstance(total, Tensor)
        change = scores[1] - scores[0]
        return Attribution(found, gap=total.movedim(0, -1) - change, scale=change.abs())
