"""Targets made of other targets, of functions, and of the short forms that stand for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.errors import TargetError
from tdhook_like.keys import as_tuple
from tdhook_like.targets.base import Index, Pick, Reference, Target, check_index
from tdhook_like.targets.entries import Output

__all__ = [
    "AtStep",
    "Contrast",
    "Each",
    "Entry",
    "Function",
    "TargetSpec",
    "as_target",
    "as_targets",
    "columns",
]


@dataclass(frozen=True)
class Contrast(Target):
    """One target minus another: why this rather than that.

    >>> Output("logits", 1) - ("logits", 0)
    Contrast(this=Output('logits', 1), that=Output('logits', 0))
    """

    this: Target
    that: Target

    @property
    def reads_keys(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.this.reads_keys and self.that.reads_keys

    def bind(self, reference: Reference) -> Pick:
        this, that = self.this.bind(reference), self.that.bind(reference)

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            one, other = this(outputs, dims), that(outputs, dims)
            if one.ndim != other.ndim:  # a last dimension of one is a number all the same
                one, other = (t.squeeze(-1) if t.ndim == dims + 1 else t for t in (one, other))
            if one.shape != other.shape:
                raise TargetError(
                    f"{self!r} contrasts {tuple(one.shape)} with {tuple(other.shape)}: both sides "
                    "must have one shape."
                )
            return one - other

        return pick

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return self.this.reads + self.that.reads


@dataclass(frozen=True)
class Each(Target):
    """Every number that is left over, as a target of its own, along a target dimension.

    Args:
        of: A key, or a target that leaves several numbers per element.

    Results have the target dimension right behind the batch dimensions.

    >>> Each("logits")
    Each(of=Output('logits'))
    """

    of: Target

    def __init__(self, of: TargetSpec) -> None:
        object.__setattr__(self, "of", as_target(of))

    @property
    def reads_keys(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.reads_keys

    def bind(self, reference: Reference) -> Pick:
        return self.of.bind(reference)

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return self.of.reads


@dataclass(frozen=True)
class AtStep(Target):
    """Another target at one time step: one number per trajectory, explained at every step.

    A recurrent model run over ``[*B, time]`` makes a step's output depend on earlier steps' inputs,
    so which step is meant has to be said. Time is the last batch dimension.

    Args:
        of: One number per batch element.
        step: Which step; the last one by default.

    >>> AtStep(("logits", 1))
    AtStep(of=Output('logits', 1), step=-1)
    """

    of: Target
    step: int

    def __init__(self, of: TargetSpec, step: int = -1) -> None:
        object.__setattr__(self, "of", as_target(of))
        object.__setattr__(self, "step", step)

    @property
    def reads_keys(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.reads_keys

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return self.of.reads

    def bind(self, reference: Reference) -> Pick:
        inner = self.of.bind(reference)
        batch = tuple(reference.outputs.batch_size)
        if not batch or not -batch[-1] <= self.step < batch[-1]:
            raise TargetError(
                f"{self!r}: time is the last batch dimension, and the batch is {batch}: there is no "
                f"step {self.step}."
            )

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            values = columns(self.of, inner(outputs, dims), dims, outputs.batch_size)
            return values.select(dims - 1, self.step).squeeze(-1)

        return pick


@dataclass(frozen=True)
class Function(Target):
    """Any function of the outputs.

    Args:
        function: From a TensorDict with batch shape ``batch`` to a tensor ``[*batch]`` or
            ``[*batch, 1]``, or with fewer of the batch dimensions, for one number per trajectory.
            It must treat batch elements apart, and further ones may stand in front: index from
            the end.

    >>> Function(lambda td: td["logits"].logsumexp(-1))  # doctest: +ELLIPSIS
    Function(<lambda>)
    """

    function: Callable[[TensorDictBase], Tensor]

    reads_keys: ClassVar[bool] = False

    def __repr__(self) -> str:
        return f"Function({getattr(self.function, '__name__', self.function)})"

    def bind(self, reference: Reference) -> Pick:
        # What was drawn is held at what is explained, as Taken and LogProb hold it.
        drawn = {key: reference.action(key, self) for key in _drawn(reference)}

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            if drawn:
                outputs = outputs.copy()
                stacked = outputs.batch_size[: dims - reference.dims]
                for key, value in drawn.items():
                    outputs.set(key, value.expand((*stacked, *value.shape)))
            values = self.function(outputs)
            if not isinstance(values, Tensor):
                raise TargetError(f"{self!r} gave {type(values).__name__}; it must give a tensor.")
            trajectory = values.ndim == dims - 1 > 0
            if values.shape[:dims] != outputs.batch_size[: dims - trajectory]:
                raise TargetError(
                    f"{self!r} gave shape {tuple(values.shape)} for a batch of "
                    f"{tuple(outputs.batch_size)}: it must give one number per batch element."
                )
            return values

        return pick


@dataclass(frozen=True)
class Entry(Target):
    """An entry of what another target leaves over; written ``target[index]``."""

    of: Target
    index: tuple[Index, ...]

    @property
    def reads_keys(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.reads_keys

    def bind(self, reference: Reference) -> Pick:
        inner, index = self.of.bind(reference), self.index
        here = inner(reference.outputs, reference.dims)
        check_index(self.of, index, tuple(here.shape[reference.dims :]))
        return lambda outputs, dims: inner(outputs, dims)[(*[slice(None)] * dims, *index)]

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return self.of.reads


def _drawn(reference: Reference) -> list[NestedKey]:
    """The keys that the model's probabilistic modules draw and that are there."""
    found = [
        key
        for module in reference.model.modules()
        if isinstance(module, ProbabilisticTensorDictModule)
        for key in module.out_keys
    ]
    return [key for key in found if isinstance(reference.outputs.get(key, None), Tensor)]


TargetSpec = Target | str | tuple[Any, ...] | Callable[[TensorDictBase], Tensor]
"""What stands for a single target in code."""


def as_target(spec: TargetSpec) -> Target:
    """A target from its short form.

    Raises:
        TargetError: If ``spec`` is none of the forms of the grammar.

    >>> as_target("state_value"), as_target(("agents", "logits", 0, 2))
    (Output('state_value'), Output('agents', 'logits', 0, 2))
    """
    if isinstance(spec, Target):
        return spec
    if isinstance(spec, str):
        return Output(spec)
    if isinstance(spec, tuple) and spec and isinstance(spec[0], str | tuple):
        n = next((i for i, part in enumerate(spec) if not isinstance(part, str | tuple)), len(spec))
        index = spec[n:]
        if all(isinstance(i, int | slice | EllipsisType) and i is not True for i in index):
            return Output(spec[:n], *index)
    if callable(spec) and not isinstance(spec, type):
        return Function(spec)
    raise TargetError(
        f"{spec!r} is not a target. Give a key ('state_value'), a key and an index (('logits', 2)), "
        "Taken('logits'), Greedy('logits'), LogProb(), Each('logits'), a function of the outputs, or "
        "a dict of these by name."
    )


def as_targets(spec: TargetSpec | Mapping[str, TargetSpec]) -> dict[str | None, Target]:
    """Targets by name; a single one under the name None.

    >>> as_targets({"left": ("logits", 0)})
    {'left': Output('logits', 0)}
    """
    if not isinstance(spec, Mapping):
        return {None: as_target(spec)}
    if not spec:
        raise TargetError("The dict of targets is empty: name at least one target.")
    for name in spec:
        if not isinstance(name, str) or not name:
            raise TargetError(f"Targets are named by strings; {name!r} is none.")
    return {name: as_target(item) for name, item in spec.items()}


def columns(target: Target, values: Tensor, dims: int, batch: torch.Size) -> Tensor:
    """Checks what ``target`` gave and brings it to ``[*batch, n_targets]``.

    Raises:
        TargetError: If it is several numbers per element and the target is not :class:`Each`; the
            message lists what could be meant.
    """
    shape = values.shape
    if len(shape) == dims - 1 > 0 and shape == batch[:-1]:
        return values.unsqueeze(-1)  # one number per trajectory
    if shape[:dims] != batch:
        raise TargetError(
            f"{target!r} has shape {tuple(shape)}, which does not begin with the batch dimensions "
            f"{tuple(batch)}."
        )
    rest = shape[dims:]
    if isinstance(target, Each):
        return values.flatten(dims) if rest else values.unsqueeze(-1)
    if not rest:
        return values.unsqueeze(-1)
    if len(rest) == 1 and rest[0] == 1:
        return values
    raise TargetError(
        f"{target!r} is ambiguous: {tuple(rest)} numbers per batch element (batch {tuple(batch)}). "
        f"{_choices(target, tuple(rest))}"
    )


def _choices(target: Target, rest: tuple[int, ...]) -> str:
    if isinstance(target, Output) and not target.index:
        key = as_tuple(target.key)
        first, last = (*key, *[0] * len(rest)), (*key, *(size - 1 for size in rest))
        name = repr(target.key)
        return (
            f"Choose one entry, {first!r} to {last!r}; Greedy({name}); Taken({name}); or "
            f"Each({name}) for every one apart."
        )
    return (
        f"Choose one entry with an index, such as ({target!r})[0], or Each(…) for every one apart."
    )
