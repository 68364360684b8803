"""The table of function rules: from a function's name to its rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.functions.attention import Attention, Softmax
from tdhook_like.attribution.lrp.functions.elementwise import Clamped, Homogeneous, Passed, Power
from tdhook_like.attribution.lrp.functions.norms import BatchNormalised, Normalised
from tdhook_like.attribution.lrp.functions.operations import (
    Added,
    Carried,
    Composed,
    Followed,
    FunctionRule,
)
from tdhook_like.attribution.lrp.functions.products import Product, Quotient, Sum
from tdhook_like.attribution.lrp.names import (
    CARRYING,
    CONVOLUTIONS,
    ENTRYWISE,
    FOLLOWED,
    GATES,
    PASSED,
    PRODUCTS,
    SUMS,
    TANGENTS,
)
from tdhook_like.attribution.lrp.rules.normalised import (
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)

__all__ = ["table"]


def table(fixed: bool, signal: bool) -> dict[str, FunctionRule]:
    """From names to rules.

    Args:
        fixed: Whether softmax and attention weights are constant.
        signal: Whether a gate is constant beside a signal.

    >>> table(False, False)["softmax"], table(True, False)["softmax"]
    (Softmax(fixed=False), Softmax(fixed=True))
    """
    gate = "gate" if signal else None  # else nobody asks
    kinds: list[tuple[Any, FunctionRule]] = [
        (FOLLOWED, Followed()),
        (CARRYING, Carried()),
        (ENTRYWISE, Carried(entrywise=True)),
        (SUMS, Added()),
        (FOLLOWED & GATES, Followed(gate)),
        (PASSED, Passed()),
        (PASSED & GATES, Passed(gate)),
        (("rsqrt", "reciprocal"), Passed("scale")),
        (("pow", "float_power"), Power()),
        (("clamp", "clamp_min", "clamp_max"), Clamped()),
        (PRODUCTS, Product(signal)),
        (("mul",), Product(signal, entrywise=True)),
        (("div",), Quotient()),
        (("rdiv",), Quotient(reverse=True)),
        (("softmax", "softmin", "masked_softmax"), Softmax(fixed)),
        (TANGENTS, Softmax()),
        (("scaled_dot_product_attention",), Attention(fixed)),
        (("layer_norm",), Normalised(layer_norm)),
        (("rms_norm",), Normalised(rms_norm)),
        (("group_norm",), Normalised(group_norm)),
        (("instance_norm",), Normalised(instance_norm)),
        (("batch_norm",), BatchNormalised()),
        *(((name,), Homogeneous(degree)) for name, degree in _DEGREES.items()),
        *(((name,), Composed(made_of)) for name, made_of in _MADE_OF.items()),
        *(((name,), Sum(factors)) for name, factors in _FACTORS.items()),
        *(((name,), Followed(unless=asked)) for name, asked in _LINEAR_UNLESS.items()),
    ]
    return {name: rule for names, rule in kinds for name in names}


# --- functions that need a word each ---------------------------------------------------------------


def _entries(x: Tensor, dim: Any = None, *rest: Any, **options: Any) -> int:
    """How many entries a reduction takes together."""
    return x.numel() if dim is None or not x.ndim else x.shape[dim]


def _places(x: Tensor, dim: Any, **options: Any) -> Tensor:
    """How many entries each partial product has."""
    if not x.ndim:
        return x.new_ones(())
    shape = [-1 if i == dim % x.ndim else 1 for i in range(x.ndim)]
    return x.new_ones(x.shape[dim]).cumsum(0).reshape(shape)


_DEGREES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("var", "var_mean", "cov"), lambda *args, **kwargs: 2),
    "prod": _entries,
    "cumprod": _places,
    "det": lambda x: x.shape[-1],
    "matrix_power": lambda x, n: n or None,
    **dict.fromkeys(("inverse", "pinverse", "pinv"), lambda *args, **kwargs: -1),
}


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    signal, gate = input.chunk(2, dim)
    return signal * gate.sigmoid()


def _lerp(input: Tensor, end: Tensor, weight: Any) -> Tensor:
    return input * (1 - weight) + end * weight


def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + tensor1 * tensor2 * value


def _addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + tensor1 / tensor2 * value


def _xlogy(input: Any, other: Any) -> Tensor:
    return input * (other.log() if isinstance(other, Tensor) else input.new_tensor(other).log())


def _cosine(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    one, other = (x / x.norm(dim=dim, keepdim=True).clamp_min(eps) for x in (x1, x2))
    return (one * other).sum(dim)


_MADE_OF: dict[str, Callable[..., Tensor]] = {
    "glu": _glu,
    "lerp": _lerp,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "xlogy": _xlogy,
    "cosine_similarity": _cosine,
}

# bias + a @ b; and layers whose weights depend on the inputs.
_FACTORS: dict[str, dict[str, int]] = {
    **{name: {"mat1": 1, "mat2": 2} for name in ("addmm", "sspaddmm", "saddmm")},
    **{name: {"batch1": 1, "batch2": 2} for name in ("addbmm", "baddbmm")},
    "addmv": {"mat": 1, "vec": 2},
    "addr": {"vec1": 1, "vec2": 2},
    **{name: {"input": 0, "weight": 1} for name in (*CONVOLUTIONS, "linear")},
    "bilinear": {"input1": 0, "input2": 1, "weight": 2},
}


def _others(flow: Flow, *args: Any, **kwargs: Any) -> bool:
    """Whether something beside the first argument depends on the inputs."""
    first = args[0] if args else kwargs.get("input")
    return any(value is not first for value in flow.operands(args, kwargs))


def _by_product(flow: Flow, *args: Any, **kwargs: Any) -> bool:
    """Whether entries that meet are multiplied, going by the name of the reduction."""
    words = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
    return any(word in ("prod", "multiply") for word in words)


_LINEAR_UNLESS: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(("grid_sample", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), _others),
    **dict.fromkeys(("trapezoid", "cumulative_trapezoid", "stft", "istft", "prelu"), _others),
    **dict.fromkeys(("scatter", "scatter_reduce", "index_reduce"), _by_product),
}
