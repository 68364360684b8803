"""Mappers of rules that change how a gradient passes rectifiers, and excitation backprop.

The first three are for gradients: ``Saliency(target, abs=False, rules=GuidedBackpropMapper())``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.functions.lookup import FunctionRules
from tdhook_like.attribution.lrp.functions.operations import FunctionRule
from tdhook_like.attribution.lrp.mappers.by_type import BaseRuleMapper
from tdhook_like.attribution.lrp.mappers.choosing import Mapper, Scope
from tdhook_like.attribution.lrp.rules.rectifiers import (
    BetaSmoothRule,
    DeconvReLURule,
    ExcitationRule,
    GuidedReLURule,
)
from tdhook_like.attribution.lrp.rules.rule import Rule
from tdhook_like.errors import PathError, listed

__all__ = ["BetaSmoothMapper", "DeconvnetMapper", "ExcitationMapper", "GuidedBackpropMapper"]

ReLURule = GuidedReLURule | DeconvReLURule | BetaSmoothRule


class _RectifierMapper(Mapper):
    """One rule on every ReLU, module or function; everything else keeps its own gradient."""

    def __init__(self, rule: ReLURule, functional: bool) -> None:
        self._rule, self.functional = rule, bool(functional)
        self.functions = RectifierFunctions(rule)

    def __call__(self, name: str, module: nn.Module) -> Rule | None:
        """The rule, where the module is a ReLU."""
        return self._rule if isinstance(module, nn.ReLU) else None

    def within(self, scope: Scope) -> Mapper:
        """Itself, once a ReLU was found in the model."""
        if self.functional or any(isinstance(module, nn.ReLU) for _, module, _ in scope.walked):
            return self
        own = type(self).__name__
        raise PathError(
            f"{own}: the model has no nn.ReLU, so this would be its plain gradient. Types here: "
            f"{listed(dict.fromkeys(type(module).__name__ for _, module, _ in scope.walked))}. "
            f"If it calls relu() as a function, say so: {own}(functional=True)."
        )

    def why(self, name: str, module: nn.Module) -> str:
        """``type ReLU``."""
        return "type ReLU"


class GuidedBackpropMapper(_RectifierMapper):
    """Guided backpropagation: gradients pass a ReLU where input and gradient are positive.

    For ``Saliency(target, abs=False, rules=GuidedBackpropMapper())``. ReLUs that are called as
    functions (``F.relu(x)``) are treated alike; everything else keeps its plain gradient.

    Source: Springenberg et al. 2015, section 3.4.

    Args:
        functional: Whether a model without a single ``nn.ReLU`` is one that calls ``relu()`` instead;
            else it is refused.

    Raises:
        PathError: When bound to a model without ``nn.ReLU``, unless ``functional``.

    >>> print(GuidedBackpropMapper().plan(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Tanh())))
    path  type  rule              why
    1     ReLU  GuidedReLURule()  type ReLU
    """

    def __init__(self, *, functional: bool = False) -> None:
        super().__init__(GuidedReLURule(), functional)


class DeconvnetMapper(_RectifierMapper):
    """The deconvolutional network: positive gradients pass a ReLU, whatever its input was.

    For ``Saliency(target, abs=False, rules=DeconvnetMapper())``; as :class:`GuidedBackpropMapper`
    otherwise.

    Source: Zeiler & Fergus 2014, section 2.1; as a gradient in Springenberg et al. 2015, figure 1.

    Args:
        functional: As of :class:`GuidedBackpropMapper`.

    Raises:
        PathError: When bound to a model without ``nn.ReLU``, unless ``functional``.

    >>> DeconvnetMapper()("0", nn.ReLU()), DeconvnetMapper()("1", nn.Linear(2, 2))
    (DeconvReLURule(), None)
    """

    def __init__(self, *, functional: bool = False) -> None:
        super().__init__(DeconvReLURule(), functional)


class BetaSmoothMapper(_RectifierMapper):
    """Gradients of the model with softplus for ReLU, at the model's own activations.

    For ``Saliency``, ``InputXGradient`` or ``IntegratedGradients`` with ``rules=BetaSmoothMapper()``.
    The forward pass keeps its ReLUs, so activations are not those of a softplus network.

    Source: Dombrowski et al. 2019, section 3 (β-smoothing).

    Args:
        beta: How sharp the bend is, in units of 1 / input.
        functional: As of :class:`GuidedBackpropMapper`.

    Raises:
        PathError: When bound to a model without ``nn.ReLU``, unless ``functional``.
        RuleError: If beta is not a finite number above zero.

    >>> BetaSmoothMapper(beta=5.0)("0", nn.ReLU())
    BetaSmoothRule(beta=5.0)
    """

    def __init__(self, beta: float = 10.0, *, functional: bool = False) -> None:
        super().__init__(BetaSmoothRule(beta), functional)
        self.beta = beta


class ExcitationMapper(BaseRuleMapper):
    """Excitation backprop: excitatory weights alone, for dense layers and convolutions.

    For ``LRP(ExcitationMapper(), target, start="one")``: relevance is then the probability that an
    input is the winner. What has no weights is treated as by :class:`BaseRuleMapper`. Inputs below
    zero get nothing.

    Source: Zhang et al. 2016, section 3.2.

    Args:
        stabilizer: Of all rules.
        rule_mapper: Asked first; where it gives a rule, that one is taken.
        batch_norm: As of :class:`BaseRuleMapper`.

    >>> ExcitationMapper()("0", nn.Conv2d(1, 1, 1)), ExcitationMapper()("1", nn.ReLU())
    (ExcitationRule(stabilizer=1e-06), PassRule())
    """

    def rules_by_type(self) -> dict[type[nn.Module], Rule]:
        """With excitation on dense layers and convolutions."""
        excitation = ExcitationRule(self.stabilizer)
        return {**super().rules_by_type(), nn.Linear: excitation, _ConvNd: excitation}


class RectifierFunctions(FunctionRules):
    """Function rules for gradients: one for ``relu``; everything else keeps its plain gradient.

    Args:
        rule: The rule of ``nn.ReLU``.

    >>> from torch import tanh
    >>> RectifierFunctions(GuidedReLURule()).find(tanh)
    ('tanh', None)
    """

    def __init__(self, rule: ReLURule) -> None:
        super().__init__()
        self._rectifier = _Rectified(rule)

    def find(self, function: Any) -> tuple[str, FunctionRule | None]:
        """A function's name, and its rule if it is a rectifier."""
        name, _ = super().find(function)
        return name, self._rectifier if name == "relu" else None

    def __repr__(self) -> str:
        return f"RectifierFunctions({self._rectifier.rule!r})"


class _Rectified(FunctionRule):
    """A module's rectifier rule, for calls of the function."""

    def __init__(self, rule: ReLURule) -> None:
        self.rule = rule

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The rule's surrogate."""
        return self.rule.replaced(args[0] if args else kwargs["input"])
