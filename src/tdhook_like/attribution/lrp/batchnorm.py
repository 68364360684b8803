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

from tdhook_like.attribution.lrp.flow import Flow, Made
from tdhook_like.attribution.lrp.modifiers import effective_parameters, with_parameters
from tdhook_like.attribution.lrp.normalised import batch_norm
from tdhook_like.attribution.lrp.rule import Inputs, Rule
from tdhook_like.errors import RuleError
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
    """Whether a layer's output may be merged with a normalisation of its channels."""
    if isinstance(module, nn.Linear):
        return isinstance(tensor, Tensor) and tensor.ndim == 2
    return isinstance(module, _ConvNd) and isinstance(tensor, Tensor)


def behind(flow: Flow, x: Any, output: Tensor, scale: Tensor, shift: Tensor) -> Tensor | None:
    """The surrogate of a normalisation behind a layer: the layer's rule on the two as one.

    Args:
        flow: Knows which layer made ``x``.
        x: What the normalisation was called with.
        output: What it gave.
        scale: ``s`` of ``BN(x) = x · s + t``, ``[C]``.
        shift: ``t``, ``[C]``.

    Returns:
        None where no layer with a rule made ``x``.
    """
    x = x if flow.recorder is None else flow.recorder.original(x)
    made = flow.layers.get(id(x)) if flow.layers is not None else None
    if made is None:
        return None
    if flow.recorder is not None:
        flow.recorder.merge(made.tensor)
    merged = merged_layer(made, scale, shift)
    channels = [1] * (output.ndim - 2)
    raw = made.raw * scale.reshape(-1, *channels) + shift.reshape(-1, *channels)
    return made.rule.surrogate(merged, made.inputs, raw)


def in_front(flow: Flow, module: Any, inputs: Inputs) -> tuple[nn.Module, Inputs] | None:
    """The layer and its inputs as one with a normalisation in front of it, where that is exact.

    With zeros padded on, a shift of the input is not a shift of the output: no merging then.
    """
    if not flow.norms or not inputs:
        return None
    given = inputs[0] if flow.recorder is None else flow.recorder.original(inputs[0])
    found = flow.norms.get(id(given))
    if found is None:
        return None
    tensor, x, scale, shift = found
    if isinstance(module, nn.Linear):
        if x.ndim != 2:
            return None
        columns, spread = scale, None
    elif isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        if any(p != 0 for p in module.padding) or module.padding_mode != "zeros":
            return None
        columns = spread = scale
    else:
        return None
    parameters: dict[str, Tensor | None] = dict(effective_parameters(module))
    weight, bias = parameters["weight"], parameters.get("bias")
    assert weight is not None
    if spread is None:
        moved = weight @ shift
        weight = weight * columns
    else:
        groups, dims = module.groups, [1] * (weight.ndim - 2)
        rows = weight.shape[0] // groups
        by_row = [t.reshape(groups, 1, -1).expand(-1, rows, -1) for t in (scale, shift)]
        own, away = (t.reshape(weight.shape[0], -1) for t in by_row)
        moved = (weight.flatten(2).sum(-1) * away).sum(-1)
        weight = weight * own.reshape(*own.shape, *dims)
    if flow.recorder is not None:
        flow.recorder.merge(tensor)
    parameters["weight"] = weight
    parameters["bias"] = moved if bias is None else bias + moved
    return with_parameters(module, parameters), Inputs((x, *inputs[1:]), inputs.kwargs)


def merged_layer(made: Made, scale: Tensor, shift: Tensor) -> nn.Module:
    """The layer with ``w · s`` and ``b · s + t`` for its weight and bias; the layer is only read."""
    parameters: dict[str, Tensor | None] = dict(effective_parameters(made.module))
    weight, bias = parameters["weight"], parameters.get("bias")
    assert weight is not None
    parameters["weight"] = weight * _by_output(made.module, weight, scale)
    parameters["bias"] = shift if bias is None else bias * scale + shift
    return with_parameters(made.module, parameters)


def _by_output(module: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """One factor per output channel, to go beside the weight."""
    if isinstance(module, _ConvTransposeNd):  # [in, out / groups, …], groups along the first
        per_group = scale.reshape(module.groups, 1, -1)
        rows = per_group.expand(-1, weight.shape[0] // module.groups, -1).reshape(
            weight.shape[0], -1
        )
        return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))
    return scale.reshape(-1, *[1] * (weight.ndim - 1))
