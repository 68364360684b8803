"""What is easy to get wrong about a family of torchrl modules, one claim each."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    EnsembleModule,
    TensorDictModule,
    TensorDictModuleWrapper,
    TensorDictSequential,
    set_skip_existing,
)
from torch import Tensor, nn
from torchrl.data import OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    EGreedyModule,
    IndependentNormal,
    NoisyLinear,
    QValueActor,
    ValueOperator,
    set_recurrent_mode,
)
from torchrl.objectives import SACLoss

from pristine import assert_same, snapshot
from tdhook_like import (
    LRP,
    Each,
    IntegratedGradients,
    KeyNotFoundError,
    LogProb,
    RuleError,
    Saliency,
    Taken,
    TargetError,
)
from tdhook_like.attribution.lrp import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from torchrl_families import (
    ACTIONS,
    AGENTS,
    FAMILIES,
    HIDDEN,
    OBS,
    B,
    T,
    agents,
    composite,
    last_step,
    logits,
    mlp,
    observations,
    sampler,
    steps,
    trunk,
)

WEIGHT_RULES = [
    ZPlusRule(),
    GammaRule(),
    AlphaBetaRule(),
    FlatRule(),
    WSquareRule(),
    ZBoxRule(-3.0, 3.0),
]
every_weight_rule = pytest.mark.parametrize(
    "rule", WEIGHT_RULES, ids=lambda rule: type(rule).__name__
)


def signed(target: object = None) -> Saliency:
    return Saliency(target, abs=False)  # pyright: ignore[reportArgumentType]


def only_linear(rule):
    return lambda path, module: rule if isinstance(module, nn.Linear) else None


# --- sequences ---------------------------------------------------------------------------------


def two_branches() -> TensorDictSequential:
    return TensorDictSequential(
        TensorDictModule(nn.Linear(OBS, 2), in_keys=["observation"], out_keys=["left"]),
        TensorDictModule(nn.Linear(OBS, 2), in_keys=["absent"], out_keys=["right"]),
        partial_tolerant=True,
    )


def test_a_module_that_a_tolerant_sequence_skips_has_no_part_in_the_explanation():
    model, td = two_branches(), observations()
    with signed(("left", 0)).prepare(model) as hooked:
        hooked(td)
    assert set(td.keys(True, True)) == {"observation", "reward", "left", ("attr", "observation")}
    assert torch.equal(td["attr", "observation"], model[0].module.weight[0].expand(B, OBS))


def test_a_rule_on_a_module_that_a_tolerant_sequence_skips_is_reported_unless_that_is_allowed():
    model, mapper = two_branches(), only_linear(EpsilonRule())
    with (
        LRP(mapper, ("left", 0)).prepare(model) as hooked,
        pytest.raises(RuleError, match=r"1\.module"),
    ):
        hooked(observations())
    with LRP(mapper, ("left", 0), unreached="ignore").prepare(model) as hooked:
        assert ("attr", "observation") in hooked(observations()).keys(True)


def test_selected_out_keys_stay_selected_and_can_be_reset_afterwards():
    model = TensorDictSequential(trunk(), logits("hidden", HIDDEN)).select_out_keys("logits")
    hooks = list(model._forward_hooks.values())
    td = observations()
    with signed(("logits", 0)).prepare(model) as hooked:
        assert hooked.out_keys == ["logits", ("attr", "observation")]
        hooked(td)
    assert "hidden" not in set(td.keys())
    assert list(model._forward_hooks.values()) == hooks
    assert "hidden" in set(model.reset_out_keys()(observations()).keys())


def test_modules_that_skip_what_exists_are_explained_as_if_they_ran():
    model, td = TensorDictSequential(trunk(), logits("hidden", HIDDEN)), observations()
    written = model(td.copy()).detach()
    written["hidden"] = written["hidden"] + 1.0
    with signed(("logits", 0)).prepare(model) as hooked:
        expected = hooked(td.copy())["attr", "observation"]
        with set_skip_existing(True):
            found = hooked(written.exclude("logits"))
    assert torch.equal(found["hidden"], written["hidden"])
    torch.testing.assert_close(found["attr", "observation"], expected)


def test_a_wrapper_that_fires_hooks_twice_gets_every_rule_once():
    model = TensorDictSequential(trunk(), ValueOperator(mlp(HIDDEN, 1), in_keys=["hidden"]))
    model.register_forward_hook(lambda module, args, output: None)
    wrapped, td = TensorDictModuleWrapper(model), observations()
    method = LRP(only_linear(GammaRule(0.5)), "state_value")
    with method.prepare(model) as hooked, method.prepare(wrapped) as hooked_wrapper:
        expected, found = hooked(td.copy()), hooked_wrapper(td.copy())
    assert torch.equal(found["attr", "observation"], expected["attr", "observation"])


# --- policies ----------------------------------------------------------------------------------


def test_the_pathwise_part_of_a_drawn_action_does_not_leak_into_its_log_probability():
    policy, td = sampler(IndependentNormal, "loc", "scale"), observations()
    leaf = td["observation"].clone().requires_grad_()
    with set_exploration_type(ExplorationType.RANDOM):
        torch.manual_seed(0)
        outputs = policy(td.copy().set("observation", leaf))
        (leaking,) = torch.autograd.grad(outputs["action_log_prob"].sum(), leaf, retain_graph=True)
        held = policy.get_dist(outputs).log_prob(outputs["action"].detach())
        (expected,) = torch.autograd.grad(held.sum(), leaf)
        torch.manual_seed(0)
        with signed().prepare(policy) as hooked:
            found = hooked(td)["attr", "observation"]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, leaking, rtol=0.1)


@pytest.mark.parametrize("mode", [None, *ExplorationType], ids=str)
@pytest.mark.parametrize(
    "name", ["Categorical", "OneHotCategorical", "IndependentNormal", "TanhNormal"]
)
def test_a_hooked_policy_acts_as_the_plain_one_under_every_exploration_type(name, mode):
    policy, td = FAMILIES[name].build(), observations()

    def act(module):
        torch.manual_seed(1)
        with set_exploration_type(mode):
            return module(td.copy())["action"]

    try:
        expected = act(policy)
    except (NotImplementedError, AttributeError, RuntimeError) as refusal:
        with signed().prepare(policy) as hooked, pytest.raises(type(refusal)):
            act(hooked)  # a TanhNormal has no mode, with or without us
        return
    with signed().prepare(policy) as hooked:  # the mean of one-hot draws is NaN in torchrl
        torch.testing.assert_close(act(hooked), expected, rtol=0, atol=0, equal_nan=True)


def test_the_greedy_value_is_explained_and_not_the_one_that_exploration_executes():
    policy = QValueActor(mlp(), in_keys=["observation"], spec=OneHot(ACTIONS))
    model = TensorDictSequential(policy, EGreedyModule(OneHot(ACTIONS), 1.0, 1.0))
    td, targets = observations(), {"greedy": "chosen_action_value", "done": Taken("action_value")}
    with signed(targets).prepare(model) as hooked:
        td = hooked(td)
    leaf = td["observation"].clone().requires_grad_()
    values = policy.module[0].module(leaf)
    executed = td["action"].int().argmax(-1)
    assert (executed != values.argmax(-1)).any()
    (greedy,) = torch.autograd.grad(values.max(-1).values.sum(), leaf, retain_graph=True)
    (done,) = torch.autograd.grad(values.gather(-1, executed[:, None]).sum(), leaf)
    torch.testing.assert_close(td["attr", "greedy", "observation"], greedy)
    torch.testing.assert_close(td["attr", "done", "observation"], done)


def test_the_heads_of_a_composite_distribution_are_targets_of_their_own():
    policy, td = composite(), observations()
    heads = {"gear": LogProb(("action", "gear")), "steer": LogProb(("action", "steer"))}
    with signed(heads).prepare(policy) as hooked, set_exploration_type(ExplorationType.RANDOM):
        td = hooked(td)
    assert set(td["attr"].keys(True, True)) == {("gear", "observation"), ("steer", "observation")}
    leaf = td["observation"].clone().requires_grad_()
    net = policy.module[0].module.net
    parts = net(leaf)
    gear = torch.distributions.Categorical(logits=parts[:, :ACTIONS])
    scale = nn.functional.softplus(parts[:, -1])
    steer = torch.distributions.Normal(parts[:, -2], scale)
    expected = {
        "gear": gear.log_prob(td["action", "gear"]),
        "steer": steer.log_prob(td["action", "steer"].squeeze(-1)),
    }
    for name, score in expected.items():
        (grad,) = torch.autograd.grad(score.sum(), leaf, retain_graph=True)
        torch.testing.assert_close(td["attr", name, "observation"], grad)


def test_a_policy_without_an_obvious_head_says_how_to_name_one():
    with pytest.raises(TargetError, match=r"LogProb\(\('action', 'gear'\)\)"):
        Saliency(LogProb()).prepare(composite()).__enter__()(observations())


def test_actor_and_critic_of_one_trunk_are_explained_side_by_side():
    model = FAMILIES["ActorValueOperator"].build()
    actor, critic = model.get_policy_operator(), model.get_value_operator()
    td = observations()
    with signed().prepare(actor) as acting:
        alone = acting.observe(model(td.copy()).detach())["attr", "observation"]
        record = model(td.copy()).detach()
        with signed().prepare(critic) as judging:
            of_critic = judging(record.copy())["attr", "observation"]
            of_actor = acting.observe(record.copy())["attr", "observation"]
        assert not torch.allclose(of_actor, of_critic)
        torch.testing.assert_close(acting.observe(record)["attr", "observation"], of_actor)
    assert alone.shape == of_actor.shape
    assert not any(module._forward_hooks for module in model.modules())


# --- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DuelingMlpDQNet", "DuelingCnnDQNet"])
def test_what_a_dueling_head_combines_is_shared_out_without_a_remainder(name):
    # Biases start at zero there, so relevance has nowhere else to go: it adds up to the Q-value.
    model, td = FAMILIES[name].build(), FAMILIES[name].td()
    kinds = nn.Linear | nn.Conv2d
    mapper = lambda path, module: EpsilonRule(1e-12) if isinstance(module, kinds) else None  # noqa: E731
    with LRP(mapper).prepare(model) as hooked:
        td = hooked(td)
    (key,) = FAMILIES[name].keys
    total = td["attr", key].flatten(1).sum(1)
    torch.testing.assert_close(total, td["chosen_action_value"].squeeze(-1), rtol=1e-4, atol=1e-6)


@every_weight_rule
def test_rules_read_the_noisy_weights_that_the_layer_computes_with(rule):
    noisy, td = NoisyLinear(OBS, 1), observations()
    plain = nn.Linear(OBS, 1)
    plain.weight.data, plain.bias.data = noisy.weight.detach(), noisy.bias.detach()
    found, expected = (
        LRP(only_linear(rule)).prepare(ValueOperator(net, in_keys=["observation"]))
        for net in (noisy, plain)
    )
    with found as hooked_noisy, expected as hooked_plain:
        of_noisy, of_plain = hooked_noisy(td.copy()), hooked_plain(td.copy())
    torch.testing.assert_close(of_noisy["attr", "observation"], of_plain["attr", "observation"])


def test_observing_looks_at_a_noisy_network_without_its_noise_and_leaves_the_noise_alone():
    noisy, td = NoisyLinear(OBS, 1), observations()
    before = snapshot(noisy)
    with signed().prepare(ValueOperator(noisy, in_keys=["observation"])) as hooked:
        hooked.observe(td)
    assert_same(before, snapshot(noisy))
    assert torch.equal(td["attr", "observation"], noisy.weight_mu.detach().expand(B, OBS))


# --- recurrent modules -------------------------------------------------------------------------


RECURRENT = ["LSTMModule over time with resets", "GRUModule over time with resets"]
every_recurrent = pytest.mark.parametrize("name", RECURRENT)


def over_time(name: str, td: TensorDict, target=last_step, method=signed) -> Tensor:
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    with method(target).prepare(model) as hooked, set_recurrent_mode():
        return hooked(td.copy())["attr", "observation"]


@every_recurrent
def test_time_of_one_environment_is_not_mixed_with_another_one(name):
    td = FAMILIES[name].td()
    together = over_time(name, td)
    for row in range(B):
        torch.testing.assert_close(together[row : row + 1], over_time(name, td[row : row + 1]))


@every_recurrent
def test_a_reset_cuts_what_came_before_it_off(name):
    relevance = over_time(name, FAMILIES[name].td()).abs().sum(-1)
    assert torch.equal(relevance[1] > 0, torch.tensor([False, False, True, True]))
    assert torch.equal(relevance[2] > 0, torch.tensor([False, False, True, True]))
    assert (relevance[[0, 3, 4]] > 0).all()


@every_recurrent
def test_what_comes_after_the_explained_step_has_no_relevance(name):
    def second_step(td):
        chosen = td["logits"][..., 0]
        return chosen * (torch.arange(T) == 1)

    relevance = over_time(name, steps(B, T, states=()), second_step).abs().sum(-1)
    assert torch.equal(relevance > 0, torch.tensor([True, True, False, False]).expand(B, T))


@every_recurrent
def test_steps_are_stacked_in_front_of_time_and_not_folded_into_it(name):
    torch.manual_seed(0)
    model, td = FAMILIES[name].build(), FAMILIES[name].td()
    context = IntegratedGradients(last_step, n_steps=4, gap_tolerance=None).prepare(model)
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


def test_each_member_of_an_ensemble_is_explained_by_its_own_gradient():
    member = TensorDictModule(mlp(n_out=1), in_keys=["observation"], out_keys=["value"])
    model, td = EnsembleModule(member, 3), TensorDict({"observation": torch.randn(B, OBS)}, [B])
    expected = model(td.copy())
    with signed().prepare(model) as hooked:
        found = hooked(td)
    assert found.batch_size == (3, B) and torch.equal(found["value"], expected["value"])
    for index in range(3):
        leaf = td["observation"].clone().requires_grad_()
        params = model.params_td[index].detach()
        with params.to_module(member):
            value = member(TensorDict({"observation": leaf}, [B]))["value"]
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        torch.testing.assert_close(found["attr", "observation"][index], grad)


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


def test_a_key_that_is_missing_from_the_td_is_named():
    with (
        signed().prepare(ValueOperator(mlp(n_out=1), in_keys=["observation"])) as hooked,
        pytest.raises(KeyNotFoundError, match="'observation'"),
    ):
        hooked(TensorDict({"pixels": torch.ones(2, 3)}, [2]))
