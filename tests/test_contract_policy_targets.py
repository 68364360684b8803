"""The contract about targets of policies: what is explained by default, which action it is about."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_interaction_type,
)
from torch import Tensor, nn
from torch.distributions import Independent, Normal, OneHotCategorical

from heads_model import METHODS, inputs, reference
from tdhook_like import InputXGradient, LogProb, Saliency, Taken, TargetError

SAMPLED = partial(set_interaction_type, InteractionType.RANDOM)


class Gaussian(Independent):
    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(Normal(loc, scale), 1)


def actor(kind: str) -> Any:
    if kind == "continuous":
        net = nn.Sequential(nn.Linear(4, 6), NormalParamExtractor())
        head, keys, made = ["loc", "scale"], ["loc", "scale"], Gaussian
    else:
        net, head, keys, made = nn.Linear(4, 3), ["logits"], ["logits"], OneHotCategorical
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, ["observation"], head),
        ProbabilisticTensorDictModule(
            keys, ["action"], distribution_class=made, return_log_prob=True
        ),
    )


@pytest.mark.parametrize("interaction", [InteractionType.RANDOM, InteractionType.MODE])
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_the_log_probability_of_the_sampled_action_does_not_leak_through_the_sample(
    kind, interaction
):
    policy = actor(kind)
    td = TensorDict({"observation": torch.randn(5, 4)}, [5])
    with set_interaction_type(interaction), InputXGradient().prepare(policy) as hooked:
        hooked(td)
    action = td["action"].detach()
    expected = reference(policy[:1], td, lambda out: policy.get_dist(out).log_prob(action))
    torch.testing.assert_close(td["attr", "observation"], td["observation"] * expected)
    if kind == "continuous" and interaction is InteractionType.MODE:
        # At the mode, only the scale can change the probability of what was done.
        loc = reference(policy[:1], td, lambda out: out["loc"])
        assert not torch.allclose(expected, loc)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_observing_explains_the_recorded_action_and_driving_the_one_that_it_takes(kind):
    policy = actor(kind)
    td = policy(TensorDict({"observation": torch.randn(5, 4)}, [5])).detach()
    recorded = td["action"].clone()
    with SAMPLED(), Saliency(LogProb(), abs=False).prepare(policy) as hooked:
        seen, driven = hooked.observe(td.clone()), hooked(td.clone())
    assert torch.equal(seen["action"], recorded) and not torch.equal(driven["action"], recorded)
    for out in (seen, driven):
        action = out["action"]
        expected = reference(policy[:1], td, lambda o, a=action: policy.get_dist(o).log_prob(a))
        torch.testing.assert_close(out["attr", "observation"], expected)


def test_the_entry_of_the_recorded_action_is_read_when_observing_and_the_new_one_when_driving():
    policy = actor("discrete")
    td = policy(TensorDict({"observation": torch.randn(40, 4)}, [40])).detach()
    recorded = td["action"].clone()
    with SAMPLED(), Saliency(Taken("logits"), abs=False).prepare(policy) as hooked:
        seen, driven = hooked.observe(td.clone()), hooked(td.clone())
    assert not torch.equal(driven["action"], recorded)
    for out, action in ((seen, recorded), (driven, driven["action"])):
        expected = reference(policy[:1], td, lambda o, a=action: o["logits"] * a)
        torch.testing.assert_close(out["attr", "observation"], expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_default_of_a_policy_is_the_log_probability_of_its_action(method):
    policy = actor("discrete")
    td = policy(TensorDict({"observation": torch.randn(5, 4)}, [5])).detach()
    found = []
    for target in (None, LogProb(), LogProb("action")):
        with METHODS[method](target).prepare(policy) as hooked:
            found.append(hooked.observe(td.clone())["attr", "observation"])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_default_of_a_single_output_is_that_output_and_never_a_sum():
    net, td = nn.Linear(4, 1), inputs(5)
    with Saliency(abs=False).prepare(net, ["observation"], ["value"]) as hooked:
        hooked(td)
    torch.testing.assert_close(td["attr", "observation"], net.weight.detach().expand(5, 4))
    with (
        Saliency().prepare(nn.Linear(4, 2), ["observation"], ["value"]) as hooked,
        pytest.raises(TargetError, match="ambiguous"),
    ):
        hooked(td)
