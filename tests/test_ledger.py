"""The ledger: it closes, changes nothing, costs nothing when off, and can be asked and printed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ledger_models import (
    F64,
    B,
    Calling,
    absorbed,
    assert_rows_close,
    by_path,
    every_model,
    made,
    run,
    sequential,
)
from pristine import assert_same, bits, snapshot
from tdhook_like import LRP, Each, EpsilonPlus
from tdhook_like.attribution.lrp import EpsilonRule, FunctionRules, StopRule, UniformEpsilonRule
from tdhook_like.attribution.lrp.ledger.accounts import Ledger, Row
from tdhook_like.errors import ConservationError, RuleError

# --- it closes, and changes nothing ---------------------------------------------------------------


@every_model
def test_of_every_elements_start_everything_arrives_or_was_absorbed(name: str):
    td, ledger = run(*made(name), ledger=True)
    assert_rows_close(ledger)
    scale = ledger.start.abs().max()
    assert ledger.gap.abs().max() <= 1e-9 * scale
    assert not any(row.spread for row in ledger.rows)
    torch.testing.assert_close(ledger.start[:, 0], td["y"][:, 0])
    torch.testing.assert_close(ledger.arrived[:, 0], td["attr", "x"].sum(-1))
    ledger.check(1e-6, allow=ledger.causes)


@every_model
def test_relevance_and_outputs_with_a_ledger_are_those_without_to_the_last_bit(name: str):
    net, mapper, x = made(name)
    plain, none = run(net, mapper, x)
    before = snapshot(net)
    td, ledger = run(net, mapper, x, ledger=True)
    assert none is None and ledger is not None
    assert_same(before, snapshot(net))
    assert bits(td["y"]) == bits(plain["y"])
    assert bits(td["attr", "x"]) == bits(plain["attr", "x"])


@every_model
def test_each_of_several_targets_and_outputs_has_columns_that_close(name: str):
    net, mapper, x = made(name)
    targets = {"first": ("y", 0), "all": Each("y"), "apart": lambda td: td["y"][..., 1].square()}
    _, ledger = run(net, mapper, x, targets, ledger=True)
    assert ledger.start.shape == (B, 5)
    assert_rows_close(ledger)
    assert ledger.gap.abs().max() <= 1e-9 * ledger.start.abs().max()
    torch.testing.assert_close(ledger.start[:, 0], ledger.start[:, 1])
    for row in ledger.rows:
        torch.testing.assert_close(row.out[:, 0], row.out[:, 1])


@every_model
def test_the_ledger_of_one_element_is_its_part_of_the_ledger_of_all(name: str):
    net, mapper, x = made(name)
    _, ledger = run(net, mapper, x, ledger=True)
    for i in range(B):
        _, alone = run(net, mapper, x[i : i + 1], ledger=True)
        for where in {row.where for row in ledger.rows}:
            for of in (lambda row: row.out, lambda row: row.into, absorbed):
                mine = sum((of(row)[i] for row in ledger.at(where)), torch.zeros(1, dtype=F64))
                own = sum((of(row)[0] for row in alone.at(where)), torch.zeros(1, dtype=F64))
                torch.testing.assert_close(mine, own, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["layers", "functional", "batch norm folded", "a stopped branch"])
def test_it_closes_in_single_precision_as_far_as_that_goes(name: str):
    _, ledger = run(*made(name, torch.float32), ledger=True)
    assert ledger.gap.abs().max() <= 1e-4 * ledger.start.abs().max()


@pytest.mark.parametrize("start", ["one", "value", torch.linspace(-1, 2, B, dtype=F64)])
@pytest.mark.parametrize("name", ["layers", "functional", "batch norm folded"])
def test_it_closes_whatever_relevance_is_started_with(name: str, start: Any):
    net, mapper, x = made(name)
    td, ledger = run(net, mapper, x, ledger=True, start=start)
    wanted = td["y"][:, 0] if isinstance(start, str) else start
    wanted = torch.ones(B, dtype=F64) if isinstance(start, str) and start == "one" else wanted
    torch.testing.assert_close(ledger.start[:, 0], wanted)
    assert ledger.gap.abs().max() <= 1e-9 * ledger.start.abs().max()


def test_two_keys_of_which_one_is_not_attributed_absorb_what_that_one_gets():
    net = nn.Linear(7, 2).double()

    class Joined(nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return torch.cat([x, z], -1)

    join: Any = TensorDictModule(Joined(), ["x", "z"], ["h"])
    last: Any = TensorDictModule(net, ["h"], ["y"])
    policy = TensorDictSequential(join, last)
    x, z = torch.randn(B, 4, dtype=F64), torch.randn(B, 3, dtype=F64)
    td = TensorDict({"x": x, "z": z}, [B])
    rule = EpsilonRule(1e-12)
    mapper = lambda path, module: rule if isinstance(module, nn.Linear) else None  # noqa: E731
    with LRP(mapper, ("y", 1), ledger=1e-9, keys=["x"]).prepare(policy) as hooked:
        hooked(td)
        ledger = hooked.ledger
    assert ledger is not None
    torch.testing.assert_close(
        ledger.absorbed("constant")[:, 0], z @ net.weight[1, 4:], rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(ledger.absorbed("bias")[:, 0], net.bias[1].expand(B))


# --- who is whose ---------------------------------------------------------------------------------


class Turned(nn.Module):
    """Steps in front of a batch of the same size, and samples folded with steps, last sample first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.transpose(0, 1)))  # [steps, batch, …]
        h = self.second(h.flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0]))
        return h.flip(0).sum(0)


@pytest.mark.parametrize("steps", [1, 2, B, 2 * B])
def test_each_elements_part_is_found_wherever_the_model_puts_its_batch_dimension(steps: int):
    net, x = Turned().double(), torch.randn(B, steps, 4, dtype=F64)
    _, ledger = run(net, EpsilonPlus(epsilon=0.1), x, "y", ledger=True)
    for i in range(B):
        _, alone = run(net, EpsilonPlus(epsilon=0.1), x[i : i + 1], "y", ledger=True)
        for row, one in zip(ledger.rows, alone.rows, strict=True):
            torch.testing.assert_close(absorbed(row)[i], absorbed(one)[0])
            torch.testing.assert_close(row.out[i], one.out[0])


@pytest.mark.parametrize("batch", [(), (1,), (3, 2), (17,), (260,)])
def test_batches_of_any_size_and_number_of_dimensions_close(batch: tuple[int, ...]):
    net, x = sequential().double(), torch.randn(*batch, 24, dtype=F64)
    with LRP(by_path(), ("y", 1), ledger=1e-9).prepare(net, ["x"], ["y"]) as hooked:
        hooked(TensorDict({"x": x}, batch))
        ledger = hooked.ledger
    assert ledger is not None and ledger.start.shape == (*batch, 1)
    assert not any(row.spread for row in ledger.rows)
    assert_rows_close(ledger)


def test_what_belongs_to_no_element_is_spread_and_checked_as_a_sum():
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0, keepdim=True).square()) * 2.0

    x = torch.randn(3, 2, dtype=F64)
    _, ledger = run(Centred(), EpsilonPlus(), x, ("y", 0), ledger=True)
    assert ledger.at("square")[0].spread
    assert ledger.gap.sum().abs() < 1e-12
    ledger.check(1e-9)


# --- free when off --------------------------------------------------------------------------------


class _Operations(TorchDispatchMode):
    """Writes down which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["layers", "functional", "batch norm folded", "recurrent"])
def test_when_off_nothing_of_the_ledger_runs(name: str, monkeypatch: pytest.MonkeyPatch):
    net, mapper, x = made(name)
    run(net, mapper, x)  # what is looked up once has been
    off = _Operations()
    with off:
        run(net, mapper, x)
    on = _Operations()
    with on:
        run(net, mapper, x, ledger=True)
    assert len(on.names) > len(off.names)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the ledger is off")

    for cls in (
        "tdhook_like.attribution.lrp.ledger.recorder.Recorder",
        "tdhook_like.call.Recorder",
    ):
        monkeypatch.setattr(cls, forbidden)
    without = _Operations()
    with without:
        run(net, mapper, x)
    assert without.names == off.names


def test_when_off_a_linear_layer_costs_its_rule_and_nothing_else():
    # Forward: the layer. Rule: |y| within bounds, over itself plus ε, times y, its value put back.
    net, x = nn.Linear(4, 2, bias=False).double(), torch.randn(B, 4, dtype=F64)
    with LRP(EpsilonPlus(), ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        td = TensorDict({"x": x}, [B])
        hooked(td)
        with _Operations() as seen:
            hooked(td)
    assert not [name for name in seen.names if "where" in name or "log2" in name]
    assert sum("mm" in name for name in seen.names) == 2  # one forward, one backward


# --- asking, printing, refusing -------------------------------------------------------------------


def test_a_ledger_prints_as_a_table():
    one, none = torch.ones(2, 1), torch.zeros(2, 1)
    rows = [
        Row("", "Linear", "EpsilonRule()", one, 0.75 * one, {"bias": 0.25 * one}),
        Row("add", "function", "", 0.75 * one, 0.5 * one, {"constant": 0.25 * one}),
    ]
    lines = str(Ledger(rows, one, 0.5 * one)).splitlines()
    assert lines[0].split() == ["where", "type", "rule", "out", "in", "absorbed"]
    assert lines[1].split() == ["(root)", "Linear", "EpsilonRule()", "2", "1.5", "bias", "0.5"]
    assert lines[2].split() == ["add", "function", "1.5", "1", "constant", "0.5"]
    assert [line.split()[0] for line in lines[3:]] == ["(start)", "(inputs)", "(gap)"]
    assert lines[-1].split()[1] == "0"
    assert str(Ledger([], one, none)).splitlines()[-1].split()[1] == "2"


def test_a_ledger_with_a_tolerance_is_checked_at_every_call():
    net = Calling(
        lambda x: torch.atan2(x, torch.ones_like(x))
    )  # gives on 1 − 2x²/3 + … of its start
    small, large = torch.full((B, 1), 1e-3, dtype=F64), torch.ones(B, 1, dtype=F64)
    with LRP(EpsilonPlus(), "y", ledger=1e-3, unhandled="ignore").prepare(
        net, ["x"], ["y"]
    ) as hooked:
        hooked(TensorDict({"x": small}, [B]))
        with pytest.raises(ConservationError, match=r"0\.363 of the start, more than 0\.001"):
            hooked(TensorDict({"x": large}, [B]))
        hooked(TensorDict({"x": small}, [B]))


def test_refused_causes_do_not_make_up_for_one_another():
    one = torch.ones(1, 1)
    rows = [Row("0", "Linear", "r", one, one, {"bias": 0.5 * one, "stabiliser": -0.5 * one})]
    ledger = Ledger(rows, one, one)
    ledger.check(1e-6)
    with pytest.raises(ConservationError, match="1 of the start"):
        ledger.check(1e-6, allow=())


@pytest.mark.parametrize("value", ["yes", -1.0, 0.0, None])
def test_what_is_no_tolerance_is_refused(value: Any):
    with pytest.raises(RuleError, match="ledger must be True, False or a tolerance"):
        LRP(ledger=value)


def test_an_observed_policy_has_a_ledger_and_a_second_call_has_its_own():
    net, mapper, x = made("functional")
    with LRP(mapper, ("y", 0), ledger=True).prepare(net, ["x"], ["y"]) as hooked:
        assert hooked.ledger is None
        hooked.observe(TensorDict({"x": x}, [B]))
        first = hooked.ledger
        hooked(TensorDict({"x": 2 * x}, [B]))
        second = hooked.ledger
    assert first is not None and second is not None and first is not second
    assert first.gap.abs().max() < 1e-9 and second.gap.abs().max() < 1e-9
    assert not torch.equal(first.start, second.start)


def test_relevance_with_a_graph_has_a_ledger_without_one():
    net, mapper, x = made("functional")
    td, ledger = run(net, mapper, x.requires_grad_(), ledger=True, create_graph=True)
    assert td["attr", "x"].requires_grad and not ledger.start.requires_grad
    assert ledger.gap.abs().max() <= 1e-9 * ledger.start.abs().max()
    _, plain = run(net, mapper, x.detach(), ledger=True)
    for one, other in zip(ledger.rows, plain.rows, strict=True):
        assert one.where == other.where and not one.out.requires_grad
        torch.testing.assert_close(one.out, other.out)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_stopped_operand_counts_for_nothing_with_a_ledger_and_where_a_graph_is_asked_for(
    create_graph: bool,
):
    class Product(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return one * other

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.product = nn.Sigmoid(), Product()

        def forward(self, x: Tensor) -> Tensor:
            return self.product(x, self.gate(x)) + x * self.gate(x)

    x = torch.randn(B, 3, dtype=F64)
    mapper = by_path(gate=StopRule(), product=UniformEpsilonRule(1e-12))
    for ledger in (False, True):
        td, _ = run(Gated(), mapper, x, ("y", 1), ledger=ledger, create_graph=create_graph)
        want = torch.zeros_like(x)
        want[:, 1] = 2 * x[:, 1] * torch.sigmoid(x[:, 1])  # each product goes to the signal, whole
        torch.testing.assert_close(td["attr", "x"], want, rtol=1e-9, atol=1e-9)


def test_rules_of_functions_of_ones_own_are_in_the_ledger():
    x = torch.randn(B, 3, dtype=F64)
    functions = FunctionRules(rules={"tanh": None})
    net = Calling(lambda x: torch.tanh(x).sum(-1, keepdim=True))
    _, ledger = run(net, EpsilonPlus(), x, "y", ledger=True, functions=functions)
    want = (torch.tanh(x) - x * (1 - torch.tanh(x) ** 2)).sum(-1)
    torch.testing.assert_close(ledger.absorbed("no rule")[:, 0], want)
