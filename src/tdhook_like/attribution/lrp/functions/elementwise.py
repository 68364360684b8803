"""Function rules of elementwise functions, and of those that scale with their operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.functions.kinship import record
from tdhook_like.attribution.lrp.functions.operations import FOLLOWED, UNHANDLED, FunctionRule
from tdhook_like.hooks.arrival import passed

__all__ = ["Clamped", "Homogeneous", "Passed", "Power"]


class Passed(FunctionRule):
    """Relevance passes an elementwise function unchanged: ``x · G(y / x)``. Conserves everything.

    Where two operands depend on the inputs, or one is complex, relevance follows the gradient, which
    is reported.

    Source: Achtibat et al. 2024, eq. 9.

    Args:
        marks: What the result is remembered as: ``"gate"`` or ``"scale"``, or None.
    """

    def __init__(self, marks: str | None = None) -> None:
        self._marks = marks

    def replaced(
        self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any, operands: list[Tensor]
    ) -> Any:
        if len(operands) > 1 or operands[0].is_complex():
            return UNHANDLED.call(flow, name, func, args, kwargs)
        result = super().replaced(flow, name, func, args, kwargs, operands)
        record(flow.mode, result, operands)
        if self._marks is not None:
            flow.mark(self._marks, result)
        return result

    def ruled(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if flow.recorder is not None:
            return super().ruled(flow, name, func, args, kwargs)
        x = next(value for value in (*args, *kwargs.values()) if flow.depends(value))
        return passed(x, func(*args, **kwargs))

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        x = next(value for value in (*args, *kwargs.values()) if flow.depends(value))
        return passed(x, output)


class Power(Passed):
    """Powers pass, of whichever of base and exponent depends on the inputs.

    Negative powers are remembered as scales: they normalise what they are multiplied with.
    """

    def replaced(
        self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any, operands: list[Tensor]
    ) -> Any:
        result = super().replaced(flow, name, func, args, kwargs, operands)
        exponent = kwargs.get("exponent", args[1] if len(args) > 1 else None)
        if isinstance(exponent, int | float) and exponent < 0:
            flow.mark("scale", result)
        return result


class Clamped(Passed):
    """Between fixed bounds relevance passes; a bound that depends on the inputs is picked or not."""

    def replaced(
        self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any, operands: list[Tensor]
    ) -> Any:
        x = args[0] if args else kwargs.get("input")
        if len(operands) > 1 or operands[0] is not x:
            return FOLLOWED.call(flow, name, func, args, kwargs)
        return super().replaced(flow, name, func, args, kwargs, operands)


class Homogeneous(FunctionRule):
    """Of degree d in its operands together: ``y / d``, which conserves everything.

    Euler: ``Σ x ∂y/∂x = d · y``. A product over the n entries of a tensor is of degree n, so that
    each gets an even share; a variance is of degree 2.

    Args:
        degree: From the function's arguments to d: a number, a tensor that broadcasts to the output,
            or None where the output does not depend on the operands. Outputs behind the first are
            linear.
    """

    fresh = True

    def __init__(self, degree: Callable[..., Any]) -> None:
        self._degree = degree

    def surrogate(self, flow: Flow, output: Any, *args: Any, **kwargs: Any) -> Any:
        first, *rest = [output] if isinstance(output, Tensor) else output
        degree = self._degree(*args, **kwargs)
        found = None if degree is None else first * (1 / degree)
        return found if isinstance(output, Tensor) else (found, *[None] * len(rest))
