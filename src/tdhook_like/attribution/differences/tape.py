"""The tape: what every non-linear function of a model was given at the baseline, call by call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.errors import BaselineError
from tdhook_like.hooks.functional import Functions
from tdhook_like.hooks.structure import leaves, mapped
from tdhook_like.hooks.surrogate import attach, has_graph
from tdhook_like.hooks.wrapping import above, wrapped

__all__ = ["DifferenceRule", "Tape"]


Find = Callable[[Any], "tuple[str, DifferenceRule | None]"]
"""From a torch function to its name and its rule."""


class Tape:
    """Two runs of one model: the first is recorded, the second is compared with it.

    Both have to call the same functions in the same order.

    Args:
        find: From a torch function to its name and its rule, None where the function is linear.

    Attributes:
        recording: Whether this is the first run.
        narrow: Of how many batch elements, all alike, the first run had only one; 0 if it had all.
        unhandled: Non-linear functions without a rule that were met, by name.
    """

    def __init__(self, find: Find) -> None:
        self.recording = True
        self.narrow = 0
        self._flow: Flow | None = None
        self.unhandled: Counter[str] = Counter()
        self._entries: list[_Entry] = []
        self._next = 0
        self.mode = _Watching(self, find)

    def compare(self, narrow: int = 0) -> None:
        """From here on, runs are compared with what was recorded.

        Args:
            narrow: Of how many batch elements, all alike, only one was; 0 if all were.
        """
        self.recording, self.narrow, self._next, self._flow = False, narrow, 0, None

    @property
    def flow(self) -> Flow:
        """Knows which tensors of the second run depend on the explained inputs."""
        if self._flow is None:
            self._flow = Flow()
        return self._flow

    def keep(self, name: str, given: Any, output: Any) -> None:
        """Takes down what a function was given and gave."""
        self._entries.append(_Entry(name, mapped(_kept, given), mapped(_kept, output)))

    def take(self, name: str, shapes: Any) -> tuple[Any, Any]:
        """What the function was given at this point of the first run, and what it gave.

        Raises:
            BaselineError: If the first run called something else here.
        """
        entry = self._entries[self._next] if self._next < len(self._entries) else None
        self._next += 1
        if entry is None or entry.name != name:
            raise BaselineError(
                f"The model calls {name}() at the input where it calls "
                f"{entry.name + '()' if entry else 'nothing more'} at the baseline: its path depends on "
                "its inputs, so the two cannot be compared. Take a nearer baseline, or another method."
            )
        output = mapped(_again, entry.output)
        return mapped(lambda here, held: self._like(name, here, held), shapes, entry.given), output

    def _like(self, name: str, here: Any, held: Any) -> Any:
        """What was kept, in the shape of what the function is given now."""
        there = _again(held)
        if not (isinstance(there, Tensor) and isinstance(here, Tensor)):
            return there
        if here.shape == there.shape:
            return there
        if self.narrow and here.ndim == there.ndim:
            sizes = [(b, a) for a, b in zip(here.shape, there.shape, strict=True) if a != b]
            if sizes == [(1, self.narrow)]:
                return there.expand(here.shape)
        raise BaselineError(
            f"The model calls {name}() with shape {tuple(here.shape)} at the input and "
            f"{tuple(there.shape)} at the baseline, so the two cannot be compared."
        )

    def protect(self, target: Any) -> None:
        """Copies what was kept of a tensor that is about to be overwritten."""
        if not isinstance(target, Tensor):
            return
        storage = _storage(above(target)[0])
        if storage is None:
            return

        def saved(item: Any) -> Any:
            if isinstance(item, _Wrapped) and _storage(item.tensor) == storage:
                return _Wrapped(item.tensor.clone(), item.wrappers)
            return item.clone() if isinstance(item, Tensor) and _storage(item) == storage else item

        for entry in self._entries:
            entry.given, entry.output = mapped(saved, entry.given), mapped(saved, entry.output)

    def note(self, name: str, x: Tensor, output: Tensor) -> None:
        """As :meth:`keep`, for a function of one tensor."""
        self._entries.append(_Entry(name, _kept(x), _kept(output)))

    def look(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`take`, for a function of one tensor."""
        n = self._next
        if n < len(self._entries):
            entry = self._entries[n]
            if entry.name == name and not isinstance(entry.given, tuple):
                self._next = n + 1
                return self._like(name, x, entry.given), _again(entry.output)
        return self.take(name, x)


class _Watching(Functions):
    """As its base, but also where no graph is built, and for more than one block."""

    def __init__(self, tape: Tape, find: Find) -> None:
        super().__init__(lambda function: None)
        self._tape, self._rule_of = tape, find

    def close(self) -> None:
        """Nothing: the tape goes on."""

    def watched(self, run: Callable[[Any], Any], values: Any) -> Any:
        """``run(values)``, of which every function is seen, the target's own too."""
        self.running += 1
        try:
            return run(values)
        finally:
            self.running -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.running:
            name, rule = self._rule_of(func)
            if rule is not None:
                return rule.call(self._tape, name, func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)


class DifferenceRule:
    """How a difference passes through a torch function. Holds no per-call state.

    Override :meth:`surrogate`, and :meth:`concerns` where some calls are linear.
    """

    #: Whether the surrogate is made for the call and does not keep its result for the backward pass.
    fresh: ClassVar[bool] = False

    def concerns(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is to be looked at; must be the same in both runs."""
        return True

    def surrogate(
        self,
        tape: Tape,
        func: Any,
        output: Any,
        before: Any,
        there: tuple[tuple[Any, ...], dict[str, Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """An expression in the arguments whose gradients are the multipliers.

        Args:
            tape: Knows which arguments depend on the explained inputs: ``tape.flow.depends(x)``.
            func: The function.
            output: What it gave.
            before: What it gave at the baseline; no graph.
            there: Its arguments at the baseline, ``(args, kwargs)``; no graph.
            args: Its arguments. One that the function overwrites is given as it was before.
            kwargs: Its keyword arguments.

        Returns:
            The surrogate, of the output's structure, or None for the function's own gradient.
        """
        raise NotImplementedError

    def call(
        self, tape: Tape, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls the function; in the second run, its result with this rule's gradient."""
        writes = overwrites(func, args, kwargs)
        if tape.recording and writes:
            tape.protect(args[0])
        if not self.concerns(args, kwargs):
            return func(*args, **kwargs)
        kept = (args[0].clone(), *args[1:]) if writes else args
        if tape.recording:
            output = func(*args, **kwargs)
            tape.keep(name, (kept, kwargs), output)
            return output
        there, before = tape.take(name, (args, kwargs))
        # What it overwrites is overwritten by the result, not by what it is computed from.
        output = func(args[0].clone(), *args[1:], **kwargs) if writes else func(*args, **kwargs)
        result = self._compared(tape, func, output, before, there, kept, kwargs)
        return args[0].copy_(result) if writes else result

    def _compared(
        self, tape: Tape, func: Any, output: Any, before: Any, there: Any, args: Any, kwargs: Any
    ) -> Any:
        if not any(isinstance(v, Tensor) and has_graph(v) for v in leaves(output)):
            return output
        if tape.narrow and isinstance(output, Tensor):
            before = before.expand(output.shape)
        surrogate = self.surrogate(tape, func, output, before, there, args, kwargs)
        if surrogate is None:
            return output
        if not isinstance(output, Tensor):
            return mapped(lambda y, s: y if s is None else attach(y, s), output, surrogate)
        return attach(output, surrogate, fresh=self.fresh)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Overwriting(DifferenceRule):
    """Linear, but in place: what was kept of its first argument is copied first."""

    def concerns(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return False


def overwrites(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function may overwrite its first argument.

    >>> import torch
    >>> overwrites(torch.Tensor.relu_, (torch.ones(1),), {}), overwrites(torch.relu, (), {})
    (True, False)
    """
    if not args or not isinstance(args[0], Tensor):
        return False
    if named_in_place(func) or kwargs.get("inplace", False) is True:
        return True
    return callable(func) and hasattr(func, "__code__") and any(a is True for a in args[1:])


def named_in_place(func: Any) -> bool:
    """Whether a function's name says that it overwrites its first argument.

    >>> import torch
    >>> named_in_place(torch.Tensor.add_), named_in_place(torch.Tensor.__iadd__)
    (True, True)
    """
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _NO_WRITES)
    return name.endswith("_")


_NO_WRITES = ("__invert__", "__index__", "__int__")


class _Entry:
    __slots__ = ("given", "name", "output")

    def __init__(self, name: str, given: Any, output: Any) -> None:
        self.name, self.given, self.output = name, given, output


class _Wrapped:
    """A tensor of the first run, and the wrappers of the vmaps that it was seen in, taken off."""

    __slots__ = ("tensor", "wrappers")

    def __init__(self, tensor: Tensor, wrappers: list[tuple[int, int]]) -> None:
        self.tensor, self.wrappers = tensor, wrappers


def _kept(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    raw, wrappers = above(value)
    raw = raw.detach() if raw.requires_grad else raw
    return _Wrapped(raw, wrappers) if wrappers else raw


def _again(item: Any) -> Any:
    return wrapped(item.tensor, item.wrappers) if isinstance(item, _Wrapped) else item


def _storage(t: Tensor) -> int | None:
    try:
        return t.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None
