"""What measures of a method share: they ask it, and write a number for every element and target."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdhook_like.attribution.method import Attribution, GradientMethod, Method, PathMethod
from tdhook_like.attribution.perturbation import check_seed
from tdhook_like.attribution.wrapper import (
    Wrapper,
    columns,
    is_one_run,
    keys_only,
    private_draws,
    resolved,
)
from tdhook_like.errors import ContextError
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
        if not self.own_at:
            keys_only(self)
        if not self.method.writes_keys:
            raise ContextError(
                f"{type(self).__name__} measures attributions of keys, and {self.method!r} writes none."
            )
        check_seed(self.seed)

    @property
    def own_at(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the method itself sees to submodules, once, at the explained inputs."""
        if self.asks_elsewhere:
            return False
        return is_one_run(self.method) or getattr(self.method, "own_at", False)

    @abstractmethod
    def measured(self, score: Score, own: Sequence[Tensor]) -> Tensor:
        """The measure, ``[*E, *rest, T]``.

        Args:
            score: What is explained; without rules, unless the method is asked elsewhere, too.
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

    def explained_here(self, score: Score) -> Attribution:
        """What the method says of the explained inputs: of one run where that is all it needs."""
        method = self.method
        if isinstance(method, PathMethod):
            draws = private_draws(self.seed, score.inputs)
            against = resolved(self.baselines, score, draws)
            return method.attribute(score.at(score.inputs, against), against)
        assert isinstance(method, GradientMethod)
        if score.once is not None:
            return score.once(method)
        if is_one_run(method):  # a wrapper around this measure asks it elsewhere
            raise ContextError(
                f"{type(method).__name__} is made for one run at the explained inputs alone."
            )
        here = [x.unsqueeze(0) for x in score.inputs]
        return Attribution([values.squeeze(0) for values in self.explained(score, here)])

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Asks the method, and measures what it says."""
        if self.asks_elsewhere:
            here = [x.unsqueeze(0) for x in score.inputs]
            own = [values.squeeze(0) for values in self.explained(score, here)]
            found, value = Attribution(own), self.measured(score, own)
        else:
            found = self.explained_here(score)
            own = columns(found)
            value = self.measured(score.plain(), own)
        missing = len(score.batch) - score.dims
        if missing:  # a trajectory's number stands at each of its steps
            elements, rest = value.shape[: score.dims], value.shape[score.dims :]
            value = value.reshape(*elements, *[1] * missing, *rest)
            value = value.expand(*score.batch, *rest).clone()
        value = value.to(score.inputs[0].dtype)
        return Attribution(
            own,
            found.modules,
            gap=value,
            scale=torch.zeros_like(value),
            unhandled=found.unhandled,
        )


def over_features(values: Tensor, dims: int) -> Tensor:
    """Sums ``[*E, …]`` with ``dims`` leading dimensions to ``[*E]``, in float64."""
    return values.double().unsqueeze(-1).flatten(dims).sum(-1)
