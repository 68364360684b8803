"""The accounts: what relevance each rule got, what it gave on, and what was absorbed, by cause."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook_like.errors import ConservationError
from tdhook_like.hooks.surrogate import tiny

__all__ = ["CAUSES", "Ledger", "Row"]

CAUSES = {
    "bias": "a layer's bias, or a normalisation's",
    "stabiliser": "ε, or nothing there to share by",
    "constant": "a summand that does not depend on the explained inputs",
    "softmax": "logits against their mean, which is what a softmax tells apart",
    "stop": "a rule that lets nothing pass",
    "rule": "a rule that, by its own formula, does not give on what it gets",
    "target": "what a target does to the model's outputs, such as a log-probability's normaliser",
    "no rule": "an operation without a rule, whose gradient does not conserve",
}
"""What absorbs relevance. A rule may name causes of its own by its attribute ``absorbs``."""


@dataclass(frozen=True)
class Row:
    """One entry: what came to the outputs of a module or function, and what left its inputs.

    Attributes:
        where: The submodule's path, or the function's name.
        kind: The submodule's type; ``"function"``, or ``"target"``.
        rule: The rule, as it prints; empty for a function's own gradient.
        out: Relevance at the outputs, ``[*B, T]`` for T targets.
        into: Relevance given on to the inputs, ``[*B, T]``.
        absorbed: What was not given on, by cause, ``[*B, T]`` each.
        inside: What rules inside of this one's module absorbed, which their rows tell. ``out`` is
            ``into`` plus this plus all that was absorbed.
        spread: Whether it cannot be told which of the numbers belong to which batch element; then
            their sum is right, and is spread evenly.
    """

    where: str
    kind: str
    rule: str
    out: Tensor
    into: Tensor
    absorbed: dict[str, Tensor]
    inside: Tensor | None = None
    spread: bool = False


class Ledger:
    """Where relevance went: a row for each call of a rule. Prints as a table of sums over the batch.

    ``start = arrived + Σ absorbed + gap`` for every batch element and target.

    Attributes:
        rows: In the order of the forward pass.
        start: The relevance that was started with, ``[*B, T]``.
        arrived: What arrived at the attributed inputs, ``[*B, T]``.

    >>> one = torch.ones(2, 1)
    >>> row = Row("0", "Linear", "EpsilonRule()", one, 0.75 * one, {"bias": 0.25 * one})
    >>> ledger = Ledger([row], start=one, arrived=0.75 * one)
    >>> ledger.absorbed("bias").flatten().tolist(), ledger.gap.abs().max().item()
    ([0.25, 0.25], 0.0)
    >>> print(ledger)
    where     type    rule           out  in   absorbed
    0         Linear  EpsilonRule()  2    1.5  bias 0.5
    (start)                          2
    (inputs)                              1.5
    (gap)                                      0
    """

    def __init__(self, rows: Iterable[Row], start: Tensor, arrived: Tensor) -> None:
        self.rows, self.start, self.arrived = tuple(rows), start, arrived

    @property
    def causes(self) -> tuple[str, ...]:
        """All causes that absorbed something, in the order of the rows."""
        return tuple(dict.fromkeys(cause for row in self.rows for cause in row.absorbed))

    def absorbed(self, cause: str | None = None) -> Tensor:
        """What was absorbed for one cause, or for all of them, ``[*B, T]``."""
        total = torch.zeros_like(self.start)
        for row in self.rows:
            for name, value in row.absorbed.items():
                if cause is None or name == cause:
                    total = total + value
        return total

    def at(self, where: str) -> tuple[Row, ...]:
        """The rows of a submodule's path or a function's name, one for each call."""
        return tuple(row for row in self.rows if row.where == where)

    @property
    def gap(self) -> Tensor:
        """``start − arrived − Σ absorbed``: what is not accounted for, ``[*B, T]``."""
        return self.start - self.arrived - self.absorbed()

    def check(self, tolerance: float, *, allow: Collection[str] | None = None) -> None:
        """Raises :class:`ConservationError` where more than a share of the start went elsewhere.

        Args:
            tolerance: The largest gap, as a share of the start's size (at least that of its mean).
            allow: Causes that may absorb; all but ``"no rule"`` if None. With ``()``, everything
                has to arrive at the inputs.

        >>> one = torch.ones(1, 1)
        >>> row = Row("0", "Linear", "EpsilonRule()", one, 0.75 * one, {"bias": 0.25 * one})
        >>> Ledger([row], start=one, arrived=0.75 * one).check(1e-6)
        >>> Ledger([row], start=one, arrived=0.75 * one).check(1e-6, allow=())
        Traceback (most recent call last):
        tdhook_like.errors.ConservationError: 0.25 of the start, more than 1e-06, ...
        """
        refused = [
            cause
            for cause in self.causes
            if (cause == "no rule" if allow is None else cause not in allow)
        ]
        gap, start = self.gap, self.start
        parts = [torch.zeros_like(start), gap, *(self.absorbed(cause) for cause in refused)]
        if not start.numel():
            return
        # A score of exactly zero starts with the stand-in for zero, of which nothing need be left.
        least = tiny(start.dtype)
        if any(row.spread for row in self.rows):
            # Which element lacks what is not known there; what all of them lack together is.
            least = least * start.numel()
            start, parts = start.sum(), [part.sum() for part in parts]
        scale = start.abs().clamp_min(start.abs().mean().clamp_min(1e-30))
        # Refused causes are not to make up for one another.
        missing = sum((part.abs() for part in parts[1:]), parts[0])
        worst = ((missing - least).clamp_min(0) / scale).max().item()
        if worst <= tolerance:
            return
        why = [f"{cause} {_sum(self.absorbed(cause))}" for cause in refused]
        why += [f"unaccounted for {_sum(gap)}"]
        raise ConservationError(
            f"{worst:.3g} of the start, more than {tolerance:g}, did not arrive at the inputs and is "
            f"not among what may be absorbed (sums over the batch: {', '.join(why)}). Print the "
            "ledger to see where; give the operations without a rule one, or allow= more causes."
        )

    def __str__(self) -> str:
        table = [("where", "type", "rule", "out", "in", "absorbed")]
        for row in self.rows:
            causes = ", ".join(f"{cause} {_sum(value)}" for cause, value in row.absorbed.items())
            if row.inside is not None:
                causes += f"{', ' if causes else ''}(inside {_sum(row.inside)})"
            out, into = (_sum(value) for value in (row.out, row.into))
            table.append((row.where or "(root)", row.kind, row.rule, out, into, causes))
        sums = [_sum(value) for value in (self.start, self.arrived)]
        gap = "0" if self._closes() else _sum(self.gap)
        table.append(("(start)", "", "", sums[0], "", ""))
        table.append(("(inputs)", "", "", "", sums[1], ""))
        table.append(("(gap)", "", "", "", "", gap))
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        return "\n".join(
            "  ".join(
                [*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[5]]
            ).rstrip()
            for line in table
        )

    def _closes(self) -> bool:
        """Whether the gap is what rounding leaves."""
        try:
            self.check(torch.finfo(self.start.dtype).eps ** 0.5, allow=self.causes)
        except ConservationError:
            return False
        return True


def _sum(value: Tensor) -> str:
    return f"{value.sum().item():.4g}"
