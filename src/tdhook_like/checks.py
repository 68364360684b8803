"""What a call refuses, and what it tells of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import isfinite
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.errors import InputError, KeyNotFoundError, TargetError, listed
from tdhook_like.keys import check_writable
from tdhook_like.writing import report

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = ["check_destination", "check_reached", "check_scores", "explain_failure", "tell_of"]


def check_destination(context: HookContext, td: TensorDictBase, keys: Iterable[NestedKey]) -> None:
    """Raises where results cannot be written without losing something."""
    check_writable(td, keys)
    root = context.method.root
    if isinstance(td.get(root, None), Tensor):
        raise KeyNotFoundError(
            f"{root!r} is taken: the TensorDict holds a tensor there, which would be lost. Give "
            "another root= for the results."
        )


def explain_failure(
    context: HookContext, td: TensorDictBase, inputs: Iterable[NestedKey], error: Exception
) -> None:
    """Raises with what a model's failure is due to, where that has a name."""
    if "leaf Variable that requires grad" in str(error):
        raise InputError(
            "The model overwrites one of its inputs in place, which cannot be differentiated: "
            f"attributed keys are {listed(inputs)}. Let it work on a copy, or attribute "
            "other keys."
        ) from error
    missing = [key for key in context.in_keys if td.get(key, None) is None]
    # Some keys may be absent (a first hidden state): then something else is wrong.
    if missing and isinstance(error, KeyError | TypeError | AttributeError):
        raise KeyNotFoundError(
            f"The model failed, and the TensorDict lacks {listed(missing)}, which it reads. It "
            f"has {listed(td.keys(True, True))}."
        ) from error


def check_reached(context: HookContext, flow: Flow) -> None:
    """Raises where rules were not reached; says which functions had none."""
    plan = context.plan
    if plan is None:
        return
    if context.method.unreached == "raise":
        plan.check_reached(flow.reached)
    context.applied = flow.applied
    tell_of(context, flow.unhandled)


def tell_of(context: HookContext, unhandled: Counter[str]) -> None:
    """Says which functions had no rule. What is only said is said once; an error is one each time."""
    said = context.unhandled if context.method.unhandled == "warn" else ()
    new = [name for name in unhandled if name not in said]
    context.unhandled = context.unhandled | unhandled
    if new and context.method.unhandled != "ignore":
        report(context.method, new)


def check_scores(context: HookContext, scores: Tensor) -> None:
    """Raises where a target is NaN or Inf."""
    if isfinite(scores.detach().sum().item()):
        return
    bad = int((~torch.isfinite(scores)).any(-1).sum())
    if bad:
        raise TargetError(
            f"The target is NaN or Inf in {bad} of {scores[..., 0].numel()} batch elements: "
            f"{listed(context.targets.values())}."
        )
