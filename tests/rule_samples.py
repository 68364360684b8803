"""Modules for rules to sit on, their inputs, and the public road from a rule to relevance.

Weights and inputs lie on a grid of quarters: sums of their products are exact in float32 too, so
that outputs which are exactly zero really occur, and a rule's own rounding is all that differs
between precisions.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import weight_norm

from tdhook_like import LRP
from tdhook_like.attribution.lrp import BaseRuleMapper, Rule, RuleMapper
from tdhook_like.targets import Each


@dataclass(frozen=True)
class Sample:
    """A module and the shapes of its inputs, without the batch dimension."""

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]

    def module(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The module anew, its parameters drawn from the grid, always the same."""
        module = self.build()
        for name, parameter in module.named_parameters():
            parameter.data = grid(parameter.shape, f"{self.name} {name}")
        for part in module.modules():
            if isinstance(part, _BatchNorm) and part.running_mean is not None:
                part.running_mean.copy_(grid(part.running_mean.shape, f"{self.name} mean"))
        return module.to(dtype)

    def inputs(self, signs: str, batch: int = 2) -> list[Tensor]:
        """Inputs with exact zeros among them; ``signs`` is "mixed" or "non-negative"."""
        drawn = [
            grid((batch, *shape), f"{self.name} x{i} {signs}")
            for i, shape in enumerate(self.shapes)
        ]
        return [x.abs() for x in drawn] if signs == "non-negative" else drawn


def grid(shape: Sequence[int], name: str) -> Tensor:
    """Multiples of a quarter in [-1.5, 1.5], drawn by name; a thirteenth of them zeros."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(-6, 7, tuple(shape), generator=generator).double() / 4


def made(name: str, build: Callable[[], nn.Module]) -> Any:
    """A module with parameters from the grid, in float64."""
    return Sample(name, build, ()).module()


# --- the public road ------------------------------------------------------------------------------

TINY = 2.0**-60
"""Stands for an output of exactly zero, of which relevance cannot be a multiple."""


def only(module: nn.Module, rule: Rule) -> RuleMapper:
    """A mapper that gives one module its rule and leaves all others."""
    return lambda name, other: rule if other is module else None


def on_dense(rule: Rule) -> RuleMapper:
    """One rule on dense layers; relevance passes what has no weights."""
    return BaseRuleMapper(rule_mapper=lambda name, m: rule if isinstance(m, nn.Linear) else None)


def explain(
    net: nn.Module, mapper: RuleMapper, inputs: Sequence[Tensor], R: Tensor, **options: Any
) -> tuple[list[Tensor], Tensor]:
    """The inputs' relevance when that of the outputs is ``R``, and the outputs.

    Few outputs are started from one by one, and the parts added up. For many, a fixed linear
    read-out turns them into one number whose gradient is ``R`` per unit of output.
    """
    keys = [f"x{i}" for i in range(len(inputs))]
    td = TensorDict(dict(zip(keys, inputs, strict=True)), [len(inputs[0])])
    few = R[0].numel() <= 8

    def read_out(outputs: TensorDict) -> Tensor:
        y = outputs["y"]
        return (y * (R.to(y) / torch.where(y == 0, TINY, y).detach())).flatten(1).sum(-1)

    target: Any = Each("y") if few else read_out
    start: Any = R.flatten(1) if few else "value"
    method = LRP(mapper, target=target, start=start, **options)
    with method.prepare(net, keys, ["y"]) as hooked:
        td = hooked(td)
    found = [td["attr", key] for key in keys]
    return [x.sum(1) for x in found] if few else found, td["y"]


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Equal up to a share of each sample's largest relevance; zeros may be all but zero."""
    assert got.shape == want.shape
    error, size = (t.double().flatten(1).abs().amax(1) for t in (got - want, want))
    shares = (error / size).tolist()
    assert (error <= tolerance * size + 1e-10).all(), f"off by {shares} of the largest relevance"


# --- modules with weights -------------------------------------------------------------------------

AFFINE = (
    Sample("linear", lambda: nn.Linear(5, 4), ((5,),)),
    Sample("linear without bias", lambda: nn.Linear(6, 3, bias=False), ((6,),)),
    Sample("linear over time", lambda: nn.Linear(3, 2), ((4, 3),)),
    Sample("linear with weight norm", lambda: weight_norm(nn.Linear(4, 3)), ((4,),)),
    Sample("conv1d", lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), ((2, 6),)),
    Sample(
        "conv1d without bias", lambda: nn.Conv1d(2, 3, 3, padding="same", bias=False), ((2, 5),)
    ),
    Sample(
        "conv1d circular",
        lambda: nn.Conv1d(2, 2, 3, padding=2, padding_mode="circular"),
        ((2, 4),),
    ),
    Sample(
        "conv1d replicate",
        lambda: nn.Conv1d(1, 2, 3, padding=2, padding_mode="replicate"),
        ((1, 4),),
    ),
    Sample(
        "conv2d in groups", lambda: nn.Conv2d(4, 2, (2, 3), groups=2, dilation=(2, 1)), ((4, 3, 3),)
    ),
    Sample(
        "conv2d without bias",
        lambda: nn.Conv2d(2, 2, 2, stride=2, padding=1, bias=False),
        ((2, 3, 3),),
    ),
    Sample(
        "conv2d reflect",
        lambda: nn.Conv2d(1, 2, 3, padding=(1, 1), padding_mode="reflect"),
        ((1, 3, 3),),
    ),
    Sample(
        "conv2d circular on one side",
        lambda: nn.Conv2d(2, 2, (3, 2), padding=(2, 0), padding_mode="circular", bias=False),
        ((2, 3, 2),),
    ),
    Sample(
        "conv2d replicate with a stride",
        lambda: nn.Conv2d(1, 2, 3, stride=2, padding=2, padding_mode="replicate"),
        ((1, 3, 2),),
    ),
    Sample("conv3d", lambda: nn.Conv3d(1, 2, 2, stride=(1, 2, 1), padding=1), ((1, 2, 2, 2),)),
    Sample(
        "transposed 1d", lambda: nn.ConvTranspose1d(2, 2, 3, stride=2, output_padding=1), ((2, 3),)
    ),
    Sample(
        "transposed 2d without bias",
        lambda: nn.ConvTranspose2d(2, 4, 2, padding=1, groups=2, bias=False),
        ((2, 3, 3),),
    ),
    Sample(
        "transposed 2d in groups with gaps",
        lambda: nn.ConvTranspose2d(
            2, 2, (2, 3), stride=(3, 1), padding=(0, 2), output_padding=(1, 0), groups=2
        ),
        ((2, 2, 3),),
    ),
    Sample("transposed 3d", lambda: nn.ConvTranspose3d(3, 1, 2, dilation=2), ((3, 2, 2, 1),)),
)


# --- modules without weights ----------------------------------------------------------------------


class Product(nn.Module):
    """The product of its inputs, which may broadcast."""

    def forward(self, *factors: Tensor) -> Tensor:
        out = factors[0]
        for factor in factors[1:]:
            out = out * factor
        return out


class Sum(nn.Module):
    """The sum of its inputs, which may broadcast."""

    def forward(self, *terms: Tensor) -> Tensor:
        out = terms[0]
        for term in terms[1:]:
            out = out + term
        return out


class MatMul(nn.Module):
    """The matrix product of its inputs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class MaskedSoftmax(nn.Module):
    """Softmax that sees no later entry than the first two."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(x.shape[-1]) > 1
        return x.masked_fill(mask, -torch.inf).softmax(-1)


ELEMENTWISE = (
    Sample("relu", nn.ReLU, ((6,),)),
    Sample("tanh", nn.Tanh, ((6,),)),
    Sample("sigmoid", nn.Sigmoid, ((2, 3),)),
    Sample("gelu", nn.GELU, ((6,),)),
    Sample("softplus", nn.Softplus, ((6,),)),
    Sample("leaky relu", nn.LeakyReLU, ((6,),)),
    Sample("elu", nn.ELU, ((6,),)),
    Sample("batch norm", lambda: nn.BatchNorm1d(3).eval(), ((3, 4),)),
    Sample("identity", nn.Identity, ((6,),)),
)
OPERANDS = (
    Sample("sum", Sum, ((3,), (3,))),
    Sample("sum of three that broadcast", Sum, ((2, 3), (1, 3), (2, 1))),
    Sample("product", Product, ((3,), (3,))),
    Sample("product of three", Product, ((3,), (3,), (3,))),
    Sample("product that broadcasts", Product, ((2, 3), (2, 1))),
)
NORMS = (
    Sample("layer norm", lambda: nn.LayerNorm(5), ((5,),)),
    Sample("layer norm of two dimensions", lambda: nn.LayerNorm((2, 3)), ((2, 3),)),
    Sample("layer norm over time", lambda: nn.LayerNorm(4, bias=False), ((3, 4),)),
    Sample("plain layer norm", lambda: nn.LayerNorm(4, elementwise_affine=False), ((4,),)),
    Sample("rms norm", lambda: nn.RMSNorm(5), ((5,),)),
    Sample("rms norm over time", lambda: nn.RMSNorm((2, 3), eps=0.1), ((2, 2, 3),)),
    Sample("plain rms norm", lambda: nn.RMSNorm(4, elementwise_affine=False), ((4,),)),
)
SOFTMAX = (
    Sample("softmax", lambda: nn.Softmax(-1), ((4,),)),
    Sample("softmax along the first", lambda: nn.Softmax(1), ((4, 2),)),
    Sample("softmax of two dimensions", nn.Softmax2d, ((3, 2, 2),)),
    Sample("masked softmax", MaskedSoftmax, ((2, 4),)),
)
FUSED = (
    Sample("query, key, value", lambda: nn.Linear(4, 6), ((4,),)),
    Sample("query, key, value over time", lambda: nn.Linear(4, 6, bias=False), ((3, 4),)),
)
PICKING = (
    Sample("flatten", lambda: nn.Flatten(1), ((2, 3),)),
    Sample("dropout in evaluation", lambda: nn.Dropout(0.9).eval(), ((4,),)),
    Sample("max pooling", lambda: nn.MaxPool1d(2), ((2, 6),)),
)
RECTIFIERS = (
    Sample("relu", nn.ReLU, ((6,),)),
    Sample("relu of planes", nn.ReLU, ((2, 3, 2),)),
)


class Difference(nn.Module):
    """What its first input has beyond the second."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


AVERAGES = (
    Sample("average pooling", lambda: nn.AvgPool1d(2, padding=1), ((2, 5),)),
    Sample(
        "average pooling that overlaps",
        lambda: nn.AvgPool2d(2, stride=1, count_include_pad=False, padding=1),
        ((2, 3, 2),),
    ),
    Sample("sum pooling", lambda: nn.AvgPool2d((1, 2), divisor_override=1), ((1, 2, 4),)),
    Sample("adaptive average pooling", lambda: nn.AdaptiveAvgPool3d((1, 2, 1)), ((2, 2, 3, 1),)),
)
SUMS = (*OPERANDS[:2], Sample("difference", Difference, ((3,), (3,))))
LP_POOLS = (
    Sample("l2 pooling of rows", lambda: nn.LPPool1d(2, 2), ((6,),)),
    Sample("l2 pooling", lambda: nn.LPPool1d(2, 2), ((2, 5),)),
    Sample("l2 pooling that overlaps", lambda: nn.LPPool2d(2, 2, stride=1), ((1, 3, 3),)),
    Sample("l4 pooling", lambda: nn.LPPool2d(4, (1, 2), ceil_mode=True), ((2, 2, 3),)),
)
