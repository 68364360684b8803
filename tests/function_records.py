"""One record per function rule: calls of it, a slow reference from the paper, what it conserves.

Generic tests run over `RECORDS`, so a new rule is tested by adding a record here. References take
what flows out in float64 and share it among the operands by Jacobians of the plain function, or
by closed forms; they know nothing of surrogates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.functional import jacobian

from tdhook_like.attribution.lrp import FunctionRules

EVERYTHING, NOT_ALL = "everything", "what constants do not absorb"
Relevances = list[Tensor]
Reference = Callable[[Callable[..., Tensor], list[Tensor], Tensor], Relevances]
"""From the function, its operands and the relevance of its output to that of the operands."""


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


@dataclass(frozen=True)
class Record:
    """What there is to know about a function rule.

    Attributes:
        name: For test ids.
        calls: In several spellings, with several shapes.
        reference: The operands' relevance, derived slowly and otherwise.
        conserves: `EVERYTHING` or `NOT_ALL`.
        functions: The rules that it belongs to.
        wrong: Calls that torch refuses, and goes on refusing under the rule.
    """

    name: str
    calls: tuple[Call, ...]
    reference: Reference
    conserves: str = EVERYTHING
    functions: FunctionRules = field(default_factory=FunctionRules)
    wrong: tuple[Call, ...] = ()


def numbers(*shape: int, low: float = -2.0, high: float = 2.0, seed: int = 0) -> Tensor:
    """Numbers that bfloat16 holds, none of them near zero."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    x = torch.where(x.abs() < 0.1, x + 0.25, x)
    return x.to(torch.bfloat16).double()


def operands(*shapes: tuple[int, ...], **options: Any) -> Callable[[], list[Tensor]]:
    return lambda: [numbers(*shape, seed=i, **options) for i, shape in enumerate(shapes)]


# --- references ----------------------------------------------------------------------------------


def nonzero(y: Tensor) -> Tensor:
    return torch.where(y == 0, torch.full_like(y, 1e-300), y)


def by_gradient(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
    """``R_i = Σ_j x_i J_ji R_j / y_j``."""
    g = R / nonzero(f(*xs))
    found = jacobian(f, tuple(xs))
    dims = R.ndim
    return [
        x * torch.tensordot(g, J, dims=(list(range(dims)), list(range(dims))))
        for x, J in zip(xs, found, strict=True)
    ]


def evenly(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
    """n factors get one n-th each: Achtibat et al. 2024, eq. 15."""
    return [r / len(xs) for r in by_gradient(f, xs, R)]


def of_degree(degree: float) -> Reference:
    """Euler's theorem."""
    return lambda f, xs, R: [r / degree for r in by_gradient(f, xs, R)]


def unchanged(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
    """Achtibat et al. 2024, eq. 9."""
    (x,) = xs
    return [R.expand(x.shape) if R.shape == x.shape else R.sum_to_size(x.shape)]


def to_the_first(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
    """By gradient with everything but the first operand constant."""
    first, *others = xs
    found = by_gradient(lambda x: f(x, *others), [first], R)
    return [*found, *[torch.zeros_like(x) for x in others]]


def softmax_eq_13(dim: int) -> Reference:
    """``R_i = x_i (R_i − s_i Σ_j R_j)``: Achtibat et al. 2024, eq. 13."""

    def reference(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
        (x,) = xs
        e = (x - x.amax(dim, keepdim=True)).exp()
        s = e / e.sum(dim, keepdim=True)
        return [x * (R - s * R.sum(dim, keepdim=True))]

    return reference


def normalised(groups: Callable[[Tensor], Tensor], centred: bool, w: Any = None) -> Reference:
    """Ali et al. 2022, eq. 10, entry by entry: ``R_i = Σ_j x_i (δ_ij − 1/n) w_j / s · R_j / y_j``."""

    def reference(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
        (x,) = xs
        g = R / nonzero(f(x))
        g = g if w is None else g * w(x)
        rows, ups = groups(x), groups(g)
        found = torch.zeros_like(rows)
        for k in range(rows.shape[0]):
            v, up = rows[k], ups[k]
            n = len(v)
            mean = v.sum() / n if centred else 0.0
            std = (((v - mean) ** 2).sum() / n + EPS) ** 0.5
            for i in range(n):
                for j in range(n):
                    found[k, i] += v[i] * (float(i == j) - (1 / n if centred else 0)) / std * up[j]
        back = torch.zeros_like(x)
        places = groups(torch.arange(x.numel()).reshape(x.shape))
        back.view(-1)[places.reshape(-1)] = found.reshape(-1)
        return [back]

    return reference


def by_batch(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
    """Mean and deviation of the batch are constants: the mean absorbs its part."""
    (x,) = xs
    std = (((x - x.mean(0)) ** 2).sum(0) / len(x) + EPS) ** 0.5
    return [x / std * R / nonzero(f(x))]


def past_the_softmax(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
    """Of ``x + softmax(x)``, what is x's own."""
    return [xs[0] * R / nonzero(f(*xs))]


EPS = 0.125


def attention(
    mask: Callable[[Tensor], Tensor] | None = None, groups: int = 1, fixed: bool = False
) -> Reference:
    """Attention step by step, carrying relevance: its two products and the softmax between."""

    def reference(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
        q, k, v = xs
        k_, v_ = (t.repeat_interleave(groups, -3) for t in (k, v))
        d = q.shape[-1]
        pairs = torch.einsum("...id,...jd->...ijd", q, k_) / d**0.5
        S = pairs.sum(-1)
        M = torch.zeros_like(S) if mask is None else mask(S)
        A = (S + M).softmax(-1)
        terms = torch.einsum("...ij,...jd->...ijd", A, v_)
        shares = terms * (R / nonzero(terms.sum(-2))).unsqueeze(-2)
        R_A, R_v = shares.sum(-1), shares.sum(-3)
        if not fixed:
            R_A, R_v = R_A / 2, R_v / 2
        R_S = (S + M).nan_to_num(neginf=0.0) * (R_A - A * R_A.sum(-1, keepdim=True))
        per_unit = (R_S / nonzero((S + M).nan_to_num(neginf=1.0))).unsqueeze(-1)
        R_q, R_k = ((pairs * per_unit / 2).sum(dim) for dim in (-2, -3))
        if fixed:
            R_q, R_k = torch.zeros_like(R_q), torch.zeros_like(R_k)
        if groups > 1:
            R_k, R_v = (t.unflatten(-3, (-1, groups)).sum(-3) for t in (R_k, R_v))
        return [R_q, R_k, R_v]

    return reference


def causal(S: Tensor) -> Tensor:
    return torch.full_like(S, -torch.inf).triu(1)


def masked(S: Tensor) -> Tensor:
    return torch.zeros_like(S).index_fill(-1, torch.tensor([1]), -torch.inf)


# --- the records ---------------------------------------------------------------------------------

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


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: x * activation(y)


SIGNALS = (
    Call("x * sigmoid(y)", _gated(torch.sigmoid), GATED),
    Call("silu(y) * x", lambda x, y: F.silu(y) * x, GATED),
    Call("x * gelu(y)", _gated(F.gelu), GATED),
    Call("x * tanh(y) / 2", lambda x, y: x * (torch.tanh(y) / 2), GATED),
    Call("x * relu(y)", _gated(F.relu), GATED),
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


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return F.softmax(scores, dim=-1) @ v


def _mask(q: Tensor, k: Tensor) -> Tensor:
    return masked(q.new_zeros(q.shape[-2], k.shape[-2]))


def attentions(fixed: bool) -> list[Record]:
    """The records of attention under one of the two rules."""
    name = "attention, constant" if fixed else "attention"
    functions = FunctionRules(attention="constant" if fixed else "gradient")
    conserves = EVERYTHING if fixed else NOT_ALL
    plain = (
        Call("sdpa", sdpa, QKV),
        Call("sdpa by name", lambda q, k, v: sdpa(query=q, key=k, value=v), QKV),
        Call("by hand", _attended, QKV),
    )
    hidden = (
        Call("boolean", lambda q, k, v: sdpa(q, k, v, _mask(q, k) == 0), QKV),
        Call("additive", lambda q, k, v: sdpa(q, k, v, attn_mask=_mask(q, k)), QKV),
    )
    return [
        Record(name, plain, attention(fixed=fixed), conserves, functions, wrong=WRONG_ATTENTION),
        Record(f"{name}, masked", hidden, attention(masked, fixed=fixed), conserves, functions),
        Record(
            f"{name}, causal",
            (Call("sdpa", lambda q, k, v: sdpa(q, k, v, is_causal=True), SQUARE),),
            attention(causal, fixed=fixed),
            conserves,
            functions,
        ),
        Record(
            f"{name}, grouped",
            (Call("sdpa", lambda q, k, v: sdpa(q, k, v, enable_gqa=True), GROUPED),),
            attention(groups=2, fixed=fixed),
            conserves,
            functions,
        ),
    ]


WRONG_ATTENTION = (Call("sizes that do not fit", sdpa, operands((2, 3, 4), (2, 3, 5), (2, 3, 4))),)
CP, SIGNAL = FunctionRules(attention="constant"), FunctionRules(gates="signal")
ROWS = normalised(lambda x: x.reshape(-1, 6), centred=True)

RECORDS = (
    Record(
        "pass", ACTIVATIONS, unchanged, wrong=(Call("integers", lambda x: F.gelu(x.int()), ANY),)
    ),
    Record("linear, picking or of degree one", LINEAR, by_gradient),
    Record(
        "product",
        PRODUCTS,
        evenly,
        wrong=(Call("sizes that do not fit", torch.matmul, operands((2, 3), (2, 3))),),
    ),
    Record(
        "three factors in turn",
        (Call("x * y * z", lambda x, y, z: x * y * z, operands((2, 3), (2, 3), (2, 3))),),
        lambda f, xs, R: [
            r * s for r, s in zip(by_gradient(f, xs, R), (0.25, 0.25, 0.5), strict=True)
        ],
    ),
    Record(
        "one factor twice",
        (Call("x @ x.T", lambda x: x @ x.mT, operands((2, 3, 4))),),
        of_degree(2),
    ),
    Record("quotient", QUOTIENTS, to_the_first),
    Record("RMS norm", BY_HAND, normalised(lambda x: x.reshape(-1, 6), centred=False)),
    Record(
        "layer norm",
        CENTRED,
        ROWS,
        wrong=(Call("another width", lambda x: F.layer_norm(x, (5,)), ANY),),
    ),
    Record(
        "layer norm with weights",
        (
            Call(
                "F.layer_norm",
                lambda x: F.layer_norm(x, (6,), CONSTANT.to(x), CONSTANT.to(x), EPS),
                ANY,
            ),
        ),
        normalised(lambda x: x.reshape(-1, 6), centred=True, w=lambda x: CONSTANT),
        NOT_ALL,
    ),
    Record(
        "group norm",
        (Call("F.group_norm", lambda x: F.group_norm(x, 2, eps=EPS), operands((2, 4, 3))),),
        normalised(lambda x: x.reshape(-1, 6), centred=True),
    ),
    Record(
        "instance norm",
        (
            Call("F.instance_norm", lambda x: F.instance_norm(x, eps=EPS), operands((2, 4, 3))),
            Call(
                "torch.instance_norm",
                lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, EPS, False),
                operands((2, 4, 3)),
            ),
        ),
        normalised(lambda x: x.reshape(-1, 3), centred=True),
    ),
    Record(
        "batch norm of a batch",
        (
            Call(
                "F.batch_norm",
                lambda x: F.batch_norm(x, None, None, training=True, eps=EPS),
                operands((4, 3)),
            ),
            Call(
                "torch.batch_norm",
                lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, EPS, False),
                operands((4, 3)),
            ),
        ),
        by_batch,
        NOT_ALL,
    ),
    Record(
        "x / norm",
        (
            Call("by hand", lambda x: x / x.norm(dim=-1, keepdim=True), ANY),
            Call("F.normalize", lambda x: F.normalize(x, dim=-1), ANY),
            Call("x / x.sum()", lambda x: x / x.sum(-1, keepdim=True), POSITIVE),
        ),
        unchanged,
    ),
    Record(
        "cosine similarity",
        (Call("F.cosine_similarity", F.cosine_similarity, operands((2, 5), (2, 5))),),
        lambda f, xs, R: [
            xs[0] * xs[1] / (xs[0] * xs[1]).sum(1, keepdim=True) * R[:, None] / 2 for _ in xs
        ],
    ),
    Record(
        "variance",
        (
            Call("var", lambda x: x.var(-1), ANY),
            Call("torch.var, all", lambda x: torch.var(x, dim=-1, correction=0), ANY),
        ),
        of_degree(2),
    ),
    Record(
        "prod",
        (
            Call("prod", lambda x: x.prod(-1), operands((2, 3))),
            Call("cumprod, the last", lambda x: x.cumprod(-1)[:, -1], operands((2, 3))),
            Call("det", torch.linalg.det, operands((2, 3, 3))),
            Call("matrix_power", lambda x: torch.linalg.matrix_power(x, 3), operands((2, 2, 2))),
        ),
        of_degree(3),
    ),
    Record(
        "softmax",
        (
            Call("F.softmax", lambda x: F.softmax(x, -1), ANY),
            Call("torch.softmax", lambda x: torch.softmax(x, dim=1), ANY),
            Call("Tensor.softmax", lambda x: x.softmax(-1), ANY),
            Call("special.softmax", lambda x: torch.special.softmax(x, -1), ANY),
        ),
        softmax_eq_13(-1),
        NOT_ALL,
    ),
    Record(
        "softmax over the second dimension",
        (Call("F.softmax", lambda x: F.softmax(x, 1), operands((2, 3, 4))),),
        softmax_eq_13(1),
        NOT_ALL,
    ),
    Record(
        "softmax, constant",
        (Call("x + F.softmax", lambda x: x + F.softmax(x, -1), ANY),),
        past_the_softmax,
        NOT_ALL,
        CP,
    ),
    Record(
        "log softmax and its like",
        (
            Call("F.log_softmax", lambda x: F.log_softmax(x, -1), ANY),
            Call("logsumexp", lambda x: x.logsumexp(-1), ANY),
            Call("logaddexp", torch.logaddexp, operands((2, 4), (2, 4))),
            Call(
                "cross_entropy",
                lambda x: F.cross_entropy(x, torch.tensor([0, 3]), reduction="none"),
                ANY,
            ),
        ),
        by_gradient,
        NOT_ALL,
    ),
    Record(
        "gates, half",
        (
            Call("x * sigmoid(y)", _gated(torch.sigmoid), GATED),
            Call("glu", lambda x, y: F.glu(torch.cat([x, y], -1)), GATED),
            Call("x * gelu(y)", _gated(F.gelu), GATED),
        ),
        lambda f, xs, R: [R / 2, R / 2],
    ),
    Record("gates, to the signal", SIGNALS, to_the_first, functions=SIGNAL),
    *attentions(fixed=False),
    *attentions(fixed=True),
)
