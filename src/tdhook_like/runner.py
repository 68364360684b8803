"""Running a model: plainly as the caller would, directly with less overhead, or on its shadow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase, is_non_tensor
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.nn.utils import set_skip_existing, skip_existing
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from tdhook_like.errors import KeyNotFoundError, listed
from tdhook_like.paths import unwrapped
from tdhook_like.randomness import restore_rng

__all__ = ["Runner"]


class Runner:
    """How a given model is run.

    Args:
        module: What the user gave, perhaps compiled or wrapped.
        model: The TensorDictModule that it is made of.
        parts: Every module inside.
    """

    def __init__(
        self, module: nn.Module, model: TensorDictModuleBase, parts: Sequence[nn.Module]
    ) -> None:
        self.module, self.model = module, model
        self._wrapped = module is not model or any(
            unwrapped(child) is not child
            for part in parts
            for child in part._modules.values()
            if child is not None
        )
        self._in_keys, self._out_keys = list(model.in_keys), list(model.out_keys)
        self._with_buffers = [part for part in parts if part._buffers]
        #: Whether some module overwrites its input, so that leaves have to be copied for it.
        self.overwrites = any(
            getattr(part, "inplace", False) is True
            for part in parts
            # nn.Module looks long for what is not there.
            if ("inplace" in vars(part) or hasattr(type(part), "inplace"))
            and not isinstance(part, TensorDictModuleBase)
        )

    @property
    def writes_out_keys(self) -> bool:
        """Whether the model is known to write its out_keys and nothing else."""
        return type(self.model) is TensorDictModule and _simple(self.model) and not _watched()

    def buffers(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Every buffer of the model, which a run may write or replace: its holder, name and self."""
        return [
            (part._buffers, name, buffer)
            for part in self._with_buffers
            for name, buffer in part._buffers.items()
            if isinstance(buffer, Tensor) and not buffer.is_inference()
        ]

    def view(self, td: TensorDictBase, leaves: Mapping[NestedKey, Tensor]) -> View:
        """The outputs of a simple model at ``leaves``, without a TensorDict in between."""
        model: Any = self.model
        values = [leaves[key] if key in leaves else read(td, key) for key in self._in_keys]
        found = model.module(*values)
        written = self._by_key(found)
        if written is None:
            filled = td.copy()
            for key, leaf in leaves.items():
                filled.set(key, leaf)
            outputs = _written(model, filled, found)
            written = {key: outputs.get(key) for key in self._out_keys if key != "_"}
        return View(td, written)

    def stacked_view(self, td: TensorDictBase, leaves: Mapping[NestedKey, Tensor]) -> View | None:
        """The outputs of a simple model at several values ``[k, *B, *features]`` of each leaf.

        None where it returns something else than a tensor for each key.
        """
        model: Any = self.model
        k = next(iter(leaves.values())).shape[0]
        values = []
        for key in self._in_keys:
            value = leaves[key] if key in leaves else read(td, key)
            if key not in leaves and isinstance(value, Tensor):
                value = value.expand(k, *value.shape)
            values.append(value)
        written = self._by_key(model.module(*values))
        return None if written is None else View(td, written, torch.Size([k, *td.batch_size]))

    def _by_key(self, found: Any) -> dict[NestedKey, Tensor] | None:
        keys = self._out_keys
        if isinstance(found, Tensor) and len(keys) == 1:
            return {keys[0]: found}
        if type(found) is tuple and len(found) == len(keys):
            return {k: v for k, v in zip(keys, found, strict=True) if k != "_"}
        return None

    @property
    def is_wrapped(self) -> bool:
        """Whether the plain call runs something else than the model's own Python."""
        return self._wrapped or bool(skip_existing())

    def plain(self, td: TensorDictBase) -> TensorDictBase:
        """The plain call, under whatever modes the caller has set."""
        if self.is_wrapped or _watched():
            return self.module(td)
        return direct(self.model, td)

    def run(self, td: TensorDictBase) -> TensorDictBase:
        """The same call on the model itself, past the wrappers of TensorDictModule's forward."""
        return direct(self.model, td)


def direct(model: nn.Module, td: TensorDictBase) -> TensorDictBase:
    """Runs ``model`` on ``td``; on a simple TensorDictModule, reads and writes by itself.

    Every module runs, also where the caller has set skip_existing: an output that is already there
    has no graph.
    """
    if type(model) is not TensorDictModule or not _simple(model):
        if not skip_existing():
            return model(td)
        with set_skip_existing(False):
            return model(td)
    found: Any = model.module(*[read(td, key) for key in model.in_keys])  # pyright: ignore
    if isinstance(found, Tensor) and len(model.out_keys) == 1:
        td.set(model.out_keys[0], found)
        return td
    return _written(model, td, found)


class View:
    """As much of a TensorDict as most targets need: the outputs of a run over what it read.

    Args:
        td: What was read.
        written: What was written, by key.
        batch: Its batch dimensions, where these are not those of ``td``.
    """

    __slots__ = ("batch_dims", "batch_size", "td", "written")

    def __init__(
        self,
        td: TensorDictBase,
        written: dict[NestedKey, Tensor],
        batch: torch.Size | None = None,
    ) -> None:
        self.td, self.written = td, written
        self.batch_size = td.batch_size if batch is None else batch
        self.batch_dims = len(self.batch_size)

    def keys(self, include_nested: bool = False, leaves_only: bool = False) -> list[NestedKey]:
        """What can be read, as :meth:`TensorDictBase.keys` gives it."""
        there = list(self.td.keys(include_nested, leaves_only))
        return [*there, *(key for key in self.written if key not in there)]

    def get(self, key: NestedKey, default: Any = None) -> Any:
        """What was written at ``key``, or else what stood there."""
        found = self.written.get(key)
        return self.td.get(key, default) if found is None else found


def read(td: TensorDictBase, key: NestedKey) -> Any:
    """What a module is given for an in_key: None where it is absent, data that is no tensor as is."""
    value = td.get(key, None)
    return td[key] if is_non_tensor(value) else value


def _simple(model: Any) -> bool:
    return (
        model._kwargs is None
        and model.method is None
        and not model.method_kwargs
        and model.inplace is True
        and not model.strict
        and not model._get_kwargs
        and not (model._forward_hooks or model._forward_pre_hooks)
        and not (model._backward_hooks or model._backward_pre_hooks)
        and "forward" not in vars(model)
    )


def _watched() -> bool:
    """Whether somebody has hooks on all modules, who would miss a call that is cut short."""
    return bool(_global_forward_hooks or _global_forward_pre_hooks)


def _written(model: Any, td: TensorDictBase, found: Any) -> TensorDictBase:
    """Several outputs, or rarer kinds of them, written by TensorDictModule's own forward."""
    count = len(found) if isinstance(found, tuple) else 1
    if isinstance(found, Tensor | tuple) and count != len(model.out_keys):
        raise KeyNotFoundError(
            f"{type(model.module).__name__} gives {count} outputs, but its out_keys are "
            f"{listed(model.out_keys)}: name one key for each output."
        )

    given = tuple(_named(value) for value in found) if isinstance(found, tuple) else found

    class Given(nn.Module):
        def forward(self, *args: Any) -> Any:
            return given

    writer = TensorDictModule(Given(), in_keys=list(model.in_keys), out_keys=list(model.out_keys))
    return writer(td)


def _named(value: Any) -> Any:
    """A tuple within a tuple of outputs as TensorDict takes it, which does so without its graph."""
    if type(value) is tuple and all(isinstance(item, Tensor) for item in value):
        return {str(i): item for i, item in enumerate(value)}
    return value


class Undo:
    """Puts back what a call that failed has changed: torch's generators, and the model's buffers.

    Args:
        runner: Knows which buffers a run may write.
        state: The generators' state, from ``rng_state``.
    """

    def __init__(self, runner: Runner, state: list[Any]) -> None:
        self._rng = state
        self._buffers = [
            (holder, name, buffer, buffer.detach().clone(), buffer._version)
            for holder, name, buffer in runner.buffers()
        ]

    def all(self) -> None:
        """Puts everything back to where it was at the start."""
        restore_rng(self._rng)
        for holder, name, buffer, saved, version in self._buffers:
            holder[name] = buffer
            # Batch norm writes its statistics without counting a version.
            if buffer._version != version or not buffer.equal(saved):
                buffer.data.copy_(saved)
                torch._C._autograd._unsafe_set_version_counter((buffer,), (version,))  # pyright: ignore[reportAttributeAccessIssue]
