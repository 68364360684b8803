"""One record per function rule: calls of it, a slow reference from the paper, what it conserves.

Generic tests run over `RECORDS`, so a new rule is tested by adding a record here. References know
nothing of surrogates: they share what flows out by Jacobians of the plain function, or closed forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.functional import jacobian

from function_calls import (
    ACTIVATIONS,
    ANY,
    BY_HAND,
    CENTRED,
    CONSTANT,
    EPS,
    GATED,
    GROUPED,
    LINEAR,
    POSITIVE,
    PRODUCTS,
    QKV,
    QUOTIENTS,
    SIGNALS,
    SQUARE,
    Call,
    attended,
    gated,
    operands,
    sdpa,
    second_hidden,
)
from tdhook_like.attribution.lrp import FunctionRules

EVERYTHING, NOT_ALL = "everything", "what constants do not absorb"
Relevances = list[Tensor]
Reference = Callable[[Callable[..., Tensor], list[Tensor], Tensor], Relevances]
"""From the function, its operands and the relevance of its output to that of the operands."""


@dataclass(frozen=True)
class Record:
    """What there is to know about a function rule.

    Attributes:
        name: For test ids.
        calls: In several spellings, with several shapes.
        reference: The operands' relevance, derived slowly and otherwise.
        conserves: `EVERYTHING` or `NOT_ALL`.
        functions: The rules that it belongs to.
        wrong: Calls that torch refuses, and goes on refusing under the rule.
    """

    name: str
    calls: tuple[Call, ...]
    reference: Reference
    conserves: str = EVERYTHING
    functions: FunctionRules = field(default_factory=FunctionRules)
    wrong: tuple[Call, ...] = ()


# --- references ----------------------------------------------------------------------------------


def nonzero(y: Tensor) -> Tensor:
    return torch.where(y == 0, torch.full_like(y, 1e-300), y)


def by_gradient(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
    """``R_i = Σ_j x_i J_ji R_j / y_j``."""
    g, dims = R / nonzero(f(*xs)), R.ndim
    found = jacobian(f, tuple(xs))
    return [
        x * torch.tensordot(g, J, dims=(list(range(dims)), list(range(dims))))
        for x, J in zip(xs, found, strict=True)
    ]


def evenly(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
    """n factors get one n-th each: Achtibat et al. 2024, eq. 15."""
    return [r / len(xs) for r in by_gradient(f, xs, R)]


def of_degree(degree: float) -> Reference:
    """Euler's theorem."""
    return lambda f, xs, R: [r / degree for r in by_gradient(f, xs, R)]


def unchanged(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
    """Achtibat et al. 2024, eq. 9."""
    (x,) = xs
    return [R.expand(x.shape) if R.shape == x.shape else R.sum_to_size(x.shape)]


def to_the_first(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
    """By gradient with everything but the first operand constant."""
    first, *others = xs
    found = by_gradient(lambda x: f(x, *others), [first], R)
    return [*found, *[torch.zeros_like(x) for x in others]]


def softmax_eq_13(dim: int) -> Reference:
    """``R_i = x_i (R_i − s_i Σ_j R_j)``: Achtibat et al. 2024, eq. 13."""

    def reference(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
        (x,) = xs
        e = (x - x.amax(dim, keepdim=True)).exp()
        s = e / e.sum(dim, keepdim=True)
        return [x * (R - s * R.sum(dim, keepdim=True))]

    return reference


def normalised(groups: Callable[[Tensor], Tensor], centred: bool, w: Any = None) -> Reference:
    """Ali et al. 2022, eq. 10, entry by entry: ``R_i = Σ_j x_i (δ_ij − 1/n) w_j / s · R_j / y_j``."""

    def reference(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
        (x,) = xs
        g = R / nonzero(f(x))
        g = g if w is None else g * w(x)
        rows, ups = groups(x), groups(g)
        found = torch.zeros_like(rows)
        for k in range(rows.shape[0]):
            v, up = rows[k], ups[k]
            n = len(v)
            mean = v.sum() / n if centred else 0.0
            std = (((v - mean) ** 2).sum() / n + EPS) ** 0.5
            for i in range(n):
                for j in range(n):
                    found[k, i] += v[i] * (float(i == j) - (1 / n if centred else 0)) / std * up[j]
        back = torch.zeros_like(x)
        places = groups(torch.arange(x.numel()).reshape(x.shape))
        back.view(-1)[places.reshape(-1)] = found.reshape(-1)
        return [back]

    return reference


def by_batch(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
    """Mean and deviation of the batch are constants: the mean absorbs its part."""
    (x,) = xs
    std = (((x - x.mean(0)) ** 2).sum(0) / len(x) + EPS) ** 0.5
    return [x / std * R / nonzero(f(x))]


def past_the_softmax(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
    """Of ``x + softmax(x)``, what is x's own."""
    return [xs[0] * R / nonzero(f(*xs))]


def attention(
    mask: Callable[[Tensor], Tensor] | None = None, groups: int = 1, fixed: bool = False
) -> Reference:
    """Attention step by step, carrying relevance: its two products and the softmax between."""

    def reference(f: Callable[..., Tensor], xs: list[Tensor], R: Tensor) -> Relevances:
        q, k, v = xs
        k_, v_ = (t.repeat_interleave(groups, -3) for t in (k, v))
        d = q.shape[-1]
        pairs = torch.einsum("...id,...jd->...ijd", q, k_) / d**0.5
        S = pairs.sum(-1)
        M = torch.zeros_like(S) if mask is None else mask(S)
        A = (S + M).softmax(-1)
        terms = torch.einsum("...ij,...jd->...ijd", A, v_)
        shares = terms * (R / nonzero(terms.sum(-2))).unsqueeze(-2)
        R_A, R_v = shares.sum(-1), shares.sum(-3)
        if not fixed:
            R_A, R_v = R_A / 2, R_v / 2
        R_S = (S + M).nan_to_num(neginf=0.0) * (R_A - A * R_A.sum(-1, keepdim=True))
        per_unit = (R_S / nonzero((S + M).nan_to_num(neginf=1.0))).unsqueeze(-1)
        R_q, R_k = ((pairs * per_unit / 2).sum(dim) for dim in (-2, -3))
        if fixed:
            R_q, R_k = torch.zeros_like(R_q), torch.zeros_like(R_k)
        if groups > 1:
            R_k, R_v = (t.unflatten(-3, (-1, groups)).sum(-3) for t in (R_k, R_v))
        return [R_q, R_k, R_v]

    return reference


def causal(S: Tensor) -> Tensor:
    return torch.full_like(S, -torch.inf).triu(1)


def masked(S: Tensor) -> Tensor:
    return torch.zeros_like(S).index_fill(-1, torch.tensor([1]), -torch.inf)


# --- the records ---------------------------------------------------------------------------------


def attentions(fixed: bool) -> list[Record]:
    """The records of attention under one of the two rules."""
    name = "attention, constant" if fixed else "attention"
    functions = FunctionRules(attention="constant" if fixed else "gradient")
    conserves = EVERYTHING if fixed else NOT_ALL
    plain = (
        Call("sdpa", sdpa, QKV),
        Call("sdpa by name", lambda q, k, v: sdpa(query=q, key=k, value=v), QKV),
        Call("by hand", attended, QKV),
    )
    hidden = (
        Call("boolean", lambda q, k, v: sdpa(q, k, v, second_hidden(q, k) == 0), QKV),
        Call("additive", lambda q, k, v: sdpa(q, k, v, attn_mask=second_hidden(q, k)), QKV),
    )
    return [
        Record(name, plain, attention(fixed=fixed), conserves, functions, wrong=WRONG_ATTENTION),
        Record(f"{name}, masked", hidden, attention(masked, fixed=fixed), conserves, functions),
        Record(
            f"{name}, causal",
            (Call("sdpa", lambda q, k, v: sdpa(q, k, v, is_causal=True), SQUARE),),
            attention(causal, fixed=fixed),
            conserves,
            functions,
        ),
        Record(
            f"{name}, grouped",
            (Call("sdpa", lambda q, k, v: sdpa(q, k, v, enable_gqa=True), GROUPED),),
            attention(groups=2, fixed=fixed),
            conserves,
            functions,
        ),
    ]


WRONG_ATTENTION = (Call("sizes that do not fit", sdpa, operands((2, 3, 4), (2, 3, 5), (2, 3, 4))),)
CP, SIGNAL = FunctionRules(attention="constant"), FunctionRules(gates="signal")
ROWS = normalised(lambda x: x.reshape(-1, 6), centred=True)

RECORDS = (
    Record(
        "pass", ACTIVATIONS, unchanged, wrong=(Call("integers", lambda x: F.gelu(x.int()), ANY),)
    ),
    Record("linear, picking or of degree one", LINEAR, by_gradient),
    Record(
        "product",
        PRODUCTS,
        evenly,
        wrong=(Call("sizes that do not fit", torch.matmul, operands((2, 3), (2, 3))),),
    ),
    Record(
        "three factors in turn",
        (Call("x * y * z", lambda x, y, z: x * y * z, operands((2, 3), (2, 3), (2, 3))),),
        lambda f, xs, R: [
            r * s for r, s in zip(by_gradient(f, xs, R), (0.25, 0.25, 0.5), strict=True)
        ],
    ),
    Record(
        "one factor twice",
        (Call("x @ x.T", lambda x: x @ x.mT, operands((2, 3, 4))),),
        of_degree(2),
    ),
    Record("quotient", QUOTIENTS, to_the_first),
    Record("RMS norm", BY_HAND, normalised(lambda x: x.reshape(-1, 6), centred=False)),
    Record(
        "layer norm",
        CENTRED,
        ROWS,
        wrong=(Call("another width", lambda x: F.layer_norm(x, (5,)), ANY),),
    ),
    Record(
        "layer norm with weights",
        (
            Call(
                "F.layer_norm",
                lambda x: F.layer_norm(x, (6,), CONSTANT.to(x), CONSTANT.to(x), EPS),
                ANY,
            ),
        ),
        normalised(lambda x: x.reshape(-1, 6), centred=True, w=lambda x: CONSTANT),
        NOT_ALL,
    ),
    Record(
        "group norm",
        (Call("F.group_norm", lambda x: F.group_norm(x, 2, eps=EPS), operands((2, 4, 3))),),
        normalised(lambda x: x.reshape(-1, 6), centred=True),
    ),
    Record(
        "instance norm",
        (
            Call("F.instance_norm", lambda x: F.instance_norm(x, eps=EPS), operands((2, 4, 3))),
            Call(
                "torch.instance_norm",
                lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, EPS, False),
                operands((2, 4, 3)),
            ),
        ),
        normalised(lambda x: x.reshape(-1, 3), centred=True),
    ),
    Record(
        "batch norm of a batch",
        (
            Call(
                "F.batch_norm",
                lambda x: F.batch_norm(x, None, None, training=True, eps=EPS),
                operands((4, 3)),
            ),
            Call(
                "torch.batch_norm",
                lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, EPS, False),
                operands((4, 3)),
            ),
        ),
        by_batch,
        NOT_ALL,
    ),
    Record(
        "x / norm",
        (
            Call("by hand", lambda x: x / x.norm(dim=-1, keepdim=True), ANY),
            Call("F.normalize", lambda x: F.normalize(x, dim=-1), ANY),
            Call("x / x.sum()", lambda x: x / x.sum(-1, keepdim=True), POSITIVE),
        ),
        unchanged,
    ),
    Record(
        "cosine similarity",
        (Call("F.cosine_similarity", F.cosine_similarity, operands((2, 5), (2, 5))),),
        lambda f, xs, R: [
            xs[0] * xs[1] / (xs[0] * xs[1]).sum(1, keepdim=True) * R[:, None] / 2 for _ in xs
        ],
    ),
    Record(
        "variance",
        (
            Call("var", lambda x: x.var(-1), ANY),
            Call("torch.var, all", lambda x: torch.var(x, dim=-1, correction=0), ANY),
        ),
        of_degree(2),
    ),
    Record(
        "prod",
        (
            Call("prod", lambda x: x.prod(-1), operands((2, 3))),
            Call("cumprod, the last", lambda x: x.cumprod(-1)[:, -1], operands((2, 3))),
            Call("det", torch.linalg.det, operands((2, 3, 3))),
            Call("matrix_power", lambda x: torch.linalg.matrix_power(x, 3), operands((2, 2, 2))),
        ),
        of_degree(3),
    ),
    Record(
        "softmax",
        (
            Call("F.softmax", lambda x: F.softmax(x, -1), ANY),
            Call("torch.softmax", lambda x: torch.softmax(x, dim=1), ANY),
            Call("Tensor.softmax", lambda x: x.softmax(-1), ANY),
            Call("special.softmax", lambda x: torch.special.softmax(x, -1), ANY),
        ),
        softmax_eq_13(-1),
        NOT_ALL,
    ),
    Record(
        "softmax over the second dimension",
        (Call("F.softmax", lambda x: F.softmax(x, 1), operands((2, 3, 4))),),
        softmax_eq_13(1),
        NOT_ALL,
    ),
    Record(
        "softmax, constant",
        (Call("x + F.softmax", lambda x: x + F.softmax(x, -1), ANY),),
        past_the_softmax,
        NOT_ALL,
        CP,
    ),
    Record(
        "log softmax and its like",
        (
            Call("F.log_softmax", lambda x: F.log_softmax(x, -1), ANY),
            Call("logsumexp", lambda x: x.logsumexp(-1), ANY),
            Call("logaddexp", torch.logaddexp, operands((2, 4), (2, 4))),
            Call(
                "cross_entropy",
                lambda x: F.cross_entropy(x, torch.tensor([0, 3]), reduction="none"),
                ANY,
            ),
        ),
        by_gradient,
        NOT_ALL,
    ),
    Record(
        "gates, half",
        (
            Call("x * sigmoid(y)", gated(torch.sigmoid), GATED),
            Call("glu", lambda x, y: F.glu(torch.cat([x, y], -1)), GATED),
            Call("x * gelu(y)", gated(F.gelu), GATED),
        ),
        lambda f, xs, R: [R / 2, R / 2],
    ),
    Record("gates, to the signal", SIGNALS, to_the_first, functions=SIGNAL),
    *attentions(fixed=False),
    *attentions(fixed=True),
)
