"""Submodules' outputs as entries of the TensorDicts that a model is run on: to read, set or add to.

A run through :class:`Ports` writes what chosen submodules gave beside the model's outputs, and takes
from its inputs what is to stand in their place, or to be added there. As these are entries like any
other, further evaluations stack them in every layout, and targets read them as they read outputs.
They live in private TensorDicts alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook_like.errors import InputError
from tdhook_like.hooks.installation import Handler
from tdhook_like.hooks.structure import mapped
from tdhook_like.hooks.wrapping import above, level, wrapped
from tdhook_like.keys import as_tuple
from tdhook_like.layout import Run
from tdhook_like.runner import View

__all__ = ["ROOT", "Ports", "calls_at", "is_port", "port", "with_ports"]

ROOT = "(outputs of submodules)"
"""The private root of all such entries; no key of a user's."""


def port(path: str, call: int | None = None, kind: str = "read") -> NestedKey:
    """The entry of what a submodule gives.

    Args:
        path: The submodule's path.
        call: Which of the tensors that it gives in one run; of all of them if None.
        kind: ``"read"``, ``"set"`` or ``"add"``.

    >>> port("net.0", 1)
    ('(outputs of submodules)', 'read', 'net.0', '1')
    """
    return (ROOT, kind, path) if call is None else (ROOT, kind, path, str(call))


def is_port(key: NestedKey) -> bool:
    """Whether a key is such an entry.

    >>> is_port(port("net.0")), is_port("net.0")
    (True, False)
    """
    return as_tuple(key)[0] == ROOT


def calls_at(outputs: Any, path: str, call: int | None = None) -> list[Tensor]:
    """Every tensor that a submodule gave in a run, in order; none where it was not called.

    Args:
        outputs: What a run through :class:`Ports` gave.
        path: The submodule's path.
        call: The only one that is going to be looked at; any of them if None.

    Raises:
        InputError: If one of those does not keep the batch in front.
    """
    found: list[Tensor] = []
    while True:
        value = outputs.get(port(path, len(found)), None)
        if value is None:
            break
        found.append(value)
    for value in found if call is None else found[call:][:1]:
        if value.shape[-1:] == (0,) and value.shape[:-1] == outputs.batch_size:
            raise InputError(
                f"What {path or '(root)'!r} gives does not begin with the batch dimensions "
                f"{tuple(outputs.batch_size)}: choose a submodule that keeps the batch first."
            )
    return found


class Ports:
    """The submodules that one explanation reads, sets or adds to.

    Args:
        modules: By path, as the model has them.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> list(Ports({"0": net[0]}).modules)
    ['0']
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self._seen: dict[str, list[Tensor]] = {}
        self._given: dict[tuple[str, ...], Tensor] = {}
        self._dims = self._level = 0

    def around(self, run: Run) -> Run:
        """``run``, which reads and writes the entries of submodules on its way."""

        def through(td: TensorDictBase) -> TensorDictBase:
            given = td.get(ROOT, None)
            entries = () if given is None else given.items(True, True)
            self._given = {as_tuple(key): value for key, value in entries}
            self._seen, self._dims, self._level = {}, td.batch_dims, level()
            outputs = run(td)
            return _filled(outputs, self._seen)

        return through

    def handler(self, path: str, rule: Handler | None) -> Handler:
        """What stands at a submodule's call, behind its rule if it has one."""

        def handle(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            changed = rule(module, args, kwargs, output) if rule is not None else None
            return mapped(
                lambda value: self._one(path, value), output if changed is None else changed
            )

        return handle

    def _one(self, path: str, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        calls = self._seen.setdefault(path, [])
        call = str(len(calls))
        raw, wrappers = above(value, self._level)
        for place, _ in reversed(wrappers):
            raw = raw.movedim(place, self._dims)
        instead, more = (self._given.get((kind, path, call)) for kind in ("set", "add"))
        if instead is None and more is None:
            calls.append(raw)
            return value.clone()  # what is kept must not be overwritten by a successor in place
        raw = self._like(path, instead, raw) if instead is not None else raw
        raw = raw + self._like(path, more, raw) if more is not None else raw
        calls.append(raw)
        for place, _ in wrappers:
            raw = raw.movedim(self._dims, place)
        return wrapped(raw, wrappers) if wrappers else raw.clone()

    def _like(self, path: str, given: Tensor, value: Tensor) -> Tensor:
        if given.shape != value.shape:
            raise InputError(
                f"At {path!r}: {tuple(given.shape)} was to stand where the submodule gives "
                f"{tuple(value.shape)}: it gives another shape in every run."
            )
        return given.to(value.dtype)


def with_ports(outputs: Any, found: Mapping[str, list[Tensor]]) -> Any:
    """Outputs of a run with what submodules gave beside them; the outputs themselves stay as they are.

    Args:
        outputs: A TensorDict, or as much of one as a target needs.
        found: By path, what the submodule gave, batch dimensions first.
    """
    if isinstance(outputs, View):
        entries = {port(path, i): v for path, calls in found.items() for i, v in enumerate(calls)}
        return View(outputs.td, {**outputs.written, **entries}, outputs.batch_size)
    return _filled(outputs.copy(), found)


def _filled(outputs: TensorDictBase, found: Mapping[str, list[Tensor]]) -> TensorDictBase:
    for path, calls in found.items():
        for i, value in enumerate(calls):
            if value.shape[: outputs.batch_dims] != outputs.batch_size:
                # Perhaps nobody looks at this one (a recurrent layer's last states, say).
                value = value.new_zeros((*outputs.batch_size, 0))
            outputs.set(port(path, i), value)
    return outputs
