"""Rules for operations that no module stands for: a torch function mode for one run of a model."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Around", "Functions", "open_all", "opened", "saving_is_watched", "written_in_python"]

# Looked up once: every function that a model calls passes here.
_GRAD, _grads_are_on = torch.autograd.grad, torch.is_grad_enabled

Around = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Called as ``around(function, args, kwargs)`` in the function's place; gives its result."""


class Functions(TorchFunctionMode):
    """Takes the place of torch functions while a model runs.

    Args:
        find: From a torch function to what is called in its place, or None to leave it alone.

    Attributes:
        running: How many runs of the model are under way; outside them nothing is replaced.
        inside: How many modules are under way that answer for everything inside them.
        notes: What the replacements of this call remember for one another, by a name of theirs.

    >>> def doubled(function, args, kwargs):
    ...     return 2 * function(*args, **kwargs)
    >>> mode = Functions(lambda function: doubled if function is torch.neg else None)
    >>> with mode:
    ...     mode.running += 1
    ...     torch.neg(torch.ones(1))
    tensor([-2.])
    """

    def __init__(self, find: Callable[[Any], Around | None]) -> None:
        super().__init__()
        self._find = find
        self.running = self.inside = self._backward = 0
        self.notes: dict[str, Any] = {}

    def close(self) -> None:
        """Lets go of everything that belongs to the call that is over."""
        self._find = _nothing
        self.notes.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _GRAD:
            # Checkpointed blocks run again in the backward pass, and need their rules there.
            self.running, self._backward = self.running + 1, self._backward + 1
            try:
                with self:
                    return opened(func)(*args, **(kwargs or {}))
            finally:
                self.running, self._backward = self.running - 1, self._backward - 1
        if func is torch.Tensor.unflatten:
            func = torch.unflatten  # the same, and not by way of super(), which cannot be traced
        if not self.running or self.inside or not _grads_are_on():
            around = None
        elif self._backward and not saving_is_watched():
            around = None  # what a rule does in the backward pass is its own affair
        else:
            around = self._find(func)
        if around is not None:
            return around(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)


def saving_is_watched() -> bool:
    """Whether what graphs save is dropped or moved at the moment, as in checkpointed blocks.

    >>> with torch.autograd.graph.save_on_cpu():
    ...     saving_is_watched()
    True
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # pyright: ignore
    return top is not None and top(False) is not None


def opened(function: Any) -> Any:
    """A function of torch's that is written in Python, without its look at active modes.

    Called inside a mode, it runs its body there, so that the mode sees what it is made of.

    >>> opened(torch.nn.functional.normalize) is torch.nn.functional.normalize
    False
    """
    found = _OPENED.get(function)
    if found is None:
        found = _OPENED[function] = _twin(function)
    return found


def written_in_python(function: Any) -> bool:
    """Whether a function can be opened.

    >>> written_in_python(torch.nn.functional.normalize), written_in_python(torch.tanh)
    (True, False)
    """
    return isinstance(function, types.FunctionType) and any(
        name.startswith("has_torch_function") for name in function.__code__.co_names
    )


def open_all() -> None:
    """Opens all that torch has to open: while it compiles, it can look one up, but not make one.

    >>> open_all()
    """
    for place in (torch.nn.functional, torch.functional, torch.Tensor):
        for function in vars(place).values():
            if written_in_python(function):
                opened(function)


_OPENED: dict[Any, Any] = {}


def _twin(function: Any) -> Any:
    names = {name: _never for name in function.__globals__ if name.startswith("has_torch_function")}
    twin = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _nothing(function: Any) -> None:
    return None


def _never(*args: Any) -> bool:
    return False
