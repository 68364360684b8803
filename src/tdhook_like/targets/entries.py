"""Targets that are entries of an output: a fixed one, the taken one, the greedy one, the others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.errors import TargetError
from tdhook_like.keys import as_tuple, shortest
from tdhook_like.targets.base import Index, Pick, Reference, Target, check_index, values_at

__all__ = ["Chosen", "Greedy", "Output", "Rest", "Taken"]


@dataclass(frozen=True)
class Output(Target):
    """An entry of an output.

    Args:
        key: The out_key.
        index: Into the feature dimensions (those behind the batch dimensions): integers, at most one
            ``...``. Empty where the output is one number per element.

    >>> Output(("agents", "value")), Output("logits", 2)
    (Output('agents', 'value'), Output('logits', 2))
    """

    key: NestedKey
    index: tuple[Index, ...] = ()

    def __init__(self, key: NestedKey, *index: Index) -> None:
        object.__setattr__(self, "key", shortest(key))
        object.__setattr__(self, "index", index)

    def __repr__(self) -> str:
        parts = [repr(part) for part in as_tuple(self.key)]
        parts += ["..." if part is Ellipsis else repr(part) for part in self.index]
        return f"Output({', '.join(parts)})"

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return (self.key,)

    def bind(self, reference: Reference) -> Pick:
        values = reference.values(self.key, self)
        check_index(self, self.index, tuple(values.shape[reference.dims :]))
        key, index, known = self.key, self.index, reference.out_keys

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            found = values_at(outputs, key, self, known)
            return found[(*[slice(None)] * dims, *index)] if index else found

        return pick

    def bind_column(self, reference: Reference) -> Pick:
        pick = self.bind(reference)
        values = reference.values(self.key, self)
        if (
            len(self.index) != 1
            or values.ndim != reference.dims + 1
            or type(self.index[0]) is not int
        ):
            return pick
        key, start, known = self.key, self.index[0] % values.shape[-1], reference.out_keys

        def column(outputs: TensorDictBase, dims: int) -> Tensor:
            return values_at(outputs, key, self, known).narrow(-1, start, 1)

        return column

    def against_rest(self) -> Target:
        """This entry against the mean of the other entries along the last feature dimension."""
        return self - Rest(self)


class Chosen(Target):
    """An entry along the last dimension, chosen by an index per element that is held fixed."""

    key: NestedKey

    @abstractmethod
    def choose(self, values: Tensor, reference: Reference) -> Tensor:
        """Indices into the last dimension of ``values``, shape ``values.shape[:-1]``."""

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return (self.key,)

    def bind(self, reference: Reference) -> Pick:
        return self._bound(reference, rest=False)

    def against_rest(self) -> Target:
        """The chosen entry against the mean of the others."""
        return self - Rest(self)

    def _bound(self, reference: Reference, rest: bool) -> Pick:
        values = reference.values(self.key, self)
        if values.ndim <= reference.dims:
            raise TargetError(f"{self!r}: {self.key!r} has no entries to choose from.")
        if rest and values.shape[-1] < 2:
            raise TargetError(
                f"{self!r}: {self.key!r} holds one entry, so against_rest() has no rest."
            )
        chosen = self.choose(values.detach(), reference)
        key = self.key

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            found = values_at(outputs, key, self, reference.out_keys)
            index = chosen.expand(found.shape[:-1]).unsqueeze(-1)
            entry = found.gather(-1, index).squeeze(-1)
            return (found.sum(-1) - entry) / (found.shape[-1] - 1) if rest else entry

        return pick


@dataclass(frozen=True)
class Taken(Chosen):
    """The entry of ``key`` that belongs to the action in the TensorDict.

    The action is read once and held fixed. When a policy is driven it is the action that this very
    call writes; when a recorded TensorDict is observed it is the recorded one.

    Args:
        key: Values or logits, shape ``[*batch, *rest, n]``.
        action: The key of the action: indices ``[*batch, *rest]`` (or with a last 1), or one-hot.

    >>> Taken("logits")
    Taken(key='logits', action='action')
    """

    key: NestedKey = "logits"
    action: NestedKey = "action"

    def choose(self, values: Tensor, reference: Reference) -> Tensor:
        action = reference.action(self.action, self)
        if action.shape == values.shape and (values.shape[-1] > 1 or action.dtype == torch.bool):
            chosen = action != 0
            if not (chosen.sum(-1) == 1).all():
                raise TargetError(
                    f"{self!r}: {self.action!r} has the shape of {self.key!r}, {tuple(action.shape)}, "
                    "but is not one-hot. Name the right keys, or use LogProb()."
                )
            return chosen.to(torch.uint8).argmax(-1)
        if action.shape == (*values.shape[:-1], 1):
            action = action.squeeze(-1)
        if action.shape != values.shape[:-1] or action.is_floating_point():
            raise TargetError(
                f"{self!r}: {self.action!r} of shape {tuple(action.shape)} and {action.dtype} is "
                f"neither an index into nor a one-hot of {self.key!r} of shape "
                f"{tuple(values.shape)}. Name the right keys, or use LogProb()."
            )
        if action.numel() and not 0 <= int(action.min()) <= int(action.max()) < values.shape[-1]:
            raise TargetError(
                f"{self!r}: {self.action!r} holds indices from {int(action.min())} to "
                f"{int(action.max())}, but {self.key!r} has {values.shape[-1]} entries."
            )
        return action.long()


@dataclass(frozen=True)
class Greedy(Chosen):
    """The largest entry of ``key`` at the explained input; which one it is is held fixed.

    Args:
        key: Values or logits, shape ``[*batch, *rest, n]``.

    >>> Greedy("action_value")
    Greedy(key='action_value')
    """

    key: NestedKey = "logits"

    def choose(self, values: Tensor, reference: Reference) -> Tensor:
        return values.argmax(-1)


@dataclass(frozen=True)
class Rest(Target):
    """The mean of all entries but a chosen one, along the same dimension."""

    of: Output | Chosen

    def bind(self, reference: Reference) -> Pick:
        if isinstance(self.of, Chosen):
            return self.of._bound(reference, rest=True)
        *before, last = self.of.index or (None,)
        if not isinstance(last, int):
            raise TargetError(f"{self.of!r}.against_rest() needs an entry, such as ('logits', 0).")
        whole, entry = Output(self.of.key, *before, slice(None)), self.of
        pick_whole, pick_entry = whole.bind(reference), entry.bind(reference)
        if pick_whole(reference.outputs, reference.dims).shape[-1] < 2:
            raise TargetError(
                f"{entry!r}: {entry.key!r} holds one entry, so against_rest() has no rest."
            )

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            values = pick_whole(outputs, dims)
            return (values.sum(-1) - pick_entry(outputs, dims)) / (values.shape[-1] - 1)

        return pick

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return self.of.reads
