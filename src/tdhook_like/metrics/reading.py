"""What a hooked module wrote, as one row of features for every element and target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.context import HookContext
from tdhook_like.keys import as_tuple, shortest

__all__ = ["by_key", "rows"]


def by_key(context: HookContext, td: TensorDictBase) -> dict[NestedKey, Tensor]:
    """Attributions of every key, ``[rows, features]``: a row for every element of every target."""
    names = list(context.targets)
    found: dict[NestedKey, Tensor] = {}
    for key in context.keys or tuple(context.in_keys):
        x = td.get(key, None)
        parts = []
        for name in names:
            place = (context.method.root, *(() if name is None else (name,)), *as_tuple(key))
            values = td.get(place, None)
            if isinstance(values, Tensor) and isinstance(x, Tensor):
                # Each has a target dimension behind those of the batch.
                dims = td.batch_dims + values.ndim - x.ndim
                parts.append(values.unsqueeze(-1).flatten(dims).flatten(0, -2).double())
        if parts:
            found[shortest(as_tuple(key))] = torch.cat(parts)
    return found


def rows(found: dict[NestedKey, Tensor], keys: Sequence[NestedKey] | None = None) -> Tensor:
    """All keys' features side by side, ``[rows, N]``."""
    return torch.cat([found[key] for key in (found if keys is None else keys)], -1)
