"""The explained numbers in plain torch, from a model and its outputs to [B]."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torch import distributions as dist

from torchrl_records.family import Score


def entry(key: NestedKey, *index: int) -> Score:
    return lambda model, td: td.get(key)[(..., *index)]


def discrete(model: Any, td: TensorDictBase) -> Tensor:
    """The log-probability of a one-hot action, or of an action given as an index."""
    scores, action = td["logits"].log_softmax(-1), td["action"].detach()
    if action.shape == scores.shape:
        return (scores * action).sum(-1)
    return scores.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def normal(model: Any, td: TensorDictBase) -> Tensor:
    return dist.Normal(td["loc"], td["scale"]).log_prob(td["action"].detach()).sum(-1)


def second_action(td: TensorDictBase) -> Tensor:
    """The log-probability of one of the numbers that make up an action."""
    each = dist.Normal(td["loc"], td["scale"]).log_prob(td["action"].detach())
    return each[..., 1]


def tanh_normal(model: Any, td: TensorDictBase) -> Tensor:
    """A squashed Gaussian: log(1 - tanh(u)²) = 2 (log 2 - u - softplus(-2u))."""
    action = td["action"].detach()
    limit = 1.0 - torch.finfo(action.dtype).resolution
    before = torch.atanh(action.clamp(-limit, limit))
    squashed = 2.0 * (torch.tensor(2.0).log() - before - nn.functional.softplus(-2.0 * before))
    return (dist.Normal(td["loc"], td["scale"]).log_prob(before) - squashed).sum(-1)


def masked(model: Any, td: TensorDictBase) -> Tensor:
    scores = td["logits"].masked_fill(~td["mask"], -float("inf")).log_softmax(-1)
    return scores.gather(-1, td["action"].unsqueeze(-1)).squeeze(-1)


def truncated_normal(model: Any, td: TensorDictBase) -> Tensor:
    """A Gaussian cut off at -1 and 1, which are torchrl's bounds; its location squashed to ±5."""
    gauss = dist.Normal(td["loc"], td["scale"])
    within = gauss.cdf(torch.tensor(1.0)) - gauss.cdf(torch.tensor(-1.0))
    return (gauss.log_prob(td["action"].detach()) - within.log()).sum(-1)


def second_agent(model: Any, td: TensorDictBase) -> Tensor:
    scores = td["agents", "logits"][..., 1, :].log_softmax(-1)
    return (scores * td["agents", "action"][..., 1, :]).sum(-1)


def expected_value(model: Any, td: TensorDictBase) -> Tensor:
    """Of the greedy action, over atoms: log-probabilities are laid out [B, atoms, actions]."""
    values = (td["action_value"].exp() * model.support[:, None]).sum(1)
    return (values * td["action"]).sum(-1)


def gear(model: Any, td: TensorDictBase) -> Tensor:
    scores = td["params", "gear", "logits"].log_softmax(-1)
    return scores.gather(-1, td["action", "gear"].unsqueeze(-1)).squeeze(-1)
