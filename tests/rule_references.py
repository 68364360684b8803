"""What each rule should give, from its paper: slowly, in float64, sample by sample.

A reference reads ``(module, inputs, R_out) -> relevance of each input``. Those of affine layers come
from `reference_lrp`; nothing here calls the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference_lrp as ref
from rule_samples import Difference, MaskedSoftmax, MatMul, Product

Reference = Callable[[nn.Module, Sequence[Tensor], Tensor], list[Tensor]]
"""``(module, inputs, R_out) -> relevance of each input``, in float64."""


def affine(rule: Callable[..., Tensor], **options: Any) -> Reference:
    """The reference of a rule of affine layers, connection by connection."""

    def reference(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
        return [ref.relevance(module, inputs[0], R, rule, **options)]

    return reference


def box(low: Tensor | float, high: Tensor | float) -> Reference:
    """Z-box with bounds for every input, or of the input's shape where they are tensors."""

    def reference(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
        shape = inputs[0].shape[1:]
        bounds = {
            name: torch.as_tensor(bound, dtype=torch.float64).expand(shape)
            for name, bound in (("low", low), ("high", high))
        }
        return [ref.relevance(module, inputs[0], R, ref.zbox, **bounds)]

    return reference


def shifted(parameter: Tensor) -> Tensor:
    """A modification that keeps the grid: half of it, and a bit more."""
    return parameter / 2 + 1 / 64


def unchanged(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """What came to the output is the input's."""
    return [ref.pass_(inputs[0], R)]


def pseudo_identity(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """``x R / st(x)``."""
    x = inputs[0].double()
    return [x * R.double() / ref.stabilised(x, ref.EPSILON)]


def nowhere(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """No relevance for any input."""
    return [ref.stop(x, R) for x in inputs]


def evenly(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """Each operand the same."""
    return ref.uniform(inputs, R)


def absorbed(y: Tensor, R: Tensor) -> Tensor:
    """What epsilon leaves of relevance: ``R y / st(y)``."""
    return R.double() * y / ref.stabilised(y, ref.EPSILON)


def epsilon_evenly(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """Products by hand, factor by factor; anything else is an affine layer of one input."""
    xs = [x.double() for x in inputs]
    if isinstance(module, Product):
        return ref.uniform(xs, absorbed(module(*xs), R))
    if not isinstance(module, MatMul):
        return [ref.relevance(module, xs[0], R, ref.epsilon)]
    a, b = xs
    ratio = R.double() / ref.stabilised(a @ b, ref.EPSILON)
    to_a, to_b = torch.zeros_like(a), torch.zeros_like(b)
    n, m, k = ratio.shape[-2], ratio.shape[-1], a.shape[-1]
    for i in range(n):
        for j in range(m):
            for inner in range(k):
                part = a[:, i, inner] * b[:, inner, j] * ratio[:, i, j] / 2
                to_a[:, i, inner] += part
                to_b[:, inner, j] += part
    return [to_a, to_b]


def softmax(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """AttnLRP's proposition, what epsilon absorbs taken off beforehand."""
    x = inputs[0].double()
    dim = {nn.Softmax2d: -3}.get(type(module), getattr(module, "dim", -1))
    if isinstance(module, MaskedSoftmax):
        x = x.masked_fill(torch.arange(x.shape[-1]) > 1, -torch.inf)
    s = torch.softmax(x, dim)
    return [ref.softmax_attn(x, absorbed(s, R), dim)]


def norm(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """The norm with its statistics constant; an RMS norm is then one factor per entry."""
    if isinstance(module, nn.LayerNorm):
        return [ref.layer_norm(module, inputs[0], R)]
    return unchanged(module, inputs, R)


def values_alone(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """LRP-0 through the last third of the outputs."""
    third = R.shape[-1] // 3
    kept = torch.zeros_like(R)
    kept[..., -third:] = R[..., -third:]
    return [ref.relevance(module, inputs[0], kept, ref.epsilon, eps=0.0)]


def to_the_winner(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """Pooling by hand: the first of the largest takes all."""
    if not isinstance(module, nn.MaxPool1d):
        return [R.double().reshape(inputs[0].shape)]
    out = torch.zeros_like(inputs[0], dtype=torch.float64)
    for b, channel, j in torch.cartesian_prod(*map(torch.arange, R.shape)).tolist():
        window = inputs[0][b, channel, 2 * j : 2 * j + 2]
        out[b, channel, 2 * j + int(window.argmax())] += R[b, channel, j]
    return [out]


# --- affine layers, read otherwise ----------------------------------------------------------------


def without_bias(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A rule of affine layers that takes the bias for zero."""
    return lambda W, b, x, R, **options: rule(W, 0 * b, x, R, **options)


def gamma_without_bias(W: Tensor, b: Tensor, x: Tensor, R: Tensor) -> Tensor:
    """The generalised gamma rule by contributions alone; what is favoured goes by the output's sign."""
    z, gamma = W * x, 0.25
    sign = torch.sign(z.sum(1) + b)
    own = torch.where(sign[:, None] * z > 0, z, 0.0)
    favoured = (z + gamma * own) * (sign != 0)[:, None]
    return ref.share(favoured, favoured.sum(1), R, ref.EPSILON)


def excitation(W: Tensor, b: Tensor, x: Tensor, R: Tensor) -> Tensor:
    """Zhang et al. 2016: the probability of each input to win, over excitatory connections."""
    z = W.clamp(min=0) * x.clamp(min=0)
    return ref.share(z, z.sum(1), R, ref.EPSILON)


def to_the_largest(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """Huber et al. 2019: all of an output's relevance to its largest contribution, the first of it."""
    (x,) = inputs
    layer, out = ref.connections(module, x.shape[1:]), []
    for sample, R_sample in zip(x.double(), R.double().flatten(1), strict=True):
        read = sample.flatten()[layer.source]
        R_slots = torch.zeros_like(read)
        for j, R_j in enumerate(R_sample):
            slots = layer.connected[j].nonzero().flatten().tolist()
            if slots:
                R_slots[max(slots, key=lambda i: (layer.W[j, i] * read[i]).item())] += R_j
        out.append(layer.collect(R_slots, sample.numel()))
    return [torch.stack(out).reshape(x.shape)]


def of_channel(channel: int, rule: Callable[..., Tensor]) -> Reference:
    """A rule of affine layers for the relevance of one channel (dimension 1) of the output."""

    def reference(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
        kept = torch.zeros_like(R)
        kept[:, channel] = R[:, channel]
        return [ref.relevance(module, inputs[0], kept, rule)]

    return reference


def clipped(z: Tensor) -> Tensor:
    """Denominators no smaller than epsilon."""
    least = torch.full_like(z, ref.EPSILON).copysign(torch.where(z < 0, z, 1.0))
    return torch.where(z.abs() > ref.EPSILON, z, least)


def by_scale(z: Tensor) -> Tensor:
    """Epsilon as a share of the root mean square of one sample's denominators."""
    return ref.stabilised(z, ref.EPSILON * (z.square().sum().item() / z.numel()) ** 0.5)


# --- sums and pooling -----------------------------------------------------------------------------


def by_contribution(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """``x_i / st(sum)`` of each sum's relevance: windows of pooling, or several operands."""
    xs = [x.double() for x in inputs]
    if len(xs) > 1:
        xs[1:] = [-x for x in xs[1:]] if isinstance(module, Difference) else xs[1:]
        total = sum(xs[1:], xs[0])
        shares = R.double() / ref.stabilised(total, ref.EPSILON)
        return [(x * shares).sum_to_size(x.shape) for x in xs]
    x, read = xs[0], module
    if isinstance(module, nn.LPPool1d | nn.LPPool2d | nn.LPPool3d):
        read = _mean_of_windows(module)
    W = ref.dense_map(read, x.shape[1:])
    pairs = zip(x.flatten(1), R.double().flatten(1), strict=True)
    parts = [ref.epsilon(W, W.new_zeros(len(W)), row, R_row) for row, R_row in pairs]
    return [torch.stack(parts).reshape(x.shape)]


def _mean_of_windows(module: Any) -> Callable[[Tensor], Tensor]:
    pool = {nn.LPPool1d: F.avg_pool1d, nn.LPPool2d: F.avg_pool2d, nn.LPPool3d: F.avg_pool3d}
    return lambda x: pool[type(module)](x, module.kernel_size, module.stride, 0, module.ceil_mode)


# --- rectifiers, by their gradients ---------------------------------------------------------------


def rectified(passes: Callable[[Tensor, Tensor], Tensor]) -> Reference:
    """Input times what ``passes(input, gradient)`` lets through; the gradient is R over the output."""

    def reference(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
        x = inputs[0].double()
        y = x.clamp(min=0)
        gradient = torch.where(y == 0, 0.0, R / y)
        return [x * passes(x, gradient)]

    return reference


def guided(x: Tensor, gradient: Tensor) -> Tensor:
    """Springenberg et al. 2015: both positive."""
    return torch.where((x > 0) & (gradient > 0), gradient, 0.0)


def deconvolved(x: Tensor, gradient: Tensor) -> Tensor:
    """Zeiler & Fergus 2014: the gradient positive."""
    return gradient.clamp(min=0)


def smoothed(x: Tensor, gradient: Tensor) -> Tensor:
    """Dombrowski et al. 2019: the slope of ``log(1 + exp(10 x)) / 10``."""
    return gradient / (1 + torch.exp(-10 * x))
