"""Against what an input is explained: a number, a tensor, a callable, a key, a buffer's samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase  # noqa: F401 (TensorDict: for the doctest)
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.errors import BaselineError, listed
from tdhook_like.keys import as_tuple, shortest

__all__ = ["BaselineSpec", "FromBuffer", "FromKey", "resolve"]


class Sampler(Protocol):
    """Anything with ``sample(n)`` that gives a TensorDict of ``n`` rows, as a replay buffer does."""

    def sample(self, batch_size: int, /) -> Any: ...


@dataclass(frozen=True)
class FromKey:
    """The baseline stands in the TensorDict itself, at another key.

    >>> FromKey("resting_pose")
    FromKey(key='resting_pose')
    """

    key: NestedKey


@dataclass(frozen=True)
class FromBuffer:
    """For every element, the value that the key has in a row drawn from a buffer.

    Args:
        buffer: Has ``sample(n)``, as torchrl's ReplayBuffer.
        key: Where to read in the rows; the explained key itself by default.
    """

    buffer: Sampler
    key: NestedKey | None = None


BaselineSpec = float | Tensor | Callable[[Tensor], Tensor] | FromKey | FromBuffer
"""A number, a tensor that broadcasts to the input, a function of it, a key, or a buffer."""


def check(spec: object, keys: tuple[NestedKey, ...]) -> None:
    """Raises :class:`BaselineError` for keys that are not attributed and for what is no baseline."""
    if isinstance(spec, Mapping):
        known = {as_tuple(key) for key in keys}
        for key, item in spec.items():
            if as_tuple(key) not in known:
                raise BaselineError(
                    f"A baseline is given for {key!r}, which is not attributed. Attributed keys: "
                    f"{listed(shortest(k) for k in keys)}."
                )
            check(item, keys)
    elif isinstance(spec, Tensor):
        if not spec.is_meta and not torch.isfinite(spec).all():
            raise BaselineError("The baseline holds NaN or Inf.")
    elif isinstance(spec, int | float) and not isinstance(spec, bool):
        if spec != spec or spec in (float("inf"), float("-inf")):
            raise BaselineError(f"The baseline is {spec}; it must be finite.")
    elif not (spec is None or isinstance(spec, FromKey | FromBuffer) or callable(spec)):
        raise BaselineError(
            f"{spec!r} is not a baseline. Give a number, a tensor, a function of the input, "
            "FromKey(key), FromBuffer(buffer), or a dict of these by key."
        )


def resolve(
    spec: BaselineSpec | Mapping[NestedKey, BaselineSpec] | None,
    td: TensorDictBase,
    keys: tuple[NestedKey, ...],
    inputs: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """One baseline per input, of its shape; zeros where nothing is given.

    Raises:
        BaselineError: If a baseline has another shape, device or kind, or is not finite.

    >>> x = torch.ones(2, 3)
    >>> resolve({"x": 0.5}, TensorDict({"x": x}, [2]), ("x",), (x,))[0][0]
    tensor([0.5000, 0.5000, 0.5000])
    """
    if isinstance(spec, Mapping):
        by_key = {as_tuple(key): item for key, item in spec.items()}
        specs = [by_key.get(as_tuple(key)) for key in keys]
    else:
        specs = [spec] * len(keys)
    drawn: dict[int, Any] = {}
    return tuple(
        _one(item, td, key, x.detach(), drawn)
        for item, key, x in zip(specs, keys, inputs, strict=True)
    )


def _one(spec: Any, td: TensorDictBase, key: NestedKey, x: Tensor, drawn: dict[int, Any]) -> Tensor:
    if spec is None:
        return x.new_zeros(()).expand_as(x)  # of large inputs, memory would be half of the work
    if isinstance(spec, int | float):
        return x.new_full((), spec).expand_as(x)
    if isinstance(spec, FromKey):
        value = td.get(spec.key, None)
        if value is None:
            raise BaselineError(
                f"The baseline of {key!r} is to be read at {spec.key!r}: no such key."
            )
    elif isinstance(spec, FromBuffer):
        value = _sampled(spec, td, key, drawn)
    else:
        value = spec(x) if callable(spec) else spec
    return _fitting(value, key, x)


def _sampled(spec: FromBuffer, td: TensorDictBase, key: NestedKey, drawn: dict[int, Any]) -> Any:
    # One draw for all keys: a baseline is a whole observation, not a mixture of several.
    n = max(td.batch_size.numel(), 1)  # of an empty batch, one row that is not used
    if id(spec.buffer) not in drawn:
        if not hasattr(spec.buffer, "sample"):
            raise BaselineError(
                f"{type(spec.buffer).__name__} has no sample(n): no buffer to draw from."
            )
        drawn[id(spec.buffer)] = spec.buffer.sample(n)
    rows = drawn[id(spec.buffer)].get(spec.key or key, None)
    if not isinstance(rows, Tensor):
        raise BaselineError(f"The buffer's rows have no tensor at {spec.key or key!r}.")
    if rows.shape[0] != n:
        raise BaselineError(
            f"The buffer gave {rows.shape[0]} rows of {key!r} where {n} were asked for, one for each "
            "batch element."
        )
    return rows[: td.batch_size.numel()].reshape((*td.batch_size, *rows.shape[1:]))


def _fitting(value: Any, key: NestedKey, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise BaselineError(f"The baseline of {key!r} is a {type(value).__name__}, not a tensor.")
    if value.is_complex() and not x.is_complex():
        raise BaselineError(f"The baseline of {key!r} is {value.dtype}, the input is {x.dtype}.")
    if value.device != x.device:
        raise BaselineError(
            f"The baseline of {key!r} is on {value.device}, the input on {x.device}: move it."
        )
    try:
        value = value.detach().to(x.dtype).expand(x.shape)
    except RuntimeError:
        raise BaselineError(
            f"The baseline of {key!r} has shape {tuple(value.shape)}, which does not broadcast to "
            f"the input's {tuple(x.shape)}."
        ) from None
    if not torch.isfinite(value).all():
        raise BaselineError(f"The baseline of {key!r} holds NaN or Inf.")
    return value
