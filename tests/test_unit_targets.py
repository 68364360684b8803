"""Neurons and channels as targets: what any method attributes to them, against models cut there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from pristine import assert_same, bits, snapshot
from tdhook_like import (
    LRP,
    AtStep,
    Each,
    InputXGradient,
    IntegratedGradients,
    PathError,
    Saliency,
    TargetError,
)
from tdhook_like.attribution.ablation import FeatureAblation
from tdhook_like.attribution.deeplift import DeepLift
from tdhook_like.attribution.lrp import EpsilonPlus, GammaRule, Rule
from tdhook_like.targets.units import Channel, Unit

DOUBLE = torch.float64
METHODS: dict[str, Any] = {
    "saliency": lambda t: Saliency(t, abs=False),
    "input x gradient": InputXGradient,
    "integrated gradients": lambda t: IntegratedGradients(t, n_steps=9, gap_tolerance=None),
    "deeplift": lambda t: DeepLift(t, baselines=0.5),
    "ablation": FeatureAblation,
    "lrp": lambda t: LRP(EpsilonPlus(), t),
    "lrp with gamma": lambda t: LRP(EpsilonPlus(rule_mapper=gamma), t),
    "integrated gradients under rules": lambda t: IntegratedGradients(
        t, n_steps=9, gap_tolerance=None, rules=EpsilonPlus(rule_mapper=gamma)
    ),
}


def gamma(name: str, module: nn.Module) -> Rule | None:
    return GammaRule(0.5) if isinstance(module, nn.Linear) else None


def network() -> nn.Sequential:
    layers = [nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)]
    return nn.Sequential(*layers).double()


def explained(method: Any, net: nn.Module, x: Tensor, drive: bool = True) -> TensorDict:
    with method.prepare(net, ["x"], ["y"]) as hooked:
        return (hooked if drive else hooked.observe)(TensorDict({"x": x}, [len(x)]))


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("name", METHODS)
def test_a_neuron_is_explained_as_the_output_of_a_model_that_ends_there(name, depth, drive):
    net, x = network(), torch.randn(6, 3, dtype=DOUBLE)
    before = snapshot(net)
    td = explained(METHODS[name](Unit(str(depth - 1), 2)), net, x, drive)
    assert_same(before, snapshot(net))
    cut = explained(METHODS[name](("y", 2)), net[:depth], x)
    torch.testing.assert_close(td["attr", "x"], cut["attr", "x"], rtol=1e-10, atol=1e-12)
    keys = {
        "x",
        "attr",
        *(["y"] if drive else []),
        *(["attr_gap"] if cut.get("attr_gap", None) is not None else []),
    }
    assert set(td.keys()) == keys
    if drive:
        assert bits(td["y"]) == bits(net(x).detach())


@pytest.mark.parametrize("name", METHODS)
def test_several_units_and_outputs_come_from_one_call(name):
    net, x = network(), torch.randn(6, 3, dtype=DOUBLE)
    targets = {
        "unit": Unit("0", 1),
        "contrast": Unit("2", 1) - Unit("2", 0),
        "entry": Unit("2")[3],
        "each": Each(Unit("1")),
        "output": ("y", 1),
    }
    td = explained(METHODS[name](targets), net, x)
    for named, target in targets.items():
        alone = explained(METHODS[name](target), net, x)
        torch.testing.assert_close(
            td["attr", named, "x"], alone["attr", "x"], rtol=1e-10, atol=1e-12
        )
    assert td["attr", "each", "x"].shape == (6, 6, 3)


def test_attributions_lead_from_one_submodule_to_another():
    net, x = network(), torch.randn(6, 3, dtype=DOUBLE)
    td = explained(InputXGradient(Unit("2", 4), at="0"), net, x)
    h = net[0](x).detach().requires_grad_()
    g = torch.autograd.grad(net[2](torch.tanh(h))[:, 4].sum(), h)[0]
    torch.testing.assert_close(td["attr_at", "0"], g * h.detach())
    td = explained(DeepLift(Unit("2", 4), at="0"), net, x)
    change = (net[:3](x) - net[:3](torch.zeros_like(x)))[:, 4].detach()
    torch.testing.assert_close(td["attr_at", "0"].sum(-1), change)


@pytest.mark.parametrize("pool", ["mean", "sum", "max"])
@pytest.mark.parametrize("name", ["saliency", "integrated gradients", "deeplift"])
def test_a_channel_is_explained_over_all_of_its_positions(name, pool):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)).double()
    x = torch.randn(3, 2, 5, 5, dtype=DOUBLE)
    td = explained(METHODS[name](Channel("1", 2, pool)), net, x)

    def number(td: Any) -> Tensor:
        flat = td["y"][..., 2, :, :].flatten(-2)
        return flat.amax(-1) if pool == "max" else getattr(flat, pool)(-1)

    cut = explained(METHODS[name](number), net[:2], x)
    torch.testing.assert_close(td["attr", "x"], cut["attr", "x"], rtol=1e-10, atol=1e-12)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)
        self.memory = nn.GRU(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(torch.tanh(self.layer(x)))
        return h + self.memory(h.unsqueeze(1))[0][:, 0]


@pytest.mark.parametrize("method", [lambda t: Saliency(t, abs=False), IntegratedGradients])
def test_of_a_module_that_gives_several_tensors_one_is_chosen(method):
    net, x = Twice().double(), torch.randn(4, 3, dtype=DOUBLE)
    with pytest.raises(TargetError, match=r"'layer' gives 2 tensors.*call=0 to call=1"):
        explained(method(Unit("layer", 0)), net, x)
    with pytest.raises(TargetError, match="no such call"):
        explained(method(Unit("layer", 0, call=2)), net, x)
    td = explained(method(Unit("layer", 0, call=0)), net, x)
    if method is not IntegratedGradients:
        torch.testing.assert_close(td["attr", "x"], net.layer.weight[0].detach().expand(4, -1))
        h = x.clone().requires_grad_()
        expected = torch.autograd.grad(net.layer(torch.tanh(net.layer(h)))[:, 0].sum(), h)[0]
        td = explained(method(Unit("layer", 0, call=-1)), net, x)
        torch.testing.assert_close(td["attr", "x"], expected)
    else:
        torch.testing.assert_close(td["attr", "x"], x * net.layer.weight[0].detach())


def test_what_is_not_there_is_refused():
    net, x = Twice().double(), torch.randn(4, 3, dtype=DOUBLE)
    with pytest.raises(PathError, match="layers"):
        Saliency(Unit("layers", 0)).prepare(net, ["x"], ["y"])
    for method in (Saliency, IntegratedGradients):
        with pytest.raises(TargetError, match="'idle' was never called"):
            explained(method(Unit("idle", 0)), net, x)
        with pytest.raises(TargetError, match="does not fit"):
            explained(method(Unit("layer", 3, call=0)), net, x)
        with pytest.raises(TargetError, match="ambiguous"):
            explained(method(Unit("layer", call=0)), net, x)
    with pytest.raises(TargetError, match="pool"):
        Channel("layer", 0, pool="median")
    with pytest.raises(TargetError, match="submodule's path"):
        Unit(3)  # pyright: ignore[reportArgumentType]
    assert repr(Unit("a.b", 1, ..., call=2)) == "Unit('a.b', 1, ..., call=2)"


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_number_of_batch_dimensions_will_do(name, batch):
    net, x = network(), torch.randn(*batch, 3, dtype=DOUBLE)
    with METHODS[name](Unit("1", 3)).prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, batch))
    flat = explained(METHODS[name](Unit("1", 3)), net, x.reshape(-1, 3))
    torch.testing.assert_close(
        td["attr", "x"].reshape(-1, 3), flat["attr", "x"], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", ["saliency", "integrated gradients", "deeplift", "lrp"])
def test_an_agents_neuron_stands_at_the_agents_place(name):
    from torchrl.modules import MultiAgentMLP

    agents = MultiAgentMLP(
        4, 2, 3, centralized=False, share_params=False, depth=1, num_cells=5
    ).double()
    model = TensorDictModule(agents, [("agents", "obs")], [("agents", "q")])
    td = TensorDict(
        {"agents": TensorDict({"obs": torch.randn(6, 3, 4, dtype=DOUBLE)}, [6, 3])}, [6]
    )
    with METHODS[name](Unit("module._empty_net.0", 2, 4)).prepare(model) as hooked:
        hooked(td)
    relevance = td["attr", "agents", "obs"]
    assert relevance[:, 2].abs().min() > 0 and not relevance[:, :2].any()
    if name == "saliency":
        weight = dict(agents.named_parameters())["params.0.weight"][2, 4].detach()
        torch.testing.assert_close(relevance[:, 2], weight.expand(6, -1))


def test_a_recurrent_policys_unit_is_explained_at_one_step():
    from torchrl.modules import LSTMModule, set_recurrent_mode

    lstm = LSTMModule(input_size=3, hidden_size=4, in_key="x", out_key="h")
    td = TensorDict(
        {"x": torch.randn(2, 5, 3), "is_init": torch.zeros(2, 5, 1, dtype=torch.bool)}, [2, 5]
    )
    td["is_init"][:, 0] = True
    with set_recurrent_mode(True):
        for method in (
            Saliency(AtStep(Unit("lstm", 1, call=0), 2), abs=False, keys="x"),
            IntegratedGradients(AtStep(Unit("lstm", 1, call=0), 2), keys="x"),
        ):
            with method.prepare(lstm) as hooked:
                found = hooked.observe(td.clone())["attr", "x"]
            assert found[:, :3].abs().sum((0, 2)).min() > 0 and not found[:, 3:].any()
