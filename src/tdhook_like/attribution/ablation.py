"""One group of features at a time: set to a baseline, or taken from another batch element."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_like.attribution.method import Attribution
from tdhook_like.attribution.mixing import Mixer
from tdhook_like.attribution.perturbation import (
    CoalitionMethod,
    GroupedMethod,
    Mean,
    check_seed,
    whole_number,
)
from tdhook_like.errors import InputError
from tdhook_like.score import Score

__all__ = ["FeatureAblation", "FeaturePermutation"]


@dataclass(frozen=True)
class FeatureAblation(CoalitionMethod):
    """What the score loses when one group of features is set to its baseline.

    ``S(x) − S(x with group g at the baseline)``, one evaluation per group and one at the input. Of a
    linear score it is weight × (input − baseline); what groups do together is counted for each of
    them, so that attributions need not sum to anything.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        baselines: What a group is set to; see :class:`CoalitionMethod`.
        masks: See :class:`GroupedMethod`.
        groups: See :class:`GroupedMethod`.
        divide: See :class:`GroupedMethod`.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        progress: Whether a progress bar counts the evaluations, for long runs; it needs tqdm.

    Raises:
        InputError: If masks do not divide the features into groups.
        KeyNotFoundError: If a mask is given for a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Linear(3, 1)
    >>> with torch.no_grad():
    ...     _ = net.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> method = FeatureAblation("y", masks={"x": torch.tensor([0, 1, 1])})
    >>> with method.prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.ones(1, 3)}, [1]))
    >>> td["attr", "x"]
    tensor([[1.0000, 2.5000, 2.5000]])
    """

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Ablates every group, in chunks."""
        groups, mixer, found = self.divided(score), Mixer(score), []
        with self.counting(groups.count + 1) as advance:
            for numbers in _in_chunks(-1, groups.count, score):
                # All but one are there, and all in the first row: no group has the number -1.
                present = _without(numbers, groups.count)
                found.append(groups.scores(mixer, present, baselines))
                advance(len(numbers))
        scores = torch.cat(found)
        values = groups.spread(scores[:1] - scores[1:], self.divide)
        return Attribution(self.checked(score, values))


@dataclass(frozen=True)
class FeaturePermutation(GroupedMethod):
    """What the score loses when one group of features comes from another batch element.

    The mean, over drawn permutations π of the batch, of ``S(x) − S(x with group g of x_π)``. Nothing
    has to be known of a baseline: what stands in for a feature are the batch's own values. It is the
    one method for which batch elements depend on each other, and the batch should be large and of
    the kind that is asked about. The standard errors are those of the mean over permutations.

    Source: Breiman 2001, section 10; Fisher et al. 2019.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        n_samples: How many permutations are drawn for each group.
        seed: Of the generator that they are drawn from, which is no other's.
        masks: See :class:`GroupedMethod`.
        groups: See :class:`GroupedMethod`.
        divide: See :class:`GroupedMethod`.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        progress: Whether a progress bar counts the evaluations, for long runs; it needs tqdm.

    Raises:
        InputError: If there are fewer than two batch elements, ``n_samples`` is below 1, or masks do
            not divide the features into groups.
        KeyNotFoundError: If a mask is given for a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Linear(2, 1)
    >>> td = TensorDict({"x": torch.tensor([[1.0, 5.0], [3.0, 5.0]])}, [2])
    >>> with FeaturePermutation("y").prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(td)
    >>> td["attr", "x"][:, 1], ("attr_error", "x") in td.keys(True)  # a constant bears no news
    (tensor([0., 0.]), True)
    """

    n_samples: int = field(default=10, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    sampled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the number of permutations."""
        super().__post_init__()
        whole_number("n_samples", self.n_samples, 1)
        check_seed(self.seed)

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Permutes every group ``n_samples`` times, in chunks."""
        mixer = Mixer(score)
        whole = mixer.scores([x.unsqueeze(0).clone() for x in score.inputs])
        elements = whole.shape[1:-1]
        if elements.numel() < 2:
            raise InputError(
                "FeaturePermutation takes a group's values from other batch elements, and there is "
                f"{elements.numel()} element (batch {tuple(score.batch)}). Give a batch, or take "
                "FeatureAblation, which sets values to a baseline."
            )
        groups, mean = self.divided(score), Mean()
        draw = torch.Generator().manual_seed(self.seed)
        at_once = max(score.chunk() // max(groups.count, 1), 1)
        with self.counting(self.n_samples * groups.count) as advance:
            for start in range(0, self.n_samples if groups.count else 0, at_once):
                n, found = min(at_once, self.n_samples - start), []
                for rows in _in_chunks(0, n * groups.count, score):
                    numbers = rows % groups.count
                    others = self._others(score, elements, len(rows), draw)
                    present = _without(numbers, groups.count)
                    found.append(whole - groups.scores(mixer, present, others))
                    advance(len(rows))
                mean.add(torch.cat(found).unflatten(0, (n, groups.count)))
        if not groups.count:
            mean.add(whole[:, :0])
        found = self.checked(score, groups.spread(mean.value(), self.divide))
        return Attribution(found, errors=self.errors_of(score, groups, mean.error()))

    @staticmethod
    def _others(
        score: Score, elements: torch.Size, rows: int, draw: torch.Generator
    ) -> list[Tensor]:
        """Inputs ``[rows, *E, *F]`` whose elements come in an order drawn for each row."""
        # A random order of random numbers; one draw per row, so that chunks do not matter.
        uniform = torch.rand(rows, elements.numel(), dtype=torch.float64, generator=draw)
        order = uniform.argsort(-1).to(score.inputs[0].device)
        last = len(elements) - 1
        return [x.flatten(0, last)[order].reshape(rows, *x.shape) for x in score.inputs]


def _in_chunks(start: int, stop: int, score: Score) -> Iterator[Tensor]:
    """The numbers from ``start`` to ``stop``, as many at a time as are evaluated at once."""
    chunk, device = score.chunk(), score.inputs[0].device
    for first in range(start, stop, chunk):
        yield torch.arange(first, min(first + chunk, stop), device=device)


def _without(numbers: Tensor, count: int) -> Tensor:
    """The coalitions of all groups but one, ``[c, count]``."""
    return torch.arange(count, device=numbers.device) != numbers.unsqueeze(1)
