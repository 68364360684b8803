"""Stabilisers: what stands in a denominator's place, and every rule that takes one."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import reference_lrp as ref
from rule_samples import Sample, Sum, assert_close, explain, grid, made, only
from tdhook_like.attribution.lrp import (
    AlphaBetaRule,
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    GammaRule,
    Inputs,
    LayerNormRule,
    ModifiedRule,
    ParamModifier,
    PseudoIdentityRule,
    Rule,
    UniformEpsilonRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tdhook_like.attribution.lrp.rules.pooling import NormRule
from tdhook_like.attribution.lrp.rules.rectifiers import ExcitationRule
from tdhook_like.attribution.lrp.rules.stabilizer import (
    ClippedStabilizer,
    RelativeStabilizer,
    Stabilizer,
)
from tdhook_like.errors import RuleError

F64 = torch.float64
EPS = 0.25  # large enough to be seen
KINDS = (Stabilizer, ClippedStabilizer, RelativeStabilizer)
ANY_RULE: dict[str, Callable[[Any], Rule]] = {
    "epsilon": EpsilonRule,
    "uniform epsilon": UniformEpsilonRule,
    "alpha-beta": lambda s: AlphaBetaRule(stabilizer=s),
    "z-plus": ZPlusRule,
    "gamma": lambda s: GammaRule(stabilizer=s),
    "z-box": lambda s: ZBoxRule(-2, 2, s),
    "w-square": WSquareRule,
    "flat": FlatRule,
    "modified": lambda s: ModifiedRule(ParamModifier(), s),
    "excitation": ExcitationRule,
    "pseudo identity": PseudoIdentityRule,
    "norm": NormRule,
    "layer norm": lambda s: LayerNormRule(zero_params="bias", stabilizer=s),
}


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=F64)


def clipped(z: Tensor) -> Tensor:
    return torch.where(z < 0, -1.0, 1.0).to(z) * torch.maximum(z.abs(), torch.full_like(z, EPS))


def relative(z: Tensor) -> Tensor:
    return ref.stabilised(z, EPS * (sum(v.item() ** 2 for v in z) / len(z)) ** 0.5)


# --- the stabilisers themselves -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_a_plain_stabiliser_pushes_by_epsilon_and_a_clipped_one_up_to_it(dtype):
    z = column(-2.0, -0.125, 0.0, 0.125, 3.0).to(dtype)
    assert Stabilizer(0.5)(z).tolist() == [-2.5, -0.625, 0.5, 0.625, 3.5]
    assert ClippedStabilizer(0.5)(z).tolist() == [-2.0, -0.5, 0.5, 0.5, 3.0]
    assert Stabilizer(0.5)(z).dtype == ClippedStabilizer(0.5)(z).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_a_relative_stabiliser_pushes_by_a_share_of_each_rows_root_mean_square(dtype):
    z = torch.tensor([[3.0, -3.0, 0.0, 0.0], [8.0, 0.0, -8.0, 0.0]], dtype=dtype)
    found = RelativeStabilizer(0.5)(z)
    assert found.dtype == dtype
    scale = 0.5**0.5  # of half the entries being zero
    want = torch.tensor([[3.0, -3.0, 0, 0], [8.0, 0, -8.0, 0]], dtype=F64)
    want += 0.5 * scale * torch.tensor([[3.0, -3, 3, 3], [8, 8, -8, 8]], dtype=F64)
    torch.testing.assert_close(found.double(), want, rtol=torch.finfo(dtype).eps * 4, atol=0)


@pytest.mark.parametrize("dims", [None, 1, 2, 3, 9])
def test_dims_say_what_one_sample_is(dims: int | None):
    z = torch.randn(2, 3, 4, dtype=F64)
    over = tuple(range(3))[-min(dims or 2, 3) :]
    size = EPS * z.square().mean(over, keepdim=True).sqrt()
    torch.testing.assert_close(RelativeStabilizer(EPS, dims)(z, 2), z + size * z.sign())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_nothing_is_ever_divided_by_zero(kind: Any, dtype):
    for z in (
        torch.zeros(3, dtype=dtype),
        -torch.zeros(3, dtype=dtype),
        torch.zeros((), dtype=dtype),
    ):
        for epsilon in (1e-6, 1e-12, 1.0):
            held = kind(epsilon)(z)
            assert held.shape == z.shape and (held > 0).all() and (1 / held).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stabiliser_is_a_value(kind: Any):
    held = kind(1e-3)
    assert held == kind(1e-3) != kind(1e-2) and hash(held) == hash(kind(1e-3))
    assert pickle.loads(pickle.dumps(held)) == copy.deepcopy(held) == held
    assert eval(repr(held), {kind.__name__: kind}) == held
    with pytest.raises(AttributeError):
        held.epsilon = 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, -1e-6, float("nan"), float("inf"), "small", None, True])
def test_an_epsilon_that_is_no_positive_number_is_refused(kind: Any, value: Any):
    with pytest.raises(
        RuleError, match=f"{kind.__name__}: epsilon must be a finite number above 0"
    ):
        kind(value)


@pytest.mark.parametrize("dims", [0, -1, 1.5, True, "all"])
def test_dims_that_are_no_positive_whole_number_are_refused(dims: Any):
    with pytest.raises(RuleError, match="dims must be a whole number above 0"):
        RelativeStabilizer(dims=dims)


# --- in rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ANY_RULE.values(), ids=ANY_RULE)
def test_a_rule_takes_any_stabiliser_and_refuses_what_is_none(make: Callable[[Any], Rule]):
    for kind in KINDS:
        assert repr(kind(0.5)) in repr(make(kind(0.5)))
    for wrong in (0.0, -1.0, float("nan"), "small", None, abs, ClippedStabilizer):
        with pytest.raises(RuleError, match="finite number above 0"):
            make(wrong)


@pytest.mark.parametrize("make", ANY_RULE.values(), ids=ANY_RULE)
def test_a_plain_stabiliser_is_the_number(make: Callable[[Any], Rule]):
    module: nn.Module = made("layer", lambda: nn.Linear(4, 4))
    if isinstance(make(EPS), NormRule | PseudoIdentityRule):
        module = nn.Tanh() if isinstance(make(EPS), PseudoIdentityRule) else Sum()
    if isinstance(make(EPS), LayerNormRule):
        module = made("norm", lambda: nn.LayerNorm(4))
    x, R = grid((3, 4), "x"), grid((3, 4), "R") + 0.125
    number, held = (
        explain(module, only(module, make(eps)), [x], R)[0][0] for eps in (EPS, Stabilizer(EPS))
    )
    assert number.any()
    assert_close(held, number, 1e-14)


@pytest.mark.parametrize("kind", [ClippedStabilizer, RelativeStabilizer])
@pytest.mark.parametrize(
    ("make", "reference", "options"),
    [
        (EpsilonRule, ref.epsilon, {}),
        (lambda s: AlphaBetaRule(stabilizer=s), ref.alpha_beta, {}),
        (ZPlusRule, ref.zplus, {}),
        (WSquareRule, ref.wsquare, {}),
        (FlatRule, ref.flat, {}),
        (lambda s: ZBoxRule(-2, 2, s), ref.zbox, {"low": -2.0, "high": 2.0}),
    ],
    ids=["epsilon", "alpha-beta", "z-plus", "w-square", "flat", "z-box"],
)
@pytest.mark.parametrize("conv", [False, True], ids=["dense", "convolution"])
def test_a_rule_shares_by_the_denominators_that_its_stabiliser_makes(
    kind: Any, make: Any, reference: Any, options: Any, conv: bool
):
    layer = made("layer", lambda: nn.Conv2d(2, 3, 2, padding=1) if conv else nn.Linear(5, 4))
    x = grid((2, 2, 3, 2) if conv else (2, 5), "x")
    y = layer(x).detach()
    R = torch.where(y == 0, 0.0, grid(y.shape, "R") + 0.125)
    stable = clipped if kind is ClippedStabilizer else relative
    found = explain(layer, only(layer, make(kind(EPS))), [x], R)[0][0]
    assert_close(found, ref.relevance(layer, x, R, reference, eps=stable, **options), 1e-10)


def test_gamma_shares_by_clipped_denominators():
    layer, x = made("layer", lambda: nn.Linear(5, 4)), grid((2, 5), "x")
    R = torch.where(layer(x) == 0, 0.0, grid((2, 4), "R") + 0.125)
    rule = GammaRule(0.25, ClippedStabilizer(EPS))
    want = ref.relevance(layer, x, R, ref.gamma, eps=clipped)
    assert_close(explain(layer, only(layer, rule), [x], R)[0][0], want, 1e-10)


SCALED = [
    Sample("dense", lambda: nn.Linear(4, 3), ((4,),)),
    Sample("dense over time", lambda: nn.Linear(4, 3), ((5, 4),)),
    Sample("convolution", lambda: nn.Conv2d(1, 2, 2), ((1, 3, 3),)),
    Sample("transposed", lambda: nn.ConvTranspose1d(1, 2, 2), ((1, 3),)),
    Sample("pooling", lambda: nn.AvgPool2d(2, stride=1), ((2, 3, 3),)),
]


@pytest.mark.parametrize("sample", SCALED, ids=lambda sample: sample.name)
def test_relevance_by_a_relative_stabiliser_knows_no_scale_and_no_other_sample(sample: Sample):
    layer, (x,) = sample.module(), sample.inputs("non-negative", batch=3)
    for parameter in layer.parameters():  # dead outputs divide by the number itself
        parameter.data = parameter.data.abs() + 0.25
    rule, R = EpsilonRule(RelativeStabilizer(EPS)), grid(layer(x).shape, "R") + 0.125
    want = explain(layer, only(layer, rule), [x], R)[0][0]
    assert want.any() and not torch.allclose(
        want, explain(layer, only(layer, EpsilonRule(EPS)), [x], R)[0][0]
    )
    louder = torch.cat([x[:1] * 2.0**20, x[1:] * 2.0**-20])
    for parameter in layer.parameters():
        if parameter.dim() == 1:
            parameter.data.zero_()
    want = explain(layer, only(layer, rule), [x], R)[0][0]
    assert_close(explain(layer, only(layer, rule), [louder], R)[0][0], want, 1e-10)
    assert_close(explain(layer, only(layer, rule), [x[1:2]], R[1:2])[0][0], want[1:2], 1e-10)


def test_a_composite_hands_its_stabiliser_to_its_rules():
    mapper = EpsilonPlus(ClippedStabilizer(0.5), RelativeStabilizer(0.1))  # pyright: ignore
    assert (
        repr(mapper("0", nn.Linear(1, 1))) == "EpsilonRule(epsilon=ClippedStabilizer(epsilon=0.5))"
    )
    assert "RelativeStabilizer(epsilon=0.1" in repr(mapper("1", nn.Conv1d(1, 1, 1)))


class Huge(Stabilizer):
    """Absorbs nearly everything."""

    def __call__(self, z: Tensor, dims: int = 1) -> Tensor:
        return torch.full_like(z, 1e6).detach()


def test_a_stabiliser_of_ones_own_is_asked():
    layer, x = made("layer", lambda: nn.Linear(4, 3)), grid((2, 4), "x")
    R = torch.where(layer(x) == 0, 0.0, grid((2, 3), "R"))
    want = ref.relevance(layer, x, R, ref.epsilon, eps=lambda z: torch.full_like(z, 1e6))
    assert_close(explain(layer, only(layer, EpsilonRule(Huge())), [x], R)[0][0], want, 1e-10)


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_a_number_costs_the_operations_of_its_formula_and_no_others():
    layer, x = nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    rule, y = EpsilonRule(), layer(x)
    rule.surrogate(layer, Inputs((x,)), y)  # the first look at the weights
    with Operations() as operations:
        rule.surrogate(layer, Inputs((x,)), y)
    assert operations.seen == Counter(
        ["detach", "abs", "clamp", "add", "div_", "nan_to_num_", "mul"]
    )
