"""The recurrent task with a known cause: relevance must lie where the cue was shown."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDictBase

from tdhook_like import AtStep, Greedy, IntegratedGradients, Saliency
from tdhook_like.demo.memory import (
    LENGTH,
    SHOWN,
    LastAnswer,
    accuracy,
    recorded_episodes,
    train_memory,
)

EPISODES = 300


@pytest.fixture(scope="module")
def trained():
    return train_memory(0)


def cause_found(td: TensorDictBase) -> float:
    """In how many episodes the largest relevance lies at (cue, the step at which it was shown)."""
    parts = [td["attr", key].detach().abs() for key in ("cue", "noise")]
    places = torch.cat([part.transpose(1, 2).flatten(1) for part in parts], -1)
    assert places.shape == (EPISODES, 3 * LENGTH)
    return (places.argmax(-1) == SHOWN).float().mean().item()


def test_the_trained_policy_remembers(trained):
    assert accuracy(trained, recorded_episodes(1000, seed=5)) == 1.0


def test_integrated_gradients_find_the_cue_where_the_plain_gradient_does_not(trained):
    found = {}
    for name, method in {
        "integrated": IntegratedGradients(Greedy("logits"), n_steps=50),
        "plain": Saliency(Greedy("logits")),
    }.items():
        td = recorded_episodes(EPISODES, seed=7)
        td.batch_size = [EPISODES]  # time is what is explained, not what is averaged over
        with method.prepare(LastAnswer(trained)) as hooked:
            found[name] = cause_found(hooked(td))
    assert found["integrated"] >= 0.99
    assert found["plain"] < 0.5


def test_one_step_of_the_policy_itself_is_explained_as_the_last_answer_is(trained):
    from torchrl.modules import set_recurrent_mode

    td = recorded_episodes(EPISODES, seed=7)
    flat = recorded_episodes(EPISODES, seed=7)
    flat.batch_size = [EPISODES]
    with Saliency(("logits", 1), abs=False).prepare(LastAnswer(trained)) as hooked:
        expected = hooked(flat)["attr", "cue"]
    method = Saliency(AtStep(("logits", 1), -1), abs=False, keys=("cue",))
    with set_recurrent_mode("recurrent"), method.prepare(trained) as hooked:
        found = hooked(td)["attr", "cue"]
    torch.testing.assert_close(found, expected)
