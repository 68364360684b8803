"""What baselines are drawn from: rows of observations, distributions, replay buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Distribution

from tdhook_like.baselines import BaselineSpec, FromBuffer, resolve
from tdhook_like.errors import BaselineError
from tdhook_like.keys import as_tuple
from tdhook_like.score import Score

__all__ = ["Drawable", "FromDistribution", "Rows", "check_rows", "drawn", "drawn_from"]

One = BaselineSpec | Distribution
Drawable = One | TensorDictBase | Mapping[NestedKey, One] | None
"""What baselines are drawn from, for all keys or by key."""


class Rows:
    """A fixed set of observations that is sampled like a replay buffer, with replacement.

    Args:
        rows: By key, or one tensor for whatever key is asked for: ``[n, *features]``.

    Raises:
        BaselineError: If there are no rows, or not as many of each key.

    >>> Rows({("x",): torch.tensor([[5.0]])}).sample(2).get("x").tolist()
    [[5.0], [5.0]]
    """

    def __init__(self, rows: Mapping[tuple[str, ...], Tensor] | Tensor) -> None:
        self.rows = rows
        every = [rows] if isinstance(rows, Tensor) else list(rows.values())
        sizes = {len(row) if row.ndim else 0 for row in every}
        if len(sizes) > 1:
            raise BaselineError(
                f"Baselines of several keys are drawn together, but their numbers of rows differ: "
                f"{ {'/'.join(k): len(v) for k, v in rows.items()} }."  # pyright: ignore
            )
        self.n = sizes.pop() if sizes else 0
        if not self.n:
            raise BaselineError(
                "A tensor of baselines holds rows to draw from, [n, *features], and this one holds "
                "none. For one baseline, give a number, or a tensor with a first dimension of 1."
            )

    def __repr__(self) -> str:
        return f"Rows(n={self.n})"

    def of(self, key: NestedKey) -> Tensor | None:
        """All rows of a key."""
        return self.rows if isinstance(self.rows, Tensor) else self.rows.get(as_tuple(key))

    def sample(self, n: int) -> _Drawn:
        """So many rows, the same ones of every key."""
        return _Drawn(self, torch.randint(self.n, (n,)))


@dataclass(frozen=True)
class _Drawn:
    rows: Rows
    numbers: Tensor

    def get(self, key: NestedKey, default: Any = None) -> Tensor | None:
        found = self.rows.of(key)
        return default if found is None else found[self.numbers.to(found.device)]


@dataclass(frozen=True)
class FromDistribution:
    """A baseline that is drawn from a distribution, anew for every element.

    Args:
        distribution: Its batch and event shapes broadcast to the last dimensions of the features;
            a scalar one is drawn from for every feature.

    >>> from torch.distributions import Uniform
    >>> FromDistribution(Uniform(torch.zeros(3), 1.0))(torch.ones(5, 3)).shape
    torch.Size([5, 3])
    """

    distribution: Distribution

    def __call__(self, x: Tensor) -> Tensor:
        """One draw for an input of this shape."""
        own = self.distribution.batch_shape + self.distribution.event_shape
        return self.distribution.sample(x.shape[: max(x.ndim - len(own), 0)]).to(x)


def drawn_from(spec: Any) -> Any:
    """The same in the grammar of baselines: tensors as buffers of rows, distributions as functions."""
    if isinstance(spec, TensorDictBase):
        rows = {
            as_tuple(key): value
            for key, value in spec.items(True, True)
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        if spec.batch_dims != 1:
            raise BaselineError(
                f"A TensorDict of baselines holds rows, [n]; this one has the batch size "
                f"{tuple(spec.batch_size)}. Flatten it: td.reshape(-1)."
            )
        return FromBuffer(Rows({key: _finite(key, value) for key, value in rows.items()}))
    if isinstance(spec, Mapping):
        tensors = {as_tuple(k): _finite(k, v) for k, v in spec.items() if isinstance(v, Tensor)}
        rows = FromBuffer(Rows(tensors)) if tensors else None
        return {k: rows if isinstance(v, Tensor) else drawn_from(v) for k, v in spec.items()}
    if isinstance(spec, Tensor):
        return FromBuffer(Rows(_finite("baselines", spec)))
    return FromDistribution(spec) if isinstance(spec, Distribution) else spec


def drawn(spec: Any, score: Score, n: int) -> list[Tensor]:
    """Baselines of ``score.inputs``, n times, ``[n, *B, *F]`` for each key."""
    each = [_of_key(spec, key) for key in score.keys]
    whole = all(
        _fits(one, each[0], key, x, score)
        for one, key, x in zip(each, score.keys, score.inputs, strict=True)
    )
    if not whole:
        here = score.template, score.keys, score.inputs
        rows = [resolve(spec, *here) for _ in range(n)]
        return [torch.stack(key) for key in zip(*rows, strict=True)]
    # All of one set of rows: those of n draws are the same ones, drawn at once.
    elements = score.batch.numel()
    found = each[0].buffer.sample(n * max(elements, 1))
    return [
        found.get(one.key or key)[: n * elements].to(x.dtype).reshape(n, *x.shape)
        for one, key, x in zip(each, score.keys, score.inputs, strict=True)
    ]


def _of_key(spec: Any, key: NestedKey) -> Any:
    if not isinstance(spec, Mapping):
        return spec
    return {as_tuple(name): item for name, item in spec.items()}.get(as_tuple(key))


def _fits(one: Any, first: Any, key: NestedKey, x: Tensor, score: Score) -> bool:
    """Whether a key is drawn from the same rows as the first, and these are of its features' shape."""
    if not (isinstance(one, FromBuffer) and isinstance(one.buffer, Rows)):
        return False
    rows = one.buffer.of(one.key or key)
    if rows is None or one.buffer is not first.buffer or rows.device != x.device:
        return False
    return rows.shape[1:] == x.shape[len(score.batch) :]


def check_rows(spec: Any, score: Score) -> None:
    """Refuses tensors whose rows are not of the features' dimensions; they might broadcast all the same.

    Raises:
        BaselineError: If there is one.
    """
    for key, x in zip(score.keys, score.inputs, strict=True):
        one = _of_key(spec, key)
        if not (isinstance(one, FromBuffer) and isinstance(one.buffer, Rows)):
            continue
        rows, features = one.buffer.of(one.key or key), x.ndim - len(score.batch)
        if rows is not None and rows.ndim - 1 != features:
            raise BaselineError(
                f"The baselines of {key!r} have rows of shape {tuple(rows.shape[1:])}, its features "
                f"the shape {tuple(x.shape[len(score.batch) :])}: give [n, *features]."
            )


def _finite(key: object, value: Tensor) -> Tensor:
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise BaselineError(f"The rows of {key!r} that baselines are drawn from hold NaN or Inf.")
    return value.detach()
