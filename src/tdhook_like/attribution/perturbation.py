"""What methods share that change inputs and look at the score: options, ends, standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.groups import BY, Groups, Masks, check_masks, grouped
from tdhook_like.attribution.method import Attribution, PathMethod
from tdhook_like.attribution.progress import counting
from tdhook_like.baselines import BaselineSpec
from tdhook_like.errors import InputError, TargetError
from tdhook_like.keys import check_known
from tdhook_like.score import Score

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = [
    "CoalitionMethod",
    "GroupedMethod",
    "Mean",
    "PerturbationMethod",
    "check_seed",
    "whole_number",
]

Baselines = BaselineSpec | Mapping[NestedKey, BaselineSpec] | None


@dataclass(frozen=True)
class PerturbationMethod(PathMethod):
    """A method that asks for scores of changed inputs, and for no gradient.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        progress: Whether a progress bar counts the evaluations, for long runs; it needs tqdm.
    """

    internal_batch_size: int | None = field(default=None, kw_only=True)
    progress: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if self.internal_batch_size is not None:
            whole_number("internal_batch_size", self.internal_batch_size, 1)

    def counting(self, total: int) -> AbstractContextManager[Any]:
        """A bar, if one is asked for, over this many evaluations."""
        return counting(self.progress, type(self).__name__, total)

    def checked(self, score: Score, found: Sequence[Tensor]) -> list[Tensor]:
        """Results of the inputs' dtypes; a score that was NaN or Inf anywhere shows in them.

        Raises:
            TargetError: If so.
        """
        for key, values in zip(score.keys, found, strict=True):
            if not torch.isfinite(values).all():
                raise TargetError(
                    f"{score.what} is NaN or Inf at a point that {type(self).__name__} changes the "
                    f"input to (it shows at {key!r}), so there is no change of it to attribute. Take "
                    "another baseline, or explain other elements."
                )
        return [values.to(x.dtype) for values, x in zip(found, score.inputs, strict=True)]


@dataclass(frozen=True)
class GroupedMethod(PerturbationMethod):
    """A method that changes groups of features, each as a whole.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        masks: By key, the number of the group that each feature belongs to: an integer tensor that
            broadcasts to the features, or with batch dimensions to the whole input. Groups are
            numbered from 0 without gaps; one number may stand in several keys.
        groups: How keys without a mask are divided: ``"features"``, each by itself, or ``"keys"``,
            each key as a whole.
        divide: Whether what a group is given is divided evenly among its features, so that sums
            over features, keys and time mean something. If not, each feature has the whole of it.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        progress: Whether a progress bar counts the evaluations, for long runs; it needs tqdm.
    """

    masks: Masks | None = field(default=None, kw_only=True)
    groups: str = field(default="features", kw_only=True)
    divide: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the groups, as far as they are known without inputs."""
        super().__post_init__()
        check_masks(self.masks)
        if self.groups not in BY:
            raise InputError(
                f"groups={self.groups!r}: choose one of {', '.join(BY)}; other groups are given as "
                "masks."
            )

    def prepare(self, *args: Any, **kwargs: Any) -> HookContext:
        """As for every method; masks have to be of attributed keys."""
        context = super().prepare(*args, **kwargs)
        check_known(self.masks or (), context.keys or context.in_keys, "attributed keys")
        return context

    def divided(self, score: Score) -> Groups:
        """The groups of the features of ``score.inputs``."""
        return grouped(score.inputs, score.keys, score.dims, self.masks, self.groups)

    def errors_of(self, score: Score, groups: Groups, errors: Tensor) -> list[Tensor]:
        """Standard errors of groups' values, ``[count, *E, T]``, at their features."""
        found = groups.spread(errors, self.divide)
        return [values.to(x.dtype) for values, x in zip(found, score.inputs, strict=True)]


@dataclass(frozen=True)
class CoalitionMethod(GroupedMethod):
    """A method that asks for scores of coalitions: some groups as they are, others at a baseline.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        baselines: What stands for a group that is absent: one for all keys or a dict by key; a
            number, a tensor, a callable, ``FromKey``, ``FromBuffer``; zeros by default.
        masks: See :class:`GroupedMethod`.
        groups: See :class:`GroupedMethod`.
        divide: See :class:`GroupedMethod`.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        progress: Whether a progress bar counts the evaluations, for long runs; it needs tqdm.
    """

    baselines: Baselines = field(default=None, kw_only=True)

    def ends(self, score: Score, baselines: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores ``[*E, T]`` at the baselines and at the inputs.

        Raises:
            TargetError: If either is not finite.
        """
        points = [torch.stack([b, x]) for b, x in zip(baselines, score.inputs, strict=True)]
        size = min(score.chunk(), 2)
        found = torch.cat(
            [score.scores([p[i : i + size] for p in points]) for i in range(0, 2, size)]
        )
        if not torch.isfinite(found).all():
            end = "input" if torch.isfinite(found[0]).all() else "baseline"
            raise TargetError(
                f"{score.what} is NaN or Inf at the {end}, so there is no change of it to attribute. "
                "Take another baseline, or explain other elements."
            )
        return found[0], found[1]

    def complete_attribution(
        self,
        score: Score,
        groups: Groups,
        values: Tensor,
        change: Tensor,
        errors: Tensor | None = None,
    ) -> Attribution:
        """Groups' values at their features, and what their sum misses the score's change by.

        Args:
            score: What is explained.
            groups: Its groups.
            values: ``[count, *E, T]``.
            change: ``score(input) − score(baseline)``, ``[*E, T]``.
            errors: Standard errors of ``values``, of their shape.
        """
        found = self.checked(score, groups.spread(values, self.divide))
        gap = groups.total(values).to(change.dtype) - change
        spread = None if errors is None else self.errors_of(score, groups, errors)
        return Attribution(found, gap=gap, scale=change.abs(), errors=spread)


class Mean:
    """A running mean of draws and its standard error, in float64.

    >>> mean = Mean()
    >>> mean.add(torch.tensor([[1.0], [2.0]]))
    >>> mean.add(torch.tensor([[6.0]]))
    >>> mean.value(), mean.error()
    (tensor([3.], dtype=torch.float64), tensor([1.5275], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self._n = 0

    def add(self, draws: Tensor) -> None:
        """Takes more draws in, ``[n, ...]``."""
        draws = draws.double()
        if not self._n:
            # Sums of squares of what is left lose no digits where draws are all alike.
            self._first = draws[0]
            self._sum = torch.zeros_like(self._first)
            self._squares = torch.zeros_like(self._first)
        away = draws - self._first
        self._sum += away.sum(0)
        self._squares += away.square().sum(0)
        self._n += len(draws)

    def value(self) -> Tensor:
        """The mean."""
        return self._first + self._sum / self._n

    def error(self) -> Tensor:
        """Its standard error, ``√(s² / n)``; NaN for a single draw, which says nothing of it."""
        if self._n < 2:
            return torch.full_like(self._sum, torch.nan)
        squares = self._squares - self._sum.square() / self._n
        return (squares.clamp_min(0) / (self._n - 1) / self._n).sqrt()


def whole_number(name: str, value: object, least: int) -> None:
    """Raises :class:`InputError` for what is no whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_seed(seed: object) -> None:
    """Raises :class:`InputError` for what does not seed a generator."""
    whole_number("seed", seed, 0)
