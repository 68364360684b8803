"""Ranks, agreement with permutation, and hiding what matters from a policy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, Categorical, Composite, LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.envs import EnvBase

from method_references import DOUBLE, Formula
from pristine import assert_same, td_snapshot
from tdhook_like import (
    Each,
    FromBuffer,
    Greedy,
    InputError,
    InputXGradient,
    KeyNotFoundError,
    ModelError,
    PathError,
    Saliency,
    TargetError,
)
from tdhook_like.metrics import (
    Hiding,
    parameter_randomisation,
    permutation_agreement,
    returns_when_hidden,
    spearman,
)

# --- ranks ------------------------------------------------------------------------------------------


def slow_ranks(values: list[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def test_spearman_is_the_correlation_of_mean_ranks():
    a = torch.randint(4, (20, 9)).double()
    b = torch.randn(20, 9, dtype=DOUBLE)
    expected = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        pair = torch.tensor([slow_ranks(x), slow_ranks(y)], dtype=DOUBLE)
        expected.append(torch.corrcoef(pair)[0, 1].item())
    torch.testing.assert_close(spearman(a, b), torch.tensor(expected, dtype=DOUBLE))
    assert spearman(torch.ones(3), torch.randn(3)).isnan()


# --- agreement --------------------------------------------------------------------------------------


def test_keys_are_ranked_as_permuting_them_does():
    net = TensorDictModule(
        Formula(lambda a, b, c: 3 * a.sum(-1) + b.sum(-1) + 0 * c.sum(-1)), ["a", "b", "c"], ["y"]
    )
    td = TensorDict({k: torch.randn(300, 2) for k in "abc"}, [300])
    seen = td_snapshot(td)
    found = permutation_agreement(InputXGradient("y"), net, td)
    assert_same(seen, td_snapshot(td))
    assert found.correlation == pytest.approx(1) and found.first and found.n_rows == 300
    assert found.method["a"] == pytest.approx(0.75, abs=0.03)
    # Of a linear score both are proportional to weight times a spread.
    assert found.permutation["a"] == pytest.approx(0.75, abs=0.03)
    assert found.permutation["c"] == 0 and "rank correlation 1.000, the same first" in str(found)


def test_a_key_counts_with_all_of_its_features():
    net = TensorDictModule(Formula(lambda a, b: a.sum(-1) + b.sum(-1)), ["a", "b"], ["y"])
    td = TensorDict({"a": torch.randn(2000, 3), "b": torch.randn(2000, 1)}, [2000])
    found = permutation_agreement(InputXGradient("y"), net, td)
    # Sizes of three features add up; a sum of three varies by √3.
    assert found.method["a"] == pytest.approx(3 / 4, abs=0.02)
    assert found.permutation["a"] == pytest.approx(3**0.5 / (1 + 3**0.5), abs=0.02)


def test_features_may_be_compared_apart_and_a_wrong_explanation_disagrees():
    weights = torch.tensor([4.0, 1.0, 0.1])
    net = TensorDictModule(Formula(lambda x: x @ weights), ["x"], ["y"])
    td = TensorDict({"x": torch.randn(200, 3) * torch.tensor([0.01, 1.0, 100.0])}, [200])
    right = permutation_agreement(InputXGradient("y"), net, td, by="features")
    wrong = permutation_agreement(Saliency("y"), net, td, by="features")
    assert right.correlation == pytest.approx(1) and right.first
    assert wrong.correlation == pytest.approx(-1) and not wrong.first
    assert list(right.method) == ["x[0]", "x[1]", "x[2]"]


# --- the environment --------------------------------------------------------------------------------


class Cue(EnvBase):
    """Ten steps; one reward for each action that is the sign of the cue. Noise says nothing."""

    def __init__(self, batch: tuple[int, ...] = ()) -> None:
        super().__init__(batch_size=batch)
        self.observation_spec = Composite(
            cue=Unbounded((*batch, 1)), noise=Unbounded((*batch, 3)), shape=batch
        )
        self.action_spec = Bounded(-100, 100, (*batch, 1))
        self.reward_spec = Unbounded((*batch, 1))
        self.done_spec = Categorical(2, (*batch, 1), dtype=torch.bool)
        self.draw, self.steps = torch.Generator(), 0

    def _set_seed(self, seed: int | None) -> None:
        self.draw.manual_seed(seed or 0)

    def _look(self) -> dict[str, Tensor]:
        self.cue = torch.randn(*self.batch_size, 1, generator=self.draw)
        noise = 0.3 * torch.randn(*self.batch_size, 3, generator=self.draw)
        done = torch.full((*self.batch_size, 1), self.steps >= 10)
        return {"cue": self.cue, "noise": noise, "done": done, "terminated": done}

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        self.steps = 0
        return TensorDict(self._look(), self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        reward = (tensordict["action"].sign() == self.cue.sign()).float()
        self.steps += 1
        return TensorDict({**self._look(), "reward": reward}, self.batch_size)


def reader() -> TensorDictModule:
    return TensorDictModule(
        Formula(lambda cue, noise: cue + 0.1 * noise.sum(-1, keepdim=True)),
        ["cue", "noise"],
        ["action"],
    )


@pytest.mark.parametrize("batch", [(), (4,)])
def test_hiding_what_the_explanation_points_to_costs_more_than_hiding_anything(batch):
    state = torch.get_rng_state()
    found = returns_when_hidden(
        InputXGradient("action"), reader(), Cue(batch), share=0.25, episodes=6, max_steps=20, seed=3
    )
    assert torch.equal(state, torch.get_rng_state())
    assert list(found.returns) == ["nothing", "most", "random", "least"]
    assert len(found.returns["most"]) == 6 * math.prod(batch)
    means = found.means
    assert means["nothing"] > 9 and means["least"] > 8.5
    assert means["most"] < means["random"] < means["least"] + 0.5
    assert found.points > 1 and "25% of the features" in str(found)
    again = returns_when_hidden(
        InputXGradient("action"), reader(), Cue(batch), share=0.25, episodes=6, max_steps=20, seed=3
    )
    assert all(torch.equal(found.returns[k], again.returns[k]) for k in means)


def test_features_may_be_replaced_by_those_of_another_moment():
    rows = TensorDict({"cue": torch.randn(100, 1), "noise": torch.randn(100, 3)}, [100])
    buffer = ReplayBuffer(storage=LazyTensorStorage(100))
    buffer.extend(rows)
    for fill in (rows, FromBuffer(buffer)):
        found = returns_when_hidden(
            InputXGradient("action"),
            reader(),
            Cue(),
            share=1.0,
            fill=fill,
            which=["most"],
            episodes=20,
            max_steps=20,
        )
        assert 3 < found.means["most"] < 7  # ten coins


def test_only_the_chosen_features_are_hidden_and_inputs_stay():
    td = TensorDict({"cue": torch.full((5, 1), 2.0), "noise": torch.ones(5, 3)}, [5])
    with InputXGradient("action").prepare(reader()) as hooked:
        for which, expected in (("most", 0.3), ("least", 2.2)):
            out = Hiding(hooked, which, 0.25)(td.copy())
            torch.testing.assert_close(out["action"], torch.full((5, 1), expected))
            assert torch.equal(out["cue"], td["cue"]) and "attr" not in out
        out = Hiding(hooked, "most", 0.05)(td.copy())  # one feature at least
        torch.testing.assert_close(out["action"], torch.full((5, 1), 0.3))
        out = Hiding(hooked, "most", 0.25, fill={"cue": -1.0})(td.copy())
        torch.testing.assert_close(out["action"], torch.full((5, 1), -0.7))
        assert torch.equal(Hiding(hooked, "most", 0.0)(td.copy())["action"], reader()(td)["action"])


def test_every_variant_plays_the_same_episodes_each_with_a_seed_of_its_own():
    seeds = []

    class Seeded(Cue):
        def _set_seed(self, seed: int | None) -> None:
            seeds.append(seed)
            super()._set_seed(seed)

    found = returns_when_hidden(
        InputXGradient("action"), reader(), Seeded(), which=["most"], episodes=3, seed=5
    )
    assert list(found.returns) == ["nothing", "most"]
    assert seeds == [5, 6, 7, 5, 6, 7]


def test_rewards_of_a_next_episode_do_not_count():
    class Recorded:
        def set_seed(self, seed: int) -> None: ...

        def rollout(self, max_steps: int, policy: Any) -> TensorDictBase:
            done = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]]).bool().unsqueeze(-1)
            step = TensorDict({"reward": torch.ones(2, 4, 1), "done": done}, [2, 4])
            return TensorDict({"next": step}, [2, 4])

    found = returns_when_hidden(
        InputXGradient("action"), reader(), Recorded(), which=[], episodes=1
    )
    assert found.returns["nothing"].tolist() == [2.0, 4.0]


# --- bad input --------------------------------------------------------------------------------------


class Silent:
    def set_seed(self, seed: int) -> None: ...

    def rollout(self, max_steps: int, policy: Any) -> TensorDictBase:
        return TensorDict({}, [3])


def hooked_reader(method: Any) -> Any:
    return method.prepare(reader()).__enter__()


CRITIC = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
TD = TensorDict({"x": torch.randn(4, 6)}, [4])
GIVEN: dict[str, Any] = {"in_keys": ["x"], "out_keys": ["y"]}
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown order": (
        lambda: parameter_randomisation(Saliency("y"), CRITIC, TD, order="up", **GIVEN),
        InputError,
        "cascading",
    ),
    "unknown layer": (
        lambda: parameter_randomisation(Saliency("y"), CRITIC, TD, layers=["1"], **GIVEN),
        PathError,
        "'1'",
    ),
    "no parameters": (
        lambda: parameter_randomisation(Saliency(("y", 0)), nn.ReLU(), TD, **GIVEN),
        ModelError,
        "no parameters",
    ),
    "negative seed": (
        lambda: parameter_randomisation(Saliency("y"), CRITIC, TD, seed=-1, **GIVEN),
        InputError,
        "seed",
    ),
    "agreement by rows": (
        lambda: permutation_agreement(Saliency("y"), CRITIC, TD, by="rows", **GIVEN),
        InputError,
        "keys, features",
    ),
    "agreement of one element": (
        lambda: permutation_agreement(Saliency("y"), CRITIC, TD[:1], **GIVEN),
        InputError,
        "there is 1 element",
    ),
    "no episodes": (
        lambda: returns_when_hidden(Saliency("action"), reader(), Cue(), episodes=0),
        InputError,
        "episodes",
    ),
    "unknown kind": (
        lambda: returns_when_hidden(Saliency("action"), reader(), Cue(), which=["some"]),
        InputError,
        "most, random, least",
    ),
    "no rewards": (
        lambda: returns_when_hidden(Saliency("action"), reader(), Silent(), episodes=1),
        KeyNotFoundError,
        "no rewards",
    ),
    "a share above one": (
        lambda: Hiding(hooked_reader(Saliency("action")), share=2.0),
        InputError,
        "share",
    ),
    "several targets": (
        lambda: Hiding(hooked_reader(Saliency(Each("action")))),
        TargetError,
        "one target",
    ),
    "an unknown kind of hiding": (
        lambda: Hiding(hooked_reader(Saliency(Greedy("action"))), "some"),
        InputError,
        "most, random, least",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused(case):
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make()
