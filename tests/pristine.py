"""Photographs of a model, a TensorDict and the interpreter, to tell whether a call left traces.

    before = snapshot(model)
    ...
    assert_same(before, snapshot(model))

A photograph is a flat dict ``place -> fact``: places read like ``encoder.0.weight: _version``, and
a failure lists the places that differ. Objects count as the same only if they are the same object;
the photograph keeps them alive, so that an address is never used twice.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import (
    LazyStackedTensorDict,
    TensorDictBase,
    is_non_tensor,
    is_tensor_collection,
)
from tensordict.nn import skip_existing
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Key = str | tuple[str, ...]

_ABSENT = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_HOOK_TABLES = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
    "_global_parameter_registration_hooks",
    "_global_buffer_registration_hooks",
    "_global_module_registration_hooks",
)


@dataclass(frozen=True, eq=False)
class Same:
    """An object that has to stay the same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __repr__(self) -> str:
        text = repr(self.value)
        return f"<{type(self.value).__name__} at {id(self.value):#x}> {text[:60]}"


@dataclass(frozen=True)
class Snapshot:
    """Facts by place; equal when all places and facts are."""

    facts: Mapping[str, Any] = field(repr=False)

    def differences(self, after: Snapshot, ignoring: Iterable[str] = ()) -> list[str]:
        """One line for every place that changed; places with an ignored word are skipped."""
        words, changed, lines = tuple(ignoring), self.changed(after), []
        for place in {**self.facts, **after.facts}:  # in the order of the walk
            if place in changed and not any(word in place for word in words):
                old, new = (photo.facts.get(place, _ABSENT) for photo in (self, after))
                lines.append(f"{place}: {_difference(old, new)}")
        return lines

    def changed(self, after: Snapshot) -> set[str]:
        """The places that changed."""
        places = {*self.facts, *after.facts}
        return {p for p in places if self.facts.get(p, _ABSENT) != after.facts.get(p, _ABSENT)}

    def __len__(self) -> int:
        return len(self.facts)


def assert_same(before: Snapshot, after: Snapshot, ignoring: Iterable[str] = ()) -> None:
    """Raises an AssertionError that names every place that changed and how.

    Args:
        before: the photograph taken first.
        after: the one to compare.
        ignoring: places that contain one of these words are let go.
    """
    lines = before.differences(after, ignoring)
    assert not lines, "\n".join([f"{len(lines)} thing(s) changed:", *lines[:30]])


def snapshot(*modules: nn.Module) -> Snapshot:
    """Photographs modules, everything reachable from them, and the global state of torch."""
    facts: dict[str, Any] = dict(_global_facts())
    seen: set[int] = set()
    for number, module in enumerate(modules):
        root = "model" if len(modules) == 1 else f"model {number}"
        _module_facts(root, module, facts, seen)
    return Snapshot(facts)


def td_snapshot(td: Any, keys: Iterable[Key] | None = None) -> Snapshot:
    """Photographs a TensorDict or tensorclass.

    Args:
        td: what to photograph; of a lazy stack, every member.
        keys: only these entries, without the td's own properties; all by default.
    """
    facts: dict[str, Any] = {}
    if keys is not None:
        for key in keys:
            _value_facts(f"td[{key!r}]", td.get(key), facts, set())
    else:
        _td_facts("td", td, facts)
    return Snapshot(facts)


def _difference(old: Any, new: Any) -> str:
    if old is _ABSENT:
        return f"appeared: {new!r}"
    if new is _ABSENT:
        return f"gone, was {old!r}"
    if isinstance(old, bytes):
        return "its bytes changed"
    if isinstance(old, Same):
        return f"another object: {old!r} became {new!r}"
    return f"{old!r} became {new!r}"


# --- modules ------------------------------------------------------------------------------------


def _module_facts(path: str, module: nn.Module, facts: dict[str, Any], seen: set[int]) -> None:
    """Walks registered children and modules hidden in attributes alike: both live in vars()."""
    if id(module) in seen:
        return
    seen.add(id(module))
    facts[f"{path}: class"] = type(module)
    facts[f"{path}: forward of its class"] = Same(type(module).forward)
    for name, value in vars(module).items():
        _value_facts(f"{path}: {name}", value, facts, seen)


def _value_facts(place: str, value: Any, facts: dict[str, Any], seen: set[int]) -> None:
    facts[place] = value if isinstance(value, _PLAIN) else Same(value)
    if isinstance(value, nn.Module):
        _module_facts(_child(place), value, facts, seen)
    elif isinstance(value, Tensor):
        if id(value) not in seen:
            seen.add(id(value))
            facts.update(_tensor_facts(_child(place), value))
    elif is_tensor_collection(value):
        if id(value) not in seen:
            seen.add(id(value))
            _td_facts(_child(place), value, facts)
    elif isinstance(value, Mapping):
        facts[f"{place}: keys"] = [_plain_or_same(key) for key in value]
        for key, item in value.items():
            _value_facts(f"{place}[{key!r}]", item, facts, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        facts[f"{place}: length"] = len(value)
        for number, item in enumerate(items):
            _value_facts(f"{place}[{number}]", item, facts, seen)


def _plain_or_same(value: Any) -> Any:
    return value if isinstance(value, _PLAIN) else Same(value)


def _child(place: str) -> str:
    """``model: _modules['0']`` reads better as ``model.0``; so do parameters and buffers."""
    for table in ("_modules", "_parameters", "_buffers"):
        start = f": {table}['"
        if start in place and place.endswith("']"):
            parent, name = place.split(start)
            return f"{parent}.{name[:-2]}"
    return place


# --- tensors and TensorDicts --------------------------------------------------------------------


def _tensor_facts(path: str, tensor: Tensor) -> Iterator[tuple[str, Any]]:
    yield f"{path}: class", type(tensor)
    yield f"{path}: layout", (tensor.shape, tensor.dtype, tensor.device, _strides(tensor))
    yield f"{path}: bytes", bits(tensor)
    yield f"{path}: _version", None if tensor.is_inference() else tensor._version
    yield f"{path}: requires_grad", tensor.requires_grad
    yield f"{path}: grad_fn", Same(tensor.grad_fn)
    yield f"{path}: tensor hooks", _hooks_of(tensor)
    yield f"{path}: attributes", {k: _plain_or_same(v) for k, v in vars(tensor).items()}
    # Reading .grad of a tensor inside a graph warns, and it has none.
    grad = tensor.grad if tensor.is_leaf or tensor.retains_grad else None
    yield f"{path}: grad", Same(grad)
    if grad is not None:
        yield f"{path}: bytes of grad", bits(grad)
        yield f"{path}: _version of grad", grad._version


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    return tensor.stride() if tensor.layout is torch.strided else None


def _hooks_of(tensor: Tensor) -> list[Any]:
    tables = (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
    return [Same(hook) for table in tables if table for hook in table.values()]


def bits(tensor: Tensor) -> bytes | None:
    """The values, bit by bit, so that NaN equals itself and -0.0 differs from 0.0."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return None
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _td_facts(path: str, td: Any, facts: dict[str, Any]) -> None:
    facts[f"{path}: class"] = type(td)
    if not isinstance(td, TensorDictBase):  # a tensorclass keeps its fields in a TensorDict
        td = td._tensordict
    facts[f"{path}: itself"] = Same(td)
    facts[f"{path}: batch size"] = td.batch_size
    facts[f"{path}: names"] = list(td.names) if td._has_names() else None
    facts[f"{path}: device"] = td.device
    facts[f"{path}: locked"] = td.is_locked
    facts[f"{path}: keys"] = sorted(td.keys())
    if isinstance(td, LazyStackedTensorDict):
        # get() stacks anew every time: the members are what a caller could have changed.
        for number, member in enumerate(td.tensordicts):
            _td_facts(f"{path}[{number}]", member, facts)
        return
    for key, value in td.items():
        place = f"{path}[{key!r}]"
        if is_tensor_collection(value) and not is_non_tensor(value):
            _td_facts(place, value, facts)
        elif isinstance(value, Tensor):
            facts[place] = Same(value)
            facts.update(_tensor_facts(place, value))
        else:
            facts[place] = repr(value)


# --- the world around ---------------------------------------------------------------------------


def _global_facts() -> Iterator[tuple[str, Any]]:
    yield "torch: random state", torch.get_rng_state().numpy().tobytes()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        yield "torch: random state of cuda", torch.cuda.get_rng_state().numpy().tobytes()
    yield "python: random state", random.getstate()
    yield "torch: grad mode", torch.is_grad_enabled()
    yield "torch: inference mode", torch.is_inference_mode_enabled()
    yield "torch: anomaly mode", torch.is_anomaly_enabled()
    yield "torch: autocast", (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    yield "torch: default dtype", torch.get_default_dtype()
    yield "torch: deterministic", torch.are_deterministic_algorithms_enabled()
    yield "torch: function modes", [Same(m) for m in _get_current_function_mode_stack()]
    yield "torch: dispatch modes", [Same(m) for m in _get_current_dispatch_mode_stack()]
    native: Any = torch._C
    yield "torch: functorch level", native._functorch.maybe_current_level()
    saving = native._autograd._top_saved_tensors_default_hooks(True)
    yield "torch: saved tensor hooks", [Same(hook) for hook in saving or ()]
    for table in _HOOK_TABLES:
        entries = dict(getattr(nn_module, table)).items()
        yield f"torch: {table}", {key: _plain_or_same(hook) for key, hook in entries}
    for name in ("__call__", "_call_impl", "forward", "__getattr__", "__setattr__"):
        yield f"torch: nn.Module.{name}", Same(getattr(nn.Module, name))
    yield "tensordict: interaction type", interaction_type()
    yield "tensordict: skip_existing", skip_existing()
