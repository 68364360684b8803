"""Evaluations that draw nothing from the generators that everybody shares.

Saving and restoring the global generator's state would rewind what other threads draw meanwhile
(a replay buffer's prefetching, say). So a model that draws is given generators of its own.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ForeignDraws", "OwnDraws", "moved", "restore_rng", "rng_state"]

_SWAP = threading.Lock()


class OwnDraws(TorchDispatchMode):
    """What is drawn inside the block comes from private generators.

    Args:
        state: Where these start, from :func:`rng_state`; at the shared generators' state if None.

    Attributes:
        drew: Whether anything was drawn.

    >>> state = torch.get_rng_state()
    >>> with OwnDraws() as draws:
    ...     x = torch.rand(2)
    >>> draws.drew, torch.equal(torch.get_rng_state(), state), torch.equal(x, torch.rand(2))
    (True, True, True)
    """

    # A scan over time is an operator of operators: it is run through like any other.
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether what torch runs to compile such an operator is left alone; it draws nothing."""
        return True

    def __init__(self, state: list[Any] | None = None) -> None:
        super().__init__()
        self.drew = False
        self._start = {torch.device("cpu"): state[0], **dict(state[1:])} if state else {}
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        self.drew = True
        names = [argument.name for argument in func._schema.arguments]
        own = self._own(args, kwargs)
        if "generator" in names:
            place = names.index("generator")
            given = args[place] if place < len(args) else kwargs.get("generator")
            if given is not None:
                return func(*args, **kwargs)
            return func(*args[:place], **{**kwargs, "generator": own})
        variant = (
            "generator" if func._overloadname == "default" else f"{func._overloadname}_generator"
        )
        if variant in func.overloadpacket.overloads():
            return getattr(func.overloadpacket, variant)(*args, **kwargs, generator=own)
        return self._swapped(func, args, kwargs, own)

    def _own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        device = tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")
        if device not in self._generators:
            made = torch.Generator(device)
            start = self._start.get(device)
            made.set_state(_shared(device).get_state() if start is None else start)
            self._generators[device] = made
        return self._generators[device]

    @staticmethod
    def _swapped(func: Callable[..., Any], args: Any, kwargs: Any, own: torch.Generator) -> Any:
        """An operation that takes no generator: the shared one is lent for its length alone."""
        shared = _shared(own.device)
        with _SWAP:
            kept = shared.get_state()
            shared.set_state(own.get_state())
            try:
                return func(*args, **kwargs)
            finally:
                own.set_state(shared.get_state())
                shared.set_state(kept)


def _shared(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


class ForeignDraws:
    """Python's and numpy's generators as they were, if the block has moved them."""

    def __enter__(self) -> None:
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def __exit__(self, *error: object) -> None:
        if random.getstate() != self._python:
            random.setstate(self._python)
        if self._numpy is not None:
            numpy = sys.modules["numpy"]
            now = numpy.random.get_state()
            if now[2] != self._numpy[2] or not (now[1] == self._numpy[1]).all():
                numpy.random.set_state(self._numpy)


def rng_state(tensors: list[Tensor]) -> list[Any]:
    """The state of torch's generators that a run on these tensors may advance."""
    state: list[Any] = [torch.default_generator.get_state()]
    for device in {x.device for x in tensors if x.is_cuda}:
        state.append((device, torch.cuda.get_rng_state(device)))
    return state


def moved(state: list[Any]) -> bool:
    """Whether one of the generators in a state from :func:`rng_state` has been drawn from."""
    if not torch.equal(torch.default_generator.get_state(), state[0]):
        return True
    return any(not torch.equal(torch.cuda.get_rng_state(d), saved) for d, saved in state[1:])


def restore_rng(state: list[Any]) -> None:
    """Puts torch's generators back to a state from :func:`rng_state`."""
    torch.default_generator.set_state(state[0])
    for device, saved in state[1:]:
        torch.cuda.set_rng_state(saved, device)
