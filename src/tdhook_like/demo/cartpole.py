"""CartPole whose observation is a dictionary: two keys that matter and two that do not.

`cart` and `pole` are the state of gymnasium's own CartPole-v1. `noise` is unrelated to it. `echo`
is correlated with it (older, blurred readings of the pole's angle) but tells nothing that `pole`
does not tell better. What a trained policy really relies on can therefore be measured without any
attribution method: `permuted_return` plays whole episodes with one key's values exchanged.

Gusts of wind and a short track make `cart` matter as `pole` does. In still air and on the original
track (±2.4) a policy that only balances the pole survives most of an episode, wherever it drifts.
"""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.spaces import Box, Dict
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import ExplorationType, GymWrapper, set_exploration_type

from tdhook_like.errors import KeyNotFoundError

CAUSES = ("cart", "pole")
"""The keys that tell the state of the system."""

DISTRACTORS = ("noise", "echo")
"""The keys that a good policy does without."""

KEYS = CAUSES + DISTRACTORS
"""All observation keys, in the order in which the policy concatenates them."""

FEATURES: dict[str, tuple[str, str]] = {
    "cart": ("position", "velocity"),
    "pole": ("angle", "angular velocity"),
    "noise": ("noise 0", "noise 1"),
    "echo": ("angle 2 steps ago", "angle 4 steps ago"),
}
"""What each feature of each key is."""

UNITS = np.array([0.06, 0.2, 0.03, 0.25], dtype=np.float32)
"""What the four state variables are divided by, so that all features are of the order of one.

These are about their standard deviations while the pole is kept upright. In the raw units, the
angle (0.03 radians) would need far larger weights than the distractors do.
"""

EVERY = 25
"""Steps between gusts."""

EPISODE = 500
"""Steps, and so the return, of a full episode."""


class DistractedCartPole(gymnasium.ObservationWrapper[Any, Any, Any]):
    """CartPole in the wind, its state split into `cart` and `pole`, beside `noise` and `echo`.

    All randomness comes from the wrapped environment's own generator, so a seed given to `reset`
    settles the distractors too.

    Args:
        env: gymnasium's CartPole-v1.
        track: the cart must stay within plus or minus this position.
        gust: every half second (`EVERY` steps) the cart's velocity changes by up to plus or minus
            this.
        noise: standard deviation of `noise`, about that of every other feature.
        delays: how many steps ago each feature of `echo` reads the pole's angle (the first angle,
            early in an episode).
        blur: standard deviation of what is added to `echo`: about that of the angle itself under
            a good policy, so that they correlate by about two thirds.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        *,
        track: float = 0.3,
        gust: float = 0.25,
        noise: float = 1.0,
        delays: tuple[int, int] = (2, 4),
        blur: float = 1.0,
    ) -> None:
        super().__init__(env)
        self.cartpole = cast(CartPoleEnv, env.unwrapped)
        self.cartpole.x_threshold = track
        self.gust = gust
        self.noise = noise
        self.delays = delays
        self.blur = blur
        self._time = 0
        self._angles: deque[float] = deque(maxlen=max(delays) + 1)
        two = Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = Dict(dict.fromkeys(KEYS, two))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Resets as gymnasium does; forgets the old angles."""
        self._time = 0
        self._angles.clear()
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], Any, bool, bool, dict[str, Any]]:
        """Steps as gymnasium does, after a gust of wind if it is time for one."""
        self._time += 1
        if self._time % EVERY == 0:
            state = np.array(self.cartpole.state, dtype=np.float64)
            state[1] += self.cartpole.np_random.uniform(-self.gust, self.gust)
            self.cartpole.state = state
        return super().step(action)

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        """Turns the state, shape [4], into the dictionary; each value has shape [2], float32."""
        state = observation / UNITS
        self._angles.append(float(state[2]))
        newest = len(self._angles) - 1
        old = np.array([self._angles[max(newest - delay, 0)] for delay in self.delays])
        normal = self.cartpole.np_random.standard_normal((2, 2))
        return {
            "cart": state[:2],
            "pole": state[2:],
            "noise": (self.noise * normal[0]).astype(np.float32),
            "echo": (old + self.blur * normal[1]).astype(np.float32),
        }


def gym_env() -> DistractedCartPole:
    """The plain gymnasium environment."""
    return DistractedCartPole(gymnasium.make("CartPole-v1"))


def make_env(seed: int | None = None) -> GymWrapper:
    """The TorchRL environment: keys `cart`, `pole`, `noise`, `echo`; `action` is 0 or 1.

    Args:
        seed: given to `set_seed` at once.

    Example:
        >>> td = make_env(seed=0).rollout(3)
        >>> td["echo"].shape, td["action"].shape
        (torch.Size([3, 2]), torch.Size([3]))
    """
    env = GymWrapper(gym_env(), categorical_action_encoding=True)
    if seed is not None:
        env.set_seed(seed)
    return env


class _Lockstep:
    """Several episodes played side by side, so that the policy is called once per step."""

    def __init__(self, episodes: int, seed: int) -> None:
        self.envs = [gym_env() for _ in range(episodes)]
        # Independent streams: neighbouring seeds of the caller share no episode.
        seeds = np.random.SeedSequence(seed).generate_state(episodes)
        pairs = zip(self.envs, seeds, strict=True)
        self.now = [env.reset(seed=int(s))[0] for env, s in pairs]
        self.alive = list(range(episodes))
        self.returns = torch.zeros(episodes)

    def observe(self) -> TensorDict:
        """The present observations of the living episodes."""
        now = [self.now[i] for i in self.alive]
        values = {key: torch.from_numpy(np.stack([o[key] for o in now])) for key in KEYS}
        return TensorDict(values, batch_size=[len(now)])

    def step(self, actions: Tensor) -> None:
        """Steps the living episodes; those that end leave."""
        alive = []
        for i, action in zip(self.alive, actions.tolist(), strict=True):
            self.now[i], reward, terminated, truncated, _ = self.envs[i].step(action)
            self.returns[i] += float(reward)
            if not (terminated or truncated):
                alive.append(i)
        self.alive = alive


def greedy_play(
    policy: TensorDictModuleBase, *, episodes: int = 20, seed: int = 0
) -> tuple[TensorDictBase, Tensor]:
    """Plays episodes side by side, greedily; what was observed and what was earned.

    Args:
        policy: reads the keys, writes an integer `action`.
        episodes: number of episodes.
        seed: settles starts and distractors.

    Returns:
        all observations of all episodes, batch size [states], step by step; and the returns,
        shape [episodes].
    """
    game = _Lockstep(episodes, seed)
    seen: list[TensorDict] = []
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        while game.alive:
            td = game.observe()
            seen.append(td.clone())
            game.step(policy(td)["action"])
    states = cast(TensorDict, TensorDict.cat(seen))
    return states, game.returns


def permuted_return(
    policy: TensorDictModuleBase,
    key: str,
    *,
    episodes: int = 20,
    seed: int = 0,
    donors: TensorDictBase | None = None,
) -> Tensor:
    """Ground truth without any attribution: how well does the policy do without this key?

    At every step, the key's value is replaced by one observed at a random moment of undisturbed
    play. The values stay plausible one by one but no longer belong to the present state, so the
    return falls to the degree to which the policy relies on the key.

    Args:
        policy: reads the keys, writes an integer `action`.
        key: the key whose values are exchanged.
        episodes: number of episodes.
        seed: settles starts, distractors and draws.
        donors: observations to draw from, batch size [states]; by default those of `greedy_play`
            under another seed.

    Returns:
        the return of each episode, shape [episodes].

    Raises:
        KeyNotFoundError: `key` is none of `KEYS`.
    """
    if key not in KEYS:
        raise KeyNotFoundError(f"{key!r} is no key of this environment; choose one of {KEYS}")
    if donors is None:
        donors, _ = greedy_play(policy, episodes=episodes, seed=seed + 1)
    values = donors[key]
    game = _Lockstep(episodes, seed)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        while game.alive:
            td = game.observe()
            td[key] = values[torch.randint(len(values), (len(td),), generator=draws)]
            game.step(policy(td)["action"])
    return game.returns
