"""The composites of the literature: which rule on which layers, by type and by position."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tdhook_like.attribution.lrp.functions.lookup import FunctionRules
from tdhook_like.attribution.lrp.mappers.by_type import SOFTMAXES, EpsilonPlus
from tdhook_like.attribution.lrp.mappers.patterns import FirstLayer
from tdhook_like.attribution.lrp.rules.as_is import EpsilonRule, StopRule
from tdhook_like.attribution.lrp.rules.rule import Rule, RuleMapper
from tdhook_like.attribution.lrp.rules.weights import AlphaBetaRule, FlatRule, GammaRule, ZBoxRule

__all__ = [
    "CPLRP",
    "AttnLRP",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGammaBox",
    "EpsilonPlusFlat",
]

First = str | Sequence[str] | None
"""Paths or globs of the layers that read the inputs; found if None."""


class EpsilonAlpha2Beta1(EpsilonPlus):
    """Epsilon on dense layers, alpha-beta with α = 2, β = 1 on convolutions.

    Source: Kohlbrenner et al. 2020, LRP-CMP with α = 2.

    Args:
        epsilon: Of the epsilon rule on dense layers.
        stabilizer: Of all other rules.
        rule_mapper: Asked first; where it gives a rule, that one is taken.
        batch_norm: As of :class:`BaseRuleMapper`.

    >>> EpsilonAlpha2Beta1()("0", nn.Conv2d(1, 1, 1))
    AlphaBetaRule(stabilizer=1e-06, alpha=2.0, beta=1.0)
    """

    def rules_by_type(self) -> dict[type[nn.Module], Rule]:
        """With alpha-beta on convolutions."""
        return {**super().rules_by_type(), _ConvNd: AlphaBetaRule(2.0, 1.0, self.stabilizer)}


class EpsilonPlusFlat(EpsilonPlus):
    """Epsilon on dense layers, z⁺ on convolutions, flat on the layers that read the inputs.

    Source: Lapuschkin et al. 2019, methods; Kohlbrenner et al. 2020, LRP-CMP with α = 1.

    Args:
        epsilon: Of the epsilon rule on dense layers.
        stabilizer: Of all other rules.
        rule_mapper: Asked first; where it gives a rule, that one is taken.
        first: The layers that read the inputs, by path or glob; see :class:`FirstLayer`.
        batch_norm: As of :class:`BaseRuleMapper`.

    >>> mapper = EpsilonPlusFlat().bind(net := nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)))
    >>> mapper("0", net[0]), mapper("1", net[1])
    (FlatRule(stabilizer=1e-06), ZPlusRule(stabilizer=1e-06))
    """

    def __init__(
        self,
        epsilon: float = 1e-6,
        stabilizer: float = 1e-6,
        rule_mapper: RuleMapper | None = None,
        *,
        first: First = None,
        batch_norm: str = "fold",
    ) -> None:
        super().__init__(epsilon, stabilizer, rule_mapper, batch_norm=batch_norm)
        self.first = first
        self._asked = (*self._asked, FirstLayer(self.rule_of_inputs(), first))

    def rule_of_inputs(self) -> Rule:
        """The rule of the layers that read the inputs."""
        return FlatRule(self.stabilizer)


class EpsilonAlpha2Beta1Flat(EpsilonPlusFlat, EpsilonAlpha2Beta1):
    """:class:`EpsilonAlpha2Beta1`, with flat on the layers that read the inputs.

    Source: Lapuschkin et al. 2019, methods; Kohlbrenner et al. 2020, LRP-CMP with α = 2.

    Args:
        epsilon: Of the epsilon rule on dense layers.
        stabilizer: Of all other rules.
        rule_mapper: Asked first; where it gives a rule, that one is taken.
        first: The layers that read the inputs, by path or glob; see :class:`FirstLayer`.
        batch_norm: As of :class:`BaseRuleMapper`.

    >>> mapper = EpsilonAlpha2Beta1Flat(first="1")
    >>> mapper.bind(net := nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))("1", net[1])
    FlatRule(stabilizer=1e-06)
    """


class EpsilonGammaBox(EpsilonPlusFlat):
    """Epsilon on dense layers, gamma on convolutions, z-box on the layers that read the inputs.

    Source: Montavon et al. 2019, section 10.3: LRP-ε above, LRP-γ below, zᴮ at the pixels.

    Args:
        low: The least value of an input: a number, or a tensor that broadcasts to it.
        high: The largest value, likewise.
        epsilon: Of the epsilon rule on dense layers.
        gamma: Of the gamma rule on convolutions.
        stabilizer: Of all other rules.
        rule_mapper: Asked first; where it gives a rule, that one is taken.
        first: The layers that read the inputs, by path or glob; see :class:`FirstLayer`.
        batch_norm: As of :class:`BaseRuleMapper`.

    >>> net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.Linear(2, 2))
    >>> print(EpsilonGammaBox(0.0, 1.0).plan(net))
    path  type    rule                                           why
    0     Conv2d  ZBoxRule(stabilizer=1e-06, low=0.0, high=1.0)  first layer
    1     ReLU    PassRule()                                     type ReLU
    2     Conv2d  GammaRule(stabilizer=1e-06, gamma=0.25)        type Conv2d
    3     Linear  EpsilonRule(epsilon=1e-06)                     type Linear
    """

    def __init__(
        self,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        epsilon: float = 1e-6,
        gamma: float = 0.25,
        stabilizer: float = 1e-6,
        rule_mapper: RuleMapper | None = None,
        *,
        first: First = None,
        batch_norm: str = "fold",
    ) -> None:
        self.low, self.high, self.gamma = low, high, gamma
        super().__init__(epsilon, stabilizer, rule_mapper, first=first, batch_norm=batch_norm)

    def rules_by_type(self) -> dict[type[nn.Module], Rule]:
        """With gamma on convolutions."""
        return {**super().rules_by_type(), _ConvNd: GammaRule(self.gamma, self.stabilizer)}

    def rule_of_inputs(self) -> Rule:
        """The z-box."""
        return ZBoxRule(self.low, self.high, self.stabilizer)


class AttnLRP(EpsilonPlus):
    """For transformers: epsilon on everything affine, softmax by its gradient, products shared.

    Normalisations hold their statistics fixed, activations pass relevance on, and so do the functions
    that attention is made of, with or without modules: each operand of a matrix product or a gate
    gets half (rules of functions: :attr:`functions`).

    Source: Achtibat et al. 2024, section 3.

    Args:
        epsilon: Of the epsilon rule on dense layers and convolutions.
        stabilizer: Of all other rules.
        rule_mapper: Asked first; where it gives a rule, that one is taken.
        batch_norm: As of :class:`BaseRuleMapper`.

    >>> mapper = AttnLRP()
    >>> mapper("patches", nn.Conv2d(3, 8, 4)), mapper("softmax", nn.Softmax(-1))
    (EpsilonRule(epsilon=1e-06), SoftmaxEpsilonRule(epsilon=1e-06))
    """

    functions = FunctionRules(attention="gradient", gates="half")

    def rules_by_type(self) -> dict[type[nn.Module], Rule]:
        """With epsilon on convolutions."""
        return {**super().rules_by_type(), _ConvNd: EpsilonRule(self.epsilon)}


class CPLRP(AttnLRP):
    """For transformers: as :class:`AttnLRP`, with attention weights and gates held constant.

    All relevance goes through the values, none through queries and keys. *Every* softmax is taken for
    attention's: where one makes a policy's probabilities, explain its logits, or take it out with
    ``NameMapper({"head.softmax": SoftmaxEpsilonRule()}) | CPLRP()``.

    Source: Ali et al. 2022, eq. 9 (AH rule) and 10 (LN rule); CP-LRP in Achtibat et al. 2024.

    Args:
        epsilon: Of the epsilon rule on dense layers and convolutions.
        stabilizer: Of all other rules.
        rule_mapper: Asked first; where it gives a rule, that one is taken.
        batch_norm: As of :class:`BaseRuleMapper`.

    >>> CPLRP()("softmax", nn.Softmax(-1))
    StopRule()
    """

    functions = FunctionRules(attention="constant", gates="signal")

    def rules_by_type(self) -> dict[type[nn.Module], Rule]:
        """With softmax constant."""
        return {**super().rules_by_type(), **dict.fromkeys(SOFTMAXES, StopRule())}
