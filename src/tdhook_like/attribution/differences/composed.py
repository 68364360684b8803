"""Difference rules of functions that are made of elementwise ones, products and sums.

Each is written out in pairs, so it keeps the difference exactly, as its parts do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tdhook_like.attribution.differences.pairs import Pair, rescaled
from tdhook_like.attribution.differences.rules import Given, Product, argument, unhandled
from tdhook_like.attribution.differences.tape import DifferenceRule, Tape
from tdhook_like.hooks.surrogate import attach, constant

__all__ = ["Composed", "attention"]

Parts = Callable[..., Pair | None]


class Composed(DifferenceRule):
    """A function of one tensor, written out in pairs.

    Args:
        parts: From the pair and the function's other arguments to the pair of its result; None where
            it does not know these arguments.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def surrogate(
        self, tape: Tape, func: Any, output: Any, before: Any, there: Given, args: Any, kwargs: Any
    ) -> Tensor | None:
        x, x0 = argument(args, kwargs, 0, "input", None), argument(*there, 0, "input", None)
        named = {k: v for k, v in kwargs.items() if k != "input"}
        alone = all(v is x for v in tape.flow.operands(args, kwargs))
        found = self.parts(Pair(x, x0), *args[1:], **named) if alone else None
        if found is None:
            unhandled(tape, func)
            return None
        return found.x


def exponentials(z: Pair, dim: Any) -> Pair:
    """``exp(z − c)`` with one constant c for both runs, the largest of both."""
    top = torch.maximum(constant(z.x), z.x0).amax(dim, keepdim=True)
    top = top.masked_fill(top.isinf(), 0.0)
    return Pair(z.x - top, z.x0 - top).map(torch.exp)


def softmax(
    z: Pair, dim: int | None = None, *rest: Any, dtype: Any = None, **more: Any
) -> Pair | None:
    """``exp(z − logsumexp(z))``.

    As a quotient ``e · (1 / Σ e)``, what is shared would depend on the constant that z is shifted by,
    and its two parts would cancel once the sums of both runs are orders of magnitude apart.
    """
    log = log_softmax(z, dim, *rest, dtype=dtype)
    return None if log is None else log.map(torch.exp)


def softmin(
    z: Pair, dim: int | None = None, *rest: Any, dtype: Any = None, **more: Any
) -> Pair | None:
    """``softmax(−z)``."""
    return softmax(z.linear(torch.neg), dim, *rest, dtype=dtype)


def logsumexp(z: Pair, dim: Any = None, keepdim: bool = False) -> Pair | None:
    """``c + log Σ exp(z − c)``; of a sum that vanishes beside the other run's, too."""
    if dim is None:
        return None
    e = exponentials(z, dim)
    total = e.linear(lambda t: t.sum(dim, keepdim=True))
    here, there = (torch.logsumexp(t, dim, keepdim=True) for t in (constant(z.x), z.x0))
    shared = rescaled(total.x, total.x0, here - there, torch.log, 0.0)
    shape = z.x.sum(dim, keepdim=keepdim).shape
    return Pair(attach(here, shared, fresh=True), there).linear(lambda t: t.reshape(shape))


def log_softmax(
    z: Pair, dim: int | None = None, *rest: Any, dtype: Any = None, **more: Any
) -> Pair | None:
    """``z − logsumexp(z)``."""
    if dim is None or any(isinstance(v, torch.dtype) for v in rest) or dtype is not None:
        return None
    log = logsumexp(z, dim, True)
    assert log is not None
    return Pair(z.x - log.x, z.x0 - log.x0)


def standardised(d: Pair, dims: tuple[int, ...], eps: float) -> Pair:
    """``d · (mean d² + ε)^(−½)``: the square and the power rescaled, the product shared."""
    power = d.map(torch.square, scale=0.0).linear(lambda t: t.mean(dims, keepdim=True) + eps)
    return d * power.map(torch.rsqrt, scale=0.0)


def centred(x: Pair, dims: tuple[int, ...]) -> Pair:
    """``x − mean x``."""
    return x.linear(lambda t: t - t.mean(dims, keepdim=True))


def affine(x: Pair, weight: Tensor | None, bias: Tensor | None) -> Pair:
    """``x · w + b``."""
    y = x if weight is None else x.linear(lambda t: t * weight)
    return y if bias is None else y.linear(lambda t: t + bias)


def layer_norm(
    x: Pair,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
) -> Pair:
    """Layer normalisation over the last dimensions."""
    dims = tuple(range(-len(normalized_shape), 0))
    return affine(standardised(centred(x, dims), dims, eps), weight, bias)


def rms_norm(
    x: Pair,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Pair:
    """Root-mean-square normalisation over the last dimensions."""
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.x.dtype).eps if eps is None else eps
    return affine(standardised(x, dims, eps), weight, None)


def group_norm(
    x: Pair,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
) -> Pair:
    """Normalisation over groups of channels and all positions."""
    shape = x.x.shape
    flat = x.linear(lambda t: t.reshape(shape[0], num_groups, -1))
    normal = standardised(centred(flat, (-1,)), (-1,), eps).linear(lambda t: t.reshape(shape))
    over = [1] * (len(shape) - 2)
    weight, bias = (None if v is None else v.reshape(-1, *over) for v in (weight, bias))
    return affine(normal, weight, bias)


def instance_norm(
    x: Pair,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *rest: Any,
) -> Pair | None:
    """Normalisation of each channel over its positions; with fixed statistics it is affine."""
    dims = tuple(range(2, x.x.ndim))
    over = [1] * len(dims)
    weight, bias = (None if v is None else v.reshape(-1, *over) for v in (weight, bias))
    if use_input_stats:
        return affine(standardised(centred(x, dims), dims, eps), weight, bias)
    if running_mean is None or running_var is None:
        return None
    mean, scale = (v.reshape(-1, *over) for v in (running_mean, (running_var + eps).rsqrt()))
    return affine(x.linear(lambda t: (t - mean) * scale), weight, bias)


def vector_norm(
    x: Pair, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Pair | None:
    """``√Σ x²``, or ``Σ |x|``."""
    if ord not in (1, 2) or dtype is not None:
        return None
    dims = tuple(range(x.x.ndim)) if dim is None else dim
    if ord == 1:
        return x.map(torch.abs, scale=0.0).linear(lambda t: t.sum(dims, keepdim=keepdim))
    power = x.map(torch.square, scale=0.0).linear(lambda t: t.sum(dims, keepdim=keepdim))
    least = torch.finfo(x.x.dtype).tiny  # √ has no slope at 0
    return power.map(lambda t: t.clamp(min=least).sqrt(), scale=0.0)


def std(x: Pair, *args: Any, **kwargs: Any) -> Pair:
    """The square root of the variance, whose mean gradient is that half way."""
    here = constant(x.x)
    halfway = x.x + (x.x0 - here) * 0.5
    y, y0 = torch.var(here, *args, **kwargs), torch.var(x.x0, *args, **kwargs)
    surrogate = torch.var(halfway, *args, **kwargs)
    least = torch.finfo(y.dtype).tiny
    return Pair(attach(y, surrogate), y0).map(lambda t: t.clamp(min=least).sqrt(), scale=0.0)


def glu(x: Pair, dim: int = -1) -> Pair:
    """``a · σ(b)``, the halves of the input."""
    a, b = (x.linear(lambda t, i=i: t.chunk(2, dim)[i]) for i in (0, 1))
    return a * b.map(torch.sigmoid)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention out of functions that have rules.

    >>> q, k, v = torch.randn(3, 2, 4, 5).unbind(0)
    >>> plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.allclose(attention(q, k, v, is_causal=True), plain, atol=1e-6)
    True
    """
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(times, -3) for t in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * factor
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
    return torch.softmax(scores, -1) @ value


#: By the functions' names.
COMPOSED: dict[str, DifferenceRule] = {
    "softmax": Composed(softmax),
    "softmin": Composed(softmin),
    "log_softmax": Composed(log_softmax),
    "logsumexp": Composed(logsumexp),
    "layer_norm": Composed(layer_norm),
    "rms_norm": Composed(rms_norm),
    "group_norm": Composed(group_norm),
    "instance_norm": Composed(instance_norm),
    "vector_norm": Composed(vector_norm),
    "std": Composed(std),
    "var": Product(degree=2),
    "glu": Composed(glu),
}
