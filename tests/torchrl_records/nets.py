"""Inputs, networks and policies of a few numbers each, on torchrl's own classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import (
    CompositeDistribution,
    NormalParamExtractor,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor, nn
from torch import distributions as dist
from torchrl.data import Bounded
from torchrl.modules import (
    MLP,
    DecisionTransformerInferenceWrapper,
    IndependentNormal,
    MultiAgentMLP,
    ProbabilisticActor,
    TanhDelta,
    ValueOperator,
)
from torchrl.modules.models import DuelingCnnDQNet, DuelingMlpDQNet
from torchrl.modules.models.exploration import gSDEModule

B, T, OBS, ACTIONS, AGENTS, HIDDEN = 5, 4, 6, 3, 3, 8


def observations(**more: Callable[[], Tensor]) -> TensorDict:
    """A batch [B] of observations, of something that no model reads, and of ``more``."""
    td = TensorDict({"observation": torch.randn(B, OBS), "reward": torch.randn(B, 1)}, [B])
    for key, make in more.items():
        td.set(key, make())
    return td


def pixels(size: int = 8, channels: int = 2) -> TensorDict:
    return TensorDict({"pixels": torch.rand(B, channels, size, size)}, [B])


def agents(*shape: int) -> TensorDict:
    """Observations [B, AGENTS, *shape] below "agents", whose batch size is [B, AGENTS]."""
    inner = TensorDict({"observation": torch.randn(B, AGENTS, *(shape or (OBS,)))}, [B, AGENTS])
    return TensorDict({"agents": inner, "observation": torch.randn(B, OBS)}, [B])


def steps(*batch: int, states: Sequence[str] = ("h", "c"), resets: bool = False) -> TensorDict:
    """Observations [*batch] with the flags of torchrl's InitTracker, and recurrent states."""
    is_init = torch.zeros(*batch, 1, dtype=torch.bool)
    if resets:
        is_init[0, 0], is_init[1, 2], is_init[2, 1:3] = True, True, True
    td = TensorDict({"observation": torch.randn(*batch, OBS), "is_init": is_init}, batch)
    for name in states:
        td.set(name, torch.randn(*batch, 1, HIDDEN))
    return td


def mlp(n_in: int = OBS, n_out: int = ACTIONS, activation: type[nn.Module] = nn.ReLU) -> MLP:
    return MLP(n_in, n_out, depth=2, num_cells=HIDDEN, activation_class=activation)


def trunk() -> TensorDictModule:
    net = nn.Sequential(nn.Linear(OBS, HIDDEN), nn.ReLU())
    return TensorDictModule(net, in_keys=["observation"], out_keys=["hidden"])


def logits(in_key: str = "observation", n_in: int = OBS) -> TensorDictModule:
    return TensorDictModule(mlp(n_in), in_keys=[in_key], out_keys=["logits"])


def gaussian(in_key: str = "observation", n_in: int = OBS) -> TensorDictModule:
    net = nn.Sequential(mlp(n_in, 2 * ACTIONS), NormalParamExtractor())
    return TensorDictModule(net, in_keys=[in_key], out_keys=["loc", "scale"])


def actor(module: TensorDictModuleBase, kind: Any, *in_keys: NestedKey, **options: Any) -> Any:
    return ProbabilisticActor(
        module, in_keys=list(in_keys), distribution_class=kind, return_log_prob=True, **options
    )


def sampler(kind: Any, *in_keys: str, **options: Any) -> Any:
    """A policy from one network, for parameters of that name."""
    module = logits() if in_keys == ("logits",) else gaussian()
    return actor(module, kind, *in_keys, **options)


def deterministic() -> TensorDictModule:
    return TensorDictModule(mlp(), in_keys=["observation"], out_keys=["param"])


def bounded() -> Bounded:
    return Bounded(-1.0, 1.0, (ACTIONS,))


class Critics(TensorDictModuleBase):
    """Stacked critics under vmap, as in torchrl's losses: ``state_action_value`` [B, n, 1]."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation", "action"], ["state_action_value"]
        members = [ValueOperator(mlp(OBS + ACTIONS, 1), in_keys=self.in_keys) for _ in range(n)]
        self.params = TensorDictParams(TensorDict.from_modules(*members))
        self.member = members[0]

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        def value(params: TensorDictBase, given: TensorDictBase) -> Tensor:
            with params.to_module(self.member):
                return self.member(given)["state_action_value"]

        given = td.select(*self.in_keys)
        values = torch.vmap(value, (0, None), out_dims=1)(self.params, given)
        return td.set("state_action_value", values)


def recurrent(kind: Any, states: Sequence[str], **options: Any) -> TensorDictSequential:
    """A recurrent embedding and a linear head."""
    rnn = kind(
        OBS,
        HIDDEN,
        in_keys=["observation", *states],
        out_keys=["embed", *[("next", name) for name in states]],
        **options,
    )
    head = TensorDictModule(nn.Linear(HIDDEN, ACTIONS), in_keys=["embed"], out_keys=["logits"])
    return TensorDictSequential(rnn, head)


def state_dependent() -> Any:
    """A policy with state-dependent exploration: its scale is a function of the observation too."""
    noisy = TensorDictModule(
        gSDEModule(ACTIONS, OBS),
        in_keys=["mean", "observation", "noise"],
        out_keys=["loc", "scale", "explored", "noise"],
    )
    net = TensorDictModule(mlp(), in_keys=["observation"], out_keys=["mean"])
    return actor(TensorDictSequential(net, noisy), IndependentNormal, "loc", "scale")


def multi_agent_mlp(n_in: int, n_out: int, *, shared: bool, centralised: bool) -> MultiAgentMLP:
    return MultiAgentMLP(
        n_in,
        n_out,
        AGENTS,
        centralized=centralised,
        share_params=shared,
        depth=1,
        num_cells=HIDDEN,
        activation_class=nn.ReLU,
    )


def of_agents(n_out: int, out_key: str, *, shared: bool, centralised: bool) -> TensorDictModule:
    net = multi_agent_mlp(OBS, n_out, shared=shared, centralised=centralised)
    return TensorDictModule(
        net, in_keys=[("agents", "observation")], out_keys=[("agents", out_key)]
    )


def dueling_mlp(n_in: int = OBS) -> DuelingMlpDQNet:
    features = {"in_features": n_in, "num_cells": [HIDDEN], "out_features": HIDDEN}
    heads = {"in_features": HIDDEN, "num_cells": HIDDEN}
    activation = {"activation_class": nn.ReLU}
    return DuelingMlpDQNet(
        ACTIONS, mlp_kwargs_feature=features | activation, mlp_kwargs_output=heads | activation
    )


def dueling_cnn(n_features: int) -> DuelingCnnDQNet:
    """Two channels in; ``n_features`` is what its convolutions leave of a picture, flattened."""
    layers = {"in_features": 2, "num_cells": [3, 3], "kernel_sizes": [3, 3], "strides": [2, 1]}
    heads = {"in_features": n_features, "num_cells": HIDDEN, "depth": 1}
    activation = {"activation_class": nn.ReLU}
    return DuelingCnnDQNet(ACTIONS, cnn_kwargs=layers | activation, mlp_kwargs=heads | activation)


def composite() -> Any:
    """A policy with a discrete and a continuous head."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(OBS, ACTIONS + 2)

        def forward(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            out = self.net(observation)
            return out[..., :ACTIONS], out[..., -2:-1], nn.functional.softplus(out[..., -1:])

    params = [
        ("params", "gear", "logits"),
        ("params", "steer", "loc"),
        ("params", "steer", "scale"),
    ]
    heads = {"gear": dist.Categorical, "steer": dist.Normal}
    return ProbabilisticActor(
        TensorDictModule(Heads(), in_keys=["observation"], out_keys=params),
        in_keys=["params"],
        distribution_class=CompositeDistribution,
        distribution_kwargs={
            "distribution_map": heads,
            "name_map": {"gear": ("action", "gear"), "steer": ("action", "steer")},
        },
        return_log_prob=True,
    )


class SequenceNet(nn.Module):
    """Stands for a decision transformer: reads a whole sequence, gives a parameter per step.

    (torchrl's own needs the ``transformers`` package; what matters to the wrapper is the shapes.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.step = mlp(OBS + ACTIONS + 1, HIDDEN)
        self.mix = nn.Linear(T, T)
        self.head = nn.Linear(HIDDEN, ACTIONS)

    def forward(self, observation: Tensor, action: Tensor, return_to_go: Tensor) -> Tensor:
        each = self.step(torch.cat([observation, action, return_to_go], -1)).relu()
        return self.head(self.mix(each.mT).mT)


def transformer() -> Any:
    net = TensorDictModule(
        SequenceNet(), in_keys=["observation", "action", "return_to_go"], out_keys=["param"]
    )
    policy = ProbabilisticActor(
        net, in_keys=["param"], distribution_class=TanhDelta, distribution_kwargs={"low": -1.0}
    )
    return DecisionTransformerInferenceWrapper(policy, inference_context=2)


def episodes() -> TensorDict:
    return TensorDict(
        {
            "observation": torch.randn(B, T, OBS),
            "action": torch.rand(B, T, ACTIONS),
            "return_to_go": torch.randn(B, T, 1),
        },
        [B],
    )
