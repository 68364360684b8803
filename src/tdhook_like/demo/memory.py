"""A cue to remember: a task for a recurrent policy, and a policy for it, trained in seconds.

In every episode of `LENGTH` steps a `cue` of -1 or +1 is shown once, at step `SHOWN`, and must be
reported at the last step. All the while there is `noise`, larger than the cue. So the cause of the
last step's answer is known exactly: it is (`cue`, step `SHOWN`), and nothing else. The task was
made to tell attribution methods apart:

* Integrated gradients finds the cause. From a silent episode to the real one, the only thing that
  changes the answer for good is the cue.
* The plain gradient does not. It tells what a *further* cue would do, and the answer would react
  most to one at a step where none was shown: when the real one was shown, the memory is saturated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, InitTracker, TransformedEnv
from torchrl.modules import LSTMModule, set_recurrent_mode
from tqdm import tqdm

LENGTH = 12
"""Steps per episode."""

SHOWN = 3
"""The step, counted from 0, at which the cue is shown."""


class CueMemory(EnvBase):
    """Shows a cue once and asks for it at the end; a batch of episodes runs in step.

    Observations: `cue`, shape [episodes, 1], is -1 or +1 at step `SHOWN` and 0 at the others;
    `noise`, shape [episodes, 2], is normal. The `action`, shape [episodes], is 0 or 1; the reward
    is 1 if at the last step the action is 1 after a positive cue or 0 after a negative one.

    Args:
        episodes: how many episodes run side by side.
        noise: standard deviation of `noise`; twice the size of the cue by default.
        seed: settles cues and noise.
    """

    def __init__(self, episodes: int, *, noise: float = 2.0, seed: int = 0) -> None:
        super().__init__(batch_size=torch.Size([episodes]))
        self.noise = noise
        one = torch.Size([episodes, 1])
        self.observation_spec = Composite(
            cue=Unbounded(one),
            noise=Unbounded(torch.Size([episodes, 2])),
            shape=self.batch_size,
        )
        self.action_spec = Categorical(2, shape=self.batch_size)
        self.reward_spec = Unbounded(one)
        self.done_spec = Composite(
            done=Binary(shape=one, dtype=torch.bool),
            terminated=Binary(shape=one, dtype=torch.bool),
            shape=self.batch_size,
        )
        self._draws = torch.Generator()
        self._time = 0
        self._answer = torch.zeros(episodes, dtype=torch.long)
        self.set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        self._draws.manual_seed(0 if seed is None else seed)

    def _observe(self) -> TensorDict:
        (n,) = self.batch_size
        cue = 2.0 * self._answer - 1.0 if self._time == SHOWN else torch.zeros(n)
        noise = self.noise * torch.randn(n, 2, generator=self._draws)
        return TensorDict(cue=cue.unsqueeze(-1), noise=noise, batch_size=self.batch_size)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDict:
        self._time = 0
        self._answer = torch.randint(2, self.batch_size, generator=self._draws)
        return self._observe()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self._time += 1
        last = self._time == LENGTH
        right = (tensordict["action"] == self._answer) & last
        ended = torch.full((*self.batch_size, 1), last)
        return self._observe().update(
            {"reward": right.unsqueeze(-1).float(), "done": ended, "terminated": ended.clone()}
        )


class Joined(nn.Module):
    """Concatenates its inputs along their last dimension, so that an LSTM can read several keys."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Maps tensors of shape [*B, n_i] to one of shape [*B, sum of n_i]."""
        return torch.cat(inputs, dim=-1)


class Argmax(nn.Module):
    """The greedy action."""

    def forward(self, logits: Tensor) -> Tensor:
        """Maps shape [*B, actions] to [*B]."""
        return logits.argmax(-1)


def make_memory_policy(hidden: int = 32) -> TensorDictSequential:
    """An untrained recurrent policy: `cue`, `noise`, `is_init` -> `logits`, `action`.

    As every policy with TorchRL's `LSTMModule`, it goes step by step in a rollout and over whole
    episodes, batch size [episodes, steps], under `set_recurrent_mode("recurrent")`.

    Args:
        hidden: units of the LSTM. With few, single units carry both the memory and the noise, and
            explanations get muddied; with 32 they are clear under all seeds that were tried.
    """
    states = ["memory_h", "memory_c"]
    modules: list[Callable[[TensorDictBase], TensorDictBase]] = [
        TensorDictModule(Joined(), in_keys=["cue", "noise"], out_keys=["joined"]),
        LSTMModule(
            input_size=3,
            hidden_size=hidden,
            in_keys=["joined", *states],
            out_keys=["features", *(("next", state) for state in states)],
        ),
        TensorDictModule(nn.Linear(hidden, 2), in_keys=["features"], out_keys=["logits"]),
        TensorDictModule(Argmax(), in_keys=["logits"], out_keys=["action"]),
    ]
    return TensorDictSequential(modules)


def make_memory_env(
    episodes: int, *, seed: int = 0, policy: TensorDictSequential | None = None
) -> TransformedEnv:
    """`CueMemory` with `is_init`, and with the policy's recurrent states if one is given.

    Example:
        >>> td = make_memory_env(4).rollout(LENGTH)
        >>> td["cue"].shape
        torch.Size([4, 12, 1])
    """
    env = TransformedEnv(CueMemory(episodes, seed=seed), InitTracker())
    for module in policy.modules() if policy is not None else ():
        if isinstance(module, LSTMModule):
            env.append_transform(module.make_tensordict_primer())
    return env


def recorded_episodes(episodes: int, *, seed: int = 0) -> TensorDictBase:
    """What is shown in whole episodes: `cue`, `noise`, `is_init`; batch size [episodes, LENGTH].

    What is shown does not depend on the actions, so these serve for training and for tests.
    """
    td = make_memory_env(episodes, seed=seed).rollout(LENGTH)
    return td.select("cue", "noise", "is_init")


def answers(td: TensorDictBase) -> Tensor:
    """The right last actions of recorded episodes: 1 after a positive cue, else 0."""
    return (td["cue"][:, SHOWN, 0] > 0).long()


def accuracy(policy: TensorDictSequential, td: TensorDictBase) -> float:
    """The fraction of recorded episodes that the policy answers rightly at the last step."""
    with torch.no_grad(), set_recurrent_mode("recurrent"):
        actions = policy(td.clone())["action"]
    return (actions[:, -1] == answers(td)).float().mean().item()


class LastAnswer(TensorDictModuleBase):
    """The policy as a map from whole episodes to their answers: what one explains here.

    The time dimension belongs to the keys, not to the batch: from `cue`, shape [*B, steps, 1], and
    `noise`, shape [*B, steps, 2], to the last step's `logits`, shape [*B, 2], and `action`, shape
    [*B]. So a target is one number per episode, and its attributions have a value per step.

    Args:
        policy: from `train_memory` or `make_memory_policy`.

    Example:
        >>> td = recorded_episodes(4)
        >>> td.batch_size = [4]
        >>> LastAnswer(make_memory_policy())(td)["logits"].shape
        torch.Size([4, 2])
    """

    def __init__(self, policy: TensorDictSequential) -> None:
        super().__init__()
        self.in_keys = ["cue", "noise"]
        self.out_keys = ["logits", "action"]
        self.policy = policy

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Plays the episodes through and writes the last step's outputs."""
        cue, noise = tensordict["cue"], tensordict["noise"]
        first = torch.arange(cue.shape[-2], device=cue.device) == 0
        whole = TensorDict(
            cue=cue,
            noise=noise,
            is_init=first.unsqueeze(-1).expand(*cue.shape[:-1], 1),
            batch_size=cue.shape[:-1],
        )
        with set_recurrent_mode("recurrent"):
            played = self.policy(whole)
        tensordict["logits"] = played["logits"][..., -1, :]
        tensordict["action"] = played["action"][..., -1]
        return tensordict


def train_memory(seed: int = 0, *, updates: int = 400, batch: int = 128) -> TensorDictSequential:
    """Trains a policy by cross-entropy of the last step's logits, in a few seconds.

    The right answer is known, so it is taught directly: this is sure to reach an accuracy of 1.0
    in hundreds of updates, where learning from the one reward at the end takes far longer and
    sometimes fails. Nothing tells the policy when the cue comes or which key to heed.

    Args:
        seed: settles initial weights and episodes; the global generator is left as it was.
        updates: steps of the optimiser.
        batch: fresh episodes per update.

    Returns:
        the policy, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = make_memory_policy()
        pool = recorded_episodes(updates * batch, seed=seed)
    optimiser = torch.optim.Adam(policy.parameters(), lr=1e-2)
    with set_recurrent_mode("recurrent"):
        for td in tqdm(pool.split(batch), desc="cue memory", leave=False):
            logits = policy(td)["logits"][:, -1]
            optimiser.zero_grad()
            nn.functional.cross_entropy(logits, answers(td)).backward()
            optimiser.step()
    return policy.eval()
