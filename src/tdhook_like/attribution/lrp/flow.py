"""What one call's rules know of one another: what was reached, what flowed from where to where."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.attribution.lrp.ledger.recorder import Recorder, writes
from tdhook_like.hooks.functional import Functions
from tdhook_like.hooks.structure import leaves
from tdhook_like.hooks.surrogate import unwrapped

__all__ = ["Flow", "Made", "Normed"]


@dataclass(frozen=True)
class Made:
    """What a layer was called with and gave, for a normalisation behind it.

    Attributes:
        module: The layer.
        inputs: What it was called with.
        raw: What it gave, with its own gradient.
        rule: Its rule.
    """

    module: nn.Module
    inputs: Any
    raw: Tensor
    rule: Any


@dataclass(frozen=True)
class Normed:
    """A normalisation ``BN(x) = x · scale + shift``, for a layer behind it."""

    x: Tensor
    scale: Tensor
    shift: Tensor


class _Line:
    """How a tensor was made."""

    def __init__(self, tensor: Tensor, how: Made | Normed) -> None:
        # A trace cannot be taken of weak references; nor does it matter what lives while it is.
        traced = torch.compiler.is_compiling()
        self.tensor: Callable[[], Tensor | None] = (
            (lambda: tensor) if traced else weakref.ref(tensor)
        )
        self._writes, self.how = 0 if traced else writes(tensor), how

    def holds_of(self, tensor: Tensor) -> bool:
        """Whether it says how that tensor was made, still."""
        if torch.compiler.is_compiling():
            return True
        return self.tensor() is tensor and writes(tensor) == self._writes


@dataclass
class Flow:
    """One call's state, shared by its handlers; rules themselves hold none.

    Attributes:
        reached: Paths of the modules whose rules were reached.
        applied: How often each function rule was, by the function's name.
        unhandled: How often each non-linear function without a rule was called, by name.
        layers: How tensors were made, by their identity, where a normalisation may be read as part of
            the layer beside it. None where nothing asks for it.
        folds: Whether a module's rule may read it so.
        recorder: Takes down what relevance each rule gets and gives on, if somebody asked.
        mode: Sees the functions that the model calls, if any may need a rule.
    """

    reached: set[str] = field(default_factory=set)
    applied: Counter[str] = field(default_factory=Counter)
    unhandled: Counter[str] = field(default_factory=Counter)
    layers: dict[int, _Line] | None = None
    folds: bool = False
    recorder: Recorder | None = None
    mode: Functions | None = None
    _marks: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _walks: dict[str, _Walk] = field(default_factory=lambda: _walks())

    def made(self, tensor: Tensor, how: Made | Normed) -> None:
        """Remembers how a tensor was made, for as long as the model keeps it."""
        assert self.layers is not None
        for key in [key for key, line in self.layers.items() if line.tensor() is None]:
            del self.layers[key]
        self.layers[id(tensor)] = _Line(tensor, how)

    def normalised(self, tensor: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Remembers what a normalisation gave, for a layer right behind it."""
        if self.layers is not None:
            self.made(tensor, Normed(x, scale, shift))

    def origin(self, tensor: Any) -> Made | Normed | None:
        """How a tensor was made, unless it has been overwritten since."""
        if self.layers is None:
            return None
        tensor = tensor if self.recorder is None else self.recorder.original(tensor)
        line = self.layers.get(id(tensor))
        return None if line is None or not line.holds_of(tensor) else line.how

    def missing(self, name: str, result: Tensor) -> None:
        """Counts a function that has no rule, once relevance arrives at its result."""
        counts, counted = self.unhandled, []
        result, _ = unwrapped(result)

        def arrives(gradient: Tensor | None) -> None:
            if counted or gradient is None:  # it may come for one target after another
                return
            if _anything(gradient):
                counted.append(name)
                counts[name] += 1

        result.register_hook(arrives)

    def mark(self, what: str, tensor: Any) -> None:
        """Remembers a tensor as a ``"scale"`` (of a normalisation) or a ``"gate"``."""
        if isinstance(tensor, Tensor):
            self._marks[what, id(tensor)] = tensor

    def marked(self, what: str, tensor: Any) -> bool:
        """Whether a tensor was remembered as such."""
        return (what, id(tensor)) in self._marks

    def follow(self, before: Any, after: Any) -> None:
        """Carries marks through an operation that only moves or scales a tensor."""
        if self._marks and isinstance(after, Tensor):
            for what in ("scale", "gate"):
                if (what, id(before)) in self._marks:
                    self._marks[what, id(after)] = after

    def begin(self, tensor: Tensor) -> None:
        """From here on, what is made of a tensor counts as made of the explained inputs."""
        node = unwrapped(tensor)[0].grad_fn
        if node is not None:
            for walk in self._walks.values():
                walk.begin(node)

    def depends(self, value: Any) -> bool:
        """Whether a tensor depends on the explained inputs; parameters alone do not count."""
        if not isinstance(value, Tensor):
            return False
        if torch.compiler.is_compiling():
            return value.requires_grad
        return self._reaches("depends", value)

    def carries(self, value: Any) -> bool:
        """Whether a tensor depends on the explained inputs, be it by way of what lets nothing pass."""
        return self._reaches("carries", value)

    def shows(self, value: Any) -> bool:
        """Whether relevance could flow through a tensor, to inputs or to parameters.

        What rules that share evenly count: graphs that are but wanted for the ledger, or for
        differentiating relevance, are none.
        """
        return self._reaches("shows", value)

    def _reaches(self, what: str, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        value, _ = unwrapped(value)
        return value.requires_grad and self._walks[what].reaches(value)

    def operands(self, *values: Any) -> list[Tensor]:
        """Those of some values, also in lists, that depend on the explained inputs."""
        return [value for value in leaves(values) if self.depends(value)]


class _Walk:
    """Whether tensors lie behind a wanted leaf of their graph; each node is visited once.

    Args:
        parameters: Whether parameters are wanted; else leaves that are none.
        ends: Nodes at which the walk ends, by the beginning of their names.
    """

    def __init__(self, *, parameters: bool, ends: tuple[str, ...]) -> None:
        self._parameters, self._ends = parameters, ends
        self._known: dict[Any, bool] = {}

    def begin(self, node: Any) -> None:
        """Takes a node for one that leads to a wanted leaf."""
        self._known[node] = True

    def reaches(self, tensor: Tensor) -> bool:
        """Whether a tensor that carries a graph does."""
        node = tensor.grad_fn
        return self._wanted(tensor) if node is None else self._leads(node)

    def _wanted(self, leaf: Tensor) -> bool:
        return self._parameters or not isinstance(leaf, nn.Parameter)

    def _leads(self, node: Any) -> bool:
        known, path = self._known, [node]
        # Depth first, with the answer of a node settled once one of its parents said yes, or all no.
        while path:
            here = path[-1]
            if here in known:
                path.pop()
                continue
            variable = getattr(here, "variable", None)
            if variable is not None:
                known[here] = self._wanted(variable)
                continue
            parents = [parent for parent, _ in self._followed(here) if parent is not None]
            if any(known.get(parent) for parent in parents):
                known[here] = True
                continue
            unknown = next((parent for parent in parents if parent not in known), None)
            if unknown is None:
                known[here] = False
            else:
                path.append(unknown)
        return known[node]

    def _followed(self, node: Any) -> tuple[Any, ...]:
        """Where the relevance pass goes from a node."""
        name = type(node).__name__.removeprefix("Vmapped")
        if name.startswith(self._ends):
            return ()
        # Of what is attached, only the surrogate is followed.
        return node.next_functions[1:] if name.startswith("_Attached") else node.next_functions


def _anything(gradient: Tensor) -> bool:
    """Whether more than zeros arrive, as they do for numbers that the target leaves out."""
    gradient, _ = unwrapped(gradient)
    if torch.compiler.is_compiling():
        return True
    if gradient.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    return bool(gradient.any())


def _walks() -> dict[str, _Walk]:
    return {
        "depends": _Walk(parameters=False, ends=("_Constant", "_Stopped")),
        "carries": _Walk(parameters=False, ends=("_Constant",)),
        "shows": _Walk(parameters=True, ends=("_Constant", "_Stopped")),
    }
