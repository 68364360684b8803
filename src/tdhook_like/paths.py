"""Choosing submodules: by path, by glob, by type; selections print before they are applied."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from tdhook_like.errors import PathError, listed

__all__ = ["Selection", "Selector", "select", "submodules"]

Selector = str | type[nn.Module]
"""A path such as ``"actor.0"``, a glob such as ``"actor.*"``, or a module type."""


Walked = list[tuple[str, nn.Module, bool]]
"""What :func:`walk` gives, as a list."""


def submodules(root: nn.Module) -> dict[str, nn.Module]:
    """Every submodule by its path, the root as ``""``; each once, under its first path.

    Beside the registered ones, modules that are kept in an attribute without being registered are
    found (as torchrl's vmapped agent networks are): they run, so they can have rules.

    >>> list(submodules(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    ['', '0', '1']
    """
    return {path: module for path, module, first in walk(root) if first}


def walk(root: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """``(path, module, whether this is its first path)`` in the order of registration."""
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
        module = unwrapped(module)
        first = id(module) not in seen
        yield path, module, first
        if not first:
            return
        seen.add(id(module))
        for name, child in children(module):
            yield from visit(f"{path}.{name}" if path else name, child)

    return visit("", root)


def unwrapped(module: nn.Module) -> nn.Module:
    """What thin wrappers (a compiled module, data parallelism) are made of; they are not in paths.

    >>> net = nn.Linear(2, 2)
    >>> unwrapped(nn.DataParallel(net)) is net
    True
    """
    while _wraps(type(module)):
        inner: Any = module._orig_mod if isinstance(module, OptimizedModule) else module.module
        module = inner
    return module


@functools.lru_cache(maxsize=512)
def _wraps(kind: type) -> bool:
    # Remembered: one of these asks whoever derives from it, which takes long.
    return issubclass(kind, (OptimizedModule, nn.DataParallel, DistributedDataParallel))


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The registered children, then those that only stand in an attribute."""
    for name, child in module._modules.items():
        if child is not None:
            yield name, child
    held = vars(module)
    if not held.keys() - _HELD:
        return
    others = [
        (name, value)
        for name, value in held.items()
        if name not in _HELD and type(value) not in _PLAIN
    ]
    for name, value in others:
        if isinstance(value, nn.Module):
            yield name, value
    for name, value in others:
        if not isinstance(value, nn.Module):
            yield from kept_in(name, value, 2)


def kept_in(name: str, value: Any, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """Modules in an attribute: itself, in a container, bound to a method or closed over."""
    if isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        yield name, value.__self__
    elif not depth:
        return
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from kept_in(f"{name}.{i}", item, depth - 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from kept_in(f"{name}.{key}", item, depth - 1)
    elif isinstance(value, functools.partial):
        yield from kept_in(name, value.func, depth - 1)
        yield from kept_in(name, [*value.args, *value.keywords.values()], depth)
    elif isinstance(value, types.FunctionType) and value.__closure__:
        for cell_name, cell in zip(value.__code__.co_freevars, value.__closure__, strict=True):
            with contextlib.suppress(ValueError):  # a cell that is not filled yet
                yield from kept_in(f"{name}.{cell_name}", cell.cell_contents, depth - 1)


_PLAIN = frozenset({bool, int, float, str, type(None), type, torch.Size, torch.dtype})
_HELD = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Selection:
    """The submodules that a selector means. Prints as a table of paths and types."""

    asked: tuple[Selector, ...]
    modules: dict[str, nn.Module]

    @property
    def named(self) -> list[str]:
        """The paths that were asked for by name, not by a pattern or a type."""
        return [path for path in self.modules if path in self.asked]

    def __str__(self) -> str:
        width = max((len(path) for path in self.modules), default=0)
        rows = [
            f"  {path or '(root)':<{width}}  {type(m).__name__}" for path, m in self.modules.items()
        ]
        return "\n".join(
            [f"{len(self.modules)} submodules for {listed(map(_name, self.asked))}", *rows]
        )


def select(root: nn.Module, asked: Selector | Sequence[Selector]) -> Selection:
    """The submodules of ``root`` that paths, globs or types name, in the model's order.

    Raises:
        PathError: If one of them matches nothing.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> print(select(net, nn.Linear))
    2 submodules for 'Linear'
      0  Linear
      2  Linear
    >>> list(select(net, ["1", "[0-1]"]).modules)
    ['0', '1']
    """
    selectors = (asked,) if isinstance(asked, str | type) else tuple(asked)
    every = [(path, module) for path, module, _ in walk(root)]
    wanted: set[int] = set()
    for selector in selectors:
        matches = [module for path, module in every if _matches(selector, path, module)]
        if not matches:
            raise PathError(
                f"{_name(selector)!r} matches no submodule. Paths here: "
                f"{listed(path for path, _ in every if path)}."
            )
        wanted.update(id(module) for module in matches)
    chosen = {path: module for path, module in submodules(root).items() if id(module) in wanted}
    return Selection(selectors, chosen)


def _matches(selector: Selector, path: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        return path == selector or fnmatch.fnmatchcase(path, selector)
    if isinstance(selector, type):
        return isinstance(module, selector)
    raise PathError(f"{selector!r} chooses no submodule: give a path, a glob or a module type.")


def _name(selector: Selector) -> str:
    return selector.__name__ if isinstance(selector, type) else str(selector)
