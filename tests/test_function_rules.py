"""Functions that no module stands for: each of torch's has its rule, or a run says that it has none."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from function_calls import Call, numbers
from function_records import EVERYTHING, RECORDS, Record
from tdhook_like import LRP
from tdhook_like.attribution.lrp import FunctionRules

CASES = [
    pytest.param(record, call, id=f"{record.name}: {call.name}")
    for record in RECORDS
    for call in record.calls
]
every_call = pytest.mark.parametrize(("record", "call"), CASES)


class Calls(nn.Module):
    """A model that is one function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class Nothing:
    """A mapper without rules for modules, and with some for functions."""

    def __init__(self, functions: FunctionRules) -> None:
        self.functions = functions

    def __call__(self, name: str, module: nn.Module) -> None:
        return None


def explained(
    function: Any,
    xs: list[Tensor],
    functions: FunctionRules | None = None,
    **options: Any,
) -> tuple[list[Tensor], Tensor, Tensor, Any]:
    """Relevances of the operands, the output, its relevance, and the context."""
    keys = [f"x{i}" for i in range(len(xs))]
    td = TensorDict(dict(zip(keys, xs, strict=True)), [])
    weights: list[Tensor] = []

    def score(outputs: Any) -> Tensor:
        y = outputs["y"]
        if not weights:
            weights.append(numbers(*y.shape, low=0.5, seed=3).to(y.dtype))
        return (y * weights[0]).sum()

    mapper = Nothing(functions or FunctionRules())
    context = LRP(mapper, score, **options).prepare(Calls(function), in_keys=keys, out_keys=["y"])
    with context as hooked:
        td = hooked(td)
    y = td["y"]
    return [td["attr", key] for key in keys], y, y * weights[0], context


def worst(found: list[Tensor], want: list[Tensor]) -> float:
    """The largest error, relative to the largest relevance."""
    scale = max(w.abs().max().item() for w in want) or 1.0
    return (
        max((f.double() - w.double()).abs().max().item() for f, w in zip(found, want, strict=True))
        / scale
    )


@every_call
def test_relevance_is_what_the_paper_says(record: Record, call: Call):
    xs = call.operands()
    found, _, R, _ = explained(call.function, xs, record.functions)
    assert worst(found, record.reference(call.function, xs, R)) < 1e-10


@every_call
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
def test_relevance_holds_in_lower_precision(record: Record, call: Call, dtype, tolerance):
    xs = call.operands()
    lower = [x.to(dtype) for x in xs]
    try:
        call.function(*lower)
    except (NotImplementedError, RuntimeError):
        pytest.skip(f"torch has no {call.name} in {dtype}")
    found, _, _, _ = explained(call.function, lower, record.functions)
    want, _, _, _ = explained(call.function, xs, record.functions)
    assert all(f.dtype == dtype for f in found)
    assert worst(found, want) < tolerance


@every_call
def test_what_a_record_says_is_conserved_is(record: Record, call: Call):
    found, _, R, _ = explained(call.function, call.operands(), record.functions)
    if record.conserves == EVERYTHING:
        assert sum(r.sum() for r in found).item() == pytest.approx(R.sum().item(), rel=1e-9)


@every_call
def test_the_output_is_the_functions_own(record: Record, call: Call):
    xs = call.operands()
    _, y, _, _ = explained(call.function, xs, record.functions)
    assert torch.equal(y, call.function(*xs))


@every_call
def test_no_function_of_a_record_is_reported(record: Record, call: Call):
    _, _, _, context = explained(
        call.function, call.operands(), record.functions, unhandled="raise"
    )
    assert not context.unhandled


@every_call
def test_the_ledger_accounts_for_all_relevance_and_changes_none(record: Record, call: Call):
    xs = call.operands()
    want, _, _, _ = explained(call.function, xs, record.functions)
    found = explained(call.function, xs, record.functions, ledger=1e-9)[0]
    assert worst(found, want) < 1e-12


@pytest.mark.parametrize(
    ("record", "call"),
    [pytest.param(r, call, id=f"{r.name}: {call.name}") for r in RECORDS for call in r.wrong],
)
def test_what_torch_refuses_is_refused_as_before(record: Record, call: Call):
    with pytest.raises((RuntimeError, NotImplementedError)) as plain:
        call.function(*call.operands())
    with pytest.raises(type(plain.value), match=re.escape(str(plain.value).splitlines()[0])):
        explained(call.function, call.operands(), record.functions)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's own
@every_call
def test_relevance_is_the_same_under_vmap(record: Record, call: Call):
    xs = call.operands()
    if "setitem" in call.name or "view" in call.name:
        pytest.skip("vmap does not write into part of a tensor")
    try:
        torch.vmap(call.function)(*[x[None] for x in xs])
    except (RuntimeError, ValueError, NotImplementedError):
        pytest.skip(f"torch.vmap has no {call.name}")
    plain, _, _, _ = explained(call.function, xs, record.functions)
    mapped = torch.vmap(call.function)
    found, _, _, _ = explained(lambda *xs: mapped(*[x[None] for x in xs])[0], xs, record.functions)
    assert worst(found, plain) < 1e-12


@every_call
def test_relevance_can_be_differentiated(record: Record, call: Call):
    if call.name == "cdist":
        pytest.skip("torch differentiates it once")
    xs = [x.requires_grad_() for x in call.operands()]
    found, _, _, _ = explained(call.function, xs, record.functions, create_graph=True)
    want, _, _, _ = explained(call.function, xs, record.functions)
    assert worst([f.detach() for f in found], want) < 1e-10
    direction = [numbers(*x.shape, seed=5) for x in xs]
    total = sum((r * numbers(*r.shape, seed=6)).sum() for r in found)
    slopes = torch.autograd.grad(total, xs, allow_unused=True)
    along = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True) if s is not None)

    def at(step: float) -> float:
        moved = [x.detach() + step * d for x, d in zip(xs, direction, strict=True)]
        relevance, _, _, _ = explained(call.function, moved, record.functions)
        return sum((r * numbers(*r.shape, seed=6)).sum() for r in relevance).item()

    step = 1e-6
    numeric = (at(step) - at(-step)) / (2 * step)
    assert float(along) == pytest.approx(numeric, rel=1e-4, abs=1e-4)
