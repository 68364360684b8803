"""The least that each method has to do, in plain torch: what the ratios are relative to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

STEPS = 32


def gradient(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """One forward and one backward to the inputs."""

    def run(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(net(leaf)[..., 0].sum(), leaf)[0]

    return run


def integrated(net: nn.Module, targets: int) -> Callable[[Tensor], list[Tensor]]:
    """One forward of all steps stacked, one backward per target."""
    alphas = (torch.arange(STEPS) + 0.5) / STEPS

    def run(x: Tensor) -> list[Tensor]:
        nodes = (x * alphas.view(-1, *([1] * x.dim()))).flatten(0, 1).requires_grad_()
        scores = net(nodes)
        return [
            torch.autograd.grad(scores[..., index].sum(), nodes, retain_graph=index < targets - 1)[
                0
            ]
            for index in range(targets)
        ]

    return run


def with_extra_forward(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Two forwards and one backward: z⁺ needs each layer with its positive weights as well."""
    once = gradient(net)

    def run(x: Tensor) -> Tensor:
        net(x.detach().requires_grad_())
        return once(x)

    return run


def _unchanged(module: nn.Module, inputs: object, output: object) -> None:
    del module, inputs, output


def hooking(net: nn.Module) -> Callable[[Tensor], None]:
    """Register one forward hook on every submodule, and remove it."""

    def run(x: Tensor) -> None:
        del x
        handles = [child.register_forward_hook(_unchanged) for child in net.children()]
        for handle in handles:
            handle.remove()

    return run


def hooked_gradient(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same around one forward and one backward."""
    once = gradient(net)

    def run(x: Tensor) -> Tensor:
        handles = [child.register_forward_hook(_unchanged) for child in net.children()]
        try:
            return once(x)
        finally:
            for handle in handles:
                handle.remove()

    return run
