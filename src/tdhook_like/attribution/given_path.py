"""Gradients along a path that is given: by way points, or as a function of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.expected import missed
from tdhook_like.attribution.method import Attribution, PathMethod
from tdhook_like.attribution.path import quadrature
from tdhook_like.attribution.perturbation import whole_number
from tdhook_like.attribution.wrapper import checked, keys_only
from tdhook_like.errors import InputError
from tdhook_like.keys import as_tuple, check_known
from tdhook_like.score import Score

__all__ = ["PathIntegratedGradients"]

Curve = Callable[[Tensor, Tensor], Tensor]
"""From times ``[c]`` in [0, 1] and an input ``[*B, *F]`` to points ``[c, *B, *F]``; at 1 the input."""
Moving = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From times ``[c]`` to points and velocities, ``[c, *B, *F]``."""
PathSpec = Tensor | Curve | Mapping[NestedKey, Tensor | Curve]


@dataclass(frozen=True)
class PathIntegratedGradients(PathMethod):
    """Gradients integrated along a given path that ends at the input: ``∫ ∂S(γ(t)) · γ′(t) dt``.

    Attributions sum to ``score(input) − score(γ(0))``, whatever the path; how they are shared depends
    on it. What the quadrature misses of that is written at ``gap_root``.

    Source: Sundararajan et al. 2017, section 4, "path methods".

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        path: For all keys or by key. A tensor of points ``[m, *F]`` or ``[m, *B, *F]`` through which
            the path leads, straight from one to the next and from the last to the input; the first
            is where it starts. Or a function from times ``[c]`` and the input to points on the path,
            ``[c, *B, *F]``, that ends at the input; its derivative is taken by autograd. Keys that a
            dict leaves out stay at the input and get nothing.
        n_steps: Evaluations along the path; along each straight piece of it.
        method: The quadrature, see :func:`quadrature`.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        gap_tolerance: A warning is given where the gap exceeds this share of the larger of the
            score's change and the mean size of such changes in the batch. None for no warning.

    Raises:
        InputError: If the path has another shape, does not end at the input, or a number makes no
            sense.
        KeyNotFoundError: If it names a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> from tensordict.nn import TensorDictModule
    >>> product = TensorDictModule(lambda a, b: a * b, in_keys=["a", "b"], out_keys=["y"])
    >>> first_a = {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([0.0, 0.0])}  # then b
    >>> with PathIntegratedGradients("y", path=first_a).prepare(product) as hooked:
    ...     td = hooked(TensorDict({"a": torch.tensor([2.0]), "b": torch.tensor([3.0])}, [1]))
    >>> td["attr", "a"].round(decimals=4), td["attr", "b"].round(decimals=4)
    (tensor([0.]), tensor([6.]))
    """

    path: PathSpec = field(kw_only=True)
    n_steps: int = field(default=50, kw_only=True)
    method: str = field(default="gausslegendre", kw_only=True)
    internal_batch_size: int | None = field(default=None, kw_only=True)
    gap_tolerance: float | None = field(default=0.1, kw_only=True)

    complete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the path's kind and the quadrature."""
        super().__post_init__()
        keys_only(self)
        quadrature(self.method, self.n_steps)
        if self.internal_batch_size is not None:
            whole_number("internal_batch_size", self.internal_batch_size, 1)
        if self.gap_tolerance is not None and not self.gap_tolerance > 0:
            raise InputError(f"gap_tolerance must be above 0 or None, got {self.gap_tolerance!r}.")
        each = list(self.path.values()) if isinstance(self.path, Mapping) else [self.path]
        if not each or not all(isinstance(part, Tensor) or callable(part) for part in each):
            raise InputError(
                f"path={self.path!r}: give points [m, *features], a function of times and the input, or "
                "a dict of these by key."
            )
        points = [part for part in each if isinstance(part, Tensor)]
        if any(not p.ndim or not len(p) or not torch.isfinite(p).all() for p in points):
            raise InputError(
                "A path leads through at least one point, where it starts, all finite."
            )
        if len({len(p) for p in points}) > 1:
            raise InputError(
                "All keys move along the path together: give as many points for each, "
                f"got {[len(p) for p in points]}."
            )

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As for every method; the path has to be one of attributed keys."""
        context = super().prepare(*args, **kwargs)
        if isinstance(self.path, Mapping):
            check_known(self.path, context.keys or tuple(context.in_keys), "attributed keys")
        return context

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Sums slope times velocity along the path, in chunks."""
        paths = [self._path(key, x) for key, x in zip(score.keys, score.inputs, strict=True)]
        nodes, weights = self._nodes()
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        low, high = score.scores([moving(ends)[0] for moving in paths])
        total: list[Tensor] | None = None
        chunk = score.chunk()
        for start in range(0, len(nodes), chunk):
            part, weight = nodes[start : start + chunk], weights[start : start + chunk]
            moved = [moving(part) for moving in paths]
            grads, _ = score.gradients_at([points for points, _ in moved])
            found = []
            for grad, (_, velocity) in zip(grads, moved, strict=True):
                step = weight.to(grad).reshape(-1, *[1] * (velocity.ndim - 1)) * velocity
                found.append((grad * step.unsqueeze(1)).sum(0))
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        assert total is not None
        values, change = checked(self, score, total), high - low
        return Attribution(values, gap=missed(values, change), scale=change.abs())

    def _nodes(self) -> tuple[Tensor, Tensor]:
        """Times and weights; where the path has corners, of each straight piece apart."""
        nodes, weights = quadrature(self.method, self.n_steps)
        each = list(self.path.values()) if isinstance(self.path, Mapping) else [self.path]
        pieces = next((len(part) for part in each if isinstance(part, Tensor)), 1)
        nodes = torch.cat([(nodes + i) / pieces for i in range(pieces)])
        return nodes, weights.repeat(pieces) / pieces

    def _path(self, key: NestedKey, x: Tensor) -> Moving:
        """The path of one key; checked to end at the input."""
        part: Any = self.path
        if isinstance(self.path, Mapping):
            part = {as_tuple(k): v for k, v in self.path.items()}.get(as_tuple(key))
        if part is None:
            return _still(x)
        if isinstance(part, Tensor):
            return _through(part, key, x)
        end = part(torch.ones(1, dtype=x.dtype, device=x.device), x)
        if not isinstance(end, Tensor) or end.shape != (1, *x.shape):
            raise InputError(
                f"The path of {key!r} must give points [c, *B, *F] for times [c]; at one time it gave "
                f"{tuple(end.shape) if isinstance(end, Tensor) else type(end).__name__} for an input "
                f"of shape {tuple(x.shape)}."
            )
        scale = x.abs().max().clamp_min(1.0) if x.numel() else 1.0
        if not bool(((end[0] - x).abs() <= torch.finfo(x.dtype).eps ** 0.5 * scale).all()):
            raise InputError(f"The path of {key!r} does not end at the input: at time 1 it has to.")
        return _along(part, x)


def _through(points: Tensor, key: NestedKey, x: Tensor) -> Moving:
    """Straight from point to point, and on to the input; as much time for each piece."""
    m = len(points)
    spread = points.to(x)
    if points.ndim - 1 < x.ndim:  # [m, *F]: alike for all elements
        spread = spread.reshape(m, *[1] * (x.ndim - points.ndim + 1), *points.shape[1:])
    try:
        spread = spread.expand(m, *x.shape)
    except RuntimeError:
        raise InputError(
            f"The path of {key!r} has points of shape {tuple(points.shape[1:])}, which do not "
            f"broadcast to the input's {tuple(x.shape)}."
        ) from None
    stops = torch.cat([spread, x.unsqueeze(0)])
    ways = stops.diff(dim=0)

    def moving(times: Tensor) -> tuple[Tensor, Tensor]:
        piece = (times * m).floor().long().clamp(0, m - 1)
        along = (times * m - piece).to(x).reshape(-1, *[1] * x.ndim)
        piece = piece.to(x.device)
        return stops[piece] + along * ways[piece], m * ways[piece]

    return moving


def _still(x: Tensor) -> Moving:
    """At the input all the time."""
    return lambda times: (x.expand(len(times), *x.shape), x.new_zeros(len(times), *x.shape))


def _along(curve: Curve, x: Tensor) -> Moving:
    """Along a function of time, with its derivative."""

    def moving(times: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            t = times.to(x).detach().requires_grad_()
            points = curve(t, x)
            if not points.requires_grad:
                return points, torch.zeros_like(points)
            # Of what is linear in u, the derivative by u: the velocity, by two backward passes.
            u = torch.zeros_like(points, requires_grad=True)
            (slope,) = torch.autograd.grad(points, t, u, create_graph=True)
            (velocity,) = torch.autograd.grad(slope.sum(), u)
        return points.detach(), velocity

    return moving
