"""Critics and Q-networks."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import (
    MLP,
    ActorCriticOperator,
    ActorCriticWrapper,
    ActorValueOperator,
    ConsistentDropoutModule,
    ConvNet,
    DistributionalQValueActor,
    NoisyLinear,
    OneHotCategorical,
    QValueActor,
    SafeSequential,
    ValueOperator,
)

from torchrl_records.family import Family
from torchrl_records.nets import (
    ACTIONS,
    HIDDEN,
    OBS,
    B,
    Critics,
    actor,
    dueling_cnn,
    dueling_mlp,
    logits,
    mlp,
    observations,
    pixels,
    sampler,
    trunk,
)
from torchrl_records.scores import entry, expected_value

VALUES: dict[str, Family] = {
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
    "ConsistentDropoutModule": Family(
        lambda: TensorDictSequential(
            trunk(),
            ConsistentDropoutModule(0.3, ["hidden", "mask"]),
            ValueOperator(mlp(HIDDEN, 1), in_keys=["hidden"]),
        ),
        observations,
        "Output('state_value')",
        entry("state_value", 0),
    ),
    "SafeSequential with a critic": Family(
        lambda: SafeSequential(trunk(), ValueOperator(mlp(HIDDEN, 1), in_keys=["hidden"])),
        observations,
        "Output('state_value')",
        entry("state_value", 0),
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
            dueling_mlp(),
            in_keys=["observation"],
            action_space="one_hot",
        ),
        observations,
        "Output('chosen_action_value')",
        lambda model, td: td["action_value"].max(-1).values,
    ),
    "DuelingCnnDQNet": Family(
        lambda: QValueActor(
            dueling_cnn(12),
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
    "SAC's critics": Family(
        lambda: Critics(2),
        lambda: observations(action=lambda: torch.randn(B, ACTIONS)),
        "is ambiguous: (2, 1) numbers per batch element",
        entry("state_action_value", 1, 0),
        target=("state_action_value", 1, 0),
        keys=["observation", "action"],
    ),
}
