"""Linear models that are fitted to the scores of coalitions: KernelSHAP and LIME."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, islice
from math import comb, inf
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_like.attribution.method import Attribution
from tdhook_like.attribution.mixing import Mixer
from tdhook_like.attribution.perturbation import CoalitionMethod, check_seed, whole_number
from tdhook_like.attribution.shapley import coalitions
from tdhook_like.attribution.weighted_fit import FOLDS, WeightedFit
from tdhook_like.errors import InputError
from tdhook_like.score import Score

__all__ = ["KernelShap", "Lime"]

Draws = Iterator[tuple[Tensor, Tensor, Tensor | None]]
"""Coalitions ``[c, n]``, their weights ``[c]`` and their folds ``[c]``; None for the latter where the
coalitions are enumerated, not drawn."""


@dataclass(frozen=True)
class KernelShap(CoalitionMethod):
    """Shapley values as the coefficients of a linear model of the coalitions' scores.

    The φ that minimise ``Σ_S π(S) (v(S) − v(∅) − Σ_{g∈S} φ_g)²`` among those that sum to
    ``score(input) − score(baseline)``, with ``π(S) = (n − 1) / (C(n, |S|) |S| (n − |S|))``. Exact where
    ``n_samples`` allows for all ``2**n − 2`` coalitions. Else those of the sizes that weigh most are
    enumerated, and pairs of a coalition and its complement are drawn from the others; the standard
    errors at ``error_root`` then come from leaving out one twentieth of the draws after another.

    Source: Lundberg & Lee 2017, theorem 2; for pairs and constraint Covert & Lee 2021, section 3.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        n_samples: How many coalitions are evaluated at most; ``2 n + 2048`` if None.
        seed: Of the generator that they are drawn from, which is no other's.
        baselines: What stands for an absent group; see :class:`CoalitionMethod`.
        masks: See :class:`GroupedMethod`.
        groups: See :class:`GroupedMethod`.
        divide: See :class:`GroupedMethod`.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        progress: Whether a progress bar counts the evaluations, for long runs; it needs tqdm.

    Raises:
        InputError: If ``n_samples`` is too small for the number of groups, or masks do not divide the
            features.
        KeyNotFoundError: If a mask is given for a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> from tensordict.nn import TensorDictModule
    >>> product = TensorDictModule(lambda a, b: a * b + a, in_keys=["a", "b"], out_keys=["y"])
    >>> with KernelShap("y", groups="keys").prepare(product) as hooked:
    ...     td = hooked(TensorDict({"a": torch.tensor([2.0]), "b": torch.tensor([3.0])}, [1]))
    >>> td["attr", "a"], td["attr", "b"]
    (tensor([5.]), tensor([3.]))
    """

    n_samples: int | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    complete: ClassVar[bool] = True
    sampled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the number of coalitions."""
        super().__post_init__()
        if self.n_samples is not None:
            whole_number("n_samples", self.n_samples, 1)
        check_seed(self.seed)

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Evaluates coalitions, in chunks, and solves for the coefficients."""
        low, high = self.ends(score, baselines)
        groups, mixer = self.divided(score), Mixer(score)
        n, change = groups.count, high - low
        rows = 2 * n + 2048 if self.n_samples is None else self.n_samples
        if n < 63 and 2**n - 2 <= rows:
            rows, draws = max(2**n - 2, 0), _all(n, score)
        else:
            _check_rows(self, rows, n)
            rows -= rows % 2
            draws = _largest_and_pairs(n, rows, score, self.seed)
        fit = WeightedFit(n, change)
        with self.counting(rows) as advance:
            for present, weights, folds in draws:
                values = groups.scores(mixer, present, baselines) - low
                fit.add(present, weights, values, folds)
                advance(len(present))
        values, errors = fit.summing_to(change)
        return self.complete_attribution(score, groups, values, change, errors)


@dataclass(frozen=True)
class Lime(CoalitionMethod):
    """The coefficients of a linear model that is fitted to the score around the input.

    The φ that minimise ``Σ_z π(z) (v(z) − c − Σ_g z_g φ_g)² + ridge · Σ_g φ_g²`` over coalitions z, whose
    size is drawn evenly from 0 to n and whose members are drawn evenly, too. Near ones count most:
    ``π(z) = exp(−D² / kernel_width²)`` with the cosine distance to everybody, ``D = 1 − √(|z| / n)``. All
    coalitions are enumerated, each with its probability, where there are at most ``n_samples``; else
    the standard errors at ``error_root`` come from leaving out one twentieth of the draws after another.
    Coefficients say what groups do near the input, and need not sum to anything.

    Source: Ribeiro et al. 2016, eq. 2 and section 3.3, with ridge regression for the sparse one.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        n_samples: How many coalitions are evaluated at most.
        kernel_width: How fast far coalitions lose weight; 0.25 is the authors' for images.
        ridge: The penalty on squared coefficients; 1 is that of the authors' code, 0 for none.
        seed: Of the generator that coalitions are drawn from, which is no other's.
        baselines: What stands for an absent group; see :class:`CoalitionMethod`.
        masks: See :class:`GroupedMethod`.
        groups: See :class:`GroupedMethod`.
        divide: See :class:`GroupedMethod`.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        progress: Whether a progress bar counts the evaluations, for long runs; it needs tqdm.

    Raises:
        InputError: If ``n_samples`` is too small for the number of groups, ``kernel_width`` is not above
            0 or ``ridge`` below it, or masks do not divide the features.
        KeyNotFoundError: If a mask is given for a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Linear(3, 1)
    >>> with torch.no_grad():
    ...     _ = net.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> with Lime("y", ridge=0.0).prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.ones(1, 3)}, [1]))
    >>> td["attr", "x"].round(decimals=4)
    tensor([[1., 2., 3.]])
    """

    n_samples: int = field(default=1000, kw_only=True)
    kernel_width: float = field(default=0.25, kw_only=True)
    ridge: float = field(default=1.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    sampled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        whole_number("n_samples", self.n_samples, 1)
        check_seed(self.seed)
        if not 0 < self.kernel_width < inf:
            raise InputError(f"kernel_width must be above 0, got {self.kernel_width!r}.")
        if not 0 <= self.ridge < inf:
            raise InputError(f"ridge must be at least 0, got {self.ridge!r}.")

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Evaluates coalitions, in chunks, and solves for the coefficients."""
        whole = score.scores([x.unsqueeze(0).clone() for x in score.inputs])[0]
        groups, mixer = self.divided(score), Mixer(score)
        n, rows = groups.count, self.n_samples
        if n < 63 and 2**n <= rows:
            draws, rows = self._all(n, score), 2**n
        else:
            _check_rows(self, rows, n)
            draws = self._around(n, score)
        fit = WeightedFit(n, whole)
        with self.counting(rows) as advance:
            for present, weights, folds in draws:
                # Differences to the input: the constant c takes what is subtracted.
                values = groups.scores(mixer, present, baselines) - whole
                fit.add(present, weights, values, folds)
                advance(len(present))
        values, errors = fit.with_constant(self.ridge)
        found = self.checked(score, groups.spread(values, self.divide))
        return Attribution(found, errors=self.errors_of(score, groups, errors))

    def _near(self, size: Tensor, n: int) -> Tensor:
        distance = 1 - (size.double() / n).sqrt()
        return (-(distance / self.kernel_width).square()).exp()

    def _all(self, n: int, score: Score) -> Draws:
        """Every coalition, as often as it would be drawn."""
        often = [self.n_samples / (n + 1) / comb(n, s) for s in range(n + 1)]
        for start in range(0, 2**n if n else 0, score.chunk()):
            stop = min(start + score.chunk(), 2**n)
            present = coalitions(start, stop, n, score.inputs[0].device)
            size = present.sum(1)
            yield (
                present,
                size.new_tensor(often, dtype=torch.float64)[size] * self._near(size, n),
                None,
            )

    def _around(self, n: int, score: Score) -> Draws:
        draw, device = torch.Generator().manual_seed(self.seed), score.inputs[0].device
        for start in range(0, self.n_samples, score.chunk()):
            row = torch.arange(start, min(start + score.chunk(), self.n_samples))
            uniform = torch.rand(len(row), n + 1, dtype=torch.float64, generator=draw)
            size = (uniform[:, n] * (n + 1)).long()
            present, weights = _members(uniform[:, :n], size), self._near(size, n)
            yield present.to(device), weights.to(device), (row % FOLDS).to(device)


def _members(uniform: Tensor, size: Tensor) -> Tensor:
    """Coalitions of given sizes ``[c]``: those with the smallest random numbers ``[c, n]``."""
    return uniform.argsort(-1).argsort(-1) < size.unsqueeze(1)


def _check_rows(method: KernelShap | Lime, rows: int, n: int) -> None:
    least = 2 * n + 2 * FOLDS
    if rows < least:
        name = type(method).__name__
        raise InputError(
            f"{name} fits {n} coefficients, one for each group, to n_samples={rows} evaluations; it "
            f"takes at least {least}. Take more, or larger groups (groups='keys', or masks)."
        )


def _all(n: int, score: Score) -> Draws:
    """All coalitions but nobody and everybody, under the Shapley kernel."""
    by_size = [0.0, *((n - 1) / (comb(n, s) * s * (n - s)) for s in range(1, n)), 0.0]
    for start in range(1, 2**n - 1, score.chunk()):
        stop = min(start + score.chunk(), 2**n - 1)
        present = coalitions(start, stop, n, score.inputs[0].device)
        size = present.sum(1)
        yield present, size.new_tensor(by_size, dtype=torch.float64)[size], None


def _largest_and_pairs(n: int, rows: int, score: Score, seed: int) -> Draws:
    """The sizes of which there are fewer coalitions than would be drawn, whole; pairs of others."""
    chunk, device = score.chunk(), score.inputs[0].device
    by_size = [(n - 1) / (s * (n - s)) for s in range(1, n)]  # of all coalitions of a size
    size, left = 1, rows
    while 2 * size < n:
        number, share = 2 * comb(n, size), 2 * by_size[size - 1] / sum(by_size[size - 1 : n - size])
        # Single groups and their complements first: they make the coefficients determinate.
        if number > left * share and size > 1:
            break
        weight = by_size[size - 1] / comb(n, size)
        for present in _of_size(size, n, chunk):
            for block in (present.to(device), ~present.to(device)):
                weights = torch.full((len(block),), weight, dtype=torch.float64, device=device)
                yield block, weights, None
        size, left = size + 1, left - number
    rest = torch.tensor(by_size[size - 1 : n - size], dtype=torch.float64)
    up_to = (rest / rest.sum()).cumsum(0)
    draw = torch.Generator().manual_seed(seed)
    pairs = max(chunk // 2, 1)
    for start in range(0, left // 2, pairs):
        pair = torch.arange(start, min(start + pairs, left // 2))
        uniform = torch.rand(len(pair), n + 1, dtype=torch.float64, generator=draw)
        sizes = size + torch.searchsorted(up_to[:-1], uniform[:, n].contiguous(), right=True)
        present = _members(uniform[:, :n], sizes)
        present = torch.stack([present, ~present], 1).flatten(0, 1).to(device)
        weights = torch.full((len(present),), float(rest.sum()) / left, dtype=torch.float64)
        folds = (pair % FOLDS).repeat_interleave(2).to(device)
        for part in range(0, len(present), chunk):
            block = slice(part, part + chunk)
            yield present[block], weights[block].to(device), folds[block]


def _of_size(size: int, n: int, chunk: int) -> Iterator[Tensor]:
    """All coalitions of one size, ``[c, n]`` at a time."""
    every = combinations(range(n), size)
    while members := list(islice(every, chunk)):
        yield torch.zeros(len(members), n, dtype=torch.bool).scatter_(
            1, torch.tensor(members), True
        )
