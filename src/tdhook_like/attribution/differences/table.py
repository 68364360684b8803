"""Which torch function gets which difference rule, by its name in every spelling."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdhook_like.attribution.differences.composed import COMPOSED, attention
from tdhook_like.attribution.differences.maxima import Extremum, Larger, MaxPool
from tdhook_like.attribution.differences.recurrent import RECURRENT
from tdhook_like.attribution.differences.rules import (
    Choice,
    Elementwise,
    Filled,
    Layer,
    Opened,
    Product,
    Quotient,
    Rectifier,
    Unhandled,
)
from tdhook_like.attribution.differences.tape import DifferenceRule, Overwriting, named_in_place
from tdhook_like.attribution.lrp.names import (
    CARRYING,
    CONVOLUTIONS,
    ENTRYWISE,
    FOLLOWED,
    PASSED,
    PRODUCTS,
    TRANSPARENT,
    spoken,
)
from tdhook_like.hooks.functional import written_in_python

__all__ = ["RULES", "rule_of"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Followed by their gradient elsewhere, being homogeneous or picking entries, but not linear.
NOT_LINEAR = _words(
    """
    sort topk aminmax median nanmedian mode kthvalue quantile nanquantile msort cummax cummin
    copysign hypot native_norm matrix_norm std_mean dist cdist pdist pairwise_distance
    frobenius_norm nuclear_norm svdvals eigvalsh fractional_max_pool2d fractional_max_pool3d
    fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices
    lp_pool1d lp_pool2d lp_pool3d scatter_reduce index_reduce
    """
)

#: Bending at zero alone, or the more the nearer to it: differences are relative.
SHARP = _words(
    """
    leaky_relu rrelu prelu abs hardtanh hardsigmoid hardswish relu6 threshold clamp clamp_min
    clamp_max softshrink hardshrink sqrt log log2 log10 reciprocal rsqrt pow float_power sign
    floor ceil round trunc frac square
    """
)


def _sigmoid(x: Tensor, y: Tensor) -> Tensor:
    return y * (1 - y)


def _tanh(x: Tensor, y: Tensor) -> Tensor:
    return 1 - y * y


def _exp(x: Tensor, y: Tensor) -> Tensor:
    return y


def _table() -> dict[str, DifferenceRule]:
    table: dict[str, DifferenceRule] = dict.fromkeys(PASSED - {"renorm", "mvlgamma"}, Elementwise())
    table.update(dict.fromkeys(SHARP, Elementwise(0.0)))
    table["relu"] = Rectifier(0.0)
    table["sigmoid"], table["tanh"] = Elementwise(1.0, _sigmoid), Elementwise(1.0, _tanh)
    table["exp"] = Elementwise(1.0, _exp)
    table.update(dict.fromkeys(PRODUCTS | AFFINE, Product()))
    table.update(dict.fromkeys(CONVOLUTIONS | {"linear"}, Layer()))
    table.update({"div": Quotient(), "rdiv": Quotient(reverse=True)})
    table.update({"where": Choice(), "masked_fill": Filled()})
    for n in (1, 2, 3):
        for end in ("", "_with_indices"):
            table[f"max_pool{n}d{end}"] = MaxPool(n)
            table[f"adaptive_max_pool{n}d{end}"] = MaxPool(n, adaptive=True)
    table.update({"max": Extremum(), "amax": Extremum()})
    table.update({"min": Extremum(largest=False), "amin": Extremum(largest=False)})
    table.update(dict.fromkeys(("maximum", "fmax"), Larger()))
    table.update(dict.fromkeys(("minimum", "fmin"), Larger(largest=False)))
    table.update(COMPOSED)
    table.update(RECURRENT)
    table["scaled_dot_product_attention"] = Opened(attention)
    table["norm"] = table["normalize"] = Opened()
    return table


AFFINE = _words("mul bilinear addmm addmv addbmm baddbmm addr addcmul lerp")
#: By name; a function that has none here and is not linear is opened, or counted as unhandled.
RULES = _table()
LINEAR = (
    TRANSPARENT | FOLLOWED | CARRYING | ENTRYWISE | _words("add sub rsub batch_norm")
) - NOT_LINEAR

_OVERWRITING, _OPENED, _UNHANDLED = Overwriting(), Opened(), Unhandled()
_FOUND: dict[Any, tuple[str, DifferenceRule | None]] = {}


def rule_of(function: Any) -> tuple[str, DifferenceRule | None]:
    """A function's name and its rule; None where it is linear, or nothing flows through it.

    >>> import torch
    >>> rule_of(torch.tanh)[1], rule_of(torch.Tensor.sum)
    (Elementwise(), ('sum', None))
    """
    found = _FOUND.get(function)
    if found is None:
        name = spoken(function)
        rule = RULES.get(name)
        if rule is None and name in LINEAR:
            rule = _OVERWRITING if named_in_place(function) else None
        elif rule is None:
            rule = _OPENED if written_in_python(function) else _UNHANDLED
        found = _FOUND[function] = (name, rule)
    return found
