"""One record per family of torchrl modules: how to build it, what to feed it, what to expect.

``test_torchrl_families`` runs every claim over every record. A record's ``score`` is the number
that is explained, spelled out with plain torch on the outputs of a plain call: it knows nothing of
targets, so it is what targets are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from torchrl.data import Bounded, OneHot
from torchrl.modules import (
    MLP,
    Actor,
    ActorCriticOperator,
    ActorCriticWrapper,
    ActorValueOperator,
    AdditiveGaussianModule,
    ConvNet,
    DecisionTransformerInferenceWrapper,
    DistributionalQValueActor,
    EGreedyModule,
    GRUModule,
    IndependentNormal,
    LSTMModule,
    MultiAgentConvNet,
    MultiAgentMLP,
    NoisyLinear,
    OneHotCategorical,
    OrnsteinUhlenbeckProcessModule,
    ProbabilisticActor,
    QValueActor,
    SafeModule,
    SafeSequential,
    TanhDelta,
    TanhModule,
    TanhNormal,
    ValueOperator,
    set_recurrent_mode,
)
from torchrl.modules.models import DuelingCnnDQNet, DuelingMlpDQNet

B, T, OBS, ACTIONS, AGENTS, HIDDEN = 5, 4, 6, 3, 3, 8

Score = Callable[[Any, TensorDictBase], Tensor]


@dataclass(frozen=True)
class Family:
    """A family of modules.

    Attributes:
        build: Makes the module; called under a fixed seed.
        td: Makes its input; called under a fixed seed.
        default: The default target's repr, or words of the error where there is no obvious one.
        score: The explained number [*B] from the model and its outputs, in plain torch.
        target: What is given as target; None for the default.
        keys: The in_keys that an attribution is due for.
        relu: Whether the network is made of linear layers and ReLUs alone up to the score's inputs,
            so that LRP with a vanishing epsilon is input × gradient.
        scope: A context that calls need (recurrent mode).
        held: What the policy draws and the score holds fixed.
        again: Whether what was written can be read as input (a decision transformer's cannot).
    """

    build: Callable[[], Any]
    td: Callable[[], TensorDict]
    default: str
    score: Score
    target: Any = None
    keys: Sequence[NestedKey] = ("observation",)
    relu: bool = True
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    held: Sequence[NestedKey] = ()
    again: bool = True


# --- inputs ------------------------------------------------------------------------------------


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


# --- networks ----------------------------------------------------------------------------------


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


def actor(module: TensorDictModuleBase, kind: Any, *in_keys: str, **options: Any) -> Any:
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


# --- scores ------------------------------------------------------------------------------------


def entry(key: NestedKey, *index: int) -> Score:
    return lambda model, td: td.get(key)[(..., *index)]


def discrete(model: Any, td: TensorDictBase) -> Tensor:
    """The log-probability of a one-hot action, or of an action given as an index."""
    scores, action = td["logits"].log_softmax(-1), td["action"].detach()
    if action.shape == scores.shape:
        return (scores * action).sum(-1)
    return scores.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def normal(model: Any, td: TensorDictBase) -> Tensor:
    return dist.Normal(td["loc"], td["scale"]).log_prob(td["action"].detach()).sum(-1)


def second_action(td: TensorDictBase) -> Tensor:
    """The log-probability of one of the numbers that make up an action."""
    each = dist.Normal(td["loc"], td["scale"]).log_prob(td["action"].detach())
    return each[..., 1]


def tanh_normal(model: Any, td: TensorDictBase) -> Tensor:
    """A squashed Gaussian: log(1 - tanh(u)²) = 2 (log 2 - u - softplus(-2u))."""
    action = td["action"].detach()
    limit = 1.0 - torch.finfo(action.dtype).resolution
    before = torch.atanh(action.clamp(-limit, limit))
    squashed = 2.0 * (torch.tensor(2.0).log() - before - nn.functional.softplus(-2.0 * before))
    return (dist.Normal(td["loc"], td["scale"]).log_prob(before) - squashed).sum(-1)


def expected_value(model: Any, td: TensorDictBase) -> Tensor:
    """Of the greedy action, over atoms: log-probabilities are laid out [B, atoms, actions]."""
    values = (td["action_value"].exp() * model.support[:, None]).sum(1)
    return (values * td["action"]).sum(-1)


def last_step(td: TensorDictBase) -> Tensor:
    """The last step's first logit, written at every step's own place: zero everywhere else."""
    chosen = td["logits"][..., 0]
    last = torch.zeros_like(chosen)
    last[..., -1] = 1.0
    return chosen * last


# --- the records -------------------------------------------------------------------------------


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


def gear(model: Any, td: TensorDictBase) -> Tensor:
    scores = td["params", "gear", "logits"].log_softmax(-1)
    return scores.gather(-1, td["action", "gear"].unsqueeze(-1)).squeeze(-1)


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


SEVERAL = "No target is given and the model writes"

FAMILIES: dict[str, Family] = {
    "MLP": Family(
        lambda: TensorDictModule(mlp(n_out=1), in_keys=["observation"], out_keys=["value"]),
        observations,
        "Output('value')",
        entry("value", 0),
    ),
    "ConvNet": Family(
        lambda: TensorDictModule(
            nn.Sequential(
                ConvNet(2, num_cells=[4, 4], kernel_sizes=3, activation_class=nn.ReLU),
                nn.Linear(64, ACTIONS),
            ),
            in_keys=["pixels"],
            out_keys=["logits"],
        ),
        pixels,
        "is ambiguous: (3,) numbers per batch element",
        entry("logits", 1),
        target=("logits", 1),
        keys=["pixels"],
    ),
    "TensorDictSequential": Family(
        lambda: TensorDictSequential(trunk(), logits("hidden", HIDDEN)),
        observations,
        SEVERAL,
        entry("logits", 2),
        target=("logits", 2),
    ),
    "an inner output of a sequence": Family(
        lambda: TensorDictSequential(trunk(), logits("hidden", HIDDEN)),
        observations,
        SEVERAL,
        entry("hidden", 1),
        target=("hidden", 1),
    ),
    "SafeModule": Family(
        lambda: SafeModule(
            mlp(), in_keys=["observation"], out_keys=["action"], spec=bounded(), safe=True
        ),
        observations,
        "is ambiguous: (3,) numbers per batch element",
        entry("action", 0),
        target=("action", 0),
    ),
    "SafeSequential with a critic": Family(
        lambda: SafeSequential(trunk(), ValueOperator(mlp(HIDDEN, 1), in_keys=["hidden"])),
        observations,
        "Output('state_value')",
        entry("state_value", 0),
    ),
    "Actor": Family(
        lambda: Actor(mlp(), in_keys=["observation"], spec=bounded()),
        observations,
        "is ambiguous: (3,) numbers per batch element",
        entry("action", 1),
        target=("action", 1),
    ),
    "Categorical": Family(
        lambda: sampler(dist.Categorical, "logits"),
        observations,
        "LogProb(action=None)",
        discrete,
        held=["action"],
    ),
    "OneHotCategorical": Family(
        lambda: sampler(OneHotCategorical, "logits"),
        observations,
        "LogProb(action=None)",
        discrete,
        held=["action"],
    ),
    "IndependentNormal": Family(
        lambda: sampler(IndependentNormal, "loc", "scale"),
        observations,
        "LogProb(action=None)",
        normal,
        relu=False,  # the scale passes through a softplus
        held=["action"],
    ),
    "TanhNormal": Family(
        lambda: sampler(TanhNormal, "loc", "scale"),
        observations,
        "LogProb(action=None)",
        tanh_normal,
        relu=False,
        held=["action"],
    ),
    "Normal, one number per action": Family(
        lambda: sampler(dist.Normal, "loc", "scale"),
        observations,
        "is ambiguous: (3,) numbers per batch element",
        lambda model, td: second_action(td),
        target=second_action,
        relu=False,
        held=["action"],
    ),
    "a continuous policy's location": Family(
        lambda: sampler(TanhNormal, "loc", "scale"),
        observations,
        "LogProb(action=None)",
        entry("loc", 1),
        target=("loc", 1),
    ),
    "ValueOperator": Family(
        lambda: ValueOperator(mlp(n_out=1), in_keys=["observation"]),
        observations,
        "Output('state_value')",
        entry("state_value", 0),
    ),
    "ValueOperator of state and action": Family(
        lambda: ValueOperator(mlp(OBS + ACTIONS, 1), in_keys=["observation", "action"]),
        lambda: observations(action=lambda: torch.randn(B, ACTIONS)),
        "Output('state_action_value')",
        entry("state_action_value", 0),
        keys=["observation", "action"],
    ),
    "ActorValueOperator": Family(
        lambda: ActorValueOperator(
            trunk(),
            actor(logits("hidden", HIDDEN), OneHotCategorical, "logits"),
            ValueOperator(mlp(HIDDEN, 1), in_keys=["hidden"]),
        ),
        observations,
        "Output('state_value')",
        entry("state_value", 0),
    ),
    "the actor of an ActorValueOperator": Family(
        lambda: ActorValueOperator(
            trunk(),
            actor(logits("hidden", HIDDEN), OneHotCategorical, "logits"),
            ValueOperator(mlp(HIDDEN, 1), in_keys=["hidden"]),
        ).get_policy_operator(),
        observations,
        "LogProb(action=None)",
        discrete,
        held=["action"],
    ),
    "the critic of an ActorValueOperator": Family(
        lambda: ActorValueOperator(
            trunk(),
            actor(logits("hidden", HIDDEN), OneHotCategorical, "logits"),
            ValueOperator(mlp(HIDDEN, 1), in_keys=["hidden"]),
        ).get_value_operator(),
        observations,
        "Output('state_value')",
        entry("state_value", 0),
    ),
    "ActorCriticOperator": Family(
        lambda: ActorCriticOperator(
            trunk(),
            TensorDictModule(mlp(HIDDEN), in_keys=["hidden"], out_keys=["action"]),
            ValueOperator(mlp(HIDDEN + ACTIONS, 1), in_keys=["hidden", "action"]),
        ),
        observations,
        "Output('state_action_value')",
        entry("state_action_value", 0),
    ),
    "ActorCriticWrapper": Family(
        lambda: ActorCriticWrapper(
            sampler(OneHotCategorical, "logits"),
            ValueOperator(mlp(n_out=1), in_keys=["observation"]),
        ),
        observations,
        "Output('state_value')",
        entry("state_value", 0),
    ),
    "QValueActor": Family(
        lambda: QValueActor(mlp(), in_keys=["observation"], action_space="one_hot"),
        observations,
        "Output('chosen_action_value')",
        lambda model, td: td["action_value"].max(-1).values,
    ),
    "QValueActor with indices": Family(
        lambda: QValueActor(mlp(), in_keys=["observation"], action_space="categorical"),
        observations,
        "Output('chosen_action_value')",
        entry("action_value", 2),
        target=("action_value", 2),
    ),
    "DistributionalQValueActor": Family(
        lambda: DistributionalQValueActor(
            MLP(OBS, (7, ACTIONS), depth=1, num_cells=HIDDEN, activation_class=nn.ReLU),
            in_keys=["observation"],
            support=torch.linspace(-2.0, 3.0, 7),
            action_space="one_hot",
        ),
        observations,
        "ExpectedValue('action_value')",
        expected_value,
        held=["action"],
    ),
    "DuelingMlpDQNet": Family(
        lambda: QValueActor(
            DuelingMlpDQNet(
                ACTIONS,
                mlp_kwargs_feature={
                    "in_features": OBS,
                    "num_cells": [HIDDEN],
                    "out_features": HIDDEN,
                    "activation_class": nn.ReLU,
                },
                mlp_kwargs_output={
                    "in_features": HIDDEN,
                    "num_cells": HIDDEN,
                    "activation_class": nn.ReLU,
                },
            ),
            in_keys=["observation"],
            action_space="one_hot",
        ),
        observations,
        "Output('chosen_action_value')",
        lambda model, td: td["action_value"].max(-1).values,
    ),
    "DuelingCnnDQNet": Family(
        lambda: QValueActor(
            DuelingCnnDQNet(
                ACTIONS,
                cnn_kwargs={
                    "in_features": 2,
                    "num_cells": [3, 3],
                    "kernel_sizes": [3, 3],
                    "strides": [2, 1],
                    "activation_class": nn.ReLU,
                },
                mlp_kwargs={
                    "in_features": 12,
                    "num_cells": HIDDEN,
                    "depth": 1,
                    "activation_class": nn.ReLU,
                },
            ),
            in_keys=["pixels"],
            action_space="one_hot",
        ),
        lambda: pixels(size=10),
        "Output('chosen_action_value')",
        lambda model, td: td["action_value"].max(-1).values,
        keys=["pixels"],
    ),
    "NoisyLinear": Family(
        lambda: QValueActor(
            MLP(
                OBS,
                ACTIONS,
                depth=2,
                num_cells=HIDDEN,
                layer_class=NoisyLinear,
                activation_class=nn.ReLU,
            ),
            in_keys=["observation"],
            action_space="one_hot",
        ),
        observations,
        "Output('chosen_action_value')",
        lambda model, td: td["action_value"].max(-1).values,
    ),
    "LSTMModule, step by step": Family(
        lambda: recurrent(LSTMModule, ["h", "c"]),
        lambda: steps(B),
        SEVERAL,
        entry("logits", 0),
        target=("logits", 0),
        keys=["observation", "h", "c"],
        relu=False,
    ),
    "LSTMModule, step by step, states absent": Family(
        lambda: recurrent(LSTMModule, ["h", "c"]),
        lambda: steps(B, states=()),
        SEVERAL,
        entry("logits", 0),
        target=("logits", 0),
        relu=False,
    ),
    "LSTMModule over time": Family(
        lambda: recurrent(LSTMModule, ["h", "c"]),
        lambda: steps(B, T),
        SEVERAL,
        lambda model, td: last_step(td),
        target=last_step,
        keys=["observation", "h", "c"],
        relu=False,
        scope=set_recurrent_mode,
    ),
    "LSTMModule over time with resets": Family(
        lambda: recurrent(LSTMModule, ["h", "c"]),
        lambda: steps(B, T, resets=True),
        SEVERAL,
        lambda model, td: last_step(td),
        target=last_step,
        keys=["observation", "h", "c"],
        relu=False,
        scope=set_recurrent_mode,
    ),
    "LSTMModule over time, states absent": Family(
        lambda: recurrent(LSTMModule, ["h", "c"]),
        lambda: steps(B, T, states=(), resets=True),
        SEVERAL,
        lambda model, td: last_step(td),
        target=last_step,
        relu=False,
        scope=set_recurrent_mode,
    ),
    "python LSTMModule over time": Family(
        lambda: recurrent(LSTMModule, ["h", "c"], python_based=True),
        lambda: steps(B, T, resets=True),
        SEVERAL,
        lambda model, td: last_step(td),
        target=last_step,
        keys=["observation", "h", "c"],
        relu=False,
        scope=set_recurrent_mode,
    ),
    "GRUModule, step by step": Family(
        lambda: recurrent(GRUModule, ["h"]),
        lambda: steps(B, states=["h"]),
        SEVERAL,
        entry("logits", 0),
        target=("logits", 0),
        keys=["observation", "h"],
        relu=False,
    ),
    "GRUModule over time with resets": Family(
        lambda: recurrent(GRUModule, ["h"]),
        lambda: steps(B, T, states=["h"], resets=True),
        SEVERAL,
        lambda model, td: last_step(td),
        target=last_step,
        keys=["observation", "h"],
        relu=False,
        scope=set_recurrent_mode,
    ),
    "GRUModule over time, states absent": Family(
        lambda: recurrent(GRUModule, ["h"]),
        lambda: steps(B, T, states=(), resets=True),
        SEVERAL,
        lambda model, td: last_step(td),
        target=last_step,
        relu=False,
        scope=set_recurrent_mode,
    ),
    "composite distribution": Family(
        composite,
        observations,
        "The policy has several heads",
        gear,
        target=lambda td: (
            td["params", "gear", "logits"]
            .log_softmax(-1)
            .gather(-1, td["action", "gear"].unsqueeze(-1))
            .squeeze(-1)
        ),
        held=[("action", "gear")],
    ),
    "TanhModule": Family(
        lambda: TensorDictSequential(
            deterministic(),
            TanhModule(in_keys=["param"], out_keys=["action"], spec=bounded()),
        ),
        observations,
        SEVERAL,
        entry("action", 2),
        target=("action", 2),
        relu=True,  # the tanh is a function; epsilon follows its gradient
    ),
    "EGreedyModule": Family(
        lambda: TensorDictSequential(
            QValueActor(mlp(), in_keys=["observation"], spec=OneHot(ACTIONS)),
            EGreedyModule(OneHot(ACTIONS), eps_init=0.5, eps_end=0.5),
        ),
        observations,
        "Output('chosen_action_value')",
        lambda model, td: td["action_value"].max(-1).values,
    ),
    "AdditiveGaussianModule": Family(
        lambda: TensorDictSequential(
            deterministic(),
            TanhModule(in_keys=["param"], out_keys=["action"], spec=bounded()),
            AdditiveGaussianModule(bounded(), sigma_init=0.3, sigma_end=0.3),
        ),
        observations,
        SEVERAL,
        entry("param", 0),
        target=("param", 0),
    ),
    "OrnsteinUhlenbeckProcessModule": Family(
        lambda: TensorDictSequential(
            deterministic(),
            TanhModule(in_keys=["param"], out_keys=["action"], spec=bounded()),
            OrnsteinUhlenbeckProcessModule(bounded()),
        ),
        lambda: steps(B, states=()),
        SEVERAL,
        entry("param", 0),
        target=("param", 0),
    ),
    "DecisionTransformerInferenceWrapper": Family(
        transformer,
        episodes,
        SEVERAL,
        entry("param", -1, 0),
        target=("param", -1, 0),
        keys=["observation", "action", "return_to_go"],
        relu=False,
        again=False,  # one action is written where a sequence was read
    ),
    "SAC's critics": Family(
        lambda: Critics(2),
        lambda: observations(action=lambda: torch.randn(B, ACTIONS)),
        "is ambiguous: (2, 1) numbers per batch element",
        entry("state_action_value", 1, 0),
        target=("state_action_value", 1, 0),
        keys=["observation", "action"],
    ),
}


def _multi_agent(shared: bool, centralised: bool) -> Family:
    def build() -> TensorDictModule:
        net = MultiAgentMLP(
            OBS,
            1,
            AGENTS,
            centralized=centralised,
            share_params=shared,
            depth=1,
            num_cells=HIDDEN,
            activation_class=nn.ReLU,
        )
        return TensorDictModule(
            net, in_keys=[("agents", "observation")], out_keys=[("agents", "value")]
        )

    return Family(
        build,
        agents,
        "is ambiguous: (3, 1) numbers per batch element",
        entry(("agents", "value"), 1, 0),
        target=("agents", "value", 1, 0),
        keys=[("agents", "observation")],
    )


def _multi_agent_conv(shared: bool, centralised: bool) -> Family:
    def build() -> TensorDictModule:
        net = MultiAgentConvNet(
            AGENTS,
            centralized=centralised,
            share_params=shared,
            in_features=2,
            num_cells=[3],
            kernel_sizes=3,
            strides=1,
            paddings=0,
            activation_class=nn.ReLU,
        )
        return TensorDictModule(
            net, in_keys=[("agents", "observation")], out_keys=[("agents", "embed")]
        )

    return Family(
        build,
        lambda: agents(2, 4, 4),
        "is ambiguous: (3, 12) numbers per batch element",
        entry(("agents", "embed"), 1, 5),
        target=("agents", "embed", 1, 5),
        keys=[("agents", "observation")],
    )


for _shared in (True, False):
    for _centralised in (True, False):
        _name = f"{'shared' if _shared else 'own'} weights" + (
            ", centralised" if _centralised else ""
        )
        FAMILIES[f"MultiAgentMLP, {_name}"] = _multi_agent(_shared, _centralised)
        FAMILIES[f"MultiAgentConvNet, {_name}"] = _multi_agent_conv(_shared, _centralised)
