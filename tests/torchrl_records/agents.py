"""Networks of several agents: shared or own weights, seeing each other or not."""

from __future__ import annotations

from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import MultiAgentConvNet, OneHotCategorical, QValueModule, VDNMixer

from tdhook_like import LogProb
from torchrl_records.family import Family
from torchrl_records.nets import ACTIONS, AGENTS, actor, agents, of_agents
from torchrl_records.scores import entry, second_agent

AGENT_FAMILIES: dict[str, Family] = {
    "a policy of several agents": Family(
        lambda: actor(
            of_agents(ACTIONS, "logits", shared=False, centralised=False),
            OneHotCategorical,
            ("agents", "logits"),
            out_keys=[("agents", "action")],
        ),
        agents,
        "is ambiguous: (3,) numbers per batch element",
        second_agent,
        target=LogProb()[1],
        keys=[("agents", "observation")],
        held=[("agents", "action")],
    ),
    "VDNMixer": Family(
        lambda: TensorDictSequential(
            of_agents(ACTIONS, "action_value", shared=False, centralised=False),
            QValueModule(
                action_space="one_hot",
                action_value_key=("agents", "action_value"),
                out_keys=[
                    ("agents", "action"),
                    ("agents", "action_value"),
                    ("agents", "chosen_action_value"),
                ],
            ),
            TensorDictModule(
                VDNMixer(AGENTS, device="cpu"),
                in_keys=[("agents", "chosen_action_value")],
                out_keys=["chosen_action_value"],
            ),
        ),
        agents,
        "is ambiguous: (3, 1) numbers per batch element",
        lambda model, td: td["agents", "action_value"].max(-1).values.sum(-1),
        target="chosen_action_value",
        keys=[("agents", "observation")],
    ),
}


def _multi_agent(shared: bool, centralised: bool) -> Family:
    return Family(
        lambda: of_agents(1, "value", shared=shared, centralised=centralised),
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
        AGENT_FAMILIES[f"MultiAgentMLP, {_name}"] = _multi_agent(_shared, _centralised)
        AGENT_FAMILIES[f"MultiAgentConvNet, {_name}"] = _multi_agent_conv(_shared, _centralised)
