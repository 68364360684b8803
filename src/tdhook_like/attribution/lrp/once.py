"""Inputs whose gradient may be taken once: where rules make a second derivative wrong, it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tdhook_like.attribution.lrp.rules.rule import is_float
from tdhook_like.errors import ContextError
from tdhook_like.hooks.surrogate import has_graph

__all__ = ["check_levels", "once"]


def _levels(x: Tensor) -> int:
    """How many transforms differentiate with respect to a tensor."""
    found = 0
    while torch._C._functorch.is_functorch_wrapped_tensor(x):  # pyright: ignore[reportAttributeAccessIssue]
        found += x.requires_grad
        x = torch._C._functorch.get_unwrapped(x)  # pyright: ignore[reportAttributeAccessIssue]
    return found


def once(value: Any) -> Any:
    """An input whose gradient refuses to be differentiated."""
    if not is_float(value):
        return value
    if forward_ad._current_level >= 0:
        raise ContextError(
            "A RuledModel has a gradient, and no derivative in forward mode (jvp, jacfwd, hessian): take "
            "torch.func.vjp or jacrev."
        )
    if not has_graph(value):
        return value
    if _levels(value) > 1:
        raise ContextError(_TWICE)
    return _Once.apply(value)


def check_levels(points: Sequence[Tensor], create_graph: bool) -> None:
    """Raises :class:`ContextError` where a transform would differentiate relevance of these inputs."""
    for x in points:
        if not torch._C._functorch.is_functorch_wrapped_tensor(x):  # pyright: ignore[reportAttributeAccessIssue]
            continue
        if create_graph:
            raise ContextError(
                "relevance(create_graph=True) builds a graph of autograd's, which torch.func's "
                "transforms do not see. Differentiate it by torch.autograd.grad or backward()."
            )
        if _levels(x):
            raise ContextError(_TWICE)


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # pyright: ignore
        return x.clone()  # not a view: the model may write into it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        # Gradients are on only where this pass is to be differentiated (transforms always are).
        return _Refused.apply(grad, *ctx.saved_tensors) if torch.is_grad_enabled() else grad


class _Refused(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:  # pyright: ignore
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        raise ContextError(_TWICE)


_TWICE = (
    "The gradient of a RuledModel cannot be differentiated: rules hold factors constant that depend on "
    "the inputs. Take relevance(..., create_graph=True), or LRP(..., create_graph=True) on keys."
)
