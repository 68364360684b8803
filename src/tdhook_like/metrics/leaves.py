"""Finding the attributions of each key in a TensorDict, and refusing what cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_like.errors import InputError, KeyNotFoundError, listed
from tdhook_like.keys import as_tuple, shortest

__all__ = ["attributions_by_key"]


def attributions_by_key(
    td: TensorDictBase,
    root: NestedKey,
    *,
    target: str | None = None,
    keys: Sequence[NestedKey] | None = None,
    index: int | None = None,
) -> dict[NestedKey, Tensor]:
    """The attribution tensors [*B, *features] under ``root``, detached.

    Args:
        td: what a hooked module returned; its batch dimensions are B.
        root: where the attributions were written.
        target: the named target that is meant, where there are several.
        keys: the keys to read; all floating ones by default.
        index: which output, where an ``Each`` target wrote a target dimension after B.

    Raises:
        KeyNotFoundError: the root, the target or a key is missing.
        InputError: nothing floating, or several targets mixed up.
    """
    where = (*as_tuple(root), *(() if target is None else (target,)))
    node = _node(td, where, as_tuple(root), target)
    found = _floating_leaves(node)
    if keys is None:
        chosen = list(found)
        if target is None:
            _refuse_named_targets(td, where, chosen)
    else:
        chosen = _chosen(node, where, found, keys)
    if not chosen:
        raise InputError(f"td[{_shown(where)}] holds no floating attributions to share out.")
    return {key: _checked(td, where, key, found[key], index) for key in chosen}


def _node(
    td: TensorDictBase, where: tuple[str, ...], root: tuple[str, ...], target: str | None
) -> Any:
    """The TensorDict at ``where``."""
    node = _get(td, where)
    if node is None:
        base = None if target is None else _get(td, root)
        there = td if base is None else base
        missing = root if base is None else where
        raise KeyNotFoundError(
            f"td[{_shown(missing)}] does not exist: no attributions were written there. "
            f"There is {listed(there.keys())}. Call a hooked module first, or name its "
            f"root= and target=."
        )
    if isinstance(node, Tensor):
        raise InputError(
            f"td[{_shown(where)}] is a tensor, not the attributions of several keys: "
            f"root= and target= lead to a TensorDict with one entry per key."
        )
    return node


def _get(td: Any, where: tuple[str, ...]) -> Any:
    """The entry at ``where``, or None: also where a part of the way is a tensor."""
    node = td
    for part in where:
        if node is None or isinstance(node, Tensor):
            return None
        node = node.get(part, None)
    return node


def _floating_leaves(node: Any) -> dict[NestedKey, Tensor]:
    """Every floating tensor below a TensorDict, by its shortest key."""
    return {
        shortest(key): leaf
        for key, leaf in node.items(include_nested=True, leaves_only=True)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def _chosen(
    node: Any,
    where: tuple[str, ...],
    found: dict[NestedKey, Tensor],
    keys: Sequence[NestedKey],
) -> list[NestedKey]:
    """The keys that were asked for, each of which must be there, once."""
    wanted = [shortest(key) for key in ([keys] if isinstance(keys, str) else keys)]
    for key in wanted:
        if key in found:
            continue
        if _get(node, as_tuple(key)) is not None:
            raise InputError(f"td[{_shown((*where, *as_tuple(key)))}] is not a floating tensor.")
        raise KeyNotFoundError(
            f"td[{_shown((*where, *as_tuple(key)))}] does not exist. "
            f"There is {listed(found)} under {_shown(where)}."
        )
    if len(set(wanted)) < len(wanted):
        raise InputError(f"keys={wanted!r} names a key twice: its relevance would count twice.")
    return wanted


def _refuse_named_targets(
    td: TensorDictBase, where: tuple[str, ...], keys: Sequence[NestedKey]
) -> None:
    """Rank keys of one target only: two targets side by side are not two keys.

    ("left", "observation") is a named target if td has "observation" but no such nested key.
    """
    names = []
    for key in map(as_tuple, keys):
        is_input = _get(td, key) is not None
        if len(key) > 1 and not is_input and _get(td, key[1:]) is not None and key[0] not in names:
            names.append(key[0])
    if names:
        raise InputError(
            f"td[{_shown(where)}] holds the named targets {listed(names)}, which are not keys of "
            f"one explanation: choose one with target={names[0]!r}, or list the keys= meant."
        )


def _checked(
    td: TensorDictBase, where: tuple[str, ...], key: NestedKey, leaf: Tensor, index: int | None
) -> Tensor:
    """One leaf, detached and of one target."""
    leaf = leaf.detach()
    shown = _shown((*where, *as_tuple(key)))
    dims = td.batch_dims
    if index is not None:
        size = leaf.shape[dims] if leaf.ndim > dims else 0
        if not -size <= index < size:
            raise InputError(f"index={index} is outside the {size} outputs of td[{shown}].")
        leaf = leaf.select(dims, index)
    explained = _get(td, as_tuple(key))
    if isinstance(explained, Tensor) and explained.shape != leaf.shape:
        raise InputError(
            f"td[{shown}] has the shape {tuple(leaf.shape)}, but the input td[{key!r}] has "
            f"{tuple(explained.shape)}. Where every output is a target of its own (Each), choose "
            f"one with index=, the position in the dimension after the batch dimensions {dims}."
        )
    return leaf


def _shown(where: tuple[str, ...]) -> str:
    """A path as one would type it between the brackets of td[...]."""
    return ", ".join(map(repr, where))
