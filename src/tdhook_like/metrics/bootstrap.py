"""Bootstrap intervals of a mean, over units that may be drawn independently.

Elements of a replay-buffer sample are such units. The steps of an episode are not: neighbours are
alike, so drawing steps one by one pretends to more evidence than there is. There the unit is the
whole trajectory, or, where there is only one, a block of consecutive steps.

Sources: Efron 1979 (bootstrap, percentile interval); Künsch 1989 and Politis & Romano 1992
(moving and circular blocks); Carlstein 1986 (block length from the first autocorrelation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Units", "block_units", "independent_units", "interval", "trajectory_units"]

# Past this many units, neighbours are merged first: the interval of a mean of 4096 group means is
# as good as that of the single values, and time and memory stop growing with the batch.
_MOST_UNITS = 4096
# Numbers held at once while resampling (32 MiB in float64).
_CHUNK = 2**22
_FEW_UNITS = 10
_SHORTEST_SERIES = 10
_FEWEST_BLOCKS = 5


@dataclass(frozen=True)
class Units:
    """What a resample draws: sums [U, V] of U units with ``sizes`` [U], ``draws`` of them.

    A resampled mean is the sum of the drawn sums over the sum of the drawn sizes, so that units of
    different length (masked trajectories) weigh by what they hold.
    """

    sums: Tensor
    sizes: Tensor
    draws: int
    description: str


def independent_units(values: Tensor) -> Units:
    """Each row of ``values`` [N, V] on its own.

    >>> independent_units(torch.zeros(8, 1)).description
    '8 elements (few: read the intervals as rough)'
    """
    sizes = torch.ones(len(values), dtype=values.dtype)
    return _merged(values, sizes, "elements")


def trajectory_units(values: Tensor, valid: Tensor) -> Units:
    """Whole trajectories: ``values`` [N, T, V], with the steps that count in ``valid`` [N, T].

    >>> trajectory_units(torch.zeros(20, 7, 1), torch.ones(20, 7, dtype=torch.bool)).draws
    20
    """
    sums = torch.where(valid[..., None], values, 0).sum(1)
    sizes = valid.sum(1).to(values.dtype)
    kept = sizes > 0
    return _merged(sums[kept], sizes[kept], "trajectories")


def block_units(values: Tensor) -> Units:
    """Blocks of consecutive steps of one trajectory ``values`` [T, V].

    The blocks wrap around the end, so that every step is drawn equally often. Falls back to single
    steps, and says so, where the trajectory is too short to be cut.

    >>> block_units(torch.linspace(0, 1, 200)[:, None]).description
    'blocks of 40 steps, as there is only one trajectory'
    """
    steps = len(values)
    if steps < _SHORTEST_SERIES:
        units = independent_units(values)
        description = f"{steps} steps as if independent (one trajectory, too short for blocks)"
        return Units(units.sums, units.sizes, units.draws, description)
    length = block_length(values)
    running = torch.cat([values, values[: length - 1]]).cumsum(0)
    running = torch.cat([torch.zeros_like(values[:1]), running])
    sums = running[length:] - running[:-length]
    sizes = torch.full((steps,), float(length), dtype=values.dtype)
    description = f"blocks of {length} steps, as there is only one trajectory"
    return Units(sums, sizes, max(1, steps // length), description)


def block_length(values: Tensor) -> int:
    """Steps per block for one trajectory [T, V]: longer where neighbouring steps are more alike.

    (2ρ / (1 - ρ²))^(2/3) · T^(1/3), with ρ the largest first autocorrelation of the columns, and
    at least five blocks to a trajectory.

    >>> block_length(torch.tensor([[1.0], [-1.0]] * 50))
    1
    """
    steps = len(values)
    centred = values - values.mean(0)
    power = centred.square().sum(0)
    lagged = (centred[1:] * centred[:-1]).sum(0)
    correlations = lagged[power > 0] / power[power > 0]
    rho = float(correlations.max().clamp(0, 0.99)) if correlations.numel() else 0.0
    length = math.ceil((2 * rho / (1 - rho**2)) ** (2 / 3) * steps ** (1 / 3))
    return min(max(length, 1), steps // _FEWEST_BLOCKS)


def interval(
    units: Units, *, confidence: float, n_resamples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Percentile interval of the mean, per column: two tensors [V].

    NaN where there are fewer than two units, as one unit says nothing about how far the mean could
    lie from it. Draws come from a private generator; the global one is untouched.

    >>> low, high = interval(independent_units(torch.ones(30, 1)), confidence=0.9,
    ...                      n_resamples=50, seed=0)
    >>> low.item(), high.item()
    (1.0, 1.0)
    """
    if len(units.sums) < 2:
        unknown = units.sums.new_full(units.sums.shape[1:], math.nan)
        return unknown, unknown.clone()
    means = _resampled_means(units, n_resamples, seed)
    tail = (1 - confidence) / 2
    at = torch.tensor([tail, 1 - tail], dtype=means.dtype)
    # Column by column: torch.quantile refuses more than 2**24 numbers at once.
    bounds = [torch.quantile(column, at) for column in means.unbind(1)]
    low, high = torch.stack(bounds, dim=1)
    return low, high


def _resampled_means(units: Units, n_resamples: int, seed: int) -> Tensor:
    """Means of resamples, [n_resamples, V].

    Counting how often each unit was drawn turns the sums into one matrix product, where gathering
    the drawn rows would hold n_resamples × draws × V numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    n_units = len(units.sums)
    chunk = max(1, _CHUNK // max(n_units, units.draws))
    means = []
    for start in range(0, n_resamples, chunk):
        rows = min(chunk, n_resamples - start)
        drawn = torch.randint(n_units, (rows, units.draws), generator=generator)
        counts = torch.zeros(rows, n_units, dtype=units.sums.dtype)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=counts.dtype))
        means.append(counts @ units.sums / (counts @ units.sizes)[:, None])
    return torch.cat(means)


def _merged(sums: Tensor, sizes: Tensor, noun: str) -> Units:
    """At most ``_MOST_UNITS`` units, by merging neighbours."""
    n_units = len(sums)
    description = f"{n_units:,} {noun}"
    if n_units > _MOST_UNITS:
        group = torch.arange(n_units) * _MOST_UNITS // n_units
        sums = sums.new_zeros(_MOST_UNITS, *sums.shape[1:]).index_add_(0, group, sums)
        sizes = sizes.new_zeros(_MOST_UNITS).index_add_(0, group, sizes)
        description += f" in {_MOST_UNITS:,} groups"
    elif n_units < _FEW_UNITS:
        description += " (few: read the intervals as rough)"
    return Units(sums, sizes, len(sums), description)
