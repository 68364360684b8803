"""Gate rules against relevance carried backward unit by unit and step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torchrl.modules import GRUCell as PythonGRUCell
from torchrl.modules import LSTMCell as PythonLSTMCell
from torchrl.modules.tensordict_module.rnn import GRU as PythonGRU
from torchrl.modules.tensordict_module.rnn import LSTM as PythonLSTM

import reference_recurrent as ref
from pristine import bits
from tdhook_like.attribution.lrp import Inputs
from tdhook_like.attribution.lrp.recurrent.rules import (
    HalfRule,
    ProportionalRule,
    RecurrentRule,
    SignalTakesAllRule,
)

F, H, B, T = 3, 4, 2, 4
F64, F32 = torch.float64, torch.float32
TOLERANCE = {F64: 1e-10, F32: 1e-5}
EPSILON = {F64: 1e-3, F32: 0.25}
"""Float32 loses as many digits as a denominator near zero amplifies relevance."""

GATES = {
    "signal": (SignalTakesAllRule, ref.all_to_signal),
    "half": (HalfRule, ref.half_each),
    "proportional": (ProportionalRule, ref.in_proportion),
    "by size": (lambda eps=1e-6: ProportionalRule(eps, absolute=True), ref.in_proportion_of_sizes),
}
# torch says so once for every process that projects on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

every_gate = pytest.mark.parametrize("gates", GATES)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


@dataclass(frozen=True)
class Variant:
    """A module, and how it is called."""

    build: Callable[[], Any]
    packed: bool | None = None  # whether the lengths have to be sorted
    masked: bool = False
    lone: bool = False
    states: bool = True


VARIANTS = {
    "LSTM": Variant(lambda: nn.LSTM(F, H)),
    "LSTM, batch first": Variant(lambda: nn.LSTM(F, H, batch_first=True)),
    "LSTM without bias": Variant(lambda: nn.LSTM(F, H, bias=False)),
    "LSTM of three layers": Variant(lambda: nn.LSTM(F, H, num_layers=3)),
    "LSTM both ways": Variant(lambda: nn.LSTM(F, H, bidirectional=True)),
    "LSTM with projection": Variant(lambda: nn.LSTM(F, H, proj_size=2)),
    "LSTM with everything": Variant(
        lambda: nn.LSTM(
            F, H, num_layers=2, bidirectional=True, proj_size=3, dropout=0.5, batch_first=True
        ).eval()
    ),
    "LSTM without states": Variant(lambda: nn.LSTM(F, H, num_layers=2), states=False),
    "LSTM without a batch": Variant(lambda: nn.LSTM(F, H, num_layers=2), lone=True),
    "LSTM without a batch, batch first": Variant(
        lambda: nn.LSTM(F, H, batch_first=True), lone=True, states=False
    ),
    "LSTM, packed in order": Variant(lambda: nn.LSTM(F, H, num_layers=2), packed=True),
    "LSTM, packed out of order": Variant(lambda: nn.LSTM(F, H, num_layers=2), packed=False),
    "LSTM both ways, packed": Variant(
        lambda: nn.LSTM(F, H, num_layers=2, bidirectional=True, batch_first=True), packed=False
    ),
    "LSTM with weight norm": Variant(lambda: weight_norm(nn.LSTM(F, H), "weight_hh_l0")),
    "GRU": Variant(lambda: nn.GRU(F, H)),
    "GRU without bias": Variant(lambda: nn.GRU(F, H, bias=False)),
    "GRU with everything": Variant(
        lambda: nn.GRU(F, H, num_layers=2, bidirectional=True, batch_first=True)
    ),
    "GRU without states": Variant(lambda: nn.GRU(F, H), states=False),
    "GRU without a batch": Variant(lambda: nn.GRU(F, H), lone=True),
    "GRU both ways, packed": Variant(
        lambda: nn.GRU(F, H, num_layers=2, bidirectional=True), packed=False
    ),
    "RNN": Variant(lambda: nn.RNN(F, H, num_layers=2)),
    "RNN with relu": Variant(lambda: nn.RNN(F, H, nonlinearity="relu", bidirectional=True)),
    "RNN, packed": Variant(lambda: nn.RNN(F, H), packed=True),
    "torchrl's LSTM": Variant(lambda: PythonLSTM(F, H, num_layers=2)),
    "torchrl's LSTM, time first": Variant(lambda: PythonLSTM(F, H, batch_first=False)),
    "torchrl's LSTM, masked": Variant(lambda: PythonLSTM(F, H, num_layers=2), masked=True),
    "torchrl's GRU": Variant(lambda: PythonGRU(F, H, num_layers=2, bias=False)),
    "torchrl's GRU, masked, time first": Variant(
        lambda: PythonGRU(F, H, batch_first=False), masked=True
    ),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


@dataclass
class Explained:
    """One call: what came out, and relevance by sequence: inputs ``[T, F]``, states ``[n, H]``."""

    output: Any
    found: Any
    inputs: list[Tensor]
    states: list[list[Tensor]]  # by sequence, by kind
    parts: list[tuple[Tensor, list[Tensor], Tensor, list[Tensor]]]  # inputs, states, v, v of states


def explained(variant: Variant, rule: RecurrentRule, dtype: torch.dtype) -> Explained:
    """The rule on the variant's module: relevance that ``Σ v · output`` has, v drawn."""
    torch.manual_seed(0)
    module = variant.build().to(F64)
    lengths = [T - 1, T] if variant.packed is False else [T, T - 1]
    lengths = [T] * B if variant.packed is None and not variant.masked else lengths
    x = torch.randn(B, T, F).to(F64)
    n = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or H, H][: 2 if module.mode == "LSTM" else 1]
    states = [torch.randn(n, B, width).to(F64) * variant.states for width in widths]
    v = torch.randn(B, T, widths[0] * (2 if module.bidirectional else 1), dtype=F64)
    v_states = [torch.randn_like(s) for s in states]
    for b, length in enumerate(lengths):
        v[b, length:] = 0  # nothing comes out of padding
    if variant.lone:
        x, v, lengths = x[:1], v[:1], lengths[:1]
        states, v_states = ([s[:, :1] for s in group] for group in (states, v_states))

    module = module.to(dtype)
    leaves = [x.to(dtype), *(s.to(dtype) for s in states)]
    for leaf in leaves:
        leaf.requires_grad_()
    inputs = arguments(variant, module, leaves, lengths)
    output = module(*inputs, **inputs.kwargs)
    found = rule.apply(module, inputs, output)
    outs = in_batches(variant, module, found)
    weights = [v.to(dtype), *(s.to(dtype) for s in v_states)]
    grads = torch.autograd.grad(outs, leaves, weights, allow_unused=True)
    R = [
        x.detach() * g if g is not None else torch.zeros_like(x)
        for x, g in zip(leaves, grads, strict=True)
    ]
    parts = [
        (
            x[b, :length].detach(),
            [s[:, b].detach() for s in states],
            v[b, :length],
            [s[:, b] for s in v_states],
        )
        for b, length in enumerate(lengths)
    ]
    return Explained(
        output,
        found,
        [R[0][b, :length] for b, length in enumerate(lengths)],
        [[r[:, b] for r in R[1:]] for b in range(len(lengths))],
        parts,
    )


def arguments(variant: Variant, module: Any, leaves: list[Tensor], lengths: list[int]) -> Inputs:
    x, *states = leaves
    given: Any = x
    if variant.lone:
        given, states = x[0], [s[:, 0] for s in states]
    elif not module.batch_first:
        given = x.transpose(0, 1)
    if variant.packed is not None:
        given = pack_padded_sequence(
            given, torch.tensor(lengths), module.batch_first, enforce_sorted=variant.packed
        )
    kwargs = {}
    if variant.states:
        kwargs["hx"] = tuple(states) if module.mode == "LSTM" else states[0]
    if variant.masked:
        mask = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
        kwargs["mask"] = mask if module.batch_first else mask.T
    return Inputs((given,), kwargs)


def in_batches(variant: Variant, module: Any, output: Any) -> list[Tensor]:
    """Outputs ``[B, T, H]`` and final states ``[n, B, H]``."""
    out, states = output
    states = list(states) if module.mode == "LSTM" else [states]
    if isinstance(out, PackedSequence):
        return [pad_packed_sequence(out, batch_first=True, total_length=T)[0], *states]
    if variant.lone:
        return [out.unsqueeze(0), *(s.unsqueeze(1) for s in states)]
    return [out if module.batch_first else out.transpose(0, 1), *states]


def floats(value: Any) -> list[Tensor]:
    if isinstance(value, tuple):
        return [item for part in value for item in floats(part)]
    return [value] if isinstance(value, Tensor) and value.is_floating_point() else []


def assert_like(got: Tensor, want: Any, most: float) -> None:
    want = torch.as_tensor(want, dtype=F64)
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= most


# --- the reference --------------------------------------------------------------------------------


@every_dtype
@every_gate
@every_variant
def test_a_gate_rule_gives_what_carrying_relevance_backward_gives(name, gates, dtype):
    make, share = GATES[gates]
    variant, epsilon = VARIANTS[name], EPSILON[dtype]
    case = explained(variant, make(epsilon), dtype)
    torch.manual_seed(0)
    module = variant.build().to(F64)
    for b, part in enumerate(case.parts):
        want, want_states = ref.relevance(module, *map(as_lists, part), share, epsilon)
        size = max(torch.tensor(values).abs().max().item() for values in (want, *want_states))
        assert_like(case.inputs[b], want, TOLERANCE[dtype] * size)
        for got, expected in zip(case.states[b], want_states, strict=True):
            assert_like(got, expected, TOLERANCE[dtype] * size)


def as_lists(value: Any) -> Any:
    return [as_lists(part) for part in value] if isinstance(value, list) else value.tolist()


@every_gate
@every_variant
def test_outputs_are_the_module_s_own_to_the_last_bit(name, gates):
    case = explained(VARIANTS[name], GATES[gates][0](), F32)
    output, found = floats(case.output), floats(case.found)
    assert [bits(y) for y in found] == [bits(y) for y in output]
    assert type(case.found[0]) is type(case.output[0])
    assert len(case.found) == len(case.output)


@every_variant
def test_a_module_written_out_computes_what_the_module_computes(name):
    variant = VARIANTS[name]
    module = variant.build().to(F64)
    leaves = [torch.randn(B, T, F, dtype=F64)]
    n = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or H, H][: 2 if module.mode == "LSTM" else 1]
    leaves += [torch.randn(n, B, width, dtype=F64) for width in widths]
    inputs = arguments(variant, module, leaves, [T, T - 1] if variant.packed else [T - 1, T])
    output = module(*inputs, **inputs.kwargs)
    written_out = HalfRule().surrogate(module, inputs, output)
    for value, other in zip(floats(output), floats(written_out), strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=1e-12)


CELLS = {
    "LSTMCell": ("LSTM", lambda: nn.LSTMCell(F, H)),
    "LSTMCell without bias": ("LSTM", lambda: nn.LSTMCell(F, H, bias=False)),
    "GRUCell": ("GRU", lambda: nn.GRUCell(F, H)),
    "RNNCell": ("RNN_TANH", lambda: nn.RNNCell(F, H)),
    "RNNCell with relu": ("RNN_RELU", lambda: nn.RNNCell(F, H, nonlinearity="relu")),
    "torchrl's LSTMCell": ("LSTM", lambda: PythonLSTMCell(F, H)),
    "torchrl's GRUCell": ("GRU", lambda: PythonGRUCell(F, H, bias=False)),
}


@pytest.mark.parametrize("lone", [False, True], ids=["batch", "no batch"])
@every_gate
@pytest.mark.parametrize("name", CELLS)
def test_a_cell_s_step_is_that_of_the_reference(name, gates, lone):
    (kind, build), (make, share) = CELLS[name], GATES[gates]
    module = build().to(F64)
    shape = () if lone else (B,)
    leaves = [torch.randn(*shape, F, dtype=F64, requires_grad=True)]
    leaves += [
        torch.randn(*shape, H, dtype=F64, requires_grad=True) for _ in range(1 + (kind == "LSTM"))
    ]
    hx = tuple(leaves[1:]) if kind == "LSTM" else leaves[1]
    output = module(leaves[0], hx)
    found = floats(make(1e-3).apply(module, Inputs((leaves[0], hx)), output))
    assert [bits(y) for y in found] == [bits(y) for y in floats(output)]
    weights = [torch.randn_like(y) for y in found]
    grads = torch.autograd.grad(found, leaves, weights)
    got = [(x * g).detach().reshape(-1, x.shape[-1]) for x, g in zip(leaves, grads, strict=True)]
    given = [x.detach().reshape(-1, x.shape[-1]).tolist() for x in leaves]
    start = [(v * y).detach().reshape(-1, H).tolist() for v, y in zip(weights, found, strict=True)]
    cell = ref.cell_of(module, kind, share, 1e-3)
    for b, x in enumerate(given[0]):
        _, seen = cell.forward(x, [s[b] for s in given[1:]])
        R_x, R_states = cell.backward(seen, [R[b] for R in start])
        for mine, theirs in zip(got, [R_x, *R_states], strict=True):
            assert_like(mine[b], theirs, 1e-9 * max(1, mine.abs().max()))


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_without_a_state_begins_at_zero(name):
    module, x = CELLS[name][1](), torch.randn(B, F, requires_grad=True)
    zeros = torch.zeros(B, H)
    hx = (zeros, zeros) if CELLS[name][0] == "LSTM" else zeros
    found = [
        floats(HalfRule().apply(module, Inputs(args), module(*args)))[0] for args in ((x,), (x, hx))
    ]
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in found]
    assert torch.equal(*found) and torch.equal(*gradients)


# --- what is conserved ----------------------------------------------------------------------------

UNBIASED = {
    "LSTM": lambda: nn.LSTM(F, H, num_layers=2, bias=False, bidirectional=True, proj_size=2),
    "GRU": lambda: nn.GRU(F, H, num_layers=2, bias=False, bidirectional=True),
    "RNN": lambda: nn.RNN(F, H, num_layers=2, bias=False, bidirectional=True),
}


@every_gate
@pytest.mark.parametrize("kind", UNBIASED)
def test_without_biases_inputs_and_initial_states_get_all_relevance(kind, gates):
    module = UNBIASED[kind]().to(F64)
    x = torch.randn(T, B, F, dtype=F64, requires_grad=True)
    widths = {"LSTM": [2, H]}.get(kind, [H])
    states = [torch.randn(4, B, width, dtype=F64, requires_grad=True) for width in widths]
    hx = tuple(states) if kind == "LSTM" else states[0]
    rule = GATES[gates][0](1e-15)
    out, final = rule.apply(module, Inputs((x, hx)), module(x, hx))
    for y in (out[0], out[-1], floats(final)[0], floats(final)[-1][1]):
        grads = torch.autograd.grad(y.sum(), [x, *states], retain_graph=True)
        parts = [(v * g).detach() for v, g in zip((x, *states), grads, strict=True)]
        size = sum(part.abs().sum() for part in parts)
        assert abs(sum(part.sum() for part in parts) - y.detach().sum()) <= 1e-9 * size


def test_gates_are_constants_where_the_signal_takes_all():
    lstm = nn.LSTM(F, H)
    with torch.no_grad():
        lstm.weight_ih_l0[2 * H : 3 * H] = 0  # the input reaches the gates alone
        lstm.weight_hh_l0[2 * H : 3 * H] = 0
    x = torch.randn(T, B, F, requires_grad=True)
    for rule, reached in ((SignalTakesAllRule(), False), (HalfRule(), True)):
        out, _ = rule.apply(lstm, Inputs((x,)), lstm(x))
        assert torch.autograd.grad(out.sum(), x)[0].any() == reached


@every_gate
def test_shares_of_a_product_add_up_to_it(gates):
    gate, signal = torch.rand(50, dtype=F64), torch.randn(50, dtype=F64)
    rule = GATES[gates][0](1e-15)
    whole = sum(torch.as_tensor(share) for share in rule.shares(gate, signal))
    torch.testing.assert_close(whole.expand(50).double(), torch.ones(50, dtype=F64))
