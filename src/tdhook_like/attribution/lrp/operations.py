"""Function rules: how relevance passes through operations that no module stands for."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.batchnorm import behind, scale_and_shift
from tdhook_like.attribution.lrp.normalised import batch_norm
from tdhook_like.errors import RuleError
from tdhook_like.hooks.functional import opened
from tdhook_like.hooks.structure import mapped
from tdhook_like.hooks.surrogate import attach, constant, has_graph, nonzero, quotient

__all__ = [
    "Attention",
    "BatchNormalised",
    "Followed",
    "FunctionRule",
    "GatedLinear",
    "Normalised",
    "Opened",
    "Passed",
    "Power",
    "Product",
    "Quotient",
    "Reduced",
    "Softmax",
    "Sum",
    "Unhandled",
]

Surrogate = Callable[..., Tensor | None]


class FunctionRule:
    """How relevance passes through a torch function. Holds no per-call state.

    Override :meth:`surrogate`.

    >>> class Halved(FunctionRule):
    ...     def surrogate(self, flow, output, x, *args, **kwargs):
    ...         return output / 2
    >>> Halved()
    Halved()
    """

    #: Whether the surrogate is made for the call and does not keep its result for the backward pass.
    fresh: ClassVar[bool] = False

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """An expression in the arguments, of ``output``'s shape, that is differentiated.

        Args:
            flow: Knows which operands depend on the explained inputs: ``flow.depends(x)``.
            output: What the function gave, connected to the graph.
            args: Its arguments. One that the function overwrites is given as it was before.
            kwargs: Its keyword arguments.

        Returns:
            The surrogate, or None for the output's own gradient.
        """
        raise RuleError(f"{type(self).__name__} must override surrogate(flow, output, *args).")

    def call(
        self, flow: Flow, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls the function; its result with this rule's gradient."""
        if not flow.operands(args, kwargs):
            return func(*args, **kwargs)
        if type(self) is not Followed and type(self) is not Sum:
            flow.applied[name] += 1
        kept, written = args, _writes(func, args, kwargs)
        if written:
            kept = (args[0].clone(), *args[1:])
        if flow.recorder is not None:
            args, kept = flow.recorder.function_inputs(args, kept, written, flow.depends)
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor):
            return output
        surrogate = self.surrogate(flow, output, *kept, **kwargs)
        if surrogate is None and written and flow.recorder is not None:
            surrogate = _unwritten(func)(*kept, **kwargs)  # out of place, so that it can be watched
        result = output if surrogate is None else self._attached(name, output, surrogate)
        if flow.recorder is not None:
            held = result
            result = flow.recorder.function(name, self, kept, result, surrogate)
            surrogate = surrogate if result is held else result
        if written and output is args[0]:
            return output if surrogate is None else output.copy_(result)
        return result

    def _attached(self, name: str, output: Tensor, surrogate: Tensor) -> Tensor:
        if not isinstance(surrogate, Tensor) or surrogate.shape != output.shape:
            got = tuple(surrogate.shape) if isinstance(surrogate, Tensor) else type(surrogate)
            raise RuleError(
                f"{type(self).__name__} on {name}() gave a surrogate of shape {got} for an output of "
                f"shape {tuple(output.shape)}."
            )
        return attach(output, surrogate, fresh=self.fresh)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Passed(FunctionRule):
    """Relevance passes an elementwise function unchanged: ``x · G(y / x)``.

    Source: Achtibat et al. 2024, eq. 9.

    Args:
        marks: What the result is remembered as: ``"gate"`` or ``"scale"``, or None.
    """

    fresh = True

    def __init__(self, marks: str | None = None) -> None:
        self.marks = marks

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        result = super().call(flow, name, func, args, kwargs)
        if self.marks:
            flow.mark(self.marks, result)
        return result

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        x = next(value for value in (*args, *kwargs.values()) if flow.depends(value))
        if x.dtype != output.dtype:
            x = x.to(output.dtype)
        if x.shape != output.shape:
            x = x.expand(output.shape)
        return x * quotient(nonzero(output), nonzero(x))


class Power(Passed):
    """Powers of a constant exponent pass; negative ones are remembered as scales.

    Where the exponent depends on the inputs, relevance follows the gradient.
    """

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        exponent = kwargs.get("exponent", args[1] if len(args) > 1 else None)
        if flow.depends(exponent):
            return Unhandled().call(flow, name, func, args, kwargs)
        result = super().call(flow, name, func, args, kwargs)
        if isinstance(exponent, int | float) and exponent < 0:
            flow.mark("scale", result)
        return result


class Product(FunctionRule):
    """Products of n operands that depend on the inputs share relevance evenly: ``y / n``.

    For everything linear in each operand: ``a * b``, matrix products, einsum. A scale (the result of
    ``rsqrt``, ``reciprocal``, a negative power) that meets another operand is constant, as are
    gates where the signal takes all.

    Source: Achtibat et al. 2024, eq. 15; Arras et al. 2017 for gates.

    Args:
        signal: Whether a gate, the result of an activation function, is constant beside a signal.
    """

    fresh = True

    def __init__(self, signal: bool = False) -> None:
        self.signal = signal

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        operands = flow.operands(args, kwargs)
        if len(operands) < 2:
            result = func(*args, **kwargs)
            for operand in operands:
                flow.follow(operand, result)
            return result
        fixed = self._fixed(flow, operands)
        if not fixed:
            return super().call(flow, name, func, args, kwargs)
        flow.applied[name] += 1
        if fixed[0] is args[0] and _writes(func, args, kwargs):
            # What it overwrites is held constant: the result takes its place all the same.
            return args[0].copy_(_unwritten(func)(constant(args[0]), *args[1:], **kwargs))
        held = {id(value) for value in fixed}
        hold = lambda value: constant(value) if id(value) in held else value  # noqa: E731
        return Product(self.signal).call(flow, name, func, mapped(hold, args), mapped(hold, kwargs))

    def _fixed(self, flow: Flow, operands: list[Tensor]) -> list[Tensor]:
        for what in ("scale", "gate") if self.signal else ("scale",):
            found = [value for value in operands if flow.marked(what, value)]
            if found and len(found) < len(operands):
                return found
        return []

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return output * (1 / len(flow.operands(args, kwargs)))


class Followed(FunctionRule):
    """Linear, or picking entries: the function's own gradient is the rule.

    Constants that take part (a bias, positions, a mask) absorb their part, which the ledger shows.
    """

    absorbs = "constant"

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if flow.recorder is not None:
            result = super().call(flow, name, func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if args:
            flow.follow(args[0], result)
        return result

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return None

    def __repr__(self) -> str:
        return ""


class Sum(Followed):
    """A sum and a product in one (``addmm``, ``linear`` with weights that depend on the inputs).

    The operands of the product share their part of relevance; the summand keeps its own.

    Args:
        factors: The places of the product's operands among the arguments.
    """

    def __init__(self, *factors: int) -> None:
        self.factors = factors

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        inside = [i for i in self.factors if i < len(args) and flow.depends(args[i])]
        if len(inside) > 1:
            flow.applied[name] += 1
            share = 1 / len(inside)
            args = tuple(_shared(a, share) if i in inside else a for i, a in enumerate(args))
        return super().call(flow, name, func, args, kwargs)


class Quotient(FunctionRule):
    """A denominator that depends on the inputs is constant beside a numerator that does.

    This is how normalisers written out by hand are read: ``x / x.norm()``. Below a constant numerator
    relevance passes to the denominator, and the result is remembered as a scale.

    Source: Ali et al. 2022, eq. 10, for normalisers.

    Args:
        reverse: Whether the arguments are denominator, numerator.
    """

    fresh = True

    def __init__(self, reverse: bool = False) -> None:
        self.reverse = reverse

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        above, below = (args[1], args[0]) if self.reverse else (args[0], args[1])
        if not flow.depends(below):
            result = func(*args, **kwargs)
            flow.follow(above, result)
            return result
        if not flow.depends(above):
            result = Passed("scale").call(flow, name, func, args, kwargs)
            return result
        flow.applied[name] += 1
        below = constant(below)
        return func(*((below, above) if self.reverse else (above, below)), **kwargs)


class Softmax(FunctionRule):
    """Softmax: its gradient is AttnLRP's rule in this signal; or constant, as in CP-LRP.

    Source: Achtibat et al. 2024, eq. 13; Ali et al. 2022, eq. 9, where constant.

    Args:
        fixed: Whether it is held constant.
    """

    absorbs = "softmax"

    def __init__(self, fixed: bool = False) -> None:
        self.fixed = fixed

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return constant(output) if self.fixed else None


class Attention(FunctionRule):
    """Scaled dot-product attention as the two products and the softmax that it is made of.

    Queries and keys share what reaches the weights, weights and values share what reaches the
    output. In terms of the operands' gradients: a quarter, a quarter and a half, without a second
    evaluation. Held constant, the weights pass nothing.

    Source: Achtibat et al. 2024, section 3.3; Ali et al. 2022, eq. 9, where constant.

    Args:
        fixed: Whether the attention weights are constant.
    """

    absorbs = "softmax"

    def __init__(self, fixed: bool = False) -> None:
        self.fixed = fixed

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        given = dict(zip(("query", "key", "value"), args, strict=False))
        rest = args[len(given) :]
        given |= {key: kwargs.pop(key) for key in ("query", "key", "value") if key in kwargs}
        q, k, v = given["query"], given["key"], given["value"]
        by_q, by_k, by_v = (flow.depends(t) for t in (q, k, v))
        if not (by_q or by_k or by_v):
            return func(q, k, v, *rest, **kwargs)
        flow.applied[name] += 1
        if flow.recorder is not None:
            q, k, v = flow.recorder.function_inputs((q, k, v), (q, k, v), False, flow.depends)[1]
        if self.fixed:
            q, k = constant(q), constant(k)
        else:
            weights = 0.5 if by_v else 1.0
            each = weights / 2 if by_q and by_k else weights
            q = _shared(q, each) if by_q and each != 1 else q
            k = _shared(k, each) if by_k and each != 1 else k
            v = _shared(v, 0.5) if by_v and (by_q or by_k) else v
        output = func(q, k, v, *rest, **kwargs)
        if flow.recorder is not None:
            output = flow.recorder.function(name, self, (), output, None)
        return output


class GatedLinear(FunctionRule):
    """``a · σ(b)``, the halves of its input: a gate and its signal.

    Args:
        signal: Whether the gate is constant; else relevance is halved, and passes the sigmoid.
    """

    fresh = True

    def __init__(self, signal: bool = False) -> None:
        self.signal = signal

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        x, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else -1)
        a, b = x.chunk(2, dim)
        gate = constant(b).sigmoid()
        if self.signal:
            return a * gate
        passed = b * quotient(nonzero(gate), nonzero(b))
        return (a * gate + constant(a) * passed) * 0.5


class Reduced(FunctionRule):
    """A product over entries of one tensor, and other functions homogeneous of a known degree.

    Euler: ``Σ x ∂y/∂x = degree · y``, so the gradient over the degree conserves relevance.
    """

    fresh = True

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return output * 0.5


class Normalised(FunctionRule):
    """A normalisation with its statistics held constant.

    Source: Ali et al. 2022, eq. 10; Achtibat et al. 2024, proposition 3.4.

    Args:
        linear: From the function's arguments to the normalisation, linear in the first.
    """

    def __init__(self, linear: Surrogate) -> None:
        self.linear = linear

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return self.linear(flow, output, *args, **kwargs)


class BatchNormalised(FunctionRule):
    """Batch normalisation: part of the layer whose output it is called with, else affine.

    Source: Hui & Binder 2019, section 3; see :class:`BatchNormRule`.
    """

    absorbs = "bias"

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
        given = {**dict(zip((*names, "momentum", "eps"), args, strict=False)), **kwargs}
        given.pop("momentum", None)
        given.pop("cudnn_enabled", None)
        x, mean, variance = (given[name] for name in names[:3])
        if given.get("training") or mean is None:
            return batch_norm(flow, output, **{**given, "training": True})
        weight, bias = given.get("weight"), given.get("bias")
        scale, shift = scale_and_shift(mean, variance, weight, bias, given.get("eps", 1e-5))
        found = behind(flow, x, output, scale, shift)
        if found is None:
            flow.normalised(output, x, scale, shift)
        return found


class Opened(FunctionRule):
    """A function made of others in Python, seen through: its parts have rules of their own."""

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        mode = flow.mode
        if mode is None:
            return func(*args, **kwargs)
        with mode:
            return opened(func)(*args, **kwargs)


class Unhandled(FunctionRule):
    """Non-linear, and nobody knows better: follows the gradient, and is reported."""

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        operands = flow.operands(args, kwargs)
        result = func(*args, **kwargs)
        for value in _tensors(result) if operands else ():
            if isinstance(value, Tensor) and has_graph(value):
                flow.missing(name, value)
        return result


def _shared(x: Tensor, share: float) -> Tensor:
    """``x``, with a share of its gradient."""
    return attach(x, x * share, fresh=True)


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function may overwrite its first argument."""
    name = getattr(func, "__name__", "")
    if name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"):
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    flag = kwargs.get("inplace", False) is True
    return flag or (isinstance(func, types.FunctionType) and any(a is True for a in args[1:]))


def _unwritten(func: Any) -> Any:
    """The function on a copy of its first argument."""
    return lambda x, *args, **kwargs: func(x.clone(), *args, **kwargs)


def _tensors(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else [result]
