"""What input a target likes best, within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdhook_like.attribution.ascent import ascended, beside, own_column, scores_at
from tdhook_like.attribution.bounds import (
    Bounds,
    Box,
    boxes,
    check_bounded_keys,
    check_bounds,
    clipped,
)
from tdhook_like.attribution.method import Attribution, PathMethod
from tdhook_like.attribution.perturbation import check_seed, whole_number
from tdhook_like.attribution.wrapper import checked, keys_only
from tdhook_like.errors import InputError
from tdhook_like.score import Score

__all__ = ["ActivationMaximisation"]


@dataclass(frozen=True)
class ActivationMaximisation(PathMethod):
    """The input at which the target is largest, as far as ascent within bounds finds it.

    ``max_x S(x) − decay · |x|²`` over ``low ≤ x ≤ high``, from where the inputs are. Each target and each
    element has an input of its own, written at ``("maximising", *key)``; only attributed keys are
    moved. To maximise what goes on inside a model, prepare that part of it.

    Sources: Erhan et al. 2009, eq. 1; Simonyan et al. 2014, eq. 1 (the decay); Kingma & Ba 2015,
    algorithm 1 (the steps).

    Args:
        target: What is maximised; see :class:`Method`, also for the keyword arguments.
        bounds: Between which values: ``(low, high)``, a spec such as ``env.observation_spec``, or a
            dict of these by key. Where there are none, a decay is needed, or the ascent may not end.
        n_steps: How many steps.
        learning_rate: How far one step moves a feature, as a share of the way between its bounds; as
            it is where these are infinite.
        decay: What large inputs cost.
        n_starts: The best of so many ascents is kept. The first begins at the inputs, the others
            anywhere between finite bounds.
        seed: Of the generator that starts are drawn from, which is no other's.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        root: Where the inputs that were found go.

    Raises:
        InputError: If a number makes no sense, bounds do not fit their key, or starts shall be drawn
            between infinite ones.
        KeyNotFoundError: If bounds name a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, -2.0)
    >>> method = ActivationMaximisation("y", bounds=(-1.0, 3.0))
    >>> with method.prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[1.0, 3.0]])}, [1]))
    >>> td["maximising", "x"]
    tensor([[-1., -1.]])
    """

    bounds: Bounds = field(default=None, kw_only=True)
    n_steps: int = field(default=100, kw_only=True)
    learning_rate: float = field(default=0.05, kw_only=True)
    decay: float = field(default=0.0, kw_only=True)
    n_starts: int = field(default=1, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    internal_batch_size: int | None = field(default=None, kw_only=True)
    root: str = field(default="maximising", kw_only=True)

    single_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks bounds and numbers."""
        super().__post_init__()
        keys_only(self)
        check_bounds(self.bounds)
        whole_number("n_steps", self.n_steps, 1)
        whole_number("n_starts", self.n_starts, 1)
        check_seed(self.seed)
        if self.internal_batch_size is not None:
            whole_number("internal_batch_size", self.internal_batch_size, 1)
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning_rate must be above 0, got {self.learning_rate!r}.")
        if not 0 <= self.decay < float("inf"):
            raise InputError(f"decay must be 0 or more, got {self.decay!r}.")

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As for every method; bounds have to be of attributed keys."""
        context = super().prepare(*args, **kwargs)
        check_bounded_keys(self.bounds, context.keys or tuple(context.in_keys))
        return context

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Climbs from every start, and keeps each target's best."""
        limits = boxes(self.bounds, score)
        inside = [clipped(x, box) for x, box in zip(score.inputs, limits, strict=True)]
        n = score.scores([x.unsqueeze(0) for x in inside]).shape[-1]
        start = self._starts(inside, limits, n)
        widths = [self._width(box) for box in limits]
        state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in start]

        def step(points: list[Tensor], grads: list[Tensor], i: int) -> list[Tensor]:
            moved = []
            for key, (point, grad) in enumerate(zip(points, grads, strict=True)):
                grad = grad - 2 * self.decay * point
                mean, square = state[key]
                mean = 0.9 * mean + 0.1 * grad
                square = 0.999 * square + 0.001 * grad.square()
                state[key] = mean, square
                size = square / (1 - 0.999 ** (i + 1))
                ahead = mean / (1 - 0.9 ** (i + 1)) / (size.sqrt() + torch.finfo(size.dtype).tiny)
                # Shorter and shorter steps, so that what oscillates comes to rest.
                far = self.learning_rate * widths[key] * (1 - i / self.n_steps)
                moved.append(clipped(point + far * ahead, limits[key]))
            return moved

        def penalty(points: Sequence[Tensor]) -> Tensor:
            dims = 1 + score.dims
            flat = [p.unsqueeze(-1).flatten(dims).square().sum(-1) for p in points]
            return self.decay * torch.stack(flat).sum(0)

        best = ascended(score, start, step, self.n_steps, 1.0, penalty)
        return Attribution(checked(self, score, self._chosen(score, best, n, penalty(best))))

    def _starts(self, inside: list[Tensor], limits: list[Box], n: int) -> list[Tensor]:
        """The inputs, and points between the bounds; ``[n_starts × n, *B, *F]`` for each key."""
        draw = torch.Generator().manual_seed(self.seed)
        found = []
        for x, (low, high) in zip(inside, limits, strict=True):
            rows = [x]
            for _ in range(self.n_starts - 1):
                if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
                    raise InputError(
                        "n_starts above 1 needs finite bounds of every key, to start anywhere between."
                    )
                part = torch.rand(x.shape, dtype=torch.float64, generator=draw).to(x)
                rows.append(low + part * (high - low))
            found.append(torch.stack(rows).repeat_interleave(n, 0))
        return found

    @staticmethod
    def _width(box: Box) -> Tensor:
        width = box[1] - box[0]
        return torch.where(torch.isfinite(width), width, torch.ones_like(width))

    def _chosen(self, score: Score, points: list[Tensor], n: int, penalty: Tensor) -> list[Tensor]:
        """The best of all starts, ``[n, *B, *F]`` for each key."""
        if self.n_starts == 1:
            return points
        good = (own_column(scores_at(score, points)) - penalty).unflatten(0, (self.n_starts, n))
        first = good.argmax(0)
        found = []
        for point in points:
            each = point.unflatten(0, (self.n_starts, n))
            index = beside(first, each[0]).expand(each.shape[1:]).unsqueeze(0)
            found.append(each.gather(0, index).squeeze(0))
        return found
