"""Claims about the trained policies, by plain play and plain autograd: no attribution method."""

from importlib.resources import files

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, check_env_specs, set_exploration_type
from torchrl.modules import set_recurrent_mode

from tdhook_like import KeyNotFoundError
from tdhook_like.demo import cartpole, memory, policy

EPISODES = 10


@pytest.fixture(scope="module")
def actor():
    return policy.load_policy()


@pytest.fixture(scope="module")
def play(actor):
    return cartpole.greedy_play(actor, episodes=EPISODES, seed=11)


@pytest.fixture(scope="module")
def without(actor, play):
    """The mean return without each key."""
    states, _ = play
    return {
        key: cartpole.permuted_return(actor, key, episodes=EPISODES, seed=12, donors=states).mean()
        for key in cartpole.KEYS
    }


@pytest.fixture(scope="module", params=[0, 1, 2])
def recall(request):
    """A policy that remembers, and fresh episodes for it."""
    episodes = memory.recorded_episodes(500, seed=100 + request.param)
    return memory.train_memory(request.param), episodes


def test_the_shipped_file_is_small_and_holds_nothing_but_tensors():
    file = files("tdhook_like.demo") / policy.WEIGHTS
    assert len(file.read_bytes()) < 100_000
    with file.open("rb") as stream:
        content = torch.load(stream, weights_only=True)
    for network in content.values():
        assert all(type(value) is torch.Tensor for value in network.values())


def test_the_environment_keeps_its_specs():
    check_env_specs(cartpole.make_env(seed=0))


def test_a_seed_settles_starts_and_distractors():
    def record(seed):
        torch.manual_seed(0)
        return cartpole.make_env(seed).rollout(20)

    first, again, other = record(3), record(3), record(4)
    assert (first == again).all()
    for key in cartpole.KEYS:
        assert not torch.equal(first[key][0], other[key][0])


def test_echo_is_the_old_angle_blurred_and_noise_is_unrelated(play):
    states, _ = play
    angle = states["pole"][:, 0]

    def correlation(key, feature):
        return torch.corrcoef(torch.stack([angle, states[key][:, feature]]))[0, 1]

    assert correlation("echo", 0) > 0.4
    assert correlation("echo", 1) > 0.2
    assert max(correlation("noise", 0).abs(), correlation("noise", 1).abs()) < 0.05


def test_the_policy_balances_to_the_end_in_every_episode(play):
    _, returns = play
    assert returns.tolist() == [cartpole.EPISODE] * EPISODES


def test_the_policy_balances_in_a_torchrl_rollout_too(actor):
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        td = cartpole.make_env(seed=5).rollout(cartpole.EPISODE, actor)
    assert td["next", "reward"].sum() == cartpole.EPISODE


def test_the_critic_reads_what_the_actor_reads(play):
    states, _ = play
    critic = policy.load_critic()
    assert critic.in_keys == list(cartpole.KEYS)
    assert critic(states[:7].clone())["state_value"].shape == (7, 1)


def test_without_a_true_key_the_return_collapses(without):
    assert without["pole"] < 50
    assert without["cart"] < 200


def test_without_a_distractor_the_return_stays(without):
    assert min(without[key] for key in cartpole.DISTRACTORS) > 490


def test_permutation_of_an_unknown_key_is_refused(actor):
    with pytest.raises(KeyNotFoundError, match="velocity"):
        cartpole.permuted_return(actor, "velocity")


def test_input_times_gradient_rests_on_the_true_keys(actor, play):
    states, _ = play
    inputs = [states[key].clone().requires_grad_() for key in cartpole.KEYS]
    logits = actor[0].module(*inputs)
    margin = (logits.max(-1).values - logits.min(-1).values).sum()
    gradients = torch.autograd.grad(margin, inputs)
    relevance = [(g * x).detach() for g, x in zip(gradients, inputs, strict=True)]
    by_key = torch.stack([r.sum(-1) for r in relevance], -1).abs()
    assert (by_key.argmax(-1) < 2).float().mean() > 0.95
    absolute = torch.stack([r.abs().sum() for r in relevance])
    assert absolute[2:].sum() / absolute.sum() < 0.15


def test_the_memory_task_keeps_its_specs_and_repeats_itself_under_a_seed():
    check_env_specs(memory.make_memory_env(3))
    first, again, other = (memory.recorded_episodes(4, seed=s) for s in (1, 1, 2))
    assert (first == again).all()
    assert not torch.equal(first["noise"], other["noise"])


def test_the_cue_is_shown_once_and_is_smaller_than_the_noise():
    td = memory.recorded_episodes(200)
    shown = td["cue"][..., 0].abs()
    assert (shown == torch.nn.functional.one_hot(torch.tensor(memory.SHOWN), memory.LENGTH)).all()
    assert td["noise"].std() > 1.5


def test_only_the_right_last_action_is_rewarded():
    def earned(flip):
        env = memory.make_memory_env(50, seed=1)
        answers = memory.answers(memory.recorded_episodes(50, seed=1))
        td = env.rollout(memory.LENGTH, lambda td: td.set("action", answers ^ flip))
        return td["next", "reward"]

    assert earned(0)[:, -1].all()
    assert not earned(0)[:, :-1].any()
    assert not earned(1).any()


def test_training_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    memory.train_memory(0, updates=1, batch=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_trained_memory_is_perfect(recall):
    assert memory.accuracy(*recall) == 1.0


def test_the_memory_policy_answers_in_a_rollout_as_it_does_over_whole_episodes(recall):
    remembering, _ = recall
    env = memory.make_memory_env(20, seed=7, policy=remembering)
    with torch.no_grad():
        td = env.rollout(memory.LENGTH, remembering)
        with set_recurrent_mode("recurrent"):
            whole = remembering(td.select("cue", "noise", "is_init"))
    torch.testing.assert_close(td["logits"], whole["logits"], rtol=1e-4, atol=1e-4)
    assert td["next", "reward"][:, -1].all()


def test_the_last_answer_is_that_of_the_policy_over_whole_episodes(recall):
    remembering, td = recall
    with torch.no_grad(), set_recurrent_mode("recurrent"):
        whole = remembering(td.clone())
    episodes = td.clone()
    episodes.batch_size = td.batch_size[:1]
    answered = memory.LastAnswer(remembering)(episodes.unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(answered["logits"], whole["logits"][:, -1])
    assert torch.equal(answered["action"], memory.answers(td))


def _gradient(remembering, td, actions, scale):
    """Gradient of the last step's logit of the action, at scaled inputs, [B, T, 3]."""
    cue = (scale * td["cue"]).requires_grad_()
    noise = (scale * td["noise"]).requires_grad_()
    inputs = TensorDict(cue=cue, noise=noise, is_init=td["is_init"], batch_size=td.batch_size)
    with set_recurrent_mode("recurrent"):
        logits = remembering(inputs)["logits"][:, -1]
    chosen = logits.gather(-1, actions.unsqueeze(-1))
    return torch.cat(torch.autograd.grad(chosen.sum(), (cue, noise)), -1)


def test_integrated_gradients_finds_the_shown_cue_and_the_plain_gradient_does_not(recall):
    remembering, td = recall
    steps = 32
    actions = memory.answers(td)
    path = [_gradient(remembering, td, actions, (k + 0.5) / steps) for k in range(steps)]
    integrated = torch.cat([td["cue"], td["noise"]], -1) * torch.stack(path).mean(0)
    plain = _gradient(remembering, td, actions, 1.0)

    def found(relevance):
        largest = relevance.abs().flatten(1).argmax(-1)
        return (largest == memory.SHOWN * 3).float().mean()

    assert found(integrated) >= 0.99
    assert found(plain) < 0.2
