"""The obvious targets of torchrl's own classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch  # noqa: F401 (for the doctest)
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.modules import (
    ActorCriticWrapper,
    ActorValueOperator,
    AdditiveGaussianModule,
    DistributionalQValueModule,
    EGreedyModule,
    OrnsteinUhlenbeckProcessModule,
    QValueModule,
    ValueOperator,
)

from tdhook_like.errors import TargetError, listed
from tdhook_like.targets import Output, Pick, Reference, Target

__all__ = ["ExpectedValue", "torchrl_target"]

NOISE = (EGreedyModule, AdditiveGaussianModule, OrnsteinUhlenbeckProcessModule)
"""What changes an action after a policy has chosen it."""


def torchrl_target(model: nn.Module) -> Target | None:
    """The target that is meant for a torchrl model when none is given, or None.

    An actor with a critic beside it is explained by what the critic gives, a sequence that ends in
    a critic likewise, and a policy of Q-values by the value of the greedy action, also where noise
    is added to the action afterwards.

    Args:
        model: A model; any other than torchrl's gives None.

    Raises:
        TargetError: If noise is added to the action of any other policy: what is noisy is no
            target, and what was there before it has been overwritten.

    >>> from torchrl.modules import QValueActor
    >>> torchrl_target(QValueActor(nn.Linear(3, 2), in_keys=["obs"], action_space="one_hot"))
    Output('chosen_action_value')
    >>> critic = ValueOperator(nn.Linear(3, 1), in_keys=["hidden"])
    >>> torchrl_target(TensorDictSequential(critic))
    Output('state_value')
    """
    last = _last(model)
    # An ActorCriticOperator is an ActorValueOperator whose get_value_operator() raises.
    paired = isinstance(model, ActorValueOperator | ActorCriticWrapper)
    if isinstance(last, ValueOperator) or (paired and isinstance(last, TensorDictModuleBase)):
        return Output(last.out_keys[-1])
    for part in reversed(list(model.modules())):
        if isinstance(part, DistributionalQValueModule):
            return ExpectedValue(part)
        if isinstance(part, QValueModule):
            return Output(part.out_keys[-1])
    if isinstance(last, NOISE):
        raise TargetError(
            f"{type(last).__name__} changes {last.out_keys[0]!r} after the policy has written it. "
            "Explain the policy in front of it, TensorDictSequential(hooked_policy, noise), or "
            f"name a target: the model writes {listed(getattr(model, 'out_keys', ()))}."
        )
    return None


def _last(model: nn.Module) -> nn.Module:
    """The module that runs last in a sequence, or in a sequence of sequences."""
    while isinstance(model, TensorDictSequential):
        parts: list[nn.Module] = list(model.module)
        if not parts:
            break
        model = parts[-1]
    return model


@dataclass(frozen=True)
class ExpectedValue(Target):
    """The expected value of the greedy action under a categorical distribution over returns.

    torchrl lays log-probabilities out as ``[*B, atoms, actions]``; the expectation is over atoms.
    Which action is greedy is held fixed at the explained input.

    Source: Bellemare et al. 2017, section 4.

    Args:
        module: The DistributionalQValueModule that chooses the action.

    >>> from torchrl.modules import DistributionalQValueActor
    >>> net, support = nn.Linear(3, 4), torch.linspace(-1, 1, 4)
    >>> policy = DistributionalQValueActor(
    ...     net, in_keys=["obs"], support=support, action_space="one_hot"
    ... )
    >>> torchrl_target(policy)
    ExpectedValue('action_value')
    """

    module: DistributionalQValueModule

    def __repr__(self) -> str:
        return f"ExpectedValue({self.module.action_value_key!r})"

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return (self.module.action_value_key,)

    def bind(self, reference: Reference) -> Pick:
        """Holds the greedy action fixed."""
        key = self.module.action_value_key
        support = cast(Tensor, self.module.support)

        def values(log_probs: Tensor) -> Tensor:
            return (log_probs.exp() * support.to(log_probs).unsqueeze(-1)).sum(-2)

        greedy = values(reference.values(key, repr(self)).detach()).argmax(-1)

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            each = values(outputs.get(key))
            return each.gather(-1, greedy.expand(each.shape[:-1]).unsqueeze(-1)).squeeze(-1)

        return pick
