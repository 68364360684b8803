"""Batch normalisation, read as part of the affine layer in front of it or behind it.

With the statistics of the training, ``BN(x) = x · s + t`` for each channel. Behind ``f(x; w, b)`` the
two are one layer ``f(x; w·s, b·s + t)``, exactly; in front of a layer without padding, likewise. The
layer's rule is applied to that one layer. No parameter is touched: its weights are temporaries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from tdhook_like.attribution.lrp.flow import Flow, Made, Normed
from tdhook_like.attribution.lrp.modifiers import effective_parameters, with_parameters
from tdhook_like.attribution.lrp.rules.normalised import batch_norm
from tdhook_like.attribution.lrp.rules.rule import Inputs, Rule
from tdhook_like.errors import RuleError
from tdhook_like.hooks.arrival import multiplied
from tdhook_like.hooks.scratch import borrowed
from tdhook_like.hooks.surrogate import constant

__all__ = ["BatchNormRule", "behind", "foldable", "in_front", "scale_and_shift"]


class BatchNormRule(Rule):
    """Batch normalisation as part of the affine layer that it follows, or as affine by itself.

    Where what comes in was just made by a layer with a rule (``bn1(conv1(x))``, in whatever way the
    two are called), relevance flows from the normalisation's output straight to that layer's input,
    by its rule for the merged layer. Otherwise the normalisation is affine: linear in its input, the
    bias absorbing its part. Statistics of the batch itself, in training, are held constant.

    Source: Hui & Binder 2019, section 3 (fusing batch norm into convolutions).

    Args:
        fold: Whether to merge; affine otherwise.

    >>> BatchNormRule()
    BatchNormRule(fold=True)
    """

    feeds_zeros = False
    absorbs = "bias"

    def __init__(self, fold: bool = True) -> None:
        self.fold = bool(fold)

    def check(self, module: nn.Module) -> str | None:
        if hasattr(module, "running_mean") and hasattr(module, "eps"):
            if isinstance(module, _InstanceNorm) and module.running_mean is None:
                return "it normalises by statistics of each sample. Use LayerNormRule, or no rule."
            return None
        return "it has no running statistics, as batch normalisation has. Use LayerNormRule."

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        if not isinstance(output, Tensor):
            raise RuleError(f"{self!r} on {type(module).__name__}: it must return a tensor.")
        norm: Any = module
        by_batch = module.training or norm.running_mean is None
        return batch_norm(
            None,
            output,
            inputs.tensors[0],
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            by_batch,
            eps=norm.eps,
        )


def scale_and_shift(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``s`` and ``t`` of ``BN(x) = x · s + t``, ``[C]`` each; no graph.

    >>> scale_and_shift(torch.ones(1), torch.ones(1), None, None, 0.0)
    (tensor([1.]), tensor([-1.]))
    """
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * constant(weight)
    shift = -mean * scale
    return scale, shift if bias is None else shift + constant(bias)


def foldable(module: nn.Module, tensor: Any) -> bool:
    """Whether a layer's output may be merged with a normalisation of its channels.

    Channels are the second dimension, and have to be what the layer gives: ``[B, C]`` of a dense
    layer, ``[B, C, …]`` of a convolution of batches.
    """
    if not isinstance(tensor, Tensor):
        return False
    if isinstance(module, nn.Linear):
        return tensor.ndim == 2
    return isinstance(module, _ConvNd) and tensor.ndim == len(module.kernel_size) + 2


def behind(flow: Flow, x: Any, output: Tensor, scale: Tensor, shift: Tensor) -> Tensor | None:
    """The surrogate of a normalisation behind a layer: the layer's rule on the two as one.

    Args:
        flow: Knows which layer made ``x``.
        x: What the normalisation was called with.
        output: What it gave.
        scale: ``s`` of ``BN(x) = x · s + t``, ``[C]``.
        shift: ``t``, ``[C]``.

    Returns:
        What may be overwritten; None where no layer with a rule made ``x``.
    """
    made = flow.origin(x)
    if not isinstance(made, Made) or made.raw.shape != output.shape:
        return None
    if flow.recorder is not None:
        flow.recorder.merge(x)
    channels = [1] * (output.ndim - 2)
    raw = torch.addcmul(shift.reshape(-1, *channels), made.raw, scale.reshape(-1, *channels))
    factor = made.rule.factor(made.module, raw)
    if factor is not None:  # it reads no weights
        watched = flow.recorder is not None
        return raw if not watched and multiplied(raw, factor) else raw * factor(raw)
    found = made.rule.surrogate(merged_layer(made.module, scale, shift), made.inputs, raw)
    return found if made.rule.fresh else found.clone()


def in_front(flow: Flow, module: Any, inputs: Inputs) -> tuple[nn.Module, Inputs] | None:
    """The layer and its inputs as one with a normalisation in front of it, where that is exact.

    Where zeros are padded on, a shift of the input is not a shift of the output: no merging then.
    """
    weighted = isinstance(module, nn.Linear | _ConvNd) and bool(inputs)
    if not weighted or isinstance(module, _ConvTransposeNd):
        return None
    norm = flow.origin(inputs[0])
    if not isinstance(norm, Normed):
        return None
    if isinstance(module, nn.Linear):
        if norm.x.ndim != 2:
            return None
    elif norm.x.ndim != len(module.kernel_size) + 2 or _pads_zeros(module):
        return None
    if flow.recorder is not None:
        flow.recorder.merge(inputs[0], leads=True)
    parameters: dict[str, Tensor | None] = dict(effective_parameters(module))
    weight, bias = parameters["weight"], parameters.get("bias")
    assert weight is not None
    scale, shift = (_by_input(module, weight, t) for t in (norm.scale, norm.shift))
    moved = (weight * shift).flatten(1).sum(1)
    parameters["weight"] = _product(weight, scale)
    parameters["bias"] = moved if bias is None else bias + moved
    return with_parameters(module, parameters), Inputs((norm.x, *inputs[1:]), inputs.kwargs)


def merged_layer(layer: nn.Module, scale: Tensor, shift: Tensor) -> nn.Module:
    """The layer with ``w · s`` and ``b · s + t`` for its weight and bias; the layer is only read."""
    parameters: dict[str, Tensor | None] = dict(effective_parameters(layer))
    weight, bias = parameters["weight"], parameters.get("bias")
    assert weight is not None
    parameters["weight"] = _product(weight, _by_output(layer, weight, scale))
    parameters["bias"] = shift if bias is None else bias * scale + shift
    return with_parameters(layer, parameters)


def _product(weight: Tensor, scale: Tensor) -> Tensor:
    # New memory of a large weight's size would cost more than the product.
    place = None if weight.requires_grad or scale.requires_grad else borrowed(weight)
    return weight * scale if place is None else torch.mul(weight, scale, out=place)


def _pads_zeros(module: _ConvNd) -> bool:
    if module.padding_mode != "zeros":
        return False  # what is padded on is normalised like everything else
    pads = module.padding
    return pads == "same" if isinstance(pads, str) else any(size != 0 for size in pads)


def _by_input(module: Any, weight: Tensor, value: Tensor) -> Tensor:
    """A number per input channel, to go beside a weight ``[out, in / groups, …]``."""
    if isinstance(module, nn.Linear):
        return value
    by_group = value.reshape(module.groups, 1, -1)
    rows = by_group.expand(-1, weight.shape[0] // module.groups, -1).reshape(weight.shape[0], -1)
    return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))


def _by_output(module: Any, weight: Tensor, value: Tensor) -> Tensor:
    """A number per output channel, to go beside the weight."""
    if isinstance(module, _ConvTransposeNd):  # [in, out / groups, …], groups along the first
        by_group = value.reshape(module.groups, 1, -1)
        rows = by_group.expand(-1, weight.shape[0] // module.groups, -1)
        rows = rows.reshape(weight.shape[0], -1)
        return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))
    return value.reshape(-1, *[1] * (weight.ndim - 1))
