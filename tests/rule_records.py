"""One record per rule: how to build it, what it sits on, a slow reference, what it conserves.

Generic tests run over `RECORDS`, so a new rule is tested by adding a record here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import reference_lrp as ref
from rule_samples import (
    AFFINE,
    ELEMENTWISE,
    FUSED,
    NORMS,
    OPERANDS,
    PICKING,
    SOFTMAX,
    MaskedSoftmax,
    MatMul,
    Product,
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

Reference = Callable[[nn.Module, Sequence[Tensor], Tensor], list[Tensor]]
"""``(module, inputs, R_out) -> relevance of each input``, in float64."""

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
        return self.shares(layer.W * x.flatten(1)[:, None, layer.source], layer.connected)


# --- references -----------------------------------------------------------------------------------


def affine(rule: Callable[..., Tensor], **options: Any) -> Reference:
    """The reference of a rule of affine layers, connection by connection."""

    def reference(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
        return [ref.relevance(module, inputs[0], R, rule, **options)]

    return reference


def box(low: Tensor | float, high: Tensor | float) -> Reference:
    """Z-box with bounds for every input, or of the input's shape where they are tensors."""

    def reference(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
        shape = inputs[0].shape[1:]
        bounds = {
            name: torch.as_tensor(bound, dtype=torch.float64).expand(shape)
            for name, bound in (("low", low), ("high", high))
        }
        return [ref.relevance(module, inputs[0], R, ref.zbox, **bounds)]

    return reference


def shifted(parameter: Tensor) -> Tensor:
    """A modification that keeps the grid: half of it, and a bit more."""
    return parameter / 2 + 1 / 64


def unchanged(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """What came to the output is the input's."""
    return [ref.pass_(inputs[0], R)]


def pseudo_identity(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """``x R / st(x)``."""
    x = inputs[0].double()
    return [x * R.double() / ref.stabilised(x, ref.EPSILON)]


def nowhere(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """No relevance for any input."""
    return [ref.stop(x, R) for x in inputs]


def evenly(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """Each operand the same."""
    return ref.uniform(inputs, R)


def absorbed(y: Tensor, R: Tensor) -> Tensor:
    """What epsilon leaves of relevance: ``R y / st(y)``."""
    return R.double() * y / ref.stabilised(y, ref.EPSILON)


def epsilon_evenly(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """Products by hand, factor by factor; anything else is an affine layer of one input."""
    xs = [x.double() for x in inputs]
    if isinstance(module, Product):
        return ref.uniform(xs, absorbed(module(*xs), R))
    if not isinstance(module, MatMul):
        return [ref.relevance(module, xs[0], R, ref.epsilon)]
    a, b = xs
    ratio = R.double() / ref.stabilised(a @ b, ref.EPSILON)
    to_a, to_b = torch.zeros_like(a), torch.zeros_like(b)
    n, m, k = ratio.shape[-2], ratio.shape[-1], a.shape[-1]
    for i in range(n):
        for j in range(m):
            for inner in range(k):
                part = a[:, i, inner] * b[:, inner, j] * ratio[:, i, j] / 2
                to_a[:, i, inner] += part
                to_b[:, inner, j] += part
    return [to_a, to_b]


def softmax(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """AttnLRP's proposition, what epsilon absorbs taken off beforehand."""
    x = inputs[0].double()
    dim = {nn.Softmax2d: -3}.get(type(module), getattr(module, "dim", -1))
    if isinstance(module, MaskedSoftmax):
        x = x.masked_fill(torch.arange(x.shape[-1]) > 1, -torch.inf)
    s = torch.softmax(x, dim)
    return [ref.softmax_attn(x, absorbed(s, R), dim)]


def norm(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """The norm with its statistics constant; an RMS norm is then one factor per entry."""
    if isinstance(module, nn.LayerNorm):
        return [ref.layer_norm(module, inputs[0], R)]
    return unchanged(module, inputs, R)


def values_alone(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """LRP-0 through the last third of the outputs."""
    third = R.shape[-1] // 3
    kept = torch.zeros_like(R)
    kept[..., -third:] = R[..., -third:]
    return [ref.relevance(module, inputs[0], kept, ref.epsilon, eps=0.0)]


def to_the_winner(module: nn.Module, inputs: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """Pooling by hand: the first of the largest takes all."""
    if not isinstance(module, nn.MaxPool1d):
        return [R.double().reshape(inputs[0].shape)]
    out = torch.zeros_like(inputs[0], dtype=torch.float64)
    for b, channel, j in torch.cartesian_prod(*map(torch.arange, R.shape)).tolist():
        window = inputs[0][b, channel, 2 * j : 2 * j + 2]
        out[b, channel, 2 * j + int(window.argmax())] += R[b, channel, j]
    return [out]


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
_EPSILON_SHARED = (
    *(AFFINE[0], AFFINE[5], *OPERANDS[2:]),
    Sample("matrix product", MatMul, ((2, 3), (3, 2))),
)
# Bounds that reach to every shape: one number for all, as a tensor.
_LOW, _HIGH = torch.tensor(-1.75, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)


def _modified(stabilizer: float) -> Rule:
    return ModifiedRule(ParamModifier(lambda name, p: shifted(p)), stabilizer)


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
        *("uniform epsilon", UniformEpsilonRule, _EPSILON_SHARED, epsilon_evenly, NOTHING),
        shown="UniformEpsilonRule(epsilon=1e-06)",
        by_output=True,
    ),
    Record(
        *("pass", lambda _: PassRule(), ELEMENTWISE, unchanged, EVERYTHING, "PassRule()"),
        wrong=_OTHER_SIZE,
        feeds_zeros=True,
    ),
    Record(
        *("ignore", lambda _: IgnoreRule(), PICKING, to_the_winner, EVERYTHING, "IgnoreRule()"),
        feeds_zeros=True,
    ),
    Record(
        *("uniform", lambda _: UniformRule(), OPERANDS, evenly, EVERYTHING, "UniformRule()"),
        wrong=_OTHER_SIZE,
        feeds_zeros=True,
    ),
    Record("stop", lambda _: StopRule(), AFFINE[:2], nowhere, NOTHING, "StopRule()"),
    Record(
        *("softmax epsilon", SoftmaxEpsilonRule, SOFTMAX, softmax, NOTHING),
        shown="SoftmaxEpsilonRule(epsilon=1e-06)",
    ),
    Record(
        *("layer norm", lambda _: LayerNormRule(), NORMS, norm, BUT_BIAS, "LayerNormRule()"),
        wrong=_NO_NORM,
        by_share=True,
    ),
    Record(
        *("pseudo identity", PseudoIdentityRule, ELEMENTWISE, pseudo_identity, NOTHING),
        shown="PseudoIdentityRule(stabilizer=1e-06)",
        wrong=_OTHER_SIZE,
    ),
    Record(
        *("ah-qkv", lambda _: AHQKVRule(), FUSED, values_alone, NOTHING, "AHQKVRule()"),
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
        *("z-box", lambda eps: ZBoxRule(-2.0, 1.75, eps), box(-2.0, 1.75), EVERYTHING),
        shown="ZBoxRule(stabilizer=1e-06, low=-2.0, high=1.75)",
        shares=lambda z, connected: (z != 0).any(-1),
        feeds_zeros=True,
    ),
    _weights(
        *("z-box of tensors", lambda eps: ZBoxRule(_LOW, _HIGH, eps), box(_LOW, _HIGH), EVERYTHING),
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
        *("modified", _modified, affine(ref.modified_params, modify=shifted), NOTHING),
        shown="ModifiedRule(stabilizer=1e-06, modifier=",
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
