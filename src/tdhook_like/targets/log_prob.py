"""The log-probability of an action under a policy's distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tensordict import TensorDictBase
from tensordict.nn import CompositeDistribution, ProbabilisticTensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook_like.errors import TargetError, listed
from tdhook_like.keys import as_tuple, shortest
from tdhook_like.targets.base import Pick, Reference, Target

__all__ = ["LogProb"]


@dataclass(frozen=True)
class LogProb(Target):
    """The log-probability of the action in the TensorDict under the policy's distribution.

    The action carries no gradient: only how the distribution depends on the inputs is explained, not
    how a reparametrised sample does.

    Args:
        action: The key of the action; by default the one that the policy's last probabilistic
            module writes.

    >>> LogProb()
    LogProb(action=None)
    """

    action: NestedKey | None = None

    reads_keys: ClassVar[bool] = False

    def bind(self, reference: Reference) -> Pick:
        sampler = _sampler(reference.model, self.action)
        keys = [sampler.out_keys[0]] if self.action is None else [self.action]
        composite = issubclass(_distribution_class(sampler), CompositeDistribution)
        if composite and self.action is None:
            raise TargetError(
                "The distribution is composite: one target per head, e.g. "
                + ", ".join(f"LogProb({shortest(k)!r})" for k in _heads(sampler))
            )
        action = reference.action(keys[0], self)

        def pick(outputs: TensorDictBase, dims: int) -> Tensor:
            distribution = sampler.get_dist(outputs)
            if isinstance(distribution, CompositeDistribution):
                distribution = _head(distribution, keys[0], self)
            # Further evaluations stand in front of the batch; what an event's shape is, is the
            # distribution's business (torchrl's one-hot events have an event_shape of ()).
            stacked = outputs.batch_size[: dims - reference.dims]
            return distribution.log_prob(action.expand((*stacked, *action.shape)))

        return pick


def _sampler(model: nn.Module, action: NestedKey | None) -> ProbabilisticTensorDictModule:
    found = [m for m in model.modules() if isinstance(m, ProbabilisticTensorDictModule)]
    if action is not None:
        asked = as_tuple(action)
        found = [m for m in found if asked in [as_tuple(k) for k in (*m.out_keys, *_heads(m))]]
    if not found:
        name = "an action" if action is None else repr(action)
        every = [m for m in model.modules() if isinstance(m, ProbabilisticTensorDictModule)]
        heads = [shortest(key) for m in every for key in (*_heads(m), *m.out_keys)]
        raise TargetError(
            f"LogProb: no probabilistic module of the model writes {name}; they write "
            f"{listed(dict.fromkeys(heads))}. Name a logit or a value instead, such as ('logits', 0)."
        )
    return found[-1]


def _distribution_class(sampler: ProbabilisticTensorDictModule) -> type:
    made = sampler.distribution_class
    return made if isinstance(made, type) else object


def _heads(sampler: ProbabilisticTensorDictModule) -> list[NestedKey]:
    names = sampler.distribution_kwargs.get("name_map") or {}
    if names:
        return list(names.values())
    return list(sampler.distribution_kwargs.get("distribution_map", {}))


def _head(distribution: CompositeDistribution, key: NestedKey, target: Target) -> Any:
    for name, head in distribution.dists.items():
        if as_tuple(name) == as_tuple(key):
            return head
    raise TargetError(f"{target!r}: the distribution has the heads {listed(distribution.dists)}.")
