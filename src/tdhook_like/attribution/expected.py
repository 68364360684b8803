"""Explanations against many baselines: expected gradients, GradientSHAP, any method's mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.drawing import Drawable, check_rows, drawn, drawn_from
from tdhook_like.attribution.method import Attribution, Method, PathMethod
from tdhook_like.attribution.noise import PerKey, by_key, check_sizes, normal_rows
from tdhook_like.attribution.perturbation import Mean, check_seed, whole_number
from tdhook_like.attribution.wrapper import (
    Wrapper,
    checked,
    columns,
    keys_only,
    private_draws,
    resolved,
)
from tdhook_like.baselines import BaselineSpec
from tdhook_like.baselines import check as check_baselines
from tdhook_like.errors import BaselineError, InputError
from tdhook_like.keys import check_known
from tdhook_like.randomness import ForeignDraws
from tdhook_like.score import Score

__all__ = ["ExpectedGradients", "GradientShap", "OverBaselines", "missed"]


@dataclass(frozen=True)
class ExpectedGradients(PathMethod):
    """Integrated gradients averaged over baselines that are drawn: ``E[(x − b) ∂S(b + α (x − b))]``.

    Each of ``n_samples`` draws takes a baseline b and, for every element, a place α on the way from it
    to the input, uniform in [0, 1]. Attributions sum to ``score(input) − mean score(baselines)`` up to
    the error of sampling, which is written at ``gap_root``; standard errors at ``error_root``.

    Source: Erion et al. 2021, eq. 3.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        baselines: What baselines are drawn from: a TensorDict of observations ``[n]``; a tensor of
            rows ``[n, *features]``; a replay buffer, by ``FromBuffer(buffer)``; a
            ``torch.distributions.Distribution``; a function of the input. Or a dict of these by key;
            rows of several keys are drawn together. Numbers and ``FromKey`` stay what they are.
        n_samples: How many draws.
        seed: Of the generators that are drawn from, which are no others'.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        gap_tolerance: A warning is given where the gap exceeds this share of the larger of the
            score's change and the mean size of such changes in the batch. None for no warning.

    Raises:
        BaselineError: If there is nothing to draw baselines from.
        InputError: If ``n_samples``, ``seed`` or ``gap_tolerance`` make no sense.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, 2.0)
    >>> seen = torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    >>> method = ExpectedGradients("y", baselines=seen, n_samples=400)
    >>> with method.prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[1.0, 4.0]])}, [1]))
    >>> td["attr", "x"].round()  # 2 × (4 − 2), up to td["attr_error", "x"]
    tensor([[0., 4.]])
    """

    baselines: Drawable = field(default=None, kw_only=True)
    n_samples: int = field(default=50, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    internal_batch_size: int | None = field(default=None, kw_only=True)
    gap_tolerance: float | None = field(default=0.1, kw_only=True)

    complete: ClassVar[bool] = True
    sampled: ClassVar[bool] = True
    gap_advice: ClassVar[str] = "Take more n_samples"

    def __post_init__(self) -> None:
        """Brings baselines to what can be drawn from, and checks the numbers."""
        super().__post_init__()
        keys_only(self)
        if self.baselines is None:
            raise BaselineError(
                f"{type(self).__name__} draws baselines: say from what, such as "
                "baselines=observations (a TensorDict), or FromBuffer(replay_buffer)."
            )
        self._settle("baselines", drawn_from(self.baselines))
        whole_number("n_samples", self.n_samples, 1)
        check_seed(self.seed)
        if self.internal_batch_size is not None:
            whole_number("internal_batch_size", self.internal_batch_size, 1)
        if self.gap_tolerance is not None and not self.gap_tolerance > 0:
            raise InputError(f"gap_tolerance must be above 0 or None, got {self.gap_tolerance!r}.")

    def ends(self, score: Score, n: int, noise: torch.Generator) -> list[Tensor]:
        """Where n ways end, ``[n or 1, *B, *F]``: at the inputs."""
        return [x.unsqueeze(0) for x in score.inputs]

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Draws baselines and places, in chunks, and weighs the slopes there by the ways."""
        check_rows(self.baselines, score)
        draws = private_draws(self.seed, score.inputs)
        places, noise = (torch.Generator().manual_seed(self.seed) for _ in range(2))
        found = [Mean() for _ in score.inputs]
        low, chunk = Mean(), score.chunk()
        high = score.scores([x.unsqueeze(0) for x in score.inputs])[0]
        for start in range(0, self.n_samples, chunk):
            n = min(chunk, self.n_samples - start)
            with ForeignDraws(), draws:
                begins = drawn(self.baselines, score, n)
            ends = self.ends(score, n, noise)
            ways = [e - b for e, b in zip(ends, begins, strict=True)]
            alphas = _uniform_rows(score, n, places)
            points = [
                b + _over_features(alphas, b).to(b) * way
                for b, way in zip(begins, ways, strict=True)
            ]
            grads, _ = score.gradients_at(points)
            low.add(score.scores(begins))
            for mean, way, grad in zip(found, ways, grads, strict=True):
                mean.add(way.unsqueeze(1) * grad)
        values = checked(self, score, [mean.value() for mean in found])
        errors = [mean.error().to(x.dtype) for mean, x in zip(found, score.inputs, strict=True)]
        change = high - low.value().to(high)
        gap = missed(values, change)
        return Attribution(values, gap=gap, scale=change.abs(), errors=errors)


@dataclass(frozen=True)
class GradientShap(ExpectedGradients):
    """Expected gradients whose ways end at the input with noise on it.

    ``E[(x + ε − b) ∂S(b + α (x + ε − b))]``, ``ε ~ N(0, stdevs²)``. What attributions sum to is still
    measured against ``score(input) − mean score(baselines)``: the gap holds the noise's part, too.

    Source: Lundberg & Lee 2017; Erion et al. 2021, eq. 3; Smilkov et al. 2017 for the noise.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        stdevs: The noise's size, for all keys or by key; keys that a dict leaves out have none.
        baselines: What baselines are drawn from; see :class:`ExpectedGradients`.
        n_samples: How many draws.
        seed: Of the generators that are drawn from, which are no others'.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        gap_tolerance: See :class:`ExpectedGradients`.

    Raises:
        BaselineError: If there is nothing to draw baselines from.
        InputError: If a number makes no sense.
        KeyNotFoundError: If ``stdevs`` names a key that is not attributed.

    >>> GradientShap("y", baselines=torch.zeros(1, 2), stdevs={"x": 0.1}).stdevs
    {'x': 0.1}
    """

    stdevs: PerKey = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the noise, too."""
        super().__post_init__()
        check_sizes("stdevs", self.stdevs)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As for every method; ``stdevs`` have to be of attributed keys."""
        context = super().prepare(*args, **kwargs)
        if isinstance(self.stdevs, Mapping):
            known = context.keys or tuple(context.in_keys)
            check_known(self.stdevs, known, "attributed keys")
        return context

    def ends(self, score: Score, n: int, noise: torch.Generator) -> list[Tensor]:
        """Where n ways end, ``[n, *B, *F]``: near the inputs."""
        sizes = by_key("stdevs", self.stdevs, score)
        steps = normal_rows(score.inputs, n, noise)
        return [x + s * e for x, s, e in zip(score.inputs, sizes, steps, strict=True)]


@dataclass(frozen=True, init=False)
class OverBaselines(Wrapper):
    """The mean of a method's attributions against several baselines.

    Where a method promises a sum, its mean sums to ``score(input) − mean score(baselines)``.

    Source: Sturmfels et al. 2020, "Averaging over multiple baselines".

    Args:
        method: Any method that takes ``baselines``; its own are not used.
        over: A list of baselines, each of which counts once; or what ``n_samples`` baselines are
            drawn from, as for :class:`ExpectedGradients`. Then standard errors are written.
        n_samples: How many baselines are drawn.
        seed: Of the generator that they are drawn from, which is no other's.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        options: Those of :class:`Method` that shall not be as ``method`` has them.

    Raises:
        BaselineError: If ``method`` takes no baselines, or ``over`` holds none.
        InputError: If ``n_samples`` or ``seed`` make no sense.

    >>> from tensordict import TensorDict
    >>> from tdhook_like import IntegratedGradients
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, 2.0)
    >>> method = OverBaselines(IntegratedGradients("y"), over=[0.0, 1.0])
    >>> with method.prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[1.0, 3.0]])}, [1]))
    >>> td["attr", "x"].round(decimals=4)
    tensor([[1., 5.]])
    """

    over: Drawable | Sequence[BaselineSpec | Mapping[NestedKey, BaselineSpec]] = field(kw_only=True)
    n_samples: int = field(default=10, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __init__(
        self,
        method: Method,
        *,
        over: Drawable | Sequence[BaselineSpec | Mapping[NestedKey, BaselineSpec]],
        n_samples: int = 10,
        seed: int = 0,
        internal_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.wrap(
            method,
            options,
            over=over,
            n_samples=n_samples,
            seed=seed,
            internal_batch_size=internal_batch_size,
        )

    def __post_init__(self) -> None:
        """Checks that there is something to average over, and a method that takes it."""
        super().__post_init__()
        keys_only(self)
        if not (isinstance(self.method, PathMethod) and hasattr(self.method, "baselines")):
            raise BaselineError(
                f"{type(self.method).__name__} takes no baselines, so there is nothing to average over."
            )
        listed = isinstance(self.over, list | tuple)
        if self.over is None or (listed and not self.over):
            raise BaselineError("over= holds no baselines: give a list, or what to draw them from.")
        self._settle("over", tuple(self.over) if listed else drawn_from(self.over))  # pyright: ignore
        whole_number("n_samples", self.n_samples, 1)
        check_seed(self.seed)

    @property
    def baselines(self) -> Any:
        """The first of the list, or what baselines are drawn from."""
        return self.over[0] if isinstance(self.over, tuple) else self.over

    @property
    def complete(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the method promises a sum."""
        return self.method.complete

    @property
    def sampled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether baselines are drawn, or samples by the method."""
        return not isinstance(self.over, tuple) or self.method.sampled

    @property
    def gap_tolerance(self) -> float | None:
        """The method's own."""
        return getattr(self.method, "gap_tolerance", None)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As for every method; every baseline has to be one, of attributed keys."""
        context = super().prepare(*args, **kwargs)
        known = context.keys or tuple(context.in_keys)
        for spec in self.over if isinstance(self.over, tuple) else (self.over,):
            check_baselines(spec, known)
        return context

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Asks once for every baseline."""
        draws = private_draws(self.seed, score.inputs)
        specs: Any = self.over if isinstance(self.over, tuple) else (self.over,) * self.n_samples
        check_rows(None if isinstance(self.over, tuple) else self.over, score)
        values, gap, scale = [Mean() for _ in score.inputs], Mean(), Mean()
        variances = [torch.zeros((), dtype=torch.float64, device=x.device) for x in score.inputs]
        for number, spec in enumerate(specs):
            against = resolved(spec, score, draws)
            found = self.asked(number).attribute(score.at(score.inputs, against), against)
            for mean, each in zip(values, columns(found), strict=True):
                mean.add(each.unsqueeze(0))
            if found.gap is not None and found.scale is not None:
                gap.add(found.gap.unsqueeze(0))
                scale.add(found.scale.unsqueeze(0))
            if found.errors is not None:
                errors = columns(Attribution(found.errors))
                variances = [
                    v + e.double().square() for v, e in zip(variances, errors, strict=True)
                ]
        made = Attribution(checked(self, score, [mean.value() for mean in values]))
        if self.complete:
            made.gap, made.scale = (m.value().to(score.inputs[0].dtype) for m in (gap, scale))
        if self.sampled:
            # Drawn baselines differ by more than the method's own error, and include it.
            known = isinstance(self.over, tuple)
            each = (
                [v.sqrt() / len(specs) for v in variances] if known else [m.error() for m in values]
            )
            made.errors = [e.to(x.dtype) for e, x in zip(each, score.inputs, strict=True)]
        return made


def missed(found: Sequence[Tensor], change: Tensor) -> Tensor:
    """What the sum of attributions ``[T, *B, *F]`` misses a score's change ``[*E, T]`` by."""
    dims = change.ndim - 1  # fewer than the batch has where a trajectory is one element
    total = torch.zeros_like(change.movedim(-1, 0))
    for values in found:
        flat = values.flatten(dims + 1).sum(-1) if values.ndim > dims + 1 else values
        total = total + flat
    return total.movedim(0, -1) - change


def _uniform_rows(score: Score, n: int, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1], ``[n, *E]``: one for every element, row by row as for the noise."""
    shape = score.batch[: score.dims]
    rows = [torch.rand(shape, dtype=torch.float64, generator=generator) for _ in range(n)]
    return torch.stack(rows)


def _over_features(values: Tensor, like: Tensor) -> Tensor:
    """``[n, *E]`` with dimensions of one behind, to stand beside ``[n, *E, …]``."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))
