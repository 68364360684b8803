"""Function rules: how relevance passes through operations that no module stands for."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.functions.kinship import is_known, record
from tdhook_like.attribution.lrp.ledger.recorder import MOVES
from tdhook_like.attribution.lrp.names import spoken
from tdhook_like.errors import RuleError
from tdhook_like.hooks.functional import opened
from tdhook_like.hooks.structure import cloned, leaves
from tdhook_like.hooks.surrogate import attach, has_graph

__all__ = [
    "FOLLOWED",
    "UNHANDLED",
    "Added",
    "Carried",
    "Composed",
    "Followed",
    "FunctionRule",
    "Opened",
    "Unhandled",
    "out_of_place",
    "writes",
]


class FunctionRule:
    """How relevance passes through a torch function. Holds no per-call state.

    Override :meth:`surrogate`, and give it to ``FunctionRules(rules={"softmax": Halved()})``.

    >>> class Halved(FunctionRule):
    ...     def surrogate(self, flow, output, x, *args, **kwargs):
    ...         return output / 2
    >>> Halved()
    Halved()
    """

    #: Whether the surrogate is made for the call and its last operation does not keep its result, as
    #: sums and products don't; it may then be overwritten instead of copied.
    fresh: ClassVar[bool] = False
    #: What the ledger calls the relevance that is not given on.
    absorbs: ClassVar[str | None] = None
    #: Whether its calls are counted, and shown by ``print(context)``.
    counts: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        # What a class says of its surrogate does not hold for that of a subclass.
        if "surrogate" in vars(cls) and "fresh" not in vars(cls):
            cls.fresh = False

    def surrogate(self, flow: Flow, output: Any, *args: Any, **kwargs: Any) -> Any:
        """An expression in the arguments, of ``output``'s shape, that is differentiated.

        Args:
            flow: Knows which operands depend on the explained inputs: ``flow.depends(x)``.
            output: What the function gave, connected to the graph: a tensor, or a tuple of them.
            args: Its arguments. One that the function overwrites is given as it was before.
            kwargs: Its keyword arguments.

        Returns:
            The surrogate (of a tuple: a tuple of surrogates), or None for the output's own gradient.
        """
        raise RuleError(f"{type(self).__name__} must override surrogate(flow, output, *args).")

    def call(
        self, flow: Flow, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls the function; its result with this rule's gradient."""
        operands = flow.operands(args, kwargs)
        if not operands:
            return func(*args, **kwargs)
        return self.replaced(flow, name, func, args, kwargs, operands)

    def replaced(
        self,
        flow: Flow,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: list[Tensor],
    ) -> Any:
        """As :meth:`call`, where some operands depend on the explained inputs."""
        if self.counts:
            flow.applied[name] += 1
        if writes(func, args, kwargs):
            # On a copy; what came of it then takes its place. Nothing that the graph kept is changed.
            if not args:
                kwargs = dict(kwargs)
                args = (kwargs.pop("input"),)
            copied = (args[0].clone(), *args[1:])
            return args[0].copy_(self.ruled(flow, name, out_of_place(func), copied, kwargs))
        return self.ruled(flow, name, func, args, kwargs)

    def ruled(
        self, flow: Flow, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As :meth:`replaced`, of a function that overwrites nothing."""
        recorder = flow.recorder
        if recorder is not None:
            args, kwargs = recorder.function_reads((args, kwargs), flow)
        output = func(*args, **kwargs)
        surrogate = self.surrogate(flow, output, *args, **kwargs)
        result = output
        if surrogate is not None:
            attached = self._attached if isinstance(output, Tensor) else self._each
            result = attached(name, output, surrogate)
        if recorder is not None:
            result = recorder.function_gives(name, self, result)
        if isinstance(result, Tensor):
            self.finished(flow, result, args, kwargs)
        return result

    def finished(
        self, flow: Flow, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Told what flows on; nothing by default."""

    def _each(self, name: str, outputs: Any, surrogates: Any) -> Any:
        """What a function gave that gives several tensors."""
        if not isinstance(surrogates, tuple | list) or len(surrogates) != len(outputs):
            raise RuleError(
                f"{type(self).__name__} on {name}(), which gives {len(outputs)} tensors, must give as "
                f"many surrogates in a tuple, or None; got {type(surrogates).__name__}."
            )
        pairs = zip(outputs, surrogates, strict=True)
        made = [y if s is None else self._attached(name, y, s) for y, s in pairs]
        kind: Any = type(outputs)
        return kind(*made) if hasattr(outputs, "_fields") else kind(made)

    def _attached(self, name: str, output: Tensor, surrogate: Tensor) -> Tensor:
        if not isinstance(surrogate, Tensor) or surrogate.shape != output.shape:
            got = tuple(surrogate.shape) if isinstance(surrogate, Tensor) else type(surrogate)
            raise RuleError(
                f"{type(self).__name__} on {name}() gave a surrogate of shape {got} for an output of "
                f"shape {tuple(output.shape)}."
            )
        return attach(output, surrogate, fresh=self.fresh)

    def __repr__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({given})"


class Followed(FunctionRule):
    """Linear, homogeneous of degree one, or picking entries: the function's own gradient is the rule.

    Constants that take part (a bias, positions, a mask) absorb their part, which the ledger shows.

    Args:
        marks: What the result is remembered as: ``"gate"``, or None.
        unless: Asked with the flow and the arguments, whether the function is none of these; it is
            reported then.
    """

    absorbs = "constant"
    counts = False

    def __init__(self, marks: str | None = None, unless: Callable[..., bool] | None = None) -> None:
        self._marks, self._unless = marks, unless

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to be done beside calling the function."""
        return type(self) is Followed and self._marks is None and self._unless is None

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if self._unless is not None and self._unless(flow, *args, **kwargs):
            return UNHANDLED.call(flow, name, func, args, kwargs)
        if flow.recorder is None or name in MOVES:
            result = func(*args, **kwargs)
        else:
            result = super().call(flow, name, func, args, kwargs)
        if self._marks is not None and flow.operands(args, kwargs):
            flow.mark(self._marks, result)
        return result

    def surrogate(self, flow: Flow, output: Any, *args: Any, **kwargs: Any) -> Any:
        return None

    def __repr__(self) -> str:
        return ""


class Carried(Followed):
    """Entries that move, or are scaled alike: what is known of the tensor holds of the result.

    All relevance moves with them, so that the ledger has nothing to say; and views stay views.

    Args:
        entrywise: Whether each entry of the result is a function of that in its place.
    """

    def __init__(self, entrywise: bool = False) -> None:
        super().__init__()
        self._entrywise = entrywise

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if args:
            for part in result if isinstance(result, tuple | list) else (result,):
                flow.follow(args[0], part)
            if self._entrywise and is_known(flow.mode, args[0]):
                record(flow.mode, result, args[:1])
        return result


class Added(Followed):
    """Sums: each summand that depends on the inputs keeps its own part."""

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        result = super().call(flow, name, func, args, kwargs)
        mode = flow.mode
        for value in args[:2]:
            marked = flow.marked("scale", value) or flow.marked("gate", value)
            related = is_known(mode, value)
            if marked or related:
                operands = flow.operands(args, kwargs)
                if marked and len(operands) == 1:
                    flow.follow(value, result)
                if related:
                    record(mode, result, operands)
        return result


class Opened(FunctionRule):
    """A function made of others in Python, seen through: its parts have rules of their own."""

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        mode = flow.mode
        if mode is None:
            return func(*args, **kwargs)
        with mode:
            return opened(func)(*args, **kwargs)


class Composed(FunctionRule):
    """A function as others that it could be made of, each of which has its own rule.

    Args:
        made_of: From the function's arguments to an expression of the same value.
    """

    def __init__(self, made_of: Callable[..., Tensor]) -> None:
        self._made_of = made_of

    def ruled(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if flow.mode is None:
            return self._attached(name, func(*args, **kwargs), self._made_of(*args, **kwargs))
        with torch.no_grad():
            output = func(*args, **kwargs)
        with flow.mode:
            surrogate = self._made_of(*args, **kwargs)
        return self._attached(name, output, surrogate)

    def surrogate(self, flow: Flow, output: Any, *args: Any, **kwargs: Any) -> Any:
        return self._made_of(*args, **kwargs)


class Unhandled(FunctionRule):
    """Non-linear, and nobody knows better: follows the gradient, and is reported."""

    absorbs = "no rule"

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        operands, recorder = flow.operands(args, kwargs), flow.recorder
        watched = bool(operands) and recorder is not None and not writes(func, args, kwargs)
        if recorder is not None and watched:
            args, kwargs = recorder.function_reads((args, kwargs), flow)
        result = func(*args, **kwargs)
        for value in leaves(result) if operands else ():
            if isinstance(value, Tensor) and has_graph(value):
                flow.missing(name, value)
        if recorder is None or not watched:
            return result
        # A copy flows on: what is watched must not be overwritten.
        given = recorder.function_gives(name, self, result)
        return cloned(given)


FOLLOWED, UNHANDLED = Followed(), Unhandled()


def writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call overwrites its first argument.

    >>> x = torch.zeros(1)
    >>> writes(torch.Tensor.tanh_, (x,), {}), writes(torch.Tensor.tanh, (x,), {})
    (True, False)
    >>> writes(torch.nn.functional.relu, (x, True), {})
    True
    """
    place = _flag_of(func)
    if place is None:
        return False
    return place == _ALWAYS or (args[place] if place < len(args) else kwargs.get("inplace")) is True


_ALWAYS = -1


@lru_cache(maxsize=4096)
def _flag(func: Any) -> int | None:
    """Where the flag stands that makes a function overwrite its argument, if it can at all."""
    name = getattr(func, "__name__", "").partition(".")[0]
    if name == "__setitem__" or (name.startswith("__i") and spoken(name) != name.strip("_")):
        return _ALWAYS
    if name.endswith("_") and not name.endswith("__"):
        return _ALWAYS
    if isinstance(func, types.FunctionType):
        taken = func.__code__.co_varnames[: func.__code__.co_argcount]
        if "inplace" in taken:
            return taken.index("inplace")
    return None


@torch.compiler.assume_constant_result  # while torch compiles, functions have no names
def _flag_of(func: Any) -> int | None:
    return _flag(func)


def out_of_place(func: Any) -> Any:
    """The function on a copy of its first argument.

    >>> x = torch.zeros(2)
    >>> out_of_place(torch.Tensor.cos_)(x), x
    (tensor([1., 1.]), tensor([0., 0.]))
    """

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        copied = x.clone()
        result = func(copied, *args, **kwargs)
        return copied if result is None else result

    return call
