"""Methods along paths at submodules: by slow loops over a path, one element after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from pristine import assert_same, snapshot
from tdhook_like import (
    BaselineError,
    Each,
    InputError,
    InputXGradient,
    IntegratedGradients,
    PathError,
)
from tdhook_like.attribution.ablation import FeatureAblation
from tdhook_like.attribution.deeplift import DeepLift
from tdhook_like.attribution.layers import Conductance, InternalInfluence
from tdhook_like.attribution.path import quadrature
from tdhook_like.attribution.shapley import ShapleyValues

DOUBLE = torch.float64


class Net(nn.Module):
    """A layer, a shortcut past it, and a top that multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.top = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.idle = nn.Linear(4, 4)

    def below(self, x: Tensor) -> Tensor:
        return self.middle(torch.tanh(self.first(x)))

    def above(self, h: Tensor, x: Tensor) -> Tensor:
        return self.top(torch.tanh(h) * torch.sigmoid(h.flip(-1)) + self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.below(x), x)


def made() -> tuple[Net, Tensor, Tensor]:
    return Net().double(), torch.randn(5, 3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)


def explained(method: Any, net: nn.Module, x: Tensor, drive: bool = True) -> TensorDict:
    with method.prepare(net, ["x"], ["y"]) as hooked:
        return (hooked if drive else hooked.observe)(TensorDict({"x": x}, x.shape[:1]))


def slope_at(net: Net, h: Tensor, x: Tensor, output: int) -> Tensor:
    h = h.detach().requires_grad_()
    return torch.autograd.grad(net.above(h, x)[output], h)[0]


# --- integrated gradients of what a layer gives ---------------------------------------------------


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
def test_integrated_gradients_at_a_layer_lead_from_its_baseline_to_what_it_gives(drive):
    net, x, base = made()
    method = IntegratedGradients(("y", 1), baselines=base, at="middle", n_steps=20)
    before = snapshot(net)
    td = explained(method, net, x, drive)
    assert_same(before, snapshot(net))
    there = net.below(base).detach()
    for row in range(5):
        here, expected = net.below(x[row]).detach(), torch.zeros(4, dtype=DOUBLE)
        for node, weight in zip(*quadrature("gausslegendre", 20), strict=True):
            # The input itself is held: the shortcut past the layer does not move.
            g = slope_at(net, there + node * (here - there), x[row], 1)
            expected += weight * g * (here - there)
        torch.testing.assert_close(td["attr_at", "middle"][row], expected, rtol=1e-10, atol=1e-12)
    alone = explained(method.replaced(at=()), net, x)
    torch.testing.assert_close(td["attr", "x"], alone["attr", "x"], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(td["attr_gap"], alone["attr_gap"], rtol=1e-6, atol=1e-13)


def test_without_keys_the_gap_is_the_layers():
    net, x, _ = made()
    method = IntegratedGradients(
        ("y", 0), keys=[], baselines={"middle": 0.5}, at="middle", n_steps=40
    )
    td = explained(method, net, x)
    assert set(td.keys()) == {"x", "y", "attr_at", "attr_gap"}
    h = net.below(x).detach()
    change = (net.above(h, x) - net.above(torch.full_like(h, 0.5), x))[:, 0].detach()
    total = td["attr_at", "middle"].sum(-1)
    torch.testing.assert_close(total, change, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(td["attr_gap"], total - change, rtol=0, atol=1e-12)


def test_what_a_model_embeds_its_integers_to_has_a_path_of_its_own():
    net = nn.Sequential(
        nn.Embedding(7, 4), nn.Flatten(-2), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)
    )
    net = net.double()
    td = TensorDict({"words": torch.randint(7, (5, 2))}, [5])
    method = IntegratedGradients(("y", 1), at="0", n_steps=40)
    with method.prepare(net, ["words"], ["y"]) as hooked:
        hooked(td)
    here = net[1:](net[0](td["words"]))[:, 1] - net[1:](torch.zeros(5, 2, 4, dtype=DOUBLE))[:, 1]
    torch.testing.assert_close(
        td["attr_at", "0"].sum((-1, -2)), here.detach(), rtol=1e-8, atol=1e-9
    )


def test_perturbations_change_what_a_layer_gives():
    net, x, base = made()
    td = explained(FeatureAblation(("y", 0), baselines=base, at="middle"), net, x)
    there = net.below(base).detach()
    here = net.below(x).detach()
    whole = net.above(here, x)[:, 0]
    for unit in range(4):
        changed = here.clone()
        changed[:, unit] = there[unit]
        expected = (whole - net.above(changed, x)[:, 0]).detach()
        torch.testing.assert_close(td["attr_at", "middle"][:, unit], expected)
    td = explained(ShapleyValues(("y", 0), baselines=base, at="middle"), net, x)
    change = (whole - net.above(there.expand(5, 4), x)[:, 0]).detach()
    torch.testing.assert_close(td["attr_at", "middle"].sum(-1), change, rtol=1e-9, atol=1e-10)


def test_several_layers_targets_and_calls_are_what_they_are_alone():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.top = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(torch.tanh(self.layer(torch.tanh(self.layer(x)))))

    net, x = Twice().double(), torch.randn(5, 3, dtype=DOUBLE)
    make: list[Callable[..., Any]] = [IntegratedGradients, Conductance, InternalInfluence, DeepLift]
    for method in make:
        both = method({"a": ("y", 0), "b": Each("y")}, baselines=0.3, at=["layer", "top"])
        td = explained(both, net, x)
        one = explained(method(("y", 0), baselines=0.3, at="top"), net, x)
        torch.testing.assert_close(td["attr_at", "a", "top"], one["attr_at", "top"])
        torch.testing.assert_close(td["attr_at", "b", "top"][:, 0], one["attr_at", "top"])
        assert td["attr_at", "b", "layer", "1"].shape == (5, 2, 3)
        if method is not InternalInfluence:
            total = td["attr_at", "a", "top"].sum(-1)
            change = (net(x) - net(torch.full_like(x, 0.3)))[:, 0].detach()
            torch.testing.assert_close(total, change, rtol=1e-6, atol=1e-7)
        if method in (
            Conductance,
            DeepLift,
        ):  # all runs through the second call, and through the first
            for call in "01":
                total = td["attr_at", "a", "layer", call].sum(-1)
                torch.testing.assert_close(total, change, rtol=1e-4, atol=1e-5)


def test_an_activation_that_overwrites_what_a_layer_gave_changes_nothing():
    torch.manual_seed(0)
    layers = nn.Linear(3, 6), nn.Linear(6, 2)
    nets = [
        nn.Sequential(layers[0], nn.ReLU(inplace), layers[1]).double() for inplace in (True, False)
    ]
    x = torch.randn(5, 3, dtype=DOUBLE)
    make: list[Callable[..., Any]] = [
        IntegratedGradients, Conductance, InternalInfluence, DeepLift, FeatureAblation, InputXGradient
    ]  # fmt: skip
    for method in make:
        over, apart = (explained(method(("y", 0), at="0"), net, x)["attr_at", "0"] for net in nets)
        torch.testing.assert_close(over, apart, rtol=1e-12, atol=1e-12)
        assert over.any()


# --- along the inputs' path -----------------------------------------------------------------------


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("rows", [None, 5, 35])
def test_conductance_is_that_of_a_slow_loop(rows, drive):
    net, x, base = made()
    method = Conductance(
        ("y", 1), baselines=base, at=["first", "middle"], n_steps=7, internal_batch_size=rows,
        gap_tolerance=None,
    )  # fmt: skip
    before = snapshot(net)
    td = explained(method, net, x, drive)
    assert_same(before, snapshot(net))
    for row in range(5):
        points = [base + k / 7 * (x[row] - base) for k in range(8)]
        h = [net.below(p).detach() for p in points]
        g = [slope_at(net, a, p, 1) for a, p in zip(h, points, strict=True)]
        expected = sum((g[k] + g[k + 1]) / 2 * (h[k + 1] - h[k]) for k in range(7))
        torch.testing.assert_close(td["attr_at", "middle"][row], expected, rtol=1e-10, atol=1e-12)
    change = (net(x) - net(base))[:, 1].detach()
    torch.testing.assert_close(td["attr_gap"], td["attr", "x"].sum(-1) - change, rtol=0, atol=1e-12)


def test_conductance_shares_the_change_among_units_that_everything_runs_through():
    net, x, base = made()
    method = Conductance(("y", 0), baselines=base, at="first", n_steps=400)
    td = explained(method, net, x)
    change = (net(x) - net(base))[:, 0].detach()
    # The layer is called twice, and both calls together are all that the output sees.
    total = td["attr_at", "first", "0"].sum(-1) + td["attr_at", "first", "1"].sum(-1)
    torch.testing.assert_close(total, change, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(td["attr", "x"].sum(-1), change, rtol=1e-4, atol=1e-5)


def test_conductance_is_exact_where_the_score_is_quadratic_in_the_units():
    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units = nn.Sequential(nn.Linear(3, 4), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.units(x).square().sum(-1)

    net, x = Quadratic().double(), torch.randn(5, 3, dtype=DOUBLE)
    td = explained(Conductance("y", at="units", n_steps=1, gap_tolerance=None), net, x)
    here, there = net.units(x).detach(), net.units(torch.zeros(3, dtype=DOUBLE)).detach()
    torch.testing.assert_close(td["attr_at", "units"], here**2 - there**2)


@pytest.mark.parametrize("rows", [None, 5, 20])
def test_internal_influence_is_the_mean_gradient_on_the_way(rows):
    net, x, base = made()
    method = InternalInfluence(
        ("y", 1), baselines=base, at="middle", n_steps=9, internal_batch_size=rows
    )
    td = explained(method, net, x)
    with_inputs = explained(IntegratedGradients(("y", 1), baselines=base, n_steps=9), net, x)
    torch.testing.assert_close(td["attr", "x"] * (x - base), with_inputs["attr", "x"])
    for row in range(5):
        expected = torch.zeros(4, dtype=DOUBLE)
        for node, weight in zip(*quadrature("gausslegendre", 9), strict=True):
            point = base + node * (x[row] - base)
            expected += weight * slope_at(net, net.below(point), point, 1)
        torch.testing.assert_close(td["attr_at", "middle"][row], expected, rtol=1e-10, atol=1e-12)
    assert set(td.keys()) == {"x", "y", "attr", "attr_at"}


METHODS: dict[str, Callable[..., Any]] = {
    "integrated gradients": IntegratedGradients,
    "conductance": Conductance,
    "internal influence": InternalInfluence,
    "deeplift": DeepLift,
}


@pytest.mark.parametrize("name", METHODS)
def test_leaving_the_keys_out_changes_nothing_at_submodules(name):
    net, x, base = made()
    both, alone = (
        explained(METHODS[name](("y", 0), baselines={"x": base}, at="middle", **options), net, x)
        for options in ({}, {"keys": []})
    )
    assert set(alone.keys()) - {"attr_gap"} == {"x", "y", "attr_at"}
    torch.testing.assert_close(alone["attr_at", "middle"], both["attr_at", "middle"])


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_number_of_batch_dimensions_will_do(name, batch):
    net, x = Net().double(), torch.randn(*batch, 3, dtype=DOUBLE)
    method = METHODS[name](("y", 0), baselines=0.2, at="middle")
    with method.prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, batch))
    flat = explained(method, net, x.reshape(-1, 3))
    at = td["attr_at", "middle"]
    assert at.shape == (*batch, 4)
    torch.testing.assert_close(at.reshape(-1, 4), flat["attr_at", "middle"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_convolutions_that_take_one_batch_dimension_are_stacked_all_the_same(name):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2)).double()
    x = torch.randn(4, 1, 5, 5, dtype=DOUBLE)
    td = explained(METHODS[name](("y", 0), at="0"), net, x)
    for row in range(4):
        alone = explained(METHODS[name](("y", 0), at="0"), net, x[row : row + 1])
        torch.testing.assert_close(
            td["attr_at", "0"][row], alone["attr_at", "0"][0], rtol=1e-10, atol=1e-12
        )
    if name != "internal influence":
        change = (net(x) - net(torch.zeros_like(x)))[:, 0].detach()
        torch.testing.assert_close(td["attr_at", "0"].sum((1, 2, 3)), change, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("observed", [False, True], ids=["driven", "observed"])
@pytest.mark.parametrize("name", METHODS)
def test_stacked_agents_are_attributed_to_each_at_its_place(name, observed):
    from torchrl.modules import MultiAgentMLP

    agents = MultiAgentMLP(
        4, 2, 3, centralized=False, share_params=False, depth=1, num_cells=5
    ).double()
    model = TensorDictModule(agents, [("agents", "obs")], [("agents", "q")])
    x = torch.randn(6, 3, 4, dtype=DOUBLE)
    td = TensorDict({"agents": TensorDict({"obs": x}, [6, 3])}, [6])
    method = METHODS[name](("agents", "q", 1, 0), at="module._empty_net.0", baselines=0.1)
    with method.prepare(model) as hooked:
        hooked.observe(td) if observed else hooked(td)
    at = td["attr_at", "module._empty_net.0"]
    assert at.shape == (6, 3, 5)
    assert not at[:, [0, 2]].any() and at[:, 1].any()
    if name != "internal influence":
        change = (agents(x) - agents(torch.full_like(x, 0.1)))[:, 1, 0].detach()
        torch.testing.assert_close(at[:, 1].sum(-1), change, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_explained_is_refused(name):
    net, x, _ = made()
    with pytest.raises(PathError, match="'idle' was never called"):
        explained(METHODS[name](("y", 0), at="idle"), net, x)
    if name in ("conductance", "internal influence"):
        with pytest.raises(InputError, match="n_steps"):
            METHODS[name]("y", n_steps=0)


def test_a_baseline_at_a_path_that_is_not_explained_is_refused():
    with pytest.raises(BaselineError, match="'top'"):
        IntegratedGradients(("y", 0), at="middle", baselines={"top": 1.0}).prepare(
            Net(), ["x"], ["y"]
        )
