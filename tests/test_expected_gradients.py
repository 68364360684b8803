"""Expected gradients, GradientSHAP, means over baselines, against slow references."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Independent, Normal, Uniform
from torchrl.data import LazyTensorStorage, ReplayBuffer

from explaining import BATCHES, explained
from method_references import DOUBLE, Formula, Joined, integrated
from pristine import assert_same, snapshot
from tdhook_like import AtStep, CompletenessWarning, Each, FromBuffer, FromKey, IntegratedGradients
from tdhook_like.attribution.ablation import FeatureAblation
from tdhook_like.attribution.expected import ExpectedGradients, GradientShap, OverBaselines
from tdhook_like.attribution.shapley import ShapleyValues, ShapleyValueSampling

# --- expected gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_it_is_the_mean_over_the_same_draws_one_at_a_time(batch):
    net, n = Joined([3, 2], 2).double(), 11
    a, b = torch.randn(*batch, 3, dtype=DOUBLE), torch.randn(*batch, 2, dtype=DOUBLE)
    rows = {"a": torch.randn(6, 3, dtype=DOUBLE), "b": torch.randn(6, 2, dtype=DOUBLE)}
    method = ExpectedGradients(
        ("y", 1), baselines=rows, n_samples=n, seed=4, gap_tolerance=None, internal_batch_size=5
    )
    td = explained(method, net, batch, a=a, b=b)
    drawn, places = (torch.Generator().manual_seed(4) for _ in range(2))
    found, low = [], []
    count = math.prod(batch)
    for _ in range(n):
        index = torch.randint(6, (count,), generator=drawn).reshape(batch)
        alpha = torch.rand(batch, dtype=DOUBLE, generator=places).unsqueeze(-1)
        start = [rows["a"][index], rows["b"][index]]
        ways = [a - start[0], b - start[1]]
        point = [(s + alpha * w).requires_grad_() for s, w in zip(start, ways, strict=True)]
        grads = torch.autograd.grad(net(*point)[..., 1].sum(), point)
        found.append([w * g for w, g in zip(ways, grads, strict=True)])
        low.append(net(*start)[..., 1].detach())
    for i, key in enumerate("ab"):
        draws = torch.stack([each[i] for each in found])
        torch.testing.assert_close(td["attr", key], draws.mean(0), rtol=0, atol=1e-10)
        error = draws.std(0) / n**0.5
        torch.testing.assert_close(td["attr_error", key], error, rtol=0, atol=1e-10)
    total = td["attr", "a"].sum(-1) + td["attr", "b"].sum(-1)
    change = net(a, b)[..., 1].detach() - torch.stack(low).mean(0)
    torch.testing.assert_close(td["attr_gap"], total - change, rtol=0, atol=1e-10)


def test_it_is_within_its_errors_of_integrated_gradients_over_all_baselines():
    net, x = Joined([3], 2).double(), torch.randn(30, 3, dtype=DOUBLE)
    rows = torch.randn(5, 3, dtype=DOUBLE)
    expected = torch.stack([integrated(net, [x], [row.expand_as(x)], 0)[0] for row in rows]).mean(0)
    method = ExpectedGradients(("y", 0), baselines=rows, n_samples=500, gap_tolerance=None)
    td = explained(method, net, (30,), x=x)
    away = (td["attr", "x"] - expected) / td["attr_error", "x"]
    assert away.abs().max() < 4.5 and 0.8 < away.std() < 1.2


def test_a_linear_score_gives_weight_times_distance_to_the_mean_baseline():
    net, x = nn.Linear(2, 1).double(), torch.randn(3, 2, dtype=DOUBLE)
    rows = torch.tensor([[1.0, -1.0]], dtype=DOUBLE)  # one row: nothing is left to chance
    td = explained(ExpectedGradients("y", baselines=rows), net, (3,), x=x)
    torch.testing.assert_close(td["attr", "x"], (net.weight * (x - rows)).detach())
    torch.testing.assert_close(td["attr_gap"], torch.zeros(3, dtype=DOUBLE))
    assert td["attr_error", "x"].abs().max() < 1e-12


def test_rows_of_several_keys_are_drawn_together():
    # In every row a == b, so that at a linear score of a − b baselines change nothing.
    rows = TensorDict(
        {"a": torch.arange(9.0).unsqueeze(1), "b": torch.arange(9.0).unsqueeze(1)}, [9]
    )
    net = Formula(lambda a, b: a - b)
    inputs = {"a": torch.zeros(4, 1), "b": torch.zeros(4, 1)}
    for given in (rows, dict(rows.items())):
        method = ExpectedGradients("y", baselines=given, n_samples=7, gap_tolerance=None)
        td = explained(method, net, (4,), **inputs)
        assert torch.allclose(td["attr", "a"], -td["attr", "b"]) and td["attr", "a"].any()


def test_a_tensordict_of_observations_may_hold_more_and_nested_keys():
    rows = TensorDict(
        {
            "agents": TensorDict({"obs": torch.randn(7, 2, 3)}, [7, 2]),
            "reward": torch.randn(7, 1),
            "done": torch.zeros(7, 1, dtype=torch.bool),
        },
        [7],
    )
    model = TensorDictModule(
        Formula(lambda obs, c: obs.sum((-1, -2)) * c[..., 0]), [("agents", "obs"), "c"], ["y"]
    )
    td = TensorDict(
        {"agents": TensorDict({"obs": torch.randn(5, 2, 3)}, [5, 2]), "c": torch.ones(5, 1)}, [5]
    )
    method = ExpectedGradients(
        "y", baselines=rows, keys=[("agents", "obs")], n_samples=300, gap_tolerance=None
    )
    with method.prepare(model) as hooked:
        found = hooked.observe(td)
    expected = td["agents", "obs"] - rows["agents", "obs"].mean(0)
    away = (found["attr", "agents", "obs"] - expected).abs()
    assert (away < 5 * found["attr_error", "agents", "obs"]).all()
    assert found["attr", "agents"].batch_size == (5, 2)


def buffer(**rows: Tensor) -> ReplayBuffer:
    n = len(next(iter(rows.values())))
    made = ReplayBuffer(storage=LazyTensorStorage(n))
    made.extend(TensorDict(rows, [n]))
    return made


def test_baselines_from_a_replay_buffer_are_drawn_anew_and_repeat_by_seed():
    net, x = nn.Linear(2, 1).double(), torch.randn(3, 2, dtype=DOUBLE)
    rows = torch.randn(50, 2, dtype=DOUBLE)
    before = torch.get_rng_state()
    found = [
        explained(
            ExpectedGradients(
                "y", baselines=FromBuffer(buffer(x=rows)), n_samples=400, seed=s, gap_tolerance=None
            ),
            net,
            (3,),
            x=x,
        )
        for s in (1, 1, 2)
    ]
    assert torch.equal(found[0]["attr", "x"], found[1]["attr", "x"])
    assert not torch.equal(found[0]["attr", "x"], found[2]["attr", "x"])
    assert torch.equal(before, torch.get_rng_state())
    expected = (net.weight * (x - rows.mean(0))).detach()
    away = (found[0]["attr", "x"] - expected) / found[0]["attr_error", "x"]
    assert away.abs().max() < 4.5


@pytest.mark.parametrize(
    "given",
    [
        Uniform(1.0, 3.0),
        Uniform(torch.ones(2), torch.tensor(3.0)),
        Independent(Normal(2.0 * torch.ones(2), 0.5), 1),
        lambda x: 2.0 + torch.randn_like(x),
    ],
    ids=["scalar", "features", "event", "function"],
)
def test_baselines_may_be_drawn_from_a_distribution_or_a_function(given):
    net, x = nn.Linear(2, 1).double(), torch.randn(2, 4, 2, dtype=DOUBLE)
    before = torch.get_rng_state()
    method = ExpectedGradients("y", baselines={"x": given}, n_samples=400, gap_tolerance=None)
    td, again = (explained(method, net, (2, 4), x=x)["attr", "x"] for _ in range(2))
    assert torch.equal(td, again) and torch.equal(before, torch.get_rng_state())
    assert ((td - net.weight.detach() * (x - 2)).abs() < 0.4).all()


def test_numbers_and_keys_stay_what_they_are():
    x, rest = torch.randn(4, 2, dtype=DOUBLE), torch.randn(4, 2, dtype=DOUBLE)
    net = nn.Linear(4, 1).double()
    model = TensorDictModule(Formula(lambda a, b: net(torch.cat([a, b], -1))), ["a", "b"], ["y"])
    method = ExpectedGradients("y", baselines={"a": FromKey("rest"), "b": 1.0})
    with method.prepare(model) as hooked:
        td = hooked.observe(TensorDict({"a": x, "b": x, "rest": rest}, [4]))
    weights = net.weight.detach()
    torch.testing.assert_close(td["attr", "a"], weights[:, :2] * (x - rest))
    torch.testing.assert_close(td["attr", "b"], weights[:, 2:] * (x - 1))


def test_each_target_is_what_it_is_alone_and_ignored_keys_get_nothing():
    net = Joined([3], 3).double()
    model = TensorDictModule(Formula(lambda x, z: net(x)), ["x", "z"], ["y"])
    inputs = {"x": torch.randn(4, 3, dtype=DOUBLE), "z": torch.randn(4, 2, dtype=DOUBLE)}
    rows = {"x": torch.randn(6, 3, dtype=DOUBLE), "z": torch.randn(6, 2, dtype=DOUBLE)}

    def at(target: Any) -> TensorDict:
        method = ExpectedGradients(target, baselines=rows, n_samples=6, gap_tolerance=None)
        return explained(method, model, (4,), **inputs)

    every, named = at(Each("y")), at({"one": ("y", 1), "two": ("y", 2)})
    for i, name in ((1, "one"), (2, "two")):
        alone = at(("y", i))
        torch.testing.assert_close(every["attr", "x"][:, i], alone["attr", "x"])
        torch.testing.assert_close(named["attr", name, "x"], alone["attr", "x"])
        torch.testing.assert_close(named["attr_gap", name], alone["attr_gap"])
        torch.testing.assert_close(every["attr_gap"][:, i], alone["attr_gap"])
    assert not every["attr", "z"].any()


def test_a_large_gap_is_warned_about_with_the_advice_that_fits():
    net, x = Joined([3], 1).double(), 3 * torch.randn(6, 3, dtype=DOUBLE)
    method = ExpectedGradients("y", baselines=torch.randn(9, 3, dtype=DOUBLE), n_samples=2)
    with pytest.warns(CompletenessWarning, match="n_samples"):
        explained(method, net, (6,), x=x)


def test_the_model_and_its_mode_are_left_alone():
    model = TensorDictModule(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), ["x"], ["y"]
    ).train()
    td = TensorDict({"x": torch.randn(6, 3)}, [6])
    method = GradientShap("y", baselines=torch.randn(4, 3), stdevs=0.1, gap_tolerance=None)
    before = snapshot(model)
    with method.prepare(model) as hooked:
        hooked.observe(td)
    assert_same(before, snapshot(model))


def test_a_key_without_features_is_explained_like_any_other():
    net, x = Formula(lambda x: 3 * x), torch.randn(4, dtype=DOUBLE)
    rows = torch.full((2,), 0.5, dtype=DOUBLE)
    td = explained(ExpectedGradients("y", baselines=rows), net, (4,), x=x)
    torch.testing.assert_close(td["attr", "x"], 3 * (x - 0.5))
    torch.testing.assert_close(td["attr_gap"], torch.zeros(4, dtype=DOUBLE))


def test_a_trajectory_goes_its_way_as_a_whole():
    # Of Σ x², at α x: 2 α x², which tells what α was at every step.
    model = TensorDictModule(lambda x: x.square().cumsum(1), ["x"], ["y"])
    x = torch.rand(3, 5, 1, dtype=DOUBLE) + 0.5
    method = ExpectedGradients(
        AtStep("y", -1), baselines=torch.zeros(1, 1), n_samples=1, gap_tolerance=None
    )
    td = explained(method, model, (3, 5), x=x)
    alpha = (td["attr", "x"] / (2 * x.square())).squeeze(-1)
    torch.testing.assert_close(alpha, alpha[:, :1].expand(3, 5))
    assert ((alpha > 0) & (alpha < 1)).all() and alpha[:, 0].unique().numel() == 3


def test_rows_that_broadcast_to_the_features_are_drawn_like_others():
    net, x = Joined([3], 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    rows = torch.randn(9, 1, dtype=DOUBLE)
    narrow, wide = (
        explained(ExpectedGradients("y", baselines=given, gap_tolerance=None), net, (4,), x=x)
        for given in (rows, rows.expand(9, 3))
    )
    torch.testing.assert_close(narrow["attr", "x"], wide["attr", "x"], rtol=0, atol=1e-12)


def test_keys_may_have_rows_of_their_own_each():
    net = Formula(lambda a, b: 2 * a + 5 * b)
    inputs = {key: torch.zeros(4, 1, dtype=DOUBLE) for key in "ab"}
    rows = {
        key: TensorDict({key: torch.full((n, 1), value)}, [n])
        for key, n, value in (("a", 3, 1.0), ("b", 7, -1.0))
    }
    td = explained(ExpectedGradients("y", baselines=rows), net, (4,), **inputs)
    torch.testing.assert_close(td["attr", "a"], torch.full((4, 1), -2.0, dtype=DOUBLE))
    torch.testing.assert_close(td["attr", "b"], torch.full((4, 1), 5.0, dtype=DOUBLE))


# --- GradientSHAP -----------------------------------------------------------------------------------


def test_gradient_shap_ends_its_ways_at_noisy_inputs():
    net, n = Joined([3], 1).double(), 8
    x, row = torch.randn(4, 3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    method = GradientShap("y", baselines=row[None], n_samples=n, stdevs=0.3, gap_tolerance=None)
    td = explained(method, net, (4,), x=x)
    noise, places = (torch.Generator().manual_seed(0) for _ in range(2))
    draws = []
    for _ in range(n):
        way = x + 0.3 * torch.randn(4, 3, dtype=DOUBLE, generator=noise) - row
        alpha = torch.rand(4, dtype=DOUBLE, generator=places).unsqueeze(-1)
        point = (row + alpha * way).requires_grad_()
        (grad,) = torch.autograd.grad(net(point).sum(), point)
        draws.append(way * grad)
    torch.testing.assert_close(td["attr", "x"], torch.stack(draws).mean(0), rtol=0, atol=1e-10)


def test_without_noise_gradient_shap_is_expected_gradients():
    net, x = Joined([3], 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    rows = torch.randn(4, 3, dtype=DOUBLE)
    one, two = (
        explained(kind("y", baselines=rows, gap_tolerance=None), net, (4,), x=x)["attr", "x"]
        for kind in (ExpectedGradients, GradientShap)
    )
    assert torch.equal(one, two)


# --- the mean over baselines ------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_over_a_list_it_is_the_mean_of_the_methods_attributions_and_gaps(batch):
    net, x = Joined([3], 2).double(), torch.randn(*batch, 3, dtype=DOUBLE)
    baselines = [0.0, 1.5, torch.randn(3, dtype=DOUBLE)]
    inner = IntegratedGradients(("y", 1), n_steps=6, gap_tolerance=None)
    td = explained(OverBaselines(inner, over=baselines), net, batch, x=x)
    each = [explained(inner.replaced(baselines=b), net, batch, x=x) for b in baselines]
    for place in (("attr", "x"), "attr_gap"):
        mean = torch.stack([found[place] for found in each]).mean(0)
        torch.testing.assert_close(td[place], mean, rtol=0, atol=1e-10)
    assert "attr_error" not in td


@pytest.mark.parametrize("tolerance", [0.75, 0.78])
def test_the_mean_gap_is_held_against_the_mean_change(tolerance):
    # Of x² at 3 one step at the end misses 18 − 9 from 0, and 12 − 8 from 1: 6.5 of 8.5 on average.
    inner = IntegratedGradients("y", n_steps=1, method="riemann_right", gap_tolerance=tolerance)
    method = OverBaselines(inner, over=[0.0, 1.0])
    expected = pytest.warns(CompletenessWarning) if tolerance < 6.5 / 8.5 else nullcontext()
    with expected:
        td = explained(method, Formula(torch.square), (1,), x=torch.full((1, 1), 3.0))
    torch.testing.assert_close(td["attr_gap"].flatten(), torch.tensor([6.5]))


def test_a_method_without_gaps_or_samples_writes_neither():
    net, x = Joined([3], 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    td = explained(OverBaselines(FeatureAblation("y"), over=[0.0, 1.0]), net, (4,), x=x)
    assert "attr_gap" not in td and "attr_error" not in td


def test_drawn_baselines_are_within_their_errors_of_all_of_them():
    net, x = Joined([3], 1).double(), torch.randn(20, 3, dtype=DOUBLE)
    rows = torch.randn(4, 3, dtype=DOUBLE)
    every = explained(OverBaselines(ShapleyValues("y"), over=list(rows)), net, (20,), x=x)
    drawn = explained(OverBaselines(ShapleyValues("y"), over=rows, n_samples=200), net, (20,), x=x)
    away = (drawn["attr", "x"] - every["attr", "x"]) / drawn["attr_error", "x"]
    assert away.abs().max() < 4.5 and 0.7 < away.std() < 1.3


def test_errors_of_a_sampled_method_are_those_of_a_mean():
    net, x = Joined([4], 1).double(), torch.randn(3, 4, dtype=DOUBLE)
    inner = ShapleyValueSampling("y", n_samples=5)
    td = explained(OverBaselines(inner, over=[0.0, 1.0]), net, (3,), x=x)
    each = [
        explained(inner.replaced(baselines=b, seed=i), net, (3,), x=x)["attr_error", "x"]
        for i, b in enumerate([0.0, 1.0])
    ]
    expected = (each[0].square() + each[1].square()).sqrt() / 2
    torch.testing.assert_close(td["attr_error", "x"], expected)
