"""Tensors inside tuples, lists and dicts, as modules take and return them.

torch's own pytree functions are built on nested functions that refer to themselves: every call
leaves garbage that only the cycle collector frees, which a training loop may have switched off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["cloned", "leaves", "mapped"]


def leaves(value: Any) -> Iterator[Any]:
    """Everything in nested tuples, lists and dicts, in order.

    >>> list(leaves((1, [2, {"a": 3}])))
    [1, 2, 3]
    """
    if isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def mapped(function: Callable[..., Any], value: Any, *others: Any) -> Any:
    """``value`` with ``function`` applied to each leaf, and to those of ``others`` in its place.

    >>> mapped(lambda a, b: a + b, (1, [2]), (10, [20]))
    (11, [22])
    """
    if isinstance(value, tuple | list):
        items = [mapped(function, *group) for group in zip(value, *others, strict=True)]
        kind: Any = type(value)
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if isinstance(value, dict):
        # A dict subclass keeps what else it holds. (A copy of a plain one cannot be traced.)
        found: Any = {} if type(value) is dict else copy.copy(value)
        for key, item in value.items():
            found[key] = mapped(function, item, *(other[key] for other in others))
        return found
    return function(value, *others)


def cloned(value: Any) -> Any:
    """``value`` with copies of the tensors in it.

    >>> x = torch.ones(1)
    >>> cloned((x, 2))[0] is x
    False
    """
    return mapped(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, value)
