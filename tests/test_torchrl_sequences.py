"""What is easy to get wrong about time, agents, ensembles and sequence models, one claim each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, TensorDictModule
from torch import Tensor
from torchrl.modules import IndependentNormal, ValueOperator, set_recurrent_mode
from torchrl.objectives import SACLoss

from tdhook_like import LRP, AtStep, Each, IntegratedGradients, TargetError
from torchrl_records import FAMILIES
from torchrl_records.methods import every_weight_rule, only_linear, signed
from torchrl_records.nets import (
    ACTIONS,
    AGENTS,
    OBS,
    B,
    T,
    agents,
    mlp,
    observations,
    sampler,
    steps,
)

# --- recurrent modules -------------------------------------------------------------------------


RECURRENT = ["LSTMModule over time with resets", "GRUModule over time with resets"]
every_recurrent = pytest.mark.parametrize("name", RECURRENT)


LAST = AtStep(("logits", 0))


def over_time(name: str, td: TensorDict, target: object = LAST) -> Any:
    """Attributions of the observation, over all steps."""
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    with signed(target).prepare(model) as hooked, set_recurrent_mode():
        return hooked(td.copy())["attr"]


@every_recurrent
def test_time_of_one_environment_is_not_mixed_with_another_one(name):
    td = FAMILIES[name].td()
    together = over_time(name, td)["observation"]
    for row in range(B):
        alone = over_time(name, td[row : row + 1])["observation"]
        torch.testing.assert_close(together[row : row + 1], alone)


@every_recurrent
def test_a_reset_cuts_what_came_before_it_off(name):
    relevance = over_time(name, FAMILIES[name].td())["observation"].abs().sum(-1)
    assert torch.equal(relevance[1] > 0, torch.tensor([False, False, True, True]))
    assert torch.equal(relevance[2] > 0, torch.tensor([False, False, True, True]))
    assert (relevance[[0, 3, 4]] > 0).all()


@every_recurrent
def test_a_step_is_explained_by_itself_and_what_came_before_it(name):
    each = {f"step {t}": AtStep(("logits", 0), t) for t in range(T)}
    found = over_time(name, steps(B, T, states=()), each)
    relevance = torch.stack([found[name, "observation"].abs().sum(-1) for name in each])
    assert torch.equal((relevance > 0)[:, 0], torch.ones(T, T).tril().bool())
    assert (relevance > 0).all(1).sum() == (relevance > 0).any(1).sum()  # in every trajectory


@every_recurrent
def test_which_step_is_meant_has_to_be_said_and_may_be_said_by_a_function(name):
    td = FAMILIES[name].td()
    with pytest.raises(TargetError, match="Say which step"):
        over_time(name, td, ("logits", 0))
    found = over_time(name, td, lambda td: td["logits"][..., -1, 0])["observation"]
    assert torch.equal(found, over_time(name, td)["observation"])


@every_recurrent
def test_steps_are_stacked_in_front_of_time_and_not_folded_into_it(name):
    torch.manual_seed(0)
    model, td = FAMILIES[name].build(), FAMILIES[name].td()
    context = IntegratedGradients(LAST, n_steps=4, gap_tolerance=None).prepare(model)
    with context as hooked, set_recurrent_mode():
        whole = hooked.observe(td.copy())["attr", "observation"]
        for row in range(B):
            alone = hooked.observe(td[row : row + 1].copy())["attr", "observation"]
            torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["LSTMModule, step by step", "GRUModule, step by step"])
def test_a_state_that_a_new_episode_throws_away_has_no_relevance(name):
    torch.manual_seed(0)
    model, td = FAMILIES[name].build(), FAMILIES[name].td()
    td["is_init"][2:] = True
    with signed(("logits", 0)).prepare(model) as hooked:
        td = hooked(td)
    relevance = td["attr", "h"].abs().flatten(1).sum(1)
    assert torch.equal(relevance > 0, ~td["is_init"].squeeze(-1))
    assert "is_init" not in set(td["attr"].keys())


# --- agents and ensembles ----------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared weights", "own weights"])
@pytest.mark.parametrize("centralised", [True, False], ids=["centralised", "apart"])
def test_agents_that_do_not_see_each_other_have_no_relevance_for_each_other(shared, centralised):
    name = f"MultiAgentMLP, {'shared' if shared else 'own'} weights"
    model = FAMILIES[name + (", centralised" if centralised else "")].build()
    td = agents()
    with signed(Each(("agents", "value"))).prepare(model) as hooked:
        td = hooked(td)
    relevance = td["attr", "agents", "observation"]
    assert relevance.shape == (B, AGENTS, AGENTS, OBS)  # of whose value, then through whom
    expected = torch.ones(AGENTS, AGENTS) if centralised else torch.eye(AGENTS)
    assert torch.equal((relevance.abs().sum(-1) > 0).float(), expected.expand(B, AGENTS, AGENTS))


@every_weight_rule
def test_rules_on_stacked_agents_are_those_on_each_agent_alone(rule):
    model, td = FAMILIES["MultiAgentMLP, own weights"].build(), agents()
    with LRP(only_linear(rule), Each(("agents", "value"))).prepare(model) as hooked:
        td = hooked(td)
    for agent in range(AGENTS):
        net = copy.deepcopy(model.module._empty_net).to_empty(device="cpu")
        model.module.params[agent].detach().to_module(net)
        own = TensorDict({"observation": td["agents", "observation"][:, agent]}, [B])
        critic = TensorDictModule(net, in_keys=["observation"], out_keys=["value"])
        with LRP(only_linear(rule), "value").prepare(critic) as hooked:
            own = hooked(own)
        found = td["attr", "agents", "observation"][:, agent, agent]
        torch.testing.assert_close(found, own["attr", "observation"], rtol=1e-4, atol=1e-6)


def make_ensemble() -> tuple[EnsembleModule, TensorDict]:
    member = TensorDictModule(mlp(n_out=1), in_keys=["observation"], out_keys=["value"])
    return EnsembleModule(member, 3), TensorDict({"observation": torch.randn(B, OBS)}, [B])


def gradients_of_members(model: EnsembleModule, td: TensorDict) -> Tensor:
    found = []
    for params in model.params_td.detach().unbind(0):
        leaf = td["observation"].clone().requires_grad_()
        with params.to_module(model.module):
            value = model.module(TensorDict({"observation": leaf}, [B]))["value"]
        found += torch.autograd.grad(value.sum(), leaf)
    return torch.stack(found)


def test_each_member_of_an_ensemble_is_explained_by_its_own_gradient():
    model, td = make_ensemble()
    expected = model(td.copy())
    with signed().prepare(model) as hooked:
        found = hooked(td)
    assert found.batch_size == (3, B) and torch.equal(found["value"], expected["value"])
    torch.testing.assert_close(found["attr", "observation"], gradients_of_members(model, td))


def test_an_observed_ensemble_has_its_members_behind_the_batch():
    model, td = make_ensemble()
    with signed().prepare(model) as hooked:
        found = hooked.observe(td)["attr", "observation"]
    torch.testing.assert_close(found.movedim(1, 0), gradients_of_members(model, td))
    assert set(td.keys()) == {"observation", "attr"}


def test_the_members_of_an_ensemble_are_integrated_apart():
    model, td = make_ensemble()
    method = IntegratedGradients(n_steps=8, method="riemann_middle", gap_tolerance=None)
    with method.prepare(model) as hooked:
        found = hooked(td.copy())
    slopes = [
        gradients_of_members(model, td.apply(lambda x, t=t: t * x))
        for t in torch.arange(8) / 8 + 1 / 16
    ]
    expected = td["observation"] * torch.stack(slopes).mean(0)
    torch.testing.assert_close(found["attr", "observation"], expected, rtol=1e-4, atol=1e-6)


def test_a_critic_of_a_sac_loss_is_explained_with_the_weights_that_the_loss_trains():
    actor = sampler(IndependentNormal, "loc", "scale")
    critic = ValueOperator(mlp(OBS + ACTIONS, 1), in_keys=["observation", "action"])
    loss = SACLoss(actor, critic, num_qvalue_nets=2, target_entropy=-1.0)
    td = observations(action=lambda: torch.randn(B, ACTIONS))
    for index, params in enumerate(loss.qvalue_network_params.unbind(0)):
        with params.to_module(loss.qvalue_network), signed().prepare(loss.qvalue_network) as hooked:
            found = hooked.observe(td.copy())
        plain = copy.deepcopy(critic)
        loss.qvalue_network_params.detach()[index].to_module(plain)
        leaf = td["action"].clone().requires_grad_()
        value = plain(td.copy().set("action", leaf))["state_action_value"]
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        torch.testing.assert_close(found["attr", "action"], grad)


# --- a wrapper that returns something else -----------------------------------------------------


def test_what_a_decision_transformer_masks_has_no_relevance_and_the_input_stays_whole():
    family = FAMILIES["DecisionTransformerInferenceWrapper"]
    model, td = family.build(), family.td()
    given = td.clone()
    with signed(family.target).prepare(model) as hooked:
        found = hooked(td)
    assert torch.equal(found["action"], model(given.clone())["action"])
    assert not found["attr", "observation"][:, : T - 2].any()
    assert found["attr", "observation"][:, T - 2 :].all(-1).all()
    assert found is not td
    assert set(td.keys()) == set(given.keys())
    assert all(torch.equal(td[key], given[key]) for key in given.keys())  # noqa: SIM118
