"""How much may an explanation change where the input hardly does?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdhook_like.attribution.method import GradientMethod, Method
from tdhook_like.attribution.noise import PerKey, by_key, check_sizes
from tdhook_like.attribution.perturbation import whole_number
from tdhook_like.keys import check_known
from tdhook_like.metrics.measure import Measure, over_features
from tdhook_like.score import Score

__all__ = ["MaxSensitivity"]


@dataclass(frozen=True, init=False)
class MaxSensitivity(Measure):
    """The largest change of the attributions within a small box: ``max |Φ(y) − Φ(x)|₂``.

    Over ``n_samples`` points y that are drawn evenly from ``|y − x|∞ ≤ radius``, so that it is a lower
    bound of the maximum; by default relative to ``|Φ(x)|₂``. A method that draws samples or baselines
    draws the same ones at every point. Written at ``"sensitivity"``.

    Source: Yeh et al. 2019, section 3.

    Args:
        method: What is measured.
        radius: How far inputs move, for all keys or by key; keys that a dict leaves out stay.
        n_samples: How many points are drawn.
        relative: Whether the change is divided by the size of the attributions at the input; where
            they are all zero, by nothing.
        seed: Of the generator that they are drawn from, which is no other's.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        options: Those of :class:`Method` that shall not be as ``method`` has them.

    Raises:
        InputError: If a number makes no sense.
        KeyNotFoundError: If ``radius`` names a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> from tdhook_like import Saliency
    >>> net = torch.nn.Linear(2, 1)
    >>> with MaxSensitivity(Saliency("y")).prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked.observe(TensorDict({"x": torch.randn(3, 2)}, [3]))
    >>> td["sensitivity"]  # a straight line has one slope
    tensor([0., 0., 0.])
    """

    radius: PerKey = field(default=0.02, kw_only=True)
    n_samples: int = field(default=10, kw_only=True)
    relative: bool = field(default=True, kw_only=True)

    asks_elsewhere: ClassVar[bool] = True

    def __init__(
        self,
        method: Method,
        *,
        radius: PerKey = 0.02,
        n_samples: int = 10,
        relative: bool = True,
        seed: int = 0,
        internal_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.settle(
            method,
            options,
            "sensitivity",
            radius=radius,
            n_samples=n_samples,
            relative=relative,
            seed=seed,
            internal_batch_size=internal_batch_size,
        )

    def __post_init__(self) -> None:
        """Checks radius and samples."""
        super().__post_init__()
        check_sizes("radius", self.radius)
        whole_number("n_samples", self.n_samples, 1)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As for every method; radii have to be of attributed keys."""
        context = super().prepare(*args, **kwargs)
        if isinstance(self.radius, Mapping):
            known = context.keys or tuple(context.in_keys)
            check_known(self.radius, known, "attributed keys")
        return context

    def measured(self, score: Score, own: Sequence[Tensor]) -> Tensor:
        """Asks at every point, in chunks."""
        sizes = by_key("radius", self.radius, score)
        draw = torch.Generator().manual_seed(self.seed)
        at_once = score.chunk() if isinstance(self.method, GradientMethod) else 1
        dims, worst = 1 + score.dims, None
        for start in range(0, self.n_samples, at_once):
            rows = [
                [torch.rand(x.shape, dtype=torch.float64, generator=draw) for x in score.inputs]
                for _ in range(min(at_once, self.n_samples - start))
            ]
            points = [
                x + size * (2 * torch.stack(key) - 1).to(x)
                for x, size, key in zip(score.inputs, sizes, zip(*rows, strict=True), strict=True)
            ]
            found = self.explained(score, points)
            squares = [
                over_features((there.double() - here.double()).square(), 1 + dims)
                for there, here in zip(found, own, strict=True)
            ]
            most = torch.stack(squares).sum(0).amax(0)
            worst = most if worst is None else torch.maximum(worst, most)
        assert worst is not None
        change = worst.sqrt()
        if self.relative:
            sizes = [over_features(here.double().square(), dims) for here in own]
            length = torch.stack(sizes).sum(0).sqrt()
            change = torch.where(length > 0, change / length, change)
        return change.movedim(0, -1)
