"""What flowed out of chosen submodules in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tdhook_like.hooks.installation import Handler
from tdhook_like.hooks.structure import cloned, leaves, mapped
from tdhook_like.hooks.surrogate import has_graph, unwrapped

__all__ = ["Captured"]


class Captured:
    """What flowed out of chosen submodules in one run: a list of tensors by path."""

    def __init__(self) -> None:
        #: Whether runs are still captured; blocks that run again in the backward pass are not.
        self.open = True
        self.outputs: dict[str, list[Tensor]] = {}
        self._vmapped: dict[tuple[str, int], list[int]] = {}

    def flat(self) -> list[Tensor]:
        """All tensors, in the order of paths and calls."""
        return [tensor for tensors in self.outputs.values() for tensor in tensors]

    def handler(
        self, path: str, rule: Handler | None, begin: Callable[[Tensor], None] | None = None
    ) -> Handler:
        """A handler that captures what a module gives, behind the module's rule if it has one.

        Args:
            path: The module's path.
            rule: Its handler.
            begin: Told what flows on, where that is explained: it counts as an input from here on.
        """

        def handle(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            changed = rule(module, args, kwargs, output) if rule is not None else None
            output = output if changed is None else changed
            if begin is not None:
                # Of indices and frozen parameters (an embedding's) no graph is made otherwise.
                output = mapped(_leaf, output)
            if not self.open:
                return cloned(output)
            for value in leaves(output):
                if isinstance(value, Tensor) and value.is_floating_point():
                    self._keep(path, value)
            # What is captured must not be overwritten by an in-place successor.
            output = cloned(output)
            if begin is not None:
                for value in leaves(output):
                    if isinstance(value, Tensor):
                        begin(value)
            return output

        return handle

    def _keep(self, path: str, value: Tensor) -> None:
        calls = self.outputs.setdefault(path, [])
        # Inside vmap (torchrl's agents and ensembles) what is seen is a wrapper that must not leave;
        # the tensor that it wraps is part of the same graph.
        value, moved = unwrapped(value)
        if moved:
            self._vmapped[path, len(calls)] = moved
        calls.append(value)

    def added(self, path: str, call: int) -> int:
        """How many dimensions vmap has added to what was captured."""
        return len(self._vmapped.get((path, call), []))

    def put_back(self, value: Tensor, path: str, call: int, dims: int) -> Tensor:
        """The inverse of :meth:`batch_first`."""
        for place in self._vmapped.get((path, call), []):
            value = value.movedim(dims, place)
        return value

    def arranged(self, path: str, dims: int) -> list[Tensor]:
        """What was captured at a path, call by call, batch dimensions first."""
        calls = self.outputs.get(path, [])
        return [self.batch_first(value, path, i, dims) for i, value in enumerate(calls)]

    def batch_first(self, value: Tensor, path: str, call: int, dims: int) -> Tensor:
        """A captured tensor with the dimensions that vmap added behind its ``dims`` batch dimensions.

        Args:
            value: What was captured at ``path`` in its ``call``-th run, or something of its shape.
            path: The submodule.
            call: Which of its calls.
            dims: The number of batch dimensions.
        """
        for place in reversed(self._vmapped.get((path, call), [])):
            value = value.movedim(place, dims)
        return value


def _leaf(value: Any) -> Any:
    """A tensor that can be explained: a leaf of its own where it has no graph."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or has_graph(value):
        return value
    return value.detach().requires_grad_()
