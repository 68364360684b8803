"""Difference rules of elementwise functions, products, quotients, maxima and choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.attribution.differences.pairs import Pair, multiplier, near, rescaled
from tdhook_like.attribution.differences.tape import DifferenceRule, Tape, overwrites
from tdhook_like.attribution.path import quadrature
from tdhook_like.hooks.functional import opened
from tdhook_like.hooks.structure import leaves, mapped
from tdhook_like.hooks.surrogate import attach, constant, has_graph

__all__ = [
    "Choice",
    "Elementwise",
    "Filled",
    "Layer",
    "Opened",
    "Product",
    "Quotient",
    "Rectifier",
    "Unhandled",
    "argument",
    "unhandled",
]

Slope = Callable[[Tensor, Tensor], Tensor]
Given = tuple[tuple[Any, ...], dict[str, Any]]


def argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, other: Any
) -> Any:
    """An argument by its place or its name.

    >>> argument((1, 2), {"dim": 3}, 2, "dim", None), argument((1, 2), {}, 1, "dim", None)
    (3, 2)
    """
    return args[place] if len(args) > place else kwargs.get(name, other)


def unhandled(tape: Tape, func: Any) -> None:
    """Counts a call that no rule fits; its own gradient is followed."""
    tape.unhandled[getattr(func, "__name__", type(func).__name__).strip("_")] += 1


class Elementwise(DifferenceRule):
    """A function of each entry alone: rescaled, ``x · G(Δy / Δx)``.

    Source: Shrikumar et al. 2017, section 3.4.

    Args:
        scale: See :func:`near`.
        slope: The derivative from the argument and the result, where it is known.
    """

    fresh = True

    def __init__(self, scale: float = 1.0, slope: Slope | None = None) -> None:
        self.scale, self.slope = scale, slope

    def call(self, tape: Tape, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """As every rule does; shorter for the usual call, of one tensor."""
        if not args or not isinstance(args[0], Tensor) or overwrites(func, args, kwargs):
            return super().call(tape, name, func, args, kwargs)
        if any(isinstance(v, Tensor) for v in (*args[1:], *kwargs.values())):
            return super().call(tape, name, func, args, kwargs)
        x = args[0]
        with torch.no_grad():  # the graph that counts is the surrogate's
            output = func(*args, **kwargs)
        if tape.recording:
            tape.note(name, x, output)
            return output
        x0, before = tape.look(name, x)
        if not (torch.is_grad_enabled() and has_graph(x)):
            return output
        return attach(output, self.passed(func, x, x0, output, before, args, kwargs), fresh=True)

    def passed(
        self,
        func: Any,
        x: Tensor,
        x0: Tensor,
        output: Tensor,
        before: Tensor,
        args: Any,
        kwargs: Any,
    ) -> Tensor:
        """The surrogate, from what changes."""
        y = constant(output)
        if self.slope is None:
            rest = args[1:] if args else ()
            named = kwargs if args else {k: v for k, v in kwargs.items() if k != "input"}
            return rescaled(x, x0, y - before, lambda t: func(t, *rest, **named), self.scale)
        here = constant(x)
        still = near(here, x0, self.scale)
        return x * multiplier(y - before, here - x0, still, self.slope(here, y))

    def surrogate(
        self, tape: Tape, func: Any, output: Any, before: Any, there: Given, args: Any, kwargs: Any
    ) -> Tensor | None:
        x, x0 = next(
            (v, v0)
            for v, v0 in zip(leaves((args, kwargs)), leaves(there), strict=True)
            if isinstance(v, Tensor)
        )
        if len({id(v) for v in tape.flow.operands(args, kwargs)}) != 1 or not tape.flow.depends(x):
            unhandled(tape, func)
            return None
        x, x0 = x.to(output.dtype).expand_as(output), x0.to(output.dtype).expand_as(before)
        return self.passed(func, x, x0, output, before, args, kwargs)


class Rectifier(Elementwise):
    """ReLU: the share of the way from ``x⁰`` to ``x`` that lies above zero.

    ``Δy / Δx = max(y, y⁰) / |x − x⁰|``, 1 at most: the same as rescaling, with fewer operations, as its
    differences lose no digits.
    """

    def passed(
        self,
        func: Any,
        x: Tensor,
        x0: Tensor,
        output: Tensor,
        before: Tensor,
        args: Any,
        kwargs: Any,
    ) -> Tensor:
        """The surrogate, from what changes."""
        # Arithmetic alone, at a third of the time of comparing and choosing. Where nothing changes
        # this is ∞, or 0 / 0 at zero: the slopes above and below.
        share = torch.maximum(constant(output), before).div_((constant(x) - x0).abs_())
        return x * share.clamp_max_(1.0).nan_to_num_(nan=0.0)


class Layer(DifferenceRule):
    """A linear map or a convolution: linear, unless its weights depend on the inputs."""

    def call(self, tape: Tape, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if len(args) > 1 and (type(args[1]) is nn.Parameter or isinstance(args[1], nn.Parameter)):
            return func(*args, **kwargs)
        return _PRODUCT.call(tape, name, func, args, kwargs)


class Product(DifferenceRule):
    """A function that is affine in each operand: the mean of its gradient along the straight way.

    For two operands that change, the gradient half way: ``½(b + b⁰)`` for ``a`` and ``½(a + a⁰)``
    for ``b``, the mean of the two orders of changing them. For n operands the gradient is a
    polynomial of degree n − 1 in the position, which ⌈n / 2⌉ nodes of Gauss and Legendre integrate
    exactly. Conserves the difference: the integral of a gradient along a way is the change there.

    Args:
        degree: Of the function in what changes, where it is not the number of operands.
    """

    fresh = False

    def __init__(self, degree: int | None = None) -> None:
        self.degree = degree

    def concerns(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether more than one tensor that is no parameter takes part."""
        if self.degree is not None:
            return True
        found = 0
        for value in leaves((args, kwargs)):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                found += value.is_floating_point()
        return found > 1

    def surrogate(
        self, tape: Tape, func: Any, output: Any, before: Any, there: Given, args: Any, kwargs: Any
    ) -> Tensor | None:
        changing = [id(v) for v in tape.flow.operands(args, kwargs)]
        degree = self.degree or len(changing)
        if degree < 2:
            return None
        nodes, weights = quadrature("gausslegendre", (degree + 1) // 2)
        total: Tensor | None = None
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):

            def moved(v: Any, v0: Any, node: float = node) -> Any:
                if not isinstance(v, Tensor) or id(v) not in changing:
                    return v
                here = constant(v)
                return v + (v0 - here) * (1 - node)

            part = func(*mapped(moved, args, there[0]), **mapped(moved, kwargs, there[1]))
            part = part if weight == 1 else part * weight
            total = part if total is None else total + part
        return total


_PRODUCT = Product()


class Quotient(DifferenceRule):
    """``a / b`` as the product of ``a`` and the rescaled reciprocal of ``b``.

    Args:
        reverse: Whether the arguments are denominator, numerator.
    """

    def __init__(self, reverse: bool = False) -> None:
        self.reverse = reverse

    def concerns(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the denominator is a tensor that is no parameter."""
        below = argument(args, kwargs, 0 if self.reverse else 1, "other", None)
        return isinstance(below, Tensor) and not isinstance(below, nn.Parameter)

    def surrogate(
        self, tape: Tape, func: Any, output: Any, before: Any, there: Given, args: Any, kwargs: Any
    ) -> Tensor | None:
        if kwargs.get("rounding_mode") is not None:
            unhandled(tape, func)
            return None
        ends = []
        for given, named in ((args, kwargs), there):
            first, second = given[0], argument(given, named, 1, "other", None)
            ends.append((second, first) if self.reverse else (first, second))
        (above, below), (above0, below0) = ends
        if not tape.flow.depends(below):
            return None
        inverse = Pair(below, below0).map(torch.reciprocal, scale=0.0)
        if not isinstance(above, Tensor):
            return inverse.x * above
        return (Pair(above, above0) * inverse).x


class Choice(DifferenceRule):
    """``where`` and ``masked_fill``: where both runs choose alike, what is chosen passes its own.

    Where they do not, the whole difference is carried by the operand that is chosen at the input, or
    by the other one if that does not change. For a function that is written out by hand, such as
    ``where(x > 0, x, 0.01 * x)``, this is the rescale rule.
    """

    def surrogate(
        self, tape: Tape, func: Any, output: Any, before: Any, there: Given, args: Any, kwargs: Any
    ) -> Tensor | None:
        here, past = _options(args, kwargs), _options(*there)
        if here is None or past is None:
            unhandled(tape, func)
            return None
        (mask, one, other), (mask0, one0, other0) = here, past
        one, other, one0, other0 = (
            torch.as_tensor(v, dtype=output.dtype, device=output.device).expand_as(output)
            for v in (one, other, one0, other0)
        )
        chosen, left = torch.where(mask, one, other), torch.where(mask, other, one)
        chosen0, left0 = torch.where(mask, one0, other0), torch.where(mask, other0, one0)
        change = constant(output) - before
        still = near(constant(chosen), chosen0, 0.0)
        by_chosen = chosen * multiplier(change, constant(chosen) - chosen0, still, 1.0)
        none = near(constant(left), left0, 0.0)
        by_left = left * multiplier(change, constant(left) - left0, none, 0.0)
        differently = torch.where(still, by_left, by_chosen)
        return torch.where(mask == mask0, chosen, differently)


class Opened(DifferenceRule):
    """A function made of others in Python, seen through.

    Args:
        body: What runs in its place; its own body if None.
    """

    def __init__(self, body: Callable[..., Any] | None = None) -> None:
        self.body = body

    def call(self, tape: Tape, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        body = opened(func) if self.body is None else self.body
        with tape.mode:
            return body(*args, **kwargs)


class Unhandled(DifferenceRule):
    """Not linear, and nobody knows better: its gradient is followed, and that is counted."""

    def concerns(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return False

    def call(self, tape: Tape, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        result = super().call(tape, name, func, args, kwargs)
        if not tape.recording and tape.flow.operands(args, kwargs):
            for value in leaves(result):
                if isinstance(value, Tensor) and tape.flow.depends(value):
                    tape.unhandled[name] += 1
                    break
        return result


def _options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, Any] | None:
    """The mask, what stands where it is true, and what elsewhere."""
    given = [*args, *kwargs.values()]
    if len(given) != 3:
        return None
    first, second, third = given
    if isinstance(first, Tensor) and first.dtype == torch.bool:
        return first, second, third  # torch.where(mask, a, b)
    if not isinstance(second, Tensor) or second.dtype != torch.bool:
        return None
    return second, first, third  # a.where(mask, b)


class Filled(Choice):
    """``masked_fill``."""

    def surrogate(
        self, tape: Tape, func: Any, output: Any, before: Any, there: Given, args: Any, kwargs: Any
    ) -> Tensor | None:
        def turned(args: Any, kwargs: Any) -> Any:
            x, mask, value = (*args, *kwargs.values())
            return (~mask, x, value)

        past = turned(*there), {}
        return super().surrogate(tape, func, output, before, past, turned(args, kwargs), {})
