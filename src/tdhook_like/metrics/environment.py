"""Does the policy need what the explanation points to? Hide it, and play."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase, set_interaction_type
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook_like.attribution.drawing import drawn_from
from tdhook_like.attribution.method import Method
from tdhook_like.attribution.perturbation import check_seed, whole_number
from tdhook_like.attribution.wrapper import private_draws
from tdhook_like.baselines import BaselineSpec, resolve
from tdhook_like.baselines import check as check_baselines
from tdhook_like.context import HookedModule
from tdhook_like.errors import InputError, KeyNotFoundError, TargetError
from tdhook_like.keys import as_tuple
from tdhook_like.metrics.curves import first_ranks
from tdhook_like.metrics.table import aligned
from tdhook_like.randomness import ForeignDraws, restore_rng, rng_state
from tdhook_like.targets import Each

__all__ = ["Hiding", "Returns", "returns_when_hidden"]

Fill = BaselineSpec | Mapping[NestedKey, BaselineSpec] | TensorDictBase | None
WHICH = ("most", "random", "least")


class Environment(Protocol):
    """As much of torchrl's environments as is needed here."""

    def set_seed(self, seed: int, /) -> Any: ...

    def rollout(self, max_steps: int, policy: Any) -> Any: ...


class Hiding(TensorDictModuleBase):
    """A policy from which some features are hidden at each step, by how relevant they are there.

    At every call the policy is asked and explained on what there is, features are hidden, and the
    policy is asked again: what it writes then is what comes out. The inputs stay as they were.

    Args:
        hooked: The policy, hooked for the method that ranks features; with one target.
        which: ``"most"`` or ``"least"`` relevant ones by size, or ``"random"`` ones.
        share: How many of all features, at least one; 0 for none.
        fill: What stands for "nothing there": a baseline, for all keys or by key; zeros if None. Or a
            TensorDict of observations ``[n]``, one of which is drawn for every element.
        seed: Of the generators that random features and baselines are drawn from.

    Raises:
        TargetError: If there are several targets to rank features by.
        InputError: If an option makes no sense.

    >>> from tensordict import TensorDict
    >>> from tdhook_like import InputXGradient
    >>> net = nn.Linear(2, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[5.0, 1.0]]))
    >>> with InputXGradient("action").prepare(net, ["x"], ["action"]) as hooked:
    ...     td = Hiding(hooked, "most", 0.5)(TensorDict({"x": torch.ones(1, 2)}, [1]))
    >>> td["action"], td["x"]
    (tensor([[1.]], grad_fn=...), tensor([[1., 1.]]))
    """

    def __init__(
        self,
        hooked: HookedModule,
        which: str = "most",
        share: float = 0.2,
        fill: Fill = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        context = hooked.context
        if which not in WHICH:
            raise InputError(f"which={which!r}: choose one of {', '.join(WHICH)}.")
        if not 0 <= share <= 1:
            raise InputError(f"share must lie in [0, 1], got {share!r}.")
        if len(context.targets) > 1 or isinstance(next(iter(context.targets.values())), Each):
            raise TargetError("Features are ranked by one target: give a method with one.")
        check_seed(seed)
        fill = drawn_from(fill) if isinstance(fill, TensorDictBase) else fill
        check_baselines(fill, context.keys or tuple(context.in_keys))
        self.hooked, self.which, self.share, self.fill = hooked, which, share, fill
        keys: Any = list(context.in_keys), list(context.out_keys)
        self.in_keys, self.out_keys = keys
        self._draw = torch.Generator().manual_seed(seed)
        self._baselines = private_draws(seed, [])

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes what the policy does where it does not see everything."""
        context = self.hooked.context
        keys, values = [], []
        if self.share:
            found = self.hooked(tensordict.copy())
            for key in context.keys or tuple(context.in_keys):
                there = found.get((context.method.root, *as_tuple(key)), None)
                if isinstance(there, Tensor):
                    keys.append(key)
                    values.append(there)
        seen = tensordict.copy()
        if keys:
            inputs = tuple(tensordict.get(key).detach() for key in keys)
            with ForeignDraws(), self._baselines:
                nothing = resolve(self._named(keys), tensordict, tuple(keys), inputs)
            for key, x, b, hide in zip(
                keys, inputs, nothing, self._hidden(values, tensordict.batch_dims), strict=True
            ):
                seen.set(key, torch.where(hide, b, x))
        outputs = context.module(seen)
        for key in context.out_keys:
            value = outputs.get(key, None)
            if value is not None:
                tensordict.set(key, value)
        return tensordict

    def _named(self, keys: Sequence[NestedKey]) -> Any:
        if not isinstance(self.fill, Mapping):
            return self.fill
        known = {as_tuple(key) for key in keys}
        return {key: spec for key, spec in self.fill.items() if as_tuple(key) in known}

    def _hidden(self, values: Sequence[Tensor], dims: int) -> list[Tensor]:
        """Which features of each key are hidden, of the values' shapes."""
        if self.which == "random":
            values = [
                torch.rand(v.shape, dtype=torch.float64, generator=self._draw).to(v.device)
                for v in values
            ]
        elif self.which == "least":
            values = [-v.abs() for v in values]
        ranks, count = first_ranks(values, dims, absolute=self.which == "most")
        n = max(round(self.share * count), 1)
        return [rank < n for rank in ranks]


@dataclass(frozen=True)
class Returns:
    """Returns of whole episodes, undisturbed and with features hidden. Prints as a table.

    Attributes:
        returns: By what was hidden, ``"nothing"`` first: the return of each episode, ``[episodes]``.
        share: How many of all features were hidden at each step.
    """

    returns: Mapping[str, Tensor]
    share: float

    @property
    def means(self) -> dict[str, float]:
        """The mean return, by what was hidden."""
        return {which: values.mean().item() for which, values in self.returns.items()}

    @property
    def points(self) -> float:
        """How much more it costs to hide the most relevant features than random ones, on average."""
        return self.means["random"] - self.means["most"]

    def __str__(self) -> str:
        lines = [("hidden", "mean return", "± standard error")]
        for which, values in self.returns.items():
            error = (
                values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(torch.nan)
            )
            lines.append((which, f"{values.mean():.4g}", f"{error:.2g}"))
        episodes = len(next(iter(self.returns.values())))
        return "\n".join(
            [*aligned(lines), f"{self.share:.0%} of the features at each step, {episodes} episodes"]
        )


def returns_when_hidden(
    method: Method,
    policy: nn.Module,
    env: Environment,
    *,
    share: float = 0.2,
    fill: Fill = None,
    which: Sequence[str] = WHICH,
    episodes: int = 5,
    max_steps: int = 1000,
    seed: int = 0,
    reward: NestedKey = ("next", "reward"),
    done: NestedKey = ("next", "done"),
) -> Returns:
    """Plays with the most relevant features of each step hidden, and with as many random ones.

    If the explanation points to what the policy goes by, hiding that costs more of the return than
    hiding anything else. All variants play the same episodes, deterministically.

    Source: the idea of deletion (Samek et al. 2017), measured in the environment.

    Args:
        method: What ranks features, by the size of attributions; with one target.
        policy: What plays.
        env: Has ``set_seed(seed)`` and ``rollout(max_steps, policy)``, as torchrl's environments.
        share: How many of all features are hidden at each step, at least one.
        fill: What stands for "nothing there": a baseline, for all keys or by key; zeros if None.
            A TensorDict of observations ``[n]``, or ``FromBuffer(replay_buffer)``, puts values of
            another moment in their place.
        which: Some of ``"most"``, ``"random"``, ``"least"``.
        episodes: How many are played.
        max_steps: When an episode is broken off.
        seed: Of the first episode; the others count on. Also of what is drawn.
        reward: Where rewards are in a rollout.
        done: Where it says that an episode is over.

    Raises:
        InputError: If an option makes no sense.
        KeyNotFoundError: If a rollout has no rewards at ``reward``.
        TargetError: If there are several targets to rank features by.
    """
    whole_number("episodes", episodes, 1)
    whole_number("max_steps", max_steps, 1)
    wrong = [kind for kind in which if kind not in WHICH]
    if wrong or isinstance(which, str):
        raise InputError(f"which={which!r}: choose some of {', '.join(WHICH)}.")
    found: dict[str, Tensor] = {}
    state = rng_state([])
    try:
        with ForeignDraws(), method.prepare(policy) as hooked:
            for kind in ("nothing", *which):
                hidden = Hiding(hooked, "most", 0.0)
                if kind != "nothing":
                    hidden = Hiding(hooked, kind, share, fill, seed)
                played = [
                    _played(env, hidden, max_steps, seed + i, reward, done) for i in range(episodes)
                ]
                found[kind] = torch.cat(played)
    finally:
        restore_rng(state)
    return Returns(found, share)


def _played(
    env: Environment,
    policy: nn.Module,
    max_steps: int,
    seed: int,
    reward: NestedKey,
    done: NestedKey,
) -> Tensor:
    """The return of one episode of each of the environment's members."""
    torch.manual_seed(
        seed
    )  # some environments draw from what everybody shares; put back in the end
    env.set_seed(seed)
    with torch.no_grad(), set_interaction_type(InteractionType.DETERMINISTIC):
        td = env.rollout(max_steps, policy)
    rewards, over = td.get(reward, None), td.get(done, None)
    if rewards is None:
        raise KeyNotFoundError(f"The rollout has no rewards at {reward!r}: name their key.")
    time = td.batch_dims - 1
    rewards = (
        rewards.double().flatten(td.batch_dims).sum(-1) if rewards.ndim > td.batch_dims else rewards
    )
    if over is not None:
        ended = over.reshape(*td.batch_size, -1).any(-1).cumsum(time)
        before = ended - over.reshape(*td.batch_size, -1).any(-1).long()
        rewards = torch.where(before > 0, torch.zeros_like(rewards), rewards)  # a next episode's
    return rewards.sum(time).reshape(-1).cpu()
