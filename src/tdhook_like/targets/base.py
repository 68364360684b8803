"""What a target is, and what it is bound to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, ClassVar, NoReturn

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook_like.errors import TargetError, listed
from tdhook_like.keys import shortest

__all__ = ["Index", "Pick", "Reference", "Target", "check_index", "values_at"]

Index = int | slice | EllipsisType
Pick = Callable[[Any, int], Tensor]
"""From outputs and their number of batch dimensions to values ``[*batch, *rest]``."""


@dataclass(frozen=True)
class Reference:
    """The outputs at which a target is bound.

    Attributes:
        outputs: What the model wrote (and read) in the call that is explained.
        dims: The number of batch dimensions.
        model: The model, for its distributions.
        out_keys: What the model declares to write; for messages.
        recorded: The TensorDict that is observed, whose action goes before the model's own.
    """

    outputs: TensorDictBase
    dims: int
    model: nn.Module
    out_keys: tuple[NestedKey, ...]
    recorded: TensorDictBase | None = None

    def action(self, key: NestedKey, what: object) -> Tensor:
        """The action that is explained: the recorded one, or else the one that the model wrote."""
        if self.recorded is not None and isinstance(self.recorded.get(key, None), Tensor):
            return self.recorded.get(key).detach()
        if self.outputs.get(key, None) is None:
            raise TargetError(
                f"{what!r}: there is no action at {key!r}. The TensorDict has "
                f"{listed(map(shortest, self.outputs.keys(True, True)))}."
            )
        return self.values(key, what).detach()

    def values(self, key: NestedKey, what: object) -> Tensor:
        """The tensor at ``key``, or a :class:`TargetError` that lists what is there."""
        return values_at(self.outputs, key, what, self.out_keys)


class Target(ABC):
    """Base of all targets. ``a - b`` is a contrast, ``a[i]`` an entry of what is left over.

    There are no sums: which of the two is explained would be left open.
    """

    #: Whether outputs are read by key alone, so that they need not be a TensorDict.
    reads_keys: ClassVar[bool] = True

    @abstractmethod
    def bind(self, reference: Reference) -> Pick:
        """A function from outputs to values ``[*batch, *rest]``, everything else held fixed."""

    def bind_column(self, reference: Reference) -> Pick:
        """As :meth:`bind`; may keep a last dimension of one where that saves a node of the graph."""
        return self.bind(reference)

    def __sub__(self, other: Any) -> Target:
        from tdhook_like.targets.composed import Contrast, as_target

        return Contrast(self, as_target(other))

    def __rsub__(self, other: Any) -> Target:
        from tdhook_like.targets.composed import Contrast, as_target

        return Contrast(as_target(other), self)

    def __add__(self, other: Any) -> NoReturn:
        _refuse(f"{self!r} + {other!r}")

    def __radd__(self, other: Any) -> NoReturn:
        _refuse(f"{other!r} + {self!r}")

    def __mul__(self, other: Any) -> NoReturn:
        _refuse(f"{self!r} * {other!r}")

    def __rmul__(self, other: Any) -> NoReturn:
        _refuse(f"{other!r} * {self!r}")

    def __neg__(self) -> NoReturn:
        _refuse(f"-{self!r}")

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Target:
        from tdhook_like.targets.composed import Entry

        return Entry(self, index if isinstance(index, tuple) else (index,))

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        """The keys that the target is known to read, for checks ahead of any call."""
        return ()


def _refuse(written: str) -> NoReturn:
    """Raises :class:`TargetError`: a sum does not tell which of its parts is explained."""
    raise TargetError(
        f"{written}: targets have contrasts, a - b, and neither sums nor multiples. Name them apart, "
        "{'a': …, 'b': …}; add up attributions, AttributionSum(Saliency(a), Saliency(b), "
        "weights=[1.0, -2.0]); or give a function of the outputs, lambda td: td['y'][..., 0] + …."
    )


def check_index(target: Target, index: tuple[Index, ...], features: tuple[int, ...]) -> None:
    """Raises :class:`TargetError` where ``index`` does not fit feature dimensions ``features``."""
    if len(index) <= len(features) and all(
        type(i) is int and -size <= i < size for i, size in zip(index, features, strict=False)
    ):
        return
    try:
        torch.empty(features, device="meta")[index]
    except (IndexError, TypeError) as error:
        raise TargetError(
            f"{target!r}: index {index} does not fit the feature dimensions {features}: {error}."
        ) from None


def values_at(
    outputs: TensorDictBase, key: NestedKey, what: object, known: tuple[NestedKey, ...]
) -> Tensor:
    """The tensor at ``key``, or a :class:`TargetError` that names ``what`` and lists ``known``."""
    values = outputs.get(key, None)
    if isinstance(values, Tensor):
        return values
    kind = "is not there" if values is None else f"is a {type(values).__name__}, not a tensor"
    raise TargetError(f"{what!r}: {key!r} {kind}. The model writes {listed(map(shortest, known))}.")
