"""Memory for large temporaries that one call after another uses again.

A tensor of many megabytes that is made anew is mostly paid for when its pages are first touched:
clamping the weights of a wide layer costs nine times as much into new memory as into memory that is
there. Modified weights are of the same sizes in every call, so they are borrowed for its length from
what the context keeps while it is open.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Scratch", "borrowed"]

_LEAST = 2**20
"""Bytes below which new memory costs nothing much."""


class Scratch:
    """What a context keeps for its calls' temporaries. Calls in several threads may borrow at once.

    >>> scratch = Scratch()
    >>> x = torch.zeros(2**18)
    >>> with scratch.loan():
    ...     first = borrowed(x)
    >>> with scratch.loan():
    ...     borrowed(x) is first
    True
    """

    def __init__(self) -> None:
        self._free: dict[Any, list[Tensor]] = {}

    def loan(self) -> _Loan:
        """A block in which this thread's temporaries are borrowed; all are given back at its end."""
        return _Loan(self._free)

    @staticmethod
    def none() -> _Loan:
        """A block in which nothing is borrowed."""
        return _Loan(None)

    def clear(self) -> None:
        """Lets go of everything."""
        self._free.clear()


class _Loan:
    def __init__(self, free: dict[Any, list[Tensor]] | None) -> None:
        self._free = {} if free is None else free
        self.open = free is not None
        self._taken: list[tuple[Any, Tensor]] = []
        self._outer: _Loan | None = None

    def __enter__(self) -> None:
        self._outer = getattr(_LOCAL, "loan", None)
        _LOCAL.loan = self

    def __exit__(self, *error: object) -> None:
        _LOCAL.loan, self._outer = self._outer, None
        for key, tensor in self._taken:
            self._free.setdefault(key, []).append(tensor)
        self._taken.clear()

    def give_back(self) -> None:
        """Returns what was taken last."""
        key, tensor = self._taken.pop()
        self._free.setdefault(key, []).append(tensor)

    def take(self, like: Tensor) -> Tensor:
        key = (like.shape, like.stride(), like.dtype)
        kept = self._free.get(key)
        try:
            tensor = kept.pop() if kept else torch.empty_like(like, requires_grad=False)
        except IndexError:  # another thread was faster
            tensor = torch.empty_like(like, requires_grad=False)
        self._taken.append((key, tensor))
        return tensor


_LOCAL = threading.local()


@contextmanager
def spare(like: Tensor) -> Iterator[Tensor | None]:
    """As :func:`borrowed`, for the length of a block; the next block may have the same memory.

    >>> x = torch.zeros(2**18)
    >>> with Scratch().loan():
    ...     with spare(x) as first:
    ...         pass
    ...     with spare(x) as second:
    ...         print(first is second)
    True
    """
    place = borrowed(like)
    try:
        yield place
    finally:
        if place is not None:
            _LOCAL.loan.give_back()


def borrowed(like: Tensor) -> Tensor | None:
    """Memory of a tensor's shape, strides and dtype, with anything in it, until the call is over.

    None where new memory is as good: for small tensors, off the CPU (whose allocators keep memory
    by themselves), outside of a loan, inside function transforms, and while torch compiles.
    """
    if torch.compiler.is_compiling():
        return None
    loan: _Loan | None = getattr(_LOCAL, "loan", None)
    if (
        loan is None
        or not loan.open
        or like.numel() * like.itemsize < _LEAST
        or like.device.type != "cpu"
    ):
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(like) or like.is_inference():  # pyright: ignore[reportAttributeAccessIssue]
        return None
    return loan.take(like)
