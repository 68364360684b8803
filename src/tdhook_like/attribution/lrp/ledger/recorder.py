"""Taking down, in one run of a model, what the ledger needs: each rule's inputs and outputs.

Relevance is activation × gradient wherever one looks, so the ledger needs gradients at places of its
own. What a rule reads is handed to it as copies, and what it gives to the model as copies: the
gradient at a copy is what flows through this call alone, whoever else uses the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_like.attribution.lrp.ledger.accounts import Ledger, Row
from tdhook_like.attribution.lrp.ledger.balance import Entry, Found, Spot, balanced, tags
from tdhook_like.attribution.lrp.ledger.causes import of_function, of_module
from tdhook_like.attribution.lrp.rules.rule import is_float
from tdhook_like.hooks.structure import leaves, mapped
from tdhook_like.hooks.surrogate import unwrapped

__all__ = ["MOVES", "Ledger", "Recorder", "Row", "Watched"]

Carries = Callable[[Any], bool]
"""Whether relevance that arrives at a value is to be taken down: whether it depends on the inputs."""


class Watched:
    """One call's arguments as copies, and what the copies stand for.

    Attributes:
        entry: What is taken down of the call.
        args: The arguments to hand over.
        kwargs: The keyword arguments to hand over.
        flow: Knows what depends on the explained inputs.
        sums: Whether the call adds up what it is given.
        copies: Copies, what they are copies of, and how often these had been written to by then.
    """

    def __init__(self, entry: Entry, args: Any, kwargs: Any, flow: Any, *, sums: bool) -> None:
        self.entry, self._flow, given = entry, flow, leaves((args, kwargs))
        # Beside something that flows, what lies behind a stop is a constant to rules.
        flows = not sums and any(flow.depends(value) for value in given)
        self._carries: Carries = flow.depends if flows else flow.carries
        self.copies: list[tuple[Tensor, Tensor, int]] = []
        self._held: list[tuple[Any, Any, Tensor, Tensor]] = []
        self.args, self.kwargs = mapped(self._handed, tuple(args)), mapped(self._handed, kwargs)

    def _handed(self, value: Any) -> Any:
        if isinstance(value, TensorDict):
            self._hold(value)
        if not is_float(value):
            return value
        if self._carries(value):
            return self._copy(value)
        return value.detach() if self._flow.carries(value) else value

    def _copy(self, value: Tensor) -> Tensor:
        for copy, original, _ in self.copies:
            if original is value:  # some modules look whether query and key are the same
                return copy
        # Twice: what is handed over may be overwritten, and gradients are asked for as it was before.
        kept = value.clone()
        handed = kept.clone()
        self.entry.inputs.append(Spot(kept))
        self.copies.append((handed, value, writes(handed)))
        return handed

    def _hold(self, td: TensorDict) -> None:
        """Copies in the places of a TensorDict's entries, while the call lasts."""
        for key, value in [] if td.is_locked else list(td.items(True, True)):
            if is_float(value) and self._carries(value):
                copy = self._copy(value)
                td.set(key, copy)
                self._held.append((td, key, copy, value))

    def given(self, result: Any, raw: Any) -> Any:
        """A result for the model, as copies whose gradients are what arrives at this call.

        Args:
            result: With the rule's gradient.
            raw: With the call's own gradient, in the same structure.
        """
        for td, key, copy, value in self._held:
            if td.get(key) is copy:
                td.set(key, value)
        try:
            return mapped(self._gives, result, raw)
        except (KeyError, TypeError, ValueError):  # another structure
            return mapped(lambda value: self._gives(value, value), result)

    def _gives(self, value: Any, raw: Any) -> Any:
        if isinstance(value, TensorDict):
            known = {id(original) for _, original, _ in self.copies}
            for key, entry in [] if value.is_locked else list(value.items(True, True)):
                if id(entry) not in known:
                    value.set(key, self._gives(entry, entry))
        if not is_float(value):
            return value
        for copy, original, before in self.copies:
            if copy is value:  # overwritten, or just handed back
                return original if writes(copy) != before else self._passed(value)
        return self._passed(value, raw)

    def _passed(self, value: Tensor, raw: Any = None) -> Tensor:
        if not self._carries(value):
            if not (self.entry.inputs and self._carries(raw)):
                return value
            # A rule lets nothing pass. What arrives there is wanted all the same.
            value = _Stopped.apply(value, *[copy for copy, _, _ in self.copies])  # pyright: ignore
        # Twice: hooks on what a rule gives change what is seen there, and the model may write to it.
        kept = value.clone()
        self.entry.outputs.append(Spot(kept))
        return kept.clone()

    def write_back(self) -> None:
        """Writes to the originals what was written to copies; it flows out of this call, too."""
        for copy, value, before in self.copies:
            if writes(copy) != before:
                written = copy.clone()
                self.entry.outputs.append(Spot(written))
                value.copy_(written)


class Recorder:
    """Takes down one run's rules; :meth:`close` makes the ledger once gradients are known."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._under_way: list[Entry] = []
        self._target: Entry | None = None
        self._pending: Watched | None = None
        self._partner: tuple[Entry, bool] | None = None
        self._tagged: Sequence[Sequence[Sequence[Tensor]]] = ()
        # Blocks that run again in the backward pass are not taken down again.
        self._open = True
        # What copies are copies of, and what was given to the model by which entry.
        self._copied: dict[int, tuple[Tensor, Tensor]] = {}
        self._given: dict[int, tuple[Tensor, Entry]] = {}

    def original(self, tensor: Any) -> Any:
        """What a copy that was handed over is a copy of; the tensor itself where it is none."""
        return self._copied.get(id(tensor), (None, tensor))[1]

    def merge(self, made: Any, *, leads: bool = False) -> None:
        """The call under way is one with the one that gave ``made`` to the model.

        Args:
            made: What the call under way was given.
            leads: Whether the rule is that of the call under way.
        """
        found = self._given.get(id(self.original(made)))
        self._partner = None if found is None else (found[1], leads)

    def enter(
        self, where: str, rule: Any, module: nn.Module, args: Any, kwargs: Any, flow: Any
    ) -> Watched | None:
        """Ahead of a module's call: its arguments, watched."""
        if not self._open:
            return None
        entry = Entry(where, type(module).__name__, repr(rule))
        watched = Watched(entry, args, kwargs, flow, sums=False)
        self._note_copies(watched)
        self._start(entry)
        self._under_way.append(entry)
        entry.cause = of_module(rule, module, (args, kwargs), flow)
        return watched

    def leave(self, watched: Watched, result: Any, raw: Any, shares: list[Spot]) -> Any:
        """Behind it: what it gives, for the model.

        Args:
            watched: What :meth:`enter` gave.
            result: What the module gives, with its rule's gradient.
            raw: The same with the module's own gradient.
            shares: How much of each output the surrogate accounts for.
        """
        while self._under_way.pop() is not watched.entry:
            pass  # a call that did not return
        self._join(watched.entry)
        given = watched.given(result, raw)
        if len(shares) == len(watched.entry.outputs):
            watched.entry.shares = shares
        watched.write_back()
        self._remember(given, watched.entry)
        return given

    def function_reads(self, given: Any, flow: Any) -> Any:
        """What a function's rule is about to be called with, in whatever structure, watched."""
        self._pending = Watched(Entry("", "function", ""), (given,), {}, flow, sums=True)
        self._note_copies(self._pending)
        return self._pending.args[0]

    def function_gives(self, name: str, rule: Any, result: Any) -> Any:
        """What that function gives, with its rule's gradient; for the model."""
        watched, self._pending = self._pending, None
        if watched is None or not self._open or not watched.copies:
            return result
        entry = watched.entry
        entry.where, entry.cause = name, of_function(rule, name)
        entry.rule = "" if rule is None else repr(rule)
        self._join(entry)
        self._start(entry)
        copy = watched.copies[0][0]
        given = watched.given(result, mapped(lambda _: copy, result))
        watched.write_back()
        self._remember(given, entry)
        return given

    def call(self, flow: Any, name: str, rule: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls a function by its rule; what lies behind a stop is seen to.

        Where nothing else flows, it is called plainly, and watched. Summands are watched, too. Factors
        are constants to the rule, and have to be constants to the gradient.

        Args:
            flow: Knows what depends on the explained inputs.
            name: The function's.
            rule: Its rule.
            func: The function.
            args: Its arguments.
            kwargs: Its keyword arguments.
        """
        given = [value for value in leaves((args, kwargs)) if flow.carries(value)]
        behind = [value for value in given if not flow.depends(value)]
        if not behind or name in MOVES or not self._open:
            return rule.call(flow, name, func, args, kwargs)
        if len(behind) == len(given):
            args, kwargs = self.function_reads((args, kwargs), flow)
            return self.function_gives(name, None, func(*args, **kwargs))
        if of_function(rule, name) != "constant" and not _overwrites(func):
            stopped = {id(value) for value in behind}
            args, kwargs = mapped(lambda v: v.detach() if id(v) in stopped else v, (args, kwargs))
        return rule.call(flow, name, func, args, kwargs)

    def outputs(self, outputs: Any, flow: Any) -> Any:
        """A model's outputs for its targets, watched."""
        entry = self._target = Entry("(target)", "target", "", "target")
        seen = outputs.copy()
        for key in seen.keys(True, True):
            value = seen.get(key)
            if is_float(value) and flow.carries(value):
                kept = value.clone()
                entry.inputs.append(Spot(kept))
                seen.set(key, kept.clone())
        return seen

    def tensors(self) -> list[Tensor]:
        """What gradients are needed at."""
        self._open = False
        self._entries = [entry for entry in self._entries if entry.outputs]
        every = self._entries + ([] if self._target is None else [self._target])
        return [spot.plain for entry in every for spot in (*entry.inputs, *entry.outputs)]

    def tags(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Weights of the batch elements in further backward passes, for :meth:`tagged`.

        Args:
            parts: Scores, ``[*B, n]`` each.
        """
        return tags(parts[0].shape[:-1], parts[0].detach())

    def tagged(self, grads: Sequence[Sequence[Sequence[Tensor]]]) -> None:
        """Takes the gradients of these passes: by pass, by target, at :meth:`tensors`."""
        self._tagged = grads

    def close(
        self,
        grads: Sequence[Sequence[Tensor]],
        batch: torch.Size,
        start: Tensor,
        arrived: Tensor,
    ) -> Ledger:
        """The ledger.

        Args:
            grads: For each of the T targets, gradients at :meth:`tensors`.
            batch: The batch dimensions B.
            start: Relevance that was started with, ``[*B, T]``.
            arrived: Relevance of the attributed inputs, ``[*B, T]``.
        """
        columns = zip(*grads, strict=True)
        passes = [list(zip(*tagged, strict=True)) for tagged in self._tagged]
        found = (Found(g, [passed[i] for passed in passes]) for i, g in enumerate(columns))
        return balanced(self._entries, self._target, found, batch, start, arrived)

    def _join(self, entry: Entry) -> None:
        if self._partner is not None:
            entry.first, entry.leads = self._partner
        self._partner = None

    def _note_copies(self, watched: Watched) -> None:
        for copy, value, _ in watched.copies:
            self._copied[id(copy)] = (copy, value)

    def _start(self, entry: Entry) -> None:
        if self._under_way:
            self._under_way[-1].inside.append(entry)
        self._entries.append(entry)

    def _remember(self, given: Any, entry: Entry) -> None:
        for value in leaves(given):
            if is_float(value):
                self._given[id(value)] = (value, entry)


def _overwrites(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def writes(tensor: Tensor) -> int:
    """How often a tensor has been written to."""
    tensor, _ = unwrapped(tensor)
    return 0 if tensor.is_inference() else tensor._version


class _Stopped(torch.autograd.Function):
    """A value that gradients arrive at and do not leave."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *behind: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.n = len(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # pyright: ignore
        return (None,) * ctx.n


_MOVES = """
view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze transpose t T mT H permute
movedim moveaxis swapaxes swapdims expand expand_as broadcast_to select slice getitem narrow chunk
split split_with_sizes tensor_split unbind unfold as_strided diagonal contiguous alias to type_as
float double clone real view_as_real view_as_complex
"""
#: Functions that but move entries: nothing is absorbed there, and their results may be views.
MOVES = frozenset(_MOVES.split())
