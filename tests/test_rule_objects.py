"""Rules as objects: reusable, without state, and put on modules by hand without a trace."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import reference_lrp as ref
from pristine import assert_same, snapshot
from rule_records import AFFINE_RULES, RECORDS, SITE_IDS, SITES, Record
from rule_samples import Sample, assert_close, explain, grid, made, only
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    EpsilonRule,
    FlatRule,
    GammaRule,
    RemovableRuleHandle,
    RuleMapper,
    StopRule,
    ZPlusRule,
)
from tdhook_like.errors import RuleError

F64 = torch.float64

# --- rules as objects -----------------------------------------------------------------------------


@pytest.mark.parametrize(("record", "sample"), SITES, ids=SITE_IDS)
def test_one_rule_object_serves_models_contexts_and_precisions_and_stays_as_it_is(
    record: Record, sample: Sample
):
    if sample is not record.samples[0]:
        others = record.samples[0], sample
    else:
        others = sample, record.samples[-1]
    rule = record.rule()
    before = copy.deepcopy(vars(rule))
    found = []
    for other in (*others, others[0]):
        module, inputs = other.module(), other.inputs("mixed")
        R = record.start(module(*inputs).detach(), other.name)
        if record.name != "stop":
            found.append(explain(module, only(module, rule), inputs, R)[0])
    if found:
        assert all(a.equal(b) for a, b in zip(found[0], found[2], strict=True))
    assert (vars(rule).keys() == before.keys() and repr(rule) == repr(record.rule())) or (
        record.name == "modified"
    )


@pytest.mark.parametrize("record", RECORDS, ids=[record.name for record in RECORDS])
def test_a_rule_used_by_many_threads_gives_each_its_own(record: Record):
    rule, sample = record.rule(), record.samples[0]
    module = sample.module()
    given = [[x * (1 + i) for x in sample.inputs("mixed")] for i in range(4)]
    starts = [record.start(module(*xs).detach(), str(i)) for i, xs in enumerate(given)]
    alone = [
        explain(module, only(module, rule), xs, R)[0] for xs, R in zip(given, starts, strict=True)
    ]
    found: dict[int, list[list[Tensor]]] = {}

    def work(i: int) -> None:
        found[i] = [explain(module, only(module, rule), given[i], starts[i])[0] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(alone):
        for got in found[i]:
            assert all(a.equal(b) for a, b in zip(got, want, strict=True))


def test_two_contexts_with_other_rules_on_one_model_do_not_mix():
    net, x = made("two", lambda: nn.Linear(4, 2)), grid((2, 4), "x")
    td, methods = TensorDict({"x": x}, [2]), {}
    for rule, reference in AFFINE_RULES.values():
        methods[reference] = LRP(only(net, rule), ("y", 0)).prepare(net, ["x"], ["y"])
    opened = {reference: context.__enter__() for reference, context in methods.items()}
    R = torch.zeros(2, 2, dtype=F64)
    R[:, 0] = net(x).detach()[:, 0]
    for _ in range(2):
        for reference, hooked in opened.items():
            found = hooked(td.clone())["attr", "x"]
            assert_close(found, ref.relevance(net, x, R, reference), 1e-9)
    for context in methods.values():
        context.__exit__(None, None, None)


# --- rules put on by hand -------------------------------------------------------------------------


def test_a_rule_by_hand_leaves_nothing_on_its_module():
    net = made("hand", lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    td, keys = TensorDict({"x": grid((2, 4), "x")}, [2]), vars(nn.Linear(4, 3)).keys()
    before = snapshot(net)
    with FlatRule().register(net[0]) as handle:
        assert isinstance(handle, RemovableRuleHandle)
        assert_same(before, snapshot(net))
        with LRP(lambda n, m: None, ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
            hooked(td)
            assert_same(before, snapshot(net))
        other = copy.deepcopy(net)
        assert vars(other[0]).keys() == keys
    assert_same(before, snapshot(net))


def test_a_rule_by_hand_counts_from_the_moment_it_is_on_to_the_moment_it_is_off():
    net, x = made("moment", lambda: nn.Linear(4, 2)), grid((2, 4), "x")
    td = TensorDict({"x": x}, [2])
    R = torch.zeros(2, 2, dtype=F64)
    R[:, 0] = net(x).detach()[:, 0]
    flat = ref.relevance(net, x, R, ref.flat)

    def is_flat(hooked: Any) -> bool:
        return torch.allclose(hooked(td.clone())["attr", "x"], flat)

    with LRP(lambda n, m: None, ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        assert not is_flat(hooked)
        with FlatRule().register(net):
            assert is_flat(hooked)
        assert not is_flat(hooked)
        handle = RemovableRuleHandle(FlatRule(), net)
        assert is_flat(hooked)
        handle.remove()
        assert not is_flat(hooked)
    with FlatRule().register(net):
        context = LRP(lambda n, m: None, ("y", 0)).prepare(net, ["x"], ["y"])
    with context as hooked:
        assert not is_flat(hooked)


def test_a_rule_by_hand_ends_with_its_block_also_when_that_raises():
    net = nn.Linear(4, 2)
    with pytest.raises(ZeroDivisionError), StopRule().register(net):
        raise ZeroDivisionError
    td = TensorDict({"x": torch.randn(2, 4)}, [2])
    with LRP(lambda n, m: None, ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        assert hooked(td)["attr", "x"].any()


def test_a_rule_by_hand_is_refused_where_it_cannot_sit():
    with pytest.raises(RuleError, match="cannot sit on ReLU"):
        ZPlusRule().register(nn.ReLU())
    with pytest.raises(RuleError, match="registers on a module"):
        EpsilonRule().register("0")  # pyright: ignore[reportArgumentType]


def test_a_rule_by_hand_does_not_keep_its_module_alive():
    net = nn.Linear(2, 2)
    handle, alive = FlatRule().register(net), weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None
    handle.remove()


class Equal(nn.Linear):
    """Equal to every other layer of its size, as value objects are."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal) and self.in_features == other.in_features

    def __hash__(self) -> int:
        return hash(self.in_features)


def test_modules_that_are_equal_are_told_apart():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # One by one: torch's own walks take equal modules for one.
            self.a, self.b = (made(name, lambda: Equal(4, 2)) for name in "ab")

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    net, x, R = Net(), grid((2, 4), "x"), grid((2, 2), "R") + 0.125
    share = R / net(x).detach()

    def want(to_a: Any, to_b: Any) -> Tensor:
        parts = ((net.a, to_a), (net.b, to_b))
        return sum(ref.relevance(m, x, m(x).detach() * share, r) for m, r in parts)

    mapper: RuleMapper = lambda n, m: {"a": ZPlusRule(), "b": FlatRule()}.get(n)  # noqa: E731
    assert_close(explain(net, mapper, [x], R)[0][0], want(ref.zplus, ref.flat), 1e-9)
    with FlatRule().register(net.a), GammaRule().register(net.b):
        by_hand = explain(net, lambda n, m: None, [x], R)[0][0]
    assert_close(by_hand, want(ref.flat, ref.gamma), 1e-9)


@pytest.mark.parametrize(("record", "sample"), SITES, ids=SITE_IDS)
def test_a_call_under_a_rule_leaves_no_object_to_the_collector(record: Record, sample: Sample):
    module, inputs = sample.module(), sample.inputs("mixed")
    keys = [f"x{i}" for i in range(len(inputs))]
    td = TensorDict(dict(zip(keys, inputs, strict=True)), [2])

    def total(outputs: TensorDict) -> Tensor:
        return outputs["y"].flatten(1).sum(-1)

    with LRP(only(module, record.rule()), total).prepare(module, keys, ["y"]) as hooked:
        hooked(td.clone())
        hooked.observe(td.clone())
        gc.collect(1)
        gc.disable()
        try:
            hooked(td.clone())
            hooked.observe(td.clone())
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect(1)
            left = [type(item).__name__ for item in gc.garbage]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert not left
