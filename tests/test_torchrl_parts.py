"""A hooked policy where torchrl's policies stand: in rollouts and in collectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs import InitTracker, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import LSTMModule

from tdhook_like import LRP, InputXGradient, IntegratedGradients, Method, Saliency
from torchrl_play import KEYS, assert_bit_equal, make_env, make_policy

METHODS: dict[str, Callable[[], Method]] = {
    "Saliency": lambda: Saliency(abs=False),
    "InputXGradient": InputXGradient,
    "LRP": LRP,
    "IntegratedGradients": lambda: IntegratedGradients(n_steps=4, gap_tolerance=None),
}
every_method = pytest.mark.parametrize("name", METHODS)


def play(policy: Any, env: Any = None, n: int = 12) -> TensorDictBase:
    """A few episodes, with actions drawn, from the same seed."""
    torch.manual_seed(5)
    env = make_env() if env is None else env
    with set_exploration_type(ExplorationType.RANDOM):
        return env.rollout(n, policy=policy, break_when_any_done=False)


@every_method
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_hooked_policy_plays_the_trajectory_that_the_policy_plays(name, training):
    policy = make_policy().train(training)
    expected = play(policy)
    with METHODS[name]().prepare(policy) as hooked:
        found = play(hooked)
    assert found.pop("attr").batch_size == (12,)
    assert_bit_equal(found.exclude("attr_gap"), expected)


@every_method
def test_no_step_of_a_rollout_carries_the_attribution_of_an_earlier_one(name):
    policy = make_policy().eval()
    with METHODS[name]().prepare(policy) as hooked:
        record = play(hooked)
        written = record.pop("attr")
        for step in range(12):
            fresh = hooked.observe(record[step].copy())["attr"]
            for key in KEYS:
                assert written[step][key].any()
                torch.testing.assert_close(fresh[key], written[step][key], rtol=1e-4, atol=1e-6)


def test_several_environments_side_by_side_are_played_as_without_the_wrapper():
    policy = make_policy()

    def make() -> SerialEnv:
        env = SerialEnv(2, [lambda: make_env(seed=1), lambda: make_env(seed=2)])
        env.set_seed(3)
        return env

    expected = play(policy, make())
    with LRP().prepare(policy) as hooked:
        found = play(hooked, make())
    assert found.pop("attr").batch_size == (2, 12)
    assert_bit_equal(found, expected)


def collect(policy: Any, **options: Any) -> list[TensorDictBase]:
    torch.manual_seed(7)
    options = {"frames_per_batch": 8, "total_frames": 24, **options}
    collector = Collector(make_env, policy, auto_register_policy_transforms=False, **options)
    collector.set_seed(0)
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    return batches


@every_method
@pytest.mark.parametrize("options", [{}, {"init_random_frames": 8}], ids=["plain", "random start"])
def test_a_collector_gathers_the_same_frames_with_a_hooked_policy(name, options):
    policy = make_policy()
    expected = collect(policy, **options)
    with METHODS[name]().prepare(policy) as hooked:
        found = collect(hooked, **options)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("attr", "attr_gap"):
            ours.pop(key, None)
        assert_bit_equal(ours, theirs)


def test_frames_that_a_collector_gathers_are_explained_by_what_was_done_there():
    policy = make_policy().eval()
    with InputXGradient().prepare(policy) as hooked:
        for batch in collect(hooked):
            written = batch.pop("attr")
            fresh = hooked.observe(batch)["attr"]
            for key in KEYS:
                torch.testing.assert_close(fresh[key], written[key], rtol=1e-4, atol=1e-6)


def test_a_recurrent_policy_carries_its_state_from_step_to_step_as_without_the_wrapper():
    rnn = LSTMModule(
        1, 8, in_keys=["th", "h", "c"], out_keys=["embed", ("next", "h"), ("next", "c")]
    )
    head = TensorDictModule(nn.Linear(8, 1), in_keys=["embed"], out_keys=["action"])
    policy = TensorDictSequential(rnn, head)

    def make() -> TransformedEnv:
        env = make_env().append_transform(InitTracker())
        return env.append_transform(rnn.make_tensordict_primer())

    expected = play(policy, make())
    with Saliency("action", abs=False).prepare(policy) as hooked:
        found = play(hooked, make())
    attributed = found.pop("attr")
    assert_bit_equal(found, expected)
    seen = attributed["h"].flatten(1).abs().sum(1) > 0
    assert torch.equal(seen, ~found["is_init"].squeeze(-1))


@pytest.mark.slow
def test_a_hooked_policy_travels_to_the_workers_of_a_collector():
    policy = make_policy().eval()
    with InputXGradient().prepare(policy) as hooked:
        collector = MultiSyncCollector(
            [make_env],
            hooked,
            frames_per_batch=8,
            total_frames=16,
            auto_register_policy_transforms=False,
        )
        for batch in collector:
            written = batch.pop("attr")
            fresh = hooked.observe(batch.clone())["attr"]
            for key in KEYS:
                torch.testing.assert_close(fresh[key], written[key], rtol=1e-4, atol=1e-6)
            collector.update_policy_weights_(hooked)
        collector.shutdown()
