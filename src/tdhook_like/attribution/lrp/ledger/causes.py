"""What to call the relevance that a rule does not give on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tdhook_like.attribution.lrp.ledger.balance import Spot
from tdhook_like.attribution.lrp.names import PASSED, PRODUCTS
from tdhook_like.attribution.lrp.rules.as_is import (
    AHQKVRule,
    IgnoreRule,
    SoftmaxEpsilonRule,
    StopRule,
    UniformEpsilonRule,
)
from tdhook_like.attribution.lrp.rules.rule import Rule, is_float
from tdhook_like.hooks.structure import leaves

__all__ = ["accounted", "of_function", "of_module"]


def of_module(rule: Rule, module: nn.Module, given: Any, flow: Any) -> str:
    """What a rule on a module absorbs relevance by, besides its stabiliser.

    Args:
        rule: The rule.
        module: The module.
        given: What it is called with.
        flow: Knows what depends on the explained inputs.

    >>> from tdhook_like.attribution.lrp.flow import Flow
    >>> from tdhook_like.attribution.lrp.rules.as_is import EpsilonRule
    >>> of_module(EpsilonRule(), nn.Linear(2, 2), (), Flow())
    'bias'
    >>> of_module(EpsilonRule(), nn.Sequential(nn.Linear(2, 2)), (), Flow())
    'no rule'
    """
    if rule.absorbs is not None:
        return rule.absorbs
    if isinstance(rule, StopRule | AHQKVRule):
        return "stop"
    softmax = isinstance(module, nn.Softmax | nn.Softmin | nn.Softmax2d | nn.LogSoftmax)
    if softmax or isinstance(rule, SoftmaxEpsilonRule):
        return "softmax"
    if type(rule).relevance is not Rule.relevance:
        return "rule"
    if any(name != "parametrizations" for name in module._modules):
        return "no rule"  # of what happens inside, the rules inside answer for their part
    others = [value for value in leaves(given) if is_float(value) and not flow.depends(value)]
    if len(others) < sum(is_float(value) for value in leaves(given)):
        if any(flow.carries(value) for value in others):
            return "stop"
        if others and not isinstance(getattr(module, "bias", None), Tensor):
            return "constant"
    if isinstance(getattr(module, "bias", None), Tensor):
        return "bias"
    return "no rule" if isinstance(rule, IgnoreRule) else "rule"


def of_function(rule: Any, name: str) -> str:
    """What a rule on a function absorbs relevance by; without one, it stands behind a stop.

    >>> from tdhook_like.attribution.lrp.functions.operations import Followed
    >>> of_function(Followed(), "linear"), of_function(Followed(), "cat")
    ('bias', 'constant')
    """
    if rule is None:
        return "stop"
    if name in _BIASED:
        return "bias"
    if "softmax" in name:
        return "softmax"
    if rule.absorbs == "constant" and name in PASSED | PRODUCTS:
        return "no rule"  # it was asked to keep its own gradient
    return rule.absorbs or "rule"


def accounted(rule: Rule, inputs: Any, surrogate: Any) -> list[Spot]:
    """How much of each output a surrogate accounts for; what is missing, a stabiliser has taken.

    Empty where no stabiliser takes part.
    """
    if not (hasattr(rule, "epsilon") or hasattr(rule, "stabilizer")):
        return []
    # A product's gradient reaches each of its n operands with the n-th part.
    parts = max(len(inputs.attributed), 1) if isinstance(rule, UniformEpsilonRule) else 1
    # Copies: surrogates may be overwritten by the output's value.
    return [Spot(value.detach() * parts) for value in leaves(surrogate) if is_float(value)]


_BIASED_WORDS = """
linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d addmm addmv
addbmm baddbmm addr addcmul layer_norm group_norm instance_norm batch_norm
"""
_BIASED = frozenset(_BIASED_WORDS.split())
