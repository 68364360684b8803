"""A world that wrong uses meet, models that misbehave, and what a record of a wrong use is."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torch.distributions import Categorical

from tdhook_like import LRP, IntegratedGradients, Saliency, TdhookLikeError
from tdhook_like.attribution.lrp import Rule

NAN, INF = float("nan"), float("inf")


class Net(nn.Module):
    """Reads a float, a nested float and an integer key; writes three logits and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6))
        self.mission = nn.Embedding(5, 2)
        self.head = nn.Linear(10, 3)
        self.value = nn.Linear(10, 1)
        self.scale, self.idle = nn.Linear(1, 1), nn.Identity()

    def forward(self, observation, speed, mission):
        x = torch.cat([self.encoder(observation), speed, self.mission(mission)], -1)
        return self.head(x), self.value(x) * self.scale(x.new_ones(1))


@dataclass
class World:
    """What a wrong use meets; a record may make one thing of it wrong."""

    model: Any
    td: TensorDict
    observing: bool = False

    def explain(self, method: Any, model: nn.Module | None = None, **keys: Any) -> Any:
        with method.prepare(self.model if model is None else model, **keys) as hooked:
            return (hooked.observe if self.observing else hooked)(self.td)

    def opened(self, method: Any) -> Any:
        return method.prepare(self.model).__enter__()

    def left(self, method: Any) -> Any:
        with method.prepare(self.model) as hooked:
            return hooked

    def twice(self, method: Any) -> None:
        with method.prepare(self.model) as hooked:
            hooked._context.__enter__()


def world() -> World:
    model = TensorDictModule(
        Net(),
        in_keys=["observation", ("agents", "speed"), "mission"],
        out_keys=["logits", "state_value"],
    )
    td = TensorDict(
        {
            "observation": torch.randn(5, 4),
            ("agents", "speed"): torch.randn(5, 2),
            "mission": torch.randint(5, (5,)),
            "action": torch.randint(3, (5,)),
            "wide": torch.zeros(5, 7),
        },
        [5],
    )
    return World(model, td)


def heads() -> Any:
    """A policy with a composite distribution: two heads, hence no obvious target."""
    return ProbabilisticTensorDictSequential(
        made(Line, out_keys=[("params", "steer", "logits")]),
        made(Line, out_keys=[("params", "gas", "logits")]),
        ProbabilisticTensorDictModule(
            in_keys=["params"],
            out_keys=["steer", "gas"],
            distribution_class=CompositeDistribution,
            distribution_kwargs={"distribution_map": {"steer": Categorical, "gas": Categorical}},
        ),
    )


class Quotient(nn.Module):
    def forward(self, x):
        return torch.cat([x / x, x[:, :2]], -1)


class Line(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 1)


def made(module: Callable[[], nn.Module], read: str = "observation", out_keys: Any = ("y",)) -> Any:
    with torch.random.fork_rng():  # the RNG is watched
        return TensorDictModule(module(), in_keys=[read], out_keys=list(out_keys))


class Overwrites(nn.Module):
    def forward(self, x):
        return x.add_(1)


class Fickle(nn.Module):
    """Gives something else each time, and no seed can help it."""

    calls = itertools.count(1)

    def forward(self, x):
        return x * next(self.calls)


class Rows:
    """A buffer with one key; gives ``n`` rows where it must give as many as are asked for."""

    def __init__(self, key: str, n: int | None = None) -> None:
        self.key, self.n = key, n

    def sample(self, n: int) -> TensorDict:
        n = n if self.n is None else self.n
        return TensorDict({self.key: torch.zeros(n, 4)}, [n])


class Narrow(Rule):
    def surrogate(self, module, inputs, output):
        return output[:, :1]


class Shares(Rule):
    def relevance(self, module, inputs, output, R_out):
        return R_out


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        return torch.jit.script(Line())


@dataclass(frozen=True)
class Wrong:
    name: str
    do: Callable[[World], object]
    error: type[TdhookLikeError]
    says: tuple[str, ...]
    given: Callable[[World], object] = field(default=lambda w: None)


def method(made: Callable[[], Any], **keys: Any) -> Callable[[World], object]:
    """The wrong use of making a method and explaining with it."""
    return lambda w: w.explain(made(), **keys)


def target(made: Callable[[], Any]) -> Callable[[World], object]:
    return lambda w: w.explain(Saliency(made()))


def rule(made: Callable[[], Rule], path: str = "module.head") -> Callable[[World], object]:
    """The wrong use of putting a rule on one submodule."""

    def do(w: World) -> object:
        given = made()
        both = {"a": ("logits", 0), "b": VALUE}
        return w.explain(LRP(lambda name, module: given if name == path else None, both))

    return do


def baseline(made: Callable[[], Any], **keys: Any) -> Callable[[World], object]:
    return method(lambda: IntegratedGradients(VALUE, baselines=made(), gap_tolerance=None), **keys)


def plain(**keys: Any) -> Callable[[World], object]:
    """The wrong use of preparing a module that has no keys of its own."""
    return lambda w: w.explain(Saliency("y"), made(Line).module, **keys)


def put(key: Any, value: Callable[[], Any]) -> Callable[[World], object]:
    return lambda w: w.td.set(key, value())


def spoil(value: float) -> Callable[[World], object]:
    return lambda w: w.td["observation"][1, 2].fill_(value)


VALUE = "state_value"
value_of = partial(Saliency, VALUE)
