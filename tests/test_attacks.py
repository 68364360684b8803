"""Attacks: where the best change is known by hand; what they leave alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded

from explaining import BATCHES
from explaining import explained as attacked
from method_references import DOUBLE, Formula, Joined
from pristine import assert_same, snapshot, td_snapshot
from tdhook_like import AtStep, Each, InputError, Taken
from tdhook_like.robustness import FGSM, PGD, GaussianNoise, Lead, MinParamPerturbation, perturbed

NORMS = ["linf", "l2"]
GOALS = {"lower": -1.0, "raise": 1.0}


# --- closed forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [FGSM, PGD])
@pytest.mark.parametrize("batch", BATCHES)
def test_of_a_linear_score_both_find_the_best_point_of_the_ball(batch, kind, norm, goal):
    net, x = nn.Linear(4, 2).double(), torch.randn(*batch, 4, dtype=DOUBLE)
    td = attacked(kind(("y", 1), epsilon=0.3, norm=norm, goal=goal), net, batch, x=x)
    w = net.weight.detach()[1]
    direction = w.sign() if norm == "linf" else w / w.norm()
    best = x + GOALS[goal] * 0.3 * direction
    torch.testing.assert_close(td["adversarial", "x"], best, rtol=0, atol=1e-10)
    reached = net(best)[..., 1].detach()
    torch.testing.assert_close(td["adversarial_score"], reached, rtol=0, atol=1e-10)


def test_of_a_linear_score_pgd_finds_the_best_point_of_ball_and_box():
    w = torch.tensor([3.0, 2.0, 1.0], dtype=DOUBLE)
    x = torch.tensor([[0.9, 0.0, 0.0]], dtype=DOUBLE)
    attack = PGD("y", epsilon=0.5, norm="l2", goal="raise", bounds=(-1.0, 1.0), n_steps=400)
    td = attacked(attack, Formula(lambda x: x @ w), (1,), x=x)
    # The first feature stops at the border; what is left of the radius goes along the others.
    left = math.sqrt(0.5**2 - 0.1**2)
    rest = left * w[1:] / w[1:].norm()
    best = torch.cat([torch.ones(1, dtype=DOUBLE), rest])
    torch.testing.assert_close(td["adversarial", "x"][0], best, rtol=0, atol=2e-3)
    assert (td["adversarial", "x"] - x).norm() <= 0.5 + 1e-12


def slow_pgd(
    net: Any, x: Tensor, size: float, norm: str, n: int, low: float, high: float
) -> Tensor:
    """Madry et al.'s loop for one element, lowering the score; the best point of the way."""
    point, found = x.clone(), []
    for _ in range(n):
        leaf = point.clone().requires_grad_()
        value = net(leaf).sum()
        (g,) = torch.autograd.grad(value, leaf)
        found.append((value.item(), point))
        step = g.sign() if norm == "linf" else g / g.norm()
        point = point - 2.5 / n * size * step
        if norm == "linf":
            point = x + (point - x).clamp(-size, size)
        elif (point - x).norm() > size:
            point = x + (point - x) * size / (point - x).norm()
        point = point.clamp(low, high)
    found.append((net(point).item(), point))
    return min(found, key=lambda each: each[0])[1]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch", BATCHES[1:])
def test_pgd_is_the_papers_loop_for_every_element(batch, norm):
    net, x = Joined([3], 1).double(), torch.rand(*batch, 3, dtype=DOUBLE)
    attack = PGD("y", epsilon=0.4, norm=norm, n_steps=9, bounds=(0.0, 1.0))
    td = attacked(attack, net, batch, x=x)
    for element, point in zip(x.reshape(-1, 3), td["adversarial", "x"].reshape(-1, 3), strict=True):
        expected = slow_pgd(net, element, 0.4, norm, 9, 0.0, 1.0)
        torch.testing.assert_close(point, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", [{}, {"random_start": True}, {"n_starts": 3, "n_steps": 5}])
def test_pgd_stays_in_ball_and_bounds_and_is_no_worse_than_the_input(norm, start):
    net = Joined([3, 2], 2).double()
    a, b = torch.rand(6, 3, dtype=DOUBLE), torch.rand(6, 2, dtype=DOUBLE)
    attack = PGD(Each("y"), epsilon={"a": 0.3, "b": 0.1}, norm=norm, bounds=(0.0, 1.0), **start)
    td = attacked(attack, net, (6,), a=a, b=b)
    again = attacked(attack, net, (6,), a=a, b=b)
    for key, x, size in (("a", a, 0.3), ("b", b, 0.1)):
        changed = td["adversarial", key]
        assert changed.shape == (6, 2, x.shape[-1])
        away = changed - x.unsqueeze(1)
        length = away.abs().amax(-1) if norm == "linf" else away.norm(dim=-1)
        assert (length <= size + 1e-12).all()
        assert (changed >= 0).all() and (changed <= 1).all()
        assert torch.equal(changed, again["adversarial", key])
    for i in range(2):
        point = [td["adversarial", key][:, i] for key in "ab"]
        torch.testing.assert_close(td["adversarial_score"][:, i], net(*point)[:, i].detach())
        if not start.get("random_start"):
            assert (td["adversarial_score"][:, i] <= net(a, b)[:, i]).all()


def test_more_starts_are_never_worse():
    def bumpy(x: Tensor) -> Tensor:
        return torch.sin(7 * x).sum(-1) + 0.3 * x.square().sum(-1)

    x = torch.randn(30, 2, dtype=DOUBLE)
    one, many = (
        attacked(PGD("y", epsilon=1.0, n_starts=n, n_steps=10), Formula(bumpy), (30,), x=x)
        for n in (1, 6)
    )
    assert (many["adversarial_score"] <= one["adversarial_score"]).all()
    assert (many["adversarial_score"] < one["adversarial_score"] - 0.1).any()


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_spread_evenly_over_the_ball(norm):
    net, x = Formula(lambda x: 0 * x.sum(-1)), torch.zeros(20000, 3, dtype=DOUBLE)
    attack = PGD("y", epsilon=2.0, norm=norm, random_start=True, n_steps=1)
    start = attacked(attack, net, (20000,), x=x)["adversarial", "x"]  # no slope moves it on
    size = start.abs().amax(-1) if norm == "linf" else start.norm(dim=-1)
    assert size.max() <= 2.0 and start.mean(0).abs().max() < 0.05
    # A ball of half the size holds an eighth of the volume.
    assert (size < 1.0).double().mean() == pytest.approx(1 / 8, abs=0.01)


def test_a_random_start_leaves_a_point_without_a_slope():
    net, x = Formula(lambda x: x.square().sum(-1)), torch.zeros(4, 1, dtype=DOUBLE)
    attack = PGD("y", epsilon=1.0, goal="raise")
    assert not attacked(attack, net, (4,), x=x)["adversarial", "x"].any()
    td = attacked(attack.replaced(random_start=True), net, (4,), x=x)
    torch.testing.assert_close(td["adversarial", "x"].abs(), torch.ones(4, 1, dtype=DOUBLE))


# --- keys -------------------------------------------------------------------------------------------


def test_only_the_chosen_keys_change_each_by_its_own_size():
    net = Joined([3, 2, 1], 1).double()
    inputs = {k: torch.randn(4, n, dtype=DOUBLE) for k, n in (("a", 3), ("b", 2), ("c", 1))}
    for kind in (FGSM, PGD):
        for norm in NORMS:
            attack = kind("y", epsilon={"a": 0.2, "b": 0.5}, norm=norm)
            td = attacked(attack, net, (4,), **inputs)
            away = {k: (td["adversarial", k] - x).abs() for k, x in inputs.items()}
            assert not away["c"].any() and away["a"].any() and away["b"].any()
    td = attacked(FGSM("y", epsilon=0.1, keys=["b"]), net, (4,), **inputs)
    assert set(td["adversarial"].keys()) == {"b"}


def test_nested_keys_ignored_keys_and_the_policy_runs_on_what_is_written():
    model = TensorDictModule(
        Formula(lambda obs, c: obs.sum(-1).amax(-1)), [("agents", "obs"), "c"], ["y"]
    )
    td = TensorDict(
        {"agents": TensorDict({"obs": torch.randn(5, 2, 3)}, [5, 2]), "c": torch.ones(5, 1)}, [5]
    )
    plain = model(td.copy())["y"]
    with PGD("y", epsilon=0.1).prepare(model) as hooked:
        hooked.observe(td)
    assert td["adversarial", "agents"].batch_size == (5, 2)
    assert torch.equal(td["adversarial", "c"], td["c"])
    changed = perturbed(td)
    assert changed["agents", "obs"] is td["adversarial", "agents", "obs"]
    assert not torch.equal(td["agents", "obs"], changed["agents", "obs"])
    torch.testing.assert_close(model(changed)["y"], td["adversarial_score"])
    assert (td["adversarial_score"] <= plain).all()


def test_a_size_may_differ_between_features_and_elements():
    net, x = nn.Linear(2, 1).double(), torch.randn(3, 2, dtype=DOUBLE)
    size = torch.tensor([[0.0, 1.0], [0.5, 0.0], [2.0, 2.0]], dtype=DOUBLE)
    td = attacked(FGSM("y", epsilon=size, goal="raise"), net, (3,), x=x)
    expected = x + size * net.weight.detach().sign()
    torch.testing.assert_close(td["adversarial", "x"], expected)


def test_keys_without_features_have_sizes_by_element_in_any_norm():
    x, size = torch.zeros(3, dtype=DOUBLE), torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE)
    for norm in NORMS:
        td = attacked(FGSM("y", epsilon=size, norm=norm), Formula(lambda x: 2 * x), (3,), x=x)
        torch.testing.assert_close(td["adversarial", "x"], -size)


def test_named_targets_have_inputs_of_their_own():
    net, x = Joined([3], 2).double(), torch.randn(4, 3, dtype=DOUBLE)
    td = attacked(PGD({"a": ("y", 0), "b": ("y", 1)}, n_steps=5), net, (4,), x=x)
    for i, name in enumerate("ab"):
        alone = attacked(PGD(("y", i), n_steps=5), net, (4,), x=x)
        torch.testing.assert_close(td["adversarial", name, "x"], alone["adversarial", "x"])
        torch.testing.assert_close(td["adversarial_score", name], alone["adversarial_score"])
        assert torch.equal(perturbed(td, target=name)["x"], td["adversarial", name, "x"])


def test_a_loss_is_raised_and_a_wanted_action_is_too():
    net, x = nn.Linear(3, 4).double(), torch.randn(6, 3, dtype=DOUBLE)
    label = torch.randint(4, (6,))
    model = TensorDictModule(net, ["x"], ["y"])

    def loss(td: Any) -> Tensor:
        flat = td["y"].flatten(0, -2)
        return nn.functional.cross_entropy(flat, td["label"].flatten(), reduction="none").reshape(
            td["y"].shape[:-1]
        )

    td = TensorDict({"x": x, "label": label}, [6])
    with FGSM(loss, epsilon=0.2, goal="raise").prepare(model) as hooked:
        hooked.observe(td)
    leaf = x.clone().requires_grad_()
    value = nn.functional.cross_entropy(net(leaf), label, reduction="sum")
    (grad,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(td["adversarial", "x"], x + 0.2 * grad.sign())
    td = TensorDict({"x": x, "wanted": torch.full((6,), 2)}, [6])
    wanted = PGD(Lead(Taken("y", "wanted")), epsilon=9.0, goal="raise", n_steps=40)
    with wanted.prepare(nn.Identity(), ["x"], ["y"]) as hooked:
        hooked.observe(td)
    assert (td["adversarial", "x"].argmax(-1) == 2).all() and not (x.argmax(-1) == 2).all()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_chunks_of_any_size_attack_each_target_for_itself(rows):
    net, x = nn.Linear(4, 3).double(), torch.randn(2, 4, dtype=DOUBLE)
    attack = FGSM(Each("y"), epsilon=0.1, goal="raise", internal_batch_size=rows)
    td = attacked(attack, net, (2,), x=x)
    best = x.unsqueeze(1) + 0.1 * net.weight.detach().sign()
    torch.testing.assert_close(td["adversarial", "x"], best)
    reached = torch.einsum("btf,tf->bt", best, net.weight) + net.bias
    torch.testing.assert_close(td["adversarial_score"], reached.detach())


def test_a_point_that_is_no_better_does_not_stand_in_for_the_input():
    net, x = Formula(lambda x: x.square().sum(-1)), torch.full((2, 1), 0.25, dtype=DOUBLE)
    attack = PGD("y", epsilon=1.0, n_steps=1, step_size=0.5)  # to −0.25, which is as low
    td = attacked(attack, net, (2,), x=x)
    assert torch.equal(td["adversarial", "x"], x)


# --- bounds -----------------------------------------------------------------------------------------


def test_bounds_come_from_torchrls_specs():
    spec = Composite(
        pixels=Bounded(torch.zeros(3, 2), torch.ones(3, 2)),
        agents=Composite(obs=Bounded(-1.0, 2.0, (3, 2)), shape=(3,)),
        free=Unbounded((3, 2)),
        shape=(3,),
    )
    net = Formula(lambda *x: sum(t.sum(-1) for t in x))
    keys = ["pixels", ("agents", "obs"), "free", "other"]
    model = TensorDictModule(net, keys, ["y"])
    for batch in [(3,), (3, 7)]:
        td = TensorDict({k: torch.rand(*batch, 2) for k in ("pixels", "free", "other")}, batch)
        td["agents", "obs"] = torch.rand(*batch, 2)
        with FGSM("y", epsilon=9.0, goal="raise", bounds=spec).prepare(model) as hooked:
            hooked.observe(td)
        assert (td["adversarial", "pixels"] == 1).all()
        assert (td["adversarial", "agents", "obs"] == 2).all()
        for key in ("free", "other"):
            torch.testing.assert_close(td["adversarial", key], td[key] + 9)


def test_bounds_that_differ_between_environments_hold_for_each_of_them():
    low = torch.tensor([[0.0], [-1.0], [-2.0]])
    spec = Composite(x=Bounded(low, torch.ones(3, 1)), shape=(3,))
    net, x = Formula(lambda x: x.sum(-1)), torch.full((3, 1), 0.5)
    td = attacked(FGSM("y", epsilon=9.0, bounds=spec), net, (3,), x=x)
    assert torch.equal(td["adversarial", "x"], low)
    with pytest.raises(InputError, match="does not broadcast"):
        attacked(FGSM("y", epsilon=9.0, bounds=spec), net, (7,), x=torch.full((7, 1), 0.5))


def test_a_bound_of_one_side_and_bounds_of_one_key():
    net, x = Formula(lambda x, z: x.sum(-1) + z.sum(-1)), torch.ones(2, 2)
    attack = FGSM("y", epsilon=1.0, bounds={"x": (0.5, float("inf"))})
    td = attacked(attack, net, (2,), x=x, z=x.clone())
    assert (td["adversarial", "x"] == 0.5).all() and (td["adversarial", "z"] == 0).all()


# --- the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        FGSM(("y", 0)),
        PGD(("y", 0), n_steps=3, random_start=True),
        GaussianNoise(("y", 0)),
        MinParamPerturbation(PGD(("y", 0), n_steps=2, random_start=True)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_the_model_the_inputs_and_all_generators_are_left_as_they_were(method):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU(inplace=True))
    model = TensorDictModule(net, ["x"], ["y"]).train()
    td = TensorDict({"x": torch.randn(6, 3)}, [6])
    before, inputs = snapshot(model), td_snapshot(td, ["x"])
    with method.prepare(model) as hooked:
        hooked.observe(td)
    assert_same(before, snapshot(model))
    assert_same(inputs, td_snapshot(td, ["x"]))
    assert not any(v.requires_grad for v in td.values(True, True))


def test_a_trajectory_is_attacked_as_a_whole():
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
    attack = PGD(AtStep(("y", 1), -1), epsilon=0.2, norm="l2", keys=["x"], n_steps=5)
    with set_recurrent_mode(True), attack.prepare(gru) as hooked:
        hooked.observe(td)
    length = (td["adversarial", "x"] - td["x"]).flatten(1).norm(dim=-1)
    assert (length <= 0.2 + 1e-9).all() and (length > 0.1).all()
    with set_recurrent_mode(True):
        before, after = (
            gru(td.exclude("y").set("x", x))["y"][:, -1, 1].detach()
            for x in (td["x"], td["adversarial", "x"])
        )
    assert (after < before - 1e-3).all()
    torch.testing.assert_close(td["adversarial_score"], after.unsqueeze(1).expand(2, 5))
    # Half of what the attack reaches at full size takes less than the whole, and more than nothing.
    middle = MinParamPerturbation(attack, threshold=((before + after) / 2)[0].item())
    with set_recurrent_mode(True), middle.prepare(gru) as hooked:
        hooked.observe(td)
    size = td["smallest_change", "x"]
    assert torch.equal(size, size[:, :1].expand(2, 5)) and 0 < size[0, 0] < 0.2


def test_members_of_an_ensemble_are_attacked_apart():
    ensemble = EnsembleModule(TensorDictModule(nn.Linear(3, 1), ["x"], ["y"]), 2)
    x = torch.randn(4, 3)
    with FGSM("y", epsilon=0.1, goal="raise").prepare(ensemble) as hooked:
        td = hooked.observe(TensorDict({"x": x}, [4]))
    weights = ensemble.params_td["module", "weight"].detach()[:, 0]
    torch.testing.assert_close(td["adversarial", "x"], x.unsqueeze(1) + 0.1 * weights.sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_tiny_slopes_still_have_a_direction(norm, dtype):
    net = Formula(lambda x: x.sum(-1) * 1e-30)
    td = attacked(
        FGSM("y", epsilon=1.0, norm=norm, goal="raise"), net, (2,), x=torch.zeros(2, 4).to(dtype)
    )
    step = 1.0 if norm == "linf" else 0.5
    torch.testing.assert_close(td["adversarial", "x"], torch.full((2, 4), step, dtype=dtype))


def test_where_there_is_no_slope_nothing_moves():
    net = Formula(lambda x: torch.relu(x - 5).sum(-1))
    for norm in NORMS:
        td = attacked(PGD("y", epsilon=1.0, norm=norm), net, (2,), x=torch.zeros(2, 3))
        assert not td["adversarial", "x"].any()
