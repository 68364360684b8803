"""Mappers: which submodule gets which rule; any callable ``(name, module) -> Rule | None``."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd

from tdhook_like.attribution.lrp.rule import Rule, RuleMapper
from tdhook_like.attribution.lrp.rules import (
    EpsilonRule,
    IgnoreRule,
    LayerNormRule,
    PassRule,
    SoftmaxEpsilonRule,
    UniformEpsilonRule,
)
from tdhook_like.attribution.lrp.weights import ZPlusRule
from tdhook_like.errors import RuleError

__all__ = ["BaseRuleMapper", "EpsilonPlus"]

HOMOGENEOUS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)
"""Activations with ``f(x) = f′(x)·x``: their own gradient passes relevance on."""

ZERO_AT_ZERO = (
    *(nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Tanhshrink, nn.Softsign),
    *(nn.Softshrink, nn.Hardshrink, nn.Hardswish, nn.ReLU6, nn.RReLU),
)
"""Further activations with ``f(0) = 0``: passing relevance through them gives none to zeros."""

ACTIVATIONS = (
    *(
        nn.ReLU,
        nn.LeakyReLU,
        nn.PReLU,
        nn.RReLU,
        nn.ReLU6,
        nn.ELU,
        nn.CELU,
        nn.SELU,
        nn.GELU,
        nn.SiLU,
    ),
    *(nn.Mish, nn.Tanh, nn.Tanhshrink, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign),
    *(nn.Softshrink, nn.Hardshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold),
)
LINEAR_OR_PICKING = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
)


class BaseRuleMapper:
    """Rules for everything that has no weights: activations, norms, pooling.

    Elementwise activations and batch norm pass relevance on, layer norm holds its statistics fixed,
    softmax keeps its gradient, average pooling shares by contribution, and what is linear or picks
    entries keeps its own gradient. Layers with weights are left to subclasses.

    Args:
        stabilizer: For rules of layers without weights.
        rule_mapper: Asked first; where it gives a rule, that one is taken.

    >>> mapper = BaseRuleMapper(rule_mapper=lambda name, module: None)
    >>> mapper("0", nn.Tanh()), mapper("1", nn.Linear(2, 2))
    (PassRule(), None)
    """

    def __init__(self, stabilizer: float = 1e-6, rule_mapper: RuleMapper | None = None) -> None:
        if rule_mapper is not None and not callable(rule_mapper):
            raise RuleError(
                f"{type(self).__name__}: rule_mapper must be callable, got {rule_mapper!r}."
            )
        self._first = rule_mapper
        self._pass, self._ignore, self._layer_norm = PassRule(), IgnoreRule(), LayerNormRule()
        self._sum, self._softmax = EpsilonRule(stabilizer), SoftmaxEpsilonRule(stabilizer)

    def __call__(self, name: str, module: nn.Module) -> Rule | None:
        """The rule of the submodule ``module`` at path ``name``, or None for its own gradient."""
        rule = self._first(name, module) if self._first else None
        return self.by_type(module) if rule is None else rule

    def by_type(self, module: nn.Module) -> Rule | None:
        """The rule by the module's type alone. Subclasses extend this."""
        if isinstance(module, LINEAR_OR_PICKING):
            return self._ignore
        if isinstance(module, (*ACTIVATIONS, _BatchNorm)):
            return self._pass
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            return self._layer_norm
        if isinstance(module, nn.Softmax | nn.Softmax2d):
            return self._softmax
        if isinstance(module, (_AvgPoolNd, _AdaptiveAvgPoolNd)):
            return self._sum
        return None


class EpsilonPlus(BaseRuleMapper):
    """Epsilon on dense layers, z⁺ on convolutions, and :class:`BaseRuleMapper` for the rest.

    Source: the composite of Montavon et al. 2019 without its input-layer rule.

    Args:
        epsilon: Of the epsilon rule on dense layers.
        stabilizer: Of all other rules.
        rule_mapper: Asked first; where it gives a rule, that one is taken.

    >>> mapper = EpsilonPlus()
    >>> mapper("0", nn.Conv2d(1, 1, 1)), mapper("1", nn.Linear(2, 2))
    (ZPlusRule(stabilizer=1e-06), EpsilonRule(epsilon=1e-06))
    """

    def __init__(
        self,
        epsilon: float = 1e-6,
        stabilizer: float = 1e-6,
        rule_mapper: RuleMapper | None = None,
    ) -> None:
        super().__init__(stabilizer, rule_mapper)
        self._epsilon, self._plus = EpsilonRule(epsilon), ZPlusRule(stabilizer)
        self._product = UniformEpsilonRule(epsilon)

    def by_type(self, module: nn.Module) -> Rule | None:
        """Epsilon on ``nn.Linear``, z⁺ on convolutions, bilinear layers shared evenly."""
        if isinstance(module, _ConvNd):
            return self._plus
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return None  # a weight of nn.MultiheadAttention, never called
        if isinstance(module, nn.Linear):
            return self._epsilon
        if isinstance(module, nn.Bilinear):
            return self._product
        return super().by_type(module)
