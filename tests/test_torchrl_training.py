"""What observes a training: the trainer's hook and the evaluator's metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector, Evaluator
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from torchrl.trainers import DefaultOptimizationStepper, ReplayBufferTrainer, Trainer

from tdhook_like import LRP, Each, InputError, InputXGradient, IntegratedGradients, Saliency
from tdhook_like.metrics import key_shares
from tdhook_like.rl import AttributionHook, AttributionTransform, attribution_metrics
from torchrl_play import KEYS, assert_bit_equal, make_critic, make_env, make_policy, record


class Training:
    """Some steps of proximal policy optimisation with torchrl's Trainer, always from one seed."""

    def __init__(self, *, explain_samples: bool = False) -> None:
        self.policy, self.critic = make_policy(), make_critic()
        torch.manual_seed(2)
        self.loss = ClipPPOLoss(self.policy, self.critic)
        self.batches: list[TensorDictBase] = []
        self.trainer = Trainer(
            collector=Collector(
                make_env(),
                self.policy,
                frames_per_batch=16,
                total_frames=48,
                auto_register_policy_transforms=False,
            ),
            total_frames=48,
            frame_skip=1,
            optim_steps_per_batch=3,
            loss_module=self.loss,
            optimizer=torch.optim.Adam(self.loss.parameters(), lr=1e-2),
            optimization_stepper=DefaultOptimizationStepper(),
            progress_bar=False,
            log_interval=0,
        )
        advantage = GAE(gamma=0.99, lmbda=0.95, value_network=self.critic)
        self.trainer.register_op("batch_process", advantage)
        samples = TensorDictReplayBuffer(storage=LazyTensorStorage(16), batch_size=8)
        if explain_samples:
            samples.append_transform(AttributionTransform(LRP(), self.policy))
        buffer = ReplayBufferTrainer(samples, flatten_tensordicts=True)
        self.trainer.register_op("batch_process", buffer.extend)
        self.trainer.register_op("process_optim_batch", buffer.sample)
        self.trainer.register_op("post_optim_log", self.keep)

    def keep(self, batch: TensorDictBase) -> None:
        self.batches.append(batch.copy())

    def run(self) -> Training:
        torch.manual_seed(4)
        self.trainer.train()
        self.drawn = torch.rand(1)
        return self

    def logged(self, name: str) -> list[float]:
        return self.trainer._log_dict[name]


def assert_same_training(found: Training, expected: Training) -> None:
    assert torch.equal(found.drawn, expected.drawn)
    ours, theirs = found.loss.state_dict(), expected.loss.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert len(found.batches) == len(expected.batches) == 9
    for batch, other in zip(found.batches, expected.batches, strict=True):
        assert_bit_equal(batch, other)


HOOKS = {
    "the actor": lambda training: (InputXGradient(), training.policy),
    "the actor under LRP": lambda training: (LRP(), training.policy),
    "the critic along a path": lambda training: (
        IntegratedGradients(n_steps=4, gap_tolerance=None),
        training.critic,
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_training_with_the_hook_is_training_without_it_bit_for_bit(name):
    expected = Training().run()
    training = Training()
    untrained = training.loss.state_dict()["actor_network_params.module.0.module.net.0.weight"]
    untrained = untrained.clone()
    AttributionHook(*HOOKS[name](training), interval=2).register(training.trainer)
    training.run()
    assert_same_training(training, expected)
    trained = training.loss.state_dict()["actor_network_params.module.0.module.net.0.weight"]
    assert not torch.equal(trained, untrained)
    shares = [training.logged(f"attr/{key}/share") for key in KEYS]
    assert [len(share) for share in shares] == [5, 5]  # the steps 1, 3, 5, 7 and 9 of nine
    assert all(sum(pair) == pytest.approx(1.0) for pair in zip(*shares, strict=True))


def test_training_on_explained_samples_is_training_on_samples_bit_for_bit():
    training = Training(explain_samples=True).run()
    assert all(batch["attr"].batch_size == (8,) for batch in training.batches)
    training.batches = [batch.exclude("attr") for batch in training.batches]
    assert_same_training(training, Training().run())


def test_what_was_written_as_the_policy_acted_does_not_count_among_the_shares():
    critic, batch = make_critic(), record(make_policy())
    expected = AttributionHook(InputXGradient(keys=("th",)), critic)(batch)
    batch["attr"] = TensorDict({key: torch.ones(32, 1) for key in KEYS}, [32])
    found = AttributionHook(InputXGradient(keys=("th",)), critic)(batch)
    assert found == expected and found is not None
    assert found["attr/th/share"] == 1.0


def test_the_hook_gives_the_shares_of_the_batch_and_leaves_the_batch_as_it_is():
    policy = make_policy()
    batch = record(policy).lock_()
    hook = AttributionHook(InputXGradient(), policy, interval=3, n_resamples=50)
    results = [hook(batch) for _ in range(7)]
    assert [result is None for result in results] == [False, True, True] * 2 + [False]
    assert "attr" not in set(batch.keys())
    with InputXGradient().prepare(policy) as hooked:
        expected = key_shares(hooked.observe(batch.copy()), n_resamples=50).to_dict()
    wanted = {f"attr/{key}/share{end}" for key in KEYS for end in ("", "_low", "_high")}
    assert results[0] is not None and set(results[0]) == wanted | {"log_pbar"}
    for name in wanted:
        assert results[0][name] == pytest.approx(expected[name.removeprefix("attr/")])


def test_the_hook_keeps_its_rhythm_over_a_restart():
    critic, batch = make_critic(), record(make_policy())
    hook = AttributionHook(Saliency(), critic, interval=3)
    hook(batch)
    resumed = AttributionHook(Saliency(), critic, interval=3)
    resumed.load_state_dict(hook.state_dict())
    assert [resumed(batch) is None for _ in range(3)] == [True, True, False]


def test_every_target_is_logged_under_its_own_name():
    policy, batch = make_policy(), record(make_policy())
    targets = {"loc": ("loc", 0), "both": Each(lambda td: torch.cat([td["loc"], td["scale"]], -1))}
    hook = AttributionHook(Saliency(targets), policy, prefix="why", statistics=("first",))
    result = hook(batch)
    assert result is not None
    names = {name for name in result if name.endswith("/first")}
    assert names == {f"why/{of}/{key}/first" for of in ("loc", "both/0", "both/1") for key in KEYS}


def test_only_the_first_rows_are_explained_where_rows_are_limited():
    critic, batch = make_critic(), record(make_policy())
    few = AttributionHook(Saliency(), critic, max_rows=5)(batch)
    expected = AttributionHook(Saliency(), critic)(batch[:5])
    assert few == expected


@pytest.mark.parametrize(
    "options",
    [
        {"interval": 0},
        {"interval": 1.5},
        {"statistics": ("mean",)},
        {"statistics": "share"},
        {"max_rows": 0},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        AttributionHook(Saliency(), make_critic(), **options)


# --- evaluators -----------------------------------------------------------------------------------


@contextmanager
def evaluator(policy: Any, layout: str = "padded", **options: Any) -> Iterator[Evaluator]:
    made = Evaluator(
        make_env(max_steps=7),
        policy,
        num_trajectories=2,
        max_steps=7,
        collector_kwargs={"traj_format": layout, "auto_register_policy_transforms": False},
        **options,
    )
    try:
        yield made
    finally:
        made.shutdown()


@pytest.mark.parametrize("layout", ["padded", "cat"])
def test_an_evaluation_gives_the_share_of_each_key_on_its_trajectories(layout):
    policy = make_policy().eval()
    kept: list[TensorDictBase] = []
    measure = attribution_metrics(InputXGradient(), policy, n_resamples=50)

    def metrics(trajectories: TensorDictBase) -> dict[str, float]:
        kept.append(trajectories.clone())
        found = measure(trajectories)
        assert_bit_equal(trajectories, kept[-1])
        return found

    with evaluator(policy, layout, metrics_fn=metrics) as made:
        result = made.evaluate()
    with InputXGradient().prepare(policy) as hooked:
        steps = kept[0] if layout == "cat" else kept[0][kept[0]["collector", "mask"]]
        explained = hooked.observe(steps)
    absolute = {key: explained["attr", key].abs().sum(-1) for key in KEYS}
    total = sum(absolute.values())
    for key in KEYS:
        share = (absolute[key] / total).mean().item()
        assert float(result[f"eval/attr/{key}/share"]) == pytest.approx(share, rel=1e-4)


def test_an_evaluation_between_two_trainings_changes_neither():
    def train_and_evaluate(**options: Any) -> tuple[Training, float]:
        training = Training()
        policy = make_policy()
        with evaluator(policy, **options) as made:
            torch.manual_seed(3)
            reward = float(made.evaluate()["eval/reward"])
        return training.run(), reward

    expected, reward = train_and_evaluate()
    measure = attribution_metrics(LRP(), make_policy())
    found, same_reward = train_and_evaluate(metrics_fn=measure)
    assert reward == same_reward
    assert_same_training(found, expected)


def test_steps_that_pad_a_trajectory_do_not_count():
    critic = make_critic()
    td = TensorDict({key: torch.randn(3, 6, 1) for key in KEYS}, [3, 6], names=[None, "time"])
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 2:] = False
    padded = td.clone().set(("collector", "mask"), mask)
    for key in KEYS:
        padded[key][~mask] = 0.0
    measure = attribution_metrics(InputXGradient(), critic)
    found, valid = measure(padded), measure(td[mask])
    for key in KEYS:
        name = f"attr/{key}/share"
        assert found[name] == pytest.approx(valid[name])


def test_a_critic_beside_a_policy_is_measured_on_the_same_trajectories():
    policy, critic = make_policy().eval(), make_critic()
    measure = attribution_metrics(InputXGradient(), critic)
    with evaluator(policy, metrics_fn=measure) as made:
        result = made.evaluate()
    shares = [float(result[f"eval/attr/{key}/share"]) for key in KEYS]
    assert sum(shares) == pytest.approx(1.0)
    assert isinstance(critic, ValueOperator)
