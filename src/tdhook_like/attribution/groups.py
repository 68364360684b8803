"""Groups of features that are changed together: each feature by itself, whole keys, or masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.mixing import Mixer
from tdhook_like.errors import InputError, listed
from tdhook_like.keys import as_tuple, check_known, shortest

__all__ = ["Groups", "Masks", "check_masks", "grouped"]

Masks = Mapping[NestedKey, Tensor]
"""By key, the number of the group that each feature belongs to."""

BY = ("features", "keys")


@dataclass(frozen=True)
class Groups:
    """The features of all keys, divided into ``count`` groups.

    With *elements* of shape ``[*E]`` (the batch, or its trajectories) and inputs ``[*E, *F]``:

    Attributes:
        ids: For each key the group of every feature: broadcasts to ``[*F]``, or to ``[*E, *F]`` where
            elements are divided differently. As many dimensions as the one or the other.
        starts: For each key whose features are groups of their own, numbered in order, the first
            of these numbers; else None.
        count: How many groups there are.
        shapes: For each key ``[*E, *F]``.
        dims: The number of dimensions of ``[*E]``.
    """

    ids: tuple[Tensor, ...]
    starts: tuple[int | None, ...]
    count: int
    shapes: tuple[torch.Size, ...]
    dims: int

    def scores(self, mixer: Mixer, present: Tensor, absent: Sequence[Tensor]) -> Tensor:
        """Scores ``[c, *E, T]`` of inputs of which only some groups are there.

        Args:
            mixer: Makes the points.
            present: Which groups are, for each of c evaluations: ``[c, count]``, bool.
            absent: What stands in the place of other groups, ``[*E, *F]`` or ``[c, *E, *F]`` each.
        """
        points = [mixer.mixed(i, self._mask(i, present), other) for i, other in enumerate(absent)]
        return mixer.scores(points)

    def _mask(self, i: int, present: Tensor) -> Tensor:
        ids, start, shape = self.ids[i], self.starts[i], self.shapes[i]
        whole = (1,) * (len(shape) - ids.ndim)  # nothing where ids differ between elements
        if start is not None:
            there = present[:, start : start + ids.numel()]
        else:
            there = present.index_select(1, ids.flatten())
        return there.reshape(len(present), *whole, *ids.shape)

    def spread(self, values: Tensor, divide: bool) -> list[Tensor]:
        """The values of groups at their features.

        Args:
            values: ``[count, *E, T]``.
            divide: Whether a group's value is divided among its features.

        Returns:
            For each key, ``[T, *E, *F]``.
        """
        if divide and not self._alone:
            values = values / self._sizes().unsqueeze(-1).clamp_min(1)
        return [self._at_features(i, values) for i in range(len(self.shapes))]

    def _at_features(self, i: int, values: Tensor) -> Tensor:
        ids, start, shape = self.ids[i], self.starts[i], self.shapes[i]
        by_target = values.movedim(-1, 0)  # [T, count, *E]
        if start is not None:
            found = by_target[:, start : start + ids.numel()].movedim(1, -1)
            return found.reshape(len(found), *shape)
        by_target = by_target.movedim(1, -1)  # [T, *E, count]
        if ids.ndim < len(shape) or not self.dims:
            found = by_target.index_select(-1, ids.flatten()).unflatten(-1, (*ids.shape, 1))
            return found.squeeze(-1).expand(len(found), *shape).contiguous()
        rows = ids.expand(shape).flatten(self.dims)
        found = by_target.gather(-1, rows.expand(len(by_target), *rows.shape))
        return found.reshape(len(found), *shape)

    def total(self, values: Tensor) -> Tensor:
        """Sums ``[count, *E, T]`` to ``[*E, T]``, over groups of which an element has a feature."""
        if self._alone:
            return values.sum(0)
        return (values * (self._sizes() > 0).unsqueeze(-1)).sum(0)

    @property
    def _alone(self) -> bool:
        return None not in self.starts

    def _sizes(self) -> Tensor:
        """How many features each group has, ``[count, *E]`` (or ones in the place of ``*E``)."""
        elements = self.shapes[0][: self.dims]
        n = elements.numel()
        found = torch.zeros(1, self.count, dtype=torch.long, device=self.ids[0].device)
        for ids, shape in zip(self.ids, self.shapes, strict=True):
            if ids.ndim < len(shape) or not self.dims:
                flat = ids.expand(shape[self.dims :]).flatten()
                found = found + torch.bincount(flat, minlength=self.count)
            else:
                row = torch.arange(n, device=ids.device).unsqueeze(1) * self.count
                flat = (ids.expand(shape).reshape(n, -1) + row).flatten()
                counts = torch.bincount(flat, minlength=n * self.count)
                found = found + counts.reshape(n, self.count)
        apart = elements if len(found) == n else (1,) * self.dims
        return found.mT.reshape(self.count, *apart)


def check_masks(masks: object) -> None:
    """Refuses what is no division into groups, as far as that shows without inputs.

    Raises:
        InputError: If ``masks`` is no dict, holds anything but whole numbers from 0 on, or leaves
            a number out.
    """
    if masks is None:
        return
    if not isinstance(masks, Mapping) or not masks:
        raise InputError(
            f"masks={masks!r}: give a dict from keys to tensors of group numbers, such as "
            '{"observation": torch.tensor([0, 0, 1])}.'
        )
    seen: set[int] = set()
    for key, mask in masks.items():
        as_tuple(key)
        if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"The mask of {key!r} is {kind}: group numbers are an integer tensor.")
        if mask.dtype == torch.bool:
            raise InputError(f"The mask of {key!r} is bool: say which group is 0 and which 1.")
        numbers = mask.unique().tolist()
        if numbers and numbers[0] < 0:
            raise InputError(
                f"The mask of {key!r} holds {numbers[0]}: groups are numbered from 0 on."
            )
        seen.update(numbers)
    missing = sorted(set(range(max(seen, default=-1) + 1)) - seen)
    if missing:
        raise InputError(
            f"The masks of {listed(shortest(as_tuple(key)) for key in masks)} leave out the group "
            f"numbers {listed(missing)}: all from 0 to {max(seen)} are needed, in any of the keys."
        )


def grouped(
    inputs: Sequence[Tensor],
    keys: Sequence[NestedKey],
    dims: int,
    masks: Masks | None = None,
    by: str = "features",
) -> Groups:
    """Divides the features of inputs into groups.

    Args:
        inputs: ``[*E, *F]`` for each key.
        keys: Their names.
        dims: The number of dimensions of ``[*E]``.
        masks: By key, group numbers that broadcast to ``[*F]``, or to ``[*E, *F]``. One number may
            stand in several keys. Keys without a mask are divided as ``by`` says, into groups
            numbered behind those of the masks.
        by: ``"features"``: each by itself; or ``"keys"``: each key as a whole.

    Raises:
        InputError: If a mask does not broadcast.
        KeyNotFoundError: If a mask is given for a key that is not attributed.

    >>> groups = grouped([torch.ones(5, 2), torch.ones(5, 3)], ["a", "b"], 1, by="keys")
    >>> groups.count, [ids.tolist() for ids in groups.ids]
    (2, [[0], [1]])
    """
    shapes = tuple(x.shape for x in inputs)
    if masks is None:
        return _unmasked(shapes, dims, by, inputs[0].device)
    check_known(masks, keys, "attributed keys")
    by_key = {as_tuple(key): mask for key, mask in masks.items()}
    count = max(int(mask.max()) + 1 for mask in masks.values() if mask.numel())
    ids, starts = [], []
    for key, x in zip(keys, inputs, strict=True):
        mask = by_key.get(as_tuple(key))
        start = None
        if mask is not None:
            fitting = _fitting(mask.to(x.device, torch.long), key, x.shape, dims)
        else:
            fitting, start = _numbered(x.shape[dims:], by, count, x.device)
            count += fitting.numel()
        ids.append(fitting)
        starts.append(start)
    return Groups(tuple(ids), tuple(starts), count, shapes, dims)


@lru_cache(maxsize=16)
def _unmasked(shapes: tuple[torch.Size, ...], dims: int, by: str, device: torch.device) -> Groups:
    ids, starts, count = [], [], 0
    for shape in shapes:
        numbers, start = _numbered(shape[dims:], by, count, device)
        ids.append(numbers)
        starts.append(start)
        count += numbers.numel()
    return Groups(tuple(ids), tuple(starts), count, shapes, dims)


def _numbered(
    features: torch.Size, by: str, start: int, device: torch.device
) -> tuple[Tensor, int | None]:
    if by == "keys":
        empty = 0 in features  # a key without features is no group
        ones = (1,) * len(features)
        return torch.full(features if empty else ones, start, device=device), None
    numbers = torch.arange(start, start + math.prod(features), device=device)
    return numbers.reshape(features), start


def _fitting(mask: Tensor, key: NestedKey, shape: torch.Size, dims: int) -> Tensor:
    """A mask with as many dimensions as ``[*F]``, or as ``[*E, *F]`` if it divides each element."""
    features = shape[dims:]
    whole = shape if mask.ndim > len(features) else features
    try:
        mask.expand(whole)
    except RuntimeError:
        raise InputError(
            f"The mask of {key!r} has shape {tuple(mask.shape)}, which broadcasts neither to the "
            f"features {tuple(features)} nor, element by element, to {tuple(shape)}."
        ) from None
    mask = mask.reshape((1,) * (len(whole) - mask.ndim) + tuple(mask.shape))
    alike = len(whole) > len(features) and set(mask.shape[:dims]) <= {1}
    return mask.reshape(mask.shape[dims:]) if alike else mask
