"""Sums, means and contrasts of attributions: each part alone, added up by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule, set_interaction_type
from torch import nn
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal

from explaining import BATCHES
from explaining import driven as explained
from method_references import DOUBLE, Joined
from pristine import assert_same, snapshot, td_snapshot
from tdhook_like import (
    LRP,
    ContextError,
    Each,
    InputError,
    InputXGradient,
    IntegratedGradients,
    LogProb,
    Saliency,
    TargetError,
)
from tdhook_like.attribution.combined import (
    AttributionContrast,
    AttributionMean,
    AttributionSum,
)
from tdhook_like.attribution.lrp import EpsilonPlus, GammaRule
from tdhook_like.attribution.noise import NoiseTunnel
from tdhook_like.attribution.shapley import ShapleyValueSampling


def gamma(name: str, module: nn.Module) -> Any:
    return GammaRule(0.5) if isinstance(module, nn.Linear) else None


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_sum_of_methods_under_different_rules_is_each_one_alone_added_up(batch, drive):
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    model, x = TensorDictModule(net, ["x"], ["y"]), torch.randn(*batch, 3, dtype=DOUBLE)
    parts = [
        LRP(EpsilonPlus(rule_mapper=gamma), ("y", 0)),
        InputXGradient(("y", 1)),
        IntegratedGradients(("y", 0), n_steps=4, gap_tolerance=None),
    ]
    weights = [1.0, -0.5, 2.0]
    td = TensorDict({"x": x}, batch)
    with AttributionSum(*parts, weights=weights).prepare(model) as hooked:
        (hooked if drive else hooked.observe)(td)
    assert ("y" in td) == drive
    each = [explained(part, model, batch, x=x)["attr", "x"] for part in parts]
    expected = sum(w * e for w, e in zip(weights, each, strict=True))
    torch.testing.assert_close(td["attr", "x"], expected, rtol=0, atol=1e-12)


def test_a_contrast_of_relevances_is_the_relevance_of_the_contrast_but_sizes_are_not_alike():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    model, x = TensorDictModule(net, ["x"], ["y"]), torch.randn(4, 3, dtype=DOUBLE)
    rules = EpsilonPlus(rule_mapper=gamma)
    one, two = LRP(rules, ("y", 0)), LRP(rules, ("y", 1))
    td = explained(AttributionContrast(one, two), model, (4,), x=x)
    expected = explained(one, model, (4,), x=x)["attr", "x"]
    expected = expected - explained(two, model, (4,), x=x)["attr", "x"]
    torch.testing.assert_close(td["attr", "x"], expected, rtol=0, atol=1e-12)
    other = LRP(rules, target=lambda td: td["y"][..., 0] - td["y"][..., 1])
    whole = explained(other, model, (4,), x=x)["attr", "x"]
    torch.testing.assert_close(td["attr", "x"], whole, rtol=0, atol=1e-10)
    sizes = AttributionContrast(Saliency(("y", 0)), Saliency(("y", 1)))
    slopes = [explained(Saliency(t), model, (4,), x=x)["attr", "x"] for t in (("y", 0), ("y", 1))]
    found = explained(sizes, model, (4,), x=x)["attr", "x"]
    torch.testing.assert_close(found, slopes[0] - slopes[1])
    of_both = explained(Saliency(other.target), model, (4,), x=x)["attr", "x"]
    assert not torch.allclose(found, of_both)


def test_a_mean_is_a_sum_of_equal_shares_and_sums_of_sums_are_flat():
    a, b, c = Saliency("y"), InputXGradient("y"), IntegratedGradients("y")
    mean = AttributionMean(a, b)
    assert (mean.methods, mean.weights) == ((a, b), (0.5, 0.5))
    nested = AttributionSum(mean, c, weights=[3.0, 1.0])
    assert (nested.methods, nested.weights) == ((a, b, c), (1.5, 1.5, 1.0))
    again = nested.replaced(root="total")
    assert isinstance(again, AttributionSum)
    assert (again.methods, again.weights, again.root) == (nested.methods, nested.weights, "total")


def test_gaps_add_up_where_every_method_has_one():
    net, x = Joined([3], 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    one = IntegratedGradients("y", n_steps=2, gap_tolerance=None)
    two = IntegratedGradients("y", n_steps=3, baselines=1.0, gap_tolerance=None)
    td = explained(AttributionMean(one, two), net, (4,), x=x)
    gaps = [explained(part, net, (4,), x=x)["attr_gap"] for part in (one, two)]
    torch.testing.assert_close(td["attr_gap"], (gaps[0] + gaps[1]) / 2)
    assert "attr_gap" not in explained(AttributionMean(one, Saliency("y")), net, (4,), x=x)


def test_errors_add_up_as_those_of_independent_draws():
    net, x = Joined([3], 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    parts = [
        NoiseTunnel(Saliency("y"), seed=1),
        ShapleyValueSampling("y", seed=2),
        InputXGradient("y"),
    ]
    td = explained(AttributionSum(*parts, weights=[2.0, 3.0, 1.0]), net, (4,), x=x)
    errors = [explained(part, net, (4,), x=x)["attr_error", "x"] for part in parts[:2]]
    expected = (4 * errors[0].square() + 9 * errors[1].square()).sqrt()
    torch.testing.assert_close(td["attr_error", "x"], expected)


def test_named_targets_each_and_keys_that_are_ignored():
    net = Joined([3], 2).double()
    model = TensorDictModule(lambda x, z: net(x), ["x", "z"], ["y"])
    inputs = {"x": torch.randn(4, 3, dtype=DOUBLE), "z": torch.randn(4, 2, dtype=DOUBLE)}
    for target in ({"a": ("y", 0), "b": ("y", 1)}, Each("y")):
        parts = [InputXGradient(target), Saliency(target, abs=False)]
        td = explained(AttributionMean(*parts), model, (4,), **inputs)
        each = [explained(part, model, (4,), **inputs) for part in parts]
        for key, value in td["attr"].items(True, True):
            place = ("attr", key) if isinstance(key, str) else ("attr", *key)
            torch.testing.assert_close(value, (each[0][place] + each[1][place]) / 2)
    assert td["attr", "x"].shape == (4, 2, 3) and not td["attr", "z"].any()


def test_driving_acts_once_and_all_methods_explain_the_action_that_was_drawn():
    net = nn.Sequential(nn.Linear(3, 4), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, ["x"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    x = torch.randn(5, 3)
    with set_interaction_type(InteractionType.RANDOM):
        torch.manual_seed(1)
        plain = actor(TensorDict({"x": x}, [5]))
        state = torch.get_rng_state()
        torch.manual_seed(1)
        parts = [Saliency(LogProb(), abs=False), InputXGradient(LogProb())]
        with AttributionSum(*parts).prepare(actor) as hooked:
            td = hooked(TensorDict({"x": x}, [5]))
    assert torch.equal(td["action"], plain["action"])
    assert torch.equal(torch.get_rng_state(), state)
    each = []
    for part in parts:
        with part.prepare(actor) as hooked:
            each.append(hooked.observe(plain.copy())["attr", "x"])
    torch.testing.assert_close(td["attr", "x"], each[0] + each[1])


def test_observing_changes_nothing_but_the_attributions():
    model = TensorDictModule(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)),
        ["x"],
        ["y"],
    ).train()
    td = TensorDict({"x": torch.randn(6, 3)}, [6])
    before, inputs = snapshot(model), td_snapshot(td, ["x"])
    with AttributionMean(Saliency("y"), NoiseTunnel(Saliency("y"))).prepare(model) as hooked:
        hooked.observe(td)
    assert_same(before, snapshot(model))
    assert_same(inputs, td_snapshot(td, ["x"]))
    assert set(td.keys()) == {"x", "attr", "attr_error"}


def test_a_model_that_overwrites_what_it_reads_is_explained_at_what_it_read():
    net = nn.Linear(3, 3).double()
    model = TensorDictModule(net, ["x"], ["x"])
    x = torch.randn(4, 3, dtype=DOUBLE)
    parts = [InputXGradient(("x", 0)), InputXGradient(("x", 1))]
    td = explained(AttributionSum(*parts), model, (4,), x=x)
    torch.testing.assert_close(td["x"], net(x).detach())
    torch.testing.assert_close(td["attr", "x"], x * net.weight.detach()[:2].sum(0))


def test_calls_with_tensors_and_with_another_destination():
    net, x = nn.Linear(3, 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    both = AttributionSum(InputXGradient("y"), Saliency("y", abs=False))
    expected = x * net.weight.detach() + net.weight.detach()
    with both.prepare(net, ["x"], ["y"]) as hooked:
        y, relevance = hooked(x)
        torch.testing.assert_close(y, net(x).detach())
        torch.testing.assert_close(relevance, expected)
        td, out = TensorDict({"x": x}, [4]), TensorDict({}, [4])
        assert hooked(td, tensordict_out=out) is out
    torch.testing.assert_close(out["attr", "x"], expected)
    assert set(td.keys()) == {"x"}


def test_a_failure_leaves_the_generators_as_they_were():
    net = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)).train()
    bad = InputXGradient(lambda td: td["y"][..., 0] / 0)
    td = TensorDict({"x": torch.randn(4, 3)}, [4])
    with AttributionSum(Saliency("y"), bad).prepare(net, ["x"], ["y"]) as hooked:
        state = torch.get_rng_state()
        with pytest.raises(TargetError, match="NaN or Inf"):
            hooked(td)
    assert torch.equal(torch.get_rng_state(), state)


def test_leaving_closes_every_part():
    context = AttributionSum(Saliency("y"), Saliency("y")).prepare(nn.Linear(2, 1), ["x"], ["y"])
    with context as hooked:
        hooked(TensorDict({"x": torch.ones(1, 2)}, [1]))
        with pytest.raises(ContextError, match="entered already"):
            context.__enter__()
    with pytest.raises(ContextError, match="was left"):
        hooked(TensorDict({"x": torch.ones(1, 2)}, [1]))
    with context as hooked:
        hooked(TensorDict({"x": torch.ones(1, 2)}, [1]))


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": (lambda: AttributionSum(), ContextError, "takes methods"),
    "no method": (lambda: AttributionSum("y"), ContextError, "takes methods"),  # pyright: ignore
    "too few weights": (
        lambda: AttributionSum(Saliency("y"), Saliency("y"), weights=[1.0]),
        InputError,
        "for each of 2",
    ),
    "an infinite weight": (
        lambda: AttributionSum(Saliency("y"), weights=[float("inf")]),
        InputError,
        "finite",
    ),
    "a contrast of three": (
        lambda: AttributionContrast(*[Saliency("y")] * 3),
        ContextError,
        "of two methods",
    ),
    "names that differ": (
        lambda: AttributionSum(Saliency({"a": "y"}), Saliency({"b": "y"})),
        TargetError,
        "named differently",
    ),
    "submodules": (
        lambda: AttributionSum(Saliency("y", at="0")),
        ContextError,
        "leave at=",
    ),
    "an unknown option": (lambda: AttributionSum(Saliency("y"), n=1), TypeError, "'n'"),
    "as many targets as not": (
        lambda: explained(
            AttributionSum(Saliency(("y", 0)), Saliency(Each("y"))),
            nn.Linear(3, 2),
            (4,),
            x=torch.randn(4, 3),
        ),
        TargetError,
        "different shapes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused(case):
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make()


def test_methods_of_different_keys_are_refused_unless_the_keys_are_said():
    methods = Saliency("y", keys=["a"]), InputXGradient("y", keys=["b"])
    with pytest.raises(ContextError, match=r"different keys.*keys="):
        AttributionSum(*methods)
    assert AttributionSum(*methods, keys=("a",)).keys == ("a",)
