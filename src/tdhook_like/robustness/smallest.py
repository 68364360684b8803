"""How small a change of which key is enough?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdhook_like.attribution.ascent import beside, own_column, scores_at
from tdhook_like.attribution.bounds import Box
from tdhook_like.attribution.method import Attribution
from tdhook_like.attribution.noise import by_key
from tdhook_like.attribution.perturbation import whole_number
from tdhook_like.attribution.wrapper import Wrapper
from tdhook_like.errors import ContextError, InputError
from tdhook_like.robustness.change import Change
from tdhook_like.score import Score

__all__ = ["MinParamPerturbation"]


@dataclass(frozen=True, init=False)
class MinParamPerturbation(Wrapper):
    """The smallest size at which an attack or a corruption flips the decision, for each key alone.

    A decision has flipped where the target's score is below ``threshold`` (above, if the attack's goal
    is to raise it): with ``Lead("logits")`` where another action is ahead. Sizes between 0 and the
    attack's epsilon are tried: first ``n_sizes`` evenly spaced ones, the smaller before the larger,
    then ``n_halvings`` times the middle between the largest that did nothing and the first that did.
    What is found is written at ``("smallest_change", *key)``, one number for every element: infinity
    where not even the attack's epsilon was enough, 0 where nothing had to change.

    Args:
        method: The attack or corruption, with a target and the largest epsilon of every key.
        threshold: Where the decision flips.
        together: Whether all keys are changed at once, each by the same share of its epsilon.
        n_sizes: How many sizes are tried at first; more where larger changes may do less.
        n_halvings: How often the interval is halved that is left over.
        root: Where the sizes go.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        options: Those of :class:`Method` that shall not be as ``method`` has them.

    Raises:
        ContextError: If ``method`` is neither an attack nor a corruption.
        InputError: If a number makes no sense.

    >>> from tensordict import TensorDict
    >>> from tdhook_like.robustness import FGSM
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, 1.0)
    >>> attack = FGSM("y", epsilon=4.0)  # y is 3, and falls by 2 for every 1 of epsilon
    >>> smallest = MinParamPerturbation(attack, n_sizes=4, n_halvings=20)
    >>> with smallest.prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[1.0, 2.0]])}, [1]))
    >>> td["smallest_change", "x"].round(decimals=4)
    tensor([1.5000])
    """

    threshold: float = field(default=0.0, kw_only=True)
    together: bool = field(default=False, kw_only=True)
    n_sizes: int = field(default=8, kw_only=True)
    n_halvings: int = field(default=8, kw_only=True)

    complete: ClassVar[bool] = False

    def __init__(
        self,
        method: Change,
        *,
        threshold: float = 0.0,
        together: bool = False,
        n_sizes: int = 8,
        n_halvings: int = 8,
        root: str = "smallest_change",
        internal_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(method, Change):
            raise ContextError(
                f"MinParamPerturbation takes an attack or a corruption, got {method!r}."
            )
        self.wrap(
            method,
            {"root": root, **options},
            threshold=threshold,
            together=together,
            n_sizes=n_sizes,
            n_halvings=n_halvings,
            internal_batch_size=internal_batch_size,
        )

    def __post_init__(self) -> None:
        """Checks the numbers."""
        super().__post_init__()
        if isinstance(self.threshold, bool) or not self.threshold - self.threshold == 0:
            raise InputError(f"threshold must be a finite number, got {self.threshold!r}.")
        whole_number("n_sizes", self.n_sizes, 1)
        whole_number("n_halvings", self.n_halvings, 0)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As for the attack."""
        context = super().prepare(*args, **kwargs)
        self.change.check_keys(context.keys or tuple(context.in_keys))
        return context

    @property
    def change(self) -> Change:
        """The attack or corruption."""
        assert isinstance(self.method, Change)
        return self.method

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Searches for each key alone, or for all together."""
        sizes = by_key("epsilon", self.change.epsilon, score)
        limits = self.change.box(score)
        plain = score.scores([x.unsqueeze(0).clone() for x in score.inputs])[0].movedim(-1, 0)
        keys = range(len(sizes))
        groups = [list(keys)] if self.together else [[i] for i in keys]
        found: list[Tensor] = [plain] * len(sizes)
        for group in groups:
            alone = [s if i in group else torch.zeros_like(s) for i, s in enumerate(sizes)]
            share = self._smallest(score, alone, limits, plain)
            for i in group:
                largest = sizes[i].max()
                # 0 · ∞ is not a size: a key that may not change flips nothing.
                found[i] = torch.where(share.isinf(), share, share * largest)
        return Attribution([self._at_elements(score, f) for f in found])

    def _smallest(
        self, score: Score, sizes: list[Tensor], limits: list[Box], plain: Tensor
    ) -> Tensor:
        """The smallest share of the sizes that flips each target's decision, ``[T, *E]``."""
        low, high = torch.zeros_like(plain), torch.full_like(plain, torch.inf)
        for i in range(1, self.n_sizes + 1):
            share = torch.full_like(plain, i / self.n_sizes)
            flips = self._flips(score, sizes, limits, share) & high.isinf()
            high = torch.where(flips, share, high)
            low = torch.where(high.isinf(), share, low)
            if not high.isinf().any():
                break
        # Where the first size did it, the interval begins at no change at all.
        for _ in range(self.n_halvings):
            middle = torch.where(high.isinf(), low, (low + high) / 2)
            flips = self._flips(score, sizes, limits, middle)
            flips = flips & ~high.isinf()
            high = torch.where(flips, middle, high)
            low = torch.where(flips, low, middle)
        return torch.where(self._crossed(plain), torch.zeros_like(high), high)

    def _flips(self, score: Score, sizes: list[Tensor], limits: list[Box], share: Tensor) -> Tensor:
        given = []
        for x, size in zip(score.inputs, sizes, strict=True):
            row = torch.empty((len(share), *x.shape), device="meta")
            given.append(size * beside(share, row).to(size))
        points = self.change.changed(score, given, limits, len(share))
        return self._crossed(own_column(scores_at(score, points)))

    def _crossed(self, scores: Tensor) -> Tensor:
        uphill = self.change.uphill
        return uphill * scores > uphill * self.threshold

    @staticmethod
    def _at_elements(score: Score, values: Tensor) -> Tensor:
        """``[T, *E]`` as ``[T, *B]``: a trajectory's number at each of its steps."""
        missing = len(score.batch) + 1 - values.ndim
        values = values.reshape(*values.shape, *[1] * missing)
        return values.expand(len(values), *score.batch).clone()
