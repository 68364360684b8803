"""Recurrent layers out of functions that have difference rules: linear maps, gates, products, sums.

torch runs a whole ``nn.LSTM`` in one call; here it is written out, step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdhook_like.attribution.differences.rules import Opened, Unhandled
from tdhook_like.attribution.differences.tape import DifferenceRule

__all__ = ["RECURRENT"]

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Tensor, Tensor | None], State]
"""From the input's linear map, the state and the hidden layer's weights to the next state."""


def lstm(x: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    """One step of an LSTM, from ``x = W x_t + b`` ``[B, 4H]``."""
    h, c = state
    i, f, g, o = (x + F.linear(h, weight, bias)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(x: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    """One step of a GRU, from ``x = W x_t + b`` ``[B, 3H]``."""
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, weight, bias).chunk(3, -1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (n + z * (h - n),)


def plain(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    state: State,
    weight: Tensor,
    bias: Tensor | None,
) -> State:
    """One step of a plain recurrent net, from ``x = W x_t + b`` ``[B, H]``."""
    (h,) = state
    return (function(x + F.linear(h, weight, bias)),)


def cell(step: Step, x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, *biases: Tensor) -> Any:
    """What ``torch.lstm_cell`` and its relatives give."""
    b_ih, b_hh = biases or (None, None)
    state = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
    new: Any = step(F.linear(x, w_ih, b_ih), state, w_hh, b_hh)
    return new if len(new) > 1 else new[0]


def sequence(
    step: Step,
    x: Tensor,
    hx: Any,
    weights: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """What ``torch.lstm`` and its relatives give for a padded batch: outputs, then final states."""
    states = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
    data = x.transpose(0, 1) if batch_first else x
    flat, finals, ways = list(weights), [], (False, True) if bidirectional else (False,)
    size = len(flat) // (num_layers * len(ways))
    for _ in range(num_layers):
        directions = []
        for backward in ways:
            n = len(finals)
            w_ih, w_hh, *biases = flat[n * size : (n + 1) * size]
            b_ih, b_hh = biases if has_biases else (None, None)
            state, found = tuple(s[n] for s in states), []
            steps = F.linear(data, w_ih, b_ih).unbind(0)
            for one in reversed(steps) if backward else steps:
                state = step(one, state, w_hh, b_hh)
                found.append(state[0])
            finals.append(state)
            directions.append(torch.stack(found[::-1] if backward else found))
        data = torch.cat(directions, -1) if len(directions) > 1 else directions[0]
    ends = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    return (data.transpose(0, 1) if batch_first else data, *ends)


class Unrolled(DifferenceRule):
    """A recurrent layer, written out; packed sequences and projections are not known.

    Args:
        step: One step of it.
    """

    def __init__(self, step: Step) -> None:
        self._opened = Opened(partial(sequence, step))
        self._projects = step is lstm

    def call(self, tape: Any, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        padded = len(args) == 9 and isinstance(args[2], list | tuple) and not kwargs
        if padded:
            per = len(args[2]) // (args[4] * (2 if args[7] else 1))
            if per == (4 if args[3] else 2) and not (args[5] and args[6]):
                return self._opened.call(tape, name, func, args, kwargs)
        return Unhandled().call(tape, name, func, args, kwargs)


_PLAIN = {"rnn_tanh": partial(plain, torch.tanh), "rnn_relu": partial(plain, torch.relu)}
_STEPS: dict[str, Step] = {"lstm": lstm, "gru": gru, **_PLAIN}

#: By the functions' names.
RECURRENT: dict[str, DifferenceRule] = {
    **{name: Unrolled(step) for name, step in _STEPS.items()},
    **{f"{name}_cell": Opened(partial(cell, step)) for name, step in _STEPS.items()},
}
