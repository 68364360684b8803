"""DeepLift against multipliers that are carried back by hand, and the sums that it promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from method_references import Formula
from pristine import assert_same, snapshot
from tdhook_like import (
    LRP,
    BaselineError,
    CompletenessWarning,
    ContextError,
    Each,
    FromBuffer,
    Greedy,
    IntegratedGradients,
    LogProb,
    TargetError,
    UnhandledOperationWarning,
)
from tdhook_like.attribution.deeplift import DeepLift, DeepLiftShap
from tdhook_like.attribution.lrp import EpsilonRule

DOUBLE = torch.float64
STRICT = {"gap_tolerance": 1e-9, "unhandled": "raise"}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def explained(
    net: nn.Module,
    x: Tensor,
    target: Any = "y",
    *,
    batch_dims: int = 1,
    drive: bool = True,
    **options: Any,
) -> TensorDict:
    method = DeepLift(target, **{**STRICT, **options})
    td = TensorDict({"x": x}, x.shape[:batch_dims])
    with method.prepare(net, ["x"], ["y"]) as hooked:
        return (hooked if drive else hooked.observe)(td)


# --- multipliers by hand --------------------------------------------------------------------------


def slope(layer: nn.Module, x: float) -> float:
    h = 1e-6
    ends = layer(torch.tensor([x - h, x + h], dtype=DOUBLE))
    return float((ends[1] - ends[0]) / (2 * h))


def multipliers(layers: nn.Sequential, x: Tensor, x0: Tensor, output: int) -> Tensor:
    """Shrikumar et al. 2017, eq. 3 and section 3.4: of one element, unit by unit, from the top down."""
    with torch.no_grad():
        values, past = [x], [x0]
        for layer in layers:
            values.append(layer(values[-1]))
            past.append(layer(past[-1]))
        m = torch.zeros_like(values[-1])
        m[output] = 1.0
        steps = list(zip(layers, values, values[1:], past, past[1:], strict=False))
        for layer, a, y, a0, y0 in reversed(steps):
            below = torch.zeros_like(a)
            for i in range(len(a)):
                if isinstance(layer, nn.Linear):
                    below[i] = sum(m[j] * layer.weight[j, i] for j in range(len(y)))
                elif a[i] == a0[i]:
                    below[i] = m[i] * slope(layer, float(a[i]))
                else:
                    below[i] = m[i] * (y[i] - y0[i]) / (a[i] - a0[i])
            m = below
    return m


ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.LeakyReLU]
ACTIVATIONS += [nn.Hardtanh, nn.Mish, nn.Softsign, nn.Hardswish, nn.SELU, nn.LogSigmoid, nn.PReLU]


def stack(activation: Callable[[], nn.Module]) -> nn.Sequential:
    layers = [nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_multipliers_are_those_by_hand(activation, drive):
    net, x, base = stack(activation), rand(5, 4), rand(4)
    before = snapshot(net)
    td = explained(net, x, ("y", 2), baselines=base, drive=drive)
    assert_same(before, snapshot(net))
    alone = explained(net, x, ("y", 2), baselines=base, multiply_by_inputs=False)
    for row in range(5):
        m = multipliers(net, x[row], base, 2)
        torch.testing.assert_close(td["attr", "x"][row], m * (x[row] - base), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(alone["attr", "x"][row], m, rtol=1e-9, atol=1e-10)
    change = (net(x) - net(base))[:, 2].detach()
    torch.testing.assert_close(td["attr", "x"].sum(-1), change, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(td["attr_gap"], td["attr", "x"].sum(-1) - change, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.Softplus])
def test_where_nothing_changes_the_multiplier_is_the_slope(activation):
    net, x = stack(activation), rand(4, 4)
    td = explained(net, x, ("y", 0), baselines=x, multiply_by_inputs=False, gap_tolerance=None)
    x = x.requires_grad_()
    expected = torch.autograd.grad(net(x)[:, 0].sum(), x)[0]
    torch.testing.assert_close(td["attr", "x"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_rectifiers_multiplier_is_the_share_of_the_way_that_lies_above_zero(dtype):
    x = torch.tensor([[4.0, -4.0, 3.0, -1.0, 1.0, 2.0, -2.0, 0.0, 0.0, 1e-7]], dtype=dtype)
    base = torch.tensor([2.0, -2.0, -1.0, 3.0, 0.0, 2.0, -2.0, 0.0, -3.0, -1.0], dtype=dtype)
    expected = torch.tensor([[1.0, 0.0, 0.75, 0.75, 1.0, 1.0, 0.0, 0.0, 0.0, 1e-7]], dtype=dtype)
    net = Formula(lambda x: F.relu(x).sum(-1))
    options: dict[str, Any] = {"baselines": base, "gap_tolerance": None}
    td = explained(net, x, multiply_by_inputs=False, **options)
    torch.testing.assert_close(td["attr", "x"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tiny", [1e-17, 1e-12, 1e-9, 1e-8, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("function", [torch.sigmoid, F.gelu, F.softplus, torch.exp])
def test_small_differences_lose_no_digits_that_matter(function, tiny):
    w = torch.tensor([1.0, -1.0], dtype=DOUBLE)  # large changes that nearly cancel
    x = torch.tensor([[3.0, 3.0 - tiny]], dtype=DOUBLE)
    net = Formula(lambda x: function(0.3 + x @ w))
    td = explained(net, x, multiply_by_inputs=False, gap_tolerance=0.01)
    at = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    expected = torch.autograd.grad(function(at), at)[0] * w
    torch.testing.assert_close(td["attr", "x"][0], expected, rtol=1e-6 + tiny, atol=0)


def test_of_one_number_it_is_integrated_gradients():
    x, base = rand(6, 3), rand(3)
    for function in (torch.sin, torch.exp, torch.tanh, lambda t: t**3, F.softplus):
        net = Formula(lambda x, f=function: f(x).sum(-1))
        td = explained(net, x, baselines=base)
        torch.testing.assert_close(td["attr", "x"], function(x) - function(base))
        with IntegratedGradients("y", baselines=base).prepare(net, ["x"], ["y"]) as hooked:
            other = hooked(TensorDict({"x": x}, [6]))
        torch.testing.assert_close(td["attr", "x"], other["attr", "x"], rtol=1e-7, atol=1e-9)


def test_of_a_product_of_n_inputs_it_is_their_shapley_value():
    # Both share a product evenly over the orders of changing operands, if there are two or three.
    x, b = rand(6, 2), rand(2)
    td = explained(Formula(lambda x: x[..., 0] * x[..., 1]), x, baselines=b)
    expected = torch.stack(
        [(x[:, 0] - b[0]) * (x[:, 1] + b[1]), (x[:, 1] - b[1]) * (x[:, 0] + b[0])], -1
    )
    torch.testing.assert_close(td["attr", "x"], expected / 2)
    x, b = rand(6, 3), rand(3)
    net = Formula(
        lambda x: torch.einsum("bi,bi,bi->b", *(x[..., i : i + 1].reshape(-1, 1) for i in range(3)))
    )
    td = explained(net, x, baselines=b)
    for i, j, k in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        # The integral of (b_j + t d_j)(b_k + t d_k) over t.
        d = x - b
        mean = b[j] * b[k] + (b[j] * d[:, k] + b[k] * d[:, j]) / 2 + d[:, j] * d[:, k] / 3
        torch.testing.assert_close(td["attr", "x"][:, i], d[:, i] * mean)


@pytest.mark.parametrize("bias", [False, True])
def test_of_relu_networks_without_bias_and_with_a_zero_baseline_it_is_lrp_zero(bias):
    layers = [
        nn.Linear(3, 9, bias),
        nn.ReLU(),
        nn.Linear(9, 7, bias),
        nn.ReLU(),
        nn.Linear(7, 2, bias),
    ]
    net, x = nn.Sequential(*layers).double(), rand(8, 3)
    td = explained(net, x, ("y", 1))
    rule = EpsilonRule(1e-14)
    mapper = lambda name, module: rule if isinstance(module, nn.Linear) else None  # noqa: E731
    with LRP(mapper, ("y", 1)).prepare(net, ["x"], ["y"]) as hooked:
        relevance = hooked(TensorDict({"x": x}, [8]))["attr", "x"]
    assert torch.allclose(td["attr", "x"], relevance, rtol=1e-8, atol=1e-10) is not bias


# --- sums -----------------------------------------------------------------------------------------


class Body(nn.Module):
    """A layer, something between, a layer."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm, self.act = nn.LayerNorm(6), nn.ReLU(inplace=True)
        self.lstm, self.gru = nn.LSTM(6, 6, 2, batch_first=True), nn.GRU(6, 3, bidirectional=True)
        self.rnn, self.cell = nn.RNN(6, 6, nonlinearity="relu"), nn.LSTMCell(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def tokens(h: Tensor) -> Tensor:
    return torch.stack([h, h.sin(), 2 * h], -2)


def in_place(net: Any, h: Tensor) -> Tensor:
    h = F.relu(h, inplace=True)
    h *= 2
    h += h.flip(-1).tanh_()
    h[..., 0] = h[..., 1] * h[..., 2]
    return h.relu_().add_(1)


def group_normed(h: Tensor) -> Tensor:
    return F.group_norm(h.reshape(-1, 2, 3), 2, torch.ones(2).double(), None).reshape(h.shape)


BETWEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a residual": lambda net, h: h + F.relu(net.again(F.relu(net.again(h)))),
    "a module used twice": lambda net, h: net.act(net.again(net.act(net.again(h)))),
    "in place": in_place,
    "a layer norm": lambda net, h: net.norm(h) * h.tanh(),
    "a group norm": lambda net, h: group_normed(h),
    "an instance norm": lambda net, h: F.instance_norm(h.reshape(-1, 2, 3)).reshape(h.shape),
    "normalised": lambda net, h: F.normalize(h, dim=-1),
    "standardised": lambda net, h: (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True),
    "a variance": lambda net, h: h * h.var(-1, keepdim=True),
    "powers": lambda net, h: h**3 + h.abs() ** 0.5 + 1 / (1 + h**2) + h.square(),
    "a matrix product": lambda net, h: (
        (h.unsqueeze(-1) @ h.sin().unsqueeze(-2)) @ torch.ones(6).double()
    ),
    "weights from the input": lambda net, h: (
        F.linear(h, h.cos().mean(0, keepdim=True)) * h if h.ndim == 1 else h * h.cos()
    ),
    "clamps": lambda net, h: h.clamp(-0.3, 0.5) + F.hardtanh(h) + F.relu6(h) + F.leaky_relu(h),
    "attention": lambda net, h: net.attention(*[tokens(h)] * 3)[0].sum(-2),
    "attention that is functional": lambda net, h: F.scaled_dot_product_attention(
        tokens(h), tokens(h.cos()), tokens(h), is_causal=True
    ).mean(-2),
    "a transformer layer": lambda net, h: net.encoder(tokens(h))[..., 1, :],
    "an LSTM": lambda net, h: net.lstm(tokens(h))[0][..., -1, :],
    "a GRU": lambda net, h: net.gru(tokens(h).transpose(0, 1))[0][-1],
    "a plain recurrent net": lambda net, h: net.rnn(tokens(h).transpose(0, 1))[1][0],
    "an LSTM cell": lambda net, h: net.cell(h, net.cell(h.tanh()))[0],
    "pooling": lambda net, h: F.max_pool1d(F.relu(tokens(h)), 2, 1, 1)[..., 1, :6],
    "adaptive pooling": lambda net, h: F.adaptive_max_pool1d(tokens(h), 6)[..., 0, :],
    "a minimum": lambda net, h: torch.minimum(h, h.flip(-1)) - torch.min(h, -1, keepdim=True)[0],
    "checks of values": lambda net, h: h.tanh() if bool((h.detach().abs() < 1e9).all()) else h,
}


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("name", BETWEEN)
def test_attributions_sum_to_the_change_of_the_score(name, drive):
    net, x, base = Body(BETWEEN[name]).double().eval(), rand(7, 6) * 2, rand(6)
    before = snapshot(net)
    td = explained(net, x, ("y", 1), baselines=base, drive=drive)
    assert_same(before, snapshot(net))
    change = (net(x.clone()) - net(base.expand(7, 6).clone()))[:, 1].detach()
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(td["attr", "x"].sum(-1), change, rtol=1e-10, atol=1e-10)
    if drive:
        torch.testing.assert_close(td["y"], net(x.clone()).detach(), rtol=0, atol=0)


class Spelled(nn.Module):
    def __init__(self, modules: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.steps = nn.Sequential(nn.GELU(), nn.LayerNorm(6), nn.Softmax(-1)) if modules else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.steps is not None:
            return self.second(self.steps(h))
        return self.second(F.layer_norm(F.gelu(h), (6,)).softmax(-1))


def test_modules_and_functions_are_treated_alike():
    torch.manual_seed(0)
    one = Spelled(True).double()
    other = Spelled(False).double()
    other.load_state_dict(one.state_dict(), strict=False)
    x = rand(5, 4)
    found = [explained(net, x, ("y", 0), baselines=0.3)["attr", "x"] for net in (one, other)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 3, 2), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 2)),
    ).double()


def test_convolutions_batch_norm_and_pooling_keep_the_difference():
    net, x, base = convolutional(), rand(5, 2, 8, 8), rand(2, 8, 8)
    net(rand(30, 2, 8, 8))
    for drive, mode in ((True, False), (False, True)):
        net.train(mode)
        before = snapshot(net)
        td = explained(net, x, ("y", 1), baselines=base, drive=drive)
        assert_same(before, snapshot(net))
        net.eval()
        change = (net(x) - net(base.unsqueeze(0)))[:, 1].detach()
        torch.testing.assert_close(td["attr", "x"].sum((1, 2, 3)), change, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("batch", [(), (1,), (5,), (3, 4), (2, 3, 2)], ids=str)
def test_every_number_of_batch_dimensions_will_do(batch):
    net, x, base = stack(nn.Tanh), rand(*batch, 4), rand(4)
    td = explained(net, x, ("y", 0), batch_dims=len(batch), baselines=base)
    flat = explained(net, x.reshape(-1, 4), ("y", 0), baselines=base)
    torch.testing.assert_close(
        td["attr", "x"].reshape(-1, 4), flat["attr", "x"], rtol=1e-11, atol=1e-13
    )
    assert td["attr_gap"].shape == batch


@pytest.mark.parametrize(
    "alike", [True, False], ids=["one baseline", "a baseline for each element"]
)
def test_elements_are_explained_apart_whatever_baselines_they_have(alike):
    net, x = stack(nn.ReLU), rand(6, 4)
    base = rand(4).expand(6, 4) if alike else rand(6, 4)
    td = explained(net, x, ("y", 1), baselines=base)
    for row in range(6):
        alone = explained(net, x[row : row + 1], ("y", 1), baselines=base[row])
        torch.testing.assert_close(
            td["attr", "x"][row], alone["attr", "x"][0], rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize("target", [Each("y"), {f"t{i}": ("y", i) for i in range(3)}, "greedy"])
def test_several_targets_are_what_they_are_one_at_a_time(target):
    net, x = stack(nn.GELU), rand(5, 4)
    alone = [explained(net, x, ("y", i), baselines=0.5) for i in range(3)]
    td = explained(net, x, Greedy("y") if target == "greedy" else target, baselines=0.5)
    best = net(x).argmax(-1)
    for i in range(3):
        if target == "greedy":
            rows = best == i
            torch.testing.assert_close(td["attr", "x"][rows], alone[i]["attr", "x"][rows])
            continue
        named = isinstance(target, dict)
        found = td["attr", f"t{i}", "x"] if named else td["attr", "x"][:, i]
        torch.testing.assert_close(found, alone[i]["attr", "x"], rtol=1e-10, atol=1e-12)


def test_all_keys_together_make_the_change_and_those_left_out_are_held():
    x, z = rand(6, 2), rand(6, 3, 2)
    model = Formula(lambda x, z: torch.tanh(x[..., 0]) * x[..., 1] * z.sigmoid().sum((-1, -2)))
    method = DeepLift("y", baselines={"x": 1.0, ("deep", "z"): -0.5}, **STRICT)
    td = TensorDict({"x": x, "deep": {"z": z}, "n": torch.arange(6)}, [6])
    with method.prepare(model, ["x", ("deep", "z")], ["y"]) as hooked:
        hooked(td)
    change = model(x, z) - model(torch.ones_like(x), torch.full_like(z, -0.5))
    total = td["attr", "x"].sum(-1) + td["attr", "deep", "z"].sum((-1, -2))
    torch.testing.assert_close(total, change, rtol=1e-10, atol=1e-11)
    with method.replaced(keys=("x",), baselines=1.0).prepare(
        model, ["x", ("deep", "z")], ["y"]
    ) as hooked:
        alone = hooked(td.select("x", "deep"))
    change = model(x, z) - model(torch.ones_like(x), z)
    torch.testing.assert_close(alone["attr", "x"].sum(-1), change, rtol=1e-10, atol=1e-11)


def test_functions_of_the_target_take_part():
    net, x = stack(nn.Tanh), rand(5, 4)
    targets = {
        "log": lambda td: td["y"].log_softmax(-1)[..., 0],
        "ratio": lambda td: td["y"][..., 0].exp() / td["y"].exp().sum(-1),
    }
    td = explained(net, x, targets, baselines=0.2)
    y, y0 = net(x).detach(), net(torch.full((4,), 0.2, dtype=DOUBLE)).detach()
    change = (y.log_softmax(-1) - y0.log_softmax(-1))[:, 0]
    torch.testing.assert_close(td["attr", "log", "x"].sum(-1), change, rtol=1e-10, atol=1e-11)
    change = (y.softmax(-1) - y0.softmax(-1))[:, 0]
    torch.testing.assert_close(td["attr", "ratio", "x"].sum(-1), change, rtol=1e-10, atol=1e-11)


def test_single_precision_is_double_precision_rounded():
    net, x, base = stack(nn.GELU), rand(50, 4), rand(4)
    exact = explained(net, x, ("y", 0), baselines=base)["attr", "x"]
    td = explained(net.float(), x.float(), ("y", 0), baselines=base.float(), gap_tolerance=1e-3)
    assert (td["attr", "x"] - exact).abs().max() < 2e-5 * exact.abs().max()


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(ACTIVATIONS), st.floats(-3, 3))
def test_exchanging_input_and_baseline_changes_the_sign(seed, activation, value):
    torch.manual_seed(seed)
    net, x = stack(activation), rand(3, 4)
    base = torch.full((3, 4), value, dtype=DOUBLE)
    there = explained(net, x, ("y", 0), baselines=base)["attr", "x"]
    back = explained(net, base, ("y", 0), baselines=x)["attr", "x"]
    torch.testing.assert_close(there, -back, rtol=1e-7, atol=1e-9)


# --- at submodules --------------------------------------------------------------------------------


def test_at_every_layer_the_difference_is_kept_and_shared_by_its_multiplier():
    net, x, base = stack(nn.Tanh), rand(6, 4), rand(4)
    td = explained(net, x, ("y", 1), baselines=base, at="?", activations="?")
    change = (net(x) - net(base))[:, 1].detach()
    for i in range(5):
        path = str(i)
        torch.testing.assert_close(td["attr_at", path].sum(-1), change, rtol=1e-10, atol=1e-12)
        below, there = net[: i + 1](x).detach(), net[: i + 1](base).detach()
        for row in range(6):
            rest = net[i + 1 :]
            m = (
                multipliers(rest, below[row], there, 1)
                if len(rest)
                else F.one_hot(torch.tensor(1), 3)
            )
            expected = m * (below[row] - there)
            torch.testing.assert_close(td["attr_at", path][row], expected, rtol=1e-9, atol=1e-11)


def test_what_runs_beside_each_other_adds_up():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.top = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(torch.tanh(self.left(x)) * self.right(x))

    net, x = Branches().double(), rand(5, 4)
    td = explained(net, x, "y", baselines=0.4, at=["left", "right"])
    total = td["attr_at", "left"].sum(-1) + td["attr_at", "right"].sum(-1)
    torch.testing.assert_close(total, td["attr", "x"].sum(-1), rtol=1e-10, atol=1e-12)


# --- many baselines -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, 1, 12])
def test_deeplift_shap_is_the_mean_over_baselines_with_its_standard_error(rows):
    net, x, several = stack(nn.Sigmoid), rand(5, 4), rand(7, 4)
    each = torch.stack([explained(net, x, ("y", 0), baselines=b)["attr", "x"] for b in several])
    method = DeepLiftShap(("y", 0), baselines=several, internal_batch_size=rows, **STRICT)
    with method.prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, [5]))
    torch.testing.assert_close(td["attr", "x"], each.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        td["attr_error", "x"], each.std(0) / math.sqrt(7), rtol=1e-8, atol=1e-12
    )
    change = (net(x) - net(several).mean(0))[:, 0].detach()
    torch.testing.assert_close(td["attr", "x"].sum(-1), change, rtol=1e-9, atol=1e-11)


class Buffer:
    """Rows of a known kind."""

    def sample(self, n: int) -> TensorDict:
        return TensorDict({"x": torch.randn(n, 4, dtype=DOUBLE) + 5.0}, [n])


def test_baselines_drawn_from_a_buffer_are_others_for_every_element_and_draw():
    net, x = nn.Linear(4, 1).double(), rand(300, 4)
    method = DeepLiftShap("y", baselines=FromBuffer(Buffer()), n_samples=20, **STRICT)
    state = torch.get_rng_state()
    with method.prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, [300]))
    assert torch.equal(torch.get_rng_state(), state)
    off = (td["attr", "x"] - (x - 5.0) * net.weight.detach()) / td["attr_error", "x"]
    assert 0.9 < off.std() < 1.2 and off.mean().abs() < 0.15


def test_all_keys_need_as_many_baselines():
    with pytest.raises(BaselineError, match="2, 3"):
        DeepLiftShap("y", baselines={"x": rand(3, 4), "z": rand(2, 4)})


# --- honesty --------------------------------------------------------------------------------------


def test_a_function_without_a_rule_is_named_and_its_gap_is_written():
    net = Formula(lambda x: x.sort(-1).values[..., 0] * x.prod(-1))
    x = rand(6, 3)
    with (
        pytest.warns(UnhandledOperationWarning, match=r"prod\(\)"),
        pytest.warns(CompletenessWarning),
    ):
        td = explained(net, x, baselines=rand(3), unhandled="warn", gap_tolerance=0.01)
    assert td["attr_gap"].abs().max() > 1e-3


def test_a_model_that_takes_another_path_at_the_baseline_is_refused():
    net = Formula(
        lambda x: x.tanh().sum(-1) if float(x.detach().sum()) > 0 else x.sigmoid().sum(-1)
    )
    with pytest.raises(BaselineError, match=r"tanh\(\).*sigmoid\(\)|sigmoid\(\).*tanh\(\)"):
        explained(net, torch.ones(1, 3, dtype=DOUBLE), baselines=-1.0)


@pytest.mark.parametrize(("at", "end"), [(0.0, "baseline"), (1.0, "input")])
def test_a_score_that_is_infinite_at_an_end_is_refused(at, end):
    net = Formula(lambda x: (x - at).abs().log().sum(-1))
    with pytest.raises(TargetError, match=f"NaN or Inf at the {end}"):
        explained(net, torch.ones(2, 3, dtype=DOUBLE), baselines=0.0 if at == 0.0 else 2.0)


def test_rules_are_refused():
    with pytest.raises(ContextError, match="rules of its own"):
        DeepLift("y", rules=lambda name, module: None)


# --- torchrl --------------------------------------------------------------------------------------


def test_policies_of_torchrl_are_explained():
    from torchrl.modules import MLP, MultiAgentMLP, OneHotCategorical, ProbabilisticActor

    net = MLP(in_features=4, out_features=3, num_cells=[8, 8], activation_class=nn.Tanh).double()
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )
    td = TensorDict({"observation": rand(6, 4)}, [6])
    with DeepLift(LogProb(), **STRICT).prepare(actor) as hooked:
        hooked(td)
    logits, at_zero = net(td["observation"]), net(torch.zeros(4, dtype=DOUBLE))
    action = td["action"].argmax(-1, keepdim=True)
    change = (
        (logits.log_softmax(-1) - at_zero.log_softmax(-1)).gather(-1, action).squeeze(-1).detach()
    )
    torch.testing.assert_close(td["attr", "observation"].sum(-1), change, rtol=1e-10, atol=1e-11)

    agents = MultiAgentMLP(
        4, 2, 3, centralized=False, share_params=False, depth=1, num_cells=5
    ).double()
    model = TensorDictModule(agents, [("agents", "obs")], [("agents", "q")])
    td = TensorDict({"agents": TensorDict({"obs": rand(6, 3, 4)}, [6, 3])}, [6])
    base = torch.full((6, 3, 4), 0.3, dtype=DOUBLE)
    target = ("agents", "q", 1, 0)
    method = DeepLift(target, baselines=0.3, at="module._empty_net.1", **STRICT)
    with method.prepare(model) as hooked:
        hooked(td)
    relevance = td["attr", "agents", "obs"]
    change = (agents(td["agents", "obs"]) - agents(base))[:, 1, 0].detach()
    torch.testing.assert_close(relevance[:, 1].sum(-1), change, rtol=1e-10, atol=1e-11)
    assert not relevance[:, [0, 2]].any()
    at = td["attr_at", "module._empty_net.1"]
    assert at.shape == (6, 3, 5) and not at[:, [0, 2]].any()
    torch.testing.assert_close(at[:, 1].sum(-1), change, rtol=1e-10, atol=1e-11)


def test_a_sequence_of_modules_is_explained_to_any_of_its_outputs():
    policy = TensorDictSequential(
        TensorDictModule(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), ["x"], [("hidden", "h")]),
        TensorDictModule(nn.Sequential(nn.Linear(4, 2), nn.Tanh()), [("hidden", "h")], ["y"]),
    ).double()
    td = TensorDict({"x": rand(2, 5, 3)}, [2, 5])
    targets = {"h": ("hidden", "h", 2), "y": ("y", 0)}
    with DeepLift(targets, baselines=1.0, **STRICT).prepare(policy) as hooked:
        hooked(td)
    past = policy(TensorDict({"x": torch.ones(3, dtype=DOUBLE)}, []))
    for name, here, there in (
        ("h", td["hidden", "h"][..., 2], past["hidden", "h"][2]),
        ("y", td["y"][..., 0], past["y"][0]),
    ):
        torch.testing.assert_close(td["attr", name, "x"].sum(-1), (here - there).detach())
