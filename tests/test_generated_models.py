"""Claims over hundreds of random models: what a call gives, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import NestedKey, TensorDict
from torch import Tensor, nn

import reference_lrp as ref
from generated_models import Case, Plan, build, cases, layers, rectifier_cases
from pristine import assert_same, bits, snapshot, td_snapshot
from tdhook_like import LRP, InputXGradient, IntegratedGradients, Saliency
from tdhook_like.attribution.lrp import (
    AlphaBetaRule,
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    GammaRule,
    PassRule,
    Rule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)

METHODS: dict[str, Callable[[Any], Any]] = {
    "saliency": Saliency,
    "input x gradient": InputXGradient,
    # Few steps: what is claimed here does not depend on how good the quadrature is.
    "integrated gradients": lambda t: IntegratedGradients(t, n_steps=3, gap_tolerance=None),
    "lrp": lambda t: LRP(EpsilonPlus(), target=t),
}
names = st.sampled_from(list(METHODS))
# Rollouts run under no_grad, some collectors under inference_mode.
modes = st.sampled_from([nullcontext, torch.no_grad, torch.inference_mode])


@settings(max_examples=50)
@given(cases())
def test_a_plan_builds_the_same_model_every_time_and_draws_no_global_randomness(case: Case):
    state = torch.get_rng_state()
    again = rebuilt(case)
    assert torch.get_rng_state().equal(state)
    assert contents(again.module) == contents(case.module)
    assert (again.td == case.td).all()
    assert repr(again) == repr(case)


@settings(max_examples=50)
@given(cases())
def test_every_generated_model_writes_one_finite_number_per_batch_element(case: Case):
    number = case.number(case.module(case.td.clone()))
    assert number.shape == case.td.batch_size
    assert number.isfinite().all()


@settings(max_examples=300)
@given(cases(training=False), modes)
def test_driving_gives_the_plain_outputs_and_leaves_the_model_as_it_was(case: Case, mode: Any):
    with mode():
        plain = case.module(case.td.clone())
    before = snapshot(case.module)
    for name, method in METHODS.items():
        td = case.td.clone()
        given_keys = td_snapshot(td, keys=list(case.td.keys(True, True)))
        with method(case.target).prepare(case.module) as hooked:
            with mode():
                result = hooked(td)
            assert_same(before, snapshot(case.module))
        assert_same(before, snapshot(case.module))
        assert_same(given_keys, td_snapshot(td, keys=list(case.td.keys(True, True))))
        assert result is td
        assert_outputs(plain, td)
        assert_attributions(case, plain, td, gap=name == "integrated gradients")


@settings(max_examples=120)
@given(cases(training=True), names)
def test_driving_in_training_mode_draws_and_counts_exactly_as_the_plain_call(case: Case, name: str):
    twin, state = rebuilt(case), torch.get_rng_state()
    before = snapshot(twin.module)
    plain = twin.module(twin.td.clone())
    changed_by_plain = before.changed(snapshot(twin.module))
    state_after = torch.get_rng_state()
    torch.set_rng_state(state)
    before = snapshot(case.module)
    with METHODS[name](case.target).prepare(case.module) as hooked:
        td = hooked(case.td.clone())
    assert before.changed(snapshot(case.module)) == changed_by_plain
    assert torch.get_rng_state().equal(state_after)
    assert contents(case.module) == contents(twin.module)
    assert_outputs(plain, td)


@settings(max_examples=120)
@given(cases(), names)
def test_observing_changes_nothing_and_writes_attributions_alone(case: Case, name: str):
    td = case.td.clone()
    before, read = snapshot(case.module), td_snapshot(td, keys=list(td.keys(True, True)))
    with METHODS[name](case.target).prepare(case.module) as hooked:
        hooked.observe(td)
    assert_same(before, snapshot(case.module))
    assert_same(read, td_snapshot(td, keys=list(case.td.keys(True, True))))
    assert_attributions(case, case.td, td, gap=name == "integrated gradients")


@settings(max_examples=150)
@given(cases(), modes)
def test_saliency_and_input_times_gradient_are_what_autograd_gives(case: Case, mode: Any):
    found = {}
    for method in (Saliency(case.target, abs=False), InputXGradient(case.target)):
        with method.prepare(case.module) as hooked, mode():
            found[type(method)] = hooked.observe(case.td.clone())["attr"]
    expected = plain_gradients(case)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[Saliency].get(key), gradient)
        torch.testing.assert_close(found[InputXGradient].get(key), case.td.get(key) * gradient)


@settings(max_examples=60)
@given(cases(training=False), names)
def test_named_targets_of_one_call_are_the_targets_of_several_calls(case: Case, name: str):
    targets = {"this": case.target, "that": (case.out_keys[-1], 0)}
    with METHODS[name](targets).prepare(case.module) as hooked:
        together = hooked(case.td.clone())
    for label, target in targets.items():
        with METHODS[name](target).prepare(case.module) as hooked:
            alone = hooked(case.td.clone())
        for key, value in alone["attr"].items(True, True):
            torch.testing.assert_close(together["attr", label].get(key), value)


def gamma(*args: Tensor) -> Tensor:
    return ref.gamma(*args, gamma=0.4)


def z_box(*args: Tensor) -> Tensor:
    return ref.zbox(*args, low=-9.0, high=9.0)


RULES: list[tuple[Rule, ref.LayerRule]] = [
    (EpsilonRule(), ref.epsilon),
    (ZPlusRule(), ref.zplus),
    (AlphaBetaRule(), ref.alpha_beta),
    (GammaRule(gamma=0.4), gamma),
    (WSquareRule(), ref.wsquare),
    (FlatRule(), ref.flat),
    (ZBoxRule(-9.0, 9.0), z_box),
]


@settings(max_examples=80)
@given(rectifier_cases(), st.data())
def test_relevance_of_a_rectifier_network_is_that_of_the_slow_reference(case: Case, data: Any):
    stack = layers(case)
    by_layer: dict[int, tuple[Rule, ref.LayerRule | None]] = {}
    for layer in stack:
        if isinstance(layer, nn.ReLU):
            by_layer[id(layer)] = (PassRule(), None)
        elif not isinstance(layer, nn.Flatten):
            by_layer[id(layer)] = data.draw(st.sampled_from(RULES))
    method = LRP(lambda _, m: by_layer[id(m)][0] if id(m) in by_layer else None, case.target)
    with method.prepare(case.module) as hooked:
        td = hooked(case.td.clone())
    start = torch.zeros_like(td["out"])
    start[:, case.target[1]] = td["out"][:, case.target[1]]
    rules = [by_layer[id(layer)][1] if id(layer) in by_layer else None for layer in stack]
    x = case.td["observation"]
    expected = ref.propagate(stack, x, start, rules)
    scale = max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(td["attr", "observation"] / scale, expected / scale)


def rebuilt(case: Case) -> Case:
    return build(eval(case.description, {"Plan": Plan}))


def contents(module: nn.Module) -> dict[str, bytes | None]:
    return {name: bits(tensor) for name, tensor in module.state_dict().items()}


def attribution_keys(case: Case) -> dict[NestedKey, NestedKey]:
    """Where the attribution of each key is due."""
    return {
        key: ("attr", key) if isinstance(key, str) else ("attr", *key) for key in case.float_keys
    }


def assert_outputs(plain: TensorDict, td: TensorDict) -> None:
    """All that the plain call wrote is there, bit for bit."""
    for key, value in plain.items(True, True):
        assert bits(td.get(key)) == bits(value), f"{key} differs from the plain call's"
        assert td.get(key).dtype == value.dtype


def assert_attributions(case: Case, written: TensorDict, td: TensorDict, *, gap: bool) -> None:
    """Attributions of the inputs' shapes are there, free of graphs, and nothing else is."""
    expected = set(written.keys(True, True)) | set(attribution_keys(case).values())
    assert set(td.keys(True, True)) == expected | ({"attr_gap"} if gap else set())
    for key, place in attribution_keys(case).items():
        attribution, x = td.get(place), case.td.get(key)
        assert (attribution.shape, attribution.dtype) == (x.shape, x.dtype)
        assert attribution.isfinite().all()
        assert not attribution.requires_grad
        if key == "ignored":
            assert not attribution.any()


def plain_gradients(case: Case) -> dict[NestedKey, Tensor]:
    """By autograd, in evaluation mode, on a model and an input of its own."""
    twin = rebuilt(case)
    twin.module.eval()
    leaves = [twin.td.get(key).requires_grad_() for key in case.float_keys]
    number = case.number(twin.module(twin.td))
    found = torch.autograd.grad(number.sum(), leaves, allow_unused=True)
    pairs = zip(case.float_keys, leaves, found, strict=True)
    return {key: torch.zeros_like(x) if g is None else g for key, x, g in pairs}
