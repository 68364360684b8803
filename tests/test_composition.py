"""Relevance under everything that torch does with gradients: vjp, vmap, jacrev, compile, autocast.

The reference is the public road of one hooked call after another.
"""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from pristine import assert_same as assert_untouched
from pristine import snapshot
from rule_records import RECORDS, Record
from rule_samples import Sample, only
from tdhook_like import LRP, InputXGradient, IntegratedGradients, Saliency
from tdhook_like.attribution.lrp import (
    CPLRP,
    AttnLRP,
    BetaSmoothMapper,
    DeconvnetMapper,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonRule,
    GammaRule,
    GuidedBackpropMapper,
    Inputs,
    PolicyMapper,
    Rule,
    RuleMapper,
    SignalTakesAllRule,
)
from tdhook_like.attribution.lrp.ruled import RuledModel, relevance
from tdhook_like.errors import ContextError, InputError, ModelError, RuleError, TargetError

F64 = torch.float64
Values = Sequence[Tensor]


# --- models ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Sums, products, activations and normalisations that no module stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        h = x + 0.5 * a * (1 + torch.tanh(0.8 * (a + 0.04 * a**3)))  # gelu, written by hand
        h = F.gelu(h * torch.sigmoid(self.gate(h)))
        return self.out(F.normalize(F.layer_norm(h, (6,)), dim=-1))


class Block(nn.Module):
    """One block of a transformer over four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.mix(x, x, x, need_weights=False)
        return self.out(self.norm(x + mixed).mean(-2))


class TwoInputs(nn.Module):
    """A product of what is made of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 4), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.out(F.relu(self.a(x)) * self.b(z))


class Cells(nn.Module):
    """The last state of an LSTM, read out."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0][:, -1])


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(-3), nn.Linear(6, 2)),
    )


def dense() -> nn.Module:
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)]
    return nn.Sequential(*layers)


def normed() -> nn.Module:
    layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.SiLU(), nn.BatchNorm1d(8), nn.Linear(8, 2)]
    return nn.Sequential(*layers)


def agents() -> nn.Module:
    modules = pytest.importorskip("torchrl.modules")
    return modules.MultiAgentMLP(
        6, 2, 3, centralized=False, share_params=False, depth=2, num_cells=8
    )


def gamma(name: str, module: nn.Module) -> Rule | None:
    return GammaRule() if isinstance(module, nn.Linear) else None


def recurrent(name: str, module: nn.Module) -> Rule | None:
    return SignalTakesAllRule() if isinstance(module, nn.LSTM) else EpsilonPlus()(name, module)


@dataclass(frozen=True)
class Case:
    """A model, the shapes of its inputs and its mapper; outputs are ``[*B, 2]`` or more."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    mapper: RuleMapper

    def made(self) -> tuple[nn.Module, list[Tensor]]:
        net = self.build().double().eval()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
        return net, [torch.randn(3, *shape, dtype=F64) for shape in self.shapes]


CASES = {
    "dense": Case(dense, ((6,),), EpsilonPlus()),
    "gamma": Case(dense, ((6,),), gamma),
    "convolutional": Case(convolutional, ((2, 8, 8),), EpsilonPlus()),
    "gamma and box": Case(convolutional, ((2, 8, 8),), EpsilonGammaBox(low=-5.0, high=5.0)),
    "norms": Case(normed, ((6,),), EpsilonPlus()),
    "two inputs": Case(TwoInputs, ((6,), (5,)), EpsilonPlus()),
    "residual": Case(Residual, ((6,),), EpsilonPlus()),
    "attention": Case(Block, ((4, 6),), AttnLRP()),
    "recurrent": Case(Cells, ((3, 6),), recurrent),
    "agents": Case(agents, ((3, 6),), EpsilonPlus()),
}
# torch's own recurrent layers can neither be vmapped nor be part of one compiled graph.
feed_forward = pytest.mark.parametrize(
    "case",
    [case for name, case in CASES.items() if name != "recurrent"],
    ids=[name for name in CASES if name != "recurrent"],
)
quiet = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def read(y: Tensor) -> Tensor:
    """Two numbers for each sample: the outputs, or those of the second agent."""
    return y if y.ndim == 2 else y[..., 1, :]


def hooked(net: nn.Module, mapper: RuleMapper, xs: Values, output: int) -> list[Tensor]:
    """Relevance for one of the two numbers by the public road."""
    keys = [f"x{i}" for i in range(len(xs))]
    td = TensorDict(dict(zip(keys, xs, strict=True)), [len(xs[0])])
    target = lambda td: read(td["y"])[..., output]  # noqa: E731
    with LRP(mapper, target=target).prepare(net, keys, ["y"]) as explained:
        td = explained(td)
    return [td["attr", key] for key in keys]


def assert_same(found: Values | Tensor, want: Values | Tensor, tolerance: float = 1e-10) -> None:
    found, want = ([v] if isinstance(v, Tensor) else list(v) for v in (found, want))
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# --- the same as a hooked call --------------------------------------------------------------------


@every_case
def test_outputs_are_the_models_bit_for_bit(case: Case):
    net, xs = case.made()
    with torch.no_grad():
        assert torch.equal(RuledModel(net, case.mapper)(*xs), net(*xs))
    # torch chooses other ways to multiply where an operand requires a gradient: likewise here.
    net.requires_grad_(False)
    assert_same(RuledModel(net, case.mapper)(*xs), net(*xs), 1e-14)


@every_case
@pytest.mark.parametrize("output", [0, 1])
def test_relevance_by_vjp_is_that_of_a_hooked_call(case: Case, output: int):
    net, xs = case.made()
    ruled = RuledModel(net, case.mapper)
    want = hooked(net, case.mapper, xs, output)
    assert_same(relevance(lambda *x: read(ruled(*x))[..., output], *xs, start="value"), want)
    y, pull = torch.func.vjp(ruled, *xs)
    start = torch.zeros_like(y)
    read(start)[..., output] = 1
    assert_same([x * g for x, g in zip(xs, pull(start), strict=True)], want)


@quiet
@every_case
def test_jacrev_gives_each_output_what_it_gets_alone(case: Case):
    net, xs = case.made()
    ruled = RuledModel(net, case.mapper)
    places = tuple(range(len(xs)))
    found = torch.func.jacrev(lambda *x: read(ruled(*x)).sum(0), argnums=places)(*xs)
    for output in (0, 1):
        got = [x * jacobian[output] for x, jacobian in zip(xs, found, strict=True)]
        assert_same(got, hooked(net, case.mapper, xs, output))


@quiet
@feed_forward
def test_vmap_over_samples_gives_each_what_it_gets_in_a_batch(case: Case):
    net, xs = case.made()
    ruled = RuledModel(net, case.mapper)

    def alone(*sample: Tensor) -> Tensor | tuple[Tensor, ...]:
        return relevance(
            lambda *x: read(ruled(*[value[None] for value in x]))[0, 1], *sample, start="value"
        )

    assert_same(torch.func.vmap(alone)(*xs), hooked(net, case.mapper, xs, 1))


@every_case
def test_many_starts_at_once_are_one_start_after_another(case: Case):
    net, xs = case.made()
    leaves = [x.requires_grad_() for x in xs]
    y = read(RuledModel(net, case.mapper)(*leaves))
    starts = torch.stack([F.one_hot(torch.full((3,), i), 2).to(y) for i in (0, 1)])
    together = torch.autograd.grad(y, leaves, starts, is_grads_batched=True)
    for output in (0, 1):
        found = [(x * g[output]).detach() for x, g in zip(leaves, together, strict=True)]
        assert_same(found, hooked(net, case.mapper, [x.detach() for x in xs], output))


def test_a_start_of_ones_own_is_shared_out_as_lrps():
    net, (x,) = CASES["convolutional"].made()
    start = torch.tensor([[1.0, -2.0], [0.0, 3.0], [0.5, 0.0]], dtype=F64)
    ruled, want = RuledModel(net), torch.zeros_like(x)
    for output in (0, 1):
        method = LRP(target=("y", output), start=start[:, output])
        with method.prepare(net, ["x"], ["y"]) as explained:
            want += explained(TensorDict({"x": x}, [3]))["attr", "x"]
    assert_same(relevance(ruled, x, start=start), want)
    method = LRP(target=("y", 0), start="one")
    with method.prepare(net, ["x"], ["y"]) as explained:
        want = explained(TensorDict({"x": x}, [3]))["attr", "x"]
    assert_same(relevance(lambda x: ruled(x)[:, 0], x, start="one"), want)


def test_relevance_starts_at_outputs_that_are_zero():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()).double()
    x = -net[0].weight.detach().sum(0, keepdim=True)  # below zero in sum, at least
    net[0].weight.data = torch.tensor([[1.0, 1.0], [-1.0, -2.0]], dtype=F64)
    x = torch.tensor([[1.0, 2.0]], dtype=F64)
    ruled = RuledModel(net, lambda name, m: EpsilonPlus()(name, m))
    assert ruled(x)[0, 1] == 0
    found = relevance(ruled, x, start=torch.tensor([[0.0, 5.0]], dtype=F64))
    assert_same(found, torch.tensor([[1.0, 4.0]], dtype=F64), 1e-5)


def test_arguments_that_are_no_floats_pass_and_have_no_relevance():
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4, bias=False)

        def forward(self, x: Tensor, index: Tensor, scale: float = 1.0) -> Tensor:
            return scale * self.layer(x).gather(-1, index)

    ruled = RuledModel(Chosen().double())
    x, index = torch.randn(2, 3, dtype=F64), torch.tensor([[1], [3]])
    found = relevance(lambda x, i: ruled(x, i, scale=2.0), x, index, start="value")
    assert found[1] is None
    assert_same(found[0].sum(-1, keepdim=True), ruled(x, index, scale=2.0).detach(), 1e-4)


# --- compiled -------------------------------------------------------------------------------------

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


# --- autocast -------------------------------------------------------------------------------------


@feed_forward
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_relevance_is_right_to_the_digits_that_there_are(
    case: Case, dtype: torch.dtype
):
    net, xs = case.made()
    want = hooked(net, case.mapper, xs, 0)
    net = net.float()
    ruled = RuledModel(net, case.mapper)
    with torch.autocast("cpu", dtype=dtype):
        found = relevance(
            lambda *x: read(ruled(*x))[..., 0], *[x.float() for x in xs], start="value"
        )
    for got, expected in zip([found] if isinstance(found, Tensor) else found, want, strict=True):
        assert got.dtype == torch.float32
        error = (got - expected).abs().max() / expected.abs().max()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


# --- as the gradient of other methods -------------------------------------------------------------

METHODS = ["dense", "convolutional", "two inputs", "residual"]


def gradient(ruled: nn.Module, xs: Values) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in xs]
    return list(torch.autograd.grad(read(ruled(*leaves))[..., 1].sum(), leaves))


@pytest.mark.parametrize("name", METHODS)
def test_methods_under_rules_take_a_ruled_models_gradient_for_their_own(name: str):
    net, xs = CASES[name].made()
    mapper, keys = CASES[name].mapper, [f"x{i}" for i in range(len(xs))]
    ruled, target = RuledModel(net, mapper), ("y", 1)
    steps = [(i + 0.5) / 5 for i in range(5)]
    along = [gradient(ruled, [0.25 + a * (x - 0.25) for x in xs]) for a in steps]
    at = gradient(ruled, xs)
    quadrature = {"n_steps": 5, "method": "riemann_middle", "gap_tolerance": None}
    path = [(x - 0.25) * sum(g[i] for g in along) / 5 for i, x in enumerate(xs)]
    for method, want in (
        (Saliency(target, abs=False, rules=mapper), at),
        (InputXGradient(target, rules=mapper), [x * g for x, g in zip(xs, at, strict=True)]),
        (IntegratedGradients(target, rules=mapper, baselines=0.25, **quadrature), path),
    ):
        with method.prepare(net, keys, ["y"]) as explained:
            td = explained(TensorDict(dict(zip(keys, xs, strict=True)), [3]))
        assert_same([td["attr", key] for key in keys], want)


def test_any_method_explains_a_ruled_model_as_it_explains_under_rules():
    net, (x,) = CASES["convolutional"].made()
    under = IntegratedGradients(("y", 0), rules=EpsilonPlus(), gap_tolerance=None)
    around = IntegratedGradients(("y", 0), gap_tolerance=None)
    found = []
    for method, model in ((under, net), (around, RuledModel(net))):
        with method.prepare(model, ["x"], ["y"]) as explained:
            found.append(explained(TensorDict({"x": x}, [3]))["attr", "x"])
    assert_same(found[1], found[0])


def test_relevance_averaged_over_noise_is_one_vmap():
    net, (x,) = CASES["dense"].made()
    ruled, noise = RuledModel(net), 0.1 * torch.randn(8, *x.shape, dtype=F64)

    def smooth(x: Tensor) -> Tensor:
        return relevance(lambda x: ruled(x)[..., 0], x, start="value")

    found = torch.func.vmap(smooth)(x + noise).mean(0)
    want = torch.stack([hooked(net, EpsilonPlus(), [x + n], 0)[0] for n in noise]).mean(0)
    assert_same(found, want)


# --- a stand-in that follows its model ------------------------------------------------------------


def test_what_happens_to_parameters_is_seen():
    net, (x,) = CASES["dense"].made()
    ruled = RuledModel(net)

    def check() -> None:
        found = relevance(lambda x: ruled(x)[..., 0], x, start="value")
        assert_same(found, hooked(net, EpsilonPlus(), [x], 0))

    with torch.no_grad():
        net[0].weight.mul_(2)
    check()
    net[0].weight.data = torch.randn(8, 6, dtype=F64)
    check()
    net[0].weight = nn.Parameter(torch.randn(8, 6, dtype=F64))
    check()
    net.load_state_dict(dense().double().state_dict())
    check()
    assert [name.removeprefix("model.") for name, _ in ruled.named_parameters()] == list(
        dict(net.named_parameters())
    )


def test_it_runs_in_the_mode_that_its_model_is_in():
    net, x = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), torch.randn(4, 6)
    ruled = RuledModel(net)
    for mode in (True, False):
        net.train(mode)
        outputs = []
        for run in (net, ruled):
            torch.manual_seed(0)
            outputs.append(run(x))
        assert torch.equal(*outputs)


def test_buffers_are_read_and_never_written():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), Counting()).double()
    ruled, x = RuledModel(net, unhandled="raise"), torch.randn(5, 6, dtype=F64)
    before = snapshot(net)
    for _ in range(2):
        ruled(x)
        relevance(ruled, x, start="value")
    assert_untouched(before, snapshot(net))
    assert torch.equal(ruled(x).detach(), copy.deepcopy(net)(x).detach())
    for _ in range(3):
        net(x)
    net.eval()
    assert torch.equal(ruled(x).detach(), copy.deepcopy(net)(x).detach())


@every_case
def test_the_model_stays_as_it_was(case: Case):
    net, xs = case.made()
    before = snapshot(net)
    ruled = RuledModel(net, case.mapper)
    relevance(lambda *x: read(ruled(*x))[..., 0], *xs, start="value")
    relevance(lambda *x: read(ruled(*x))[..., 0], *xs[:1], *xs[1:], start="one")
    assert_untouched(before, snapshot(net))


@pytest.mark.parametrize("by", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
@pytest.mark.parametrize("name", ["convolutional", "attention"])
def test_a_copy_stands_for_a_model_of_its_own(by: Callable[[RuledModel], RuledModel], name: str):
    net, (x,) = CASES[name].made()
    ruled = RuledModel(net, CASES[name].mapper)
    want = relevance(ruled, x, start="value")
    other = by(ruled)
    assert_same(relevance(other, x, start="value"), want)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert_same(relevance(ruled, x, start="value"), want)
    assert not torch.allclose(relevance(other, x, start="value"), want)


def test_parameters_lent_by_functional_call_are_those_that_are_ruled():
    net, (x,) = CASES["dense"].made()
    ruled, others = RuledModel(net), [dense().double() for _ in range(3)]
    stacked = {
        f"model.{name}": torch.stack([dict(other.named_parameters())[name] for other in others])
        for name, _ in net.named_parameters()
    }

    def member(parameters: dict[str, Tensor]) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return torch.func.functional_call(ruled, parameters, (x,))[..., 0]

        return relevance(run, x, start="value")

    found = torch.func.vmap(member)({name: t.detach() for name, t in stacked.items()})
    for got, other in zip(found, others, strict=True):
        assert_same(got, hooked(other, EpsilonPlus(), [x], 0))


def test_threads_may_share_one():
    net, (x,) = CASES["residual"].made()
    ruled, failures = RuledModel(net), []
    want = relevance(ruled, x, start="value")

    def work() -> None:
        try:
            for _ in range(20):
                assert torch.equal(relevance(ruled, x, start="value"), want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_it_prints_its_plan_and_its_mapper():
    ruled = RuledModel(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), EpsilonPlus())
    assert "rule_mapper=EpsilonPlus()" in repr(ruled)
    assert "EpsilonRule(epsilon=1e-06)" in str(ruled.plan)


# --- differentiated again -------------------------------------------------------------------------


@every_case
def test_relevance_with_a_graph_is_the_same_relevance(case: Case):
    net, xs = case.made()
    ruled = RuledModel(net, case.mapper)
    one = lambda *x: read(ruled(*x))[..., 0]  # noqa: E731
    found = relevance(one, *xs, start="value", create_graph=True)
    found = [found] if isinstance(found, Tensor) else list(found)
    assert all(value.requires_grad for value in found)
    assert_same([value.detach() for value in found], hooked(net, case.mapper, xs, 0))


def test_relevance_in_a_loss_has_the_slope_that_finite_differences_find():
    net, (x,) = CASES["residual"].made()
    ruled, weights = RuledModel(net), torch.randn_like(x)

    def score(create_graph: bool) -> Tensor:
        found = relevance(lambda x: ruled(x)[..., 0], x, start="value", create_graph=create_graph)
        return (weights * found).sum()

    places = [x.requires_grad_(), *net.parameters()]
    for place, slope in zip(places, torch.autograd.grad(score(True), places), strict=True):
        direction, ends = torch.randn_like(place), []
        for step in (1e-6, -1e-6):
            place.data += step * direction
            ends.append(score(False))
            place.data -= step * direction
        numeric = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((slope * direction).sum(), numeric, rtol=1e-5, atol=1e-6)


def again_by_autograd(ruled: nn.Module, x: Tensor) -> object:
    x = x.requires_grad_()
    (g,) = torch.autograd.grad(ruled(x).sum(), x, create_graph=True)
    return torch.autograd.grad((x * g).sum(), x)


def again_by_backward(ruled: nn.Module, x: Tensor) -> object:
    x = x.requires_grad_()
    ruled(x).sum().backward(create_graph=True)
    assert x.grad is not None
    return x.grad.sum().backward()


def again_under_vjp(ruled: nn.Module, x: Tensor) -> object:
    x = x.requires_grad_()
    y, pull = torch.func.vjp(ruled, x)
    return torch.autograd.grad(pull(torch.ones_like(y))[0].sum(), x)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("name", ["dense", "residual"])
@pytest.mark.parametrize(
    "again",
    [
        again_by_autograd,
        again_by_backward,
        again_under_vjp,
        lambda ruled, x: torch.func.jacrev(torch.func.jacrev(lambda x: ruled(x).sum()))(x),
        lambda ruled, x: torch.func.grad(lambda x: relevance(ruled, x, start="value").sum())(x),
    ],
    ids=["grad", "backward", "vjp of a leaf", "jacrev of jacrev", "grad of relevance"],
)
def test_a_second_derivative_is_refused_where_it_would_be_wrong(
    again: Callable[[nn.Module, Tensor], object], name: str
):
    net, (x,) = CASES[name].made()
    with pytest.raises(ContextError, match=r"create_graph=True"):
        again(RuledModel(net), x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "forward",
    [
        lambda ruled, x: torch.func.jacfwd(ruled)(x),
        lambda ruled, x: torch.func.jvp(ruled, (x,), (x,)),
        lambda ruled, x: torch.func.hessian(lambda x: ruled(x).sum())(x),
    ],
    ids=["jacfwd", "jvp", "hessian"],
)
def test_forward_mode_would_pass_rules_by_and_is_refused(
    forward: Callable[[nn.Module, Tensor], object],
):
    net, (x,) = CASES["dense"].made()
    with pytest.raises(ContextError, match=r"forward mode .*vjp or jacrev"):
        forward(RuledModel(net), x)


# --- what cannot be -------------------------------------------------------------------------------


def test_a_rule_that_is_written_as_relevance_says_that_it_cannot_be_transformed():
    class Written(Rule):
        def relevance(
            self, module: nn.Module, inputs: Inputs, output: Tensor, R_out: Tensor
        ) -> Tensor:
            return R_out

    net, x = nn.Linear(3, 3), torch.randn(2, 3)
    ruled = RuledModel(net, only(net, Written()))
    with pytest.raises(RuleError, match=r"Written\(\) on Linear.*Write it as surrogate\(\)"):
        torch.func.vjp(ruled, x)
    with pytest.raises(RuleError, match=r"create_graph=True.*surrogate\(\)"):
        relevance(ruled, x, start="value", create_graph=True)
    assert_same(relevance(ruled, x, start="value"), net(x).detach(), 1e-5)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(ruled(leaf).sum(), leaf)  # autograd itself is no transform
    assert_same(x * g, net(x).detach(), 1e-5)


def test_functions_without_a_rule_are_told_once_or_refused():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.matrix_exp(x)

    x = torch.randn(3, 3)
    x.requires_grad_()
    ruled = RuledModel(Odd())
    with pytest.warns(UserWarning, match=r"matrix_exp\(\) is not linear and without a rule"):
        ruled(x)
    ruled(x)
    with pytest.raises(RuleError, match=r"matrix_exp\(\).*FunctionRules"):
        RuledModel(Odd(), unhandled="raise")(x)
    RuledModel(Odd(), unhandled="ignore")(x)


def test_rules_that_are_never_reached_are_told():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.skipped = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(RuleError, match=r"'skipped'.*unreached='ignore'"):
        RuledModel(Skips())(torch.ones(1, 2))
    RuledModel(Skips(), unreached="ignore")(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: RuledModel(torch.nn.functional.relu), ModelError, "module, got function"),  # pyright: ignore
        (lambda: RuledModel(nn.Linear(1, 1), 3), RuleError, "mapper"),  # pyright: ignore
        (lambda: RuledModel(nn.Linear(1, 1), unreached="no"), ContextError, "unreached"),
        (lambda: RuledModel(nn.Linear(1, 1), functions=3), RuleError, "FunctionRules"),  # pyright: ignore
        (lambda: relevance(nn.ReLU(), torch.arange(3), start="one"), InputError, "floating-point"),
        (lambda: relevance(lambda x: [x], torch.ones(1), start="one"), TargetError, "list"),
        (lambda: relevance(nn.ReLU(), torch.ones(1), start="two"), RuleError, "'two'"),
        (lambda: relevance(nn.ReLU(), torch.ones(1), start=torch.ones(3)), RuleError, r"\(3,\)"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    wrong: Callable[[], object], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        wrong()


def test_a_graph_of_relevance_is_refused_inside_transforms():
    ruled, x = RuledModel(nn.Linear(2, 1)), torch.randn(3, 2)
    with pytest.raises(ContextError, match=r"create_graph=True.*backward"):
        torch.func.vmap(lambda x: relevance(ruled, x, start="value", create_graph=True))(x)


def test_a_scripted_module_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="scripted"):
        RuledModel(nn.Sequential(scripted), lambda name, m: EpsilonRule())
