"""What attacks and corruptions share: how much of which key may change, and where that is written."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.ascent import own_column, scores_at
from tdhook_like.attribution.bounds import (
    Bounds,
    Box,
    boxes,
    check_bounded_keys,
    check_bounds,
)
from tdhook_like.attribution.method import Attribution, PathMethod
from tdhook_like.attribution.noise import PerKey, by_key, check_sizes
from tdhook_like.attribution.perturbation import whole_number
from tdhook_like.attribution.wrapper import checked, keys_only
from tdhook_like.errors import InputError, KeyNotFoundError
from tdhook_like.keys import check_known
from tdhook_like.score import Score

__all__ = ["Change", "perturbed"]

GOALS = ("lower", "raise")


@dataclass(frozen=True)
class Change(PathMethod):
    """Changed inputs, one for each target, as large as they may be and no larger.

    They are written at ``("adversarial", *key)``, and the target's scores there at
    ``"adversarial_score"``. Like every explanation they leave the model and all generators as they
    are.

    Args:
        target: What the change is meant for; see :class:`Method`, also for the keyword arguments.
        epsilon: The size of the change, for all keys or by key; keys that a dict leaves out stay as
            they are.
        bounds: Between which values inputs may lie: ``(low, high)``, a spec such as
            ``env.observation_spec``, or a dict of these by key.
        goal: ``"lower"`` the target's score, which is an untargeted attack on what the score speaks for;
            or ``"raise"`` it: a targeted attack in favour of it, or one that raises a loss.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        root: Where changed inputs go.
        gap_root: Where the scores go that they have.
    """

    epsilon: PerKey = field(default=0.1, kw_only=True)
    bounds: Bounds = field(default=None, kw_only=True)
    goal: str = field(default="lower", kw_only=True)
    internal_batch_size: int | None = field(default=None, kw_only=True)
    root: str = field(default="adversarial", kw_only=True)
    gap_root: str = field(default="adversarial_score", kw_only=True)

    complete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks sizes, bounds and the goal."""
        super().__post_init__()
        keys_only(self)
        check_sizes("epsilon", self.epsilon)
        check_bounds(self.bounds)
        if self.goal not in GOALS:
            raise InputError(f"goal={self.goal!r}: choose one of {', '.join(GOALS)}.")
        if self.internal_batch_size is not None:
            whole_number("internal_batch_size", self.internal_batch_size, 1)

    @property
    def uphill(self) -> float:
        """1 where the score is to be raised, −1 where it is to be lowered."""
        return 1.0 if self.goal == "raise" else -1.0

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As for every method; sizes and bounds have to be of attributed keys."""
        context = super().prepare(*args, **kwargs)
        self.check_keys(context.keys or tuple(context.in_keys))
        return context

    def check_keys(self, known: tuple[NestedKey, ...]) -> None:
        """Raises :class:`KeyNotFoundError` for sizes or bounds of keys that are not attributed."""
        if isinstance(self.epsilon, Mapping):
            check_known(self.epsilon, known, "attributed keys")
        check_bounded_keys(self.bounds, known)

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """The changed inputs of every target, and the scores that they have."""
        sizes = by_key("epsilon", self.epsilon, score)
        n = score.scores([x.unsqueeze(0).clone() for x in score.inputs]).shape[-1]
        found = checked(self, score, self.changed(score, sizes, self.box(score), n))
        reached = own_column(scores_at(score, found)).movedim(0, -1)
        return Attribution(found, gap=reached, scale=torch.zeros_like(reached))

    def box(self, score: Score) -> list[Box]:
        """The bounds of each key.

        Raises:
            InputError: If an input lies outside.
        """
        limits = boxes(self.bounds, score)
        for key, x, (low, high) in zip(score.keys, score.inputs, limits, strict=True):
            outside = (x < low) | (x > high)
            if outside.any():
                raise InputError(
                    f"The input {key!r} lies outside of its bounds in {int(outside.sum())} of "
                    f"{outside.numel()} entries, so no change of it can be both small and inside. Give "
                    "other bounds."
                )
        return limits

    @abstractmethod
    def changed(
        self, score: Score, sizes: Sequence[Tensor], limits: Sequence[Box], n: int
    ) -> list[Tensor]:
        """Changed inputs ``[n, *B, *F]`` for each key, row t for target t.

        Args:
            score: The function that is attacked.
            sizes: How large changes may be: broadcast to ``[*B, *F]``, or to ``[n, *B, *F]``.
            limits: Between which values inputs may lie; they do.
            n: The number of targets.
        """


def perturbed(
    td: TensorDictBase, root: str = "adversarial", target: str | None = None
) -> TensorDictBase:
    """A TensorDict to call the policy on: a shallow copy of ``td`` with the changed inputs in place.

    Args:
        td: What a hooked attack returned.
        root: Where the changed inputs were written.
        target: The named target that they were made for, where there are several.

    Raises:
        KeyNotFoundError: If nothing was written there.
        InputError: If there is one input for each of several outputs (``Each``).
    """
    where = (root,) if target is None else (root, target)
    changed = td.get(where, None)
    if not is_tensor_collection(changed):
        raise KeyNotFoundError(
            f"td[{', '.join(map(repr, where))}] holds no changed inputs: call a hooked attack first, or "
            "name its root= and target=."
        )
    copied = td.copy()
    for key, value in changed.items(True, True):
        old = td.get(key, None)
        if not isinstance(old, Tensor) or old.shape != value.shape:
            raise InputError(
                f"What was changed is {key!r} of shape {tuple(value.shape)}, which does not stand for "
                f"td[{key!r}]: name one target, or take one of Each's inputs yourself."
            )
        copied.set(key, value)
    return copied
