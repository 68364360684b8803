"""Each key's share of the relevance, measured by torchrl's Evaluator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tensordict import TensorDictBase
from torch import nn

from tdhook_like.rl.observer import Explains, LoggedShares, Observer

__all__ = ["attribution_metrics"]


def attribution_metrics(
    explains: Explains,
    policy: nn.Module | None = None,
    *,
    prefix: str = "attr",
    statistics: Sequence[str] = ("share",),
    max_rows: int | None = None,
    n_resamples: int = 200,
) -> Callable[[TensorDictBase], dict[str, float]]:
    """A ``metrics_fn`` for torchrl's Evaluator: each key's share on its trajectories.

    ``Evaluator(env, policy, metrics_fn=attribution_metrics(InputXGradient(), policy))`` then gives
    ``"eval/attr/<key>/share"`` beside the reward. The recorded actions are the ones that are
    explained; steps that only pad a trajectory do not count; where the trajectories' time dimension
    is named, intervals are over trajectories instead of steps.

    Args:
        explains: A method, and the policy beside it; or a hooked module, or the context of one.
        policy: What is explained, where ``explains`` is a method. Give the evaluator's own policy:
            an evaluation runs beside the training, which meanwhile changes the other one.
        prefix: Names are ``"<prefix>/<key>/share"``, with the target's name before the key where
            there are several targets.
        statistics: Which of ``"share"``, ``"relevance"``, ``"absolute"`` and ``"first"`` are given,
            each with its bootstrap interval as ``_low`` and ``_high``.
        max_rows: At most so many trajectories are explained.
        n_resamples: Resamples of the bootstrap.

    Returns:
        A function from a batch of trajectories ``[N, T]`` (or steps ``[T]``) to values by name; it
        leaves the batch as it is.

    Raises:
        ContextError: If a policy is missing or given twice.
        InputError: If an option makes no sense.
        TdhookLikeError: As :meth:`Method.prepare` does.

    >>> import torch
    >>> from tensordict import TensorDict
    >>> from torchrl.modules import ValueOperator
    >>> from tdhook_like import InputXGradient
    >>> critic = ValueOperator(nn.Linear(3, 1), in_keys=["observation"])
    >>> metrics = attribution_metrics(InputXGradient(), critic)
    >>> metrics(TensorDict({"observation": torch.randn(4, 9, 3)}, [4, 9]))["attr/observation/share"]
    1.0
    """
    observer = Observer(explains, policy)
    return LoggedShares(observer, prefix, statistics, max_rows, n_resamples).of
