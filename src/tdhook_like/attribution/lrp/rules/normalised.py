"""Normalisations with their statistics held constant: linear in the input.

Each takes the arguments of the function of the same name in ``torch.nn.functional``, behind the
call's flow and the function's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdhook_like.hooks.surrogate import constant

__all__ = ["affine", "batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


def layer_norm(
    flow: Any,
    output: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
) -> Tensor:
    """``(x − mean x) / G(std) · w + b`` over the last dimensions.

    >>> x = torch.tensor([[1.0, 3.0]])
    >>> layer_norm(None, x, x, (2,), eps=0.0)
    tensor([[-1., 1.]])
    """
    dims = tuple(range(-len(normalized_shape), 0))
    return affine(*_standard(input, dims, eps), weight, bias)


def rms_norm(
    flow: Any,
    output: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``x / G(rms) · w`` over the last dimensions.

    >>> x = torch.tensor([[1.0, -1.0]])
    >>> rms_norm(None, x, x, (2,), eps=0.0)
    tensor([[ 1., -1.]])
    """
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    power = constant(input).pow(2).mean(dims, keepdim=True)
    return affine(input, torch.rsqrt(power + eps), weight, None)


def group_norm(
    flow: Any,
    output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
) -> Tensor:
    """``(x − mean x) / G(std) · w + b`` over groups of channels, the second dimension.

    >>> x = torch.tensor([[[1.0], [3.0]]])
    >>> group_norm(None, x, x, 1, eps=0.0).flatten()
    tensor([-1., 1.])
    """
    grouped = input.reshape(input.shape[0], num_groups, -1)
    centred, scale = _standard(grouped, (-1,), eps)
    scale = scale.expand(grouped.shape).reshape(input.shape)
    weight, bias = _channels(weight, input), _channels(bias, input)
    return affine(centred.reshape(input.shape), scale, weight, bias)


def instance_norm(
    flow: Any,
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *rest: Any,
) -> Tensor | None:
    """``(x − mean x) / G(std) · w + b`` for each channel, over all that is behind it.

    >>> x = torch.tensor([[[1.0, 3.0]]])
    >>> instance_norm(None, x, x, eps=0.0)
    tensor([[[-1., 1.]]])
    """
    if not use_input_stats:
        return None  # affine, with what it has seen in training
    weight, bias = _channels(weight, input), _channels(bias, input)
    return affine(*_standard(input, tuple(range(2, input.ndim)), eps), weight, bias)


def batch_norm(
    flow: Any,
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *rest: Any,
) -> Tensor | None:
    """Affine with the statistics of the training; with the batch's, these are held constant.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> batch_norm(None, x, x, None, None, training=True, eps=0.0).flatten()
    tensor([-1., 1.])
    """
    if not training:
        return None
    dims = (0, *range(2, input.ndim))
    centred = input - constant(input).mean(dims, keepdim=True)
    # torch's own variance takes several times as long.
    power = constant(centred).pow(2).mean(dims, keepdim=True)
    weight, bias = _channels(weight, input), _channels(bias, input)
    return affine(centred, torch.rsqrt(power + eps), weight, bias)


def _standard(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(dims, keepdim=True)
    power = constant(centred).pow(2).mean(dims, keepdim=True)
    return centred, torch.rsqrt(power + eps)


def _channels(value: Tensor | None, x: Tensor) -> Tensor | None:
    return None if value is None else value.reshape(-1, *[1] * (x.ndim - 2))


def affine(x: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x · G(scale · weight) + G(bias)``; the parts broadcast to x."""
    # Constants first: the graph then keeps one tensor, and none for the weights' sake.
    z = x * (scale if weight is None else scale * constant(weight))
    return z if bias is None else z + constant(bias)
