"""Maxima: the larger one of the two results says who carries the difference.

Of ``y = max x`` with winner p at the input, ``y⁰ = max x⁰`` with winner q at the baseline: where
``y ≥ y⁰`` the winner at the input carries all of the difference, ``m_p = (y − y⁰) / (x_p − x_p⁰)``, else
the winner at the baseline. It is complete, as a carrier changes by at least as much as the result
(``x_p⁰ ≤ y⁰``, ``x_q ≤ y``), so multipliers lie between 0 and 1. Exchanging input and baseline changes
the sign of every contribution and nothing else.

Source: derived here; Lundberg & Lee 2017 treat max pooling alike in their DeepLift.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdhook_like.attribution.differences.rules import Given, argument, unhandled
from tdhook_like.attribution.differences.tape import DifferenceRule, Tape
from tdhook_like.hooks.surrogate import attach, constant, has_graph

__all__ = ["Extremum", "Larger", "MaxPool"]


def carried(
    x: Tensor, x0: Tensor, p: Tensor, q: Tensor, y: Tensor, y0: Tensor, largest: bool = True
) -> Tensor:
    """The carriers' surrogate: ``x_c · G((y − y⁰) / (x_c − x_c⁰))``, of ``y``'s shape.

    Args:
        x: ``[..., n]``, with its graph.
        x0: ``[..., n]``.
        p: Winners among x, ``[..., k]``.
        q: Winners among x0, ``[..., k]``.
        y: What they are at the input, ``[..., k]``.
        y0: At the baseline.
        largest: Whether the largest wins; else the smallest.
    """
    carrier = torch.where(y >= y0 if largest else y <= y0, p, q)
    here = x.gather(-1, carrier)
    change = constant(here) - x0.gather(-1, carrier)
    return here * torch.where(change == 0, 1.0, (y - y0) / change)


class MaxPool(DifferenceRule):
    """Max pooling over n dimensions, plain or adaptive.

    Args:
        n: How many dimensions.
        adaptive: Whether it is told the size of its output.
    """

    fresh = True

    def __init__(self, n: int, adaptive: bool = False) -> None:
        self.n = n
        kind = "adaptive_max_pool" if adaptive else "max_pool"
        self._pool = getattr(F, f"{kind}{n}d_with_indices")

    def call(self, tape: Tape, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Pools, remembering the winners."""
        several = name.endswith("_with_indices")
        x = argument(args, kwargs, 0, "input", None)
        options = {k: v for k, v in kwargs.items() if k not in ("input", "return_indices")}
        with torch.no_grad():
            y, p = self._pool(constant(x), *args[1:6], **options)
        if tape.recording:
            tape.keep(name, x, (y, p))
            return (y, p) if several else y
        x0, (y0, q) = tape.take(name, x)
        if torch.is_grad_enabled() and has_graph(x):
            n = self.n
            parts = (t.flatten(-n) for t in (x, x0, p, q, y, y0))
            y = attach(y, carried(*parts).reshape(y.shape), fresh=True)
        return (y, p) if several else y


class Extremum(DifferenceRule):
    """The largest or smallest entry along dimensions: ``max``, ``amax``, ``min``, ``amin``.

    Args:
        largest: Whether it is the largest.
    """

    def __init__(self, largest: bool = True) -> None:
        self.largest = largest

    def surrogate(
        self, tape: Tape, func: Any, output: Any, before: Any, there: Given, args: Any, kwargs: Any
    ) -> Any:
        second = argument(args, kwargs, 1, "other", None)
        if isinstance(second, Tensor):
            larger = Larger(self.largest)
            return larger.surrogate(tape, func, output, before, there, args, kwargs)
        several = not isinstance(output, Tensor)
        y, y0 = (output[0], before[0]) if several else (output, before)
        x, x0 = argument(args, kwargs, 0, "input", None), argument(*there, 0, "input", None)
        dim = argument(args, kwargs, 1, "dim", None)
        dims = tuple(range(x.ndim)) if dim is None or dim == () else dim
        dims = tuple(d % x.ndim for d in ((dims,) if isinstance(dims, int) else dims))
        kept = [d for d in range(x.ndim) if d not in dims]
        flat, flat0 = (t.permute(*kept, *dims).flatten(len(kept)) for t in (x, x0))
        pick = torch.argmax if self.largest else torch.argmin
        p, q = (pick(t, -1, keepdim=True) for t in (constant(flat), flat0))
        shape = flat.shape[:-1]
        ends = (constant(y).reshape(*shape, 1), y0.reshape(*shape, 1))
        found = carried(flat, flat0, p, q, *ends, largest=self.largest).reshape(y.shape)
        return type(output)((found, None)) if several else found


class Larger(DifferenceRule):
    """The larger or smaller one of two tensors, entry by entry.

    Args:
        largest: Whether it is the larger one.
    """

    fresh = True

    def __init__(self, largest: bool = True) -> None:
        self.largest = largest

    def surrogate(
        self, tape: Tape, func: Any, output: Any, before: Any, there: Given, args: Any, kwargs: Any
    ) -> Tensor | None:
        found = []
        for given, named in ((args, kwargs), there):
            pair = (given[0], argument(given, named, 1, "other", None))
            found.append(torch.stack(torch.broadcast_tensors(*pair), -1))
        x, x0 = found
        if x.dtype != output.dtype:
            unhandled(tape, func)
            return None
        pick = torch.argmax if self.largest else torch.argmin
        p, q = (pick(t, -1, keepdim=True) for t in (constant(x), x0))
        ends = constant(output).unsqueeze(-1), before.unsqueeze(-1)
        return carried(x, x0, p, q, *ends, largest=self.largest).squeeze(-1)
