"""Rules by type: for what has no weights, and the composite of epsilon and z⁺ on top of it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.padding import _ConstantPadNd, _ReflectionPadNd, _ReplicationPadNd
from torch.nn.modules.pooling import (
    _AdaptiveAvgPoolNd,
    _AdaptiveMaxPoolNd,
    _AvgPoolNd,
    _LPPoolNd,
    _MaxPoolNd,
    _MaxUnpoolNd,
)

from tdhook_like.attribution.lrp.batchnorm import BatchNormRule
from tdhook_like.attribution.lrp.mappers.choosing import (
    Mapper,
    Scope,
    a_mapper,
    asked,
    bound_to,
    first_functions,
    nearest,
    reason,
    type_shown,
)
from tdhook_like.attribution.lrp.rules.as_is import (
    EpsilonRule,
    IgnoreRule,
    LayerNormRule,
    PassRule,
    SoftmaxEpsilonRule,
    UniformEpsilonRule,
)
from tdhook_like.attribution.lrp.rules.rule import Rule, RuleMapper
from tdhook_like.attribution.lrp.rules.weights import ZPlusRule
from tdhook_like.errors import RuleError

__all__ = ["BaseRuleMapper", "EpsilonPlus"]

HOMOGENEOUS = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
"""Activations with ``f(x) = f′(x)·x``: their own gradient passes relevance on."""

ZERO_AT_ZERO = (
    *(nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Tanhshrink, nn.Softsign),
    *(nn.Softshrink, nn.Hardshrink, nn.Hardswish, nn.ReLU6, nn.RReLU),
    *(nn.LocalResponseNorm, nn.CrossMapLRN2d),
)
"""Further activations with ``f(0) = 0``: passing relevance through them gives none to zeros."""

ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6),
    *(nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Tanhshrink, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign),
    *(nn.Softshrink, nn.Hardshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold),
)
"""Elementwise."""

PER_ENTRY_NORMS = (nn.LocalResponseNorm, nn.CrossMapLRN2d)
"""``x`` over a norm of its neighbours; with the norm held fixed this is elementwise, too."""

LINEAR_OR_PICKING = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.Fold, nn.Unfold, nn.Upsample),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(_ConstantPadNd, _ReflectionPadNd, _ReplicationPadNd),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    *(_MaxPoolNd, _AdaptiveMaxPoolNd, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
    *(_MaxUnpoolNd, _DropoutNd),
)
"""Their own gradient is the rule: shapes, paddings, interpolation, max pooling, dropout."""

OWN_GRADIENT = (_LPPoolNd, nn.LogSoftmax)
"""Homogeneous (its gradient conserves), or logits against their mean, which one gradient tells."""

SOFTMAXES = (nn.Softmax, nn.Softmax2d, nn.Softmin)

AVERAGES = (_AvgPoolNd, _AdaptiveAvgPoolNd)
"""Sums with fixed weights."""


class BaseRuleMapper(Mapper):
    """Rules for everything that has no weights to share by: activations, norms, pooling.

    Elementwise activations pass relevance on, layer norm holds its statistics fixed, batch norm is
    read as part of the layer in front of it, softmax keeps its gradient, average pooling shares by
    contribution, and what is linear or picks entries keeps its own gradient. Layers with weights are
    left to subclasses.

    No rule, by intent: containers; attention, group and instance norms and gated units, whose inner
    functions have rules of their own; embeddings, whose inputs are indices; losses and distances.

    Args:
        stabilizer: For rules of layers without weights.
        rule_mapper: Asked first; where it gives a rule, that one is taken.
        batch_norm: ``"fold"`` into the layer in front, ``"affine"`` by itself, or ``"pass"``: relevance
            passes it unchanged.

    Raises:
        RuleError: If ``rule_mapper`` is no mapper, or ``batch_norm`` is unknown.

    >>> mapper = BaseRuleMapper(rule_mapper=lambda name, module: None)
    >>> mapper("0", nn.Tanh()), mapper("1", nn.Linear(2, 2))
    (PassRule(), None)
    """

    def __init__(
        self,
        stabilizer: float = 1e-6,
        rule_mapper: RuleMapper | None = None,
        *,
        batch_norm: str = "fold",
    ) -> None:
        place = f"{type(self).__name__}: rule_mapper"
        first = () if rule_mapper is None else (a_mapper(rule_mapper, place),)
        self.stabilizer, self.rule_mapper, self.batch_norm = stabilizer, rule_mapper, batch_norm
        self._asked: tuple[RuleMapper, ...] = first
        self.functions = first_functions(first) or self.functions
        self._types = self.rules_by_type()

    def rules_by_type(self) -> dict[type[nn.Module], Rule]:
        """From types to rules; the most specific type of a module counts. Subclasses extend this."""
        return {
            **dict.fromkeys((*LINEAR_OR_PICKING, *OWN_GRADIENT), IgnoreRule()),
            **dict.fromkeys((*ACTIVATIONS, *PER_ENTRY_NORMS), PassRule()),
            **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), LayerNormRule()),
            **dict.fromkeys(SOFTMAXES, SoftmaxEpsilonRule(self.stabilizer)),
            **dict.fromkeys(AVERAGES, EpsilonRule(self.stabilizer)),
            _BatchNorm: _batch_norm(self.batch_norm, type(self).__name__),
        }

    def __call__(self, name: str, module: nn.Module) -> Rule | None:
        """The rule of the submodule ``module`` at path ``name``, or None for its own gradient."""
        for rule, _ in asked(self._asked, name, module):
            return rule
        return self.by_type(module)

    def by_type(self, module: nn.Module) -> Rule | None:
        """The rule by the module's type alone. Subclasses extend this."""
        kind = nearest(self._types, module)
        return None if kind is None else self._types[kind]

    def within(self, scope: Scope) -> Mapper:
        """The mapper whose inner mappers know the model."""
        return self._with(_asked=tuple(bound_to(mapper, scope) for mapper in self._asked))

    def why(self, name: str, module: nn.Module) -> str:
        """The inner mapper's reason, or ``type Linear``."""
        for _, mapper in asked(self._asked, name, module):
            return reason(mapper, name, module)
        return type_shown(nearest(self._types, module), module)


class EpsilonPlus(BaseRuleMapper):
    """Epsilon on dense layers, z⁺ on convolutions, and :class:`BaseRuleMapper` for the rest.

    Source: the composite of Montavon et al. 2019 without its input-layer rule.

    Args:
        epsilon: Of the epsilon rule on dense layers.
        stabilizer: Of all other rules.
        rule_mapper: Asked first; where it gives a rule, that one is taken.
        batch_norm: As of :class:`BaseRuleMapper`.

    >>> mapper = EpsilonPlus()
    >>> mapper("0", nn.Conv2d(1, 1, 1)), mapper("1", nn.Linear(2, 2))
    (ZPlusRule(stabilizer=1e-06), EpsilonRule(epsilon=1e-06))
    """

    def __init__(
        self,
        epsilon: float = 1e-6,
        stabilizer: float = 1e-6,
        rule_mapper: RuleMapper | None = None,
        *,
        batch_norm: str = "fold",
    ) -> None:
        self.epsilon = epsilon
        super().__init__(stabilizer, rule_mapper, batch_norm=batch_norm)

    def rules_by_type(self) -> dict[type[nn.Module], Rule]:
        """With rules for dense layers, bilinear ones and convolutions."""
        return {
            **super().rules_by_type(),
            nn.Linear: EpsilonRule(self.epsilon),
            nn.Bilinear: UniformEpsilonRule(self.epsilon),
            _ConvNd: ZPlusRule(self.stabilizer),
        }


def _batch_norm(mode: Any, mapper: str) -> Rule:
    if mode == "pass":
        return PassRule()
    if mode in ("fold", "affine"):
        return BatchNormRule(fold=mode == "fold")
    raise RuleError(f"{mapper}: batch_norm must be 'fold', 'affine' or 'pass', got {mode!r}.")
