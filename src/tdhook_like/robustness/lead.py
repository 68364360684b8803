"""By how much what was chosen is ahead of everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.errors import TargetError
from tdhook_like.targets import Greedy, Pick, Reference, Taken, Target
from tdhook_like.targets.base import values_at

__all__ = ["Lead"]


@dataclass(frozen=True, init=False)
class Lead(Target):
    """The entry of what was chosen, minus the largest other one: below 0, the choice has flipped.

    Source: Carlini & Wagner 2017, section V, objective f₆, without its floor.

    Args:
        of: Which entry: ``Greedy(key)``, also for a key alone, or ``Taken(key, action)``. It is read
            once, and held fixed while inputs change.

    Raises:
        TargetError: If ``of`` is no choice of an entry.

    >>> Lead("logits"), Lead(Taken("logits"))
    (Lead(Greedy(key='logits')), Lead(Taken(key='logits', action='action')))
    """

    of: Greedy | Taken

    def __init__(self, of: NestedKey | Greedy | Taken = "logits") -> None:
        if isinstance(of, Target) and not isinstance(of, Greedy | Taken):
            raise TargetError(f"Lead({of!r}): give a key, Greedy(key) or Taken(key, action).")
        object.__setattr__(self, "of", of if isinstance(of, Greedy | Taken) else Greedy(of))

    def __repr__(self) -> str:
        return f"Lead({self.of!r})"

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return self.of.reads

    def bind(self, reference: Reference) -> Pick:
        of, key = self.of, self.of.key
        values = reference.values(key, self)
        if values.ndim <= reference.dims or values.shape[-1] < 2:
            raise TargetError(f"{self!r}: {key!r} holds no second entry to be ahead of.")
        chosen = of.choose(values.detach(), reference)

        def pick(outputs: TensorDictBase | Any, dims: int) -> Tensor:
            found = values_at(outputs, key, self, reference.out_keys)
            index = chosen.expand(found.shape[:-1]).unsqueeze(-1)
            others = found.scatter(-1, index, -torch.inf).amax(-1)
            return found.gather(-1, index).squeeze(-1) - others

        return pick
