"""Named targets as the columns of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_like.errors import TargetError
from tdhook_like.runner import View
from tdhook_like.targets import Pick, Reference, Target, columns

__all__ = ["TargetColumns", "joined", "members_last"]


class TargetColumns:
    """Named targets, bound at the outputs of a call, as the columns of one tensor of scores.

    Args:
        targets: By name; None names a single one.
        reference: The outputs at which they are bound.
        time_is_mixed: Whether a step's score depends on other steps' inputs, so that only one number
            per trajectory can be explained without summing over several.
    """

    def __init__(
        self,
        targets: Mapping[str | None, Target],
        reference: Reference,
        *,
        time_is_mixed: bool = False,
    ) -> None:
        self._time_is_mixed = time_is_mixed
        self._targets = dict(targets)
        self._picks: list[Pick] = [t.bind_column(reference) for t in targets.values()]
        self.slices: dict[str | None, slice] = {}
        #: How many batch dimensions a score lacks, once one was seen: time's, of a trajectory's.
        self.lacking: int | None = None

    def __repr__(self) -> str:
        return ", ".join(repr(target) for target in self._targets.values())

    def __call__(self, outputs: TensorDictBase | View, dims: int) -> list[Tensor]:
        """Scores of outputs with ``dims`` batch dimensions, ``[*batch, n]`` for each named target.

        They are not joined: each is differentiated by its own, shorter way.
        """
        batch = outputs.batch_size
        found = [
            columns(target, pick(outputs, dims), dims, batch)
            for target, pick in zip(self._targets.values(), self._picks, strict=True)
        ]
        if not self.slices:
            if len({part.shape[:-1] for part in found}) > 1:
                raise TargetError(
                    "The named targets do not speak of the same elements: some are one number per "
                    "batch element, some one per trajectory. Explain them in two contexts."
                )
            if self._time_is_mixed and any(part.ndim > dims for part in found):
                names = [repr(target) for target in self._targets.values()]
                raise TargetError(
                    f"{', '.join(names)}: the model is recurrent over the last batch dimension, so each "
                    "step's inputs bear on all later steps' outputs. Say which step is explained: "
                    "AtStep(target, -1) for the last one."
                )
            self.lacking = dims + 1 - found[0].ndim
            start = 0
            for name, values in zip(self._targets, found, strict=True):
                self.slices[name] = slice(start, start + values.shape[-1])
                start += values.shape[-1]
        return found


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Scores of all named targets as the columns of one tensor, ``[*batch, T]``."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def members_last(scores: Tensor, own: int) -> Tensor:
    """Scores ``[*members, *batch, T]`` as ``[*batch, members × T]``: each member a target apart.

    Args:
        scores: With ``own`` leading dimensions that an ensemble adds.
        own: How many these are.
    """
    return scores.flatten(0, own - 1).movedim(0, -2).flatten(-2)
