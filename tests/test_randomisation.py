"""Parameter randomisation: which layers are drawn anew, and what is left of explanations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import LSTMModule, MultiAgentMLP

from method_references import Formula
from pristine import assert_same, snapshot, td_snapshot
from tdhook_like import LRP, Each, EpsilonPlus, InputXGradient, Saliency
from tdhook_like.metrics import parameter_randomisation


def critic(hidden: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                         nn.Linear(hidden, 1))  # fmt: skip


def test_layers_are_drawn_anew_from_the_output_down_on_a_copy():
    net, td = critic(), TensorDict({"x": torch.randn(40, 6)}, [40])
    model = TensorDictModule(net, ["x"], ["y"])
    before, inputs = snapshot(model), td_snapshot(td)
    found = parameter_randomisation(InputXGradient("y"), model, td)
    assert_same(before, snapshot(model))
    assert_same(inputs, td_snapshot(td))
    assert list(found.signed) == ["module.4", "module.2", "module.0"]
    assert abs(found.signed["module.0"]) < 0.5 and found.n_rows == 40
    again = parameter_randomisation(InputXGradient("y"), model, td)
    assert again == found
    assert parameter_randomisation(InputXGradient("y"), model, td, seed=1) != found
    assert "down to module.0" in str(found) and found.to_dict()["module.4/sizes"] <= 1


def test_an_explanation_that_ignores_the_model_is_found_out():
    class Deaf(Saliency):
        def combine(self, value: Tensor, gradient: Tensor) -> Tensor:
            return value

    td = TensorDict({"x": torch.randn(20, 6)}, [20])
    found = parameter_randomisation(Deaf("y"), critic(), td, in_keys=["x"], out_keys=["y"])
    assert all(value == pytest.approx(1) for value in found.signed.values())
    true = parameter_randomisation(Saliency("y"), critic(), td, in_keys=["x"], out_keys=["y"])
    assert true.signed["0"] < 0.6


def test_one_layer_alone_or_chosen_ones():
    net, td = critic(), TensorDict({"x": torch.randn(30, 6)}, [30])
    given: dict[str, Any] = {"in_keys": ["x"], "out_keys": ["y"]}
    # A last layer of one number scales all relevance alike, up to its sign.
    alone = parameter_randomisation(
        InputXGradient("y"), net, td, layers=["0", "4"], order="independent", **given
    )
    assert list(alone.signed) == ["0", "4"] and "only 0" in str(alone)
    down = parameter_randomisation(InputXGradient("y"), net, td, layers=["4", "0"], **given)
    first = parameter_randomisation(InputXGradient("y"), net, td, layers=["4"], **given)
    assert down.signed["4"] == first.signed["4"]


def test_parameters_that_are_shared_stay_shared_and_keep_mean_and_spread():
    class Seen:
        def __init__(self) -> None:
            self.weights: list[tuple[Tensor, Tensor]] = []

    seen = Seen()  # no list: a copied model shall write here too

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(50, 50), nn.Linear(50, 50)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            seen.weights.append((self.one.weight, self.two.weight))
            return self.two(torch.tanh(self.one(x))).sum(-1)

    net, td = Tied(), TensorDict({"x": torch.randn(3, 50)}, [3])
    parameter_randomisation(Saliency("y"), net, td, in_keys=["x"], out_keys=["y"])
    assert all(one is two for one, two in seen.weights)
    drawn, own = seen.weights[-1][0].detach(), net.one.weight.detach()
    assert not torch.equal(drawn, own)
    assert drawn.std().item() == pytest.approx(own.std().item(), rel=0.1)
    assert drawn.mean().abs() < 0.01


def test_recurrent_layers_and_stacked_agents_are_drawn_anew_too():
    lstm = LSTMModule(3, 4, in_keys=["x", "h", "c"], out_keys=["y", ("next", "h"), ("next", "c")])
    td = TensorDict({"x": torch.randn(9, 3), "is_init": torch.ones(9, 1, dtype=torch.bool),
                     "h": torch.zeros(9, 1, 4), "c": torch.zeros(9, 1, 4)}, [9])  # fmt: skip
    before = snapshot(lstm)
    found = parameter_randomisation(Saliency(("y", 0), keys=["x"], abs=False), lstm, td)
    assert_same(before, snapshot(lstm))
    assert all(abs(value) < 0.95 for value in found.signed.values())
    agents = MultiAgentMLP(
        n_agent_inputs=4, n_agent_outputs=1, n_agents=3, centralised=False, share_params=False
    )
    model = TensorDictModule(agents, [("agents", "obs")], [("agents", "value")])
    td = TensorDict({"agents": TensorDict({"obs": torch.randn(9, 3, 4)}, [9, 3])}, [9])
    before = snapshot(model)
    found = parameter_randomisation(Saliency(("agents", "value", 0, 0), abs=False), model, td)
    assert_same(before, snapshot(model))
    assert found.signed and all(value < 0.95 for value in found.signed.values())


def test_rules_and_several_targets_are_compared_row_by_row():
    td = TensorDict({"x": torch.randn(20, 6), "z": torch.randn(20, 2)}, [20])
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    model = TensorDictModule(lambda x, z: net(torch.cat([x, z], -1)), ["x", "z"], ["y"])
    model = TensorDictModule(Formula(lambda x, z: torch.cat([x, z], -1)), ["x", "z"], ["h"])
    from tensordict.nn import TensorDictSequential

    whole = TensorDictSequential(model, TensorDictModule(net, ["h"], ["y"]))
    found = parameter_randomisation(LRP(EpsilonPlus(), Each("y")), whole, td)
    assert found.n_rows == 60 and all(abs(v) < 0.9 for v in found.signed.values())
