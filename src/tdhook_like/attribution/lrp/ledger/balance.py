"""From what was taken down of a run, and gradients there, to the rows of the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from tdhook_like.attribution.lrp.ledger.accounts import Ledger, Row
from tdhook_like.hooks.surrogate import nonzero, unwrapped

__all__ = ["Entry", "Found", "Spot", "balanced", "tags"]


class Spot:
    """A tensor of the run's graph, without what vmap has wrapped around it.

    Args:
        tensor: As the model's code sees it.

    Attributes:
        plain: The tensor inside, which is part of the same graph.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.plain, self._moved = unwrapped(tensor)

    def seen(self, value: Tensor) -> Tensor:
        """Something of the plain tensor's shape as the model sees it, vmap's dimensions behind."""
        for place in reversed(self._moved):
            value = value.movedim(place, -1)
        return value


@dataclass(eq=False)
class Entry:
    """What is taken down of one call.

    Attributes:
        where: The submodule's path, or the function's name.
        kind: The submodule's type, ``"function"`` or ``"target"``.
        rule: The rule, as it prints.
        cause: What absorbs what its inputs and its stabiliser do not get.
        inputs: Tensors that only this call reads, and that depend on the explained inputs.
        outputs: Tensors that only this call makes.
        shares: How much of each output the surrogate accounts for; empty without a stabiliser.
        inside: What was called meanwhile and answers for its own part.
        first: The call that this one was merged with.
        leads: Whether it is this one's rule that counts then.
    """

    where: str
    kind: str
    rule: str
    cause: str = "rule"
    inputs: list[Spot] = field(default_factory=list)
    outputs: list[Spot] = field(default_factory=list)
    shares: list[Spot] = field(default_factory=list)
    inside: list[Entry] = field(default_factory=list)
    first: Entry | None = None
    leads: bool = False


#: What is linear, or picks entries, need not be told of unless it absorbs.
_OWN_GRADIENT = ("", "IgnoreRule()")


@dataclass
class _Sums:
    """An entry's relevance, ``[*B, T]`` each."""

    out: Tensor
    into: Tensor
    stabiliser: Tensor
    spread: bool

    @property
    def absorbed(self) -> Tensor:
        return self.out - self.into


def balanced(
    entries: Sequence[Entry],
    target: Entry | None,
    found: Iterator[Found],
    batch: torch.Size,
    start: Tensor,
    arrived: Tensor,
) -> Ledger:
    """The ledger of what was taken down.

    Args:
        entries: In the order of the run.
        target: What was taken down of the targets, if anything: its inputs.
        found: Gradients at each entry's inputs, then its outputs; the target's last.
        batch: The batch dimensions B.
        start: Relevance that was started with, ``[*B, T]``.
        arrived: Relevance of the attributed inputs, ``[*B, T]``.
    """
    every = [*entries, *([] if target is None else [target])]
    sums = {id(entry): _added(entry, found, batch, start) for entry in every}
    if target is not None:
        sums[id(target)].out = start
    rows = []
    size = start.abs().max().clamp_min(1e-30) if start.numel() else start.new_ones(())
    for first, *others in _groups(every):
        row = _row(first, others, sums)
        least = 4 * max(torch.finfo(start.dtype).eps, 1e-12) * torch.maximum(size, row.out.abs())
        kept = {k: v for k, v in row.absorbed.items() if not (v.abs() <= least).all()}
        if kept or not (row.rule in _OWN_GRADIENT or _idle(row)):
            rows.append(replace(row, absorbed=kept))
    return Ledger(rows, start, arrived)


def _groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries, each with those that were merged with it behind it."""
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        head = entry
        while head.first is not None:
            head = head.first
        groups.setdefault(id(head), []).append(entry)
    return list(groups.values())


def _row(first: Entry, others: list[Entry], sums: dict[int, _Sums]) -> Row:
    """One row of calls that are one by rule: ``out − into`` of all, whatever flows between them."""
    whole = [first, *others]
    into, out = sums[id(first)].into, sums[id(first)].out
    for entry in others:
        out = out - sums[id(entry)].into + sums[id(entry)].out
    stabiliser = sum((sums[id(e)].stabiliser for e in whole), torch.zeros_like(out))
    inner = [sums[id(e)].absorbed for entry in whole for e in entry.inside if id(e) in sums]
    inside = sum(inner, torch.zeros_like(out))
    rest = out - into - stabiliser - inside
    cause = others[-1].cause if others else first.cause
    absorbed = {"stabiliser": stabiliser}
    absorbed[cause] = absorbed[cause] + rest if cause in absorbed else rest
    return Row(
        where=" + ".join(entry.where for entry in whole),
        kind=" + ".join(entry.kind for entry in whole),
        rule=next((entry.rule for entry in others if entry.leads), first.rule),
        out=out,
        into=into,
        absorbed=absorbed,
        inside=inside if inner else None,
        spread=any(sums[id(entry)].spread for entry in whole),
    )


def _idle(row: Row) -> bool:
    """Whether nothing came by."""
    return not (row.out.any() or row.into.any())


def _added(entry: Entry, found: Iterator[Found], batch: torch.Size, like: Tensor) -> _Sums:
    """An entry's sums; its gradients are the next that are ``found``."""
    into, out, lost = (torch.zeros_like(like) for _ in range(3))
    spread = False
    for spot in entry.inputs:
        value, certain = next(found).relevance(spot, nonzero(spot.seen(spot.plain)), batch, like)
        into, spread = into + value, spread or not certain
    for i, spot in enumerate(entry.outputs):
        y, grads = nonzero(spot.seen(spot.plain)), next(found)
        value, certain = grads.relevance(spot, y, batch, like)
        out, spread = out + value, spread or not certain
        if i < len(entry.shares):
            share = entry.shares[i]
            lost = lost + grads.relevance(spot, y - share.seen(share.plain), batch, like)[0]
    return _Sums(out, into, lost, spread)


class Found:
    """Gradients at one spot.

    Args:
        grads: Of the T targets.
        tagged: For each of the passes in which batch elements were :func:`tags`, the same.
    """

    def __init__(self, grads: Sequence[Tensor], tagged: Sequence[Sequence[Tensor]]) -> None:
        self._grads, self._tagged = grads, tagged

    def relevance(
        self, spot: Spot, value: Tensor, batch: torch.Size, like: Tensor
    ) -> tuple[Tensor, bool]:
        """``Σ value · gradient`` for each batch element and target, ``[*B, T]``.

        And whether it could be told which numbers are whose; else their sum is spread evenly.
        """
        columns, certain, n = [], True, prod(batch)
        for t, gradient in enumerate(self._grads):
            plain = gradient.detach()
            # Nothing arrives at masked entries, but 0 · ∞ is not 0.
            g = spot.seen(plain)
            product = torch.where(g == 0, 0, value.detach() * g).to(like.dtype)
            if n <= 1:
                columns.append(product.sum().expand(batch))
                continue
            whose = [spot.seen(passed[t].detach()) / g for passed in self._tagged]
            column, known = _by_element(product.flatten(), [w.flatten() for w in whose], n)
            columns.append(column.reshape(batch))
            certain = certain and known
        return torch.stack(columns, -1), certain


def _by_element(product: Tensor, whose: list[Tensor], n: int) -> tuple[Tensor, bool]:
    """The sum for each of n batch elements, by the powers of two that their gradients were tagged by."""
    element = torch.zeros(product.shape, dtype=torch.long, device=product.device)
    known = torch.full(product.shape, bool(whose), device=product.device)
    base = _base(product.dtype)
    for place, ratio in enumerate(whose):
        digit = torch.log2(ratio).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).round()
        known &= (ratio == torch.exp2(digit)) & (digit >= 0) & (digit < base)
        element += digit.long() * base**place
    known &= element < n
    sums = product.new_zeros(n).index_add(0, element[known], product[known])
    rest = product[~known].sum()
    return sums + rest / n, not bool(product[~known].any())


def tags(batch: torch.Size, like: Tensor) -> list[Tensor]:
    """Weights of batch elements for further backward passes, which tell what belongs to which.

    Powers of two, by which a gradient is scaled without rounding: an element's number is written
    in digits, one pass each, as exponents. ``[*B, 1]`` each; none where there is one element.

    >>> [tag.flatten().tolist() for tag in tags(torch.Size([3]), torch.ones(1))]
    [[1.0, 2.0, 4.0]]
    >>> len(tags(torch.Size([17]), torch.ones(1)))
    2
    """
    n, base = prod(batch), _base(like.dtype)
    left, found = torch.arange(n, device=like.device).reshape(*batch, 1), []
    while n > 1 and base ** len(found) < n:
        found.append(torch.exp2((left % base).to(like.dtype)))
        left = left // base
    return found


def _base(dtype: torch.dtype) -> int:
    return 4 if dtype == torch.float16 else 16
