"""Between which values inputs may lie: numbers and tensors by key, or TorchRL's specs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.errors import InputError
from tdhook_like.keys import as_tuple, check_known
from tdhook_like.score import Score

__all__ = ["Bounds", "Box", "boxes", "check_bounded_keys", "check_bounds", "clipped"]

Box = tuple[Tensor, Tensor]
"""The least and the largest values, broadcasting to ``[*B, *F]``."""

Bounds = Any
"""A pair ``(low, high)`` of numbers or tensors, a spec (anything with ``.space.low`` and
``.space.high``), or either of them by key; a composite spec is such a dict. None for no bounds."""


def check_bounds(bounds: Bounds, what: str = "bounds") -> None:
    """Refuses what is no bounds, as far as that shows without inputs.

    Raises:
        InputError: If so.

    >>> check_bounds((1.0, 0.0))
    Traceback (most recent call last):
      ...
    tdhook_like.errors.InputError: bounds: the low value is above the high one: (1.0, 0.0).
    """
    if bounds is None:
        return
    if isinstance(bounds, Mapping):
        for key, item in bounds.items():
            as_tuple(key)
            check_bounds(item, f"bounds[{key!r}]")
    elif _is_composite(bounds) or hasattr(bounds, "space"):
        return
    elif isinstance(bounds, tuple | list) and len(bounds) == 2:
        try:
            low, high = (torch.as_tensor(part, dtype=torch.float64) for part in bounds)
            fits = bool((low <= high).all())
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"{what}={bounds!r}: give two numbers or tensors, (low, high)."
            ) from None
        if low.isnan().any() or high.isnan().any():
            raise InputError(f"{what} hold NaN.")
        if not fits:
            raise InputError(f"{what}: the low value is above the high one: {bounds!r}.")
    else:
        raise InputError(
            f"{what}={bounds!r}: give (low, high), a spec such as env.observation_spec, or a dict of "
            "these by key."
        )


def check_bounded_keys(bounds: Bounds, known: tuple[NestedKey, ...]) -> None:
    """Raises :class:`KeyNotFoundError` for bounds of keys that are not attributed."""
    if isinstance(bounds, Mapping):
        check_known(bounds, known, "attributed keys")


def boxes(bounds: Bounds, score: Score) -> list[Box]:
    """The bounds of each key; infinite where there are none.

    Raises:
        InputError: If bounds do not broadcast to their key.
    """
    found = []
    for key, x in zip(score.keys, score.inputs, strict=True):
        low, high = _of_key(bounds, key)
        dims = len(score.batch)
        found.append((_fitted(low, key, x, dims), _fitted(high, key, x, dims)))
    return found


def clipped(points: Tensor, box: Box) -> Tensor:
    """The nearest points inside."""
    return torch.minimum(torch.maximum(points, box[0]), box[1])


def _is_composite(bounds: Any) -> bool:
    return callable(getattr(bounds, "keys", None)) and hasattr(bounds, "__getitem__")


def _of_key(bounds: Bounds, key: NestedKey) -> tuple[Any, Any]:
    unbounded = (-torch.inf, torch.inf)
    if bounds is None:
        return unbounded
    if isinstance(bounds, Mapping):
        by_key = {as_tuple(name): item for name, item in bounds.items()}
        return _of_key(by_key.get(as_tuple(key)), key)
    if _is_composite(bounds):  # a composite spec holds those of the keys
        try:
            return _of_key(bounds[key], key)
        except KeyError:
            return unbounded
    if hasattr(bounds, "space"):
        space = bounds.space
        if getattr(space, "low", None) is None or getattr(space, "high", None) is None:
            return unbounded  # discrete, or nothing known
        return space.low, space.high
    low, high = bounds
    return low, high


def _fitted(bound: Any, key: NestedKey, x: Tensor, dims: int) -> Tensor:
    bound = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
    features = x.ndim - dims
    if bound.ndim > features:
        # A spec of several environments: alike for all of them, it holds for any batch.
        rows = bound.reshape(-1, *bound.shape[bound.ndim - features :])
        if len(rows) and bool((rows == rows[0]).all()):
            bound = rows[0]
    try:
        bound.expand(x.shape)
    except RuntimeError:
        raise InputError(
            f"The bounds of {key!r} have shape {tuple(bound.shape)}, which does not broadcast to the "
            f"input's {tuple(x.shape)}."
        ) from None
    return bound
