"""NoiseTunnel against the same noise drawn by hand, closed forms, and every kind of inner method."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, TensorDictModule
from torch import Tensor, nn

from explaining import BATCHES, explained
from method_references import DOUBLE, Formula, Joined
from pristine import assert_same, snapshot
from tdhook_like import (
    LRP,
    AtStep,
    Each,
    FromKey,
    Greedy,
    InputXGradient,
    IntegratedGradients,
    Saliency,
)
from tdhook_like.attribution.ablation import FeatureAblation, FeaturePermutation
from tdhook_like.attribution.deeplift import DeepLift
from tdhook_like.attribution.lrp import AlphaBetaRule, EpsilonPlus
from tdhook_like.attribution.noise import Moments, NoiseTunnel
from tdhook_like.attribution.rectified import GuidedBackprop
from tdhook_like.attribution.shapley import ShapleyValueSampling

KINDS = ["smoothgrad", "smoothgrad_sq", "vargrad"]


def noise(seed: int, n: int, *shapes: tuple[int, ...]) -> list[list[Tensor]]:
    """The documented order: one row after another, in each row one key after another."""
    draw = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, dtype=DOUBLE, generator=draw) for s in shapes] for _ in range(n)]


def summed_up(kind: str, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate and its standard error, from all draws ``[n, ...]``, by the textbook."""
    n = len(draws)
    if kind == "vargrad":
        away = draws - draws.mean(0)
        variance = away.square().sum(0) / (n - 1)
        fourth = away.pow(4).mean(0)
        return variance, ((fourth - variance**2 * (n - 3) / (n - 1)) / n).clamp_min(0).sqrt()
    draws = draws.square() if kind == "smoothgrad_sq" else draws
    return draws.mean(0), draws.std(0) / n**0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCHES)
def test_it_is_what_the_same_noise_gives_one_draw_at_a_time(batch, kind):
    net, n = Joined([3, 2], 2).double(), 9
    a, b = torch.randn(*batch, 3, dtype=DOUBLE), torch.randn(*batch, 2, dtype=DOUBLE)
    method = NoiseTunnel(
        InputXGradient(("y", 1)), n_samples=n, stdevs={"a": 0.3, "b": 0.7}, kind=kind, seed=5
    )
    td = explained(method, net, batch, a=a, b=b)
    found: list[list[Tensor]] = [[], []]
    for ea, eb in noise(5, n, a.shape, b.shape):
        point = [(a + 0.3 * ea).requires_grad_(), (b + 0.7 * eb).requires_grad_()]
        grads = torch.autograd.grad(net(*point)[..., 1].sum(), point)
        for key, x, g in zip(found, point, grads, strict=True):
            key.append((x * g).detach())
    for key, each in zip("ab", found, strict=True):
        value, error = summed_up(kind, torch.stack(each))
        torch.testing.assert_close(td["attr", key], value, rtol=0, atol=1e-10)
        torch.testing.assert_close(td["attr_error", key], error, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
def test_chunks_do_not_matter(rows):
    net, x = Joined([3], 2).double(), torch.randn(4, 3, dtype=DOUBLE)
    for kind in KINDS:
        one = NoiseTunnel(Saliency(("y", 0)), n_samples=11, kind=kind)
        two = NoiseTunnel(Saliency(("y", 0)), n_samples=11, kind=kind, internal_batch_size=rows)
        first, second = (explained(m, net, (4,), x=x) for m in (one, two))
        torch.testing.assert_close(first["attr", "x"], second["attr", "x"], rtol=0, atol=1e-12)


def test_the_same_seed_gives_the_same_bits_and_the_shared_generator_is_left_alone():
    net, x = Joined([3], 2).double(), torch.randn(4, 3, dtype=DOUBLE)
    before = torch.get_rng_state()
    found = [
        explained(NoiseTunnel(Saliency(("y", 0)), seed=seed), net, (4,), x=x)["attr", "x"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(before, torch.get_rng_state())


def test_of_a_square_the_mean_is_the_slope_and_the_variance_is_four_times_the_noises():
    x = torch.tensor([[1.5], [-0.5]], dtype=DOUBLE)
    inner = Saliency("y", abs=False)
    for kind, expected in (
        ("smoothgrad", 2 * x),
        ("smoothgrad_sq", 4 * x**2 + 4 * 0.2**2),
        ("vargrad", torch.full_like(x, 4 * 0.2**2)),
    ):
        method = NoiseTunnel(inner, n_samples=4000, stdevs=0.2, kind=kind)
        td = explained(method, Formula(lambda x: x**2), (2,), x=x)
        away = (td["attr", "x"] - expected) / td["attr_error", "x"]
        assert away.abs().max() < 4, kind
        assert (td["attr_error", "x"] < 0.05).all()


def test_standard_errors_are_as_large_as_estimates_scatter():
    x, inner = torch.ones(300, 1, dtype=DOUBLE), Saliency("y", abs=False)
    for kind, expected in (("smoothgrad", 3 + 3 * 0.25), ("vargrad", None)):
        td = explained(
            NoiseTunnel(inner, n_samples=200, stdevs=0.5, kind=kind),
            Formula(lambda x: x**3),
            (300,),
            x=x,
        )
        # d/dx x³ = 3 x², of x ~ N(1, 1/4): mean 3 (1 + 1/4); variance 9 (4 · 1/4 + 2 / 16)
        expected = 9 * (1 + 2 / 16) if expected is None else expected
        away = (td["attr", "x"] - expected) / td["attr_error", "x"]
        assert 0.8 < away.std() < 1.25, kind


def test_the_variance_is_without_bias():
    x = torch.ones(20000, 1, dtype=DOUBLE)
    method = NoiseTunnel(Saliency("y", abs=False), n_samples=2, stdevs=1.0, kind="vargrad")
    td = explained(method, Formula(lambda x: x**2), (20000,), x=x)
    mean, error = td["attr", "x"].mean(), td["attr", "x"].std() / 20000**0.5
    assert abs(mean - 4) < 4 * error and error < 0.06  # divided by n it would be 2
    assert td["attr_error", "x"].isnan().all()


class Stepwise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype) @ torch.tensor([[1.0], [2.0]], dtype=x.dtype)


def test_any_method_can_be_asked_such_as_one_without_gradients():
    x, n = torch.tensor([[0.1, -0.2], [3.0, 0.3]], dtype=DOUBLE), 50
    method = NoiseTunnel(FeatureAblation("y", baselines=-1.0), n_samples=n, stdevs=0.5)
    td = explained(method, Stepwise(), (2,), x=x)
    draws = [(x + 0.5 * e > 0).double() * torch.tensor([1.0, 2.0]) for (e,) in noise(0, n, x.shape)]
    value, error = summed_up("smoothgrad", torch.stack(draws))
    torch.testing.assert_close(td["attr", "x"], value)
    torch.testing.assert_close(td["attr_error", "x"], error)


def test_a_path_method_goes_to_its_baseline_from_every_noisy_input():
    net, n = Joined([3], 1).double(), 6
    x, rest = torch.randn(4, 3, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    inner = IntegratedGradients("y", baselines=FromKey("rest"), n_steps=40)
    model = TensorDictModule(net, ["x"], ["y"])
    with NoiseTunnel(inner, n_samples=n, stdevs=0.4).prepare(model) as hooked:
        td = hooked(TensorDict({"x": x, "rest": rest}, [4]))
    found = []
    for (e,) in noise(0, n, x.shape):
        with inner.prepare(model) as hooked:
            found.append(hooked(TensorDict({"x": x + 0.4 * e, "rest": rest}, [4]))["attr", "x"])
    value, _ = summed_up("smoothgrad", torch.stack(found))
    torch.testing.assert_close(td["attr", "x"], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("start", ["value", "one", torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE)])
def test_rules_are_on_at_every_draw(start):
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    rules = EpsilonPlus(
        rule_mapper=lambda name, m: AlphaBetaRule(2, 1) if isinstance(m, nn.Linear) else None
    )
    inner, x = LRP(rules, ("y", 1), start=start), torch.randn(3, 3, dtype=DOUBLE)
    model = TensorDictModule(net, ["x"], ["y"])
    td = explained(NoiseTunnel(inner, n_samples=7, stdevs=0.3), model, (3,), x=x)
    draws = [
        explained(inner, model, (3,), x=x + 0.3 * e)["attr", "x"] for (e,) in noise(0, 7, x.shape)
    ]
    torch.testing.assert_close(td["attr", "x"], torch.stack(draws).mean(0), rtol=0, atol=1e-10)
    plain = explained(
        NoiseTunnel(InputXGradient(("y", 1)), n_samples=7, stdevs=0.3), model, (3,), x=x
    )
    assert not torch.allclose(td["attr", "x"], plain["attr", "x"])


def test_sampled_methods_draw_anew_each_time():
    net, x = Joined([4], 1).double(), torch.randn(2, 4, dtype=DOUBLE)
    inner = ShapleyValueSampling("y", n_samples=1)
    td = explained(NoiseTunnel(inner, n_samples=60, stdevs=0.0), net, (2,), x=x)
    many = explained(ShapleyValueSampling("y", n_samples=4000), net, (2,), x=x)
    assert (td["attr_error", "x"] > 0).any()
    away = (td["attr", "x"] - many["attr", "x"]).abs()
    assert (away < 4 * td["attr_error", "x"] + 4 * many["attr_error", "x"]).all()


def test_a_tunnel_goes_through_a_tunnel_and_through_permutation():
    net, x = Joined([4], 1).double(), torch.randn(5, 4, dtype=DOUBLE)
    for inner in (
        NoiseTunnel(Saliency("y"), n_samples=3, stdevs=0.1, seed=4),
        FeaturePermutation("y", n_samples=2, seed=4),
    ):
        td = explained(NoiseTunnel(inner, n_samples=3, stdevs=0.1), net, (5,), x=x)
        # What draws samples itself draws others each time: with the next seed.
        draws = [
            explained(inner.replaced(seed=4 + i), net, (5,), x=x + 0.1 * e)["attr", "x"]
            for i, (e,) in enumerate(noise(0, 3, x.shape))
        ]
        torch.testing.assert_close(td["attr", "x"], torch.stack(draws).mean(0), rtol=0, atol=1e-10)


def test_without_noise_methods_with_hooks_of_their_own_are_what_they_are_alone():
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x = torch.randn(4, 3, dtype=DOUBLE)
    for inner in (DeepLift(("y", 0), baselines=0.3), GuidedBackprop(("y", 0))):
        alone = explained(inner, net, (4,), x=x)["attr", "x"]
        td = explained(NoiseTunnel(inner, n_samples=3, stdevs=0.0), net, (4,), x=x)
        torch.testing.assert_close(td["attr", "x"], alone, rtol=0, atol=1e-12)


def test_several_targets_are_each_what_it_is_alone():
    net, x = Joined([3], 3).double(), torch.randn(4, 3, dtype=DOUBLE)
    make = lambda target: NoiseTunnel(InputXGradient(target), n_samples=5, kind="vargrad")  # noqa: E731
    every = explained(make(Each("y")), net, (4,), x=x)["attr", "x"]
    named = explained(make({"a": ("y", 0), "b": Greedy("y")}), net, (4,), x=x)
    for i in range(3):
        alone = explained(make(("y", i)), net, (4,), x=x)["attr", "x"]
        torch.testing.assert_close(every[:, i], alone, rtol=0, atol=1e-12)
    alone = explained(make(Greedy("y")), net, (4,), x=x)
    torch.testing.assert_close(named["attr", "b", "x"], alone["attr", "x"], rtol=0, atol=1e-12)
    torch.testing.assert_close(named["attr", "a", "x"], every[:, 0], rtol=0, atol=1e-12)
    assert named["attr_error", "a", "x"].shape == (4, 3)


def test_keys_without_noise_nested_keys_and_keys_that_are_ignored():
    model = TensorDictModule(
        Formula(lambda a, b, c: a.sum((-1, -2)) * b), [("agents", "obs"), "b", "c"], ["y"]
    )
    obs = torch.randn(5, 2, 3, dtype=DOUBLE)
    td = TensorDict(
        {"agents": TensorDict({"obs": obs}, [5, 2]), "b": torch.rand(5).double(), "c": obs.clone()},
        [5],
    )
    inner = Saliency("y", abs=False)
    with NoiseTunnel(inner, stdevs={("agents", "obs"): 0.3}).prepare(model) as hooked:
        td = hooked(td)
    assert td["attr", "agents"].batch_size == (5, 2)
    # The slope by obs is b, which has no noise; that by b is the noisy sum.
    torch.testing.assert_close(td["attr", "agents", "obs"], td["b"][:, None, None].expand(5, 2, 3))
    assert not td["attr_error", "agents", "obs"].any() and (td["attr_error", "b"] > 0).all()
    assert not td["attr", "c"].any()


def test_noise_may_differ_from_feature_to_feature():
    x = torch.zeros(2, 2, dtype=DOUBLE)
    method = NoiseTunnel(Saliency("y", abs=False), stdevs=torch.tensor([0.0, 1.0]), kind="vargrad")
    td = explained(method, Formula(lambda x: x**2 @ torch.ones(2, 1).double()), (2,), x=x)
    assert not td["attr", "x"][:, 0].any() and (td["attr", "x"][:, 1] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_results_have_the_inputs_dtype(dtype):
    net, x = nn.Linear(3, 1).to(dtype), torch.randn(4, 3).to(dtype)
    td = explained(NoiseTunnel(Saliency("y", abs=False)), net, (4,), x=x)
    assert td["attr", "x"].dtype == td["attr_error", "x"].dtype == dtype
    torch.testing.assert_close(td["attr", "x"], net.weight.detach().expand(4, 3))


def test_a_trajectory_is_one_element():
    from torchrl.modules import LSTMModule, set_recurrent_mode

    lstm = LSTMModule(3, 4, in_keys=["x", "h", "c"], out_keys=["y", ("next", "h"), ("next", "c")])
    lstm = lstm.double()
    x = torch.randn(2, 5, 3, dtype=DOUBLE)
    td = TensorDict(
        {
            "x": x,
            "is_init": torch.zeros(2, 5, 1, dtype=torch.bool),
            "h": torch.zeros(2, 5, 1, 4, dtype=DOUBLE),
            "c": torch.zeros(2, 5, 1, 4, dtype=DOUBLE),
        },
        [2, 5],
    )
    method = NoiseTunnel(Saliency(AtStep(("y", 1), -1), keys=["x"]), n_samples=4, stdevs=0.2)
    with set_recurrent_mode(True), method.prepare(lstm) as hooked:
        found = hooked.observe(td.copy())
        inner = Saliency(AtStep(("y", 1), -1), keys=["x"])
        draws = []
        with inner.prepare(lstm) as plain:
            for (e,) in noise(0, 4, x.shape):
                noisy = td.copy().set("x", x + 0.2 * e)
                draws.append(plain.observe(noisy)["attr", "x"])
    torch.testing.assert_close(found["attr", "x"], torch.stack(draws).mean(0), rtol=0, atol=1e-10)


def test_members_of_an_ensemble_are_explained_apart():
    ensemble = EnsembleModule(TensorDictModule(nn.Linear(3, 1), ["x"], ["y"]), 2)
    with NoiseTunnel(Saliency("y", abs=False)).prepare(ensemble) as hooked:
        td = hooked.observe(TensorDict({"x": torch.randn(4, 3)}, [4]))
    weights = ensemble.params_td["module", "weight"].detach()[:, 0]
    torch.testing.assert_close(td["attr", "x"], weights.expand(4, 2, 3))


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model = TensorDictModule(net, ["x"], ["y"]).train()
    td = TensorDict({"x": torch.randn(6, 3)}, [6])
    before = snapshot(model)
    with NoiseTunnel(Saliency("y")).prepare(model) as hooked:
        hooked.observe(td)
        assert_same(before, snapshot(model), ignoring=["forward_hooks"])
    assert_same(before, snapshot(model))


def test_driving_is_the_plain_call():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    model, x = TensorDictModule(net, ["x"], ["y"]).train(), torch.randn(6, 3)
    torch.manual_seed(3)
    plain = model(TensorDict({"x": x}, [6]))["y"]
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with NoiseTunnel(Saliency("y")).prepare(model) as hooked:
        assert torch.equal(hooked(TensorDict({"x": x}, [6]))["y"], plain)
    assert torch.equal(torch.get_rng_state(), state)


def test_at_submodules_the_noise_is_on_what_they_give():
    net = nn.Sequential(nn.Linear(3, 4), Formula(torch.tanh), nn.Linear(4, 1)).double()
    x, n = torch.randn(5, 3, dtype=DOUBLE), 6
    td = explained(
        NoiseTunnel(Saliency("y", abs=False, at="module.0"), n_samples=n), net, (5,), x=x
    )
    hidden = net[0](x).detach()
    # The keys come first, with draws of the same generator anew for the submodule.
    slopes = [
        (1 - torch.tanh(hidden + 0.1 * e).square()) * net[2].weight.detach()[0]
        for (e,) in noise(0, n, hidden.shape)
    ]
    torch.testing.assert_close(
        td["attr_at", "module.0"], torch.stack(slopes).mean(0), rtol=0, atol=1e-10
    )


def test_moments_of_uneven_chunks_are_those_of_all():
    draws = torch.randn(50, 3, dtype=DOUBLE).exp()
    moments = Moments()
    for part in draws.split([1, 3, 20, 25, 1]):
        moments.add(part)
    variance, error = summed_up("vargrad", draws)
    torch.testing.assert_close(moments.variance(), variance, rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.error(), error, rtol=1e-10, atol=0)
