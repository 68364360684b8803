"""The least that each method has to do, in plain torch: what the ratios are relative to."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

STEPS = 32
#: Orders that Shapley values are sampled from.
ORDERS = 25
#: Height and width of what is occluded, and how far that moves.
WINDOW, STRIDE = 8, 4


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


def compared(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """One forward of one row, the baseline of all, and one forward and one backward."""
    once = gradient(net)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            net(torch.zeros_like(x[:1]))
        return once(x)

    return run


def _places(x: Tensor) -> int:
    return math.prod((n - WINDOW) // STRIDE + 1 for n in x.shape[-2:])


#: How often a method has to evaluate the model, by the inputs.
EVALUATIONS: dict[str, Callable[[Tensor], int]] = {
    "ablation": lambda x: x[0].numel() + 1,
    "shapley": lambda x: ORDERS * (x[0].numel() - 1) + 2,
    "occlusion": lambda x: _places(x) + 1,
}


def stacks(x: Tensor, count: int) -> Callable[[], list[Tensor]]:
    """Rows for ``count`` evaluations of x, in stacks of the size at which a forward is fastest."""
    rows = min(max(2**19 // x[0].numel(), 64), 512)
    held = torch.rand(min(rows, count * len(x)), *x.shape[1:])
    whole, rest = divmod(count * len(x), len(held))
    found = [held] * whole + ([held[:rest]] if rest else [])
    return lambda: found


def evaluated(net: nn.Module) -> Callable[[list[Tensor]], Tensor]:
    """The forwards alone, stack by stack."""

    def run(stacked: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat([net(rows)[..., 0] for rows in stacked])

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
