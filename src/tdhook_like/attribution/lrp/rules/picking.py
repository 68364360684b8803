"""The argmax rule: each output's relevance goes to the one input that contributes most.

Which input that is, is found by a running maximum over the places of the kernel and chunks of input
channels, so that memory is bounded by the output's size. A dense layer is a convolution with one
position; a transposed convolution is a plain one over its input with zeros between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tdhook_like.attribution.lrp.rules.layers import LayerRun, WeightRule
from tdhook_like.hooks.surrogate import nonzero, unit

__all__ = ["ArgmaxRule"]

_CHUNK = 2**22
"""How many contributions are held at once; or one per output, where there are more outputs."""


class ArgmaxRule(WeightRule):
    """The input with the largest contribution takes all of an output's relevance.

    ``R_i = Σ_j R_j`` over the outputs j with ``i = argmax_k x_k w_kj``: surrogate ``u(x_i)·G(y_j)``
    summed over them. Contributions are compared with their signs; bias and zero padding take no
    part. Among equal contributions the first input wins, in the order channel, position. Where
    padding repeats inputs, these collect what their copies win. Conserves everything.

    Source: Huber, Schiller & André 2019 (the argmax rule, for deep Q-networks).

    >>> ArgmaxRule()
    ArgmaxRule()
    >>> from tdhook_like.attribution.lrp.rules.rule import Inputs
    >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> _ = nn.init.ones_(layer.weight)
    >>> y = ArgmaxRule().apply(layer, Inputs((x,)), layer(x))
    >>> x.detach() * torch.autograd.grad(y, x)[0]
    tensor([[0., 3.]])
    """

    fresh = True
    feeds_zeros = True

    def __init__(self) -> None:  # nothing is divided by, and the bias takes no part anyway
        pass

    def check(self, module: nn.Module) -> str | None:
        if isinstance(module, nn.Linear | _ConvNd):
            return super().check(module)
        return (
            "it compares contributions to a weighted sum, which it finds in dense layers and "
            "(transposed) convolutions alone. Use EpsilonRule or a rule of your own."
        )

    def share(self, run: LayerRun, x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(run.module, _ConvNd):
            x = x.unsqueeze(-1)  # a channel per input, and one position
        windows = _windows(run.module, x, y, run.parameters["weight"])
        # Which input wins changes in steps: it is found without a graph of any kind.
        best, winner = _winners(windows, x.detach())
        ones = windows.slots(unit(x), 0.0).flatten(1)
        taken = ones.gather(1, winner.flatten(1)).reshape(y.shape)
        reads = (best > -torch.inf).reshape(y.shape)  # an output may read nothing but padding
        return taken * torch.where(reads, nonzero(y), 0.0)


@dataclass(frozen=True)
class _Windows:
    """A layer as a convolution: which slots of a padded input its outputs read, by which weights.

    Attributes:
        weight: [groups, outputs per group, inputs per group, *kernel].
        stride: Of each dimension.
        dilation: Of each dimension.
        out: Number of outputs along each dimension.
        spread: How many slots from one input to the next, along each dimension.
        padding: Slots before and behind, along each dimension.
        mode: Of the padding.
    """

    weight: Tensor
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    out: tuple[int, ...]
    spread: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str

    @property
    def rank(self) -> int:
        """Number of positional dimensions."""
        return len(self.stride)

    @property
    def empty(self) -> bool:
        """Whether there are slots that no input fills."""
        pads = any(before > 0 or behind > 0 for before, behind in self.padding)
        return any(step > 1 for step in self.spread) or (pads and self.mode == "zeros")

    def slots(self, x: Tensor, fill: float) -> Tensor:
        """An input [..., channels, *positions] as [samples, channels, *slots]."""
        rows = prod(x.shape[: -1 - self.rank])
        x = x.reshape(rows, *x.shape[-1 - self.rank :])
        for dim, step in enumerate(self.spread, 2):
            if step > 1:  # zeros between, without writing into anything
                size = x.shape[dim] * step - (step - 1)
                x = F.pad(
                    x.unsqueeze(dim + 1), _amounts(x.dim() + 1, dim + 1, step - 1), value=fill
                )
                x = x.flatten(dim, dim + 1).narrow(dim, 0, size)
        amounts = [amount for pair in reversed(self.padding) for amount in pair]
        if not any(amounts):
            return x
        if self.mode == "zeros":
            return F.pad(x, amounts, value=fill)
        return F.pad(x, amounts, mode=self.mode)

    def places(self) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """Each place of the kernel, and the slots that all outputs read by it."""
        for place in product(*(range(size) for size in self.weight.shape[3:])):
            yield (
                place,
                tuple(
                    slice(k * d, k * d + (n - 1) * s + 1, s)
                    for k, d, n, s in zip(place, self.dilation, self.out, self.stride, strict=True)
                ),
            )


def _winners(windows: _Windows, x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest contribution to each output, and its slot: [samples, outputs, positions] each."""
    groups, outputs, channels = windows.weight.shape[:3]
    slots = windows.slots(x, 0.0)
    volume = slots.shape[2:]
    numbers = torch.arange(prod(volume), device=x.device).reshape(volume)
    filled = windows.slots(x.new_ones(1, *x.shape[-windows.rank :]), 0.0)[0, 0] > 0
    slots = slots.unflatten(1, (groups, channels))
    shape = (slots.shape[0], groups, outputs, prod(windows.out))
    best = x.new_full(shape, -torch.inf)
    winner = torch.zeros(shape, dtype=torch.long, device=x.device)
    size = max(1, _CHUNK // max(prod(shape), 1))
    first = torch.arange(groups, device=x.device)[:, None, None] * channels
    for place, read in windows.places():
        there = slots[(..., *read)].flatten(3)
        weight = windows.weight[(..., *place)]
        number, real = numbers[read].flatten(), filled[read].flatten()
        for start in range(0, channels, size):
            chunk = slice(start, start + size)
            parts = weight[..., chunk, None] * there[:, :, None, chunk]
            top, channel = parts.max(dim=3)  # the first of equals
            if windows.empty:
                top = torch.where(real, top, -torch.inf)
            slot = (first + start + channel) * prod(volume) + number
            better = (top > best) | ((top == best) & (slot < winner))
            best, winner = torch.where(better, top, best), torch.where(better, slot, winner)
    return best, winner


def _windows(module: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> _Windows:
    weight = weight.detach()
    if not isinstance(module, _ConvNd):
        return _Windows(weight[None, ..., None], (1,), (1,), (1,), (1,), ((0, 0),), "zeros")
    rank, groups, kernel = len(module.kernel_size), module.groups, module.kernel_size
    out, dilation = tuple(y.shape[-rank:]), tuple(module.dilation)
    if not isinstance(module, _ConvTransposeNd):
        weight = weight.unflatten(0, (groups, weight.shape[0] // groups))
        padding = tuple(_padding(module, axis) for axis in range(rank))
        once = (1,) * rank
        return _Windows(
            weight, tuple(module.stride), dilation, out, once, padding, module.padding_mode
        )
    weight = weight.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2)
    weight, spread = weight.flip(*range(3, 3 + rank)), tuple(module.stride)
    padding = []
    for axis, (n, step) in enumerate(zip(x.shape[-rank:], spread, strict=True)):
        reach = dilation[axis] * (kernel[axis] - 1)
        before = reach - int(module.padding[axis])
        padding.append((before, out[axis] + reach - before - ((n - 1) * step + 1)))
    return _Windows(weight, (1,) * rank, dilation, out, spread, tuple(padding), "zeros")


def _padding(module: _ConvNd, axis: int) -> tuple[int, int]:
    if module.padding == "same":
        total = module.dilation[axis] * (module.kernel_size[axis] - 1)
        return total // 2, total - total // 2
    if module.padding == "valid":
        return 0, 0
    amount = int(module.padding[axis])
    return amount, amount


def _amounts(dims: int, dim: int, behind: int) -> Sequence[int]:
    """``F.pad``'s list for so many entries behind one dimension."""
    return [0, behind] if dim == dims - 1 else [*([0, 0] * (dims - 1 - dim)), 0, behind]
