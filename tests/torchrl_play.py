"""A pendulum with named keys, and small policies for it: what the tests of torchrl's parts play."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.envs import PendulumEnv, StepCounter, TransformedEnv, UnsqueezeTransform
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator

KEYS = ("th", "thdot")


class Joined(nn.Module):
    """A network that reads several keys side by side; dropout, so that running it draws numbers."""

    def __init__(self, n_out: int, *tail: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, n_out), *tail
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(torch.cat(inputs, -1))


def make_policy(seed: int = 0) -> Any:
    """A squashed Gaussian over the torque."""
    torch.manual_seed(seed)
    net = TensorDictModule(
        Joined(2, NormalParamExtractor()), in_keys=list(KEYS), out_keys=["loc", "scale"]
    )
    return ProbabilisticActor(
        net,
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -2.0, "high": 2.0},
        return_log_prob=True,
    )


def make_critic(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return ValueOperator(Joined(1), in_keys=list(KEYS))


def make_env(seed: int = 0, max_steps: int = 5) -> TransformedEnv:
    """The pendulum, its angle and speed as [1] each, in episodes of a few steps."""
    shapes = UnsqueezeTransform(-1, in_keys=list(KEYS), in_keys_inv=list(KEYS))
    return TransformedEnv(PendulumEnv(seed=seed), shapes).append_transform(StepCounter(max_steps))


def record(policy: Any, n: int = 32) -> TensorDictBase:
    """A few episodes with actions drawn, always the same."""
    torch.manual_seed(11)
    with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        return make_env().rollout(n, policy=policy, break_when_any_done=False)


def assert_bit_equal(found: TensorDictBase, expected: TensorDictBase) -> None:
    """The same batch size, the same keys and, everywhere, the same bits."""
    assert found.batch_size == expected.batch_size
    assert set(found.keys(True, True)) == set(expected.keys(True, True))
    unequal = [key for key in found.keys(True, True) if not found.get(key).equal(expected.get(key))]
    assert not unequal, f"other bits at {unequal}"
