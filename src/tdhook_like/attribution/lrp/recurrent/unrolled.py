"""A recurrent module written out step by step, under one gate rule: layers, directions, packing.

A sequence is held flat, one step behind the other, with the size of each step: all B of a padded
batch, ever fewer of a packed one. The input's linear map then is one product for all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tdhook_like.attribution.lrp.modifiers import effective_parameters
from tdhook_like.attribution.lrp.recurrent.gates import STEPS, Gates, Weights
from tdhook_like.hooks.surrogate import constant

__all__ = ["cell", "cell_kind", "sequence"]

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State], State]


def cell_kind(module: nn.Module) -> str | None:
    """Which step a module takes: a key of ``STEPS``; None for what is no recurrent module.

    Cells are told by their class's name and their number of gates, so that cells written in Python
    with torch's names and parameters are known too.

    >>> cell_kind(nn.GRU(1, 1)), cell_kind(nn.RNNCell(1, 1)), cell_kind(nn.Linear(1, 1))
    ('GRU', 'RNN_TANH', None)
    """
    if isinstance(module, nn.RNNBase):
        return module.mode if module.mode in STEPS else None
    if not isinstance(module, nn.RNNCellBase):
        return None
    if isinstance(module, nn.RNNCell):
        kind = f"RNN_{module.nonlinearity.upper()}"
        return kind if kind in STEPS else None
    names = {kind.__name__ for kind in type(module).__mro__}
    for kind, chunks in (("LSTM", 4), ("GRU", 3)):
        if f"{kind}Cell" in names and module.weight_ih.shape[0] == chunks * module.hidden_size:
            return kind
    return None


def cell(gates: Gates, module: nn.RNNCellBase, x: Tensor, hx: Any) -> Any:
    """The surrogate of a cell's output: ``h`` ``[B, H]`` or ``[H]``, an LSTM's ``(h, c)``.

    Args:
        gates: The gate rule.
        module: The cell.
        x: ``[B, F]`` or ``[F]``.
        hx: What the cell was given: ``h``, ``(h, c)`` or None.
    """
    kind = cell_kind(module) or ""
    weights = _weights(module, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    lone = x.dim() == 1
    states = 2 if kind == "LSTM" else 1
    if hx is None:
        state: State = (x.new_zeros(*x.shape[:-1], module.hidden_size),) * states
    else:
        state = tuple(hx) if kind == "LSTM" else (hx,)
    if lone:
        x, state = x.unsqueeze(0), tuple(s.unsqueeze(0) for s in state)
    new = STEPS[kind](gates, F.linear(x, weights.w_ih, weights.b_ih), state, weights)
    if lone:
        new = tuple(s.squeeze(0) for s in new)
    return new if kind == "LSTM" else new[0]


def sequence(gates: Gates, module: nn.RNNBase, x: Any, hx: Any, mask: Tensor | None = None) -> Any:
    """The surrogate of what ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` returns, of its structure.

    Args:
        gates: The gate rule.
        module: The module.
        x: ``[T, B, F]``, ``[B, T, F]``, ``[T, F]`` or a packed sequence.
        hx: The initial states that the module was given, or None.
        mask: Where False, states stay as they are: ``[T, B]``, or ``[B, T]`` with batch first.
    """
    flat = _Flat.of(x, module.batch_first, mask)
    states = flat.states(module, hx)
    data, finals = flat.data, []
    for layer in range(module.num_layers):
        directions = []
        for suffix in ("", "_reverse") if module.bidirectional else ("",):
            weights = _weights(module, _names(layer, suffix))
            start = tuple(state[len(finals)] for state in states)
            outputs, final = _walk(gates, module.mode, weights, flat, data, start, bool(suffix))
            directions.append(torch.cat(outputs))
            finals.append(final)
        data = torch.cat(directions, -1) if len(directions) > 1 else directions[0]
    ends = tuple(flat.end(torch.stack(parts)) for parts in zip(*finals, strict=True))
    return flat.like(x, data), ends if module.mode == "LSTM" else ends[0]


@dataclass(frozen=True)
class _Flat:
    """A batch of sequences, one step behind the other.

    Attributes:
        data: ``[sum of sizes, F]``.
        sizes: How many sequences each step has, from long to short.
        lone: Whether there was no batch dimension.
        batch_first: Whether the batch was in front of time.
        masks: Which sequences each step moves on, ``[B, 1]`` each; None for all.
        order: How packing sorted the batch; None where it did not.
        back: The inverse of ``order``.
    """

    data: Tensor
    sizes: list[int]
    lone: bool = False
    batch_first: bool = False
    masks: tuple[Tensor, ...] | None = None
    order: Tensor | None = None
    back: Tensor | None = None

    @staticmethod
    def of(x: Any, batch_first: bool, mask: Tensor | None) -> _Flat:
        if isinstance(x, PackedSequence):
            order, back = x.sorted_indices, x.unsorted_indices
            return _Flat(x.data, x.batch_sizes.tolist(), order=order, back=back)
        lone = x.dim() == 2
        batch_first = batch_first and not lone
        if lone:
            x = x.unsqueeze(1)
        elif batch_first:
            x, mask = x.transpose(0, 1), None if mask is None else mask.transpose(0, 1)
        masks = None if mask is None else mask.unsqueeze(-1).unbind(0)
        return _Flat(x.flatten(0, 1), [x.shape[1]] * x.shape[0], lone, batch_first, masks)

    def states(self, module: nn.RNNBase, hx: Any) -> State:
        """The initial states, ``[layers · directions, B, H]`` each, in the order of the steps."""
        if hx is None:
            n = module.num_layers * (2 if module.bidirectional else 1)
            widths = [module.proj_size or module.hidden_size, module.hidden_size]
            widths = widths if module.mode == "LSTM" else widths[:1]
            return tuple(self.data.new_zeros(n, self.sizes[0], width) for width in widths)
        given = tuple(hx) if module.mode == "LSTM" else (hx,)
        given = tuple(s.unsqueeze(1) for s in given) if self.lone else given
        return given if self.order is None else tuple(s.index_select(1, self.order) for s in given)

    def end(self, state: Tensor) -> Tensor:
        """Final states in the order of the batch."""
        if self.back is not None:
            return state.index_select(1, self.back)
        return state.squeeze(1) if self.lone else state

    def like(self, x: Any, data: Tensor) -> Any:
        """Outputs in the form of the input."""
        if isinstance(x, PackedSequence):
            return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        data = data.unflatten(0, (len(self.sizes), self.sizes[0]))
        return data.squeeze(1) if self.lone else data.transpose(0, 1) if self.batch_first else data


def _walk(
    gates: Gates,
    kind: str,
    weights: Weights,
    flat: _Flat,
    data: Tensor,
    start: State,
    backward: bool,
) -> tuple[list[Tensor], State]:
    """One layer in one direction: its output at each step, in order of time, and its final state."""

    def step(x: Tensor, state: State) -> State:
        return STEPS[kind](gates, x, state, weights)

    steps = F.linear(data, weights.w_ih, weights.b_ih).split(flat.sizes)
    masks: Sequence[Tensor | None] = flat.masks or [None] * len(steps)
    if backward:
        return _backward(step, steps, masks, start)
    return _forward(step, steps, masks, start)


def _forward(
    step: Step, steps: Sequence[Tensor], masks: Sequence[Tensor | None], state: State
) -> tuple[list[Tensor], State]:
    outputs, ended = [], []
    for x, mask in zip(steps, masks, strict=True):
        size = x.shape[0]
        if size < state[0].shape[0]:  # the shortest sequences are over
            ended.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        state = _kept(mask, step(x, state), state)
        outputs.append(state[0])
    parts = [state, *reversed(ended)]
    return outputs, tuple(torch.cat(s) for s in zip(*parts, strict=True)) if ended else state


def _backward(
    step: Step, steps: Sequence[Tensor], masks: Sequence[Tensor | None], start: State
) -> tuple[list[Tensor], State]:
    state, outputs = tuple(s[:0] for s in start), []
    for x, mask in zip(reversed(steps), reversed(masks), strict=True):
        size, present = x.shape[0], state[0].shape[0]
        if size > present:  # shorter sequences begin
            state = tuple(
                torch.cat([s, first[present:size]]) for s, first in zip(state, start, strict=True)
            )
        state = _kept(mask, step(x, state), state)
        outputs.append(state[0])
    return outputs[::-1], state


def _kept(mask: Tensor | None, new: State, old: State) -> State:
    if mask is None:
        return new
    return tuple(torch.where(mask, after, before) for after, before in zip(new, old, strict=True))


def _names(layer: int, suffix: str) -> tuple[str, ...]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    return tuple(f"{name}_l{layer}{suffix}" for name in names)


def _weights(module: nn.Module, names: Sequence[str]) -> Weights:
    found = effective_parameters(module)
    for name in names:
        computed = None if name in found else getattr(module, name, None)
        if isinstance(computed, Tensor):  # an attribute that is no parameter: older weight norm
            found[name] = constant(computed)
    return Weights(*(found.get(name) for name in names))  # pyright: ignore[reportArgumentType]
