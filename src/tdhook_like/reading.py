"""What a call reads: which keys are attributed, whether they can be, and a private copy to run on."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.errors import InputError, KeyNotFoundError, listed
from tdhook_like.keys import as_tuple, shortest
from tdhook_like.runner import View

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = ["attributed", "declare", "private_copy", "same_bits"]


def attributed(context: HookContext, td: TensorDictBase) -> dict[NestedKey, Tensor]:
    """The attributed keys and their values; checks that they can be attributed."""
    asked = context.keys
    found: dict[NestedKey, Tensor] = {}
    for key in context.in_keys if asked is None else asked:
        value = td.get(key, None)
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.is_meta:
                raise InputError(f"The input {key!r} is on the meta device: it holds no values.")
            # A sum is NaN or Inf if an entry is; if it overflowed, the entries are looked at.
            if not isfinite(value.detach().sum().item()) and not torch.isfinite(value).all():
                raise InputError(
                    f"The input {key!r} holds NaN or Inf in "
                    f"{int((~torch.isfinite(value)).sum())} of {value.numel()} entries: no attribution "
                    "can be given."
                )
            found[key] = value
        elif asked is not None:
            if value is None:
                raise KeyNotFoundError(
                    f"The TensorDict has no key {key!r}. It has "
                    f"{listed(shortest(as_tuple(k)) for k in td.keys(True, True))}."
                )
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"{key!r} is {kind}; only floating-point tensors can be attributed. Convert it, or "
                "attribute what the model embeds it to, with at=."
            )
    if found:
        return found
    missing = [key for key in context.in_keys if td.get(key, None) is None]
    if missing:
        raise KeyNotFoundError(
            f"The TensorDict has none of {listed(missing)}, which the model reads. It has "
            f"{listed(shortest(as_tuple(k)) for k in td.keys(True, True))}."
        )
    if context.at is not None:
        return found
    nested = [key for key in context.in_keys if is_tensor_collection(td.get(key, None))]
    if nested:
        inside = [(*as_tuple(k), *as_tuple(n)) for k in nested for n in td.get(k).keys(True, True)]
        raise InputError(
            f"{listed(nested)} is a TensorDict, which is not attributed as a whole. Let the model's "
            f"in_keys name its entries: {listed(inside)}."
        )
    raise InputError(
        f"None of {listed(context.in_keys)} is a floating-point tensor: nothing can be attributed. "
        "Attribute what the model embeds them to, with at=."
    )


def private_copy(
    td: TensorDictBase, reads: Iterable[NestedKey] = (), *, own: bool = False
) -> TensorDictBase:
    """A shallow copy to run the model on.

    Args:
        td: The TensorDict.
        reads: What the model reads of it. Inference tensors there, which cannot be part of a graph,
            are copied for good.
        own: Whether all of ``reads`` are copied for good, for a model that may overwrite them.
    """
    private = td.copy()
    for key in reads:
        value = td.get(key, None)
        if isinstance(value, Tensor) and (own or value.is_inference()):
            private.set(key, value.clone())
    return private


def declare(outputs: TensorDictBase, inputs: list[Tensor], out_keys: Iterable[NestedKey]) -> None:
    """Gives ``outputs`` the batch dimensions that inputs and outputs share.

    In a call with tensors, nothing says which of their dimensions are batch dimensions; the last one
    of each tensor is taken for a feature dimension.
    """
    found = [outputs.get(key, None) for key in out_keys]
    shapes = [x.shape for x in (*inputs, *found) if isinstance(x, Tensor)]
    dims = 0
    while all(len(shape) > dims + 1 and shape[dims] == shapes[0][dims] for shape in shapes):
        dims += 1
    outputs.batch_size = shapes[0][:dims]  # pyright: ignore[reportAttributeAccessIssue]


def same_bits(
    a: TensorDictBase | View, b: TensorDictBase | View, keys: Iterable[NestedKey]
) -> bool:
    """Whether two TensorDicts hold the same tensors at ``keys``, bit for bit (NaN equals NaN)."""
    for key in keys:
        one, other = a.get(key, None), b.get(key, None)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            one, other = one.detach().contiguous(), other.detach().contiguous()
            if one.shape != other.shape or one.dtype != other.dtype:
                return False
            if not torch.equal(*(t.flatten().view(torch.uint8) for t in (one, other))):
                return False
    return True
