"""Whatever goes wrong inside a call, it leaves model, TensorDict and interpreter as they were."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from generated_models import Case, Plan, build, cases
from pristine import assert_same, bits, snapshot, td_snapshot
from tdhook_like import LRP, InputXGradient, IntegratedGradients, Saliency, TdhookLikeError
from tdhook_like.attribution.lrp import EpsilonPlus, Rule

METHODS: dict[str, Callable[[Any], Any]] = {
    "saliency": Saliency,
    "input x gradient": InputXGradient,
    "integrated gradients": lambda t: IntegratedGradients(t, n_steps=3, gap_tolerance=None),
    "lrp": lambda t: LRP(EpsilonPlus(), target=t),
}


class Trouble(Exception):
    """Not one of the library's own, so that nothing but the raiser can have raised it."""


def fuse(after: int = 0, error: type[BaseException] = Trouble) -> Callable[..., None]:
    """Takes any arguments; blows once, when it has been called ``after`` times before."""
    calls = []

    def blow(*_: Any) -> None:
        calls.append(1)
        if len(calls) == after + 1:
            raise error("a fuse has blown")

    return blow


@settings(max_examples=250)
@given(
    cases(),
    st.sampled_from(list(METHODS)),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from([Trouble, KeyboardInterrupt]),
    st.data(),
)
def test_an_error_in_a_hook_of_any_submodule_leaves_no_trace_and_the_next_call_works(
    case: Case, name: str, drive: bool, after: int, error: type[BaseException], data: Any
):
    paths = [path for path, _ in case.module.named_modules()]
    place = case.module.get_submodule(data.draw(st.sampled_from(paths)))
    place.register_forward_hook(fuse(after, error))
    td = case.td.clone()
    before, read, state = snapshot(case.module), td_snapshot(td), torch.get_rng_state()
    with METHODS[name](case.target).prepare(case.module) as hooked:
        call = hooked if drive else hooked.observe
        try:
            call(td)
        except error:
            event("the fuse has blown")
        else:  # fewer calls than it stood
            return
        assert_same(before, snapshot(case.module))
        assert_same(read, td_snapshot(td))
        again = call(td)["attr"]
    twin = build(eval(case.description, {"Plan": Plan}))
    torch.set_rng_state(state)
    with METHODS[name](case.target).prepare(twin.module) as hooked:
        fresh = (hooked if drive else hooked.observe)(twin.td)["attr"]
    for key, value in fresh.items(True, True):
        assert bits(again.get(key)) == bits(value)


class Calls(nn.Module):
    """The identity, with something to call on the way forward and on the way back."""

    def __init__(self, forward: Callable[..., None], backward: Callable[..., None]) -> None:
        super().__init__()
        self.on_forward, self.on_backward = forward, backward

    def forward(self, x: Tensor) -> Any:
        self.on_forward()
        return _Calls.apply(x, self.on_backward)


class _Calls(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[..., None]) -> Tensor:
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.function()
        return grads[0], None


class BySurrogate(Rule):
    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def surrogate(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        self.function()
        return output


class ByRelevance(BySurrogate):
    surrogate = Rule.surrogate

    def relevance(self, module: nn.Module, inputs: Any, output: Any, R_out: Any) -> Any:
        self.function()
        return R_out


def nothing(*_: Any) -> None:
    """A fuse that never blows."""


def policy(forward: Callable[..., None] = nothing, backward: Callable[..., None] = nothing) -> Any:
    """Two modules in training mode, with everything that a run could leave a trace in."""
    first: Any = TensorDictModule(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.3)),
        in_keys=["observation"],
        out_keys=[("agents", "hidden")],
    )
    second: Any = TensorDictModule(
        nn.Sequential(Calls(forward, backward), nn.Linear(4, 2)),
        in_keys=[("agents", "hidden")],
        out_keys=["out"],
    )
    return TensorDictSequential(first, second)


def _mapper(rule: Rule) -> Callable[[str, nn.Module], Rule | None]:
    ours = EpsilonPlus()
    return lambda name, module: rule if isinstance(module, Calls) else ours(name, module)


def _target(function: Callable[..., None]) -> Callable[[Any], Tensor]:
    def target(td: Any) -> Tensor:
        function()
        return td["out"][..., 0]

    return target


def _baseline(function: Callable[..., None]) -> Callable[[Tensor], Tensor]:
    def baseline(x: Tensor) -> Tensor:
        function()
        return torch.zeros_like(x)

    return baseline


def _hooked(register: str) -> Callable[[Callable[..., None], Any], tuple[Any, Any]]:
    def stage(blow: Callable[..., None], method: Any) -> tuple[Any, Any]:
        model = policy()
        getattr(model[1].module[1], register)(blow)
        return model, method(("out", 0))

    return stage


# From a fuse and a method to a model and a method that hold it.
STAGES: dict[str, Callable[[Callable[..., None], Any], tuple[Any, Any]]] = {
    "a forward": lambda blow, method: (policy(forward=blow), method(("out", 0))),
    "a backward": lambda blow, method: (policy(backward=blow), method(("out", 0))),
    "the target": lambda blow, method: (policy(), method(_target(blow))),
    "a forward hook": _hooked("register_forward_hook"),
    "a forward pre-hook": _hooked("register_forward_pre_hook"),
    "a backward hook": _hooked("register_full_backward_hook"),
    "a surrogate": lambda blow, _: (policy(), LRP(_mapper(BySurrogate(blow)), ("out", 0))),
    "a relevance": lambda blow, _: (policy(), LRP(_mapper(ByRelevance(blow)), ("out", 0))),
    "a baseline": lambda blow, _: (
        policy(),
        IntegratedGradients(("out", 0), n_steps=3, baselines=_baseline(blow), gap_tolerance=None),
    ),
}


# Some stages belong to one method.
OWN_METHOD = [
    ("a surrogate", "lrp"),
    ("a relevance", "lrp"),
    ("a baseline", "integrated gradients"),
]
ANYWHERE = [stage for stage in STAGES if stage not in dict(OWN_METHOD)]


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize(("stage", "name"), [*itertools.product(ANYWHERE, METHODS), *OWN_METHOD])
def test_an_error_at_any_stage_leaves_no_trace_and_the_next_call_works(stage, name, error, drive):
    blown = 0
    for after in range(4):
        with torch.random.fork_rng():
            model, method = STAGES[stage](fuse(after, error), METHODS[name])
        td = TensorDict({"observation": torch.randn(5, 3)}, [5])
        before, read = snapshot(model), td_snapshot(td)
        with method.prepare(model) as hooked:
            call = hooked if drive else hooked.observe
            try:
                call(td)
            except error as raised:
                assert "a fuse has blown" in str(raised)
                blown += 1
            else:
                continue
            assert_same(before, snapshot(model))
            assert_same(read, td_snapshot(td))
            assert call(td)["attr", "observation"].isfinite().all()
    assert blown, "the fuse never stood in the way"


def _nan(td: Any) -> Tensor:
    return td["out"][..., 0] / 0 * 0


OWN_ERRORS: dict[str, Callable[[TensorDict], Any]] = {
    "a target that is NaN": lambda td: Saliency(_nan),
    "a target of a wrong shape": lambda td: Saliency(lambda out: out["out"].sum()),
    "an ambiguous target": lambda td: Saliency("out"),
    "an index that does not fit": lambda td: Saliency(("out", 7)),
    "a target without a gradient": lambda td: Saliency(lambda out: out["out"][..., 0].detach()),
    "a NaN input": lambda td: (td["observation"].fill_(float("nan")), Saliency(("out", 0)))[1],
    "a missing key": lambda td: (td.pop("observation"), Saliency(("out", 0)))[1],
    "a baseline of a wrong shape": lambda td: IntegratedGradients(
        ("out", 0), baselines=torch.zeros(7)
    ),
    "a rule that is never reached": lambda td: LRP(EpsilonPlus(), ("out", 0)),
}


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("kind", OWN_ERRORS)
def test_an_error_of_the_library_leaves_no_trace_either(kind, drive):
    model = policy()
    if "never reached" in kind:
        model[0].module.add_module("unused", nn.Identity())
        model[0].module.unused.add_module("inner", nn.Linear(2, 2))
    td = TensorDict({"observation": torch.randn(5, 3)}, [5])
    method = OWN_ERRORS[kind](td)
    before, read = snapshot(model), td_snapshot(td)
    with method.prepare(model) as hooked, pytest.raises(TdhookLikeError):
        (hooked if drive else hooked.observe)(td)
    assert_same(before, snapshot(model))
    assert_same(read, td_snapshot(td))
