"""Calls of torch's functions in their spellings, by the rule that they come under."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 0.125


@dataclass(frozen=True)
class Call:
    """One way to call a function.

    Attributes:
        name: For test ids.
        function: Of the explained operands.
        operands: From a seed's generator to them, in float64, batch first.
        low: Whether it is also called in bfloat16.
    """

    name: str
    function: Callable[..., Tensor]
    operands: Callable[[], list[Tensor]]
    low: bool = True


def numbers(*shape: int, low: float = -2.0, high: float = 2.0, seed: int = 0) -> Tensor:
    """Numbers that bfloat16 holds, none of them near zero."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    x = torch.where(x.abs() < 0.1, x + 0.25, x)
    return x.to(torch.bfloat16).double()


def operands(*shapes: tuple[int, ...], **options: Any) -> Callable[[], list[Tensor]]:
    return lambda: [numbers(*shape, seed=i, **options) for i, shape in enumerate(shapes)]


# --- calls ---------------------------------------------------------------------------------------

ANY, SMALL = operands((2, 6)), operands((2, 6), low=-0.9, high=0.9)
POSITIVE, ABOVE_ONE = operands((2, 6), low=0.2, high=2.0), operands((2, 6), low=1.2, high=3.0)


def _in_place(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(x * 1, name)()


def _on_a_view(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 2:].tanh_()
    y[:, :2] = y[:, :2].tanh()
    return y


ACTIVATIONS = tuple(
    Call(name, function, given)
    for name, function, given in (
        ("F.gelu", F.gelu, ANY),
        ("F.gelu, tanh", partial(F.gelu, approximate="tanh"), ANY),
        ("F.silu", F.silu, ANY),
        ("F.silu in place", lambda x: F.silu(x * 1, inplace=True), ANY),
        ("F.silu in place by position", lambda x: F.silu(x * 1, True), ANY),
        ("F.silu in place by keyword", lambda x: F.silu(input=x * 1, inplace=True), ANY),
        ("F.gelu by keyword", lambda x: F.gelu(input=x), ANY),
        ("F.mish", F.mish, ANY),
        ("torch.tanh", torch.tanh, ANY),
        ("Tensor.tanh", Tensor.tanh, ANY),
        ("F.tanh", F.tanh, ANY),
        ("Tensor.tanh_", _in_place("tanh_"), ANY),
        ("torch.tanh_", lambda x: torch.tanh_(x * 1), ANY),
        ("aten.tanh", lambda x: torch.ops.aten.tanh(x), ANY),
        ("tanh_ on a view", _on_a_view, ANY),
        ("torch.sigmoid", torch.sigmoid, ANY),
        ("Tensor.sigmoid_", _in_place("sigmoid_"), ANY),
        ("F.sigmoid", F.sigmoid, ANY),
        ("special.expit", torch.special.expit, ANY),
        ("F.elu", F.elu, ANY),
        ("F.celu", partial(F.celu, alpha=0.5), ANY),
        ("F.selu", F.selu, ANY),
        ("F.softplus", F.softplus, ANY),
        ("F.softsign", F.softsign, ANY),
        ("F.logsigmoid", F.logsigmoid, ANY),
        ("F.tanhshrink", F.tanhshrink, ANY),
        ("F.hardtanh", F.hardtanh, ANY),
        ("F.hardsigmoid", F.hardsigmoid, SMALL),
        ("F.hardswish", F.hardswish, ANY),
        ("F.relu6", F.relu6, POSITIVE),
        ("F.threshold", lambda x: F.threshold(x, 0.5, 0.25), ANY),
        ("torch.exp", torch.exp, ANY),
        ("Tensor.exp_", _in_place("exp_"), ANY),
        ("torch.expm1", torch.expm1, ANY),
        ("torch.exp2", torch.exp2, ANY),
        ("torch.log", torch.log, POSITIVE),
        ("torch.log1p", torch.log1p, POSITIVE),
        ("special.log1p", torch.special.log1p, POSITIVE),
        ("torch.sqrt", torch.sqrt, POSITIVE),
        ("torch.square", torch.square, ANY),
        ("torch.sin", torch.sin, ANY),
        ("torch.cos", torch.cos, ANY),
        ("torch.atan", torch.atan, ANY),
        ("torch.asin", torch.arcsin, SMALL),
        ("torch.acosh", torch.arccosh, ABOVE_ONE),
        ("torch.erf", torch.erf, ANY),
        ("special.erf", torch.special.erf, ANY),
        ("torch.lgamma", torch.lgamma, ABOVE_ONE),
        ("special.ndtr", torch.special.ndtr, ANY),
        ("torch.rsqrt", torch.rsqrt, POSITIVE),
        ("torch.reciprocal", torch.reciprocal, ANY),
        ("1 / x", lambda x: 1 / x, ANY),
        ("torch.div(2, x)", lambda x: torch.div(torch.full_like(x, 2.0), x), ANY),
        ("x ** 2", lambda x: x**2, ANY),
        ("x ** 0.5", lambda x: x**0.5, POSITIVE),
        ("x ** -0.5", lambda x: x**-0.5, POSITIVE),
        ("torch.pow", partial(torch.pow, exponent=3), ANY),
        ("2 ** x", lambda x: 2**x, ANY),
        ("torch.pow(2, x)", lambda x: torch.pow(2.0, x), ANY),
        ("clamp", lambda x: x.clamp(-0.5, 0.5), ANY),
        ("torch.clip", lambda x: torch.clip(x, max=0.5), ANY),
        ("clamp_", lambda x: (x * 1).clamp_(-0.5, 0.5), ANY),
        ("renorm", lambda x: torch.renorm(x, 2.0, 0, 0.5), ANY),
        ("x * sigmoid(x)", lambda x: x * torch.sigmoid(x), ANY),
        ("x / (1 + exp(-x))", lambda x: x / (1 + torch.exp(-x)), ANY),
        ("GELU by hand", lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))), ANY),
        ("exact GELU by hand", lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)), ANY),
        (
            "fast GELU by hand",
            lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.8 * (1.0 + 0.045 * x * x))),
            ANY,
        ),
        ("mish by hand", lambda x: x * torch.tanh(F.softplus(x)), ANY),
        ("x * x", lambda x: x * x, ANY),
    )
)

LINEAR = tuple(
    Call(name, function, operands(*shapes))
    for name, function, *shapes in (
        ("x + y", lambda x, y: x + y, (2, 6), (2, 6)),
        ("x + y, broadcast", lambda x, y: x + y, (2, 3, 4), (2, 1, 4)),
        ("torch.add alpha", lambda x, y: torch.add(x, y, alpha=-2), (2, 6), (2, 6)),
        ("x - y", lambda x, y: x - y, (2, 6), (2, 6)),
        ("rsub", lambda x: -torch.rsub(-x, x, alpha=3), (2, 6)),
        ("iadd", lambda x, y: (x * 1).add_(y), (2, 6), (2, 6)),
        ("-x", lambda x: -x, (2, 6)),
        ("x * 3", lambda x: x * 3, (2, 6)),
        ("x / 3", lambda x: x / 3, (2, 6)),
        ("mean", lambda x: x.mean(-1), (2, 6)),
        ("sum", lambda x: torch.sum(x, dim=(1, 2)), (2, 3, 4)),
        ("cumsum", lambda x: x.cumsum(-1), (2, 6)),
        ("cat", lambda x, y: torch.cat([x, y], -1), (2, 6), (2, 3)),
        ("stack", lambda x, y: torch.stack([x, y], 1), (2, 6), (2, 6)),
        ("split", lambda x: sum(torch.split(x, 2, -1)), (2, 6)),
        ("chunk", lambda x: x.chunk(2, -1)[1], (2, 6)),
        ("unbind", lambda x: x.unbind(1)[2], (2, 6)),
        ("getitem", lambda x: x[:, 1::2], (2, 6)),
        ("setitem", lambda x, y: _put(x * 1, y), (2, 6), (2, 2)),
        ("index_select", lambda x: x.index_select(1, torch.tensor([0, 0, 3])), (2, 6)),
        ("gather", lambda x: x.gather(1, torch.tensor([[0, 5], [1, 1]])), (2, 6)),
        ("scatter", lambda x, y: x.scatter(1, torch.tensor([[0, 5], [1, 2]]), y), (2, 6), (2, 2)),
        ("scatter_add", lambda x, y: _scatter(x, y), (2, 6), (2, 2)),
        ("where", lambda x, y: torch.where(x > 0, x, y), (2, 6), (2, 6)),
        ("masked_fill", lambda x: x.masked_fill(x > 1, 0.0), (2, 6)),
        ("view, transpose, permute", lambda x: x.view(2, 2, 3).mT.permute(0, 2, 1), (2, 6)),
        ("roll, flip", lambda x: x.roll(1, 1).flip(1), (2, 6)),
        ("pad", lambda x: F.pad(x, (1, 2)), (2, 6)),
        ("pad, reflected", lambda x: F.pad(x, (1, 2), mode="reflect"), (2, 3, 6)),
        ("repeat_interleave", lambda x: x.repeat_interleave(2, 1), (2, 6)),
        ("RoPE", lambda x: _rotated(x), (2, 3, 4)),
        ("complex RoPE", lambda x: _turned(x), (2, 3, 4)),
        ("F.linear", lambda x: F.linear(x, WEIGHT.to(x)), (2, 6)),
        ("x @ W", lambda x: x @ WEIGHT.to(x).T, (2, 6)),
        ("conv1d", lambda x: F.conv1d(x, WEIGHT.to(x)[:, :, None]), (2, 6, 4)),
        ("avg_pool2d", lambda x: F.avg_pool2d(x, 2), (2, 1, 4, 4)),
        ("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 3), (2, 1, 7)),
        ("interpolate", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (2, 1, 3, 3)),
        ("interpolate, nearest", lambda x: F.interpolate(x, scale_factor=2), (2, 1, 3)),
        ("grid_sample", lambda x: F.grid_sample(x, GRID.to(x), align_corners=False), (2, 1, 4, 4)),
        ("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), (2, 4, 2, 2)),
        ("unfold", lambda x: F.unfold(x, 2), (2, 1, 3, 3)),
        ("embedding", lambda x: F.embedding(torch.tensor([[1], [0]]), x), (2, 6)),
        ("rfft and back", lambda x: torch.fft.irfft(torch.fft.rfft(x)), (2, 6)),
        ("max_pool1d", lambda x: F.max_pool1d(x, 2), (2, 1, 6)),
        ("max_pool2d", lambda x: F.max_pool2d(x, 2), (2, 1, 4, 4)),
        (
            "max_pool2d with places",
            lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
            (2, 1, 4, 4),
        ),
        ("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 2), (2, 1, 4, 4)),
        ("max over a dim", lambda x: x.max(-1).values, (2, 6)),
        ("amin", lambda x: x.amin(-1), (2, 6)),
        ("maximum", torch.maximum, (2, 6), (2, 6)),
        ("min of two", torch.min, (2, 6), (2, 6)),
        ("clamp by tensors", lambda x, y: torch.clamp(x, min=y), (2, 6), (2, 6)),
        ("sort", lambda x: x.sort(-1).values, (2, 6)),
        ("topk", lambda x: x.topk(2).values, (2, 6)),
        ("median", lambda x: x.median(-1).values, (2, 6)),
        ("nan_to_num", torch.nan_to_num, (2, 6)),
        ("F.relu", F.relu, (2, 6)),
        ("relu_", lambda x: (x * 1).relu_(), (2, 6)),
        ("F.leaky_relu", F.leaky_relu, (2, 6)),
        ("F.prelu", lambda x: F.prelu(x, torch.full((1,), 0.25).to(x)), (2, 6)),
        ("abs", torch.abs, (2, 6)),
        ("norm", lambda x: x.norm(dim=-1), (2, 6)),
        ("linalg.vector_norm", lambda x: torch.linalg.vector_norm(x, dim=-1), (2, 6)),
        ("std", lambda x: x.std(-1), (2, 6)),
        ("cdist", lambda x, y: torch.cdist(x, y), (2, 3, 4), (2, 2, 4)),
        ("lp_pool1d", lambda x: F.lp_pool1d(x, 2.0, 2), (2, 1, 6)),
        ("dropout", lambda x: F.dropout(x, 0.5, training=False), (2, 6)),
        ("to and back", lambda x: x.to(torch.float32).to(x.dtype), (2, 6)),
    )
)


def _put(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:3] = y
    return x


def _scatter(x: Tensor, y: Tensor) -> Tensor:
    return x.scatter_add(1, torch.tensor([[0, 5], [1, 2]]), y)


def _rotated(x: Tensor) -> Tensor:
    angle = torch.arange(6.0).reshape(3, 2).repeat(1, 2).to(x)
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


def _turned(x: Tensor) -> Tensor:
    turn = torch.polar(torch.ones(3, 2, dtype=torch.float64), torch.arange(6.0).double().view(3, 2))
    z = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * turn).flatten(-2).to(x.dtype)


WEIGHT = numbers(4, 6, seed=7)
GRID = numbers(2, 3, 3, 2, low=-0.9, high=0.9, seed=8)
CONSTANT = numbers(6, seed=9)

PRODUCTS = (
    Call("x * y", lambda x, y: x * y, operands((2, 6), (2, 6))),
    Call("x * y, broadcast", lambda x, y: x * y, operands((2, 3, 4), (2, 3, 1))),
    Call("torch.multiply", torch.multiply, operands((2, 6), (2, 6))),
    Call("mul_", lambda x, y: (x * 1).mul_(y), operands((2, 6), (2, 6))),
    Call("x @ y", lambda x, y: x @ y, operands((2, 3, 4), (2, 4, 2))),
    Call("torch.bmm", torch.bmm, operands((2, 3, 4), (2, 4, 2))),
    Call("linalg.matmul", torch.linalg.matmul, operands((2, 3, 4), (2, 4, 2))),
    Call("einsum", lambda x, y: torch.einsum("bi,bj->bij", x, y), operands((2, 3), (2, 4))),
    Call(
        "einsum of three",
        lambda x, y, z: torch.einsum("bi,bj,bj->bi", x, y, z),
        operands((2, 3), (2, 4), (2, 4)),
    ),
    Call(
        "a list to einsum", lambda x, y: torch.einsum("bi,bi->b", [x, y]), operands((2, 3), (2, 3))
    ),
    Call("vecdot", torch.linalg.vecdot, operands((2, 3), (2, 3))),
    Call("baddbmm of a constant", lambda x, y: _plus(x, y), operands((2, 3, 4), (2, 4, 2))),
    Call("linear", lambda x, y: F.linear(x, y[0]), operands((2, 4), (2, 3, 4))),
    Call(
        "linear by name", lambda x, y: F.linear(input=x, weight=y[0]), operands((2, 4), (2, 3, 4))
    ),
    Call(
        "F.bilinear",
        lambda x, y: F.bilinear(x, y, numbers(3, 4, 2).to(x)),
        operands((2, 4), (2, 2)),
    ),
    Call(
        "addcmul", lambda x, y: torch.addcmul(torch.zeros_like(x), x, y), operands((2, 4), (2, 4))
    ),
    Call("xlogy", lambda x, y: x * y, operands((2, 4), (2, 4))),
)


def _plus(x: Tensor, y: Tensor) -> Tensor:
    return torch.baddbmm(torch.zeros(2, 3, 2).to(x), x, y)


QUOTIENTS = (
    Call("x / y", lambda x, y: x / y, operands((2, 6), (2, 6))),
    Call("x / y, broadcast", lambda x, y: x / y, operands((2, 3, 4), (2, 3, 1))),
    Call("torch.div by name", lambda x, y: torch.div(input=x, other=y), operands((2, 6), (2, 6))),
    Call("true_divide", torch.true_divide, operands((2, 6), (2, 6))),
    Call("div_", lambda x, y: (x * 1).div_(y), operands((2, 6), (2, 6))),
    Call("x * rsqrt(y)", lambda x, y: x * y.rsqrt(), operands((2, 6), (2, 6), low=0.3)),
    Call("rsqrt(y) * x", lambda x, y: y.rsqrt() * x, operands((2, 6), (2, 6), low=0.3)),
    Call("x * y ** -0.5", lambda x, y: x * y**-0.5, operands((2, 6), (2, 1), low=0.3)),
    Call("x * (1 / y)", lambda x, y: x * (1 / y), operands((2, 6), (2, 6))),
    Call(
        "x * scale, shaped",
        lambda x, y: x * y.rsqrt()[:, None].expand(2, 6),
        operands((2, 6), (2,), low=0.3),
    ),
    Call("mul_ of a scale", lambda x, y: (1 / y).mul_(x), operands((2, 6), (2, 6))),
    Call(
        "addcdiv", lambda x, y: torch.addcdiv(torch.zeros_like(x), x, y), operands((2, 6), (2, 6))
    ),
)

BY_HAND = (
    Call(
        "x * rsqrt(mean square)", lambda x: x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt(), ANY
    ),
    Call(
        "x / sqrt(mean square)", lambda x: x / (x * x).mean(-1, keepdim=True).add(EPS).sqrt(), ANY
    ),
    Call("F.rms_norm", lambda x: F.rms_norm(x, (6,), eps=EPS), ANY),
    Call("torch.rms_norm", lambda x: torch.rms_norm(x, (6,), eps=EPS), ANY),
)

CENTRED = (
    Call("F.layer_norm", lambda x: F.layer_norm(x, (6,), eps=EPS), ANY),
    Call("torch.layer_norm", lambda x: torch.layer_norm(x, (6,), eps=EPS), ANY),
    Call("by hand", lambda x: _standard(x), ANY),
    Call("by hand, std", lambda x: (x - x.mean(-1, keepdim=True)) / _std(x), ANY),
    Call("var_mean", lambda x: _by_var_mean(x), ANY),
)


def _standard(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + EPS)


def _std(x: Tensor) -> Tensor:
    return (x.var(-1, keepdim=True, unbiased=False) + EPS).sqrt()


def _by_var_mean(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - mean) / (var + EPS).sqrt()


GATED = operands((2, 4), (2, 4))


def gated(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: x * activation(y)


SIGNALS = (
    Call("x * sigmoid(y)", gated(torch.sigmoid), GATED),
    Call("silu(y) * x", lambda x, y: F.silu(y) * x, GATED),
    Call("x * gelu(y)", gated(F.gelu), GATED),
    Call("x * tanh(y) / 2", lambda x, y: x * (torch.tanh(y) / 2), GATED),
    Call("x * relu(y)", gated(F.relu), GATED),
    Call("x * (1 - sigmoid(y))", lambda x, y: x * (1 - torch.sigmoid(y)), GATED),
    Call("mul_", lambda x, y: torch.sigmoid(y).mul_(x), GATED),
    Call("glu", lambda x, y: F.glu(torch.cat([x, y], -1)), GATED),
    Call("addcmul", lambda x, y: torch.addcmul(torch.zeros_like(x), y.sigmoid(), x), GATED),
    Call("einsum", lambda x, y: torch.einsum("bi,bi->bi", x, y.sigmoid()), GATED),
    Call("lerp", lambda x, y: torch.lerp(torch.zeros_like(x), x, y.sigmoid()), GATED),
)

QKV = operands((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3))
SQUARE = operands((2, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4))
GROUPED = operands((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4))
sdpa = F.scaled_dot_product_attention


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return F.softmax(scores, dim=-1) @ v


def second_hidden(q: Tensor, k: Tensor) -> Tensor:
    """An additive mask of the second key, ``[queries, keys]``."""
    return q.new_zeros(q.shape[-2], k.shape[-2]).index_fill(-1, torch.tensor([1]), -torch.inf)
