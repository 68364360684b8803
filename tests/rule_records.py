"""One record per rule: how to build it, what it sits on, a slow reference, what it conserves.

Generic tests run over `RECORDS`, so a new rule is tested by adding a record here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import reference_lrp as ref
import rule_references as want
from rule_references import Reference, affine, without_bias
from rule_samples import (
    AFFINE,
    AVERAGES,
    ELEMENTWISE,
    FUSED,
    LP_POOLS,
    NORMS,
    OPERANDS,
    PICKING,
    RECTIFIERS,
    SOFTMAX,
    SUMS,
    MatMul,
    Sample,
    grid,
)
from tdhook_like.attribution.lrp import (
    AHQKVRule,
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    IgnoreRule,
    LayerNormRule,
    ModifiedRule,
    ParamModifier,
    PassRule,
    PseudoIdentityRule,
    Rule,
    SoftmaxEpsilonRule,
    StopRule,
    UniformEpsilonRule,
    UniformRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tdhook_like.attribution.lrp.rules.masks import MaskRule
from tdhook_like.attribution.lrp.rules.picking import ArgmaxRule
from tdhook_like.attribution.lrp.rules.pooling import NormRule
from tdhook_like.attribution.lrp.rules.rectifiers import (
    BetaSmoothRule,
    DeconvReLURule,
    ExcitationRule,
    GuidedReLURule,
)
from tdhook_like.attribution.lrp.rules.stabilizer import ClippedStabilizer, RelativeStabilizer

EVERYTHING, BUT_BIAS, NOTHING = "everything", "everything but the bias's part", "nothing"


@dataclass(frozen=True)
class Record:
    """What there is to know about a rule.

    Attributes:
        name: For test ids.
        build: From a stabiliser to the rule; rules without one ignore it.
        samples: Modules that it sits on.
        reference: Its relevance, derived slowly and otherwise.
        conserves: One of `EVERYTHING`, `BUT_BIAS` and `NOTHING`; of outputs with something to
            share by.
        shown: Its repr.
        wrong: Modules that it cannot sit on, with their inputs' shapes.
        shares: From contributions [B, outputs, slots] and connections [outputs, slots] to whether
            an output has something to share by.
        by_output: Whether it divides by the output (or nearly so), and stabilises that.
        by_share: Whether outputs are too near zero in one precision and zero in another, so that
            their relevance has to be a share of them.
        feeds_zeros: Whether inputs that are exactly zero get relevance.
        reads: What the rule makes of inputs before it looks at contributions.
    """

    name: str
    build: Callable[[float], Rule]
    samples: tuple[Sample, ...]
    reference: Reference
    conserves: str
    shown: str
    wrong: tuple[Sample, ...] = ()
    shares: Callable[[Tensor, Tensor], Tensor] | None = None
    by_output: bool = False
    by_share: bool = False
    feeds_zeros: bool = False
    reads: Callable[[Tensor], Tensor] = lambda x: x

    def rule(self, stabilizer: float = ref.EPSILON) -> Rule:
        """The rule."""
        return self.build(stabilizer)

    def start(self, y: Tensor, name: str) -> Tensor:
        """The outputs' relevance: any numbers; small ones at zeros, by share where it has to be."""
        R = grid(y.shape, f"{name} R") + 0.125
        if self.by_share:
            return R * y
        # Beside what a denominator of zero makes of it, nothing else would be compared.
        return torch.where(y == 0, ref.EPSILON * R, R) if self.by_output else R

    def reached(self, module: nn.Module, x: Tensor) -> Tensor:
        """Whether an output has something to share by, [B, outputs]."""
        assert self.shares is not None
        layer = ref.connections(module, x.shape[1:])
        return self.shares(
            layer.W * self.reads(x).flatten(1)[:, None, layer.source], layer.connected
        )


# --- the records ----------------------------------------------------------------------------------

_NOT_AFFINE = (
    Sample("a container", lambda: nn.Sequential(nn.Linear(4, 4)), ((4,),)),
    Sample("no weights", nn.ReLU, ((4,),)),
    Sample("layer norm", lambda: nn.LayerNorm(4), ((4,),)),
    Sample("batch norm", lambda: nn.BatchNorm1d(4).eval(), ((4,),)),
    Sample("group norm", lambda: nn.GroupNorm(2, 4), ((4,),)),
    Sample("prelu", nn.PReLU, ((4,),)),
    Sample("a recurrent cell", lambda: nn.GRUCell(4, 4), ((4,),)),
    Sample("bilinear", lambda: nn.Bilinear(4, 4, 2), ((4,), (4,))),
)
_OTHER_SIZE = (Sample("another size", lambda: nn.Linear(4, 3), ((4,),)),)
_NO_THIRDS = (Sample("no thirds", lambda: nn.Linear(4, 4), ((4,),)),)
_NO_NORM = (
    Sample("linear", lambda: nn.Linear(4, 4), ((4,),)),
    Sample("batch norm", lambda: nn.BatchNorm1d(4).eval(), ((4,),)),
)
_NO_SUM = (
    Sample("linear", lambda: nn.Linear(4, 4), ((4,),)),
    Sample("max pooling", lambda: nn.MaxPool1d(2), ((1, 4),)),
)
_NO_RELU = (
    Sample("tanh", nn.Tanh, ((4,),)),
    Sample("leaky relu", nn.LeakyReLU, ((4,),)),
    Sample("linear", lambda: nn.Linear(4, 4), ((4,),)),
)
_ONE_SAMPLE = (AFFINE[0], AFFINE[1], *(sample for sample in AFFINE if "conv" in sample.name))
# Where favoured contributions cancel exactly, relevance is large and float32 has no digits left.
_NEVER_CANCELLING = tuple(sample for sample in AFFINE if sample.name != "conv1d replicate")
_EPSILON_SHARED = (
    *(AFFINE[0], AFFINE[5], *OPERANDS[2:]),
    Sample("matrix product", MatMul, ((2, 3), (3, 2))),
)
# Bounds that reach to every shape: one number for all, as a tensor.
_LOW, _HIGH = torch.tensor(-1.75, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)


def _modified(stabilizer: float) -> Rule:
    return ModifiedRule(ParamModifier(lambda name, p: want.shifted(p)), stabilizer)


def _weights(
    name: str, build: Callable[[float], Rule], reference: Reference, *rest: Any, **more: Any
) -> Record:
    """A rule that reads an affine layer with other weights."""
    return Record(name, build, AFFINE, reference, *rest, **more, wrong=_NOT_AFFINE, by_output=True)


def _any(z: Tensor, connected: Tensor) -> Tensor:
    return (z.sum(-1).abs() > 1e-3) & (connected.sum(-1) > 0)


RECORDS = (
    Record(
        *("epsilon", EpsilonRule, AFFINE, affine(ref.epsilon), BUT_BIAS),
        shown="EpsilonRule(epsilon=1e-06)",
        shares=_any,
        by_output=True,
    ),
    Record(
        *("uniform epsilon", UniformEpsilonRule, _EPSILON_SHARED, want.epsilon_evenly, NOTHING),
        shown="UniformEpsilonRule(epsilon=1e-06)",
        by_output=True,
    ),
    Record(
        *("pass", lambda _: PassRule(), ELEMENTWISE, want.unchanged, EVERYTHING, "PassRule()"),
        wrong=_OTHER_SIZE,
        feeds_zeros=True,
    ),
    Record(
        *(
            "ignore",
            lambda _: IgnoreRule(),
            PICKING,
            want.to_the_winner,
            EVERYTHING,
            "IgnoreRule()",
        ),
        feeds_zeros=True,
    ),
    Record(
        *("uniform", lambda _: UniformRule(), OPERANDS, want.evenly, EVERYTHING, "UniformRule()"),
        wrong=_OTHER_SIZE,
        feeds_zeros=True,
    ),
    Record("stop", lambda _: StopRule(), AFFINE[:2], want.nowhere, NOTHING, "StopRule()"),
    Record(
        *("softmax epsilon", SoftmaxEpsilonRule, SOFTMAX, want.softmax, NOTHING),
        shown="SoftmaxEpsilonRule(epsilon=1e-06)",
    ),
    Record(
        *("layer norm", lambda _: LayerNormRule(), NORMS, want.norm, BUT_BIAS, "LayerNormRule()"),
        wrong=_NO_NORM,
        by_share=True,
    ),
    Record(
        *("pseudo identity", PseudoIdentityRule, ELEMENTWISE, want.pseudo_identity, NOTHING),
        shown="PseudoIdentityRule(stabilizer=1e-06)",
        wrong=_OTHER_SIZE,
    ),
    Record(
        *("ah-qkv", lambda _: AHQKVRule(), FUSED, want.values_alone, NOTHING, "AHQKVRule()"),
        wrong=_NO_THIRDS,
        by_share=True,
    ),
    _weights(
        *("alpha 2 beta 1", lambda eps: AlphaBetaRule(stabilizer=eps), affine(ref.alpha_beta)),
        *(BUT_BIAS, "AlphaBetaRule(stabilizer=1e-06, alpha=2.0, beta=1.0)"),
        shares=lambda z, _: (z > 0).any(-1) & (z < 0).any(-1),
    ),
    _weights(
        *("alpha 1 beta 0", lambda eps: AlphaBetaRule(1, 0, eps)),
        *(affine(ref.alpha_beta, alpha=1.0, beta=0.0), BUT_BIAS),
        shown="AlphaBetaRule(stabilizer=1e-06, alpha=1.0, beta=0.0)",
        shares=lambda z, _: (z > 0).any(-1),
    ),
    _weights(
        *("z-plus", ZPlusRule, affine(ref.zplus), BUT_BIAS, "ZPlusRule(stabilizer=1e-06)"),
        shares=lambda z, _: (z > 0).any(-1),
    ),
    _weights(
        *("gamma", lambda eps: GammaRule(0.25, eps), affine(ref.gamma), BUT_BIAS),
        shown="GammaRule(stabilizer=1e-06, gamma=0.25)",
        shares=_any,
    ),
    _weights(
        *("z-box", lambda eps: ZBoxRule(-2.0, 1.75, eps), want.box(-2.0, 1.75), EVERYTHING),
        shown="ZBoxRule(stabilizer=1e-06, low=-2.0, high=1.75)",
        shares=lambda z, connected: (z != 0).any(-1),
        feeds_zeros=True,
    ),
    _weights(
        *(
            "z-box of tensors",
            lambda eps: ZBoxRule(_LOW, _HIGH, eps),
            want.box(_LOW, _HIGH),
            EVERYTHING,
        ),
        shown=f"ZBoxRule(stabilizer=1e-06, low={_LOW!r}, high={_HIGH!r})",
        shares=lambda z, connected: (z != 0).any(-1),
        feeds_zeros=True,
    ),
    _weights(
        *("w-square", WSquareRule, affine(ref.wsquare), EVERYTHING),
        shown="WSquareRule(stabilizer=1e-06)",
        shares=lambda z, connected: (z != 0).any(-1),
        feeds_zeros=True,
    ),
    _weights(
        *("flat", FlatRule, affine(ref.flat), EVERYTHING, "FlatRule(stabilizer=1e-06)"),
        shares=lambda z, connected: connected.any(-1).expand(z.shape[:2]),
        feeds_zeros=True,
    ),
    _weights(
        *("modified", _modified, affine(ref.modified_params, modify=want.shifted), NOTHING),
        shown="ModifiedRule(stabilizer=1e-06, modifier=",
    ),
    _weights(
        *("w-square with bias", lambda eps: WSquareRule(eps, with_bias=True)),
        *(affine(ref.wsquare, with_bias=True), BUT_BIAS),
        shown="WSquareRule(stabilizer=1e-06, with_bias=True)",
        shares=lambda z, connected: (z != 0).any(-1),
        feeds_zeros=True,
    ),
    _weights(
        *("alpha 2 beta 1 without bias", lambda eps: AlphaBetaRule(2, 1, eps, zero_params="bias")),
        *(affine(without_bias(ref.alpha_beta)), EVERYTHING),
        shown="AlphaBetaRule(stabilizer=1e-06, zero_params=('bias',), alpha=2.0, beta=1.0)",
        shares=lambda z, _: (z > 0).any(-1) & (z < 0).any(-1),
    ),
    _weights(
        *("z-plus without bias", lambda eps: ZPlusRule(eps, zero_params=["bias"])),
        *(affine(without_bias(ref.zplus)), EVERYTHING),
        shown="ZPlusRule(stabilizer=1e-06, zero_params=('bias',))",
        shares=lambda z, _: (z > 0).any(-1),
    ),
    Record(
        *("gamma without bias", lambda eps: GammaRule(0.25, eps, zero_params="bias")),
        *(_NEVER_CANCELLING, affine(want.gamma_without_bias), NOTHING),
        shown="GammaRule(stabilizer=1e-06, zero_params=('bias',), gamma=0.25)",
        wrong=_NOT_AFFINE,
        by_output=True,
    ),
    _weights(
        *("excitation", ExcitationRule, affine(want.excitation), EVERYTHING),
        shown="ExcitationRule(stabilizer=1e-06)",
        shares=lambda z, _: (z > 0).any(-1),
        reads=lambda x: x.clamp(min=0),
    ),
    Record(
        *("epsilon without bias", lambda eps: EpsilonRule(eps, zero_params="bias")),
        *(AFFINE, affine(without_bias(ref.epsilon)), EVERYTHING),
        shown="EpsilonRule(epsilon=1e-06, zero_params=('bias',))",
        wrong=_NOT_AFFINE[:1],
        shares=_any,
        by_output=True,
    ),
    Record(
        *("epsilon clipped", lambda eps: EpsilonRule(ClippedStabilizer(eps)), AFFINE),
        *(affine(ref.epsilon, eps=want.clipped), BUT_BIAS),
        shown="EpsilonRule(epsilon=ClippedStabilizer(epsilon=1e-06))",
        shares=_any,
        by_output=True,
    ),
    Record(
        *("epsilon by scale", lambda eps: EpsilonRule(RelativeStabilizer(eps)), _ONE_SAMPLE),
        *(affine(ref.epsilon, eps=want.by_scale), BUT_BIAS),
        shown="EpsilonRule(epsilon=RelativeStabilizer(epsilon=1e-06, dims=None))",
        shares=_any,
        by_output=True,
    ),
    Record(
        *("argmax", lambda _: ArgmaxRule(), AFFINE, want.to_the_largest, EVERYTHING),
        shown="ArgmaxRule()",
        wrong=_NOT_AFFINE,
        shares=lambda z, connected: connected.any(-1).expand(z.shape[:2]),
        feeds_zeros=True,
    ),
    Record(
        *("mask", lambda eps: MaskRule(0, EpsilonRule(eps)), AFFINE),
        *(want.of_channel(0, ref.epsilon), NOTHING),
        shown="MaskRule(channels=(0,), rule=EpsilonRule(epsilon=1e-06), dim=1)",
        by_output=True,
    ),
    Record(
        *("norm", NormRule, (*SUMS, *AVERAGES), want.by_contribution, EVERYTHING),
        shown="NormRule(stabilizer=1e-06)",
        wrong=_NO_SUM,
        by_share=True,
    ),
    Record(
        *("norm of powers", NormRule, LP_POOLS, want.by_contribution, NOTHING),
        shown="NormRule(stabilizer=1e-06)",
        by_output=True,
    ),
    Record(
        *("guided relu", lambda _: GuidedReLURule(), RECTIFIERS, want.rectified(want.guided)),
        *(NOTHING, "GuidedReLURule()"),
        wrong=_NO_RELU,
        by_share=True,
    ),
    Record(
        *("deconv relu", lambda _: DeconvReLURule(), RECTIFIERS, want.rectified(want.deconvolved)),
        *(NOTHING, "DeconvReLURule()"),
        wrong=_NO_RELU,
        by_share=True,
    ),
    Record(
        *("beta smooth", lambda _: BetaSmoothRule(10), RECTIFIERS, want.rectified(want.smoothed)),
        *(NOTHING, "BetaSmoothRule(beta=10.0)"),
        wrong=_NO_RELU,
        by_share=True,
    ),
)

SITES = [(record, sample) for record in RECORDS for sample in record.samples]
SITE_IDS = [f"{record.name}-{sample.name}" for record, sample in SITES]
WRONG_SITES = [(record, sample) for record in RECORDS for sample in record.wrong]
WRONG_IDS = [f"{record.name}-{sample.name}" for record, sample in WRONG_SITES]
AFFINE_RULES = {
    "epsilon": (EpsilonRule(), ref.epsilon),
    "alpha 2 beta 1": (AlphaBetaRule(), ref.alpha_beta),
    "z-plus": (ZPlusRule(), ref.zplus),
    "gamma": (GammaRule(), ref.gamma),
    "w-square": (WSquareRule(), ref.wsquare),
    "flat": (FlatRule(), ref.flat),
}
"""Rules of affine layers that need no more than the layer, with their references."""
