"""The target that is meant when none is given: only where there is exactly one obvious one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
)
from tensordict.utils import NestedKey
from torch import nn

from tdhook_like.errors import TargetError, listed
from tdhook_like.targets import LogProb, Output, Target

__all__ = ["default_target"]


def recurrent_modules(modules: Sequence[nn.Module]) -> list[Any]:
    """Those torchrl modules among a model's that can run over time within one call.

    >>> recurrent_modules([nn.Linear(2, 2)])
    []
    """
    rl = sys.modules.get("torchrl.modules")
    if rl is None:
        return []
    return [part for part in modules if isinstance(part, rl.LSTMModule | rl.GRUModule)]


def default_target(model: nn.Module, out_keys: Sequence[NestedKey]) -> Target:
    """The obvious target of a model.

    ========================================  ===============================================
    model                                     target
    ========================================  ===============================================
    QValueActor, DistributionalQValueActor    value of the greedy action
    ActorValueOperator, ActorCriticOperator   the critic's value
    ProbabilisticActor and the like           log-probability of the action
    a critic, anything with one output        that output (one number per element, or an error)
    any of these, recurrent over [*B, time]   the same at the last step
    ========================================  ===============================================

    Raises:
        TargetError: If there is none; the message lists what the model writes.

    >>> default_target(nn.Identity(), ["state_value"])
    Output('state_value')
    """
    rl = sys.modules.get("torchrl.modules")  # a torchrl model exists only where torchrl is loaded
    if rl is not None:
        from tdhook_like.rl.defaults import torchrl_target

        found = torchrl_target(model)
        if found is not None:
            return found
    if isinstance(model, ProbabilisticTensorDictSequential | ProbabilisticTensorDictModule):
        samplers = [m for m in model.modules() if isinstance(m, ProbabilisticTensorDictModule)]
        composite = samplers and samplers[-1].distribution_class is CompositeDistribution
        if samplers and not composite:
            return LogProb()
        raise TargetError(
            "The policy has several heads. Name one target per head, such as "
            "{'steer': LogProb('steer')}, "
            f"or an output: the model writes {listed(out_keys)}."
        )
    if len(out_keys) == 1:
        return Output(out_keys[0])
    raise TargetError(
        f"No target is given and the model writes {listed(out_keys)}: name one of these, with an index "
        "where it holds several numbers, e.g. target=('logits', 2)."
    )
