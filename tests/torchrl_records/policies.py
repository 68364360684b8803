"""Policies: what draws an action, and what adds noise to it."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictSequential
from torch import distributions as dist
from torchrl.data import OneHot
from torchrl.modules import (
    Actor,
    ActorValueOperator,
    AdditiveGaussianModule,
    EGreedyModule,
    IndependentNormal,
    MaskedCategorical,
    OneHotCategorical,
    OrnsteinUhlenbeckProcessModule,
    QValueActor,
    SafeModule,
    TanhModule,
    TanhNormal,
    TruncatedNormal,
    ValueOperator,
)

from torchrl_records.family import SEVERAL, Family
from torchrl_records.nets import (
    ACTIONS,
    HIDDEN,
    OBS,
    B,
    actor,
    bounded,
    composite,
    deterministic,
    logits,
    mlp,
    observations,
    sampler,
    state_dependent,
    steps,
    trunk,
)
from torchrl_records.scores import (
    discrete,
    entry,
    gear,
    masked,
    normal,
    second_action,
    tanh_normal,
    truncated_normal,
)

POLICIES: dict[str, Family] = {
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
    "MaskedCategorical": Family(
        lambda: actor(logits(), MaskedCategorical, "logits", "mask"),
        lambda: observations(mask=lambda: torch.tensor([True, False, True]).expand(B, ACTIONS)),
        "LogProb(action=None)",
        masked,
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
    "TruncatedNormal": Family(
        lambda: sampler(TruncatedNormal, "loc", "scale"),
        observations,
        "LogProb(action=None)",
        truncated_normal,
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
    "gSDEModule": Family(
        state_dependent,
        lambda: observations(noise=lambda: torch.zeros(B, ACTIONS, OBS)),
        "LogProb(action=None)",
        normal,
        relu=False,
        held=["action"],
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
        "AdditiveGaussianModule changes 'action' after the policy has written it",
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
        "OrnsteinUhlenbeckProcessModule changes 'action' after the policy has written it",
        entry("param", 0),
        target=("param", 0),
    ),
}
