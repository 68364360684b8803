"""One scale for positive and negative relevance, that says where it clips."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdhook_like.errors import InputError
from tdhook_like.viz.figure import finite_array

__all__ = ["SymmetricScale", "symmetric_scale"]


@dataclass(frozen=True)
class SymmetricScale:
    """A scale from ``-limit`` to ``+limit``, the same for both signs.

    Attributes:
        limit: where the scale ends, above zero.
        largest: the largest absolute value that it was made for.
        beyond: which part of the values lies outside and is drawn at the end of the scale.
        origin: where the limit comes from, in words.
    """

    limit: float
    largest: float
    beyond: float
    origin: str

    @property
    def clips(self) -> bool:
        """Whether any value lies outside."""
        return self.beyond > 0

    def note(self, subject: str = "colour") -> str:
        """What a picture prints about its scale.

        >>> symmetric_scale([0.5, -2.0], clip=1.0).note()
        'colour clips at ±1 (given; 50 % of values lie beyond, largest |R| 2)'
        >>> symmetric_scale([0.5, -2.0], percentile=100).note()
        'colour scale ±2 (largest |R|), nothing is clipped'
        """
        if self.largest == 0:
            return f"{subject} scale ±{self.limit:.3g}: every value is 0"
        if not self.clips:
            return f"{subject} scale ±{self.limit:.3g} ({self.origin}), nothing is clipped"
        return (
            f"{subject} clips at ±{self.limit:.3g} ({self.origin}; {100 * self.beyond:.2g} % of "
            f"values lie beyond, largest |R| {self.largest:.3g})"
        )


def symmetric_scale(
    values: Any, *, clip: float | None = None, percentile: float = 99.0
) -> SymmetricScale:
    """The scale for ``values``, of any shape.

    Args:
        values: tensor, array or numbers.
        clip: where the scale shall end; overrides ``percentile``.
        percentile: end it at this percentile of the absolute values, so that one outlier does
            not bleach the rest. 100 clips nothing. Where that percentile is 0, as for sparse
            relevance, the largest absolute value is taken.

    Raises:
        InputError: NaN or infinite values, or a limit that is not positive.
    """
    magnitude = np.abs(finite_array(values, "values"))
    if clip is not None and not (math.isfinite(clip) and clip > 0):
        raise InputError(f"clip={clip!r} must be a positive number: the scale is ±clip.")
    if not 0 < percentile <= 100:
        raise InputError(f"percentile={percentile!r} must lie above 0 and at most at 100.")
    largest = float(magnitude.max()) if magnitude.size else 0.0
    limit, origin = largest, "largest |R|"
    if clip is not None:
        limit, origin = float(clip), "given"
    elif largest > 0:
        at = float(np.percentile(magnitude, percentile))
        if 0 < at < largest:
            limit, origin = at, f"{_ordinal(percentile)} percentile of |R|"
    limit = limit if limit > 0 else 1.0
    beyond = float((magnitude > limit).mean()) if magnitude.size else 0.0
    return SymmetricScale(limit=limit, largest=largest, beyond=beyond, origin=origin)


def _ordinal(number: float) -> str:
    """A number with its ending.

    >>> _ordinal(99), _ordinal(99.5), _ordinal(92), _ordinal(12)
    ('99th', '99.5th', '92nd', '12th')
    """
    text = f"{number:g}"
    teen = len(text) == 2 and text[0] == "1"
    endings = {"1": "st", "2": "nd", "3": "rd"}
    return text + ("th" if teen or "." in text else endings.get(text[-1], "th"))
