"""Relevance under everything that torch does with gradients: vjp, vmap, jacrev, compile, autocast.

The reference is the public road of one hooked call after another.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from pristine import assert_same as assert_untouched
from pristine import snapshot
from ruled_cases import (
    CASES,
    F64,
    Case,
    Values,
    assert_same,
    dense,
    every_case,
    feed_forward,
    hooked,
    quiet,
    read,
)
from tdhook_like import LRP, InputXGradient, IntegratedGradients, Saliency
from tdhook_like.attribution.lrp import EpsilonPlus
from tdhook_like.attribution.lrp.ruled import RuledModel, relevance

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
