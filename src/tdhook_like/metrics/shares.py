"""How much of the relevance each key carries, with intervals.

*Relevance* R is what a method wrote for one feature: its signed part in the score. The relevance
of a key is the sum of R over its features. The *share* of a key is the sum of |R| over its
features divided by that sum over all keys: it ignores signs, lies in [0, 1] and adds up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_like.errors import InputError, KeyNotFoundError, listed
from tdhook_like.keys import as_tuple, shortest
from tdhook_like.metrics.batch import (
    mean_per_step,
    resampling_words,
    time_position,
    units_of,
    valid_elements,
)
from tdhook_like.metrics.bootstrap import interval
from tdhook_like.metrics.leaves import attributions_by_key
from tdhook_like.metrics.table import aligned

__all__ = ["KeyShares", "KeySummary", "key_shares"]

Interval = tuple[float, float]


@dataclass(frozen=True)
class KeySummary:
    """One key over the whole batch: means over the elements, each with a bootstrap interval.

    Attributes:
        relevance: mean signed relevance of the key.
        absolute: mean sum of |R| over the features of the key.
        share: mean share of absolute relevance, in [0, 1].
        first: how often the key ranks first by absolute relevance; a tie counts in equal parts.
        relevance_interval, absolute_interval, share_interval, first_interval: ``(low, high)``,
            NaN where there is only one thing to resample.
    """

    relevance: float
    relevance_interval: Interval
    absolute: float
    absolute_interval: Interval
    share: float
    share_interval: Interval
    first: float
    first_interval: Interval


@dataclass(frozen=True, eq=False)
class KeyShares:
    """What :func:`key_shares` found. Prints as a table.

    Attributes:
        keys: the keys, in the order of the TensorDict or of ``keys=``.
        target: the named target, or None for the only one.
        relevance: per key, signed relevance of each element [*B].
        absolute: per key, sum of |R| of each element [*B].
        share: per key, ``absolute`` over its sum for all keys [*B]; 0 where that sum is 0.
        summary: per key, the means over the batch with their intervals.
        relevance_per_step: per key, mean relevance at each time step [T]; None without time.
        share_per_step: per key, mean share at each time step [T]; None without time.
        n_elements: how many elements the means are over.
        n_zero: how many of them have no relevance at all, so that every share there is 0.
        confidence: the confidence of the intervals.
        resampling: how the intervals were made, in words.
    """

    keys: tuple[NestedKey, ...]
    target: str | None
    relevance: Mapping[NestedKey, Tensor]
    absolute: Mapping[NestedKey, Tensor]
    share: Mapping[NestedKey, Tensor]
    summary: Mapping[NestedKey, KeySummary]
    relevance_per_step: Mapping[NestedKey, Tensor] | None
    share_per_step: Mapping[NestedKey, Tensor] | None
    n_elements: int
    n_zero: int
    confidence: float
    resampling: str

    def first_rate(self, keys: NestedKey | Iterable[NestedKey]) -> float:
        """How often any of the given keys ranks first by absolute relevance.

        Args:
            keys: one key, or several. A tuple that is one of :attr:`keys` is one nested key.

        Raises:
            KeyNotFoundError: a key has no share here.

        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tdhook_like.metrics import key_shares
        >>> td = TensorDict({"attr": {"cart": torch.tensor([[1.0], [5.0]]),
        ...                           "pole": torch.tensor([[2.0], [3.0]])}}, [2])
        >>> key_shares(td).first_rate("pole"), key_shares(td).first_rate(["pole", "cart"])
        (0.5, 1.0)
        """
        one = isinstance(keys, str) or (isinstance(keys, tuple) and _known(keys) in self.keys)
        several: Any = [keys] if one else keys
        wanted = {shortest(key) for key in several}
        unknown = [key for key in wanted if key not in self.summary]
        if unknown:
            raise KeyNotFoundError(
                f"No shares for {listed(unknown)}: there are {listed(self.keys)}."
            )
        return sum(self.summary[key].first for key in self.keys if key in wanted)

    def to_dict(self) -> dict[str, float]:
        """The summary as plain floats under flat names, ready for a logger.

        Nested keys are joined with dots. Intervals that could not be made are left out.

        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tdhook_like.metrics import key_shares
        >>> td = TensorDict({"attr": {"pole": torch.ones(4, 2)}}, [4])
        >>> logged = key_shares(td).to_dict()
        >>> logged["pole/relevance"], logged["pole/share"], logged["pole/share_low"]
        (2.0, 1.0, 1.0)
        """
        logged: dict[str, float] = {}
        for key, summary in self.summary.items():
            for name in ("relevance", "absolute", "share", "first"):
                low, high = getattr(summary, f"{name}_interval")
                stem = f"{'.'.join(as_tuple(key))}/{name}"
                logged[stem] = getattr(summary, name)
                if math.isfinite(low) and math.isfinite(high):
                    logged[f"{stem}_low"], logged[f"{stem}_high"] = low, high
        return {**logged, "n_elements": float(self.n_elements), "n_zero": float(self.n_zero)}

    def __str__(self) -> str:
        of = "" if self.target is None else f" of {self.target!r}"
        level = f"[{100 * self.confidence:g} %]"
        rows = [("key", "signed mean", level, "share", level, "ranks first")]
        by_share = sorted(self.summary.items(), key=lambda item: -item[1].share)
        for key, summary in by_share:
            rows.append(
                (
                    ".".join(as_tuple(key)),
                    f"{summary.relevance:+.4g}",
                    _range(summary.relevance_interval, "+.3g"),
                    f"{100 * summary.share:.1f} %",
                    _range(summary.share_interval, ".1f", 100),
                    f"{100 * summary.first:.1f} %",
                )
            )
        lines = [f"Relevance{of} per key, elements: {self.n_elements:,}", *aligned(rows)]
        if self.n_zero:
            lines.append(f"Elements with no relevance at all (every share 0): {self.n_zero:,}")
        return "\n".join([*lines, f"Intervals: {self.resampling}"])

    __repr__ = __str__


def key_shares(
    td: TensorDictBase,
    root: NestedKey = "attr",
    *,
    target: str | None = None,
    keys: Sequence[NestedKey] | None = None,
    index: int | None = None,
    time_dim: int | str | None = None,
    mask: NestedKey | None = None,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> KeyShares:
    """Share out the relevance in ``td[root]`` over the keys, with bootstrap intervals.

    The batch dimensions B are those of ``td``; whatever an attribution has after them (also the
    agents of a nested batch size) are features of its key.

    With a time dimension, whole trajectories are resampled, as the steps of one depend on each
    other; with a single trajectory, blocks of its steps. :attr:`KeyShares.resampling` says which.

    Args:
        td: what a hooked module returned, with td[root, *key] of shape [*B, *features].
        root: where the attributions were written.
        target: the named target, where there are several: td[root, target, *key].
        keys: the keys to compare, shares being relative to these; all floating ones by default.
        index: which output, where an ``Each`` target wrote a dimension of outputs after B.
        time_dim: the batch dimension that is time, by position or by its name in ``td.names``.
            By default the one that is named ``"time"``, as rollouts name it, if there is one.
        mask: key of a boolean tensor [*B], true for the elements that count (padded rollouts).
        confidence: of the intervals, between 0 and 1.
        n_resamples: how many resamples make an interval.
        seed: of the private generator that draws them; the global one is untouched.

    Raises:
        KeyNotFoundError: the root, the target, the mask or a key is missing.
        InputError: NaN attributions, nothing floating, no elements, or a bad option.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tdhook_like.metrics import key_shares
        >>> td = TensorDict({"attr": {"pole": torch.tensor([[3.0, -1.0], [2.0, 0.0]]),
        ...                           "cart": torch.tensor([[0.0, 4.0], [1.0, 1.0]])}}, [2])
        >>> shares = key_shares(td)
        >>> shares.share["pole"]
        tensor([0.5000, 0.5000])
        >>> shares.summary["pole"].relevance, shares.summary["cart"].relevance
        (2.0, 3.0)
    """
    _check_options(confidence, n_resamples)
    leaves = attributions_by_key(td, root, target=target, keys=keys, index=index)
    names = tuple(leaves)
    dims = td.batch_dims
    absolute = torch.stack([_summed_abs(leaf, dims, key) for key, leaf in leaves.items()])
    relevance = torch.stack([_summed(leaf, dims) for leaf in leaves.values()])
    total = absolute.sum(0)
    share = torch.where(total > 0, absolute / total, 0)
    first = (absolute == absolute.amax(0)) & (total > 0)
    first = first / first.sum(0).clamp(min=1)

    valid = valid_elements(td, mask)
    values = torch.cat([relevance, absolute, share, first.to(share.dtype)]).movedim(0, -1)
    values = values.cpu().double()
    time = time_position(td, time_dim)
    units = units_of(values, valid, time)
    bounds = interval(units, confidence=confidence, n_resamples=n_resamples, seed=seed)
    means = values[valid].mean(0)
    steps = None if time is None else mean_per_step(values, valid, time)
    return KeyShares(
        keys=names,
        target=target,
        relevance=dict(zip(names, relevance, strict=True)),
        absolute=dict(zip(names, absolute, strict=True)),
        share=dict(zip(names, share, strict=True)),
        summary=_summaries(names, means, *bounds),
        relevance_per_step=None if steps is None else _per_key(names, steps, 0),
        share_per_step=None if steps is None else _per_key(names, steps, 2),
        n_elements=int(valid.sum()),
        n_zero=int(((total == 0).cpu() & valid).sum()),
        confidence=confidence,
        resampling=resampling_words(units, confidence, n_resamples),
    )


def _check_options(confidence: float, n_resamples: int) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence!r} must lie between 0 and 1, such as 0.95.")
    if n_resamples < 1:
        raise InputError(f"n_resamples={n_resamples!r} must be at least 1.")


def _summed(leaf: Tensor, batch_dims: int) -> Tensor:
    """Signed relevance [*B]: the sum over features."""
    dims = tuple(range(batch_dims, leaf.ndim + 1))
    return leaf.unsqueeze(-1).sum(dims, dtype=_wide(leaf))


def _summed_abs(leaf: Tensor, batch_dims: int, key: NestedKey) -> Tensor:
    """Absolute relevance [*B], without a copy of the features."""
    dims = tuple(range(batch_dims, leaf.ndim + 1))
    total = torch.linalg.vector_norm(leaf.unsqueeze(-1), 1, dims, dtype=_wide(leaf))
    # The sums are few, the features may be pixels: look at those only when a sum is off.
    if not torch.isfinite(total).all():
        bad = int((~torch.isfinite(leaf)).sum())
        raise InputError(
            f"The attributions of {key!r} hold {bad} NaN or infinite values out of "
            f"{leaf.numel()}, or overflow when summed: they cannot be compared. Look at the inputs "
            f"and the model at those elements."
        )
    return total


def _wide(leaf: Tensor) -> torch.dtype:
    """Float32 at least: sums in half precision lose digits that ranks depend on."""
    return torch.promote_types(leaf.dtype, torch.float32)


def _summaries(
    names: tuple[NestedKey, ...], means: Tensor, low: Tensor, high: Tensor
) -> dict[NestedKey, KeySummary]:
    """One summary per key, from columns laid out as relevance, absolute, share, first."""
    table = torch.stack([means, low, high], dim=-1).reshape(4, len(names), 3).tolist()
    summaries = {}
    for name, column in zip(names, zip(*table, strict=True), strict=True):
        relevance, absolute, share, first = ((mean, (low, high)) for mean, low, high in column)
        summaries[name] = KeySummary(*relevance, *absolute, *share, *first)
    return summaries


def _per_key(names: tuple[NestedKey, ...], steps: Tensor, part: int) -> dict[NestedKey, Tensor]:
    """One part of the columns of :func:`_summaries` per time step [T], for each key."""
    columns = steps.T.reshape(4, len(names), -1)[part]
    return dict(zip(names, columns, strict=True))


def _known(key: tuple) -> NestedKey | None:
    """The shortest form of a tuple if it is a key, else None."""
    try:
        return shortest(key)
    except KeyNotFoundError:
        return None


def _range(bounds: Interval, form: str, factor: float = 1.0) -> str:
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high)):
        return "–"
    return f"[{factor * low:{form}}, {factor * high:{form}}]"
