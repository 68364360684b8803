"""Shapley values, exact and sampled: all orders by hand, the axioms, errors that can be believed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import QValueActor, ValueOperator

from method_references import DOUBLE, Formula, Joined, game, module, shapley
from tdhook_like import AtStep, Each, Greedy, InputError, IntegratedGradients, TargetError
from tdhook_like.attribution.shapley import ShapleyValues, ShapleyValueSampling
from tdhook_like.attribution.surrogate_models import KernelShap

EXACT = [ShapleyValues, KernelShap]
every_exact = pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.__name__)
COMPLETE = [
    ShapleyValues,
    ShapleyValueSampling,
    KernelShap,
]
every = pytest.mark.parametrize("kind", COMPLETE, ids=lambda kind: kind.__name__)


def explained(method: Any, net: Any, batch: tuple[int, ...], **inputs: Tensor) -> TensorDict:
    model = net if isinstance(net, TensorDictModule) else TensorDictModule(net, list(inputs), ["y"])
    with method.prepare(model) as hooked:
        return hooked(TensorDict(inputs, batch))


class Table(nn.Module):
    """Any game: the worth of every coalition from a table, coalitions read as binary numbers."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values, self.n = values, len(values).bit_length() - 1

    def forward(self, x: Tensor) -> Tensor:
        number = (x.round().long() << torch.arange(self.n)).sum(-1)
        return self.values[number].unsqueeze(-1)


def of_table(kind: Any, values: Tensor, **options: Any) -> Tensor:
    n = len(values).bit_length() - 1
    td = explained(kind("y", **options), Table(values), (1,), x=torch.ones(1, n, dtype=DOUBLE))
    return td["attr", "x"][0]


# --- exact ------------------------------------------------------------------------------------------

GROUPS = {
    "features": (None, [[0, 1, 2], [3, 4]]),
    "across keys": ({"a": [0, 1, 1], "b": [1, 2]}, [[0, 1, 1], [1, 2]]),
    "one group": ({"a": [0], "b": [0]}, [[0, 0, 0], [0, 0]]),
}


@every_exact
@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("case", GROUPS)
def test_values_are_the_mean_over_all_orders_of_what_each_adds(kind, case, divide):
    given, ids = GROUPS[case]
    ids = [torch.tensor(numbers) for numbers in ids]
    n = int(torch.cat(ids).max()) + 1
    net = Joined([3, 2], 2).double()
    a, b = torch.randn(2, 3, dtype=DOUBLE), torch.randn(2, 2, dtype=DOUBLE)
    base = {"a": torch.randn(2, 3, dtype=DOUBLE), "b": 0.5}
    masks = given and {key: torch.tensor(numbers) for key, numbers in given.items()}
    method = kind(("y", 1), baselines=base, masks=masks, divide=divide)
    td = explained(method, net, (2,), a=a, b=b)
    sizes = torch.bincount(torch.cat(ids))
    for row in range(2):
        half = torch.full((2,), 0.5, dtype=DOUBLE)
        worth = game(net, [a[row], b[row]], [base["a"][row], half], ids, output=1)
        values = torch.tensor(shapley(worth, n), dtype=DOUBLE)
        values = values / sizes if divide else values
        for key, group in zip("ab", ids, strict=True):
            torch.testing.assert_close(td["attr", key][row], values[group], rtol=0, atol=1e-10)
    if kind is KernelShap:
        assert not td["attr_error", "a"].any()  # nothing was drawn


@every_exact
@pytest.mark.parametrize("batch", [(), (3,), (3, 2), (2, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_a_linear_model_they_are_weight_times_difference(kind, batch, dtype):
    net = nn.Linear(3, 1).to(dtype)
    nn.init.zeros_(net.bias)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, -2.0, 4.0]]))
    x = torch.randint(-3, 4, (*batch, 3)).to(dtype)
    td = explained(kind("y", baselines=1.0), net, batch, x=x)
    assert td["attr", "x"].dtype == dtype
    torch.testing.assert_close(td["attr", "x"], (x - 1) * net.weight.detach()[0])
    torch.testing.assert_close(td["attr_gap"], torch.zeros_like(td["attr_gap"]), rtol=0, atol=1e-4)


@every_exact
def test_what_two_do_together_is_halved_and_what_three_do_is_parted_in_three(kind):
    x = torch.rand(5, 3, dtype=DOUBLE) + 0.5
    a, b, c = x.unbind(-1)
    td = explained(kind("y"), Formula(lambda x: x[..., 0] * x[..., 1]), (5,), x=x)
    torch.testing.assert_close(td["attr", "x"], torch.stack([a * b / 2, a * b / 2, 0 * c], -1))
    td = explained(kind("y"), Formula(lambda x: x.prod(-1)), (5,), x=x)
    torch.testing.assert_close(td["attr", "x"], (a * b * c / 3).unsqueeze(-1).expand(5, 3))


@every_exact
def test_how_much_each_key_matters_is_one_argument(kind):
    net = Joined([8, 5], 1, dims=[2, 1]).double()
    camera, lidar = torch.randn(4, 2, 4, dtype=DOUBLE), torch.randn(4, 5, dtype=DOUBLE)
    td = explained(kind("y", groups="keys"), net, (4,), camera=camera, lidar=lidar)
    with torch.no_grad():
        none, both = net(0 * camera, 0 * lidar), net(camera, lidar)
        one, other = net(camera, 0 * lidar), net(0 * camera, lidar)
    expected = ((one - none + both - other) / 2)[:, 0]
    torch.testing.assert_close(td["attr", "camera"].sum((1, 2)), expected, rtol=0, atol=1e-10)
    expected = ((other - none + both - one) / 2)[:, 0]
    torch.testing.assert_close(td["attr", "lidar"].sum(1), expected, rtol=0, atol=1e-10)
    assert td["attr_gap"].abs().max() < 1e-10


@every_exact
def test_a_mask_may_divide_each_batch_element_differently(kind):
    net, x = Joined([4], 1).double(), torch.randn(3, 4, dtype=DOUBLE)
    masks = torch.tensor([[0, 0, 1, 1], [2, 1, 0, 0], [0, 0, 0, 0]])
    td = explained(kind("y", masks={"x": masks}), net, (3,), x=x)
    for row in range(3):
        values = shapley(game(net, [x[row]], [0 * x[row]], [masks[row]]), 3)
        sizes = torch.bincount(masks[row], minlength=3)
        expected = (torch.tensor(values, dtype=DOUBLE) / sizes)[masks[row]]
        torch.testing.assert_close(td["attr", "x"][row], expected, rtol=0, atol=1e-10)
    assert td["attr_gap"].abs().max() < 1e-10


# --- the axioms -------------------------------------------------------------------------------------

worths = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.floats(-10, 10), min_size=2**n, max_size=2**n)
)


@every
@settings(max_examples=25)
@given(worths)
def test_efficiency_values_of_any_game_sum_to_what_everybody_makes(kind, values):
    table = torch.tensor(values, dtype=DOUBLE)
    found = of_table(kind, table)
    assert found.sum().item() == pytest.approx((table[-1] - table[0]).item(), abs=1e-9)


@every_exact
@settings(max_examples=25)
@given(worths)
def test_values_of_any_game_are_those_of_all_orders(kind, values):
    table, n = torch.tensor(values, dtype=DOUBLE), len(values).bit_length() - 1
    expected = shapley(lambda present: values[sum(2**g for g in present)], n)
    assert of_table(kind, table).tolist() == pytest.approx(expected, abs=1e-9)


@every_exact
@settings(max_examples=15)
@given(st.lists(st.floats(-10, 10), min_size=8, max_size=8))
def test_symmetry_who_add_the_same_to_everybody_are_given_the_same(kind, values):
    # A coalition's worth depends on its size alone where all four are alike.
    table = torch.tensor([values[bin(s).count("1")] for s in range(16)], dtype=DOUBLE)
    found = of_table(kind, table)
    torch.testing.assert_close(found, found.mean().expand(4), rtol=0, atol=1e-9)


@every
@settings(max_examples=15)
@given(st.lists(st.floats(-10, 10), min_size=8, max_size=8), st.floats(-10, 10))
def test_dummy_who_adds_the_same_to_every_coalition_is_given_just_that(kind, values, adds):
    table = torch.tensor([values[s % 8] + (adds if s >= 8 else 0.0) for s in range(16)])
    assert of_table(kind, table.double())[3].item() == pytest.approx(adds, abs=1e-5)


@every_exact
@settings(max_examples=15)
@given(worths, st.data())
def test_additivity_values_of_a_sum_of_games_are_the_sums_of_values(kind, values, data):
    n = len(values)
    others = data.draw(st.lists(st.floats(-10, 10), min_size=n, max_size=n))
    one, two = (torch.tensor(v, dtype=DOUBLE) for v in (values, others))
    found = of_table(kind, one) + of_table(kind, two)
    torch.testing.assert_close(of_table(kind, one + two), found, rtol=0, atol=1e-9)


# --- sampled ----------------------------------------------------------------------------------------

SAMPLED = {
    "orders": lambda **k: ShapleyValueSampling(("y", 1), n_samples=300, **k),
    "pairs of orders": lambda **k: ShapleyValueSampling(
        ("y", 1), n_samples=300, antithetic=True, **k
    ),
    "coalitions": lambda **k: KernelShap(("y", 1), n_samples=400, **k),
}
every_sampled = pytest.mark.parametrize("name", SAMPLED)


def wild() -> tuple[nn.Module, Tensor]:
    """Twelve features with strong interactions, five elements."""
    torch.manual_seed(0)
    return Joined([12], 2).double(), 1.5 * torch.randn(5, 12, dtype=DOUBLE)


@every_sampled
def test_estimates_are_within_their_standard_errors_of_the_exact_values(name):
    net, x = wild()
    exact = explained(ShapleyValues(("y", 1)), net, (5,), x=x)["attr", "x"]
    away = []
    for seed in range(8):
        td = explained(SAMPLED[name](seed=seed), net, (5,), x=x)
        assert (td["attr_error", "x"] > 0).all()
        away.append((td["attr", "x"] - exact) / td["attr_error", "x"])
    away = torch.stack(away)
    # 480 quotients, nearly normal: neither too small an error nor one that says nothing.
    assert 0.8 < away.square().mean().sqrt() < 1.25
    assert away.abs().max() < 5 and away.mean().abs() < 0.2


@every_sampled
def test_errors_fall_with_the_root_of_the_number_of_draws(name):
    net, x = wild()
    few = explained(SAMPLED[name](), net, (5,), x=x)["attr_error", "x"].mean()
    method = SAMPLED[name]().replaced(n_samples=1600 if name != "coalitions" else 3000)
    many = explained(method, net, (5,), x=x)["attr_error", "x"].mean()
    assert many < 0.6 * few


@every_sampled
def test_the_same_seed_gives_the_same_and_another_one_something_else(name):
    net, x = wild()
    state = torch.get_rng_state()
    one, two, other = (explained(SAMPLED[name](seed=seed), net, (5,), x=x) for seed in (7, 7, 8))
    assert torch.equal(state, torch.get_rng_state())
    for root in ("attr", "attr_error"):
        assert torch.equal(one[root, "x"], two[root, "x"])
        assert not torch.equal(one[root, "x"], other[root, "x"])


@every_sampled
def test_draws_do_not_depend_on_how_many_are_evaluated_at_once(name):
    net, x = wild()
    whole = explained(SAMPLED[name](), net, (5,), x=x)["attr", "x"]
    for rows in (5, 37, 385, 10_000):
        td = explained(SAMPLED[name](internal_batch_size=rows), net, (5,), x=x)
        torch.testing.assert_close(td["attr", "x"], whole, rtol=0, atol=1e-10)


def test_pairs_of_opposite_orders_are_exact_where_groups_act_together_in_pairs():
    weights = torch.randn(6, 6, dtype=DOUBLE)
    net = Formula(lambda x: ((x @ weights) * x).sum(-1))
    x = torch.randn(4, 6, dtype=DOUBLE)
    exact = explained(ShapleyValues("y"), net, (4,), x=x)["attr", "x"]
    method = ShapleyValueSampling("y", n_samples=4, antithetic=True)
    td = explained(method, net, (4,), x=x)
    torch.testing.assert_close(td["attr", "x"], exact, rtol=0, atol=1e-10)
    assert td["attr_error", "x"].max() < 1e-10
    alone = explained(ShapleyValueSampling("y", n_samples=4), net, (4,), x=x)
    assert (alone["attr", "x"] - exact).abs().max() > 1e-3


def test_one_order_is_enough_for_an_additive_game_and_says_nothing_of_its_error():
    net, x = nn.Linear(4, 1).double(), torch.randn(3, 4, dtype=DOUBLE)
    td = explained(ShapleyValueSampling("y", n_samples=1), net, (3,), x=x)
    torch.testing.assert_close(td["attr", "x"], (x * net.weight).detach())
    assert td["attr_error", "x"].isnan().all()


def test_the_error_of_a_group_is_divided_as_its_value_is():
    net, x = wild()
    masks = {"x": torch.arange(12) // 3}
    whole = explained(
        ShapleyValueSampling(("y", 1), n_samples=9, masks=masks, divide=False), net, (5,), x=x
    )
    parts = explained(ShapleyValueSampling(("y", 1), n_samples=9, masks=masks), net, (5,), x=x)
    for root in ("attr", "attr_error"):
        torch.testing.assert_close(parts[root, "x"] * 3, whole[root, "x"])


def test_a_drawn_group_that_an_element_has_no_feature_of_is_left_out_of_its_sum():
    net, x = Joined([12], 1).double(), torch.randn(2, 12, dtype=DOUBLE)
    masks = torch.stack([torch.arange(12), torch.arange(12) // 3])  # the second has four groups
    td = explained(KernelShap("y", n_samples=100, masks={"x": masks}), net, (2,), x=x)
    change = (net(x) - net(0 * x))[:, 0].detach()
    torch.testing.assert_close(td["attr_gap"], td["attr", "x"].sum(-1) - change)
    assert td["attr_gap"][0].abs() < 1e-10 < td["attr_gap"][1].abs()


# --- what all of them keep to -----------------------------------------------------------------------


@every
def test_the_gap_is_what_is_left_of_the_sum(kind):
    net, x = Joined([5], 3).double(), torch.randn(4, 5, dtype=DOUBLE)
    td = explained(kind({"one": ("y", 2), "each": Each("y")}, baselines=0.3), net, (4,), x=x)
    change = (net(x) - net(torch.full_like(x, 0.3))).detach()
    gap = td["attr", "each", "x"].sum(-1) - change
    torch.testing.assert_close(td["attr_gap", "each"], gap, rtol=0, atol=1e-12)
    assert td["attr_gap", "each"].abs().max() < 1e-10
    assert td["attr_gap", "one"].shape == (4,) and ("attr_gap", "one") in set(td.keys(True))


@every
def test_several_targets_come_from_the_evaluations_of_one(kind):
    net, x = Joined([4], 3).double(), torch.randn(5, 4, dtype=DOUBLE)
    alone = [explained(kind(("y", i)), net, (5,), x=x) for i in range(3)]
    named = {str(i): ("y", i) for i in range(3)}
    with kind(named).prepare(TensorDictModule(net, ["x"], ["y"])) as hooked:
        hooked(TensorDict({"x": x}, [5]))
        net.seen.shapes.clear()
        td = hooked(TensorDict({"x": x}, [5]))
    n = sum(torch.Size(shape[:-1]).numel() for shape in net.seen.shapes)
    evaluations = {ShapleyValues: 16, ShapleyValueSampling: 2 + 25 * 3, KernelShap: 16}[kind]
    assert n == 5 * (1 + evaluations)  # the plain call, the method's
    for i in range(3):
        torch.testing.assert_close(td["attr", str(i), "x"], alone[i]["attr", "x"])


@every
@pytest.mark.parametrize("rows", [1, 5, 10, 23])
def test_no_evaluation_is_larger_than_asked_for(kind, rows):
    net, x = Joined([6], 1).double(), torch.randn(5, 6, dtype=DOUBLE)
    whole = explained(kind("y"), net, (5,), x=x)["attr", "x"]
    model = TensorDictModule(net, ["x"], ["y"])
    with kind("y", internal_batch_size=rows).prepare(model) as hooked:
        hooked(TensorDict({"x": x}, [5]))
        net.seen.shapes.clear()
        td = hooked(TensorDict({"x": x}, [5]))
    largest = max(torch.Size(shape[:-1]).numel() for shape in net.seen.shapes)
    assert largest <= max(rows, 5)  # never less than the batch itself
    torch.testing.assert_close(td["attr", "x"], whole, rtol=0, atol=1e-12)


@every
def test_a_batch_element_is_explained_as_if_it_were_alone(kind):
    net, x = Joined([4], 1).double(), torch.randn(5, 4, dtype=DOUBLE)
    together = explained(kind("y"), net, (5,), x=x)["attr", "x"]
    for row in range(5):
        alone = explained(kind("y"), net, (1,), x=x[row : row + 1])["attr", "x"]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-10)


@every
def test_keys_that_the_model_ignores_are_given_zeros_and_integer_keys_pass(kind):
    def pick(x: Tensor, unused: Tensor, index: Tensor) -> Tensor:
        return x.gather(-1, index)

    x, index = torch.randn(5, 3), torch.randint(0, 3, (5, 1))
    td = explained(kind("y"), Formula(pick), (5,), x=x, unused=x.clone(), index=index)
    chosen = torch.zeros_like(x).scatter(-1, index, x.gather(-1, index))
    torch.testing.assert_close(td["attr", "x"], chosen, rtol=0, atol=1e-5)
    torch.testing.assert_close(td["attr", "unused"], torch.zeros_like(x), rtol=0, atol=1e-5)


@every
@pytest.mark.parametrize("batch", [(0,), (4,)])
def test_empty_batches_and_empty_features_give_empty_attributions(kind, batch):
    net = Formula(lambda x, z: x.sum(-1, keepdim=True) + z.sum(-1, keepdim=True))
    for n in (0, 1, 3):
        x, z = torch.randn(*batch, n), torch.randn(*batch, 0)
        td = explained(kind("y"), net, batch, x=x, z=z)
        assert td["attr", "x"].shape == x.shape and td["attr", "z"].shape == z.shape
        torch.testing.assert_close(td["attr", "x"], x, rtol=0, atol=1e-5)


@every
def test_steps_of_a_trajectory_are_groups_of_one_element(kind):
    class Running(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumprod(-2)[..., :1]

    x = torch.rand(2, 3, 2, dtype=DOUBLE) + 0.5
    model = TensorDictModule(Running(), ["x"], ["y"])
    steps = torch.arange(3).unsqueeze(1)
    method = kind(AtStep("y", 1), masks={"x": steps}, baselines=1.0, divide=False)
    if kind is ShapleyValueSampling:
        method = method.replaced(n_samples=2, antithetic=True)
    with method.prepare(model) as hooked:
        td = hooked(TensorDict({"x": x}, [2, 3]))
    a, b = x[:, 0, 0], x[:, 1, 0]
    expected = torch.stack([(a - 1 + a * b - b) / 2, (b - 1 + a * b - a) / 2, 0 * a], 1)
    torch.testing.assert_close(td["attr", "x"], expected.unsqueeze(-1).expand(2, 3, 2))


@every
def test_the_chosen_actions_value_is_shared_out_among_the_keys_of_a_policy(kind):
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.camera, self.lidar = nn.Linear(6, 4), nn.Linear(3, 4)

        def forward(self, camera: Tensor, lidar: Tensor) -> Tensor:
            return torch.relu(self.camera(camera.flatten(-2))) * self.lidar(lidar)

    net = Fused().double()
    actor = QValueActor(net, in_keys=["camera", "lidar"], spec=None, action_space="one-hot")
    td = TensorDict(
        {
            "camera": torch.randn(5, 2, 3, dtype=DOUBLE),
            "lidar": torch.randn(5, 3, dtype=DOUBLE),
        },
        [5],
    )
    with kind(Greedy("action_value"), groups="keys").prepare(actor) as hooked:
        td = hooked(td)
    with torch.no_grad():
        chosen = td["action"].long().argmax(-1, keepdim=True)
        change = net(td["camera"], td["lidar"]) - net(0 * td["camera"], 0 * td["lidar"])
        change = change.gather(-1, chosen)[:, 0]
    total = td["attr", "camera"].sum((1, 2)) + td["attr", "lidar"].sum(1)
    torch.testing.assert_close(total, change, rtol=0, atol=1e-10)


def test_of_an_additive_score_they_agree_with_integrated_gradients():
    critic = ValueOperator(
        Formula(lambda x: x.sin().sum(-1, keepdim=True)), in_keys=["observation"]
    )
    td = TensorDict({"observation": torch.randn(5, 4, dtype=DOUBLE)}, [5])
    with ShapleyValues().prepare(critic) as hooked:
        exact = hooked(td.copy())["attr", "observation"]
    with IntegratedGradients().prepare(critic) as hooked:
        path = hooked(td.copy())["attr", "observation"]
    torch.testing.assert_close(exact, td["observation"].sin())
    torch.testing.assert_close(exact, path, rtol=0, atol=1e-6)


# --- bad input --------------------------------------------------------------------------------------


def test_too_many_groups_are_refused_with_their_number_and_the_method_that_samples():
    with pytest.raises(
        InputError, match=r"2\*\*17.*17 groups.*max_groups is 16.*ShapleyValueSampling"
    ):
        explained(ShapleyValues("y"), nn.Linear(17, 1), (2,), x=torch.randn(2, 17))
    with pytest.raises(InputError, match=r"3 groups.*max_groups is 2"):
        explained(ShapleyValues("y", max_groups=2), nn.Linear(3, 1), (2,), x=torch.randn(2, 3))
    td = explained(ShapleyValues("y", groups="keys"), nn.Linear(17, 1), (2,), x=torch.randn(2, 17))
    assert td["attr", "x"].shape == (2, 17)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ShapleyValues, {"max_groups": 0}, "max_groups"),
        (ShapleyValueSampling, {"n_samples": 0}, "n_samples must be .* at least 1, got 0"),
        (ShapleyValueSampling, {"n_samples": 2.5}, "n_samples"),
        (ShapleyValueSampling, {"n_samples": 3, "antithetic": True}, "n_samples=3 is odd"),
        (ShapleyValueSampling, {"seed": 0.5}, "seed"),
        (KernelShap, {"n_samples": 0}, "n_samples"),
        (KernelShap, {"seed": -3}, "seed"),
        (KernelShap, {"groups": "key"}, "features, keys"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(kind, options, message):
    with pytest.raises(InputError, match=message):
        kind("y", **options)


@every
@pytest.mark.parametrize(("value", "end"), [(0.0, "baseline"), (-1.0, "baseline")])
def test_a_score_that_is_not_finite_at_the_baseline_is_an_error(kind, value, end):
    x = torch.rand(2, 3) + 1
    with pytest.raises(TargetError, match=f"NaN or Inf at the {end}"):
        explained(kind("y", baselines=value), Formula(lambda x: x.log().sum(-1)), (2,), x=x)


@every
def test_a_score_that_is_not_finite_in_between_is_an_error(kind):
    # Fine at (0, 0) and at (1, 1), infinite where only one of the two is there.
    net = Formula(lambda x: 1 / (1 - (x[..., 0] - x[..., 1]).abs()))
    with pytest.raises(TargetError, match=r"NaN or Inf at a point.*'x'"):
        explained(kind("y"), net, (2,), x=torch.ones(2, 2))


def test_keys_of_a_model_with_nested_keys_are_groups():
    model = module(Formula(lambda a, b: a.sum(-1) * b.sum((-1, -2))), ["own", ("agents", "obs")])
    own, obs = torch.randn(3, 2, dtype=DOUBLE), torch.randn(3, 2, 4, dtype=DOUBLE)
    td = TensorDict({"own": own, "agents": TensorDict({"obs": obs}, [3, 2])}, [3])
    with ShapleyValues("y", groups="keys", divide=False).prepare(model) as hooked:
        td = hooked(td)
    half = own.sum(-1) * obs.sum((-1, -2)) / 2
    torch.testing.assert_close(td["attr", "own"], half[:, None].expand(3, 2))
    torch.testing.assert_close(td["attr", "agents", "obs"], half[:, None, None].expand(3, 2, 4))
    assert td["attr", "agents"].batch_size == (3, 2)
