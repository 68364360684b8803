"""Integrated gradients against closed forms, a slow loop, and the sums that they promise."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_like import LRP, CompletenessWarning, Each, Greedy, InputXGradient, IntegratedGradients
from tdhook_like.attribution.path import QUADRATURES, quadrature

DOUBLE = torch.float64
# The highest degree of polynomials that n nodes integrate without error.
DEGREE = {
    "gausslegendre": lambda n: 2 * n - 1,
    "riemann_middle": lambda n: 1,
    "riemann_trapezoid": lambda n: 1,
    "riemann_left": lambda n: 0,
    "riemann_right": lambda n: 0,
}


# --- quadratures ----------------------------------------------------------------------------------


@given(st.sampled_from(QUADRATURES), st.integers(2, 200))
def test_weights_sum_to_one_and_nodes_lie_in_order_between_the_ends(method, n):
    nodes, weights = quadrature(method, n)
    assert nodes.dtype == weights.dtype == DOUBLE and nodes.shape == weights.shape == (n,)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert (weights > 0).all() and (nodes.diff() > 0).all()
    assert nodes[0] >= 0 and nodes[-1] <= 1


@given(st.sampled_from(QUADRATURES), st.integers(2, 40))
def test_polynomials_are_integrated_exactly_up_to_the_rules_degree_and_not_beyond(method, n):
    nodes, weights = quadrature(method, n)
    highest = DEGREE[method](n)
    for degree in range(highest + 1):
        assert (weights * nodes**degree).sum().item() == pytest.approx(1 / (degree + 1), abs=1e-12)
    if n < 8:
        missed = (weights * nodes ** (highest + 1)).sum().item() - 1 / (highest + 2)
        assert abs(missed) > 1e-10


def test_every_method_of_quadrature_has_a_known_degree():
    assert set(DEGREE) == set(QUADRATURES)


def test_gauss_and_legendres_nodes_are_those_of_the_tables():
    # Abramowitz & Stegun 1964, table 25.4, for n = 3 and n = 5 on [-1, 1].
    nodes, weights = quadrature("gausslegendre", 3)
    torch.testing.assert_close(
        2 * nodes - 1, torch.tensor([-math.sqrt(0.6), 0.0, math.sqrt(0.6)], dtype=DOUBLE)
    )
    torch.testing.assert_close(2 * weights, torch.tensor([5 / 9, 8 / 9, 5 / 9], dtype=DOUBLE))
    nodes, weights = quadrature("gausslegendre", 5)
    assert 2 * nodes[4].item() - 1 == pytest.approx(0.906179845938664, abs=1e-14)
    assert 2 * weights[4].item() == pytest.approx(0.236926885056189, abs=1e-14)


# --- the method -----------------------------------------------------------------------------------


def explained(net: nn.Module, x: Tensor, target: Any = "y", **options: Any) -> TensorDict:
    method = IntegratedGradients(target, **{"gap_tolerance": None, **options})
    with method.prepare(net, ["x"], ["y"]) as hooked:
        return hooked(TensorDict({"x": x}, x.shape[:1]))


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)


def test_of_a_linear_model_it_is_weight_times_difference():
    net, x = nn.Linear(4, 1).double(), torch.randn(6, 4, dtype=DOUBLE)
    baseline = torch.randn(4, dtype=DOUBLE)
    td = explained(net, x, n_steps=1, baselines=baseline)
    torch.testing.assert_close(td["attr", "x"], ((x - baseline) * net.weight).detach())


def test_of_a_product_it_halves_and_of_powers_it_shares_by_degree():
    x = torch.rand(6, 2, dtype=DOUBLE) + 0.5
    a, b = x.unbind(-1)
    td = explained(Function(lambda x: x[..., 0] * x[..., 1]), x)
    torch.testing.assert_close(td["attr", "x"], torch.stack([a * b / 2, a * b / 2], -1))
    td = explained(Function(lambda x: x[..., 0] ** 3 * x[..., 1]), x)
    torch.testing.assert_close(td["attr", "x"], torch.stack([0.75 * a**3 * b, 0.25 * a**3 * b], -1))


def test_of_a_sum_of_functions_of_one_input_each_it_is_their_change():
    x, base = torch.randn(6, 3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    td = explained(Function(lambda x: x.sin().sum(-1)), x, baselines=base)
    torch.testing.assert_close(td["attr", "x"], x.sin() - base.sin(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["gausslegendre", "riemann_middle", "riemann_right"])
def test_an_infinite_slope_at_an_end_where_no_node_lies_does_no_harm(method):
    x = torch.rand(6, 3, dtype=DOUBLE) + 0.5
    td = explained(Function(lambda x: x.sqrt().sum(-1)), x, n_steps=1000, method=method)
    if method == "gausslegendre":
        nodes, weights = (
            torch.as_tensor(part) / 2 for part in numpy.polynomial.legendre.leggauss(1000)
        )
        nodes = nodes + 0.5
    else:
        shift = 0.5 if method == "riemann_middle" else 1.0
        nodes, weights = (
            (torch.arange(1000, dtype=DOUBLE) + shift) / 1000,
            torch.tensor(1e-3, dtype=DOUBLE),
        )
    # ∫ 1 / (2 √t) dt = 1, and what the nodes make of it.
    integral = (weights / (2 * nodes.sqrt())).sum()
    torch.testing.assert_close(td["attr", "x"], integral * x.sqrt(), rtol=1e-9, atol=0)
    assert integral.item() == pytest.approx(1, abs=0.03)
    gap = td["attr", "x"].sum(-1) - x.sqrt().sum(-1)
    torch.testing.assert_close(td["attr_gap"], gap, rtol=1e-9, atol=1e-9)


def network() -> nn.Sequential:
    layers = [nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5), nn.Softplus(), nn.Linear(5, 4)]
    return nn.Sequential(*layers)


def slow(net: nn.Module, x: Tensor, base: Tensor, index: int, method: str, n: int) -> Tensor:
    """Element by element, node by node."""
    total = torch.zeros_like(x)
    for node, weight in zip(*quadrature(method, n), strict=True):
        for row in range(len(x)):
            point = (base[row] + node * (x[row] - base[row])).requires_grad_()
            (g,) = torch.autograd.grad(net(point)[index], point)
            total[row] += weight * g * (x[row] - base[row])
    return total


@pytest.mark.parametrize("rows", [None, 1, 7, 10_000])
@pytest.mark.parametrize("method", QUADRATURES)
def test_every_quadrature_is_that_of_a_slow_loop(method, rows):
    net, x = network().double(), torch.randn(3, 3, dtype=DOUBLE)
    base = torch.randn(3, 3, dtype=DOUBLE)
    options = {"method": method, "n_steps": 9, "baselines": base, "internal_batch_size": rows}
    td = explained(net, x, ("y", 2), **options)
    expected = slow(net, x, base, 2, method, 9)
    torch.testing.assert_close(td["attr", "x"], expected, rtol=1e-10, atol=1e-10)
    change = (net(x) - net(base))[:, 2].detach()
    torch.testing.assert_close(td["attr_gap"], expected.sum(-1) - change, atol=1e-10, rtol=0)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([nn.Tanh, nn.Softplus, nn.GELU]))
def test_attributions_sum_to_the_change_of_the_score_on_smooth_models(seed, activation):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 16), activation(), nn.Linear(16, 1)).double()
    x, base = torch.randn(5, 3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    td = explained(net, x, baselines=base, n_steps=60)
    change = (net(x) - net(base.expand(5, 3))).squeeze(-1).detach()
    torch.testing.assert_close(td["attr", "x"].sum(-1), change, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(td["attr_gap"], td["attr", "x"].sum(-1) - change, atol=1e-9, rtol=0)


def test_on_relu_networks_the_gap_shrinks_with_the_steps():
    net = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    x = torch.randn(200, 3)
    gaps = [explained(net, x, n_steps=n)["attr_gap"].abs().mean().item() for n in (5, 50, 500)]
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2]


@pytest.mark.parametrize("target", [Each("y"), {f"t{i}": ("y", i) for i in range(4)}, "greedy"])
def test_several_targets_are_what_they_are_one_at_a_time(target):
    net, x = network().double(), torch.randn(5, 3, dtype=DOUBLE)
    alone = [explained(net, x, ("y", i)) for i in range(4)]
    if target == "greedy":
        td = explained(net, x, Greedy("y"))
        best = net(x).argmax(-1)
        for row in range(5):
            expected = alone[best[row]]
            torch.testing.assert_close(td["attr", "x"][row], expected["attr", "x"][row])
        return
    td = explained(net, x, target)
    for i in range(4):
        named = isinstance(target, dict)
        found = td["attr", f"t{i}", "x"] if named else td["attr", "x"][:, i]
        gap = td["attr_gap", f"t{i}"] if named else td["attr_gap"][:, i]
        torch.testing.assert_close(found, alone[i]["attr", "x"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gap, alone[i]["attr_gap"], rtol=1e-6, atol=1e-12)


def test_each_key_goes_its_own_way_and_all_go_together():
    x, z = torch.randn(6, 2, dtype=DOUBLE), torch.randn(6, 3, 2, dtype=DOUBLE)
    model = Function(lambda x, z: x.prod(-1) * z.sum((-1, -2)))
    td = TensorDict({"x": x, ("deep", "z"): z}, [6])
    method = IntegratedGradients("y", baselines={"x": 1.0, ("deep", "z"): -0.5})
    with method.prepare(model, ["x", ("deep", "z")], ["y"]) as hooked:
        hooked(td)
    total = td["attr", "x"].sum(-1) + td["attr", "deep", "z"].sum((-1, -2))
    change = model(x, z) - model(torch.ones_like(x), torch.full_like(z, -0.5))
    torch.testing.assert_close(total, change, rtol=1e-10, atol=1e-10)
    with method.replaced(keys=("x",), baselines={"x": 1.0}).prepare(
        model, ["x", ("deep", "z")], ["y"]
    ) as hooked:
        alone = hooked(td.select("x", "deep"))
    change = model(x, z) - model(torch.ones_like(x), z)
    torch.testing.assert_close(alone["attr", "x"].sum(-1), change, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_large_gap_is_warned_about_once_and_says_how_large(scale):
    net = Function(lambda x: scale * torch.sigmoid(1000 * (x.sum(-1) - 0.5)))
    x = torch.ones(4, 1)
    method = IntegratedGradients("y", n_steps=4)
    with method.prepare(net, ["x"], ["y"]) as hooked:
        with pytest.warns(CompletenessWarning, match=r"4 of 4.*n_steps.*'attr_gap'") as caught:
            td = hooked(TensorDict({"x": x}, [4]))
        assert len(caught) == 1 and caught[0].filename == __file__
        with pytest.warns(CompletenessWarning) as caught:
            hooked.observe(TensorDict({"x": x}, [4]))
        assert caught[0].filename == __file__
    torch.testing.assert_close(td["attr_gap"].abs() > 0.1 * scale, torch.ones(4).bool())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained(net, x, n_steps=4)  # gap_tolerance=None
        explained(net, x, n_steps=1000, method="riemann_middle", gap_tolerance=0.1)


def test_a_model_without_a_change_has_no_gap_to_warn_about():
    td = explained(Function(lambda x: x.sum(-1) * 0), torch.randn(4, 2), gap_tolerance=1e-3)
    assert not td["attr_gap"].any()


def test_the_gap_of_named_targets_lies_under_their_names():
    net, x = network().double(), torch.randn(5, 3, dtype=DOUBLE)
    td = explained(net, x, {"a": ("y", 0), "b": Each("y")}, n_steps=2)  # two steps miss something
    change = (net(x) - net(torch.zeros_like(x))).detach()
    for name, wanted in (("a", change[:, 0]), ("b", change)):
        missed = td["attr", name, "x"].sum(-1) - wanted
        torch.testing.assert_close(td["attr_gap", name], missed, rtol=0, atol=1e-10)
        assert (missed.abs() > 1e-8).all()


def test_along_the_path_rules_hold_as_at_the_input():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    none = explained(net, x, rules=lambda name, module: None)
    torch.testing.assert_close(none["attr", "x"], explained(net, x)["attr", "x"])
    last = explained(net, x, n_steps=1, method="riemann_right", rules=lambda name, module: None)
    with LRP(lambda name, module: None, "y").prepare(net, ["x"], ["y"]) as hooked:
        relevance = hooked(TensorDict({"x": x}, [5]))
    torch.testing.assert_close(last["attr", "x"], relevance["attr", "x"])
    model = TensorDictModule(net, ["x"], ["y"])
    with InputXGradient("y").prepare(model) as hooked:
        torch.testing.assert_close(
            last["attr", "x"], hooked(TensorDict({"x": x}, [5]))["attr", "x"]
        )
