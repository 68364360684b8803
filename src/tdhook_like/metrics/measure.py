"""What measures of a method share: they ask it, and write a number for every element and target."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdhook_like.attribution.method import Attribution, Method, PathMethod
from tdhook_like.attribution.perturbation import check_seed
from tdhook_like.attribution.wrapper import Wrapper, keys_only, private_draws
from tdhook_like.score import Score

__all__ = ["Measure"]


@dataclass(frozen=True, init=False)
class Measure(Wrapper):
    """How good a method's attributions are, by a number that is written beside them.

    A measure is prepared and called like the method that it measures. Attributions are written as by
    the method itself, and the measure at ``gap_root``, which each kind names after itself: ``[*B]``, or
    ``[*B, targets]`` for ``Each``. The model and all generators stay as they are.

    Args:
        method: What is measured.
        seed: Of the generator that is drawn from, which is no other's.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        options: Those of :class:`Method` that shall not be as ``method`` has them.
    """

    seed: int = field(default=0, kw_only=True)

    complete: ClassVar[bool] = True
    asks_elsewhere: ClassVar[bool] = False

    def settle(self, method: Method, options: Mapping[str, Any], place: str, **own: Any) -> None:
        """Settles all fields; the measure goes to ``place`` unless ``options`` say otherwise."""
        self.wrap(method, {"gap_root": place, **options}, **own)

    def __post_init__(self) -> None:
        """Checks the seed."""
        super().__post_init__()
        keys_only(self)
        check_seed(self.seed)

    @abstractmethod
    def measured(self, score: Score, own: Sequence[Tensor]) -> Tensor:
        """The measure, ``[*E, *rest, T]``.

        Args:
            score: What is explained.
            own: Attributions at the explained inputs, ``[T, *B, *F]`` for each key.
        """

    def asked(self, number: int) -> PathMethod:
        """The method itself every time: other samples would be taken for another explanation."""
        assert isinstance(self.method, PathMethod)
        return self.method

    def explained(self, score: Score, points: Sequence[Tensor]) -> list[Tensor]:
        """Attributions ``[k, T, *B, *F]`` for each key, at points ``[k, *B, *F]``."""
        if not isinstance(self.method, PathMethod):
            return self.attributions(score, points, 0, private_draws(self.seed, score.inputs))
        rows = []
        for i in range(len(points[0])):
            draws = private_draws(self.seed, score.inputs)  # the same baselines at every point
            rows.append(self.attributions(score, [p[i : i + 1] for p in points], 0, draws))
        return [torch.cat(key) for key in zip(*rows, strict=True)]

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Asks the method, and measures what it says."""
        here = [x.unsqueeze(0) for x in score.inputs]
        own = [values.squeeze(0) for values in self.explained(score, here)]
        value = self.measured(score, own)
        missing = len(score.batch) - score.dims
        if missing:  # a trajectory's number stands at each of its steps
            elements, rest = value.shape[: score.dims], value.shape[score.dims :]
            value = value.reshape(*elements, *[1] * missing, *rest)
            value = value.expand(*score.batch, *rest).clone()
        value = value.to(score.inputs[0].dtype)
        return Attribution(own, gap=value, scale=torch.zeros_like(value))


def over_features(values: Tensor, dims: int) -> Tensor:
    """Sums ``[*E, …]`` with ``dims`` leading dimensions to ``[*E]``, in float64."""
    return values.double().unsqueeze(-1).flatten(dims).sum(-1)
