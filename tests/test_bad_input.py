"""Wrong uses: each gives one error of the library that says what was wrong and what to do.

A record per wrong use. It is tried by driving and by observing, and model, TensorDict and RNG must
be afterwards as they were before.
"""

from __future__ import annotations

import pytest
import torch

from pristine import assert_same, snapshot, td_snapshot
from tdhook_like import (
    LRP,
    BaselineError,
    ContextError,
    InputError,
    InputXGradient,
    IntegratedGradients,
    KeyNotFoundError,
    LayoutError,
    LockedError,
    ModelError,
    PathError,
    RuleError,
    TargetError,
    TdhookLikeError,
)
from wrong_uses import WRONG_USES, Wrong
from wrong_uses.meeting import VALUE, value_of, world


@pytest.mark.parametrize("observing", [False, True], ids=["driving", "observing"])
@pytest.mark.parametrize("wrong", WRONG_USES, ids=lambda wrong: wrong.name)
def test_a_wrong_use_is_one_clear_error_and_leaves_no_trace(wrong: Wrong, observing: bool):
    met = world()
    met.observing = observing
    wrong.given(met)
    model, td = snapshot(met.model), td_snapshot(met.td)
    with pytest.raises(wrong.error) as raised:
        wrong.do(met)
    assert_same(model, snapshot(met.model))
    assert_same(td, td_snapshot(met.td))
    message = str(raised.value)
    assert [word for word in wrong.says if word not in message] == [], message
    assert type(raised.value) is not TdhookLikeError
    assert len(message) < 600, "a message is read by a person"


def test_the_wrong_uses_have_names_of_their_own():
    names = [wrong.name for wrong in WRONG_USES]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.parametrize("observing", [False, True], ids=["driving", "observing"])
@pytest.mark.parametrize(
    "observation",
    [torch.zeros(5, 7), torch.zeros(5, 4, dtype=torch.float64), torch.zeros(5, 4).half()],
    ids=["shape", "float64", "float16"],
)
def test_what_the_model_itself_refuses_is_its_own_error_word_for_word(observation, observing):
    met = world()
    met.td["observation"], met.observing = observation, observing
    with pytest.raises(RuntimeError) as plainly:
        met.model(met.td.clone())
    model, td = snapshot(met.model), td_snapshot(met.td)
    with pytest.raises(type(plainly.value)) as raised:
        met.explain(value_of())
    assert str(raised.value) == str(plainly.value)
    assert_same(model, snapshot(met.model))
    assert_same(td, td_snapshot(met.td))


def test_every_error_is_also_the_builtin_one_that_fits():
    for error, builtin in [
        (KeyNotFoundError, LookupError), (PathError, LookupError), (TargetError, ValueError),
        (InputError, ValueError), (BaselineError, ValueError), (RuleError, ValueError),
        (ContextError, RuntimeError), (ModelError, TypeError), (LayoutError, RuntimeError),
        (LockedError, RuntimeError),
    ]:  # fmt: skip
        assert issubclass(error, TdhookLikeError) and issubclass(error, builtin)


def test_the_model_of_the_wrong_uses_can_be_used_rightly_of_the_same_world_raise_nothing():
    met = world()
    for right in (value_of(), InputXGradient(VALUE), IntegratedGradients(VALUE), LRP(target=VALUE)):
        met.explain(right)
    assert met.td["attr", "agents", "speed"].shape == (5, 2)
