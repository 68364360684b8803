"""Attacks along the gradient: one step, or many with a way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdhook_like.attribution.ascent import ascended, beside, one_each, own_column, scores_at
from tdhook_like.attribution.bounds import Box, clipped
from tdhook_like.attribution.noise import normal_rows
from tdhook_like.attribution.perturbation import check_seed, whole_number
from tdhook_like.errors import InputError
from tdhook_like.robustness.change import Change
from tdhook_like.score import Score

__all__ = ["FGSM", "PGD"]

NORMS = ("linf", "l2")


@dataclass(frozen=True)
class Attack(Change):
    """A change that follows the score's gradient within a ball around the input.

    Args:
        target: What is attacked; see :class:`Change`, also for the keyword arguments.
        norm: ``"linf"``: no feature moves by more than epsilon; ``"l2"``: no key of an element moves by
            more than epsilon in Euclidean length.
    """

    norm: str = field(default="linf", kw_only=True)

    def __post_init__(self) -> None:
        """Checks the norm."""
        super().__post_init__()
        if self.norm not in NORMS:
            raise InputError(f"norm={self.norm!r}: choose one of {', '.join(NORMS)}.")

    def steepest(self, grad: Tensor, dims: int) -> Tensor:
        """The direction of norm 1 that leads uphill most; 0 where there is no slope.

        Args:
            grad: ``[k, *E, …]``.
            dims: The number of dimensions of ``[k, *E]``.
        """
        if self.norm == "linf":
            return grad.sign()
        # A gradient's square may be too small for its dtype: it is brought to size 1 first.
        largest = _spread(grad, dims, lambda flat: flat.abs().amax(-1))
        grad = torch.where(largest > 0, grad / largest, grad)
        length = _spread(grad, dims, lambda flat: flat.norm(dim=-1))
        return torch.where(length > 0, grad / length, grad)

    def projected(self, point: Tensor, x: Tensor, size: Tensor, box: Box, dims: int) -> Tensor:
        """The point brought back into the ball around ``x``, and into the bounds."""
        if self.norm == "linf":
            point = torch.minimum(torch.maximum(point, x - size), x + size)
        else:
            way = point - x
            length = _spread(way, dims, lambda flat: flat.norm(dim=-1))
            point = torch.where(length > size, x + way * (size / length), point)
        # Inputs lie inside their bounds, so that what is clipped gets no farther from them.
        return clipped(point, box)

    def check_ball(self, score: Score, sizes: Sequence[Tensor]) -> None:
        """Raises :class:`InputError` where a Euclidean length would differ from feature to feature."""
        if self.norm == "linf":
            return
        for key, x, size in zip(score.keys, score.inputs, sizes, strict=True):
            features = x.ndim - score.dims
            if features and any(n > 1 for n in size.shape[-features:]):
                raise InputError(
                    f"epsilon of {key!r} differs between features, which norm='l2' has no use for: "
                    "give one number for the key."
                )


@dataclass(frozen=True)
class FGSM(Attack):
    """The fast gradient sign method: one step as large as it may be, ``x ± ε · sign(∂S/∂x)``.

    With ``norm="l2"`` the step is ``± ε · ∂S/∂x / |∂S/∂x|``, of each key apart.

    Source: Goodfellow et al. 2015, section 4.

    Args:
        target: What is attacked; see :class:`Change`, also for the keyword arguments.
        epsilon: See :class:`Change`.
        norm: See :class:`Attack`.
        bounds: See :class:`Change`.
        goal: See :class:`Change`.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.

    Raises:
        InputError: If ``epsilon`` is below 0, an option is unknown, or inputs lie outside of bounds.
        KeyNotFoundError: If ``epsilon`` or ``bounds`` name a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
    >>> attack = FGSM("y", epsilon=0.5, bounds=(0.0, 1.0))
    >>> with attack.prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[1.0, 0.75]])}, [1]))
    >>> td["adversarial", "x"], td["adversarial_score"]
    (tensor([[0.5000, 1.0000]]), tensor([0.5000]))
    """

    def changed(
        self, score: Score, sizes: Sequence[Tensor], limits: Sequence[Box], n: int
    ) -> list[Tensor]:
        """One step from the inputs."""
        self.check_ball(score, sizes)
        dims = 1 + score.dims
        points = [x.expand(n, *x.shape) for x in score.inputs]
        grads, _ = one_each(score, points)
        return [
            clipped(x + size * self.steepest(self.uphill * grad, dims), box)
            for x, size, grad, box in zip(points, sizes, grads, limits, strict=True)
        ]


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient descent: many small steps, each brought back into ball and bounds.

    Of all points on the way, that with the best score is kept.

    Source: Madry et al. 2018, section 2.1.

    Args:
        target: What is attacked; see :class:`Change`, also for the keyword arguments.
        n_steps: How many steps.
        step_size: The length of a step as a share of epsilon; ``2.5 / n_steps`` if None.
        random_start: Whether to begin anywhere in the ball instead of at the input.
        n_starts: The best of so many attacks is kept. All but the first begin anywhere in the ball.
        seed: Of the generator that starts are drawn from, which is no other's.
        epsilon: See :class:`Change`.
        norm: See :class:`Attack`.
        bounds: See :class:`Change`.
        goal: See :class:`Change`.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.

    Raises:
        InputError: If a number makes no sense, an option is unknown, or inputs lie outside of bounds.
        KeyNotFoundError: If ``epsilon`` or ``bounds`` name a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
    >>> attack = PGD("y", epsilon=5.0, norm="l2", goal="raise")
    >>> with attack.prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.zeros(1, 2)}, [1]))
    >>> td["adversarial", "x"]
    tensor([[ 3., -4.]])
    """

    n_steps: int = field(default=20, kw_only=True)
    step_size: float | None = field(default=None, kw_only=True)
    random_start: bool = field(default=False, kw_only=True)
    n_starts: int = field(default=1, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the steps."""
        super().__post_init__()
        whole_number("n_steps", self.n_steps, 1)
        whole_number("n_starts", self.n_starts, 1)
        check_seed(self.seed)
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise InputError(f"step_size must be above 0 or None, got {self.step_size!r}.")

    def changed(
        self, score: Score, sizes: Sequence[Tensor], limits: Sequence[Box], n: int
    ) -> list[Tensor]:
        """The best points on the ways from all starts."""
        self.check_ball(score, sizes)
        dims = 1 + score.dims
        draw = torch.Generator().manual_seed(self.seed)
        share = 2.5 / self.n_steps if self.step_size is None else self.step_size

        def step(points: list[Tensor], grads: list[Tensor], i: int) -> list[Tensor]:
            return [
                self.projected(p + share * size * self.steepest(g, dims), x, size, box, dims)
                for p, g, x, size, box in zip(
                    points, grads, score.inputs, sizes, limits, strict=True
                )
            ]

        best, value = None, None
        for number in range(self.n_starts):
            start = [x.expand(n, *x.shape) for x in score.inputs]
            if number or self.random_start:
                start = self._anywhere(start, sizes, limits, dims, draw)
            found = ascended(score, start, step, self.n_steps, self.uphill)
            if self.n_starts == 1:
                return found
            good = self.uphill * own_column(scores_at(score, found))
            if best is None or value is None:
                best, value = found, good
                continue
            better = good > value
            value = torch.where(better, good, value)
            best = [torch.where(beside(better, f), f, b) for f, b in zip(found, best, strict=True)]
        assert best is not None
        return best

    def _anywhere(
        self,
        points: Sequence[Tensor],
        sizes: Sequence[Tensor],
        limits: Sequence[Box],
        dims: int,
        draw: torch.Generator,
    ) -> list[Tensor]:
        """Points that are spread evenly over the ball, brought into the bounds."""
        found = []
        for x, size, box in zip(points, sizes, limits, strict=True):
            if self.norm == "linf":
                away = 2 * torch.rand(x.shape, dtype=torch.float64, generator=draw).to(x) - 1
            else:
                away = self.steepest(normal_rows([x], 1, draw)[0][0], dims)
                features = max(x.shape[dims:].numel(), 1)
                radius = torch.rand(x.shape[:dims], dtype=torch.float64, generator=draw).to(x)
                away = away * beside(radius ** (1 / features), x)
            found.append(clipped(x + size * away, box))
        return found


def _spread(values: Tensor, dims: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """A number for every ``[k, *E]``, beside its features."""
    return beside(reduce(values.unsqueeze(-1).flatten(dims)), values)
