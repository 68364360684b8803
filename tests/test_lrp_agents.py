"""LRP on networks with stacked parameters: what vmap gives is what a loop over plain copies gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import MLP, MultiAgentConvNet, QMixer, QValueModule, ValueOperator, VDNMixer
from torchrl.objectives import SACLoss

import reference_lrp as ref
import reference_policies as slow
from rule_records import RECORDS, Record
from rule_references import affine
from rule_samples import on_dense
from tdhook_like import LRP, HookedModule
from tdhook_like.attribution.lrp import (
    BaseRuleMapper,
    EpsilonPlus,
    EpsilonRule,
    MaskRule,
    PolicyMapper,
    Rule,
    RuleMapper,
)
from torchrl_records.nets import actor, gaussian, multi_agent_mlp

F64 = torch.float64
B, AGENTS, OBS, ACTIONS, HIDDEN = 2, 3, 4, 3, 5
KEY = ("agents", "observation")

ON_DENSE = [r for r in RECORDS if r.name != "mask" and "linear" in {s.name for s in r.samples}]
ON_CONV = [r for r in ON_DENSE if {s.name for s in r.samples} & {"conv1d", "conv1d without bias"}]
either = pytest.mark.parametrize
sharing = either("shared", [True, False], ids=["shared weights", "own weights"])
seeing = either("centralised", [True, False], ids=["centralised", "each its own"])
mappers = either("mapper", [EpsilonPlus(), PolicyMapper()], ids=lambda m: type(m).__name__)


def on_convolutions(rule: Rule) -> RuleMapper:
    """One rule on convolutions; relevance passes what has no weights."""
    return BaseRuleMapper(rule_mapper=lambda name, m: rule if isinstance(m, nn.Conv2d) else None)


def mlps(shared: bool, centralised: bool, n_out: int = 2) -> Any:
    return multi_agent_mlp(OBS, n_out, shared=shared, centralised=centralised).double()


def convolutions(shared: bool, centralised: bool) -> Any:
    net = MultiAgentConvNet(
        AGENTS,
        centralized=centralised,
        share_params=shared,
        in_features=2,
        num_cells=[2, 2],
        kernel_sizes=[2, 2],
        strides=[2, 1],
        activation_class=nn.ReLU,
    )
    return net.double()


def explained(net: nn.Module, mapper: RuleMapper, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Relevance of all agents' inputs for the second number of each agent, and the outputs."""
    inner = TensorDict({"observation": x}, x.shape[:2])
    td = TensorDict({"agents": inner}, x.shape[:1])
    module = TensorDictModule(net, in_keys=[KEY], out_keys=[("agents", "y")])
    targets = {f"{i}": ("agents", "y", i, 1) for i in range(AGENTS)}
    with LRP(mapper, targets, ledger=True).prepare(module) as hooked:
        td = hooked(td)
        assert_closed(hooked)
    return [td[("attr", name, *KEY)] for name in targets], td["agents", "y"]


def assert_closed(hooked: HookedModule, by_sample: bool = True) -> None:
    """Of what was started, everything arrived or was absorbed by a rule (unless one let nothing pass).

    Args:
        hooked: After a call with a ledger.
        by_sample: Whether in each sample, or over all of them.
    """
    plan, ledger = hooked.context.plan, hooked.ledger
    assert plan is not None and ledger is not None
    if plan.stops:
        return
    if by_sample:
        ledger.check(1e-6)
    torch.testing.assert_close(ledger.gap.sum(), torch.zeros((), dtype=F64), rtol=0, atol=1e-9)


def assert_by_agent(
    net: Any, mapper: RuleMapper, x: Tensor, together: Callable[[Tensor], Tensor], **rules: Any
) -> None:
    """A loop over agents, each of them plain layers, finds the same relevance and outputs.

    Args:
        net: The agents' network.
        mapper: Its rules.
        x: The agents' inputs.
        together: From all agents' inputs to what one agent of a centralised net reads.
        rules: The reference's.
    """
    found, outputs = explained(net, mapper, x)
    for i, layers in enumerate(slow.by_agent(net)):
        read = together(x) if net.centralized else x[:, i]
        y = slow.output(layers, read)
        torch.testing.assert_close(outputs[:, i], y)
        expected = torch.zeros_like(x)
        R = slow.relevance(layers, read, slow.at_entry(y, 1), **rules)
        if net.centralized:
            expected = R.reshape(x.shape)
        else:
            expected[:, i] = R
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-9)


# --- networks of agents ---------------------------------------------------------------------------


@sharing
@seeing
@either("record", ON_DENSE, ids=lambda r: r.name)
def test_every_rule_gives_agents_with_dense_layers_what_it_gives_a_loop_over_them(
    record: Record, shared: bool, centralised: bool
):
    net, x = mlps(shared, centralised), torch.randn(B, AGENTS, OBS, dtype=F64)
    mapper = on_dense(record.rule())
    assert_by_agent(net, mapper, x, lambda x: x.flatten(1), dense=record.reference)


@sharing
@seeing
@either("record", ON_CONV, ids=lambda r: r.name)
def test_every_rule_gives_agents_with_convolutions_what_it_gives_a_loop_over_them(
    record: Record, shared: bool, centralised: bool
):
    net, x = convolutions(shared, centralised), torch.randn(B, AGENTS, 2, 4, 4, dtype=F64)
    mapper = on_convolutions(record.rule())
    assert_by_agent(net, mapper, x, lambda x: x.flatten(1, 2), conv=record.reference)


@sharing
@seeing
@mappers
def test_the_mappers_for_policies_give_convolutions_z_plus_and_dense_layers_epsilon(
    mapper: RuleMapper, shared: bool, centralised: bool
):
    x = torch.randn(B, AGENTS, OBS, dtype=F64)
    assert_by_agent(mlps(shared, centralised), mapper, x, lambda x: x.flatten(1))
    x = torch.randn(B, AGENTS, 2, 4, 4, dtype=F64)
    assert_by_agent(convolutions(shared, centralised), mapper, x, lambda x: x.flatten(1, 2))


@sharing
def test_a_mask_of_channels_that_is_counted_from_the_end_is_the_same_for_agents(shared: bool):
    def of_hidden_units(layer: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
        passes = torch.ones_like(R)
        if R.shape[-1] == HIDDEN:
            passes[:, [1, 4]] = 0
        return affine(ref.epsilon)(layer, inputs, R * passes)

    def mapper(path: str, module: nn.Module) -> Rule | None:
        if isinstance(module, nn.Linear) and module.out_features == HIDDEN:
            return MaskRule([0, 2, 3], EpsilonRule(), dim=-1)
        return EpsilonPlus()(path, module)

    x = torch.randn(B, AGENTS, OBS, dtype=F64)
    assert_by_agent(mlps(shared, False), mapper, x, lambda x: x, dense=of_hidden_units)


def test_agents_that_see_each_other_share_relevance_and_those_that_do_not_keep_to_themselves():
    x = torch.randn(B, AGENTS, OBS, dtype=F64)
    seen, _ = explained(mlps(False, True), EpsilonPlus(), x)
    apart, _ = explained(mlps(False, False), EpsilonPlus(), x)
    for i in range(AGENTS):
        others = [j for j in range(AGENTS) if j != i]
        assert seen[i][:, others].abs().amax(-1).min() > 0
        assert not apart[i][:, others].any()
        assert apart[i][:, i].any()


# --- ensembles and critics ------------------------------------------------------------------------


def value_net(n_in: int = OBS) -> MLP:
    return MLP(n_in, 1, depth=2, num_cells=HIDDEN, activation_class=nn.ReLU).double()


class Stacked(nn.Module):
    """Members by torch.func: stacked state, one call under vmap, members behind the batch."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.base = members[0]
        self.state, self.buffers_ = torch.func.stack_module_state(list(members))

    def forward(self, x: Tensor) -> Tensor:
        def one(state: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.base, (state, buffers), (x,))

        return torch.vmap(one, out_dims=1)(self.state, self.buffers_)


@either("record", ON_DENSE, ids=lambda r: r.name)
def test_members_that_are_stacked_by_torch_func_are_explained_as_the_members_are(record: Record):
    members = [value_net() for _ in range(3)]
    x = torch.randn(B, OBS, dtype=F64)
    method = LRP(on_dense(record.rule()), {"0": ("y", 0, 0), "2": ("y", 2, 0)}, ledger=True)
    with method.prepare(Stacked(members), ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, [B]))
        assert_closed(hooked)
    for name in ("0", "2"):
        layers = slow.plain_layers(members[int(name)])
        y = slow.output(layers, x)
        torch.testing.assert_close(td["y"][:, int(name)], y)
        expected = slow.relevance(layers, x, y, dense=record.reference)
        torch.testing.assert_close(td["attr", name, "x"], expected, rtol=1e-9, atol=1e-9)


@mappers
def test_each_member_of_an_ensemble_module_is_explained_by_its_own_weights(mapper: RuleMapper):
    one: Any = TensorDictModule(value_net(), in_keys=["x"], out_keys=["y"])
    ensemble, x = EnsembleModule(one, num_copies=3), torch.randn(B, OBS, dtype=F64)
    with LRP(mapper, "y").prepare(ensemble) as hooked:
        td = hooked(TensorDict({"x": x}, [B]))
    found = td["attr", "x"]
    for i in range(3):
        layers = slow.plain_layers(
            one.module, lambda path, i=i: slow.member(ensemble.params_td, f"module.{path}", i)
        )
        y = slow.output(layers, x)
        torch.testing.assert_close(td["y"][i], y)
        torch.testing.assert_close(found[i], slow.relevance(layers, x, y), rtol=1e-9, atol=1e-9)


class CriticsOfALoss(nn.Module):
    """The critics of torchrl's SAC, as its loss calls them: stacked parameters under vmap."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss, self.in_keys, self.out_keys = loss, ["observation", "action"], ["q"]

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        td = TensorDict({"observation": observation, "action": action}, observation.shape[:1])
        given = self.loss._vmap_qnetworkN0(td, self.loss.qvalue_network_params)
        return given["state_action_value"].transpose(0, 1)


@either("record", ON_DENSE, ids=lambda r: r.name)
def test_the_critics_of_sac_are_explained_as_plain_networks_of_state_and_action(record: Record):
    q: Any = ValueOperator(value_net(6 + ACTIONS), in_keys=["observation", "action"])
    policy = actor(gaussian().double(), torch.distributions.Normal, "loc", "scale")
    loss = SACLoss(policy, q, num_qvalue_nets=2)
    net = CriticsOfALoss(loss)
    td = TensorDict(
        {"observation": torch.randn(B, 6), "action": torch.randn(B, ACTIONS)}, [B]
    ).double()
    # The loss holds the policy, too, which the critics do not call.
    method = LRP(on_dense(record.rule()), ("q", 1, 0), ledger=True, unreached="ignore")
    with method.prepare(net, net.in_keys, net.out_keys) as hooked:
        td = hooked(td)
        assert_closed(hooked, by_sample=False)  # members stand in front of samples there
    params = loss.qvalue_network_params
    layers = slow.plain_layers(q.module, lambda path: slow.member(params, f"module.{path}", 1))
    x = torch.cat([td["observation"], td["action"]], -1)
    y = slow.output(layers, x)
    torch.testing.assert_close(td["q"][:, 1], y)
    expected = slow.relevance(layers, x, y, dense=record.reference)
    found = torch.cat([td["attr", "observation"], td["attr", "action"]], -1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# --- mixers ---------------------------------------------------------------------------------------


def chosen_values(net: nn.Module) -> Any:
    """Greedy actions and their values, agent by agent."""
    keys = [("agents", name) for name in ("action", "action_value", "chosen_action_value")]
    values: Any = TensorDictModule(net, in_keys=[KEY], out_keys=[keys[1]])
    choice: Any = QValueModule(action_space="one_hot", action_value_key=keys[1], out_keys=keys)
    return TensorDictSequential(values, choice)


def mixed(net: nn.Module, mixer: nn.Module, *more: str) -> Any:
    head: Any = TensorDictModule(
        mixer,
        in_keys=[("agents", "chosen_action_value"), *more],
        out_keys=["chosen_action_value"],
    )
    return TensorDictSequential(chosen_values(net), head)


def greedy(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
    """One agent's greedy value, and its relevance per unit of it where that value starts with 1."""
    y = slow.output(layers, x)
    best = nn.functional.one_hot(y.argmax(-1), y.shape[-1]).double()
    return (y * best).sum(-1), best


def play(batch: int = B, **more: Tensor) -> TensorDict:
    inner = TensorDict({"observation": torch.randn(batch, AGENTS, OBS, dtype=F64)}, [batch, AGENTS])
    return TensorDict({"agents": inner, **more}, [batch])


@sharing
@mappers
def test_under_vdn_each_agents_chosen_value_goes_to_its_own_observation(
    mapper: RuleMapper, shared: bool
):
    # Sunehag et al. 2018, eq. 1: the team's value is the sum of the agents'.
    net, td = mlps(shared, False, ACTIONS), play()
    model = mixed(net, VDNMixer(AGENTS, device="cpu"))
    with LRP(mapper, "chosen_action_value", ledger=1e-6).prepare(model) as hooked:
        td = hooked(td)
    found, x = td[("attr", *KEY)], td[KEY]
    for i, layers in enumerate(slow.by_agent(net)):
        q, best = greedy(layers, x[:, i])
        expected = slow.relevance(layers, x[:, i], q[:, None] * best)
        torch.testing.assert_close(found[:, i], expected, rtol=1e-9, atol=1e-9)


@sharing
@either("alone", [True, False], ids=["observations alone", "and the state"])
@mappers
def test_qmix_shares_products_of_hypernetworks_and_values_and_sums_by_contribution(
    mapper: RuleMapper, alone: bool, shared: bool
):
    net, td = mlps(shared, False, ACTIONS), play(state=torch.randn(B, 2, 3, dtype=F64))
    mixer = QMixer((2, 3), 4, AGENTS, device="cpu").double()
    model = mixed(net, mixer, "state")
    keys = [KEY] if alone else [KEY, "state"]
    method = LRP(mapper, "chosen_action_value", keys=keys, ledger=True)
    with method.prepare(model) as hooked:
        td = hooked(td)
        assert_closed(hooked)
    stacks, x = slow.by_agent(net), td[KEY]
    values = [greedy(layers, x[:, i]) for i, layers in enumerate(stacks)]
    q = torch.stack([value for value, _ in values], 1)
    R_q, R_state = slow.qmix(mixer, q, td["state"].flatten(1), alone=alone)
    for i, layers in enumerate(stacks):
        R = R_q[:, i, None] * values[i][1]
        expected = slow.relevance(layers, x[:, i], R)
        torch.testing.assert_close(td[("attr", *KEY)][:, i], expected, rtol=1e-6, atol=1e-9)
    if not alone:
        found = td["attr", "state"].flatten(1)
        torch.testing.assert_close(found, R_state, rtol=1e-6, atol=1e-9)


def test_the_agents_values_under_qmix_are_inputs_that_can_be_explained_themselves():
    mixer = QMixer((3,), 4, AGENTS, device="cpu").double()
    td = play(state=torch.randn(B, 3, dtype=F64))
    td["agents", "chosen_action_value"] = torch.randn(B, AGENTS, 1, dtype=F64)
    key = ("agents", "chosen_action_value")
    head = TensorDictModule(mixer, in_keys=[key, "state"], out_keys=["q"])
    with LRP(target="q", keys=[key]).prepare(head) as hooked:
        td = hooked(td)
    expected, _ = slow.qmix(mixer, td[key][..., 0], td["state"], alone=True)
    torch.testing.assert_close(td[("attr", *key)][..., 0], expected, rtol=1e-6, atol=1e-12)
