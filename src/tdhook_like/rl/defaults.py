"""The obvious targets of torchrl's own classes."""

from __future__ import annotations

from dataclasses import dataclass

from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.modules import (
    ActorCriticOperator,
    ActorValueOperator,
    DistributionalQValueModule,
    QValueModule,
)

from tdhook_like.targets import Output, Pick, Reference, Target

__all__ = ["ExpectedValue", "torchrl_target"]


def torchrl_target(model: nn.Module) -> Target | None:
    """The target that is meant for a torchrl model when none is given, or None.

    >>> from torchrl.modules import QValueActor
    >>> torchrl_target(QValueActor(nn.Linear(3, 2), in_keys=["obs"], action_space="one_hot"))
    Output('chosen_action_value')
    """
    if isinstance(model, ActorCriticOperator | ActorValueOperator):
        return Output(model.get_value_operator().out_keys[-1])
    for part in reversed(list(model.modules())):
        if isinstance(part, DistributionalQValueModule):
            return ExpectedValue(part)
        if isinstance(part, QValueModule):
            return Output(part.out_keys[-1])
    return None


@dataclass(frozen=True)
class ExpectedValue(Target):
    """The expected value of the greedy action under a categorical distribution over returns.

    torchrl lays log-probabilities out as ``[*B, atoms, actions]``; the expectation is over atoms.
    Which action is greedy is held fixed at the explained input.

    Args:
        module: The DistributionalQValueModule that chooses the action.
    """

    module: DistributionalQValueModule

    def __repr__(self) -> str:
        return f"ExpectedValue({self.module.action_value_key!r})"

    def bind(self, reference: Reference) -> Pick:
        """Holds the greedy action fixed."""
        key = self.module.action_value_key
        support = self.module.support

        def values(log_probs: Tensor) -> Tensor:
            return (log_probs.exp() * support.to(log_probs).unsqueeze(-1)).sum(-2)

        greedy = values(reference.values(key, repr(self)).detach()).argmax(-1)

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            each = values(outputs.get(key))
            return each.gather(-1, greedy.expand(each.shape[:-1]).unsqueeze(-1)).squeeze(-1)

        return pick
