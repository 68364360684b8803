"""What rules read of parameters: some as zeros, none that is no number, bounds for each channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import reference_lrp as ref
from rule_references import without_bias
from rule_samples import assert_close, explain, grid, made, only
from tdhook_like import LRP
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
    Rule,
    UniformEpsilonRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tdhook_like.attribution.lrp.rules.picking import ArgmaxRule
from tdhook_like.attribution.lrp.rules.rectifiers import ExcitationRule
from tdhook_like.errors import RuleError

F64 = torch.float64
NAN, INF = float("nan"), float("inf")
OF_WEIGHTS: dict[str, Callable[..., Rule]] = {
    "epsilon": EpsilonRule,
    "uniform epsilon": UniformEpsilonRule,
    "alpha-beta": AlphaBetaRule,
    "z-plus": ZPlusRule,
    "gamma": GammaRule,
    "z-box": ZBoxRule,
    "w-square": WSquareRule,
    "flat": FlatRule,
    "excitation": ExcitationRule,
    "modified": lambda **options: ModifiedRule(ParamModifier(), **options),
}
any_of_weights = pytest.mark.parametrize("make", OF_WEIGHTS.values(), ids=OF_WEIGHTS)


def relevance(module: nn.Module, rule: Rule, x: Tensor, R: Tensor) -> Tensor:
    return explain(module, only(module, rule), [x], R)[0][0]


# --- parameters that are read as zeros ------------------------------------------------------------


@any_of_weights
def test_the_names_print_as_a_tuple_and_not_at_all_where_there_are_none(make: Callable[..., Rule]):
    assert "zero_params=('bias',)" in repr(make(zero_params="bias"))
    assert "zero_params=('weight', 'bias')" in repr(make(zero_params=["weight", "bias", "weight"]))
    for nothing in ((), [], None):
        assert "zero_params" not in repr(make(zero_params=nothing))


@any_of_weights
def test_a_layer_that_is_read_without_weights_has_nothing_to_share_by(make: Callable[..., Rule]):
    layer, x = made("layer", lambda: nn.Linear(4, 3)), grid((2, 4), "x") + 1 / 8
    assert not relevance(layer, make(zero_params="weight"), x, torch.ones(2, 3)).any()


@any_of_weights
@pytest.mark.parametrize("wrong", [0, 3, [3], "", [""], {"bias": 0}, [None], torch.zeros(1)])
def test_what_is_no_name_of_a_parameter_is_refused(make: Callable[..., Rule], wrong: Any):
    with pytest.raises(RuleError, match="zero_params must be the name of a parameter or a list"):
        make(zero_params=wrong)


@any_of_weights
def test_a_name_that_the_layer_does_not_have_is_refused_with_those_that_it_has(
    make: Callable[..., Rule],
):
    layer = nn.Linear(4, 3)
    with pytest.raises(RuleError, match=r"names 'bais', and its parameters are 'weight', 'bias'"):
        relevance(layer, make(zero_params="bais"), torch.ones(2, 4), torch.ones(2, 3))


def test_a_bias_that_is_missing_is_zero_already():
    layer, x = made("bare", lambda: nn.Linear(4, 3, bias=False)), grid((2, 4), "x")
    R = grid((2, 3), "R")
    found = relevance(layer, EpsilonRule(zero_params="bias"), x, R)
    assert_close(found, relevance(layer, EpsilonRule(), x, R), 1e-12)


def test_one_rule_serves_layers_and_what_has_no_parameters():
    net = made("net", lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    rule, x, R = EpsilonRule(zero_params="bias"), grid((2, 4), "x"), grid((2, 4), "R")
    found = explain(net, lambda name, m: rule if name else None, [x], R)[0][0]
    hidden = net[0](x).detach()
    slope = 1 - torch.tanh(hidden) ** 2
    behind = hidden * slope * R / ref.stabilised(torch.tanh(hidden), ref.EPSILON)
    want = ref.relevance(net[0], x, behind, without_bias(ref.epsilon))
    assert_close(found, want, 1e-9)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_containers_and_recurrent_layers_are_refused(kind: Any):
    for module in (nn.Sequential(nn.Linear(4, 4)), kind(4, 4)):
        assert EpsilonRule(zero_params="bias").check(module)
        assert EpsilonRule().check(module) is None


def test_effective_parameters_are_the_ones_that_are_zeroed():
    plain = made("plain", lambda: nn.Linear(4, 3))
    normed = weight_norm(made("plain", lambda: nn.Linear(4, 3)))
    x, R = grid((2, 4), "x"), grid((2, 3), "R")
    want = ref.relevance(plain, x, R, without_bias(ref.epsilon))
    assert_close(relevance(normed, EpsilonRule(zero_params="bias"), x, R), want, 1e-9)
    assert not relevance(normed, EpsilonRule(zero_params="weight"), x, R).any()


def test_a_layer_norm_without_its_bias_shares_everything_by_what_is_normalised():
    norm, x = made("norm", lambda: nn.LayerNorm(5)), grid((3, 5), "x")
    read = norm(x) - norm.bias  # where that is a rounding error, so is what is shared by it
    R = torch.where((norm(x) == 0) | (read.abs() < 1e-9), 0.0, grid((3, 5), "R") + 0.125)
    found = relevance(norm, LayerNormRule(zero_params="bias", stabilizer=1e-13), x, R)
    rows = []
    for row, R_row in zip(x, R, strict=True):
        std = ((row - row.mean()).square().mean() + norm.eps).sqrt()
        W = norm.weight.detach()[:, None] * (torch.eye(5, dtype=F64) - 1 / 5) / std
        rows.append(ref.epsilon(W, torch.zeros(5, dtype=F64), row, R_row, eps=1e-13))
    assert_close(found, torch.stack(rows), 1e-9)
    torch.testing.assert_close(found.sum(1), R.sum(1), rtol=1e-8, atol=1e-8)
    with pytest.raises(RuleError, match="its parameters are 'weight', 'bias'"):
        LayerNormRule(zero_params="gain").register(norm)


def test_a_cell_that_returns_several_tensors_is_read_without_its_biases():
    cell = made("cell", lambda: nn.LSTMCell(3, 2))
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    rule = EpsilonRule(1e-13, zero_params=["bias_ih", "bias_hh"])
    h, c = rule.apply(cell, Inputs((x,)), cell(x))
    bare = nn.LSTMCell(3, 2, bias=False).double()
    bare.load_state_dict({k: v for k, v in cell.state_dict().items() if "weight" in k})
    for got, full, read in zip((h, c), cell(x), bare(x), strict=True):
        scaled = (read * (full / read).detach()).sum()
        (want,) = torch.autograd.grad(scaled, x, retain_graph=True)
        (found,) = torch.autograd.grad(got.sum(), x, retain_graph=True)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


# --- parameters that are not numbers --------------------------------------------------------------

READING = {**OF_WEIGHTS, "argmax": lambda **_: ArgmaxRule()}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("make", READING.values(), ids=READING)
def test_nan_or_inf_among_the_weights_is_refused_by_name(make: Any, name: str, value: float):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with torch.no_grad():
        net[1].get_parameter(name).view(-1)[2] = value
    rule = make()
    words = rf"'1'.*{type(rule).__name__}.*Linear.*'{name}' holds NaN or Inf in 1 of"
    with pytest.raises(RuleError, match=words):
        explain(net, only(net[1], rule), [torch.ones(2, 4)], torch.ones(2, 3))


@pytest.mark.parametrize("make", READING.values(), ids=READING)
def test_weights_that_turn_bad_are_noticed_and_weights_that_turn_good_again_too(make: Any):
    layer = nn.Linear(4, 3)
    td = TensorDict({"x": torch.ones(2, 4)}, [2])
    with LRP(only(layer, make()), ("y", 0)).prepare(layer, ["x"], ["y"]) as hooked:
        for _ in range(2):
            assert hooked(td.clone())["attr", "x"].isfinite().all()
            kept = layer.weight.detach().clone()
            with torch.no_grad():
                layer.weight[0, 0] = NAN
            for _ in range(2):
                with pytest.raises(RuleError, match="'weight' holds NaN"):
                    hooked(td.clone())
            with torch.no_grad():
                layer.weight.copy_(kept)


def test_a_computed_weight_that_is_no_number_is_refused_where_it_is_read():
    layer = weight_norm(nn.Linear(4, 3))
    with torch.no_grad():
        layer.parametrizations["weight"].original1[1] = 0  # 0 / 0
    with pytest.raises(RuleError, match="'weight' holds NaN or Inf in 4 of 12"):
        ZPlusRule().apply(layer, Inputs((torch.ones(2, 4),)), layer(torch.ones(2, 4)))


def test_weights_whose_sum_overflows_are_numbers():
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(2e38)
    found = relevance(layer, FlatRule(), torch.full((1, 3), 1e-30), torch.ones(1, 2))
    torch.testing.assert_close(found, torch.full((1, 3), 2 / 3))


def test_weights_under_vmap_cannot_be_asked_and_are_read_as_they_are():
    weights = torch.randn(3, 2, 4)
    weights[0] = NAN

    layer = nn.Linear(4, 2, bias=False)

    def found(weight: Tensor) -> Tensor:
        class Ruled(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return EpsilonRule().apply(layer, Inputs((x,)), layer(x)).sum()

        net = Ruled()
        net.layer = layer
        score = lambda x: torch.func.functional_call(net, {"layer.weight": weight}, (x,))  # noqa: E731
        return torch.func.grad(score)(torch.ones(4))

    assert torch.func.vmap(found)(weights)[1:].isfinite().all()


# --- bounds for each channel ----------------------------------------------------------------------

CONVS = {
    "1d": (lambda: nn.Conv1d(3, 2, 2, padding=1), (3, 3)),
    "2d": (lambda: nn.Conv2d(3, 2, 2), (3, 3, 3)),
    "2d in groups, reflecting": (
        lambda: nn.Conv2d(3, 3, 2, padding=1, groups=3, padding_mode="reflect"),
        (3, 2, 3),
    ),
    "3d": (lambda: nn.Conv3d(3, 1, 2), (3, 2, 2, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=2), (3, 2, 3)),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("spelling", ["[C]", "[C, 1, ...]", "[1, C, 1, ...]", "of the sample"])
def test_a_bound_per_channel_holds_for_all_positions_of_the_channel(name: str, spelling: str):
    build, shape = CONVS[name]
    layer, x = made(name, build), grid((2, *shape), "x")
    R = torch.where(layer(x) == 0, 0.0, grid(layer(x).shape, "R") + 0.125)
    low, high = torch.tensor([-2.0, -1.5, -1.75]), torch.tensor([2.0, 1.5, 3.0])
    full = [bound.reshape(3, *(1 for _ in shape[1:])) for bound in (low, high)]
    given = {
        "[C]": [low, high],
        "[C, 1, ...]": full,
        "[1, C, 1, ...]": [bound[None] for bound in full],
        "of the sample": [bound.expand(shape) for bound in full],
    }[spelling]
    want = ref.relevance(layer, x, R, ref.zbox, low=full[0], high=full[1])
    assert_close(relevance(layer, ZBoxRule(*given), x, R), want, 1e-10)
    one = ref.relevance(layer, x, R, ref.zbox, low=full[0], high=3.0)
    assert_close(relevance(layer, ZBoxRule(given[0], 3.0), x, R), one, 1e-10)
    alone = relevance(layer, ZBoxRule(*given), x[:1], R[:1])
    assert_close(alone, want[:1], 1e-10)


@pytest.mark.parametrize("shape", [(2,), (4,), (4, 1, 1), (3, 3)])
def test_bounds_that_are_not_per_channel_are_refused_with_both_shapes(shape: tuple[int, ...]):
    layer, x = nn.Conv2d(3, 2, 2), torch.rand(2, 3, 4, 5)
    words = r"broadcast to an input of shape \(2, 3, 4, 5\).*one per channel \(\[3\]\)"
    with pytest.raises(RuleError, match=words):
        relevance(layer, ZBoxRule(torch.zeros(shape), 1.0), x, torch.ones(2, 2, 3, 4))


@pytest.mark.parametrize("bounds", [(-INF, 1.0), (0.0, INF), (torch.tensor([-INF]), 1.0)])
def test_a_bound_that_bounds_nothing_is_refused(bounds: Any):
    with pytest.raises(RuleError, match="finite"):
        ZBoxRule(*bounds)


def test_the_bias_takes_part_in_w_square_if_asked_for_and_absorbs_its_share():
    layer = made("layer", lambda: nn.Conv1d(2, 2, 2))
    layer.bias.data.fill_(0.5)
    x, R = grid((2, 2, 4), "x"), torch.ones(2, 2, 3, dtype=F64)
    plain, with_bias = (
        relevance(layer, WSquareRule(1e-13, with_bias=b), x, R) for b in (False, True)
    )
    squares = layer.weight.detach().square().sum((1, 2))
    kept = (squares / (squares + 0.25)).sum() * 3
    torch.testing.assert_close(plain.sum((1, 2)), R.sum((1, 2)))
    torch.testing.assert_close(with_bias.sum((1, 2)), kept.expand(2))
    with pytest.raises(RuleError, match="with_bias must be True or False"):
        WSquareRule(with_bias=1)  # pyright: ignore[reportArgumentType]


def test_zeroed_parameters_and_rules_of_a_composite_go_together():
    net = made("net", lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    rules = {"0": ZPlusRule(zero_params="bias"), "2": EpsilonRule(zero_params="bias")}
    mapper = EpsilonPlus(rule_mapper=lambda name, m: rules.get(name))
    x, R = grid((2, 4), "x"), grid((2, 2), "R") + 0.125
    want = ref.propagate(
        list(net), x, R, [without_bias(ref.zplus), None, without_bias(ref.epsilon)]
    )
    assert_close(explain(net, mapper, [x], R)[0][0], want, 1e-9)
