"""What flows through a submodule on the way from a baseline to the input.

Three questions that have a path in common, of a submodule's output h:

===============================  =======================================================
``IntegratedGradients(at=…)``    the path leads from h⁰ to h itself, the model's inputs held fixed
:class:`Conductance`             the path leads through the model's inputs; ``∫ ∂S/∂h dh``
:class:`InternalInfluence`       the same path; the mean of ``∂S/∂h``
===============================  =======================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.method import Attribution, PathMethod
from tdhook_like.attribution.path import quadrature
from tdhook_like.attribution.perturbation import whole_number
from tdhook_like.baselines import BaselineSpec
from tdhook_like.columns import joined
from tdhook_like.errors import InputError, TargetError
from tdhook_like.gradients import gradients
from tdhook_like.ports import calls_at, port
from tdhook_like.score import Score

__all__ = ["Conductance", "InternalInfluence"]

Baselines = BaselineSpec | Mapping[NestedKey, BaselineSpec] | None


@dataclass(frozen=True)
class _AlongInputs(PathMethod):
    """Gradients at submodules, along the straight path of the model's inputs."""

    baselines: Baselines = field(default=None, kw_only=True)
    n_steps: int = field(default=50, kw_only=True)
    internal_batch_size: int | None = field(default=None, kw_only=True)

    own_at: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the numbers."""
        super().__post_init__()
        whole_number("n_steps", self.n_steps, 1)
        if self.internal_batch_size is not None:
            whole_number("internal_batch_size", self.internal_batch_size, 1)


@dataclass(frozen=True)
class Conductance(_AlongInputs):
    """How much of the score's change flows through each unit: ``∫ ∂S/∂h · dh`` along the inputs' path.

    Attributions at a set of submodules that everything runs through sum to ``score(input) −
    score(baseline)``, as do those at the inputs, where the conductance is the integrated gradient.
    What the latter miss it by is written at ``gap_root``.

    The integral is summed as ``Σₖ ½ (gₖ + gₖ₊₁) (hₖ₊₁ − hₖ)`` over ``n_steps`` equal steps, which is
    exact for scores that are quadratic in h, however h depends on the inputs.

    Source: Dhamdhere et al. 2018, eq. 2 and 3.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments (``at=``).
        baselines: As of :class:`IntegratedGradients`, of the inputs.
        n_steps: Steps along the path; there is one evaluation more.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        gap_tolerance: As of :class:`IntegratedGradients`.

    Raises:
        InputError: If a number makes no sense.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.ReLU())
    >>> _ = net[0].weight.data.copy_(torch.tensor([[2.0], [-1.0]]))
    >>> method = Conductance(lambda td: td["y"].sum(-1), at="0")
    >>> with method.prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[3.0]])}, [1]))
    >>> td["attr_at", "0"].round(decimals=4)  # the second unit is off all the way
    tensor([[6., 0.]])
    """

    gap_tolerance: float | None = field(default=0.1, kw_only=True)

    complete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the tolerance."""
        super().__post_init__()
        if self.gap_tolerance is not None and not self.gap_tolerance > 0:
            raise InputError(f"gap_tolerance must be above 0 or None, got {self.gap_tolerance!r}.")

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Sums over the steps between the baselines and ``score.inputs``."""
        nodes = torch.linspace(0, 1, self.n_steps + 1, dtype=torch.float64)
        walk = _Walk(score, baselines)
        total: list[list[Tensor]] | None = None
        first = last = before = None
        for values, grads, scores in walk.chunks(nodes):
            first = scores[0] if first is None else first
            last = scores[-1]
            if before is not None:  # the step from the last node of the chunk before
                values = [torch.cat([b, v]) for b, v in zip(before[0], values, strict=True)]
                grads = [
                    [torch.cat([b, g]) for b, g in zip(old, new, strict=True)]
                    for old, new in zip(before[1], grads, strict=True)
                ]
            found = [
                [((g[1:] + g[:-1]) * 0.5 * value.diff(dim=0)).sum(0) for g in columns]
                for value, columns in zip(values, grads, strict=True)
            ]
            total = _added(total, found)
            before = [v[-1:] for v in values], [[g[-1:] for g in columns] for columns in grads]
        assert total is not None and first is not None and last is not None
        if not torch.isfinite(torch.stack([first, last])).all():
            raise TargetError(
                f"{score.what} is NaN or Inf at an end of the path, so there is no change of it to "
                "attribute. Take another baseline, or explain other elements."
            )
        attribution = walk.attribution(total)
        if score.inputs:
            dims = first.ndim - 1
            parts = [torch.stack(list(columns), -1) for columns in attribution.inputs]
            sums = [p.flatten(dims, -2).sum(-2) if p.ndim > dims + 1 else p for p in parts]
            attribution.gap = torch.stack(sums).sum(0) - (last - first)
            attribution.scale = (last - first).abs()
        return attribution


@dataclass(frozen=True)
class InternalInfluence(_AlongInputs):
    """The mean gradient at a unit along the inputs' path from a baseline: ``∫ ∂S/∂h dα``.

    How much the score would change per unit of h, on average over inputs between the baseline and
    the input. At the inputs it is integrated gradients without the factor ``x − x⁰``.

    Source: Leino et al. 2018, definition 1, with the uniform distribution on the straight path.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments (``at=``).
        baselines: As of :class:`IntegratedGradients`, of the inputs.
        n_steps: Evaluations along the path.
        method: The quadrature, see :func:`quadrature`.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.

    Raises:
        InputError: If a number or the quadrature makes no sense.

    >>> InternalInfluence("y", at="0").n_steps
    50
    """

    method: str = field(default="gausslegendre", kw_only=True)

    def __post_init__(self) -> None:
        """Checks the quadrature."""
        super().__post_init__()
        quadrature(self.method, self.n_steps)

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Averages over the nodes between the baselines and ``score.inputs``."""
        nodes, weights = quadrature(self.method, self.n_steps)
        walk, total, start = _Walk(score, baselines), None, 0
        for values, grads, scores in walk.chunks(nodes):
            part = weights[start : start + len(scores)]
            start += len(scores)
            found = [
                [torch.tensordot(part.to(g), g, 1) for g in columns]
                for _, columns in zip(values, grads, strict=True)
            ]
            total = _added(total, found)
        assert total is not None
        return walk.attribution(total)


class _Walk:
    """A straight path of the inputs, and what is met on it: values and gradients, chunk by chunk.

    Args:
        score: What is explained.
        baselines: Where the path begins.
    """

    def __init__(self, score: Score, baselines: tuple[Tensor, ...]) -> None:
        self._score, self._baselines = score, baselines
        values: dict[NestedKey, Tensor] = {
            key: x.unsqueeze(0) for key, x in zip(score.keys, score.inputs, strict=True)
        }
        assert score.layout  # tried out before anything is installed
        with torch.no_grad(), score.installed():
            _, outputs = score.evaluated(values)
        self._shapes = {
            path: [value.shape[1:] for value in calls_at(outputs, path)] for path in score.at_paths
        }

    def chunks(self, nodes: Tensor) -> Any:
        """``(values, gradients, scores)`` at every node, as many nodes at a time as fit.

        Values are ``[c, *B, *features]`` for each key, then for each call of each submodule; gradients
        are T such tensors for each; scores are ``[c, *B, T]``.
        """
        score, size = self._score, self._score.chunk()
        ways = [x - b for x, b in zip(score.inputs, self._baselines, strict=True)]
        for start in range(0, len(nodes), size):
            part = nodes[start : start + size]
            points: dict[NestedKey, Tensor] = {}
            for key, b, way in zip(score.keys, self._baselines, ways, strict=True):
                alpha = part.to(b).reshape(-1, *[1] * b.ndim)
                points[key] = torch.addcmul(b, alpha, way).requires_grad_()
            like = score.inputs[0] if score.inputs else torch.zeros(())
            for path, shapes in self._shapes.items():
                for i, shape in enumerate(shapes):
                    zeros = like.new_zeros((len(part), *shape))
                    points[port(path, i, "add")] = zeros.requires_grad_()
            with score.installed():
                parts, outputs = score.evaluated(points)
                found = gradients(parts, list(points.values()))
            values = [points[key].detach() for key in score.keys]
            for path in self._shapes:
                values += [value.detach() for value in calls_at(outputs, path)]
            yield (
                values,
                [[g[i] for g in found] for i in range(len(values))],
                joined(parts).detach(),
            )

    def attribution(self, total: Sequence[Sequence[Tensor]]) -> Attribution:
        """What was found for each key, then for each call of each submodule, in its place."""
        n = len(self._score.inputs)
        rest = iter(total[n:])
        modules: dict[str, Sequence[Sequence[Tensor] | Tensor]] = {
            path: [next(rest) for _ in shapes] for path, shapes in self._shapes.items()
        }
        return Attribution(list(total[:n]), modules)


def _added(total: list[list[Tensor]] | None, found: list[list[Tensor]]) -> list[list[Tensor]]:
    if total is None:
        return found
    return [
        [a + b for a, b in zip(one, other, strict=True)]
        for one, other in zip(total, found, strict=True)
    ]
