"""KernelSHAP and LIME: the regressions by one big solve, the draws, and what determines nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor

from explaining import driven as explained
from method_references import DOUBLE, Formula, Joined, game, lime
from tdhook_like import AtStep, Each, InputError, LogProb, TargetError
from tdhook_like.attribution.shapley import ShapleyValues
from tdhook_like.attribution.surrogate_models import KernelShap, Lime
from tdhook_like.attribution.weighted_fit import FOLDS, WeightedFit

# --- the fit ----------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_fit_from_running_sums_is_that_of_one_big_solve(seed, drawn):
    torch.manual_seed(seed)
    z, w = torch.rand(60, 4) < 0.5, torch.rand(60, dtype=DOUBLE) + 0.1
    y, folds = torch.randn(60, 2, 3, dtype=DOUBLE), torch.arange(60) % FOLDS if drawn else None
    fit = WeightedFit(4, y[0])
    for part in (slice(0, 1), slice(1, 17), slice(17, 60)):
        fit.add(z[part], w[part], y[part], None if folds is None else folds[part])
    design = torch.cat([z.double(), torch.ones(60, 1, dtype=DOUBLE)], 1)
    root = w.sqrt().unsqueeze(1)
    expected = torch.linalg.lstsq(design * root, y.flatten(1) * root).solution[:4]
    values, errors = fit.with_constant(0.0)
    torch.testing.assert_close(values.flatten(1), expected, rtol=0, atol=1e-9)
    assert values.shape == errors.shape == (4, 2, 3)
    assert drawn == bool(errors.any())


def test_errors_are_what_leaving_out_some_of_the_draws_makes_of_the_fit():
    z, y = torch.rand(210, 3) < 0.5, torch.randn(210, 1, dtype=DOUBLE)
    weights, folds = torch.rand(210, dtype=DOUBLE) + 0.1, torch.arange(190) % FOLDS
    fit = WeightedFit(3, y[0])
    fit.add(z[:190], weights[:190], y[:190], folds)
    fit.add(z[190:], weights[190:], y[190:])  # enumerated: in every fit, once
    without = []
    for fold in range(FOLDS):
        left = torch.cat([folds != fold, torch.ones(20).bool()])
        often = torch.where(torch.arange(210) < 190, 190 / int(left[:190].sum()), 1.0)
        root = (weights * often)[left].sqrt().unsqueeze(1)
        design = torch.cat([z.double(), torch.ones(210, 1, dtype=DOUBLE)], 1)[left]
        without.append(torch.linalg.lstsq(design * root, y[left] * root).solution[:3])
    without = torch.stack(without)
    expected = (without.var(0, correction=0) * (FOLDS - 1)).sqrt()
    torch.testing.assert_close(fit.with_constant(0.0)[1], expected, rtol=0, atol=1e-9)


def test_what_determines_no_coefficients_is_an_error():
    fit = WeightedFit(2, torch.zeros(1))
    fit.add(torch.tensor([[True, True]]), torch.ones(1), torch.ones(1, 1))
    with pytest.raises(InputError, match="do not determine"):
        fit.with_constant(0.0)
    assert fit.with_constant(0.1)[0].isfinite().all()


# --- KernelSHAP -------------------------------------------------------------------------------------


def test_all_coalitions_of_ten_features_are_within_the_default_and_exact():
    net, x = Joined([10], 2).double(), torch.randn(3, 10, dtype=DOUBLE)
    exact = explained(ShapleyValues(Each("y")), net, (3,), x=x)
    kernel = explained(KernelShap(Each("y")), net, (3,), x=x)
    torch.testing.assert_close(kernel["attr", "x"], exact["attr", "x"], rtol=0, atol=1e-10)
    assert not kernel["attr_error", "x"].any()


@pytest.mark.parametrize("n_samples", [1022, 1021])
def test_one_coalition_less_than_all_is_drawn(n_samples):
    net, x = Joined([10], 1).double(), torch.randn(2, 10, dtype=DOUBLE)
    td = explained(KernelShap("y", n_samples=n_samples), net, (2,), x=x)
    assert bool(td["attr_error", "x"].any()) == (n_samples < 1022)


@pytest.mark.parametrize("n_samples", [66, 67, 200, 1000])
@pytest.mark.parametrize("groups", [12, 13])
def test_no_more_coalitions_are_evaluated_than_asked_for(groups, n_samples):
    net = Joined([groups], 1).double()
    model, x = TensorDictModule(net, ["x"], ["y"]), torch.randn(1, groups, dtype=DOUBLE)
    with KernelShap("y", n_samples=n_samples).prepare(model) as hooked:
        hooked(TensorDict({"x": x}, [1]))
        net.seen.shapes.clear()
        td = hooked(TensorDict({"x": x}, [1]))
    n = sum(torch.Size(shape[:-1]).numel() for shape in net.seen.shapes)
    assert n == 1 + 2 + n_samples - n_samples % 2  # the plain call, both ends, coalitions
    assert td["attr_gap"].abs().max() < 1e-10


@pytest.mark.parametrize("n_samples", [80, 400])
def test_of_an_additive_game_any_draws_are_exact(n_samples):
    net, x = nn.Linear(20, 1).double(), torch.randn(3, 20, dtype=DOUBLE)
    td = explained(KernelShap("y", n_samples=n_samples, baselines=0.5), net, (3,), x=x)
    expected = ((x - 0.5) * net.weight).detach()
    torch.testing.assert_close(td["attr", "x"], expected, rtol=0, atol=1e-10)
    assert td["attr_error", "x"].max() < 1e-10


def test_pairs_with_their_complements_are_exact_where_groups_act_together_in_pairs():
    weights = torch.randn(14, 14, dtype=DOUBLE)
    net = Formula(lambda x: ((x @ weights) * x).sum(-1))
    x = torch.randn(2, 14, dtype=DOUBLE)
    # x·W·x: every pair's part is halved, one's own part is its own.
    expected = x * (x @ ((weights + weights.T) / 2))
    td = explained(KernelShap("y", n_samples=300), net, (2,), x=x)
    torch.testing.assert_close(td["attr", "x"], expected, rtol=0, atol=1e-9)


# --- LIME -------------------------------------------------------------------------------------------

LIMES = [
    {"ridge": 0.0},
    {"ridge": 1.0, "n_samples": 40},
    {"ridge": 0.3, "kernel_width": 1.5},
]


@pytest.mark.parametrize("options", LIMES, ids=str)
@pytest.mark.parametrize("divide", [True, False])
def test_coefficients_are_those_of_ridge_regression_on_all_coalitions(options, divide):
    ids = [torch.tensor([0, 1, 1]), torch.tensor([2, 3, 4])]
    net = Joined([3, 3], 2).double()
    a, b = torch.randn(2, 2, 3, dtype=DOUBLE).unbind(1)
    masks = {"a": ids[0], "b": ids[1]}
    method = Lime(("y", 1), masks=masks, baselines=0.2, divide=divide, **options)
    td = explained(method, net, (2,), a=a, b=b)
    reference = {"kernel_width": 0.25, "ridge": 1.0, "n_samples": 1000, **options}
    base = torch.full((3,), 0.2, dtype=DOUBLE)
    for row in range(2):
        worth = game(net, [a[row], b[row]], [base, base], ids, output=1)
        values = lime(
            worth, 5, reference["kernel_width"], reference["ridge"], reference["n_samples"]
        )
        values = torch.tensor(values, dtype=DOUBLE)
        values = values / torch.tensor([1, 2, 1, 1, 1]) if divide else values
        for key, group in zip("ab", ids, strict=True):
            torch.testing.assert_close(td["attr", key][row], values[group], rtol=0, atol=1e-8)
    assert not td["attr_error", "a"].any() and "attr_gap" not in td


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 2)])
def test_of_a_linear_model_lime_without_a_penalty_is_weight_times_difference(batch, dtype):
    net = nn.Linear(3, 1).to(dtype)
    nn.init.zeros_(net.bias)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, -2.0, 4.0]]))
    x = torch.randint(-3, 4, (*batch, 3)).to(dtype)
    td = explained(Lime("y", ridge=0.0, baselines=1.0), net, batch, x=x)
    expected = (x - 1) * net.weight.detach()[0]
    torch.testing.assert_close(td["attr", "x"], expected, rtol=1e-5, atol=1e-5)


def test_a_penalty_makes_coefficients_small():
    net, x = nn.Linear(3, 1).double(), torch.randn(2, 3, dtype=DOUBLE)
    sizes = [
        explained(Lime("y", ridge=ridge), net, (2,), x=x)["attr", "x"].abs().sum()
        for ridge in (0.0, 10.0, 1e6)
    ]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[2] < 1e-2 * sizes[0]


def test_drawn_coalitions_estimate_what_all_of_them_give_within_the_standard_errors():
    net, x = Joined([11], 2).double(), torch.randn(4, 11, dtype=DOUBLE)
    options = {"ridge": 0.0, "kernel_width": 0.5}
    exact = explained(Lime(("y", 1), n_samples=2**11, **options), net, (4,), x=x)
    assert not exact["attr_error", "x"].any()
    away = []
    for seed in range(8):
        td = explained(Lime(("y", 1), n_samples=1500, seed=seed, **options), net, (4,), x=x)
        away.append((td["attr", "x"] - exact["attr", "x"]) / td["attr_error", "x"])
    away = torch.stack(away)
    assert 0.8 < away.square().mean().sqrt() < 1.25 and away.abs().max() < 5


# --- both -------------------------------------------------------------------------------------------

BOTH = {
    "KernelShap": lambda **k: KernelShap(("y", 0), n_samples=100, **k),
    "Lime": lambda **k: Lime(("y", 0), n_samples=100, **k),
}
both = pytest.mark.parametrize("name", BOTH)


class Table(nn.Module):
    """A game of twelve in which every coalition is worth something of its own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        # What a coalition is worth grows with the square of its size, beside chance.
        sizes = torch.tensor([bin(s).count("1") for s in range(2**12)], dtype=DOUBLE)
        noise = torch.randn(2**12, generator=generator, dtype=DOUBLE)
        self.values = (sizes**3) / 100 * (1 + torch.arange(2**12) % 2) + noise

    def forward(self, x: Tensor) -> Tensor:
        return self.values[(x.round().long() << torch.arange(12)).sum(-1)].unsqueeze(-1)


@pytest.mark.parametrize(
    ("exact", "drawn"),
    [
        (ShapleyValues("y"), KernelShap("y", n_samples=600)),
        (
            Lime("y", n_samples=2**12, ridge=0.0, kernel_width=0.8),
            Lime("y", n_samples=1000, ridge=0.0, kernel_width=0.8),
        ),
    ],
    ids=BOTH,
)
def test_over_many_seeds_estimates_of_a_game_of_all_orders_centre_on_the_exact_values(exact, drawn):
    x = torch.ones(1, 12, dtype=DOUBLE)
    truth = explained(exact, Table(), (1,), x=x)["attr", "x"]
    found = torch.stack(
        [explained(drawn.replaced(seed=s), Table(), (1,), x=x)["attr", "x"] for s in range(60)]
    )
    away = (found.mean(0) - truth) / (found.std(0) / 60**0.5)
    assert away.abs().max() < 3.5 and away.square().mean().sqrt() < 1.5


@both
def test_the_same_seed_gives_the_same_and_no_one_elses_generator_is_drawn_from(name):
    net, x = Joined([15], 1), torch.randn(3, 15)
    state = torch.get_rng_state()
    one, two, other = (explained(BOTH[name](seed=s), net, (3,), x=x) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    for root in ("attr", "attr_error"):
        assert torch.equal(one[root, "x"], two[root, "x"])
        assert not torch.equal(one[root, "x"], other[root, "x"])


@both
@pytest.mark.parametrize("rows", [1, 3, 6, 45])
def test_chunks_bound_evaluations_and_change_no_value(name, rows):
    net, x = Joined([15], 1).double(), torch.randn(3, 15, dtype=DOUBLE)
    whole = explained(BOTH[name](), net, (3,), x=x)
    model = TensorDictModule(net, ["x"], ["y"])
    with BOTH[name](internal_batch_size=rows).prepare(model) as hooked:
        hooked(TensorDict({"x": x}, [3]))
        net.seen.shapes.clear()
        td = hooked(TensorDict({"x": x}, [3]))
    largest = max(torch.Size(shape[:-1]).numel() for shape in net.seen.shapes)
    assert largest <= max(rows, 3)
    for root in ("attr", "attr_error"):
        torch.testing.assert_close(td[root, "x"], whole[root, "x"], rtol=0, atol=1e-9)


@both
def test_batch_elements_are_explained_each_by_itself_and_targets_all_at_once(name):
    net, x = Joined([15], 3).double(), torch.randn(3, 15, dtype=DOUBLE)
    method = BOTH[name]().replaced(target=Each("y"))
    together = explained(method, net, (3,), x=x)
    for row in range(3):
        alone = explained(BOTH[name](), net, (1,), x=x[row : row + 1])
        for root in ("attr", "attr_error"):
            torch.testing.assert_close(
                together[root, "x"][row : row + 1, 0], alone[root, "x"], rtol=0, atol=1e-9
            )


@both
def test_the_log_probability_of_the_action_that_was_taken_is_explained_by_key(name):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.camera, self.lidar = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, camera: Tensor, lidar: Tensor) -> Tensor:
            return self.camera(camera) + self.lidar(lidar)

    net = Two().double()
    actor = ProbabilisticActor(
        TensorDictModule(net, ["camera", "lidar"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    td = TensorDict(
        {"camera": torch.randn(5, 4, dtype=DOUBLE), "lidar": torch.randn(5, 2, dtype=DOUBLE)}, [5]
    )
    method = BOTH[name](groups="keys").replaced(target=LogProb())
    method = method.replaced(ridge=0.0) if name == "Lime" else method
    with method.prepare(actor) as hooked:
        td = hooked(td)

    def log_prob(camera: Tensor, lidar: Tensor) -> Tensor:
        taken = td["action"].unsqueeze(-1)
        return net(camera, lidar).log_softmax(-1).gather(-1, taken)[:, 0].detach()

    a, b = td["camera"], td["lidar"]
    corners = {(p, q): log_prob(p * a, q * b) for p in (0, 1) for q in (0, 1)}
    if name == "KernelShap":
        expected = (corners[1, 1] - corners[0, 1] + corners[1, 0] - corners[0, 0]) / 2
        torch.testing.assert_close(td["attr", "camera"].sum(-1), expected, rtol=0, atol=1e-10)
        return
    for row in range(5):
        values = {key: value[row].item() for key, value in corners.items()}
        found = lime(lambda s, v=values: v[int(0 in s), int(1 in s)], 2, 0.25, 0.0, 100)
        assert td["attr", "camera"][row].sum().item() == pytest.approx(found[0], abs=1e-9)
        assert td["attr", "lidar"][row].sum().item() == pytest.approx(found[1], abs=1e-9)


@both
def test_steps_of_a_trajectory_are_groups_of_one_element(name):
    net = Formula(lambda x: x.cumsum(-2)[..., :1])
    x = torch.randn(2, 3, 2, dtype=DOUBLE)
    method = BOTH[name](masks={"x": torch.arange(3).unsqueeze(1)}, divide=False)
    method = method.replaced(target=AtStep("y", 1))
    method = method.replaced(ridge=0.0) if name == "Lime" else method
    with method.prepare(TensorDictModule(net, ["x"], ["y"])) as hooked:
        td = hooked(TensorDict({"x": x}, [2, 3]))
    expected = x[..., :1] * torch.tensor([1.0, 1.0, 0.0]).reshape(3, 1)
    torch.testing.assert_close(td["attr", "x"], expected.expand(2, 3, 2), rtol=0, atol=1e-9)


@both
@pytest.mark.parametrize("n", [0, 1])
def test_no_feature_and_a_single_one_are_no_trouble(name, n):
    x = torch.randn(4, n, dtype=DOUBLE)
    method = BOTH[name]().replaced(target="y")
    method = method.replaced(ridge=0.0) if name == "Lime" else method
    td = explained(method, Formula(lambda x: x.sum(-1)), (4,), x=x)
    torch.testing.assert_close(td["attr", "x"], x, rtol=0, atol=1e-9)


@both
def test_too_few_evaluations_for_the_groups_are_refused_with_both_numbers(name):
    with pytest.raises(
        InputError, match=rf"{name} fits 50 coefficients.*n_samples=100.*at least 140"
    ):
        explained(BOTH[name](), nn.Linear(50, 1), (2,), x=torch.randn(2, 50))


@both
def test_a_score_that_is_not_finite_in_between_is_an_error(name):
    net = Formula(lambda x: 1 / (1 - (x[..., 0] - x[..., 1]).abs()))
    method = BOTH[name]().replaced(target="y")
    with pytest.raises(TargetError, match="NaN or Inf"):
        explained(method, net, (2,), x=torch.ones(2, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"n_samples": 0},
        {"n_samples": None},
        {"seed": "0"},
        {"kernel_width": 0.0},
        {"kernel_width": math.nan},
        {"ridge": -1.0},
        {"ridge": math.inf},
    ],
    ids=str,
)
def test_options_of_lime_that_cannot_be_meant_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Lime("y", **options)
