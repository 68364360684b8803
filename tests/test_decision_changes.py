"""Leads, corruptions, smallest changes, comparisons: where the best change is known by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import QValueActor

from explaining import BATCHES
from explaining import explained as attacked
from method_references import DOUBLE, Formula, Joined
from pristine import assert_same, snapshot, td_snapshot
from tdhook_like import Each, InputError, Taken
from tdhook_like.robustness import (
    FGSM,
    PGD,
    AttackComparator,
    Corruption,
    GaussianNoise,
    Lead,
    MinParamPerturbation,
    perturbed,
)

# --- the lead ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_the_lead_is_the_chosen_entry_minus_the_best_other_one(batch):
    y = torch.randn(*batch, 5, dtype=DOUBLE)
    action = torch.randint(5, batch)
    for target, chosen in ((Lead("y"), y.argmax(-1)), (Lead(Taken("y")), action)):
        with FGSM(target, epsilon=0.0).prepare(nn.Identity(), ["x"], ["y"]) as hooked:
            td = hooked.observe(TensorDict({"x": y, "action": action}, batch))
        mine = y.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        others = y.scatter(-1, chosen.unsqueeze(-1), -math.inf).amax(-1)
        torch.testing.assert_close(td["adversarial_score"], mine - others)


def test_the_choice_is_held_fixed_while_inputs_change():
    x = torch.tensor([[1.0, 0.9, 0.0]], dtype=DOUBLE)
    td = attacked(PGD(Lead("y"), epsilon=0.5, n_steps=50), nn.Identity(), (1,), x=x)
    assert td["adversarial_score"].item() == pytest.approx(0.1 - 1.0)


# --- corruptions ------------------------------------------------------------------------------------


def test_noise_is_of_its_size_alike_for_all_targets_and_repeats():
    net, x = Joined([3], 2).double(), torch.zeros(2000, 3, dtype=DOUBLE)
    before = torch.get_rng_state()
    td, again = (attacked(GaussianNoise(Each("y"), epsilon=0.5), net, (2000,), x=x) for _ in "ab")
    noisy = td["adversarial", "x"]
    assert torch.equal(noisy[:, 0], noisy[:, 1]) and torch.equal(noisy, again["adversarial", "x"])
    assert noisy.std() == pytest.approx(0.5, rel=0.05) and torch.equal(
        before, torch.get_rng_state()
    )
    twice = attacked(GaussianNoise(Each("y"), epsilon=1.0), net, (2000,), x=x)["adversarial", "x"]
    torch.testing.assert_close(twice, 2 * noisy)


@pytest.mark.parametrize("kind", [GaussianNoise, Corruption])
def test_what_is_corrupted_stays_inside_its_bounds(kind):
    own = {"change": lambda x, size, generator: x + size} if kind is Corruption else {}
    net, x = Formula(lambda x: x.sum(-1)), torch.full((500, 2), 0.5, dtype=DOUBLE)
    method = kind("y", epsilon=2.0, bounds=(0.0, 1.0), **own)
    free = attacked(method.replaced(bounds=None), net, (500,), x=x)["adversarial", "x"]
    td = attacked(method, net, (500,), x=x)
    torch.testing.assert_close(td["adversarial", "x"], free.clamp(0, 1))
    assert (free > 1).any()


def test_a_function_of_ones_own_is_asked_for_keys_of_some_size_alone():
    asked = []

    def dropped(x: Tensor, size: Tensor, generator: torch.Generator) -> Tensor:
        asked.append(x.shape)
        return x * (torch.rand(x.shape, generator=generator) >= size)

    net = Formula(lambda a, b: a.sum(-1) + b.sum(-1))
    inputs = {"a": torch.ones(500, 4), "b": torch.ones(500, 2)}
    td = attacked(Corruption("y", change=dropped, epsilon={"a": 0.25}), net, (500,), **inputs)
    assert asked == [(1, 500, 4)] and torch.equal(td["adversarial", "b"], inputs["b"])
    assert td["adversarial", "a"].mean() == pytest.approx(0.75, abs=0.05)


# --- the smallest change ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_of_a_linear_lead_the_smallest_size_is_the_lead_over_the_slope(batch):
    w = torch.tensor([0.5, -1.5, 2.0], dtype=DOUBLE)
    a, b = torch.rand(*batch, 3, dtype=DOUBLE), torch.rand(*batch, 1, dtype=DOUBLE)
    net = Formula(lambda a, b: a @ w + 0.25 * b[..., 0] + 2.0)
    attack = FGSM("y", epsilon={"a": 4.0, "b": 1.0})
    td = attacked(MinParamPerturbation(attack, n_halvings=40), net, batch, a=a, b=b)
    value = net(a, b)
    torch.testing.assert_close(td["smallest_change", "a"], value / 4, rtol=0, atol=1e-9)
    assert td["smallest_change", "b"].isinf().all()  # 0.25 at most is not enough
    both = attacked(
        MinParamPerturbation(attack, together=True, n_halvings=40), net, batch, a=a, b=b
    )
    share = value / (4 * 4.0 + 0.25 * 1.0)
    torch.testing.assert_close(both["smallest_change", "a"], 4 * share, rtol=0, atol=1e-9)
    torch.testing.assert_close(both["smallest_change", "b"], share, rtol=0, atol=1e-9)


def test_halvings_begin_between_the_sizes_that_flip_and_do_not_for_each_element():
    share = torch.tensor([[0.01], [0.24], [0.26], [0.51], [0.76], [0.99], [5.0]], dtype=DOUBLE)
    net = Formula(lambda x, share: (share - x).sum(-1))
    attack = FGSM("y", epsilon={"x": 1.0}, keys=["x"])
    method = MinParamPerturbation(attack, n_sizes=4, n_halvings=3)
    inputs = {"x": torch.zeros(7, 1, dtype=DOUBLE), "share": share}
    found = attacked(method, net, (7,), **inputs)["smallest_change", "x"].flatten()
    # A quarter, halved three times, is what the size may be too large by.
    over = found[:-1] - share[:-1, 0]
    assert ((over > 0) & (over <= 1 / 32)).all() and found[-1].isinf()


def test_it_tells_which_key_flips_the_action():
    net = Formula(
        lambda a, b: torch.stack([5 * a[..., 0] + b[..., 0], torch.ones_like(a[..., 0])], -1)
    )
    attack = PGD(Lead("y"), epsilon=3.0, n_steps=8)
    td = attacked(
        MinParamPerturbation(attack, n_halvings=20),
        net,
        (1,),
        a=torch.tensor([[0.4]], dtype=DOUBLE),
        b=torch.tensor([[0.0]], dtype=DOUBLE),
    )
    # It leads by 1: a has to move by a fifth, b by one.
    assert td["smallest_change", "a"].item() == pytest.approx(0.2, abs=1e-4)
    assert td["smallest_change", "b"].item() == pytest.approx(1.0, abs=1e-4)


def test_nothing_has_to_change_where_the_decision_has_flipped_already():
    x = torch.tensor([[1.0], [-1.0]])
    found = MinParamPerturbation(FGSM("y", epsilon=2.0), n_halvings=30)
    td = attacked(found, Formula(lambda x: x[..., 0]), (2,), x=x)
    torch.testing.assert_close(td["smallest_change", "x"], torch.tensor([1.0, 0.0]))
    assert td["smallest_change", "x"][1] == 0  # to the last bit: nothing is searched for


@pytest.mark.parametrize("goal", ["lower", "raise"])
def test_a_score_at_the_threshold_has_not_crossed_it(goal):
    attack, x = FGSM("y", epsilon=1.0, goal=goal), torch.zeros(1, 1, dtype=DOUBLE)
    net = Formula(lambda x: x[..., 0])
    found = attacked(MinParamPerturbation(attack, n_halvings=10), net, (1,), x=x)
    assert 0 < found["smallest_change", "x"].item() < 2e-4
    away = MinParamPerturbation(
        attack, n_sizes=1, n_halvings=0, threshold=1.0 if goal == "raise" else -1.0
    )
    assert attacked(away, net, (1,), x=x)["smallest_change", "x"].isinf().all()


def test_a_key_that_may_not_change_flips_nothing():
    net, x = Formula(lambda a, b: (a + b).sum(-1)), torch.ones(2, 1, dtype=DOUBLE)
    method = MinParamPerturbation(FGSM("y", epsilon={"a": 4.0}), n_halvings=30)
    td = attacked(method, net, (2,), a=x, b=x.clone())
    torch.testing.assert_close(td["smallest_change", "a"], 2 * x[:, 0], rtol=0, atol=1e-6)
    assert torch.equal(td["smallest_change", "b"], torch.full_like(x[:, 0], math.inf))


def test_of_several_sizes_that_flip_the_first_on_the_grid_is_found():
    # Flips between 0.2 and 0.3 and from 0.8 on.
    def score(x: Tensor) -> Tensor:
        t = x[..., 0]
        return torch.where((t > 0.2) & (t < 0.3) | (t > 0.8), -1.0, 1.0) + 0 * t

    change = Corruption("y", change=lambda x, size, g: x + size, epsilon=1.0)
    x = torch.zeros(1, 1, dtype=DOUBLE)
    fine = MinParamPerturbation(change, n_sizes=40, n_halvings=20)
    td = attacked(fine, Formula(score), (1,), x=x)
    assert td["smallest_change", "x"].item() == pytest.approx(0.2, abs=1e-5)
    coarse = MinParamPerturbation(change, n_sizes=2, n_halvings=20)
    td = attacked(coarse, Formula(score), (1,), x=x)
    assert td["smallest_change", "x"].item() == pytest.approx(0.8, abs=1e-5)


def test_a_threshold_and_a_goal_of_raising():
    x = torch.zeros(2, 1, dtype=DOUBLE)
    attack = FGSM({"a": ("y", 0), "b": ("y", 1)}, epsilon=10.0, goal="raise")
    td = attacked(
        MinParamPerturbation(attack, threshold=3.0, n_halvings=40),
        Formula(lambda x: torch.cat([x, 2 * x], -1)),
        (2,),
        x=x,
    )
    expected = torch.full((2,), 3.0, dtype=DOUBLE)
    torch.testing.assert_close(td["smallest_change", "a", "x"], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(td["smallest_change", "b", "x"], expected / 2, rtol=0, atol=1e-9)


# --- comparison -------------------------------------------------------------------------------------


def actor() -> Any:
    torch.manual_seed(0)
    net = TensorDictModule(nn.Linear(4, 3), ["obs"], ["action_value"])
    return QValueActor(net.module, in_keys=["obs"], action_space="categorical")


def test_attacks_are_compared_by_the_same_score_on_the_same_batch():
    policy, td = actor(), TensorDict({"obs": torch.randn(50, 4)}, [50])
    target = Lead("action_value")
    attack = FGSM(target, epsilon=0.2)
    comparator = AttackComparator(
        {"fgsm": attack, "noise": GaussianNoise(epsilon=0.05), "none": FGSM(epsilon=0.0)}, target
    )
    before, seen = snapshot(policy), td_snapshot(td)
    found = comparator.compare(policy, td)
    assert_same(before, snapshot(policy))
    assert_same(seen, td_snapshot(td))
    assert list(found.outcomes) == ["(unchanged)", "fgsm", "noise", "none"]
    with attack.prepare(policy) as hooked:
        attacked_td = perturbed(hooked.observe(td.copy()))
    flips = policy(attacked_td)["action"] != policy(td.copy())["action"]
    assert found.outcomes["fgsm"].flipped == pytest.approx(flips.float().mean().item())
    assert 0 < found.outcomes["fgsm"].flipped < 1 and found.outcomes["(unchanged)"].flipped == 0
    values = policy(td.copy())["action_value"].sort(-1).values
    assert found.outcomes["none"].score == pytest.approx(
        (values[:, -1] - values[:, -2]).mean().item(), rel=1e-5
    )
    assert found.outcomes["fgsm"].largest["obs"] == pytest.approx(0.2, rel=1e-5)
    assert found.outcomes["fgsm"].length["obs"] == pytest.approx(0.4, rel=1e-5)
    assert found.to_dict()["fgsm/flipped"] == found.outcomes["fgsm"].flipped
    assert "means over 50 elements" in str(found)


def test_at_the_threshold_of_a_comparison_nothing_has_flipped():
    comparator = AttackComparator({"none": GaussianNoise("y", epsilon=0.0)}, "y", threshold=1.0)
    td = TensorDict({"x": torch.tensor([1.0, 0.5, 2.0, 3.0])}, [4])
    found = comparator.compare(nn.Identity(), td, ["x"], ["y"]).outcomes["none"]
    assert found.flipped == 0.25 and found.score == pytest.approx(6.5 / 4)


def test_a_change_of_several_targets_is_not_compared():
    comparator = AttackComparator({"each": FGSM(Each("y"), epsilon=0.1)}, ("y", 0))
    with pytest.raises(InputError, match="'each' has several targets"):
        comparator.compare(nn.Linear(2, 2), TensorDict({"x": torch.ones(3, 2)}, [3]), ["x"], ["y"])


def test_driving_an_attack_acts_plainly():
    policy, td = actor(), TensorDict({"obs": torch.randn(5, 4)}, [5])
    plain = policy(td.copy())
    with FGSM(Lead("action_value"), epsilon=5.0).prepare(policy) as hooked:
        hooked(td)
    assert torch.equal(td["action"], plain["action"])
    assert torch.equal(td["action_value"], plain["action_value"])
