"""The main job as `make demo` runs it, on one episode."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tensordict import TensorDict

from tdhook_like.__main__ import main as command
from tdhook_like.demo import run


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    found = run.explain(episodes=1)
    return folder, found, run.draw(found, folder)


def test_attribution_and_ground_truth_agree_and_nothing_was_changed(outcome):
    _, found, _ = outcome
    assert found.passed
    assert found.needed == {"cart", "pole"}
    assert found.unchanged and found.same_trajectory
    assert found.gap < 0.05
    text = run.report(found)
    assert "yes, every byte" in text and "yes, bit for bit" in text


def test_disagreement_is_not_passed_over(outcome):
    _, found, _ = outcome
    swapped = {**found.without, "cart": found.returns, "noise": 0.0}
    assert not dataclasses.replace(found, without=swapped).passed
    assert not dataclasses.replace(found, unchanged=False).passed
    assert not dataclasses.replace(found, same_trajectory=False).passed


def test_every_picture_is_written(outcome):
    folder, _, pictures = outcome
    assert [p.parent for p in pictures] == [folder] * 3
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


def test_the_attributions_load_back_from_the_memory_map(outcome):
    folder, found, _ = outcome
    found.rollout.memmap(str(folder / "attributions"), copy_existing=True)
    loaded = TensorDict.load_memmap(str(folder / "attributions"))
    for key, value in found.rollout.items(True, True):
        assert torch.equal(loaded[key], value)


def test_the_command_line_refuses_what_it_does_not_know(capsys):
    for words in (["demo", "--episodes", "0"], ["dmeo"], []):
        with pytest.raises(SystemExit) as stopped:
            command(words)
        assert stopped.value.code == 2
        assert "error:" in capsys.readouterr().err
