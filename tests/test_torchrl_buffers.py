"""Attributions in what a replay buffer samples: explained there, and nothing else changed."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ReplayBuffer,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
)
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type
from torchrl.modules import ProbabilisticActor

from pristine import assert_same, snapshot
from tdhook_like import LRP, ContextError, InputXGradient, IntegratedGradients, Saliency
from tdhook_like.rl import AttributionTransform
from torchrl_play import KEYS, assert_bit_equal, make_critic, make_env, make_policy, record

STORAGES = {
    "in memory": lambda path: LazyTensorStorage(64),
    "memory-mapped": lambda path: LazyMemmapStorage(64, scratch_dir=path),
}
every_storage = pytest.mark.parametrize("storage", STORAGES)
every_prefetch = pytest.mark.parametrize("prefetch", [None, 2])


def filled(policy: Any, storage: str, path: Any, **options: Any) -> ReplayBuffer:
    buffer = TensorDictReplayBuffer(storage=STORAGES[storage](path), batch_size=8, **options)
    buffer.extend(record(policy))
    return buffer


@every_storage
@every_prefetch
@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
def test_samples_are_explained_at_what_was_recorded_and_the_storage_is_left_alone(
    storage, prefetch, grad, tmp_path
):
    policy = make_policy()
    buffer = filled(policy, storage, tmp_path, prefetch=prefetch)
    before, keys = snapshot(policy), set(buffer[:].keys(True, True))
    with InputXGradient().prepare(policy) as hooked:
        buffer.append_transform(AttributionTransform(hooked))
        with grad():
            samples = [buffer.sample() for _ in range(4)]
        for sample in samples:
            fresh = hooked.observe(sample.exclude("attr"))
            for key in KEYS:
                torch.testing.assert_close(sample["attr", key], fresh["attr", key])
                assert not sample["attr", key].requires_grad
        buffer.shutdown()
    assert_same(before, snapshot(policy), ignoring=["random state"])
    assert set(buffer.storage[:].keys(True, True)) == keys


@every_storage
def test_a_buffer_gives_the_same_samples_with_the_transform_and_without(storage, tmp_path):
    policy = make_policy()

    def samples(*transforms: AttributionTransform) -> list[TensorDictBase]:
        buffer = filled(policy, storage, tmp_path / str(len(transforms)))
        for transform in transforms:
            buffer.append_transform(transform)
        torch.manual_seed(0)
        return [buffer.sample() for _ in range(3)]

    with LRP().prepare(policy) as hooked:
        found = samples(AttributionTransform(hooked))
    for ours, theirs in zip(found, samples(), strict=True):
        assert_bit_equal(ours.exclude("attr"), theirs)


def test_prefetching_threads_draw_no_batch_twice(tmp_path):
    # Observing in one thread must not rewind what another one draws from.
    policy = make_policy()
    buffer = filled(policy, "in memory", tmp_path, prefetch=2)
    with IntegratedGradients(n_steps=8, gap_tolerance=None).prepare(policy) as hooked:
        buffer.append_transform(AttributionTransform(hooked))
        torch.manual_seed(0)
        drawn = [tuple(buffer.sample()["index"].tolist()) for _ in range(40)]
        buffer.shutdown()
    assert len(set(drawn)) == len(drawn)


class Slow(nn.Module):
    """Takes its time, and draws numbers if it is told to."""

    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.draws = draws

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.1)
        return (x * torch.rand(()) if self.draws else x).sum(-1, keepdim=True)


@pytest.mark.parametrize("draws", [False, True], ids=["a steady model", "a model that draws"])
def test_observing_in_another_thread_rewinds_nothing_that_is_drawn_meanwhile(draws):
    with Saliency("y").prepare(Slow(draws), in_keys=["x"], out_keys=["y"]) as hooked:
        td = TensorDict({"x": torch.ones(1, 2)}, [1])
        torch.manual_seed(0)
        expected = torch.rand(8)
        torch.manual_seed(0)
        thread = threading.Thread(target=hooked.observe, args=(td,))
        thread.start()
        time.sleep(0.05)
        first = torch.rand(4)
        thread.join()
        assert torch.equal(torch.cat([first, torch.rand(4)]), expected)


def test_observing_in_another_thread_leaves_the_exploration_type_alone():
    # It is one for the whole process: a collector explores by it while samples are explained.
    net = TensorDictModule(
        nn.Sequential(Slow(draws=False), nn.Linear(1, 3)), in_keys=["x"], out_keys=["logits"]
    )
    policy = ProbabilisticActor(
        net, in_keys=["logits"], distribution_class=torch.distributions.Categorical
    )
    with Saliency(("logits", 0)).prepare(policy) as hooked:
        td = TensorDict({"x": torch.ones(1, 2)}, [1])
        thread = threading.Thread(target=hooked.observe, args=(td,))
        thread.start()
        time.sleep(0.05)
        with set_exploration_type(ExplorationType.RANDOM):
            thread.join()
            assert exploration_type() is ExplorationType.RANDOM
        assert exploration_type() is None


def test_a_buffer_does_not_switch_or_move_the_model_of_its_transform(tmp_path):
    policy = make_policy().train()
    transform = AttributionTransform(Saliency(), policy)
    buffer = filled(policy, "in memory", tmp_path)
    buffer.append_transform(transform)
    transform.to(torch.float64)
    transform.requires_grad_(False)
    assert policy.training and all(p.requires_grad for p in policy.parameters())
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert not list(transform.parameters()) and not list(transform.children())
    transform.close()
    with pytest.raises(ContextError, match="left"):
        buffer.sample()


def test_samples_follow_the_weights_as_they_are_trained(tmp_path):
    critic = make_critic()
    sampler = SamplerWithoutReplacement(shuffle=False)
    buffer = filled(make_policy(), "in memory", tmp_path, sampler=sampler)
    buffer.append_transform(AttributionTransform(Saliency(abs=False), critic))
    first = buffer.sample()
    with torch.no_grad():
        for parameter in critic.module.net[-1].parameters():
            parameter.mul_(2.0)
    for _ in range(3):  # the storage's four batches in turn, then the first again
        buffer.sample()
    again = buffer.sample()
    assert torch.equal(again["th"], first["th"])
    torch.testing.assert_close(again["attr", "th"], 2.0 * first["attr", "th"])


def test_an_environment_says_that_the_transform_belongs_into_a_buffer():
    env = make_env().append_transform(AttributionTransform(Saliency(), make_critic()))
    with pytest.raises(ContextError, match="replay buffer"):
        env.rollout(1)


def test_what_a_transform_explains_must_be_named_once():
    critic = make_critic()
    with pytest.raises(ContextError, match="Which module"):
        AttributionTransform(Saliency())
    with Saliency().prepare(critic) as hooked, pytest.raises(ContextError, match="already"):
        AttributionTransform(hooked, critic)
    with pytest.raises(ContextError, match="left"):
        AttributionTransform(hooked)
    with pytest.raises(ContextError, match="got int"):
        AttributionTransform(3)  # pyright: ignore[reportArgumentType]
    assert repr(AttributionTransform(Saliency(), critic)) == "AttributionTransform(Saliency)"
