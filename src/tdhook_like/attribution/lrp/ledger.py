"""The ledger: what relevance each rule got, what it gave on, and what was absorbed, by cause."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.errors import ConservationError
from tdhook_like.hooks.structure import leaves, mapped
from tdhook_like.hooks.surrogate import has_graph, nonzero, tiny, unwrapped

__all__ = ["Ledger", "Recorder", "Row"]


@dataclass(frozen=True)
class Row:
    """One rule's entry: what came to the outputs of a module or function, and what left its inputs.

    Attributes:
        where: The submodule's path, or the function's name.
        kind: The submodule's type, or ``"function"``.
        rule: The rule, as it prints.
        out: Relevance at the outputs, ``[*B, T]`` for T targets.
        into: Relevance given on to the inputs, ``[*B, T]``.
        absorbed: What was not given on, by cause, ``[*B, T]`` each. ``out`` is ``into`` plus these.
    """

    where: str
    kind: str
    rule: str
    out: Tensor
    into: Tensor
    absorbed: dict[str, Tensor]


class Ledger:
    """Where relevance went: one row per rule and call. Prints as a table of sums over the batch.

    Attributes:
        rows: In the order of the forward pass.
        start: The relevance that was started with, ``[*B, T]``.
        arrived: What arrived at the attributed inputs, ``[*B, T]``.

    >>> one, none = torch.ones(2, 1), torch.zeros(2, 1)
    >>> row = Row("0", "Linear", "EpsilonRule", one, 0.75 * one, {"bias": 0.25 * one})
    >>> ledger = Ledger([row], start=one, arrived=0.75 * one)
    >>> ledger.absorbed("bias").flatten().tolist(), ledger.gap.abs().max().item()
    ([0.25, 0.25], 0.0)
    >>> print(ledger)
    where      type    rule         out  in   absorbed
    0          Linear  EpsilonRule  2    1.5  bias 0.5
    (start)                         2
    (inputs)                             1.5
    (no rule)                                 0
    """

    def __init__(self, rows: Iterable[Row], start: Tensor, arrived: Tensor) -> None:
        self.rows, self.start, self.arrived = tuple(rows), start, arrived

    @property
    def causes(self) -> tuple[str, ...]:
        """All causes that absorbed something, in the order of the rows."""
        return tuple(dict.fromkeys(cause for row in self.rows for cause in row.absorbed))

    def absorbed(self, cause: str | None = None) -> Tensor:
        """What all rules absorbed for one cause, or for all of them, ``[*B, T]``."""
        total = torch.zeros_like(self.start)
        for row in self.rows:
            for name, value in row.absorbed.items():
                if cause is None or name == cause:
                    total = total + value
        return total

    @property
    def gap(self) -> Tensor:
        """``start − arrived − absorbed``: what went where no rule is, ``[*B, T]``.

        Constants that are added outside of rules (positions, masks), keys that are not attributed,
        and non-linear operations that nobody handles.
        """
        return self.start - self.arrived - self.absorbed()

    def check(self, tolerance: float) -> None:
        """Raises :class:`ConservationError` where more than a share of the start is unaccounted for.

        Args:
            tolerance: The largest gap, as a share of the start's size (at least that of its mean).
        """
        scale = self.start.abs().clamp_min(self.start.abs().mean().clamp_min(1e-30))
        # A score of exactly zero starts with the stand-in for zero, of which nothing need be left.
        missing = (self.gap.abs() - tiny(self.start.dtype)).clamp_min(0)
        worst = (missing / scale).max().item() if self.start.numel() else 0.0
        if not worst <= tolerance:
            raise ConservationError(
                f"The ledger does not close: {worst:.3g} of the start is unaccounted for, more than "
                f"{tolerance:g}. Constants added outside of rules, keys that are not attributed and "
                "operations without a rule take relevance that no rule saw; print the ledger to see "
                "what the rules did."
            )

    def __str__(self) -> str:
        table = [("where", "type", "rule", "out", "in", "absorbed")]
        for row in self.rows:
            causes = ", ".join(f"{cause} {_sum(value)}" for cause, value in row.absorbed.items())
            out, into = (_sum(value) for value in (row.out, row.into))
            table.append((row.where or "(root)", row.kind, row.rule, out, into, causes))
        sums = [_sum(value) for value in (self.start, self.arrived, self.gap)]
        table.append(("(start)", "", "", sums[0], "", ""))
        table.append(("(inputs)", "", "", "", sums[1], ""))
        table.append(("(no rule)", "", "", "", "", sums[2]))
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        return "\n".join(
            "  ".join(
                [*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[5]]
            ).rstrip()
            for line in table
        )


@dataclass
class _Entry:
    where: str
    kind: str
    rule: str
    cause: str
    inputs: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    surrogates: list[Tensor | None] = field(default_factory=list)
    inside: list[_Entry] = field(default_factory=list)
    also: _Entry | None = None
    merged: bool = False


class Recorder:
    """Takes down one run's rules; :meth:`close` makes the ledger once gradients are known.

    Every rule's inputs are given to it as copies of their own, so that what it gives on is told from
    what other users of the same tensors do.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._under_way: list[_Entry] = []
        self._pending: list[Tensor] = []
        self._partner: _Entry | None = None
        #: What a watched copy is a copy of.
        self._copied: dict[int, tuple[Tensor, Tensor]] = {}

    def original(self, tensor: Any) -> Any:
        """What a watched copy is a copy of; the tensor itself where it is none."""
        return self._copied.get(id(tensor), (None, tensor))[1]

    def merge(self, made: Tensor) -> None:
        """The call under way answers for the one that gave ``made`` as well."""
        self._partner = next(
            (e for e in self._entries if any(output is made for output in e.outputs)), None
        )

    def _finished(self, entry: _Entry, outputs: list[Tensor], surrogates: list[Any]) -> None:
        entry.outputs = outputs
        entry.surrogates = surrogates if len(surrogates) == len(outputs) else [None]
        other, self._partner = self._partner, None
        if other is not None:
            entry.inputs, entry.also, other.merged = other.inputs, other, True
            entry.where, entry.rule = f"{other.where} + {entry.where}", other.rule
            entry.kind = f"{other.kind} + {entry.kind}"

    def enter(
        self, where: str, module: nn.Module, rule: Any, args: Any, depends: Callable[[Any], bool]
    ) -> Any:
        """Ahead of a module's call: its arguments, as copies that are watched."""
        inputs: list[Tensor] = []

        def watch(value: Any) -> Any:
            # Parameters have a graph, too, by which no explained input is reached.
            if not _flows(value) or not depends(value):
                return value
            inputs.append(self._watched(value))
            return inputs[-1]

        args = mapped(watch, args)
        cause = _cause(rule, module)
        entry = _Entry(where, type(module).__name__, repr(rule), cause, inputs)
        self._start(entry)
        self._under_way.append(entry)
        return args

    def leave(self, result: Any, surrogate: list[Any]) -> None:
        """Behind it: what it gave, and its surrogates' :meth:`values`."""
        entry = self._under_way.pop()
        if entry.inputs:
            self._finished(entry, _floats(result), surrogate)
        else:  # nothing that is explained came in, or none that could be watched (by keyword)
            self._forget(entry)

    def function_inputs(
        self, args: Any, kept: Any, written: bool, depends: Callable[[Any], bool]
    ) -> tuple[Any, Any]:
        """A function's arguments, as copies that are watched; what it overwrites stays itself."""
        self._pending = []

        def watch(value: Any) -> Any:
            if not depends(value):
                return value
            self._pending.append(self._watched(value))
            return self._pending[-1]

        watched = mapped(watch, tuple(kept))
        return ((args[0], *watched[1:]) if written else watched), watched

    def function(self, name: str, rule: Any, kept: Any, result: Tensor, surrogate: Any) -> Tensor:
        """What a function gave, as a copy that is watched."""
        if not _flows(result):  # it read no more than the shape of what depends on the inputs
            return result
        entry = _Entry(name, "function", repr(rule), _cause(rule, None), self._pending)
        self._start(entry)
        result = result.clone()
        self._finished(entry, [result], self.values(surrogate) or [None])
        return result

    @staticmethod
    def values(surrogate: Any) -> list[Tensor]:
        """A surrogate's value or values, before they are overwritten."""
        return [
            unwrapped(value)[0].detach().clone()
            for value in leaves(surrogate)
            if isinstance(value, Tensor) and value.is_floating_point()
        ]

    def _watched(self, value: Any) -> Any:
        if not _flows(value):
            return value
        copy = value.clone()
        self._copied[id(copy)] = (copy, value)
        return copy

    def _start(self, entry: _Entry) -> None:
        if self._under_way:
            self._under_way[-1].inside.append(entry)
        self._entries.append(entry)

    def _forget(self, entry: _Entry) -> None:
        self._entries = [other for other in self._entries if other is not entry]
        if self._under_way:
            outer = self._under_way[-1]
            kept = [other for other in outer.inside if other is not entry]
            outer.inside = kept + entry.inside

    def tensors(self) -> list[Tensor]:
        """What gradients are needed at."""
        return [
            unwrapped(tensor)[0]
            for entry in self._entries
            for tensor in (*entry.inputs, *entry.outputs)
        ]

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
        place, found = 0, {}
        for entry in self._entries:
            n, m = len(entry.inputs), len(entry.outputs)
            into = _total(entry.inputs, [g[place : place + n] for g in grads], batch, start)
            at_outputs = [g[place + n : place + n + m] for g in grads]
            out = _total(entry.outputs, at_outputs, batch, start)
            absorbed = {}
            surrogates = [s for s in entry.surrogates if s is not None]
            if surrogates and len(surrogates) == len(entry.surrogates):
                lost = [
                    nonzero(unwrapped(y)[0]) - s
                    for y, s in zip(entry.outputs, surrogates, strict=True)
                ]
                absorbed["stabiliser"] = _total(
                    entry.outputs, at_outputs, batch, start, lambda i, lost=lost: lost[i]
                )
            found[id(entry)] = (out, into, absorbed)
            place += n + m
        rows = []
        size = start.abs().max().clamp_min(1e-30) if start.numel() else start.new_ones(())
        for entry in self._entries:
            if entry.merged:
                continue
            out, into, absorbed = found[id(entry)]
            if entry.also is not None:
                more, _, lost = found[id(entry.also)]
                out, absorbed = out + more, {**absorbed, **lost}
            rest = out - into - sum(absorbed.values(), torch.zeros_like(out))
            for inner in entry.inside:
                rest = rest - _absorbed(inner, found)
            absorbed = {**absorbed, entry.cause: rest}
            least = 4 * max(torch.finfo(start.dtype).eps, 1e-12) * torch.maximum(size, out.abs())
            kept = {k: v for k, v in absorbed.items() if not (v.abs() <= least).all()}
            if entry.rule == "" and not kept:
                continue
            rows.append(Row(entry.where, entry.kind, entry.rule, out, into, kept))
        return Ledger(rows, start, arrived)


def _sum(value: Tensor) -> str:
    return f"{value.sum().item():.4g}"


def _absorbed(entry: _Entry, found: dict[int, Any]) -> Tensor:
    out, into, _ = found[id(entry)]
    return out - into


def _total(
    tensors: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    batch: torch.Size,
    like: Tensor,
    weight: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """``Σ x·g`` of several tensors for each batch element, ``[*B, T]``."""
    columns = []
    for column in grads:
        total = like.new_zeros(batch)
        for i, (tensor, gradient) in enumerate(zip(tensors, column, strict=True)):
            plain, moved = unwrapped(tensor)
            value = (nonzero(plain) if weight is None else weight(i)) * gradient
            # Nothing arrives where a mask has put infinities, but zero times them is not zero.
            value = torch.where(gradient == 0, gradient, value)
            for place in reversed(moved):
                value = value.movedim(place, -1)
            total = total + _by_element(value.detach().to(like.dtype), batch)
        columns.append(total)
    return torch.stack(columns, -1)


def _by_element(value: Tensor, batch: torch.Size) -> Tensor:
    """The sum of a tensor for each batch element, which may be folded into its first dimension."""
    if value.shape[: len(batch)] == batch:
        return value.reshape(*batch, -1).sum(-1)
    n = prod(batch)
    if value.ndim and n and value.shape[0] % n == 0:
        return value.reshape(n, -1).sum(-1).reshape(batch)
    return value.sum().expand(batch) / max(n, 1)


def _cause(rule: Any, module: nn.Module | None) -> str:
    named = getattr(rule, "absorbs", None)
    if named:
        return named
    if module is not None and getattr(module, "bias", None) is not None:
        return "bias"
    inner = () if module is None else (name for name, _ in module.named_parameters())
    return "bias" if any("bias" in name for name in inner) else "no rule"


def _floats(values: Any) -> list[Tensor]:
    return [value for value in leaves(values) if _flows(value)]


def _flows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and has_graph(value)
