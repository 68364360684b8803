"""Moving inputs uphill on a score, each target from points of its own, and keeping the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tdhook_like.columns import joined
from tdhook_like.score import Score

__all__ = ["ascended", "beside", "one_each", "own_column", "scores_at"]

Step = Callable[[list[Tensor], list[Tensor], int], list[Tensor]]
"""From points, the slopes there and the step's number to the next points, ``[k, *B, *F]`` each."""


def own_column(scores: Tensor) -> Tensor:
    """Of scores ``[k, *E, T]``, where row i was made for target i modulo T, each row's own: ``[k, *E]``.

    >>> own_column(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])).tolist()
    [[1.0], [4.0]]
    """
    k, n = len(scores), scores.shape[-1]
    target = torch.arange(k, device=scores.device) % n
    index = target.reshape(k, *[1] * (scores.ndim - 1)).expand(*scores.shape[:-1], 1)
    return scores.gather(-1, index).squeeze(-1)


def scores_at(score: Score, points: Sequence[Tensor]) -> Tensor:
    """Scores ``[k, *E, T]`` at points ``[k, *B, *F]``, in chunks."""
    size = score.chunk()
    chunks = zip(*[point.split(size) for point in points], strict=True)
    return torch.cat([score.scores(chunk) for chunk in chunks])


def one_each(score: Score, points: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Of points ``[k, *B, *F]``, where row i is for target i modulo T: slopes and scores of its own.

    Returns:
        ``[k, *B, *F]`` for each key, and ``[k, *E]``.
    """

    def own(parts: list[Tensor], rows: slice) -> list[Tensor]:
        scores = joined(parts)
        n = scores.shape[-1]
        target = torch.arange(rows.start, rows.stop, device=scores.device) % n
        index = target.reshape(-1, *[1] * (scores.ndim - 1)).expand(*scores.shape[:-1], 1)
        return [scores.gather(-1, index)]

    grads, scores = score.gradients_at(points, own)
    return [grad.squeeze(1) for grad in grads], own_column(scores)


def ascended(
    score: Score,
    start: Sequence[Tensor],
    step: Step,
    n_steps: int,
    uphill: float = 1.0,
    penalty: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> list[Tensor]:
    """The best points that ``n_steps`` steps from ``start`` lead through.

    Args:
        score: What is climbed on.
        start: ``[k, *B, *F]`` for each key; row i is for target i modulo T.
        step: One step; it is given slopes that point to where the score is better.
        n_steps: How many.
        uphill: 1 where larger scores are better, −1 where smaller ones are.
        penalty: What is taken off how good points are, ``[k, *E]``; its slope is the step's matter.
    """
    points, best, value = list(start), list(start), None
    for i in range(n_steps + 1):
        if i < n_steps:
            grads, scores = one_each(score, points)
        else:
            grads, scores = [], own_column(scores_at(score, points))
        good = uphill * scores - (0 if penalty is None else penalty(points))
        if value is None:
            value = good
        else:
            better = good > value
            value = torch.where(better, good, value)
            best = [torch.where(beside(better, p), p, b) for p, b in zip(points, best, strict=True)]
        if i < n_steps:
            points = step(points, [uphill * grad for grad in grads], i)
    return best


def beside(values: Tensor, like: Tensor) -> Tensor:
    """``[k, *E]`` with dimensions of one behind, to stand beside ``[k, *E, …]``."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))
