"""Every family of torchrl modules: called as without the wrapper, explained as by plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from pristine import assert_same, snapshot
from tdhook_like import LRP, InputXGradient, IntegratedGradients, Saliency, TargetError
from tdhook_like.attribution.lrp import EpsilonRule
from torchrl_families import FAMILIES, Family

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
    """The gradient of the family's score by plain autograd, what is held fixed read from ``held``."""
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
    return td["attr", *([key] if isinstance(key, str) else key)]


def assert_bit_equal(found: TensorDictBase, expected: TensorDictBase) -> None:
    """The same batch size, the same keys and, everywhere, the same bits."""
    assert found.batch_size == expected.batch_size
    assert set(found.keys(True, True)) == set(expected.keys(True, True))
    unequal = [key for key in found.keys(True, True) if not found.get(key).equal(expected.get(key))]
    assert unequal == []


@every_family
def test_the_obvious_target_is_taken_and_where_there_is_none_the_choices_are_listed(name):
    family = FAMILIES[name]
    model, td = made(family)
    if "(" in family.default.split()[0]:
        assert repr(Saliency().prepare(model).targets[None]) == family.default
    if family.target is None:
        return
    with pytest.raises(TargetError) as failure, calling(family):
        with Saliency().prepare(model) as hooked:
            hooked(td)
        pytest.skip("an obvious target, passed over in favour of another")
    assert family.default in str(failure.value)


@every_family
@pytest.mark.parametrize("method", [Saliency, InputXGradient, LRP], ids=lambda m: m.__name__)
@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
def test_a_wrapped_module_writes_and_draws_what_it_does_without_the_wrapper(name, method, grad):
    family = FAMILIES[name]
    model, td = made(family)
    with calling(family), grad():
        expected = copy.deepcopy(model)(td.copy())
        drawn = torch.rand(1)

    model, td = made(family)
    before = snapshot(model)
    with method(target=family.target).prepare(model) as hooked, calling(family), grad():
        found = hooked(td)
        assert torch.equal(torch.rand(1), drawn)
    # A driven call draws, and tensordict notes the last operation on parameters in them.
    assert_same(before, snapshot(model), ignoring=["random state", "params: __lock", "params: _last"])
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
    with LRP(mapper, family.target).prepare(model) as hooked, calling(family):
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
