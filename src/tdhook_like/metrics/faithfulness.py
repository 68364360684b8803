"""Do attributions say what the score does when inputs change?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.gradient import Saliency
from tdhook_like.attribution.method import Method
from tdhook_like.attribution.noise import PerKey, by_key, check_sizes, normal_rows
from tdhook_like.attribution.perturbation import whole_number
from tdhook_like.attribution.wrapper import Wrapper, private_draws, resolved
from tdhook_like.baselines import BaselineSpec
from tdhook_like.baselines import check as check_baselines
from tdhook_like.errors import InputError
from tdhook_like.keys import check_known
from tdhook_like.metrics.measure import Measure, over_features
from tdhook_like.score import Score

__all__ = ["Completeness", "Infidelity", "Noise", "Removal"]

Fill = BaselineSpec | Mapping[NestedKey, BaselineSpec] | None


@dataclass(frozen=True)
class Perturbation(ABC):
    """What is taken off the input, at random."""

    @abstractmethod
    def draw(
        self, score: Score, away: Sequence[Tensor], n: int, draw: torch.Generator
    ) -> list[tuple[Tensor, Tensor]]:
        """For each key what is taken off, ``[n, *B, *F]``, and what share of ``away`` that is.

        Args:
            score: What is explained.
            away: Inputs minus what stands for "nothing there", ``[*B, *F]``.
            n: How often.
            draw: The generator to draw from.
        """

    def check(self, keys: tuple[NestedKey, ...]) -> None:  # noqa: B027 (most name no keys)
        """Raises :class:`KeyNotFoundError` for keys that are not attributed."""


@dataclass(frozen=True)
class Noise(Perturbation):
    """Normal noise.

    Args:
        stdevs: Its size, for all keys or by key; keys that a dict leaves out have none.

    >>> Noise(0.1), Noise({"observation": 0.2})
    (Noise(stdevs=0.1), Noise(stdevs={'observation': 0.2}))
    """

    stdevs: PerKey = 0.1

    def __post_init__(self) -> None:
        """Checks the size."""
        check_sizes("stdevs", self.stdevs)

    def check(self, keys: tuple[NestedKey, ...]) -> None:
        """As for every perturbation."""
        if isinstance(self.stdevs, Mapping):
            check_known(self.stdevs, keys, "attributed keys")

    def draw(
        self, score: Score, away: Sequence[Tensor], n: int, draw: torch.Generator
    ) -> list[tuple[Tensor, Tensor]]:
        """Draws row by row."""
        sizes = by_key("stdevs", self.stdevs, score)
        found = []
        for noise, size, way in zip(normal_rows(score.inputs, n, draw), sizes, away, strict=True):
            off = size * noise
            # A feature that is where nothing is has no share of anything.
            found.append((off, torch.where(way == 0, torch.zeros_like(off), off / way)))
        return found


@dataclass(frozen=True)
class Removal(Perturbation):
    """Some features set to what stands for "nothing there", the others left as they are.

    Args:
        share: With which probability a feature is.

    >>> Removal(0.2)
    Removal(share=0.2)
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        """Checks the share."""
        if not 0 < self.share <= 1:
            raise InputError(f"share must lie in (0, 1], got {self.share!r}.")

    def draw(
        self, score: Score, away: Sequence[Tensor], n: int, draw: torch.Generator
    ) -> list[tuple[Tensor, Tensor]]:
        """Draws row by row."""
        rows = [
            [torch.rand(w.shape, dtype=torch.float64, generator=draw) < self.share for w in away]
            for _ in range(n)
        ]
        masks = [torch.stack(key) for key in zip(*rows, strict=True)]
        return [(mask.to(way) * way, mask.to(way)) for mask, way in zip(masks, away, strict=True)]


@dataclass(frozen=True, init=False)
class Infidelity(Measure):
    """How far attributions are from predicting the score's fall: ``E[(Iᵀ Φ − (S(x) − S(x − I)))²]``.

    0 for a linear score and an exact method. Where attributions are of inputs as a whole (input ×
    gradient, integrated gradients, LRP, Shapley values), ``IᵀΦ`` is the sum of each times the share of
    ``x − fill`` that I takes off; where they are per unit (:class:`Saliency`), it is the plain product.
    Written at ``"infidelity"``.

    Source: Yeh et al. 2019, definition 2.1, and section 4 for scaling.

    Args:
        method: What is measured.
        perturbation: :class:`Noise` or :class:`Removal`.
        fill: What stands for "nothing there": a baseline, for all keys or by key; the method's own,
            or zeros, if None.
        per_unit: Whether attributions are per unit of the input; if None, those of Saliency are.
        scaled: Whether Φ is first multiplied by the number, one for each element and target, that
            makes the measure smallest, so that methods of different scales compare.
        n_samples: How many perturbations are drawn.
        seed: Of the generator that they are drawn from, which is no other's.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        options: Those of :class:`Method` that shall not be as ``method`` has them.

    Raises:
        InputError: If an option makes no sense.
        KeyNotFoundError: If an option names a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> from tdhook_like import InputXGradient
    >>> net = torch.nn.Linear(2, 1)
    >>> with Infidelity(InputXGradient("y")).prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked.observe(TensorDict({"x": torch.randn(3, 2)}, [3]))
    >>> td["infidelity"] < 1e-9
    tensor([True, True, True])
    """

    perturbation: Perturbation = field(default=Removal(), kw_only=True)
    fill: Fill = field(default=None, kw_only=True)
    per_unit: bool | None = field(default=None, kw_only=True)
    scaled: bool = field(default=False, kw_only=True)
    n_samples: int = field(default=100, kw_only=True)

    def __init__(
        self,
        method: Method,
        *,
        perturbation: Perturbation | None = None,
        fill: Fill = None,
        per_unit: bool | None = None,
        scaled: bool = False,
        n_samples: int = 100,
        seed: int = 0,
        internal_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.settle(
            method,
            options,
            "infidelity",
            perturbation=Removal() if perturbation is None else perturbation,
            fill=fill,
            per_unit=per_unit,
            scaled=scaled,
            n_samples=n_samples,
            seed=seed,
            internal_batch_size=internal_batch_size,
        )

    def __post_init__(self) -> None:
        """Checks the perturbation."""
        super().__post_init__()
        whole_number("n_samples", self.n_samples, 1)
        if not isinstance(self.perturbation, Perturbation):
            raise InputError(f"perturbation={self.perturbation!r}: give Noise(…) or Removal(…).")

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As for every method; what is named has to be attributed."""
        context = super().prepare(*args, **kwargs)
        known = context.keys or tuple(context.in_keys)
        check_baselines(self.fill, known)
        self.perturbation.check(known)
        return context

    def measured(self, score: Score, own: Sequence[Tensor]) -> Tensor:
        """Mean squares over all perturbations, in chunks."""
        fill = self.baselines if self.fill is None else self.fill
        nothing = resolved(fill, score, private_draws(self.seed, score.inputs))
        away = [x - b for x, b in zip(score.inputs, nothing, strict=True)]
        draw, chunk = torch.Generator().manual_seed(self.seed), score.chunk()
        plain = score.scores([x.unsqueeze(0) for x in score.inputs]).double()
        per_unit = _per_unit(self.method) if self.per_unit is None else self.per_unit
        apart = total = squares = products = torch.zeros_like(plain[0])
        for start in range(0, self.n_samples, chunk):
            n = min(chunk, self.n_samples - start)
            drawn = self.perturbation.draw(score, away, n, draw)
            points = [x - off for x, (off, _) in zip(score.inputs, drawn, strict=True)]
            falls = plain - score.scores(points).double()
            said = torch.zeros_like(falls)
            for values, (off, share) in zip(own, drawn, strict=True):
                weight = (off if per_unit else share).unsqueeze(1)
                parts = over_features(weight * values.unsqueeze(0), 2 + score.dims)
                said = said + parts.movedim(1, -1)
            apart = apart + (said - falls).square().sum(0)
            total = total + falls.square().sum(0)
            squares, products = squares + said.square().sum(0), products + (said * falls).sum(0)
        if self.scaled:
            # With the best scale β = E[said · fall] / E[said²]: E[(β said − fall)²].
            ratio = torch.where(squares > 0, products.square() / squares, squares)
            apart = (total - ratio).clamp_min(0)
        return apart / self.n_samples


@dataclass(frozen=True, init=False)
class Completeness(Measure):
    """What attributions' sum misses ``score(input) − score(fill)`` by, for any method.

    Methods that promise the sum write this themselves; of others it tells how much they lose. Written
    at ``"completeness_gap"``.

    Source: Sundararajan et al. 2017, proposition 1; Bach et al. 2015, eq. 2.

    Args:
        method: What is measured.
        fill: The baseline, for all keys or by key; the method's own, or zeros, if None.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        options: Those of :class:`Method` that shall not be as ``method`` has them.

    Raises:
        BaselineError: If ``fill`` is no baseline, or of a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> from tdhook_like import InputXGradient
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Softplus())
    >>> _ = torch.nn.init.ones_(net[0].weight)
    >>> with Completeness(InputXGradient("y")).prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked.observe(TensorDict({"x": torch.tensor([[1.0]])}, [1]))
    >>> td["completeness_gap"]  # 0.731 of slope, 0.620 of change
    tensor([0.1109])
    """

    fill: Fill = field(default=None, kw_only=True)

    def __init__(
        self,
        method: Method,
        *,
        fill: Fill = None,
        seed: int = 0,
        internal_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.settle(
            method,
            options,
            "completeness_gap",
            fill=fill,
            seed=seed,
            internal_batch_size=internal_batch_size,
        )

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As for every method; the baseline has to be one, of attributed keys."""
        context = super().prepare(*args, **kwargs)
        check_baselines(self.fill, context.keys or tuple(context.in_keys))
        return context

    def measured(self, score: Score, own: Sequence[Tensor]) -> Tensor:
        """The sum minus the change."""
        fill = self.baselines if self.fill is None else self.fill
        against = resolved(fill, score, private_draws(self.seed, score.inputs))
        high = score.scores([x.unsqueeze(0) for x in score.inputs])[0].double()
        low = score.scores([b.unsqueeze(0) for b in against])[0].double()
        total = sum(over_features(values, 1 + score.dims) for values in own)
        assert isinstance(total, Tensor)
        return total.movedim(0, -1) - (high - low)


def _per_unit(method: Method) -> bool:
    while isinstance(method, Wrapper):
        method = method.method
    return isinstance(method, Saliency)
