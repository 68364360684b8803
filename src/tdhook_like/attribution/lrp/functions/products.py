"""Function rules of products and quotients: who gets what of the relevance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.functions.elementwise import Passed
from tdhook_like.attribution.lrp.functions.kinship import nearest, record
from tdhook_like.attribution.lrp.functions.operations import (
    Followed,
    FunctionRule,
    out_of_place,
    writes,
)
from tdhook_like.hooks.arrival import passed, scaled
from tdhook_like.hooks.structure import mapped
from tdhook_like.hooks.surrogate import constant

__all__ = ["Product", "Quotient", "Sum", "shared"]


class Product(FunctionRule):
    """Products of n operands that depend on the inputs share relevance evenly: ``y / n``.

    For everything linear in each operand: ``a * b``, matrix products, einsum. A scale (the result of
    ``rsqrt``, ``reciprocal``, a negative power) that meets another operand is constant, as are
    gates where the signal takes all. A product of functions of the same tensor, entry by entry, is
    an activation written out by hand: relevance passes to that tensor.

    Source: Achtibat et al. 2024, eq. 15, and 9 for activations; Arras et al. 2017 for gates.

    Args:
        signal: Whether a gate, the result of an activation function, is constant beside a signal.
        entrywise: Whether it multiplies entry by entry.
    """

    fresh = True

    def __init__(self, signal: bool = False, entrywise: bool = False) -> None:
        self.signal, self.entrywise = signal, entrywise

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        operands = flow.operands(args, kwargs)
        if len(operands) < 2:
            result = func(*args, **kwargs)
            if operands and self.entrywise:
                flow.follow(operands[0], result)
                record(flow.mode, result, operands)
            return result
        fixed = self._fixed(flow, operands)
        if fixed:
            return self._beside(flow, name, func, args, kwargs, fixed)
        if self.entrywise and operands[0] is not operands[1] and not writes(func, args, kwargs):
            kin = nearest(flow.mode, operands)
            if kin is not None:
                return _OfOne(kin).replaced(flow, name, func, args, kwargs, operands)
        return self.replaced(flow, name, func, args, kwargs, operands)

    def _fixed(self, flow: Flow, operands: list[Tensor]) -> list[Tensor]:
        for what in ("scale", "gate") if self.signal else ("scale",):
            found = [value for value in operands if flow.marked(what, value)]
            if found and len(found) < len(operands):
                return found
        return []

    def _beside(
        self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any, fixed: list[Tensor]
    ) -> Any:
        """The product with some operands held constant."""
        flow.applied[name] += 1
        held = {id(value) for value in fixed}
        target = args[0] if args and writes(func, args, kwargs) and id(args[0]) in held else None
        args, kwargs = mapped(
            lambda value: constant(value) if id(value) in held else value, (args, kwargs)
        )
        if target is None:
            return self.call(flow, name, func, args, kwargs)
        # What it overwrites is held constant: the result takes its place all the same.
        return target.copy_(self.call(flow, name, out_of_place(func), args, kwargs))

    def ruled(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if flow.recorder is not None:
            return super().ruled(flow, name, func, args, kwargs)
        return scaled(func(*args, **kwargs), 1 / len(flow.operands(args, kwargs)))

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return output * (1 / len(flow.operands(args, kwargs)))


class _OfOne(FunctionRule):
    """Elementwise in a tensor that is not among the arguments: relevance passes to that."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def ruled(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        x, output = self._x, func(*args, **kwargs)
        if flow.recorder is None:
            result = passed(x, output)
        else:
            x = flow.recorder.function_reads(x, flow)
            surrogate = passed(x, output)
            result = flow.recorder.function_gives(name, Passed(), surrogate)
        record(flow.mode, result, [self._x])
        return result


class Sum(Followed):
    """A sum and a product in one (``addmm``, ``linear`` with weights that depend on the inputs).

    The operands of the product share their part of relevance; the summand keeps its own.

    Args:
        factors: Names of the product's operands and their places among the arguments.
    """

    def __init__(self, factors: Mapping[str, int]) -> None:
        super().__init__()
        self._factors = dict(factors)

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        places = {i for i in self._factors.values() if i < len(args) and flow.depends(args[i])}
        keys = {key for key in self._factors if key in kwargs and flow.depends(kwargs[key])}
        n = len(places) + len(keys)
        if n < 2:
            return super().call(flow, name, func, args, kwargs)
        flow.applied[name] += 1

        def sharing(*args: Any, **kwargs: Any) -> Any:
            given = [shared(x, 1 / n) if i in places else x for i, x in enumerate(args)]
            named = {key: shared(x, 1 / n) if key in keys else x for key, x in kwargs.items()}
            return func(*given, **named)

        sharing.__name__ = func.__name__  # which tells whether it overwrites its argument
        return super().call(flow, name, sharing, args, kwargs)


class Quotient(FunctionRule):
    """A denominator that depends on the inputs is constant beside a numerator that does.

    This is how normalisers written out by hand are read: ``x / x.norm()``. Below a constant numerator
    relevance passes to the denominator, and the result is remembered as a scale.

    Source: Ali et al. 2022, eq. 10, for normalisers.

    Args:
        reverse: Whether the arguments are denominator, numerator.
    """

    def __init__(self, reverse: bool = False) -> None:
        self.reverse = reverse

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("rounding_mode") is not None:
            return func(*args, **kwargs)  # in steps: nothing flows
        given = [*args, *(kwargs[key] for key in ("input", "other") if key in kwargs)]
        above, below = reversed(given[:2]) if self.reverse else given[:2]
        if not flow.depends(below):
            result = func(*args, **kwargs)
            if flow.depends(above):
                flow.follow(above, result)
                record(flow.mode, result, [above])
            return result
        if not flow.depends(above):
            return _SCALE.call(flow, name, func, args, kwargs)
        flow.applied[name] += 1
        fixed = constant(below)
        if above is below:  # all ones
            result = func(*((fixed, above) if self.reverse else (above, fixed)))
        else:
            args, kwargs = mapped(lambda value: fixed if value is below else value, (args, kwargs))
            result = func(*args, **kwargs)
        flow.follow(above, result)
        return result


_SCALE = Passed("scale")


def shared(x: Tensor, share: float) -> Tensor:
    """``x``, with a share of its gradient.

    >>> import torch
    >>> x = torch.ones(1, requires_grad=True)
    >>> y = shared(x, 0.5)
    >>> y.item(), torch.autograd.grad(y, x)[0].item()
    (1.0, 0.5)
    """
    return scaled(x.view_as(x), share)
