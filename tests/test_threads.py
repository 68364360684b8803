"""One model, many threads: every call gives what it gives alone, and nothing is left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from pristine import assert_same, bits, snapshot
from tdhook_like import LRP, EpsilonPlus, InputXGradient, IntegratedGradients, Saliency
from tdhook_like.attribution.lrp import EpsilonRule, GammaRule, Rule

METHODS: dict[str, Callable[[Any], Any]] = {
    "saliency": lambda target: Saliency(target, abs=False),
    "input x gradient": InputXGradient,
    "integrated gradients": lambda t: IntegratedGradients(t, n_steps=4, gap_tolerance=None),
    "lrp": lambda target: LRP(EpsilonPlus(), target),
}


def policy() -> Any:
    net = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    return TensorDictModule(net, ["observation"], ["logits"])


def inputs(n: int = 5) -> TensorDict:
    return TensorDict({"observation": torch.randn(n, 4)}, [n])


def in_threads(n: int, work: Callable[[int], None]) -> list[BaseException]:
    """Runs ``work(i)`` in n threads that start together; what they raised."""
    raised: list[BaseException] = []
    barrier = threading.Barrier(n)

    def guarded(i: int) -> None:
        barrier.wait()
        try:
            work(i)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_eight_threads_of_relevance_on_one_model_give_what_one_gives():
    model = policy()
    before = snapshot(model)
    given = [inputs() for _ in range(8)]
    method = LRP(EpsilonPlus(), ("logits", 1))
    with method.prepare(model) as hooked:
        expected = [bits(hooked(td.clone())["attr", "observation"]) for td in given]
    assert len(set(expected)) == 8
    wrong: list[int] = []

    def work(i: int) -> None:
        with method.prepare(model) as hooked:
            for _ in range(200):
                if bits(hooked(given[i].clone())["attr", "observation"]) != expected[i]:
                    wrong.append(i)

    assert in_threads(8, work) == [] and wrong == []
    assert_same(before, snapshot(model), ignoring=["random state"])


def test_one_hooked_module_may_be_shared_by_threads():
    model, given = policy(), [inputs() for _ in range(4)]
    wrong: list[int] = []
    with LRP(EpsilonPlus(), ("logits", 1)).prepare(model) as hooked:
        expected = [bits(hooked(td.clone())["attr", "observation"]) for td in given]

        def work(i: int) -> None:
            for _ in range(50):
                for call in (hooked, hooked.observe):
                    if bits(call(given[i].clone())["attr", "observation"]) != expected[i]:
                        wrong.append(i)

        assert in_threads(4, work) == [] and wrong == []


def test_threads_with_different_rules_and_methods_do_not_mix():
    model, td = policy(), inputs()

    def on_linear(rule: Rule) -> Any:
        return lambda name, module: rule if isinstance(module, nn.Linear) else None

    methods = [LRP(on_linear(rule), ("logits", 0)) for rule in (GammaRule(0.5), EpsilonRule(0.1))]
    methods += [make(("logits", 0)) for make in METHODS.values()]

    def explained(method: Any) -> Any:
        with method.prepare(model) as hooked:
            return bits(hooked(td.clone())["attr", "observation"])

    expected = [explained(method) for method in methods]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(40):
            if explained(methods[i]) != expected[i]:
                wrong.append(i)

    assert in_threads(len(methods), work) == [] and wrong == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
def test_plain_calls_of_the_model_in_other_threads_see_nothing(method, drive):
    model, td = policy(), inputs()

    def called() -> list[Any]:
        out = model(td.clone())["logits"]
        return [bits(t) for t in (out, *torch.autograd.grad(out.sum(), list(model.parameters())))]

    expected = called()
    running, wrong = threading.Event(), []

    def explain(_: int) -> None:
        try:
            with METHODS[method](("logits", 0)).prepare(model) as hooked:
                for _ in range(60):
                    (hooked if drive else hooked.observe)(td.clone())
        finally:
            running.set()

    def plain(_: int) -> None:
        while True:
            stop = running.is_set()
            if called() != expected:
                wrong.append(1)
            if stop:
                return

    assert in_threads(3, lambda i: explain(i) if i == 0 else plain(i)) == [] and wrong == []


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_trains_in_one_thread_can_be_observed_in_another(method):
    def trained(observer: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        model: Any = TensorDictModule(net, ["observation"], ["logits"]).train()
        batches = [inputs(6) for _ in range(40)]
        done = threading.Event()

        def train(_: int) -> None:
            try:
                for td in batches:
                    model(td)
                    assert model.module.training and model.module[1].training
            finally:
                done.set()

        def observe(_: int) -> None:
            with observer.prepare(model) as hooked:
                while not done.is_set():
                    hooked.observe(inputs(3))

        # Inputs are drawn ahead, so that both threads may draw in any order.
        works = [train] if observer is None else [train, observe]
        assert in_threads(len(works), lambda i: works[i](i)) == []
        return {name: bits(value) for name, value in model.state_dict().items()}

    assert trained(METHODS[method](("logits", 0))) == trained(None)


# --- random numbers -------------------------------------------------------------------------------

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=True),
    "rand": lambda x: x * (0.5 + torch.rand(x.shape[-1])),
    "rand_like": lambda x: x * (0.5 + torch.rand_like(x)),
    "randn_like": lambda x: x + torch.randn_like(x),
    "normal": lambda x: x + torch.normal(torch.zeros_like(x), torch.ones_like(x)),
    "normal of numbers": lambda x: x + torch.normal(0.0, 1.0, x.shape[-1:]),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "randint": lambda x: x * torch.randint(1, 5, x.shape[-1:]),
    "randperm": lambda x: x[..., torch.randperm(x.shape[-1])],
    "multinomial": lambda x: x * torch.multinomial(torch.ones(4), 1),
    "in place": lambda x: x + torch.zeros_like(x).uniform_() + torch.zeros(4).exponential_(),
    "gamma": lambda x: x * torch.distributions.Gamma(2.0, 1.0).sample((4,)),
    "dirichlet": lambda x: x * torch.distributions.Dirichlet(torch.ones(4)).sample(),
    "poisson": lambda x: x * (1 + torch.poisson(torch.ones(4))),
    "rrelu": lambda x: nn.functional.rrelu(x, training=True),
    "now and then": lambda x: x * torch.rand(4) if bool((x.detach() > 0).all()) else x,
}


def drawing(kind: str) -> Any:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(DRAWS[kind](x))

    return TensorDictModule(Draws(), ["observation"], ["logits"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", DRAWS)
def test_what_a_model_draws_while_it_is_observed_is_not_drawn_from_shared_generators(kind, method):
    model, td = drawing(kind), inputs()
    state = torch.get_rng_state()
    with METHODS[method](("logits", 0)).prepare(model) as hooked:
        for x in (-torch.rand(5, 4), torch.rand(5, 4)):
            state = torch.get_rng_state()
            hooked.observe(td.set("observation", x))
            assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", DRAWS)
def test_driving_draws_what_the_plain_call_draws_and_no_more(kind, method):
    model, td = drawing(kind), inputs()
    with METHODS[method](("logits", 0)).prepare(model) as hooked:
        for x in (-torch.rand(5, 4), torch.rand(5, 4)):
            td["observation"] = x
            state = torch.get_rng_state()
            plain = model(td.clone())["logits"]
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            assert bits(hooked(td.clone())["logits"]) == bits(plain)
            assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("method", METHODS)
def test_what_other_threads_draw_is_neither_repeated_nor_skipped_while_a_model_is_observed(method):
    model, td = drawing("dropout"), inputs()
    torch.manual_seed(0)
    drawn: list[float] = []
    gaps: list[float] = []
    done = threading.Event()

    def draw(_: int) -> None:
        while not done.is_set():
            drawn.append(torch.rand(1).item())

    def observe(_: int) -> None:
        try:
            for _ in range(10):
                with METHODS[method](("logits", 0)).prepare(model) as hooked:
                    out = hooked.observe(td.clone())
                if method == "integrated gradients":  # of a model that is linear at a given draw
                    gaps.append(out["attr_gap"].abs().max().item())
        finally:
            done.set()

    assert in_threads(2, lambda i: (draw, observe)[i](i)) == []
    torch.manual_seed(0)
    assert drawn == [torch.rand(1).item() for _ in drawn]
    assert max(gaps, default=0.0) < 1e-5


# --- what a call leaves behind --------------------------------------------------------------------


def growth(call: Callable[[], object], times: int) -> int:
    """By how many objects the interpreter grows over further calls, the collector off."""
    for _ in range(10):  # caches fill
        call()
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(times):
            call()
        return len(gc.get_objects()) - before
    finally:
        gc.enable()


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("method", METHODS)
def test_a_call_leaves_no_object_behind_for_the_collector(method, drive):
    model, td = policy(), inputs()
    with METHODS[method](("logits", 0)).prepare(model) as hooked:
        call = hooked if drive else hooked.observe
        assert growth(lambda: call(td), 1000 if method == "lrp" else 300) <= 2


@pytest.mark.parametrize("method", METHODS)
def test_a_context_leaves_little_behind_for_the_collector(method):
    model, td = policy(), inputs()

    def explained() -> None:
        with METHODS[method](("logits", 0)).prepare(model) as hooked:
            hooked(td)

    explained()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        explained()
    gc.collect()
    assert len(gc.get_objects()) - before <= 2


def test_a_model_is_freed_once_its_context_is_left():
    model = policy()
    gone = weakref.ref(model.module[0])
    with LRP(EpsilonPlus(), ("logits", 0)).prepare(model) as hooked:
        hooked(inputs())
        hooked.observe(inputs())
    del model, hooked
    gc.collect()
    assert gone() is None
