"""Infidelity, completeness, sensitivity: closed forms and slow loops; what all measures share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, TensorDictModule
from torch import nn

from explaining import BATCHES
from explaining import explained as measured
from method_references import DOUBLE, Formula, Joined
from pristine import assert_same, snapshot
from tdhook_like import (
    LRP,
    AtStep,
    BaselineError,
    ContextError,
    Each,
    FromKey,
    InputError,
    InputXGradient,
    IntegratedGradients,
    KeyNotFoundError,
    Saliency,
)
from tdhook_like.attribution.combined import AttributionSum
from tdhook_like.attribution.expected import ExpectedGradients
from tdhook_like.attribution.lrp import EpsilonPlus
from tdhook_like.attribution.noise import NoiseTunnel
from tdhook_like.attribution.shapley import ShapleyValues, ShapleyValueSampling
from tdhook_like.metrics import (
    Completeness,
    Deletion,
    Infidelity,
    Insertion,
    MaxSensitivity,
    Noise,
    Removal,
)

# --- infidelity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_unit", [False, True])
@pytest.mark.parametrize("perturbation", [Removal(0.3), Noise({"a": 0.5, "b": 0.2})])
@pytest.mark.parametrize("batch", BATCHES)
def test_it_is_the_papers_mean_square_over_the_same_draws(batch, perturbation, per_unit):
    net, n = Joined([3, 2], 2).double(), 13
    inputs = {"a": torch.randn(*batch, 3, dtype=DOUBLE), "b": torch.randn(*batch, 2, dtype=DOUBLE)}
    fill = {"a": 0.5, "b": torch.randn(2, dtype=DOUBLE)}
    inner = (Saliency if per_unit else InputXGradient)(("y", 1))
    method = Infidelity(
        inner, perturbation=perturbation, fill=fill, n_samples=n, seed=3, internal_batch_size=7
    )
    scaled = Infidelity(
        inner, perturbation=perturbation, fill=fill, n_samples=n, seed=3, scaled=True
    )
    td, best = (measured(m, net, batch, **inputs) for m in (method, scaled))
    own = measured(inner, net, batch, **inputs)["attr"]
    away = {k: x - fill[k] for k, x in inputs.items()}
    draw = torch.Generator().manual_seed(3)
    said, falls = [], []
    for _ in range(n):
        off = {}
        for k, x in inputs.items():
            if isinstance(perturbation, Removal):
                off[k] = away[k] * (torch.rand(x.shape, dtype=DOUBLE, generator=draw) < 0.3)
            else:
                off[k] = perturbation.stdevs[k] * torch.randn(x.shape, dtype=DOUBLE, generator=draw)
        shares = {k: v if per_unit else v / away[k] for k, v in off.items()}
        said.append(sum((shares[k] * own[k]).sum(-1) for k in inputs))
        with torch.no_grad():
            moved = net(*[x - off[k] for k, x in inputs.items()])
            falls.append((net(*inputs.values()) - moved)[..., 1])
    s, f = torch.stack(said), torch.stack(falls)
    expected = (s - f).square().mean(0)
    torch.testing.assert_close(td["infidelity"], expected, rtol=0, atol=1e-10)
    beta = (s * f).sum(0) / s.square().sum(0)
    expected = (beta * s - f).square().mean(0)
    torch.testing.assert_close(best["infidelity"], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(td["attr", "a"], own["a"])


def test_of_a_linear_score_exact_methods_have_none_and_scale_is_forgiven_if_asked():
    net, x = nn.Linear(4, 1).double(), torch.randn(5, 4, dtype=DOUBLE)
    model = TensorDictModule(net, ["x"], ["y"])
    for inner in (InputXGradient("y"), IntegratedGradients("y"), LRP(EpsilonPlus(), "y")):
        for perturbation in (Removal(), Noise(0.3)):
            td = measured(Infidelity(inner, perturbation=perturbation), model, (5,), x=x)
            assert td["infidelity"].max() < 1e-10
    twice = AttributionSum(InputXGradient("y"))
    with pytest.raises(ContextError, match="Wrap each"):
        Infidelity(twice)
    half = IntegratedGradients(lambda td: td["y"][..., 0] / 2)
    plain = Infidelity(
        half, target="y"
    )  # half of what it should be: the method keeps its own scale
    assert measured(plain, model, (5,), x=x)["infidelity"].max() < 1e-10


def test_what_is_scaled_best_is_never_below_nothing():
    net, x = nn.Linear(4, 1), torch.randn(500, 4)
    td = measured(Infidelity(InputXGradient("y"), scaled=True), net, (500,), x=x)
    assert (td["infidelity"] >= 0).all() and td["infidelity"].max() < 1e-6


def test_wrong_attributions_are_less_faithful_and_saliency_in_size_is_wrong():
    net = nn.Linear(4, 1, bias=False).double()
    net.weight.data = torch.tensor([[1.0, -1.0, 2.0, -2.0]], dtype=DOUBLE)
    x = torch.ones(3, 4, dtype=DOUBLE)
    right = measured(Infidelity(Saliency("y", abs=False)), net, (3,), x=x)["infidelity"]
    wrong = measured(Infidelity(Saliency("y")), net, (3,), x=x)["infidelity"]
    assert right.max() < 1e-12 and (wrong > 1).all()


def test_of_a_wrapped_saliency_it_is_known_to_be_per_unit():
    net, x = nn.Linear(4, 1).double(), torch.randn(5, 4, dtype=DOUBLE)
    inner = NoiseTunnel(Saliency("y", abs=False), n_samples=3)
    assert measured(Infidelity(inner), net, (5,), x=x)["infidelity"].max() < 1e-12


def test_features_that_are_where_nothing_is_do_no_harm():
    net, x = nn.Linear(2, 1).double(), torch.tensor([[0.0, 1.0]], dtype=DOUBLE)
    td = measured(Infidelity(InputXGradient("y"), perturbation=Noise(0.1)), net, (1,), x=x)
    # The first feature has no share of anything, so that what its noise does is what is missed.
    draw = torch.Generator().manual_seed(0)
    first = [torch.randn(1, 2, dtype=DOUBLE, generator=draw)[0, 0] for _ in range(100)]
    missed = (net.weight[0, 0].detach() * 0.1 * torch.stack(first)).square().mean()
    torch.testing.assert_close(td["infidelity"], missed.reshape(1))


# --- completeness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_completeness_is_the_sum_minus_the_change(batch):
    net = Joined([3, 2], 1).double()
    inputs = {"a": torch.randn(*batch, 3, dtype=DOUBLE), "b": torch.randn(*batch, 2, dtype=DOUBLE)}
    own = measured(InputXGradient("y"), net, batch, **inputs)["attr"]
    td = measured(Completeness(InputXGradient("y"), fill={"a": 1.0}), net, batch, **inputs)
    with torch.no_grad():
        change = net(*inputs.values()) - net(torch.ones_like(inputs["a"]), 0 * inputs["b"])
    expected = own["a"].sum(-1) + own["b"].sum(-1) - change[..., 0]
    torch.testing.assert_close(td["completeness_gap"], expected, rtol=0, atol=1e-10)


def test_of_a_method_that_promises_it_it_is_the_gap_against_its_own_baseline():
    net, x = Joined([3], 2).double(), torch.randn(4, 3, dtype=DOUBLE)
    inner = IntegratedGradients(Each("y"), baselines=0.7, n_steps=2, gap_tolerance=None)
    own = measured(inner, net, (4,), x=x)["attr_gap"]
    td = measured(Completeness(inner), net, (4,), x=x)
    torch.testing.assert_close(td["completeness_gap"], own, rtol=0, atol=1e-10)
    td = measured(Completeness(ShapleyValues(("y", 0), baselines=0.3)), net, (4,), x=x)
    assert td["completeness_gap"].abs().max() < 1e-12


# --- sensitivity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_sensitivity_is_the_largest_change_over_the_same_draws(batch, relative):
    net, n = Joined([3, 2], 2).double(), 6
    inputs = {"a": torch.randn(*batch, 3, dtype=DOUBLE), "b": torch.randn(*batch, 2, dtype=DOUBLE)}
    inner = InputXGradient(("y", 1))
    method = MaxSensitivity(inner, radius={"a": 0.2}, n_samples=n, relative=relative, seed=2)
    td = measured(method, net, batch, **inputs)
    draw = torch.Generator().manual_seed(2)
    here = measured(inner, net, batch, **inputs)["attr"]
    here = torch.cat([here["a"], here["b"]], -1)
    found = []
    for _ in range(n):
        a, _ = (torch.rand(x.shape, dtype=DOUBLE, generator=draw) for x in inputs.values())
        there = measured(inner, net, batch, a=inputs["a"] + 0.2 * (2 * a - 1), b=inputs["b"])[
            "attr"
        ]
        found.append((torch.cat([there["a"], there["b"]], -1) - here).norm(dim=-1))
    expected = torch.stack(found).amax(0) / (here.norm(dim=-1) if relative else 1)
    torch.testing.assert_close(td["sensitivity"], expected, rtol=0, atol=1e-10)


def test_sensitivity_grows_with_the_radius_and_vanishes_without():
    net, x = Joined([3], 1).double(), torch.randn(8, 3, dtype=DOUBLE)
    zero, small, large = (
        measured(MaxSensitivity(Saliency("y"), radius=r), net, (8,), x=x)["sensitivity"]
        for r in (0.0, 0.01, 0.5)
    )
    assert not zero.any() and (small > 0).all() and (large > small).all()


def test_where_there_is_no_attribution_the_change_is_not_relative_to_it():
    net = Formula(lambda x: x.square().sum(-1))
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=DOUBLE)
    plain, relative = (
        measured(MaxSensitivity(InputXGradient("y"), relative=given), net, (2,), x=x)["sensitivity"]
        for given in (False, True)
    )
    length = torch.tensor([1.0, (2**2 + 8**2) ** 0.5], dtype=DOUBLE)  # of 2 x²
    torch.testing.assert_close(relative, plain / length)
    assert (plain > 0).all()


def test_what_a_method_draws_is_not_taken_for_sensitivity():
    net, x = nn.Linear(3, 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    rows = torch.randn(9, 3, dtype=DOUBLE)
    for inner in (
        ShapleyValueSampling("y", n_samples=2),
        ExpectedGradients("y", baselines=rows, n_samples=3, gap_tolerance=None),
        NoiseTunnel(Saliency("y"), n_samples=2),
    ):
        method = MaxSensitivity(inner, radius=0.0, n_samples=3)
        assert measured(method, net, (4,), x=x)["sensitivity"].max() < 1e-12


# --- what measures share ----------------------------------------------------------------------------

MEASURES = [Infidelity, Completeness, Deletion, Insertion, MaxSensitivity]


@pytest.mark.parametrize("kind", MEASURES)
def test_models_inputs_and_generators_are_left_alone_and_results_repeat(kind):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)).train()
    model = TensorDictModule(net, ["x"], ["y"])
    td, before = TensorDict({"x": torch.ones(6, 3)}, [6]), snapshot(model)
    found = []
    for _ in range(2):
        with kind(InputXGradient("y")).prepare(model) as hooked:
            found.append(hooked.observe(td.copy()))
    assert_same(before, snapshot(model))
    (place,) = set(found[0].keys()) - {"x", "attr"}
    assert torch.equal(found[0][place], found[1][place])
    assert found[0][place].shape[:1] == (6,)


@pytest.mark.parametrize("kind", MEASURES)
def test_a_trajectory_has_one_number_at_each_of_its_steps(kind):
    from torchrl.modules import GRUModule, set_recurrent_mode

    gru = GRUModule(3, 4, in_keys=["x", "h"], out_keys=["y", ("next", "h")]).double()
    td = TensorDict(
        {
            "x": torch.randn(2, 5, 3, dtype=DOUBLE),
            "is_init": torch.zeros(2, 5, 1, dtype=torch.bool),
            "h": torch.zeros(2, 5, 1, 4, dtype=DOUBLE),
        },
        [2, 5],
    )
    method = kind(InputXGradient(AtStep(("y", 1), -1), keys=["x"]))
    other, nothing = td.clone(), td.clone()
    other["x"][1, 2] += 1.0  # the first trajectory is as it was, the second one is another
    nothing["x"].zero_()
    with set_recurrent_mode(True), method.prepare(gru) as hooked:
        found, elsewhere = hooked.observe(td), hooked.observe(other)[method.gap_root]
        last = [gru(given.copy())["y"][:, -1, 1].detach() for given in (td, nothing)]
    value = found[method.gap_root]
    assert all(torch.equal(value[:, step], value[:, 0]) for step in range(5))
    torch.testing.assert_close(value[0], elsewhere[0], rtol=0, atol=1e-12)
    assert (value[1] != elsewhere[1]).any()
    if kind is Completeness:
        missed = found["attr", "x"].sum((1, 2)) - (last[0] - last[1])
        torch.testing.assert_close(value[:, 0], missed)
    if kind in (Deletion, Insertion):
        ends = last if kind is Deletion else last[::-1]
        torch.testing.assert_close(value[:, 0][:, [0, -1]], torch.stack(ends, -1))


@pytest.mark.parametrize("kind", MEASURES)
def test_members_of_an_ensemble_are_measured_apart(kind):
    net, x = Joined([3], 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    ensemble = EnsembleModule(TensorDictModule(net, ["x"], ["y"]), 2)
    method = kind(InputXGradient("y"))
    with method.prepare(ensemble) as hooked:
        value = hooked.observe(TensorDict({"x": x}, [4]))[method.gap_root]
    for i, parameters in enumerate(ensemble.params_td.detach().unbind(0)):
        alone = Joined([3], 1).double()
        parameters["module"].to_module(alone)
        own = measured(method, alone, (4,), x=x)[method.gap_root]
        torch.testing.assert_close(value[:, i], own, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(value[:, 0], value[:, 1])


def test_the_fill_may_stand_in_the_tensordict_and_is_else_the_methods_baseline():
    net, x, rest = nn.Linear(3, 1).double(), torch.randn(4, 3).double(), torch.randn(4, 3).double()
    model = TensorDictModule(net, ["x"], ["y"])
    for method in (
        Deletion(InputXGradient("y"), fill=FromKey("rest")),
        Deletion(IntegratedGradients("y", baselines=FromKey("rest"), gap_tolerance=None)),
    ):
        with method.prepare(model) as hooked:
            td = hooked.observe(TensorDict({"x": x, "rest": rest}, [4]))
        torch.testing.assert_close(td["deletion"][:, -1:], net(rest).detach())


LINEAR = (nn.Linear(2, 1), ["x"], ["y"])
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no samples": (lambda: Infidelity(Saliency("y"), n_samples=0), InputError, "n_samples"),
    "no perturbation": (
        lambda: Infidelity(Saliency("y"), perturbation=0.1),  # pyright: ignore
        InputError,
        "Noise",
    ),
    "negative noise": (lambda: Noise(-0.1), InputError, "stdevs"),
    "a share of nothing": (lambda: Removal(0.0), InputError, "share"),
    "a share of more than all": (lambda: Removal(1.5), InputError, "share"),
    "negative seed": (lambda: Deletion(Saliency("y"), seed=-1), InputError, "seed"),
    "unknown order": (lambda: Deletion(Saliency("y"), by="rows"), InputError, "features, keys"),
    "no steps": (lambda: Insertion(Saliency("y"), n_steps=0), InputError, "n_steps"),
    "negative radius": (lambda: MaxSensitivity(Saliency("y"), radius=-1), InputError, "radius"),
    "no points": (lambda: MaxSensitivity(Saliency("y"), n_samples=0), InputError, "n_samples"),
    "submodules": (lambda: Deletion(Saliency("y", at="0")), ContextError, "in_keys"),
    "no method": (lambda: Deletion("y"), ContextError, "takes a method"),  # pyright: ignore
    "noise of an unknown key": (
        lambda: Infidelity(Saliency("y"), perturbation=Noise({"z": 1.0})).prepare(*LINEAR),
        KeyNotFoundError,
        "'z'",
    ),
    "radius of an unknown key": (
        lambda: MaxSensitivity(Saliency("y"), radius={"z": 1.0}).prepare(*LINEAR),
        KeyNotFoundError,
        "'z'",
    ),
    "fill of an unknown key": (
        lambda: Deletion(Saliency("y"), fill={"z": 1.0}).prepare(*LINEAR),
        BaselineError,
        "'z'",
    ),
    "a fill that is none": (
        lambda: Completeness(Saliency("y"), fill="a").prepare(*LINEAR),  # pyright: ignore
        BaselineError,
        "not a baseline",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused(case):
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make()
