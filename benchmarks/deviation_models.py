"""Models of a few weights, small enough for their relevance to be worked out by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    """A dense layer with these numbers."""
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return layer


class Residual(nn.Module):
    """Three blocks ``x + f(x)``, f a layer that gives its input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(linear([[1.0]]) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Gated(nn.Module):
    """A product of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = linear([[2.0]]), linear([[3.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * self.gate(x)


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear([[2.0, 0.0], [1.0, 1.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))[:, 1:]


class Weighed(nn.Module):
    """``3a + b``, a module of two inputs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return 3 * a + b


class OfTwo(nn.Module):
    """What :class:`Weighed` makes of the two numbers of the input, given by place or by name."""

    def __init__(self, by_name: bool = False) -> None:
        super().__init__()
        self.weighed, self.by_name = Weighed(), by_name

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, :1], x[:, 1:]
        return self.weighed(a=a, b=b) if self.by_name else self.weighed(a, b)


class Inner(nn.Module):
    """A module with another one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear([[3.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Container(nn.Module):
    """A module that holds :class:`Inner`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Across(nn.Module):
    """A softmax over rows instead of columns, of which one entry is read."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.softmax(x)[:, 0, :1]


class Masked(nn.Module):
    """A softmax of which the last entry is masked and the first is read."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.softmax(x + torch.tensor([0.0, 0.0, -torch.inf]))[:, :1]


class Fused(nn.Module):
    """Queries, keys and values of one number each; their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = linear([[1.0], [2.0], [3.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x).sum(-1, keepdim=True)


class Normed(nn.Module):
    """A layer norm of which one number is read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3, eps=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)[:, :1]


def normed_weight() -> nn.Module:
    """``g · v / |v|``, which is (1, 2), of a ``v`` that is ten times as long."""
    found: Any = weight_norm(linear([[1.0, 2.0]]))
    parts = found.parametrizations.weight
    parts.original1.data *= 10.0
    return found
