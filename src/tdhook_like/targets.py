"""What is explained: one number per batch element, named without ambiguity.

A target is an immutable description. ``bind`` fixes what must not move while inputs are varied (which
action was taken, which one is greedy) at the outputs of the call that is explained, and gives a
function from outputs to numbers.

The grammar, from short to long:

==========================================  =====================================================
``"state_value"``                           an output that is one number per element
``("logits", 2)``, ``("loc", ..., 0)``      a key, then an index into its feature dimensions
``Taken("logits")``                         the entry of the action that stands in the TensorDict
``Greedy("logits")``                        the entry of the greedy action
``LogProb()``                               log-probability of that action, the action held fixed
``Taken("logits") - ("logits", 0)``         a contrast; ``.against_rest()`` for "all others"
``lambda td: …``                            any function of the outputs
``Each("logits")``                          every entry as its own target
``{"left": …, "right": …}``                 several named targets from one forward
==========================================  =====================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import CompositeDistribution, ProbabilisticTensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook_like.errors import TargetError, listed
from tdhook_like.keys import as_tuple, shortest

__all__ = [
    "Contrast",
    "Each",
    "Function",
    "Greedy",
    "LogProb",
    "Output",
    "Reference",
    "Taken",
    "Target",
    "TargetSpec",
    "as_target",
]

Index = int | slice | EllipsisType
Pick = Callable[[TensorDictBase, int], Tensor]
"""From outputs and their number of batch dimensions to values ``[*batch, *rest]``."""


@dataclass(frozen=True)
class Reference:
    """The outputs at which a target is bound.

    Attributes:
        outputs: What the model wrote (and read) in the call that is explained.
        dims: The number of batch dimensions.
        model: The model, for its distributions.
        out_keys: What the model declares to write; for messages.
    """

    outputs: TensorDictBase
    dims: int
    model: nn.Module
    out_keys: tuple[NestedKey, ...]
    recorded: TensorDictBase | None = None

    def values(self, key: NestedKey, what: str) -> Tensor:
        """The tensor at ``key``, or a :class:`TargetError` that lists what is there."""
        return _values(self.outputs, key, what, self.out_keys)


class Target(ABC):
    """Base of all targets. ``a - b`` is a contrast, ``a[i]`` an entry of what is left over."""

    @abstractmethod
    def bind(self, reference: Reference) -> Pick:
        """A function from outputs to values ``[*batch, *rest]``, everything else held fixed."""

    def __sub__(self, other: TargetSpec) -> Contrast:
        return Contrast(self, as_target(other))

    def __rsub__(self, other: TargetSpec) -> Contrast:
        return Contrast(as_target(other), self)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Target:
        return _Entry(self, index if isinstance(index, tuple) else (index,))

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        """The keys that the target is known to read, for checks ahead of any call."""
        return ()


@dataclass(frozen=True)
class Output(Target):
    """An entry of an output.

    Args:
        key: The out_key.
        index: Into the feature dimensions (those behind the batch dimensions): integers, at most one
            ``...``. Empty where the output is one number per element.

    >>> Output(("agents", "value")), Output("logits", 2)
    (Output('agents', 'value'), Output('logits', 2))
    """

    key: NestedKey
    index: tuple[Index, ...] = ()

    def __init__(self, key: NestedKey, *index: Index) -> None:
        object.__setattr__(self, "key", shortest(key))
        object.__setattr__(self, "index", index)

    def __repr__(self) -> str:
        parts = [repr(part) for part in as_tuple(self.key)]
        parts += ["..." if part is Ellipsis else repr(part) for part in self.index]
        return f"Output({', '.join(parts)})"

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return (self.key,)

    def bind(self, reference: Reference) -> Pick:
        values = reference.values(self.key, repr(self))
        _check_index(self, self.index, tuple(values.shape[reference.dims :]))
        key, index, what, known = self.key, self.index, repr(self), reference.out_keys

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            found = _values(outputs, key, what, known)
            return found[(*[slice(None)] * dims, *index)] if index else found

        return pick

    def against_rest(self) -> Contrast:
        """This entry against the mean of the other entries along the last feature dimension."""
        return Contrast(self, _Rest(self))


class _Chosen(Target):
    """An entry along the last dimension, chosen by an index per element that is held fixed."""

    key: NestedKey

    @abstractmethod
    def choose(self, values: Tensor, reference: Reference) -> Tensor:
        """Indices into the last dimension of ``values``, shape ``values.shape[:-1]``."""

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return (self.key,)

    def bind(self, reference: Reference) -> Pick:
        return self._bound(reference, rest=False)

    def against_rest(self) -> Contrast:
        """The chosen entry against the mean of the others."""
        return Contrast(self, _Rest(self))

    def _bound(self, reference: Reference, rest: bool) -> Pick:
        values = reference.values(self.key, repr(self))
        if values.ndim <= reference.dims:
            raise TargetError(f"{self!r}: {self.key!r} has no entries to choose from.")
        chosen = self.choose(values.detach(), reference)
        key, what, known = self.key, repr(self), reference.out_keys

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            found = _values(outputs, key, what, known)
            index = chosen.expand(found.shape[:-1]).unsqueeze(-1)
            entry = found.gather(-1, index).squeeze(-1)
            return (found.sum(-1) - entry) / (found.shape[-1] - 1) if rest else entry

        return pick


@dataclass(frozen=True)
class Taken(_Chosen):
    """The entry of ``key`` that belongs to the action in the TensorDict.

    The action is read once and held fixed. When a policy is driven it is the action that this very
    call writes; when a recorded TensorDict is observed it is the recorded one.

    Args:
        key: Values or logits, shape ``[*batch, *rest, n]``.
        action: The key of the action: indices ``[*batch, *rest]`` (or with a last 1), or one-hot.

    >>> Taken("logits")
    Taken(key='logits', action='action')
    """

    key: NestedKey = "logits"
    action: NestedKey = "action"

    def choose(self, values: Tensor, reference: Reference) -> Tensor:
        action = reference.action(self.action, repr(self))
        if action.shape == values.shape and (values.shape[-1] > 1 or action.dtype == torch.bool):
            return action.to(torch.uint8).argmax(-1)
        if action.shape == (*values.shape[:-1], 1):
            action = action.squeeze(-1)
        if action.shape != values.shape[:-1] or action.is_floating_point():
            raise TargetError(
                f"{self!r}: {self.action!r} of shape {tuple(action.shape)} and {action.dtype} is "
                f"neither an index into nor a one-hot of {self.key!r} of shape "
                f"{tuple(values.shape)}. Name the right keys, or use LogProb()."
            )
        return action.long()


@dataclass(frozen=True)
class Greedy(_Chosen):
    """The largest entry of ``key`` at the explained input; which one it is is held fixed.

    Args:
        key: Values or logits, shape ``[*batch, *rest, n]``.

    >>> Greedy("action_value")
    Greedy(key='action_value')
    """

    key: NestedKey = "logits"

    def choose(self, values: Tensor, reference: Reference) -> Tensor:
        return values.argmax(-1)


@dataclass(frozen=True)
class _Rest(Target):
    of: Output | _Chosen

    def bind(self, reference: Reference) -> Pick:
        if isinstance(self.of, _Chosen):
            return self.of._bound(reference, rest=True)
        *before, last = self.of.index or (None,)
        if not isinstance(last, int):
            raise TargetError(f"{self.of!r}.against_rest() needs an entry, such as ('logits', 0).")
        whole, entry = Output(self.of.key, *before, slice(None)), self.of
        pick_whole, pick_entry = whole.bind(reference), entry.bind(reference)

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            values = pick_whole(outputs, dims)
            return (values.sum(-1) - pick_entry(outputs, dims)) / (values.shape[-1] - 1)

        return pick

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return self.of.reads


@dataclass(frozen=True)
class LogProb(Target):
    """The log-probability of the action in the TensorDict under the policy's distribution.

    The action carries no gradient: only how the distribution depends on the inputs is explained, not
    how a reparametrised sample does.

    Args:
        action: The key of the action; by default the one that the policy's last probabilistic
            module writes.

    >>> LogProb()
    LogProb(action=None)
    """

    action: NestedKey | None = None

    def bind(self, reference: Reference) -> Pick:
        sampler = _sampler(reference.model, self.action)
        keys = [sampler.out_keys[0]] if self.action is None else [self.action]
        composite = issubclass(_distribution_class(sampler), CompositeDistribution)
        if composite and self.action is None:
            raise TargetError(
                "The distribution is composite: one target per head, e.g. "
                + ", ".join(f"LogProb({shortest(k)!r})" for k in _heads(sampler))
            )
        action = reference.action(keys[0], repr(self))

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            distribution = sampler.get_dist(outputs)
            if isinstance(distribution, CompositeDistribution):
                distribution = _head(distribution, keys[0], self)
            shape = distribution.batch_shape + distribution.event_shape
            return distribution.log_prob(action.expand(shape))

        return pick


@dataclass(frozen=True)
class Contrast(Target):
    """One target minus another: why this rather than that.

    >>> Output("logits", 1) - ("logits", 0)
    Contrast(this=Output('logits', 1), that=Output('logits', 0))
    """

    this: Target
    that: Target

    def bind(self, reference: Reference) -> Pick:
        this, that = self.this.bind(reference), self.that.bind(reference)
        return lambda outputs, dims: this(outputs, dims) - that(outputs, dims)

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

    def bind(self, reference: Reference) -> Pick:
        return self.of.bind(reference)

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return self.of.reads


@dataclass(frozen=True)
class Function(Target):
    """Any function of the outputs.

    Args:
        function: From a TensorDict with batch shape ``batch`` to a tensor ``[*batch]`` or
            ``[*batch, 1]``. It must treat batch elements apart.

    >>> Function(lambda td: td["logits"].logsumexp(-1))  # doctest: +ELLIPSIS
    Function(<lambda>)
    """

    function: Callable[[TensorDictBase], Tensor]

    def __repr__(self) -> str:
        return f"Function({getattr(self.function, '__name__', self.function)})"

    def bind(self, reference: Reference) -> Pick:
        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            values = self.function(outputs)
            if not isinstance(values, Tensor):
                raise TargetError(f"{self!r} gave {type(values).__name__}; it must give a tensor.")
            if values.shape[:dims] != outputs.batch_size:
                raise TargetError(
                    f"{self!r} gave shape {tuple(values.shape)} for a batch of "
                    f"{tuple(outputs.batch_size)}: it must give one number per batch element."
                )
            return values

        return pick


@dataclass(frozen=True)
class _Entry(Target):
    of: Target
    index: tuple[Index, ...]

    def bind(self, reference: Reference) -> Pick:
        inner, index = self.of.bind(reference), self.index
        here = inner(reference.outputs, reference.dims)
        _check_index(self.of, index, tuple(here.shape[reference.dims :]))
        return lambda outputs, dims: inner(outputs, dims)[(*[slice(None)] * dims, *index)]

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return self.of.reads


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


def columns(target: Target, values: Tensor, reference: Reference) -> Tensor:
    """Checks what ``target`` gave at the reference and brings it to ``[*batch, n_targets]``.

    Raises:
        TargetError: If it is several numbers per element and the target is not :class:`Each`; the
            message lists what could be meant.
    """
    batch, rest = values.shape[: reference.dims], tuple(values.shape[reference.dims :])
    if batch != reference.outputs.batch_size[: reference.dims]:
        raise TargetError(
            f"{target!r} has shape {tuple(values.shape)}, which does not begin with the batch "
            f"dimensions {tuple(reference.outputs.batch_size)}."
        )
    if isinstance(target, Each):
        return values.flatten(reference.dims) if rest else values.unsqueeze(-1)
    if not rest:
        return values.unsqueeze(-1)
    if rest == (1,):
        return values
    raise TargetError(
        f"{target!r} is ambiguous: {rest} numbers per batch element (batch "
        f"{tuple(reference.outputs.batch_size)}). {_choices(target, rest)}"
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
    return f"Choose one entry with an index, such as ({target!r})[0], or Each(…) for every one apart."


def _check_index(target: Target, index: tuple[Index, ...], features: tuple[int, ...]) -> None:
    if len(index) <= len(features) and all(
        type(i) is int and -size <= i < size for i, size in zip(index, features, strict=False)
    ):
        return
    try:
        torch.empty(features, device="meta")[index]
    except (IndexError, TypeError) as error:
        raise TargetError(
            f"{target!r}: index {index} does not fit the feature dimensions {features}: {error}."
        ) from None


def _values(outputs: TensorDictBase, key: NestedKey, what: str, known: tuple[NestedKey, ...]) -> Tensor:
    values = outputs.get(key, None)
    if isinstance(values, Tensor):
        return values
    kind = "is not there" if values is None else f"is a {type(values).__name__}, not a tensor"
    raise TargetError(f"{what}: {key!r} {kind}. The model writes {listed(map(shortest, known))}.")


def _sampler(model: nn.Module, action: NestedKey | None) -> ProbabilisticTensorDictModule:
    found = [m for m in model.modules() if isinstance(m, ProbabilisticTensorDictModule)]
    if action is not None:
        asked = as_tuple(action)
        found = [m for m in found if asked in [as_tuple(k) for k in (*m.out_keys, *_heads(m))]]
    if not found:
        name = "an action" if action is None else repr(action)
        raise TargetError(
            f"LogProb: no probabilistic module of the model writes {name}. Name a logit or a value "
            "instead, such as ('logits', 0)."
        )
    return found[-1]


def _distribution_class(sampler: ProbabilisticTensorDictModule) -> type:
    made = sampler.distribution_class
    return made if isinstance(made, type) else object


def _heads(sampler: ProbabilisticTensorDictModule) -> list[NestedKey]:
    names = sampler.distribution_kwargs.get("name_map") or {}
    if names:
        return list(names.values())
    return list(sampler.distribution_kwargs.get("distribution_map", {}))


def _head(distribution: CompositeDistribution, key: NestedKey, target: Target) -> Any:
    for name, head in distribution.dists.items():
        if as_tuple(name) == as_tuple(key):
            return head
    raise TargetError(f"{target!r}: the distribution has the heads {listed(distribution.dists)}.")
