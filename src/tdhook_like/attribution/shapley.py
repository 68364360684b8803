"""Shapley values: exactly over few groups, or from drawn orders over many."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import factorial
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_like.attribution.groups import Groups
from tdhook_like.attribution.method import Attribution
from tdhook_like.attribution.mixing import Mixer
from tdhook_like.attribution.perturbation import (
    CoalitionMethod,
    Mean,
    check_seed,
    whole_number,
)
from tdhook_like.errors import InputError
from tdhook_like.score import Score

__all__ = ["ShapleyValueSampling", "ShapleyValues", "coalitions"]


def coalitions(start: int, stop: int, count: int, device: torch.device | None = None) -> Tensor:
    """The coalitions of ``count`` groups from number ``start`` to ``stop``: their numbers' bits.

    Returns:
        ``[stop − start, count]``, bool; number 0 is nobody, number 2**count − 1 everybody.

    >>> coalitions(0, 4, 2).int().tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    numbers = torch.arange(start, stop, device=device).unsqueeze(1)
    return (numbers >> torch.arange(count, device=device)) & 1 == 1


@dataclass(frozen=True)
class ShapleyValues(CoalitionMethod):
    """What each group adds to the score, averaged over all orders in which groups can be added.

    ``φ_g = Σ_S |S|! (n − |S| − 1)! / n! · (v(S ∪ g) − v(S))`` over the coalitions S without g, where v(S)
    is the score with the groups of S as they are and all others at their baseline. Exact, from
    ``2**n`` evaluations: made for few groups. ``groups="keys"`` tells how much each key matters
    beside the others. Values sum to ``score(input) − score(baseline)``; what rounding leaves of that is
    written at ``gap_root``.

    Source: Shapley 1953; Lundberg & Lee 2017, eq. 4.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        max_groups: The most groups for which ``2**n`` evaluations are made.
        baselines: What stands for an absent group; see :class:`CoalitionMethod`.
        masks: See :class:`GroupedMethod`.
        groups: See :class:`GroupedMethod`.
        divide: See :class:`GroupedMethod`.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        progress: Whether a progress bar counts the evaluations, for long runs; it needs tqdm.

    Raises:
        InputError: If there are more groups than ``max_groups``, or masks do not divide the features.
        KeyNotFoundError: If a mask is given for a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> from tensordict.nn import TensorDictModule
    >>> product = TensorDictModule(lambda a, b: a * b + a, in_keys=["a", "b"], out_keys=["y"])
    >>> with ShapleyValues("y", groups="keys").prepare(product) as hooked:
    ...     td = hooked(TensorDict({"a": torch.tensor([2.0]), "b": torch.tensor([3.0])}, [1]))
    >>> td["attr", "a"], td["attr", "b"]
    (tensor([5.]), tensor([3.]))
    """

    max_groups: int = field(default=16, kw_only=True)

    complete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the number of groups that is allowed."""
        super().__post_init__()
        whole_number("max_groups", self.max_groups, 1)

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Evaluates all coalitions, in chunks, and weighs each score as it comes."""
        low, high = self.ends(score, baselines)
        groups = self.divided(score)
        n = groups.count
        if n > self.max_groups:
            raise InputError(
                f"ShapleyValues would need 2**{n} evaluations for {n} groups; max_groups is "
                f"{self.max_groups}. Take larger groups (groups='keys', or masks), ShapleyValueSampling, "
                "or a larger max_groups."
            )
        # A coalition counts for those inside as reached, for those outside as left.
        inside = [factorial(s - 1) * factorial(n - s) / factorial(n) for s in range(1, n + 1)]
        weight = torch.tensor([0.0, *inside], dtype=torch.float64, device=low.device)
        outside = -weight.flip(0)
        found = weight[-1:] * high.double().flatten() + outside[:1] * low.double().flatten()
        found = found.expand(n, -1).clone() if n else found.new_zeros(0, low.numel())
        chunk, mixer = score.chunk(), Mixer(score)
        with self.counting(2**n) as advance:
            advance(2)
            for start in range(1, 2**n - 1, chunk):
                present = coalitions(start, min(start + chunk, 2**n - 1), n, low.device)
                values = groups.scores(mixer, present, baselines)
                size = present.sum(1, keepdim=True)
                counts = torch.where(present, weight[size], outside[size])
                found += counts.mT @ values.double().flatten(1)
                advance(len(present))
        return self.complete_attribution(score, groups, found.unflatten(1, low.shape), high - low)


@dataclass(frozen=True)
class ShapleyValueSampling(CoalitionMethod):
    """Shapley values estimated from drawn orders in which groups are added one by one.

    Each order costs ``n − 1`` evaluations and tells of every group what it adds; the mean over orders
    is unbiased. In every order these sum to ``score(input) − score(baseline)``, so the estimates do,
    too. Their standard errors are written at ``error_root``; they fall with ``1 / √n_samples``.

    Source: Castro et al. 2009, algorithm 1; for opposite orders Mitchell et al. 2022, section 4.1.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        n_samples: How many orders are drawn.
        seed: Of the generator that they are drawn from, which is no other's.
        antithetic: Whether every second order is the one before, backwards. Exact where groups act
            together in pairs at most, and seldom worse elsewhere. ``n_samples`` has to be even.
        baselines: What stands for an absent group; see :class:`CoalitionMethod`.
        masks: See :class:`GroupedMethod`.
        groups: See :class:`GroupedMethod`.
        divide: See :class:`GroupedMethod`.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        progress: Whether a progress bar counts the evaluations, for long runs; it needs tqdm.

    Raises:
        InputError: If ``n_samples`` is below 1, or odd with ``antithetic``, or masks do not divide
            the features.
        KeyNotFoundError: If a mask is given for a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> from tensordict.nn import TensorDictModule
    >>> product = TensorDictModule(lambda a, b: a * b + a, in_keys=["a", "b"], out_keys=["y"])
    >>> method = ShapleyValueSampling("y", n_samples=2, antithetic=True)
    >>> with method.prepare(product) as hooked:
    ...     td = hooked(TensorDict({"a": torch.tensor([2.0]), "b": torch.tensor([3.0])}, [1]))
    >>> td["attr", "a"], td["attr", "b"]
    (tensor([5.]), tensor([3.]))
    """

    n_samples: int = field(default=25, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    antithetic: bool = field(default=False, kw_only=True)

    complete: ClassVar[bool] = True
    sampled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the number of orders."""
        super().__post_init__()
        whole_number("n_samples", self.n_samples, 1)
        check_seed(self.seed)
        if self.antithetic and self.n_samples % 2:
            raise InputError(
                f"n_samples={self.n_samples} is odd: with antithetic=True orders come in pairs."
            )

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Follows the drawn orders, as many at once as fit."""
        low, high = self.ends(score, baselines)
        groups, mixer, mean = self.divided(score), Mixer(score), Mean()
        each = 2 if self.antithetic else 1  # orders that make one independent draw
        inner = max(groups.count - 1, 0)
        at_once = max(score.chunk() // max(each * inner, 1), 1)
        draws = self.n_samples // each
        draw = torch.Generator().manual_seed(self.seed)
        with self.counting(self.n_samples * inner) as advance:
            for start in range(0, draws, at_once):
                shape = (min(at_once, draws - start), groups.count)
                order = torch.rand(shape, dtype=torch.float64, generator=draw).argsort(-1)
                if self.antithetic:
                    order = torch.stack([order, order.flip(-1)], 1).flatten(0, 1)
                place = order.argsort(-1).to(low.device)
                values = self._along(score, groups, mixer, place, baselines)
                advance(len(values))
                between = values.reshape(len(place), inner, *low.shape)
                ends = [end.expand(len(place), 1, *end.shape) for end in (low, high)]
                path = torch.cat([ends[0], between, ends[1]], 1)
                rows = torch.arange(len(place), device=low.device).unsqueeze(1)
                added = path.double().diff(dim=1)[rows, place] if groups.count else path[:, :0]
                mean.add(added.unflatten(0, (-1, each)).mean(1) if each > 1 else added)
        values, errors = mean.value(), mean.error()
        return self.complete_attribution(score, groups, values, high - low, errors)

    @staticmethod
    def _along(
        score: Score,
        groups: Groups,
        mixer: Mixer,
        place: Tensor,
        baselines: tuple[Tensor, ...],
    ) -> Tensor:
        """Scores while groups are added, neither end included.

        Args:
            score: What is explained.
            groups: Its groups.
            mixer: Makes the points.
            place: Where each group stands in each order, ``[orders, count]``.
            baselines: What stands for an absent group.

        Returns:
            ``[orders × (count − 1), *E, T]``.
        """
        inner = groups.count - 1
        if inner < 1:
            return score.inputs[0].new_empty(0)
        found = []
        for row in torch.arange(len(place) * inner, device=place.device).split(score.chunk()):
            order = row.div(inner, rounding_mode="floor")
            present = place[order] <= (row - order * inner).unsqueeze(1)
            found.append(groups.scores(mixer, present, baselines))
        return torch.cat(found)
