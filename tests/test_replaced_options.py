"""Every public method with some of its options changed: the others stay what they were."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import tdhook_like
from tdhook_like import (
    LRP,
    EpsilonPlus,
    InputXGradient,
    IntegratedGradients,
    Method,
    RuleError,
    Saliency,
    attribution,
    metrics,
)
from tdhook_like import robustness as attacks
from tdhook_like.attribution.lrp import EpsilonRule, IgnoreRule

ROWS = torch.zeros(2, 3)
LINEAR = EpsilonPlus(epsilon=0.25)

ALONG = IntegratedGradients("y", n_steps=7, gap_tolerance=None)

# One of each, with options that are not the usual ones.
SAMPLES: dict[str, Callable[[Any], Method]] = {
    "ActivationMaximisation": lambda kind: kind("y", n_steps=3, decay=0.5, seed=4),
    "AttributionContrast": lambda kind: kind(Saliency("y"), InputXGradient("y")),
    "AttributionMean": lambda kind: kind(Saliency("y"), InputXGradient("y"), weights=[0.2, 0.8]),
    "AttributionSum": lambda kind: kind(Saliency("y"), InputXGradient("y"), weights=[3.0, -1.0]),
    "Completeness": lambda kind: kind(Saliency("y"), fill=0.5, seed=4),
    "Conductance": lambda kind: kind("y", at="0", baselines=0.5, n_steps=7, gap_tolerance=None),
    "Corruption": lambda kind: kind("y", change=lambda x, size, draw: x, seed=4, root="other"),
    "Deconvolution": lambda kind: kind("y", functional=True),
    "DeepLift": lambda kind: kind("y", baselines=0.5, gap_tolerance=0.5),
    "DeepLiftShap": lambda kind: kind("y", baselines=ROWS, gap_tolerance=None),
    "Deletion": lambda kind: kind(LRP(LINEAR, "y"), by="keys", absolute=True, n_steps=3, fill=1.0),
    "ExpectedGradients": lambda kind: kind("y", baselines=ROWS, n_samples=3, seed=4),
    "FGSM": lambda kind: kind("y", epsilon=0.5, norm="l2", root="other"),
    "FeatureAblation": lambda kind: kind("y", baselines=0.5, groups="keys"),
    "FeaturePermutation": lambda kind: kind("y", n_samples=3, seed=4),
    "GaussianNoise": lambda kind: kind("y", epsilon=0.5, seed=4),
    "Given": lambda kind: kind({"x": ROWS}, "y", root="other"),
    "GradCAM": lambda kind: kind("y", at="0", relu=False, interpolate="nearest"),
    "GradientShap": lambda kind: kind("y", baselines=ROWS, stdevs=0.5, n_samples=3),
    "GuidedBackprop": lambda kind: kind("y", functional=True),
    "GuidedGradCAM": lambda kind: kind("y", at="0", interpolate="nearest", channel_dim=1),
    "Infidelity": lambda kind: kind(Saliency("y"), per_unit=False, scaled=True, n_samples=3),
    "InputXGradient": lambda kind: kind("y", create_graph=True, rules=LINEAR),
    "Insertion": lambda kind: kind(Saliency("y"), n_steps=3, internal_batch_size=5),
    "IntegratedGradients": lambda kind: kind("y", baselines=0.5, n_steps=7, rules=LINEAR),
    "InternalInfluence": lambda kind: kind("y", at="0", n_steps=7, method="riemann_left"),
    "KernelShap": lambda kind: kind("y", n_samples=30, seed=4, baselines=0.5),
    "LRP": lambda kind: kind(LINEAR, "y", start="one", ledger=0.5, unhandled="raise"),
    "Lime": lambda kind: kind("y", n_samples=30, kernel_width=0.5, ridge=2.0, seed=4),
    "MaxSensitivity": lambda kind: kind(Saliency("y"), radius=0.5, n_samples=3, relative=False),
    "MinParamPerturbation": lambda kind: kind(attacks.FGSM("y", epsilon=0.5), threshold=1.0),
    "NoiseTunnel": lambda kind: kind(Saliency("y"), stdevs=0.5, n_samples=3, seed=4),
    "Occlusion": lambda kind: kind("y", window=2, stride=2, baselines=0.5),
    "OverBaselines": lambda kind: kind(ALONG, over=ROWS, n_samples=3, seed=4),
    "PGD": lambda kind: kind("y", n_steps=3, step_size=0.5, n_starts=2, seed=4),
    "PathIntegratedGradients": lambda kind: kind("y", path={"x": ROWS}, gap_tolerance=None),
    "Saliency": lambda kind: kind("y", abs=False, root="other", at=("0",), activations=("1",)),
    "ShapleyValueSampling": lambda kind: kind("y", n_samples=3, baselines=0.5, seed=4),
    "ShapleyValues": lambda kind: kind("y", baselines=0.5, groups="keys"),
}
EXPORTED: dict[str, Any] = {
    name: getattr(room, name)
    for room in (tdhook_like, attribution, metrics, attacks)
    for name in room.__all__
}
BASES = ("Change", "GradientMethod", "Method", "PathMethod")
PUBLIC = {
    name: kind
    for name, kind in EXPORTED.items()
    if inspect.isclass(kind) and issubclass(kind, Method) and name not in BASES
}


def options(method: Method, *without: str) -> dict[str, Any]:
    """All options by name; a mapper by what it prints, where the method makes one of its own."""
    found = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    found["rules"] = repr(method.rules)
    return {name: value for name, value in found.items() if name not in without}


def test_every_public_method_has_a_sample():
    assert set(SAMPLES) == set(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_with_nothing_changed_it_is_the_same_method(name):
    method = SAMPLES[name](PUBLIC[name])
    same = method.replaced()
    assert type(same) is PUBLIC[name] and options(same) == options(method)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_with_other_keys_every_other_option_is_what_it_was(name):
    method = SAMPLES[name](PUBLIC[name])
    changed = method.replaced(keys=["x"])
    assert changed.keys == ("x",) and method.keys is None
    assert options(changed, "keys") == options(method, "keys")
    assert options(changed.replaced(keys=None)) == options(method)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_with_another_target_and_root_it_has_these(name):
    method = SAMPLES[name](PUBLIC[name])
    changed = method.replaced(target=("y", 1), root="elsewhere")
    assert (changed.target, changed.root) == (("y", 1), "elsewhere")
    assert options(changed, "target", "root") == options(method, "target", "root")


def test_submodules_may_be_added_to_relevance():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(5, 3)
    method = LRP(EpsilonPlus(), "y", start="one", ledger=True)
    with method.replaced(at=("0",)).prepare(net, ["x"], ["y"]) as hooked:
        found = hooked.observe(TensorDict({"x": x}, [5]))
        assert hooked.ledger is not None
    told = LRP(EpsilonPlus(), "y", start="one", at=("0",))
    with told.prepare(net, ["x"], ["y"]) as hooked:
        own = hooked.observe(TensorDict({"x": x}, [5]))
    torch.testing.assert_close(found["attr", "x"], own["attr", "x"])
    torch.testing.assert_close(found["attr_at", "0"], own["attr_at", "0"])


def test_the_rules_of_lrp_are_its_mapper_by_whatever_name_they_are_replaced():
    epsilon = lambda name, module: EpsilonRule(0.5)  # noqa: E731
    for changed in (
        LRP(EpsilonPlus(), "y").replaced(rule_mapper=epsilon),
        LRP(EpsilonPlus(), "y").replaced(rules=epsilon),
        dataclasses.replace(LRP(EpsilonPlus(), "y"), rule_mapper=epsilon),
    ):
        assert changed.rules is epsilon
        assert isinstance(changed, LRP) and changed.rule_mapper is epsilon
    with pytest.raises(RuleError, match="rule_mapper"):
        LRP(EpsilonPlus(), "y", rules=epsilon)


def test_relevance_is_pickled_with_its_rules():
    again = pickle.loads(pickle.dumps(LRP(LINEAR, "y", start="one")))
    assert again.rules is again.rule_mapper and again.rule_mapper.epsilon == 0.25
    assert again.replaced(keys=["x"]).start == "one"


def test_rules_of_other_methods_are_kept_or_replaced():
    ignored = lambda name, module: IgnoreRule()  # noqa: E731
    method = Saliency("y", rules=LINEAR)
    assert method.replaced(keys=["x"]).rules is LINEAR
    assert method.replaced(rules=ignored).rules is ignored
