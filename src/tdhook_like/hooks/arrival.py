"""Gradients that are changed as they arrive, for rules that need no graph of their own.

A surrogate is made whether relevance will reach it or not; what feeds a scale or a gate that is held
constant is never reached. And a copy of a tensor that merely halves its gradient is a copy too many.
A hook costs nothing ahead. Where hooks do not serve (inside function transforms, while torch
compiles, where relevance is differentiated again), the surrogate is made as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite

import torch
from torch import Tensor

from tdhook_like.hooks.functional import saving_is_watched
from tdhook_like.hooks.surrogate import (
    attach,
    differentiated_again,
    nonzero,
    quotient,
)

__all__ = ["delayed", "multiplied", "passed", "scaled", "waits"]


def waits(tensor: Tensor) -> bool:
    """Whether a hook on a tensor serves.

    >>> waits(torch.ones(1, requires_grad=True)), waits(torch.ones(1))
    (True, False)
    """
    if torch.compiler.is_compiling() or differentiated_again() or not tensor.requires_grad:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


def multiplied(output: Tensor, factor: Callable[[Tensor], Tensor]) -> bool:
    """Multiplies what arrives at an output by a factor; False where no hook serves.

    Args:
        output: A tensor that was made for this call alone and that nobody else holds.
        factor: From the output to the factor, which carries no graph; same shape. Asked for at once,
            as what comes behind may overwrite the output.

    >>> x = torch.ones(1, requires_grad=True)
    >>> y = x * 3
    >>> multiplied(y, lambda y: y.detach() * 2), y.item(), torch.autograd.grad(y, x)[0].item()
    (True, 3.0, 18.0)
    """
    # What overwrites a view gives its base a new graph, in which the view's hooks have no place.
    if not waits(output) or output.grad_fn is None or output._is_view() or saving_is_watched():
        return False
    by = factor(output)
    output.register_hook(lambda grad: None if grad is None else grad * by)
    return True


def delayed(output: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of an output at which what arrives is multiplied by a factor, found only if it does.

    Args:
        output: What a layer gave; its own graph stays as it is.
        factor: From the output to the factor, which carries no graph; same shape.

    >>> x = torch.ones(1, requires_grad=True)
    >>> y = delayed(x * 3, lambda y: y.detach() * 2)
    >>> y.item(), torch.autograd.grad(y, x)[0].item()
    (3.0, 18.0)
    """
    if not waits(output) or saving_is_watched():
        return attach(output, output * factor(output), fresh=True)
    held = output.clone()
    held.register_hook(_Later(partial(factor, output)))
    return held


def scaled(output: Tensor, share: float) -> Tensor:
    """What a function gave, with a share of its gradient; it may be the same tensor.

    >>> x = torch.ones(1, requires_grad=True)
    >>> y = scaled(x * 3, 0.5)
    >>> y.item(), torch.autograd.grad(y, x)[0].item()
    (3.0, 1.5)
    """
    if not waits(output) or output.grad_fn is None:
        return attach(output, output * share, fresh=True)
    # Where nothing arrives, torch says None.
    output.register_hook(lambda grad: None if grad is None else grad * share)
    return output


def passed(x: Tensor, output: Tensor) -> Tensor:
    """``x · G(y / x)``: what an elementwise function gave, relevance passing it unchanged.

    Args:
        x: The function's argument.
        output: What it gave, y, which nobody else holds.

    >>> x = torch.full((1,), 2.0, requires_grad=True)
    >>> torch.autograd.grad(passed(x, x**2), x)[0].item()
    2.0
    """
    if x.dtype != output.dtype:
        x = x.to(output.dtype)
    if x.shape != output.shape:
        x = x.expand(output.shape)
    if not waits(x) or saving_is_watched():
        if differentiated_again():
            x = x.clone()  # the product keeps it, and the model may overwrite it
        return attach(output, x * quotient(nonzero(output), nonzero(x)), fresh=True)
    # Of values that the model cannot change.
    later = _Later(partial(_quotient, x.detach().clone(), output.detach()))
    held = x.clone()
    with torch.no_grad():
        held.copy_(output)
    held.register_hook(later)
    return held


class _Later:
    """A hook that multiplies by a factor, worked out when something first arrives."""

    def __init__(self, factor: Callable[[], Tensor]) -> None:
        self._factor: Callable[[], Tensor] | Tensor = factor

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        if not isinstance(self._factor, Tensor):
            self._factor = self._factor()
        return grad * self._factor


def _quotient(x: Tensor, y: Tensor) -> Tensor:
    """``nonzero(y) / nonzero(x)``; where there are no zeros, and that can be asked, just ``y / x``."""
    if x.device.type == "cpu":
        found = y / x
        if isfinite(found.sum().item()):
            return found
    return quotient(nonzero(y), nonzero(x))
