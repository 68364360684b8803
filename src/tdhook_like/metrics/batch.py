"""Which elements of a batch count, and which of them depend on each other."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_like.errors import InputError, KeyNotFoundError, listed
from tdhook_like.metrics.bootstrap import Units, block_units, independent_units, trajectory_units

__all__ = ["mean_per_step", "resampling_words", "time_position", "units_of", "valid_elements"]


def valid_elements(td: TensorDictBase, mask: NestedKey | None) -> Tensor:
    """Which elements count: a boolean tensor [*B] on the CPU."""
    if mask is None:
        valid = torch.ones(td.batch_size, dtype=torch.bool)
    else:
        found = td.get(mask, None)
        if found is None:
            raise KeyNotFoundError(f"mask={mask!r} is not in td: there is {listed(td.keys())}.")
        if found.dtype != torch.bool or found.numel() != td.batch_size.numel():
            raise InputError(
                f"mask={mask!r} must be boolean with one value per element {tuple(td.batch_size)}, "
                f"but is {found.dtype} of shape {tuple(found.shape)}."
            )
        valid = found.reshape(td.batch_size).cpu()
    if not valid.any():
        raise InputError(
            f"There is no element to average over: batch size {tuple(td.batch_size)}"
            + ("." if mask is None else f", all of them masked out by {mask!r}.")
        )
    return valid


def time_position(td: TensorDictBase, time_dim: int | str | None) -> int | None:
    """The batch dimension that is time, counted from the front."""
    names = list(td.names)
    if time_dim is None:
        return names.index("time") if "time" in names else None
    if isinstance(time_dim, str):
        if time_dim not in names:
            raise InputError(f"time_dim={time_dim!r} is not one of td.names={names}.")
        return names.index(time_dim)
    if not -td.batch_dims <= time_dim < td.batch_dims:
        raise InputError(
            f"time_dim={time_dim} is not a batch dimension of a TensorDict with batch size "
            f"{tuple(td.batch_size)}."
        )
    return time_dim % td.batch_dims


def units_of(values: Tensor, valid: Tensor, time: int | None) -> Units:
    """What to resample: elements, trajectories, or blocks of the only trajectory."""
    if time is None:
        return independent_units(values[valid])
    series, counted = _by_trajectory(values, valid, time)
    if int(counted.any(1).sum()) > 1:
        return trajectory_units(series, counted)
    return block_units(series[counted])


def resampling_words(units: Units, confidence: float, n_resamples: int) -> str:
    """How the intervals were made, in words."""
    if len(units.sums) < 2:
        return "none, as there is only one element to resample"
    how = f"{100 * confidence:g} % percentile bootstrap, {n_resamples:,} resamples of"
    return f"{how} {units.description}"


def mean_per_step(values: Tensor, valid: Tensor, time: int) -> Tensor:
    """Means over the trajectories at each step, [T, V]; 0 where no trajectory counts."""
    series, counted = _by_trajectory(values, valid, time)
    sums = torch.where(counted[..., None], series, 0).sum(0)
    return sums / counted.sum(0).clamp(min=1)[:, None]


def _by_trajectory(values: Tensor, valid: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """[*B, V] and [*B] as [N, T, V] and [N, T]."""
    series = values.movedim(time, -2)
    counted = valid.movedim(time, -1)
    return series.reshape(-1, *series.shape[-2:]), counted.reshape(-1, counted.shape[-1])
