"""Tensors inside vmap: what is wrapped, how, and the same wrapping around another tensor.

A tensor that is seen inside ``vmap`` is a wrapper that must not leave it. What it wraps may, and can be
wrapped again in another run of the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Wrapper", "above", "level", "wrapped"]

Wrapper = tuple[int, int]
"""Where vmap put its dimension, and the level of that vmap."""


def level() -> int:
    """How many function transforms are under way.

    >>> level(), torch.vmap(lambda x: x * level())(torch.ones(2)).tolist()
    (0, [1.0, 1.0])
    """
    stack = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return 0 if stack is None else stack.level()


def above(t: Tensor, ambient: int = 0) -> tuple[Tensor, list[Wrapper]]:
    """What the vmaps above a level have wrapped, and how, the innermost vmap first.

    Args:
        t: A tensor, wrapped or not.
        ambient: The level that it is to be taken down to.

    >>> above(torch.ones(2))[1]
    []
    """
    wrappers: list[Wrapper] = []
    while torch._C._functorch.is_batchedtensor(t):  # pyright: ignore[reportAttributeAccessIssue]
        here = torch._C._functorch.maybe_get_level(t)  # pyright: ignore[reportAttributeAccessIssue]
        if here <= ambient:
            break
        wrappers.append((torch._C._functorch.maybe_get_bdim(t), here))  # pyright: ignore[reportAttributeAccessIssue]
        t = torch._C._functorch.get_unwrapped(t)  # pyright: ignore[reportAttributeAccessIssue]
    return t, wrappers


def wrapped(t: Tensor, wrappers: list[Wrapper]) -> Tensor:
    """A tensor with the wrappers that :func:`above` took off another one.

    >>> t = torch.ones(2)
    >>> wrapped(t, []) is t
    True
    """
    for place, here in reversed(wrappers):
        t = torch._C._functorch._add_batch_dim(t, place, here)  # pyright: ignore[reportAttributeAccessIssue]
    return t
