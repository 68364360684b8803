"""What is easy to get wrong about a family of torchrl modules, one claim each."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    TensorDictModule,
    TensorDictModuleWrapper,
    TensorDictSequential,
    set_skip_existing,
)
from torch import nn
from torchrl.data import OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    AdditiveGaussianModule,
    EGreedyModule,
    IndependentNormal,
    NoisyLinear,
    OrnsteinUhlenbeckProcessModule,
    QValueActor,
    TanhDelta,
    ValueOperator,
)

from pristine import assert_same, snapshot
from tdhook_like import LRP, KeyNotFoundError, LogProb, RuleError, Saliency, Taken, TargetError
from tdhook_like.attribution.lrp import EpsilonRule, GammaRule
from torchrl_records import FAMILIES
from torchrl_records.methods import every_weight_rule, only_linear, signed
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
    steps,
    trunk,
)

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


@pytest.mark.parametrize("noise", [AdditiveGaussianModule, OrnsteinUhlenbeckProcessModule])
def test_a_policy_is_explained_in_front_of_the_noise_that_is_added_to_its_action(noise):
    policy = TensorDictModule(
        nn.Sequential(mlp(), nn.Tanh()), in_keys=["observation"], out_keys=["action"]
    )
    noisy, td = TensorDictSequential(policy, noise(bounded())), steps(B, states=())
    with pytest.raises(TargetError, match="TensorDictSequential"):
        Saliency().prepare(noisy)

    def act(module):
        torch.manual_seed(0)
        with set_exploration_type(ExplorationType.RANDOM):
            return module(td.copy())

    leaf = td["observation"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(policy.module(leaf)[:, 0].sum(), leaf)
    plain = act(noisy)
    assert not torch.equal(plain["action"], policy(td.copy())["action"])
    with signed(("action", 0)).prepare(policy) as hooked:
        found = act(TensorDictSequential(hooked, noisy[1]))
    assert torch.equal(found["action"], plain["action"])
    torch.testing.assert_close(found["attr", "observation"], expected)


def test_a_policy_that_is_a_point_mass_has_no_log_probability_to_explain():
    policy = actor(deterministic(), TanhDelta, "param")
    with signed().prepare(policy) as hooked, pytest.raises(TargetError, match="Inf"):
        hooked(observations())
    td = observations()
    leaf = td["observation"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(policy.module[0].module(leaf)[:, 0].sum(), leaf)
    with signed(("param", 0)).prepare(policy) as hooked:
        torch.testing.assert_close(hooked(td)["attr", "observation"], expected)


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


def test_a_key_that_is_missing_from_the_td_is_named():
    with (
        signed().prepare(ValueOperator(mlp(n_out=1), in_keys=["observation"])) as hooked,
        pytest.raises(KeyNotFoundError, match="'observation'"),
    ):
        hooked(TensorDict({"pixels": torch.ones(2, 3)}, [2]))
