"""The grammar of keys: nested keys as tuples, and results placed beside what they speak of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.errors import KeyNotFoundError, LockedError, listed

__all__ = ["NestedKey", "as_tuple", "check_known", "key_list", "place", "shortest"]


def as_tuple(key: NestedKey) -> tuple[str, ...]:
    """A key as a flat tuple of strings.

    >>> as_tuple("observation"), as_tuple(("agents", ("lidar", "near")))
    (('observation',), ('agents', 'lidar', 'near'))

    Raises:
        KeyNotFoundError: If the key is neither a string nor a tuple of such.
    """
    if isinstance(key, str):
        return (key,)
    if isinstance(key, tuple) and key:
        return tuple(part for item in key for part in as_tuple(item))
    raise KeyNotFoundError(
        f"{key!r} is not a key: keys are strings or (nested) tuples of strings, "
        'such as "observation" or ("agents", "observation").'
    )


def key_list(keys: object) -> list[NestedKey]:
    """Keys that were given as one string or as a list or tuple of keys.

    >>> key_list("obs"), key_list(["obs", ("agents", "obs")])
    (['obs'], ['obs', ('agents', 'obs')])

    Raises:
        KeyNotFoundError: If they are neither.
    """
    if isinstance(keys, str):
        return [keys]
    if isinstance(keys, Sequence):
        return list(keys)
    raise KeyNotFoundError(f"{keys!r} names no keys: give a key or a list of keys.")


def shortest(key: NestedKey) -> NestedKey:
    """A key as TensorDict prints it: a string where one string is enough.

    >>> shortest(("observation",)), shortest(("agents", "observation"))
    ('observation', ('agents', 'observation'))
    """
    flat = as_tuple(key)
    return flat[0] if len(flat) == 1 else flat


def check_known(asked: Iterable[NestedKey], known: Sequence[NestedKey], what: str) -> None:
    """Raises :class:`KeyNotFoundError` for the first asked key that is not among the known ones.

    >>> check_known(["obs"], ["observation"], "in_keys of the model")
    Traceback (most recent call last):
      ...
    tdhook_like.errors.KeyNotFoundError: 'obs' is not among the in_keys of the model: 'observation'.
    """
    flat = {as_tuple(key) for key in known}
    for key in asked:
        if as_tuple(key) not in flat:
            names = listed(shortest(name) for name in known)
            raise KeyNotFoundError(f"{shortest(key)!r} is not among the {what}: {names}.")


def check_writable(td: TensorDictBase, keys: Iterable[NestedKey]) -> None:
    """Raises :class:`LockedError` where ``td`` is locked, before anything is computed."""
    if td.is_locked:
        raise LockedError(
            f"The TensorDict is locked, so {listed(shortest(key) for key in keys)} cannot be "
            "written. Pass a shallow copy (td.copy()), which shares the same tensors, or unlock it."
        )


def place(td: TensorDictBase, root: tuple[str, ...], key: NestedKey, value: Tensor) -> None:
    """Writes ``value`` at ``(*root, *key)``, nested batch sizes and names as around ``td[key]``.

    Args:
        td: Where to write; also where ``key`` lies.
        root: Where results of this kind go.
        key: The key that the value speaks of.
        value: Shape ``td[key].shape``, or with one more dimension behind the batch dimensions.

    >>> import torch
    >>> td = TensorDict({"agents": TensorDict({"obs": torch.ones(4, 2, 3)}, [4, 2])}, [4])
    >>> place(td, ("attr",), ("agents", "obs"), torch.zeros(4, 2, 3))
    >>> td["attr", "agents"].batch_size
    torch.Size([4, 2])
    """
    fresh = type(td) is TensorDict and bool(root) and td.get(root[0], None) is None
    if fresh and type(key) is str and not td._has_names():
        td.set((*root, key), value)  # as below, in one step
        return
    path = as_tuple(key)
    source: TensorDictBase | None = td
    holder = td
    for name in root:
        holder = _nested(holder, name, like=td)
    if len(path) == 1:
        holder.set(path[0], value)
        return
    for name in path[:-1]:
        inner = source.get(name, None) if source is not None else None
        source = inner if is_tensor_collection(inner) else None
        like = holder
        if source is not None and value.shape[: source.batch_dims] == source.batch_size:
            like = source
        holder = _nested(holder, name, like=like)
    holder.set(path[-1], value)


def _nested(holder: TensorDictBase, name: str, like: TensorDictBase) -> TensorDictBase:
    found = holder.get(name, None)
    if found is not None and is_tensor_collection(found):
        if found.batch_size == like.batch_size:
            return found
        found = None  # of another shape, from an earlier call on other targets
    names = like.names if like._has_names() else None
    holder.set(name, TensorDict({}, batch_size=like.batch_size, device=like.device, names=names))
    return holder.get(name)
