"""What one call's rules know of one another: what was reached, what flowed from where to where."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.attribution.lrp.ledger import Recorder
from tdhook_like.hooks.functional import Functions
from tdhook_like.hooks.structure import leaves
from tdhook_like.hooks.surrogate import unwrapped

__all__ = ["Flow", "Made"]


@dataclass(frozen=True)
class Made:
    """A tensor that flows, and the layer that made it.

    Attributes:
        tensor: What the layer gave, with its rule's gradient. Kept, so that its identity is valid.
        module: The layer.
        inputs: What it was called with.
        raw: What it gave, with its own gradient.
        rule: Its rule.
    """

    tensor: Tensor
    module: nn.Module
    inputs: Any
    raw: Tensor
    rule: Any


@dataclass
class Flow:
    """One call's state, shared by its handlers; rules themselves hold none.

    Attributes:
        reached: Paths of the modules whose rules were reached.
        applied: How often each function rule was, by the function's name.
        unhandled: How often each non-linear function without a rule was called, by name.
        layers: What affine layers gave, by the identity of the tensor, where a normalisation behind
            them may be read as part of the layer. None where nothing asks for it.
        norms: What normalisations gave, likewise: that, what it came from, its scale and its shift.
        recorder: Takes down what relevance each rule gets and gives on, if somebody asked.
        mode: Sees the functions that the model calls, if any may need a rule.
    """

    reached: set[str] = field(default_factory=set)
    applied: Counter[str] = field(default_factory=Counter)
    unhandled: Counter[str] = field(default_factory=Counter)
    layers: dict[int, Made] | None = None
    norms: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=dict)
    recorder: Recorder | None = None
    mode: Functions | None = None
    _marks: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _nodes: dict[Any, bool] = field(default_factory=dict)

    def made(self, layer: Made) -> None:
        """Remembers what a layer gave, for a normalisation right behind it."""
        assert self.layers is not None
        _remember(self.layers, layer.tensor, layer)

    def normalised(self, tensor: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Remembers what a normalisation gave, for a layer right behind it."""
        _remember(self.norms, tensor, (tensor, x, scale, shift))

    def missing(self, name: str, result: Tensor) -> None:
        """Counts a function that has no rule, once relevance arrives at its result."""
        counts, counted = self.unhandled, []
        result, _ = unwrapped(result)

        def arrives(gradient: Tensor) -> None:
            if not counted and _anything(gradient):  # it may come for one target after another
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

    def depends(self, value: Any) -> bool:
        """Whether a tensor depends on the explained inputs; parameters alone do not count."""
        if not isinstance(value, Tensor):
            return False
        if torch.compiler.is_compiling():
            return value.requires_grad
        value, _ = unwrapped(value)
        if not value.requires_grad or isinstance(value, nn.Parameter):
            return False
        node = value.grad_fn
        return node is None or self._comes_from_inputs(node)

    def _comes_from_inputs(self, node: Any) -> bool:
        """Whether a graph's node lies behind a leaf that is no parameter; each is visited once."""
        known, path = self._nodes, [node]
        # Depth first, with the answer of a node settled once one of its parents said yes, or all no.
        while path:
            here = path[-1]
            if here in known:
                path.pop()
                continue
            variable = getattr(here, "variable", None)
            if variable is not None:
                known[here] = not isinstance(variable, nn.Parameter)
                continue
            parents = [parent for parent, _ in _followed(here) if parent is not None]
            if any(known.get(parent) for parent in parents):
                known[here] = True
                continue
            unknown = next((parent for parent in parents if parent not in known), None)
            if unknown is None:
                known[here] = False
            else:
                path.append(unknown)
        return known[node]

    def operands(self, *values: Any) -> list[Tensor]:
        """Those of some values, also in lists, that depend on the explained inputs."""
        return [value for value in leaves(values) if self.depends(value)]


def _followed(node: Any) -> tuple[Any, ...]:
    """Where the relevance pass goes from a node of the graph."""
    name = type(node).__name__
    if name.startswith("_Constant"):
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


def _remember(where: dict[int, Any], tensor: Tensor, what: Any) -> None:
    # Only the last few: what is kept here is not freed.
    while len(where) >= 4:
        del where[next(iter(where))]
    where[id(tensor)] = what
