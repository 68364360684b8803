"""Which tensors of a call are functions, entry by entry, of one and the same tensor.

An activation that is written out by hand, ``x * (1 + tanh(x + x**3))``, is a product of two tensors,
and yet elementwise in ``x``: relevance should pass it as it passes ``F.gelu(x)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

from torch import Tensor

from tdhook_like.hooks.functional import Functions

__all__ = ["is_known", "nearest", "record"]

Line = tuple[Any, ...]
"""Weak references to a tensor and to what it is a function of, the nearest first."""

_LONGEST = 16


def record(mode: Functions | None, result: Any, operands: Sequence[Tensor]) -> None:
    """Remembers that each entry of ``result`` is a function of the operands' entries in its place.

    Nothing is kept alive by it.

    >>> import torch
    >>> mode, x = Functions(lambda function: None), torch.ones(2)
    >>> record(mode, y := x.tanh(), [x])
    >>> record(mode, z := y + 1, [y])
    >>> nearest(mode, [x, z]) is x, nearest(mode, [z, y]) is y, nearest(mode, [z, x + 1])
    (True, True, None)
    """
    if mode is None or not isinstance(result, Tensor):
        return
    for value in operands:
        if value is result or value.shape != result.shape:
            return
    known = mode.notes.get("kin")
    if known is None:
        known = mode.notes["kin"] = {}
    shared = _line(known, operands[0])
    if len(operands) > 1:
        shared = _shared(shared, [_line(known, value) for value in operands[1:]])
    if shared:
        known[id(result)] = (ref(result), *shared[:_LONGEST])


def is_known(mode: Functions | None, value: Any) -> bool:
    """Whether something was recorded of a tensor.

    >>> is_known(None, 1)
    False
    """
    found = None if mode is None else mode.notes.get("kin")
    if not found:
        return False
    line = found.get(id(value))
    return line is not None and line[0]() is value


def nearest(mode: Functions | None, operands: Sequence[Tensor]) -> Tensor | None:
    """The nearest tensor that all operands are functions of, entry by entry; None if there is none.

    One of the operands may be it.
    """
    found = None if mode is None else mode.notes.get("kin")
    if not found:
        return None
    shared = _shared(_line(found, operands[0]), [_line(found, value) for value in operands[1:]])
    return shared[0]() if shared else None


def _line(known: dict[int, Line], value: Tensor) -> Line:
    found = known.get(id(value))
    return found if found is not None and found[0]() is value else (ref(value),)


def _shared(first: Line, others: list[Line]) -> Line:
    for line in others:
        theirs = {id(tensor) for tensor in (item() for item in line) if tensor is not None}
        first = tuple(item for item in first if id(item()) in theirs)
    return tuple(item for item in first if item() is not None)
