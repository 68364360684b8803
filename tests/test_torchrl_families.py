"""Every family of torchrl modules: acts as without the wrapper, explained as by plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import pytest
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from pristine import assert_same, snapshot
from tdhook_like import LRP, InputXGradient, IntegratedGradients, Saliency, TargetError
from tdhook_like.attribution.lrp import EpsilonRule, FunctionRules
from torchrl_play import assert_bit_equal
from torchrl_records import FAMILIES, Family


@contextmanager
def calling(family: Family) -> Iterator[None]:
    """As collectors call policies: actions are drawn."""
    with family.scope(), set_exploration_type(ExplorationType.RANDOM):
        yield


every_family = pytest.mark.parametrize("name", FAMILIES)


def made(family: Family) -> tuple[Any, TensorDict]:
    """The model and its input, always the same."""
    torch.manual_seed(3)
    return family.build(), family.td()


def leaves_of(family: Family, td: TensorDictBase, share: float = 1.0) -> dict[NestedKey, Tensor]:
    """What is differentiated: the attributed inputs, or a share of the way to them from zero."""
    return {key: (share * td.get(key).detach()).requires_grad_() for key in family.keys}


def gradient(
    family: Family, model: Any, td: TensorDictBase, held: TensorDictBase | None, share: float = 1.0
) -> dict[NestedKey, Tensor]:
    """The gradient of the family's score by plain autograd; drawn keys are those of ``held``."""
    leaves, td = leaves_of(family, td, share), td.copy()
    for key, leaf in leaves.items():
        td.set(key, leaf)
    with calling(family):
        outputs = model(td)
    for key in family.held if held is not None else ():
        outputs.set(key, held.get(key))
    score = family.score(model, outputs)
    grads = torch.autograd.grad(score.sum(), list(leaves.values()), allow_unused=True)
    return {
        key: torch.zeros_like(leaf) if grad is None else grad
        for (key, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def attribution(td: TensorDictBase, key: NestedKey) -> Tensor:
    return td[("attr", key) if isinstance(key, str) else ("attr", *key)]


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    """The same parameters and buffers, modes and numbers of hooks."""
    pairs = zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
    assert not any(
        p.requires_grad != q.requires_grad or p.grad is not None
        for p, q in zip(found.parameters(), expected.parameters(), strict=True)
    )
    for ours, theirs in zip(found.modules(), expected.modules(), strict=True):
        assert ours.training == theirs.training
        assert len(ours._forward_hooks) == len(theirs._forward_hooks)
        assert len(ours._forward_pre_hooks) == len(theirs._forward_pre_hooks)


OBVIOUS = [name for name, family in FAMILIES.items() if "(" in family.default.split()[0]]


@pytest.mark.parametrize("name", OBVIOUS)
def test_the_obvious_target_is_the_default(name):
    model, _ = made(FAMILIES[name])
    assert repr(Saliency().prepare(model).targets[None]) == FAMILIES[name].default


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(OBVIOUS)))
def test_where_no_target_is_obvious_an_error_lists_the_choices(name):
    family = FAMILIES[name]
    model, td = made(family)
    with pytest.raises(TargetError) as failure, calling(family), ExitStack() as stack:
        stack.enter_context(Saliency().prepare(model))(td)
    assert family.default in str(failure.value)
    choices = [repr(key)[1:-1] for key in model.out_keys] + ["Each("]
    assert any(choice in str(failure.value) for choice in choices)


@every_family
@pytest.mark.parametrize("method", [Saliency, InputXGradient, LRP], ids=lambda m: m.__name__)
@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
def test_a_wrapped_module_writes_and_draws_what_it_does_without_the_wrapper(name, method, grad):
    family = FAMILIES[name]
    alone, td = made(family)
    with calling(family), grad():
        expected = alone(td)
        drawn = torch.rand(1)

    model, td = made(family)
    with method(target=family.target).prepare(model) as hooked, calling(family), grad():
        found = hooked(td)
        assert torch.equal(torch.rand(1), drawn)
    assert_same_state(model, alone)
    attributed = found.pop("attr")
    assert_bit_equal(found, expected)
    assert not any(value.requires_grad for value in attributed.values(True, True))
    assert all(torch.isfinite(value).all() for value in attributed.values(True, True))


@every_family
@pytest.mark.parametrize("times_input", [False, True], ids=["Saliency", "InputXGradient"])
def test_a_driven_module_is_explained_by_the_gradient_of_plain_autograd(name, times_input):
    family = FAMILIES[name]
    model, td = made(family)
    grads = gradient(family, model, td, held=None)
    model, td = made(family)
    inputs = leaves_of(family, td)
    method = InputXGradient(family.target) if times_input else Saliency(family.target, abs=False)
    with method.prepare(model) as hooked, calling(family):
        td = hooked(td)
    assert any(bool(grad.any()) for grad in grads.values())
    for key, grad in grads.items():
        expected = inputs[key] * grad if times_input else grad
        torch.testing.assert_close(attribution(td, key), expected.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.again])
def test_an_observed_record_is_explained_in_evaluation_mode_and_nothing_else_changes(name):
    family = FAMILIES[name]
    model, td = made(family)
    with calling(family), torch.no_grad():
        record = model(td)
        grads_of = copy.deepcopy(model).eval()
    entries = dict(record.items(True, True))
    before = snapshot(model)
    with Saliency(family.target, abs=False).prepare(model) as hooked, calling(family):
        assert hooked.observe(record) is record
    assert_same(before, snapshot(model))
    for key, value in entries.items():
        assert record.get(key) is value
    with torch.enable_grad():
        grads = gradient(family, grads_of, record, held=record)
    for key, grad in grads.items():
        torch.testing.assert_close(attribution(record, key), grad, rtol=1e-5, atol=1e-7)


RELU = [name for name, family in FAMILIES.items() if family.relu]


@pytest.mark.parametrize("name", RELU)
def test_lrp_with_a_vanishing_epsilon_is_input_times_gradient_on_networks_of_relus(name):
    # Shrikumar et al. 2016, with biases too: what they carry is not shared out in either.
    family = FAMILIES[name]
    model, td = made(family)
    grads, inputs = gradient(family, model, td, held=None), leaves_of(family, td)

    def mapper(path: str, module: nn.Module) -> EpsilonRule | None:
        return EpsilonRule(1e-12) if isinstance(module, nn.Linear | nn.Conv2d) else None

    model, td = made(family)
    functions = FunctionRules(rules={"tanh": None})  # of TanhModule, which is no network of relus
    method = LRP(mapper, family.target, functions=functions)
    with method.prepare(model) as hooked, calling(family):
        td = hooked(td)
    for key, grad in grads.items():
        expected = (inputs[key] * grad).detach()
        torch.testing.assert_close(attribution(td, key), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.again])
def test_integrated_gradients_are_those_of_a_loop_along_the_path(name):
    family = FAMILIES[name]
    model, td = made(family)
    model.eval()
    with calling(family), torch.no_grad():
        record = model(td)
    method = IntegratedGradients(family.target, n_steps=3, gap_tolerance=None)
    with method.prepare(model) as hooked, calling(family):
        hooked.observe(record)
    nodes, weights = numpy.polynomial.legendre.leggauss(3)
    expected = {key: torch.zeros_like(record.get(key)) for key in family.keys}
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        grads = gradient(family, model, record, held=record, share=(node + 1) / 2)
        for key, grad in grads.items():
            expected[key] += weight / 2 * grad * record.get(key)
    for key, value in expected.items():
        torch.testing.assert_close(attribution(record, key), value, rtol=1e-4, atol=1e-6)
