"""Targets inside the model: a neuron, a channel, whatever number a submodule gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.errors import TargetError
from tdhook_like.ports import calls_at, port
from tdhook_like.targets.base import Index, Pick, Reference, Target, check_index

__all__ = ["Channel", "Unit"]

POOLS = ("mean", "sum", "max")


@dataclass(frozen=True)
class Unit(Target):
    """An entry of what a submodule gives: a neuron as the thing that is explained.

    Any method attributes to it, as to an output. In a model of vmapped agents or members, their
    dimension stands right behind the batch dimensions.

    Args:
        path: The submodule's path.
        index: Into the dimensions behind the batch dimensions: integers, at most one ``...``. Empty
            where the submodule gives one number per element.
        call: Which of the tensors that it gives in one run, where it gives several (it is called
            more than once, or returns a tuple); they are counted from 0 in the order of the run.

    Raises:
        TargetError: In a call, if the submodule is not reached, gives several tensors and none was
            chosen, or the index does not fit.

    >>> import torch
    >>> from tensordict import TensorDict
    >>> from tdhook_like import Saliency
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> with Saliency(Unit("0", 1), abs=False).prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.ones(1, 2)}, [1]))
    >>> torch.equal(td["attr", "x"], net[0].weight[1:2])
    True
    """

    path: str
    index: tuple[Index, ...] = ()
    call: int | None = None

    def __init__(self, path: str, *index: Index, call: int | None = None) -> None:
        _check(path, call)
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "call", call)

    def __repr__(self) -> str:
        parts = [repr(self.path), *("..." if i is Ellipsis else repr(i) for i in self.index)]
        return f"Unit({', '.join(parts)}{_which(self.call)})"

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Target:
        if self.index:
            return super().__getitem__(index)
        return Unit(self.path, *(index if isinstance(index, tuple) else (index,)), call=self.call)

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return (port(self.path),)

    def bind(self, reference: Reference) -> Pick:
        def pick(outputs: Any, dims: int) -> Tensor:
            value = _given(self, self.path, self.call, outputs)
            check_index(self, self.index, tuple(value.shape[dims:]))
            return value[(*[slice(None)] * dims, *self.index)] if self.index else value

        return pick


@dataclass(frozen=True)
class Channel(Target):
    """A channel of what a convolution gives, over all its positions.

    Args:
        path: The submodule's path.
        channel: Which channel, along the first dimension behind the batch dimensions.
        pool: ``"mean"``, ``"sum"`` or ``"max"`` over the positions.
        call: As of :class:`Unit`.

    Raises:
        TargetError: As of :class:`Unit`.

    >>> Channel("features.3", 7), Channel("features.3", 7, pool="max")
    (Channel('features.3', 7), Channel('features.3', 7, pool='max'))
    """

    path: str
    channel: int
    pool: str = "mean"
    call: int | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        _check(self.path, self.call)
        if self.pool not in POOLS:
            raise TargetError(
                f"Channel: pool must be one of {', '.join(POOLS)}, got {self.pool!r}."
            )
        if isinstance(self.channel, bool) or not isinstance(self.channel, int):
            raise TargetError(f"Channel: a channel is a whole number, got {self.channel!r}.")

    def __repr__(self) -> str:
        pool = "" if self.pool == "mean" else f", pool={self.pool!r}"
        return f"Channel({self.path!r}, {self.channel}{pool}{_which(self.call)})"

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return (port(self.path),)

    def bind(self, reference: Reference) -> Pick:
        def pick(outputs: Any, dims: int) -> Tensor:
            value = _given(self, self.path, self.call, outputs)
            check_index(self, (self.channel,), tuple(value.shape[dims:]))
            found = value.select(dims, self.channel)
            if found.ndim == dims:
                return found
            flat = found.flatten(dims)
            return flat.amax(-1) if self.pool == "max" else getattr(flat, self.pool)(-1)

        return pick


def _check(path: object, call: object) -> None:
    if not isinstance(path, str):
        raise TargetError(f"A unit is named by its submodule's path; {path!r} is none.")
    if call is not None and (isinstance(call, bool) or not isinstance(call, int)):
        raise TargetError(f"At {path!r}: call must be a whole number or None, got {call!r}.")


def _which(call: int | None) -> str:
    return "" if call is None else f", call={call}"


def _given(target: Target, path: str, call: int | None, outputs: Any) -> Tensor:
    """The tensor that a submodule gave."""
    calls = calls_at(outputs, path, call or 0)
    if not calls:
        raise TargetError(
            f"{target!r}: the submodule {path!r} was never called, so it gives nothing to explain: the "
            "forward skips it, or uses its weights directly."
        )
    if call is None and len(calls) > 1:
        raise TargetError(
            f"{target!r} is ambiguous: {path!r} gives {len(calls)} tensors, of shapes "
            f"{', '.join(str(tuple(value.shape)) for value in calls)}. Choose one: call=0 to "
            f"call={len(calls) - 1}."
        )
    if call is not None and not -len(calls) <= call < len(calls):
        raise TargetError(
            f"{target!r}: {path!r} gives {len(calls)} tensors, so there is no such call."
        )
    return calls[call or 0]
