"""Relevance under torch.compile: one graph, the same numbers."""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rule_records import RECORDS, Record
from rule_samples import Sample, only
from ruled_cases import CASES, F64, Case, TwoInputs, assert_same, feed_forward, hooked, read
from tdhook_like.attribution.lrp import (
    CPLRP,
    BetaSmoothMapper,
    DeconvnetMapper,
    GuidedBackpropMapper,
    PolicyMapper,
    RuleMapper,
)
from tdhook_like.attribution.lrp.ruled import RuledModel, relevance

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="inductor needs a C++ compiler",
)
BACKENDS = [
    pytest.param("aot_eager", id="aot_eager"),
    pytest.param("inductor", id="inductor", marks=[needs_compiler, pytest.mark.slow]),
]


@pytest.fixture
def compiling() -> Iterator[None]:
    """Nothing compiled before counts, and torch may warn about itself while it compiles."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()
    gc.collect()


@pytest.mark.usefixtures("compiling")
@feed_forward
@pytest.mark.parametrize("backend", BACKENDS)
def test_relevance_compiles_as_one_graph(case: Case, backend: str):
    net, xs = case.made()
    ruled = RuledModel(net, case.mapper)

    def explain(*x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return relevance(lambda *x: read(ruled(*x))[..., 1], *x, start="value")

    compiled = torch.compile(explain, fullgraph=True, backend=backend)
    assert_same(compiled(*xs), hooked(net, case.mapper, xs, 1))
    # Parameters are read anew, and nothing is compiled a second time for it.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.25)
    # (tensordict, which agents are made of, may have met new classes in the meantime.)
    stance = "default" if case is CASES["agents"] else "fail_on_recompile"
    with torch.compiler.set_stance(stance):
        found = compiled(*xs)
    assert_same(found, hooked(net, case.mapper, xs, 1))


@pytest.mark.usefixtures("compiling")
@feed_forward
def test_a_compiled_ruled_model_has_the_same_gradient(case: Case):
    net, xs = case.made()
    want = hooked(net, case.mapper, xs, 0)
    leaves = [x.requires_grad_() for x in xs]
    compiled = torch.compile(RuledModel(net, case.mapper), fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(read(compiled(*leaves))[..., 0].sum(), leaves)
    assert_same([x.detach() * g for x, g in zip(leaves, grads, strict=True)], want)


RULES = [(record, record.samples[0]) for record in RECORDS]


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(("record", "sample"), RULES, ids=[record.name for record in RECORDS])
def test_every_rule_compiles_as_part_of_one_graph(record: Record, sample: Sample):
    module, xs = sample.module(), sample.inputs("mixed")
    ruled = RuledModel(module, only(module, record.rule()))

    def explain(start: Tensor, *x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return relevance(ruled, *x, start=start)

    start = torch.randn_like(module(*xs).detach())
    compiled = torch.compile(explain, fullgraph=True, backend="aot_eager")
    assert_same(compiled(start, *xs), explain(start, *xs))


@pytest.mark.usefixtures("compiling")
def test_vmap_and_jacrev_of_relevance_compile_too():
    net, (x,) = CASES["residual"].made()
    ruled = RuledModel(net)
    each = torch.func.vmap(torch.func.jacrev(ruled))
    assert_same(torch.compile(each, fullgraph=True, backend="aot_eager")(x), each(x))
    alone = torch.func.vmap(lambda x: relevance(ruled, x, start="value"))
    assert_same(torch.compile(alone, fullgraph=True, backend="aot_eager")(x), alone(x))


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    "mapper",
    [GuidedBackpropMapper(), DeconvnetMapper(), BetaSmoothMapper(), CPLRP(), PolicyMapper()],
)
def test_mappers_with_functions_of_their_own_compile(mapper: RuleMapper):
    net, xs = TwoInputs().double(), [torch.randn(3, n, dtype=F64) for n in (6, 5)]
    net.act = nn.ReLU()  # what mappers of rectifiers look for
    ruled = RuledModel(net, mapper, unreached="ignore")

    def explain(*x: Tensor) -> tuple[Tensor, ...]:
        return relevance(ruled, *x, start="value")

    assert_same(torch.compile(explain, fullgraph=True, backend="aot_eager")(*xs), explain(*xs))


@pytest.mark.usefixtures("compiling")
def test_functions_inside_vmap_are_ruled_in_a_graph_as_outside_of_it():
    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            def one(x: Tensor, weight: Tensor) -> Tensor:
                return F.gelu(x @ weight) * torch.tanh(x)

            return torch.vmap(one, (-2, 0), -2)(x, self.weight)

    net, x = Each().double(), torch.randn(4, 3, 6, dtype=F64)
    ruled = RuledModel(net)
    found = relevance(ruled, x, start="value")
    assert_same(found.sum((1, 2)), net(x).detach().sum((1, 2)))  # each half passes all of its own

    def explain(x: Tensor) -> Tensor:
        return relevance(ruled, x, start="value")

    assert_same(torch.compile(explain, fullgraph=True, backend="aot_eager")(x), found)
