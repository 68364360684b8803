"""Layers and norms with a past, rules for them, and the layers that they are merged into."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    AlphaBetaRule,
    BaseRuleMapper,
    EpsilonRule,
    FlatRule,
    GammaRule,
    Inputs,
    Rule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)

F64 = torch.float64
B = 3


class Proportional(Rule):
    """Epsilon, in the papers' terms: relevance in, relevance out."""

    def relevance(self, module: nn.Module, inputs: Inputs, output: Any, R_out: Any) -> Any:
        with torch.enable_grad():
            x = inputs[0].clone().requires_grad_()
            z = module.forward(x)
            (g,) = torch.autograd.grad(z, x, R_out / (z + 1e-6 * z.sign()))
        return x.detach() * g


RULES: dict[str, Callable[[], Rule]] = {
    "epsilon": partial(EpsilonRule, 1e-3),
    "z-plus": partial(ZPlusRule, 1e-3),
    "alpha-beta": partial(AlphaBetaRule, 2.0, 1.0),
    "gamma": partial(GammaRule, 0.5),
    "w-square": WSquareRule,
    "w-square with bias": partial(WSquareRule, with_bias=True),
    "flat": FlatRule,
    "z-box": partial(ZBoxRule, -3.0, 3.0),
    "epsilon without bias": partial(EpsilonRule, 1e-3, zero_params="bias"),
    "in relevance": Proportional,
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def lived_in(net: nn.Module) -> Any:
    """The net in evaluation mode, with statistics and parameters of no initialisation."""
    net = net.double().eval()
    with torch.no_grad():
        for name, value in (*net.named_buffers(), *net.named_parameters()):
            if value.is_floating_point():
                value.copy_(
                    torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value)
                )
    return net


def on(kinds: Any, rule: Rule, norm: Rule | None = None) -> Any:
    """One rule on all layers of some kinds, :class:`BaseRuleMapper` elsewhere."""
    base = BaseRuleMapper()

    def mapper(path: str, module: nn.Module) -> Rule | None:
        if isinstance(module, kinds):
            return rule
        if norm is not None and isinstance(module, nn.modules.batchnorm._BatchNorm):
            return norm
        return base(path, module)

    return mapper


LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def explained(net: nn.Module, mapper: Any, x: Tensor, target: Any = None, **options: Any) -> Any:
    """Relevance of the input, started at the sum of squares of all outputs."""
    target = (lambda td: td["y"].square().flatten(1).sum(1)) if target is None else target
    options = {"unhandled": "ignore", "unreached": "ignore", **options}
    with LRP(mapper, target, **options).prepare(net, ["x"], ["y"]) as hooked:
        return hooked(TensorDict({"x": x}, [len(x)]))["attr", "x"]


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# --- behind a layer -------------------------------------------------------------------------------

CONVS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], int]] = {
    # The layer, an input's shape, how many channels come out.
    "1d": (partial(nn.Conv1d, 4, 6, 3), (4, 7), 6),
    "2d": (partial(nn.Conv2d, 4, 6, 3, padding=1, stride=2), (4, 6, 5), 6),
    "3d": (partial(nn.Conv3d, 2, 3, 2), (2, 3, 4, 3), 3),
    "2d, groups": (partial(nn.Conv2d, 4, 6, 2, groups=2), (4, 4, 4), 6),
    "2d, depthwise": (partial(nn.Conv2d, 4, 8, 2, groups=4), (4, 4, 4), 8),
    "2d, dilated, reflected": (
        partial(nn.Conv2d, 2, 3, 2, dilation=2, padding=1, padding_mode="reflect"),
        (2, 5, 5),
        3,
    ),
    "2d, same": (partial(nn.Conv2d, 2, 3, 3, padding="same"), (2, 4, 4), 3),
    "transposed 1d": (partial(nn.ConvTranspose1d, 4, 6, 3, stride=2), (4, 4), 6),
    "transposed 2d, groups": (
        partial(nn.ConvTranspose2d, 4, 6, 3, stride=2, groups=2, output_padding=1),
        (4, 3, 3),
        6,
    ),
    "transposed 3d": (partial(nn.ConvTranspose3d, 2, 3, 2, padding=1), (2, 3, 3, 3), 3),
    "dense": (partial(nn.Linear, 5, 6), (5,), 6),
}
every_layer = pytest.mark.parametrize("layer", CONVS.values(), ids=CONVS)


def norm_for(layer: nn.Module, channels: int, **options: Any) -> Any:
    dims = 1 if isinstance(layer, nn.Linear) else len(layer.kernel_size)  # pyright: ignore
    return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](channels, **options)


def merged(layer: nn.Module, norm: Any) -> nn.Module:
    """What torch merges the two into, on copies of both."""
    layer, norm = copy.deepcopy(layer), copy.deepcopy(norm)
    if norm.weight is None:
        norm.weight = nn.Parameter(torch.ones_like(norm.running_mean))
        norm.bias = nn.Parameter(torch.zeros_like(norm.running_mean))
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    if not transposed or layer.groups == 1:
        return fuse_conv_bn_eval(layer, norm, transpose=transposed)  # pyright: ignore
    # torch takes the weight's first dimension for all inputs: group by group.
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    weight = layer.weight.detach().clone()
    rows, each = weight.shape[0] // layer.groups, weight.shape[1]
    for group in range(layer.groups):
        for i in range(rows):
            for o in range(each):
                weight[group * rows + i, o] *= scale[group * each + o]
    bias = shift if layer.bias is None else layer.bias * scale + shift
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias.detach())
    return layer
