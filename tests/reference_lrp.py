"""LRP written from the papers, slowly: dense matrices, and relevance itself carried along.

Nothing here knows surrogates, hooks or autograd. A layer becomes a matrix of connections, a rule
becomes a share of each contribution ``z_ji = w_ji x_i``, and one sample is explained at a time in
float64, so that a disagreement with the library is a finding about the library.

Every rule of an affine layer reads ``rule(W, b, x, R, ...)`` with ``W`` [outputs, inputs], ``b``
and ``R`` [outputs], ``x`` [inputs] and returns the relevance [inputs]; `relevance` applies one
to a torch module and `propagate` runs several through a stack of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

EPSILON = 1e-6

LayerRule = Callable[..., Tensor]
Modify = Callable[[Tensor], Tensor]
Epsilon = float | Callable[[Tensor], Tensor]
"""A number, or a function from the denominators of one sample to stabilised ones."""


def stabilised(z: Tensor, eps: Epsilon) -> Tensor:
    """``z + eps * sign(z)`` where the sign of zero is +1; or what a function makes of ``z``."""
    return torch.where(z < 0, z - eps, z + eps) if isinstance(eps, float) else eps(z)


def share(z: Tensor, total: Tensor, R: Tensor, eps: Epsilon) -> Tensor:
    """Gives input i its part ``z[j, i] / st(total[j])`` of every ``R[j]``; outputs one by one.

    An output whose denominator is exactly zero (possible with ``eps=0`` only) has no contribution
    to share by, and its relevance goes nowhere.
    """
    out = torch.zeros(z.shape[1], dtype=torch.float64)
    for j, denominator in enumerate(stabilised(total, eps)):
        if denominator != 0:
            out += z[j] / denominator * R[j]
    return out


# --- rules of affine layers ---------------------------------------------------------------------


def epsilon(W: Tensor, b: Tensor, x: Tensor, R: Tensor, eps: Epsilon = EPSILON) -> Tensor:
    """LRP-epsilon: Bach et al. 2015; ``eps=0`` is LRP-0."""
    z = W * x
    return share(z, z.sum(1) + b, R, eps)


def modified_params(
    W_mod: Tensor, b_mod: Tensor, x: Tensor, R: Tensor, eps: Epsilon = EPSILON
) -> Tensor:
    """Any changed parameters: ``x_i w'_ji R_j / st(z'_j)``, z' their own output."""
    return epsilon(W_mod, b_mod, x, R, eps)


def alpha_beta(
    W: Tensor,
    b: Tensor,
    x: Tensor,
    R: Tensor,
    alpha: float = 2.0,
    beta: float = 1.0,
    eps: Epsilon = EPSILON,
) -> Tensor:
    """Bach et al. 2015: positive and negative contributions, each with its own total.

    The bias counts where its sign puts it, so that it absorbs relevance as any input would.
    """
    z = W * x
    positive, negative = z.clamp(min=0), z.clamp(max=0)
    excites = share(positive, positive.sum(1) + b.clamp(min=0), R, eps)
    inhibits = share(negative, negative.sum(1) + b.clamp(max=0), R, eps)
    return alpha * excites - beta * inhibits


def zplus(W: Tensor, b: Tensor, x: Tensor, R: Tensor, eps: Epsilon = EPSILON) -> Tensor:
    """Montavon et al. 2017, for inputs of any sign: positive contributions alone."""
    z = (W * x).clamp(min=0)
    return share(z, z.sum(1) + b.clamp(min=0), R, eps)


def gamma(
    W: Tensor, b: Tensor, x: Tensor, R: Tensor, gamma: float = 0.25, eps: Epsilon = EPSILON
) -> Tensor:
    """Andeol et al. 2021: contributions of the output's own sign count ``1 + gamma`` times.

    An output that is exactly zero has no sign and passes nothing on. For non-negative inputs and
    positive outputs this is LRP-gamma of Montavon et al. 2019.
    """
    z = W * x
    out = torch.zeros_like(x, dtype=torch.float64)
    for j in range(W.shape[0]):
        y = z[j].sum() + b[j]
        if y == 0:
            continue
        own = (lambda t: t.clamp(min=0)) if y > 0 else (lambda t: t.clamp(max=0))
        favoured = z[j] + gamma * own(z[j])
        total = favoured.sum() + b[j] + gamma * own(b[j])
        out += favoured / stabilised(total, eps) * R[j]
    return out


def zbox(
    W: Tensor,
    b: Tensor,
    x: Tensor,
    R: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    eps: Epsilon = EPSILON,
) -> Tensor:
    """Montavon et al. 2017: inputs confined to [low, high] (numbers, or of x's shape).

    The total takes ``b`` of the layer and gives ``b+`` back at the low corner and ``b-`` at the
    high one, which is nothing in sum.
    """
    lower = torch.as_tensor(low, dtype=torch.float64).expand_as(x)
    upper = torch.as_tensor(high, dtype=torch.float64).expand_as(x)
    z = W * x - W.clamp(min=0) * lower - W.clamp(max=0) * upper
    total = z.sum(1) + b - b.clamp(min=0) - b.clamp(max=0)
    return share(z, total, R, eps)


def wsquare(
    W: Tensor, b: Tensor, x: Tensor, R: Tensor, eps: Epsilon = EPSILON, with_bias: bool = False
) -> Tensor:
    """Montavon et al. 2017: shares by ``w**2``, whatever the inputs are."""
    squares = W**2
    total = squares.sum(1) + (b**2 if with_bias else 0.0)
    return share(squares, total, R, eps)


def flat(W: Tensor, b: Tensor, x: Tensor, R: Tensor, eps: Epsilon = EPSILON) -> Tensor:
    """Lapuschkin et al. 2019: equal shares for all connected inputs.

    A weight counts as a connection where it is not zero; where an existing weight may be zero,
    give the matrix of a layer of ones (as `relevance` does).
    """
    ones = (W != 0).double()
    return share(ones, ones.sum(1), R, eps)


# --- rules of other layers ----------------------------------------------------------------------


def pass_(x: Tensor, R: Tensor) -> Tensor:
    """Relevance goes through an element-wise layer as it is (Bach et al. 2015)."""
    return R.double().reshape(x.shape)


def stop(x: Tensor, R: Tensor) -> Tensor:
    """No relevance passes."""
    return torch.zeros(x.shape, dtype=torch.float64)


def uniform(operands: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """Achtibat et al. 2024, for products: each of n operands gets ``R / n``.

    An operand that was broadcast collects the parts of all the places where it was read.
    """
    return [(R.double() / len(operands)).sum_to_size(x.shape) for x in operands]


def softmax_attn(x: Tensor, R: Tensor, dim: int = -1) -> Tensor:
    """AttnLRP (Achtibat et al. 2024, Proposition 3.1): ``R_i = x_i (R_i - s_i sum_k R_k)``.

    A masked entry (minus infinity) has no probability and gets nothing.
    """
    x, R = x.double(), R.double()
    s = torch.exp(x - x.amax(dim, keepdim=True))
    s = s / s.sum(dim, keepdim=True)
    finite = torch.where(torch.isinf(x), torch.zeros_like(x), x)
    return finite * (R - s * R.sum(dim, keepdim=True))


def layer_norm(module: nn.LayerNorm, x: Tensor, R: Tensor, eps: float = 0.0) -> Tensor:
    """LN-rule (Ali et al. 2022): the norm with its standard deviation held constant.

    What is left is affine: centre, divide by the constant, scale, shift; LRP-epsilon on that.
    """
    size = math.prod(module.normalized_shape)
    rows, R_rows = x.double().reshape(-1, size), R.double().reshape(-1, size)
    scale = torch.ones(size) if module.weight is None else module.weight.detach().flatten()
    shift = torch.zeros(size) if module.bias is None else module.bias.detach().flatten()
    centring = torch.eye(size, dtype=torch.float64) - 1.0 / size
    out = []
    for row, R_row in zip(rows, R_rows, strict=True):
        std = torch.sqrt(((row - row.mean()) ** 2).mean() + module.eps)
        W = scale.double()[:, None] * centring / std
        out.append(epsilon(W, shift.double(), row, R_row, eps))
    return torch.stack(out).reshape(x.shape)


# --- layers as matrices -------------------------------------------------------------------------


@dataclass(frozen=True)
class Connections:
    """An affine layer, connection by connection.

    Attributes:
        W: [outputs, slots], one column per slot that the layer reads. Zero padding has no slots.
        b: [outputs].
        source: [slots], which input fills a slot. Padding modes that repeat inputs give several
            slots the same source.
        connected: [outputs, slots], 1 where a weight exists (whatever its value).
    """

    W: Tensor
    b: Tensor
    source: Tensor
    connected: Tensor

    def collect(self, R_slots: Tensor, n_inputs: int) -> Tensor:
        """The relevance of each input: the sum over its slots."""
        out = torch.zeros(n_inputs, dtype=torch.float64)
        return out.index_add(0, self.source, R_slots)


def dense_map(function: Callable[[Tensor], Tensor], input_shape: Sequence[int]) -> Tensor:
    """The matrix [outputs, inputs] of a linear function, one basis vector at a time."""
    basis = torch.eye(math.prod(input_shape), dtype=torch.float64)
    return torch.stack([function(e.reshape(1, *input_shape)).flatten() for e in basis], dim=1)


def dense_affine(
    module: nn.Module, input_shape: Sequence[int], modify: Modify | None = None
) -> tuple[Tensor, Tensor]:
    """The matrix W [outputs, inputs] and vector b [outputs] of an affine layer for one sample.

    Args:
        module: Linear, a (transposed) convolution of 1 to 3 dimensions, or a batch norm in
            evaluation mode.
        input_shape: shape of one sample, without batch dimensions.
        modify: changes weight and bias (effective ones, after any parametrization) beforehand.
    """
    layer = connections(module, input_shape, modify)
    n = math.prod(input_shape)
    W = torch.stack([layer.collect(row, n) for row in layer.W])
    return W, layer.b


def connections(
    module: nn.Module, input_shape: Sequence[int], modify: Modify | None = None
) -> Connections:
    """As `dense_affine`, with repeated (padded) inputs kept apart."""
    weight, bias = _parameters(module)
    if modify is not None:
        weight, bias = modify(weight), None if bias is None else modify(bias)
    pad, apply = _padding(module), _linear_part(module)
    n = math.prod(input_shape)
    # Numbers start at 1, so that zero padding can be told from input 0 (and be left out).
    padded = pad(torch.arange(1, n + 1, dtype=torch.float64).reshape(1, *input_shape))
    shape = padded.shape[1:]
    W = dense_map(lambda e: apply(e, weight, None), shape)
    connected = dense_map(lambda e: apply(e, torch.ones_like(weight), None), shape)
    b = apply(torch.zeros(1, *shape, dtype=torch.float64), weight, bias).flatten()
    source = padded.flatten().long() - 1
    real = source >= 0
    return Connections(W[:, real], b, source[real], connected[:, real])


def _parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    if isinstance(module, _BatchNorm):
        assert not module.training and module.running_mean is not None
        assert module.running_var is not None
        scale = 1.0 / torch.sqrt(module.running_var.double() + module.eps)
        scale = scale if weight is None else scale * weight.detach().double()
        shift = -scale * module.running_mean.double()
        return scale, shift if bias is None else shift + bias.detach().double()
    return weight.detach().double(), None if bias is None else bias.detach().double()


def _padding(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The padding of a convolution as a step of its own; nothing for other layers."""
    if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd):
        return lambda x: x
    amounts: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            amounts += [total // 2, total - total // 2]
        elif module.padding == "valid":
            amounts += [0, 0]
        else:
            amounts += [cast(int, module.padding[axis])] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return lambda x: F.pad(x, amounts, mode=mode)


def _linear_part(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """``(x, weight, bias) -> y`` of the layer behind its padding, for a batch of samples."""
    if isinstance(module, nn.Linear):
        return F.linear
    if isinstance(module, _BatchNorm):
        return _channelwise
    assert isinstance(module, _ConvNd), f"no dense form is known for {module}"
    dims, m = len(module.kernel_size), cast(Any, module)
    if isinstance(module, _ConvTransposeNd):
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return lambda x, w, b: transposed(
            x, w, b, m.stride, m.padding, m.output_padding, m.groups, m.dilation
        )
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return lambda x, w, b: conv(x, w, b, m.stride, 0, m.dilation, m.groups)


def _channelwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = (-1, *(1 for _ in x.shape[2:]))
    y = x * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


# --- layers and stacks of layers ----------------------------------------------------------------


def relevance(
    module: nn.Module,
    x: Tensor,
    R: Tensor,
    rule: LayerRule = epsilon,
    modify: Modify | None = None,
    **options: Any,
) -> Tensor:
    """The relevance of a batch of inputs to one affine layer.

    Args:
        module: as for `dense_affine`.
        x: [B, *input_shape], of any sign.
        R: [B, *output_shape], relevance of the outputs.
        rule: one of the rules of affine layers above.
        modify: changes weight and bias beforehand (for `modified_params`).
        **options: for the rule; tensors must fit one flattened sample.

    Returns:
        Relevance of x's shape, in float64.
    """
    layer = connections(module, x.shape[1:], modify)
    W = layer.connected if rule is flat else layer.W
    if rule is zbox:
        for corner in ("low", "high"):
            full = torch.as_tensor(options[corner], dtype=torch.float64)
            full = full.expand(x.shape[1:]).reshape(-1)
            options = {**options, corner: full[layer.source]}
    out = []
    for sample, R_sample in zip(x.detach().double(), R.detach().double(), strict=True):
        slots = sample.flatten()[layer.source]
        R_slots = rule(W, layer.b, slots, R_sample.flatten(), **options)
        out.append(layer.collect(R_slots, sample.numel()))
    return torch.stack(out).reshape(x.shape)


def propagate(
    layers: Sequence[nn.Module],
    x: Tensor,
    R_out: Tensor,
    rule_per_layer: Sequence[LayerRule | None],
) -> Tensor:
    """Relevance of the input of a stack of affine layers, ReLUs and reshapings.

    Args:
        layers: modules applied one after another, in evaluation mode.
        x: [B, *input_shape].
        R_out: [B, *output_shape], what is explained: relevance of the last output.
        rule_per_layer: for each layer a rule of affine layers; None lets relevance through as it
            is, which is right for ReLU, Flatten, Identity and Dropout.

    Returns:
        Relevance of x's shape, in float64.
    """
    inputs, activation = [], x.detach().double()
    for layer in layers:
        inputs.append(activation)
        activation = _forward(layer, activation)
    R = R_out.detach().double().reshape(activation.shape)
    for layer, z, rule in reversed(list(zip(layers, inputs, rule_per_layer, strict=True))):
        R = R.reshape(z.shape) if rule is None else relevance(layer, z, R, rule)
    return R


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.ReLU):
        return x.clamp(min=0)
    if isinstance(layer, (nn.Identity, nn.Dropout, nn.Flatten, nn.Unflatten)):
        assert not (layer.training and isinstance(layer, nn.Dropout))
        return layer(x)
    weight, bias = _parameters(layer)
    return _linear_part(layer)(_padding(layer)(x), weight, bias)
