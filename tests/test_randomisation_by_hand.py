"""Parameter randomisation a second time: parameters drawn by hand into copies of the network."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from method_references import DOUBLE
from tdhook_like import InputXGradient, Saliency
from tdhook_like.metrics import parameter_randomisation


def drawn_anew(layer: nn.Module, draw: torch.Generator) -> None:
    """Normal numbers of each parameter's own mean and standard deviation, in their order."""
    for parameter in layer.parameters():
        own = parameter.detach().clone()
        spread = (own - own.mean()).square().mean().sqrt()
        noise = torch.randn(own.shape, dtype=DOUBLE, generator=draw)
        parameter.data = (own.mean() + spread * noise).to(own.dtype)


def input_x_gradient(net: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(leaf).sum(), leaf)
    return x * grad


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Of rows without ties, from the places of values, averaged over rows."""
    places = [(t.argsort(-1).argsort(-1)).double() for t in (a, b)]
    n = a.shape[-1]
    squares = (places[0] - places[1]).square().sum(-1)
    return (1 - 6 * squares / (n * (n * n - 1))).mean().item()  # Spearman 1904


@pytest.mark.parametrize("order", ["cascading", "independent"])
def test_correlations_are_those_with_copies_that_were_drawn_by_hand(order: str):
    net = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 1))
    net, x = net.double(), torch.randn(20, 7, dtype=DOUBLE)
    for parameter in net.parameters():  # of means that are not zero
        parameter.data += 0.3
    found = parameter_randomisation(
        InputXGradient("y"), net, TensorDict({"x": x}, [20]), in_keys=["x"], out_keys=["y"],
        order=order, seed=3,
    )  # fmt: skip
    before, draw, other = input_x_gradient(net, x), torch.Generator().manual_seed(3), net
    other = copy.deepcopy(net)
    for layer in (4, 2, 0):
        if order == "independent":
            other = copy.deepcopy(net)
        drawn_anew(other[layer], draw)
        after = input_x_gradient(other, x)
        assert found.signed[str(layer)] == pytest.approx(rank_correlation(before, after))
        sizes = rank_correlation(before.abs(), after.abs())
        assert found.sizes[str(layer)] == pytest.approx(sizes)


def test_of_a_recurrent_layer_the_weights_that_it_runs_with_are_drawn_anew():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(7, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x.unsqueeze(1))[0][:, 0, :1]

    net, x = Last().double(), torch.randn(20, 7, dtype=DOUBLE)
    found = parameter_randomisation(
        Saliency("y", abs=False), TensorDictModule(net, ["x"], ["y"]), TensorDict({"x": x}, [20]),
        seed=3,
    )  # fmt: skip
    other = copy.deepcopy(net)
    drawn_anew(other.rnn, torch.Generator().manual_seed(3))
    other.rnn.flatten_parameters()
    slopes = [input_x_gradient(model, x) / x for model in (net, other)]
    assert found.signed["module.rnn"] == pytest.approx(rank_correlation(*slopes))
