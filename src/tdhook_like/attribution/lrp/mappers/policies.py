"""The mapper for TorchRL's policies and critics."""

from __future__ import annotations

from torch import nn

from tdhook_like.attribution.lrp.mappers.by_type import EpsilonPlus
from tdhook_like.attribution.lrp.mappers.choosing import Mapper, Scope
from tdhook_like.attribution.lrp.recurrent.rules import SignalTakesAllRule
from tdhook_like.attribution.lrp.rules.rule import Rule, RuleMapper

__all__ = ["PolicyMapper"]

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


class PolicyMapper(EpsilonPlus):
    """What is right for policies and critics as TorchRL builds them, without further thought.

    * Dense layers, ``NoisyLinear`` among them: **epsilon**. Their inputs are state vectors of either
      sign, and what speaks against an action is as much of an answer as what speaks for it. The noise
      of a ``NoisyLinear`` is part of the weights that the call used.
    * Convolutions: **z⁺**. Many small contributions of both signs cancel along pixels; what is left of
      them under epsilon is noise (Montavon et al. 2019).
    * Recurrent layers: **signal takes all**. Gates decide what is remembered, signals are what is; on
      long sequences this is the variant that finds the cause (Arras et al. 2019). In TorchRL's
      ``LSTMModule`` and ``GRUModule`` it sits on the inner layer, or, with a back end that does not
      call that one, on the module itself.
    * Layer norm, RMS norm: statistics fixed; batch norm: part of the layer in front of it; a
      ``Bilinear`` layer: shared evenly; activations pass; pooling by contribution; the rest that is
      known is linear. What is opaque or unknown keeps its own gradient.
    * Dueling heads, mixtures, sums and slices need nothing: they are linear. Functions without a
      module have the default rules.

    A first-layer rule is left out: observations have no common bounds as pixels have (z-box), and flat
    would blur single features, which are the question here.

    Args:
        epsilon: Of the epsilon rule on dense and recurrent layers.
        stabilizer: Of all other rules.
        rule_mapper: Asked first; where it gives a rule, that one is taken.
        batch_norm: As of :class:`BaseRuleMapper`.

    >>> print(PolicyMapper().plan(nn.ModuleDict({"memory": nn.GRU(3, 8), "head": nn.Linear(8, 2)})))
    path    type    rule                               why
    memory  GRU     SignalTakesAllRule(epsilon=1e-06)  type GRU
    head    Linear  EpsilonRule(epsilon=1e-06)         type Linear
    """

    def __init__(
        self,
        epsilon: float = 1e-6,
        stabilizer: float = 1e-6,
        rule_mapper: RuleMapper | None = None,
        *,
        batch_norm: str = "fold",
    ) -> None:
        super().__init__(epsilon, stabilizer, rule_mapper, batch_norm=batch_norm)
        self._recurrent = SignalTakesAllRule(epsilon)
        self._passed_over: dict[int, nn.Module] = {}

    def by_type(self, module: nn.Module) -> Rule | None:
        """With signal-takes-all on recurrent layers that it can read."""
        if id(module) in self._passed_over:
            return None
        if isinstance(module, RECURRENT) or _calls_no_inner(module):
            return None if self._recurrent.check(module) else self._recurrent
        return super().by_type(module)

    def within(self, scope: Scope) -> Mapper:
        """The mapper that also knows which recurrent layers are never called."""
        outer = [module for _, module, _ in scope.walked if _calls_no_inner(module)]
        inner = [part for module in outer for part in module.modules() if part is not module]
        known = super().within(scope)
        return known._with(_passed_over={id(part): part for part in inner})


def _calls_no_inner(module: nn.Module) -> bool:
    """Whether a module like ``LSTMModule`` may read its inner layer's weights without calling it."""
    return getattr(module, "recurrent_backend", "pad") != "pad"
