"""The principle: a rule is a surrogate gradient.

A *surrogate* is an ordinary torch expression that takes the place of a submodule's output in the
backward pass only. What flows backward is relevance per unit of activation, ``g = R / activation``,
so that relevance is ``activation × gradient`` wherever one looks. This file holds the four words in
which every rule is written: :func:`attach`, :func:`nonzero`, :func:`stabilised` and :func:`unit`.

It knows nothing of modules' hooks, of TensorDict or of methods.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

__all__ = [
    "Twice",
    "attach",
    "constant",
    "differentiated_again",
    "finite",
    "has_graph",
    "nonzero",
    "quotient",
    "ratio",
    "scale_gradient",
    "stabilised",
    "tiny",
    "unit",
    "unwrapped",
]


class Twice:
    """A block in which surrogates are made so that relevance can itself be differentiated.

    The backward pass that finds relevance follows surrogates and takes what :func:`constant` gives
    for constant. The pass that differentiates relevance must follow the true values of both. One
    graph serves the two: its nodes look at :attr:`relevance`, which says which pass is running.

    Attributes:
        relevance: Whether a backward pass now is the one that finds relevance.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> with Twice() as twice:
    ...     y = x * constant(x)
    >>> twice.relevance = True
    >>> torch.autograd.grad(y, x, retain_graph=True)[0]
    tensor(3.)
    >>> twice.relevance = False
    >>> torch.autograd.grad(y, x)[0]
    tensor(6.)
    """

    def __init__(self) -> None:
        self.relevance = False

        self._outer: Twice | None = None

    def __enter__(self) -> Twice:
        self._outer = getattr(_LOCAL, "twice", None)
        _LOCAL.twice = self
        return self

    def __exit__(self, *error: object) -> None:
        if getattr(_LOCAL, "twice", None) is self:
            _LOCAL.twice, self._outer = self._outer, None


_LOCAL = threading.local()


def _twice() -> Twice | None:
    return None if torch.compiler.is_compiling() else getattr(_LOCAL, "twice", None)


def differentiated_again() -> bool:
    """Whether surrogates are made inside :class:`Twice` at the moment, in this thread.

    >>> with Twice():
    ...     differentiated_again()
    True
    """
    return _twice() is not None


def unwrapped(t: Tensor) -> tuple[Tensor, list[int]]:
    """What function transforms have wrapped a tensor around, and where vmap put its dimensions.

    Inside vmap a tensor does not say that it has a graph; the one inside does.

    >>> torch.vmap(lambda x: unwrapped(x)[0].shape[0] * x)(torch.ones(3))
    tensor([3., 3., 3.])
    """
    places = []
    while torch._C._functorch.is_functorch_wrapped_tensor(t):  # pyright: ignore[reportAttributeAccessIssue]
        if torch._C._functorch.is_batchedtensor(t):  # pyright: ignore[reportAttributeAccessIssue]
            places.append(torch._C._functorch.maybe_get_bdim(t))  # pyright: ignore[reportAttributeAccessIssue]
        t = torch._C._functorch.get_unwrapped(t)  # pyright: ignore[reportAttributeAccessIssue]
    return t, places


def has_graph(t: Tensor) -> bool:
    """Whether gradients flow through a tensor, also inside function transforms.

    >>> has_graph(torch.ones(1)), has_graph(torch.ones(1, requires_grad=True))
    (False, True)
    """
    if t.requires_grad:
        return True
    if torch.compiler.is_compiling():
        return _traced_graph(t)
    while torch._C._functorch.is_functorch_wrapped_tensor(t):  # pyright: ignore[reportAttributeAccessIssue]
        # vmap inside of vjp: no level but that of vjp knows.
        t = torch._C._functorch.get_unwrapped(t)  # pyright: ignore[reportAttributeAccessIssue]
        if t.requires_grad:
            return True
    return False


def _traced_graph(t: Tensor) -> bool:
    """The same where torch compiles, of whose look inside tensors only this much can be traced."""
    if not torch._C._functorch.is_batchedtensor(t):  # pyright: ignore[reportAttributeAccessIssue]
        return False
    level = retrieve_current_functorch_interpreter().level()
    while level > 0 and torch._C._functorch.is_batchedtensor(t):  # pyright: ignore[reportAttributeAccessIssue]
        t, _ = torch._C._functorch._unwrap_batched(t, level)  # pyright: ignore[reportAttributeAccessIssue]
        if t.requires_grad:
            return True
        level -= 1
    return False


def constant(t: Tensor) -> Tensor:
    """``t`` as a constant of the relevance pass: ``G(t)`` of the formulas. Same shape as ``t``.

    Use it in a surrogate where ``detach()`` would stand, and relevance stays differentiable inside
    :class:`Twice`.

    >>> constant(torch.tensor(1.0, requires_grad=True)).requires_grad
    False
    """
    twice = _twice()
    if twice is None or not t.requires_grad:
        return t.detach()
    return _Constant.apply(t, twice)  # pyright: ignore[reportReturnType]


class _Constant(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, twice: Twice) -> Tensor:  # pyright: ignore
        return t.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.twice = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:  # pyright: ignore
        return (None if ctx.twice.relevance else grad), None


class _Attached(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, surrogate: Tensor, twice: Twice) -> Tensor:  # pyright: ignore
        return output.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.twice = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore
        return (None, grad, None) if ctx.twice.relevance else (grad, None, None)


def tiny(dtype: torch.dtype) -> float:
    """The power of two that stands for an exact zero in a division, for ``dtype``.

    Multiplying and dividing by a power of two is exact, so relevance that a rule gives to a zero
    activation comes back to the last bit. float16 has five exponent bits, so its stand-in is larger.

    >>> tiny(torch.float32) == 2.0**-60, tiny(torch.float16) == 2.0**-12
    (True, True)
    """
    return 2.0**-12 if dtype == torch.float16 else 2.0**-60


def nonzero(t: Tensor) -> Tensor:
    """``t`` without its graph, zeros (all below :func:`tiny`) replaced by it. Same shape as ``t``.

    >>> nonzero(torch.tensor([0.0, -2.0])) == torch.tensor([2.0**-60, -2.0])
    tensor([True, True])
    """
    t = constant(t)
    # Sizes and signs apart: comparing and choosing takes torch several times as long. Adding zero
    # makes a positive zero of a negative one.
    return torch.copysign(t.abs().clamp(min=tiny(t.dtype)), t + 0.0)


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """``z + ε·sign(z)`` without its graph, with ``sign(0) = +1``. Same shape as ``z``.

    >>> stabilised(torch.tensor([0.0, -1.0]), 0.5)
    tensor([ 0.5000, -1.5000])
    """
    z = constant(z)
    if z.dtype == torch.float16:
        epsilon = max(epsilon, 1e-3)  # what a zero is divided by must leave room up to 65504
    return torch.copysign(z.abs() + epsilon, z + 0.0)


def ratio(y: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """``nonzero(y) / stabilised(z)``, within what the dtype holds. No graph; same shape.

    >>> ratio(torch.tensor([2.0]), torch.tensor([4.0]), 1e-6)
    tensor([0.5000])
    """
    return quotient(nonzero(y), stabilised(z, epsilon))


def quotient(y: Tensor, z: Tensor) -> Tensor:
    """``y / z`` of two constants, within what the dtype holds; ``y`` is overwritten where it may be.

    >>> quotient(torch.tensor([1.0]), torch.tensor([4.0]))
    tensor([0.2500])
    """
    return finite(y / z if y.requires_grad or z.requires_grad else y.div_(z))


def finite(factor: Tensor) -> Tensor:
    """A factor without what infinities leave (masks of -inf, half precision); in place where it may.

    Nothing arrives where they stand, but zero times NaN is not zero.
    """
    if factor.requires_grad:
        return factor.nan_to_num(nan=0.0)
    return factor.nan_to_num_(nan=0.0)


def unit(x: Tensor) -> Tensor:
    """Ones of ``x``'s shape whose gradient with respect to ``x`` is ``1 / nonzero(x)``.

    A rule that shares relevance out regardless of activations (flat, w², pass) reads these ones.

    >>> x = torch.tensor([2.0, 0.0], requires_grad=True)
    >>> unit(x)
    tensor([1., 1.], grad_fn=<DivBackward0>)
    """
    filled = nonzero(x)
    return (x + (filled - constant(x))) / filled


def attach(output: Tensor, surrogate: Tensor, *, fresh: bool = False) -> Tensor:
    """A tensor with the value of ``output``, bit for bit, and the gradient of ``surrogate``.

    Args:
        output: What flows forward; any shape.
        surrogate: What is differentiated; same shape as ``output``.
        fresh: Whether ``surrogate`` is the result of an operation that does not keep its result for
            the backward pass (a product, a sum), made for this call alone. It is then overwritten
            instead of copied.

    The value is copied under ``no_grad``: adding and subtracting would lose the sign of zeros and
    turn infinities into NaN, and a custom autograd function costs more than both copies.

    >>> w = torch.tensor(3.0, requires_grad=True)
    >>> y = attach(w * 2, w * 5)
    >>> y.item(), torch.autograd.grad(y, w)[0].item()
    (6.0, 5.0)
    """
    if surrogate.dtype != output.dtype:  # autocast: the parts of one rule may differ in precision
        surrogate, fresh = surrogate.to(output.dtype), False
    twice = _twice()
    if twice is not None:
        return _Attached.apply(output, surrogate, twice)  # pyright: ignore[reportReturnType]
    held = surrogate if fresh and surrogate.requires_grad else surrogate.clone()
    with torch.no_grad():
        held.copy_(output)
    return held


def scale_gradient(z: Tensor, factor: Tensor, output: Tensor) -> Tensor:
    """``output`` in value, ``z · G(factor)`` in gradient: the form that most rules take.

    Args:
        z: The expression that shares relevance out; any shape.
        factor: What scales it to ``output``; carries no graph; same shape.
        output: What flows forward; same shape.

    >>> w = torch.tensor(3.0, requires_grad=True)
    >>> y = scale_gradient(w * 2, torch.tensor(0.5), w * 2)
    >>> y.item(), torch.autograd.grad(y, w)[0].item()
    (6.0, 1.0)
    """
    return attach(output, z * factor, fresh=True)
