"""Small models on which captum departs from the formula: what the formula gives, worked out by hand.

``benchmarks/captum_deviations.py`` asks captum about the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_like import (
    Conductance,
    DeepLift,
    ExpectedGradients,
    FeaturePermutation,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
)
from tdhook_like.robustness import FGSM, PGD

DOUBLE = torch.float64


class Of(nn.Module):
    """A function of tensors, and of the layers that it is given."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x, *self.layers)


def ones(n: int) -> nn.Linear:
    layer = nn.Linear(n, 1, bias=False, dtype=DOUBLE)
    nn.init.ones_(layer.weight)
    return layer


def rows(*x: list[float]) -> Tensor:
    return torch.tensor(x, dtype=DOUBLE)


def written(method: Any, net: nn.Module, *x: Tensor, root: str = "attr") -> Tensor:
    keys = ["a", "b"][: len(x)]
    with method.prepare(net, keys, ["y"]) as hooked:
        td = hooked(TensorDict(dict(zip(keys, x, strict=True)), [len(x[0])]))
    return torch.cat([td[root, key] for key in keys], -1)


def inside(method: Any, net: nn.Module, x: Tensor) -> Tensor:
    with method.prepare(net, ["x"], ["y"]) as hooked:
        return hooked(TensorDict({"x": x}, [len(x)]))["attr_at", "layers.0"]


def pooled(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, -1)), *layers, nn.Flatten())


Y0 = ("y", 0)
ONE_RELU = nn.ReLU()
SQUARE = Of(lambda x, f: f(x) ** 2, nn.Identity())
PRODUCT = Of(lambda a, b: a * b)
HALVES: dict[Any, Tensor] = {
    "a": torch.zeros(1, dtype=torch.long),
    "b": torch.zeros(1, dtype=torch.long),
}
SIGNS = rows(*[[1.0], [-1.0]] * 4)
BY_HAND: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
    # 2 from 3 is a fall by 1, which the winner at the baseline carries: at its fall from 3 to 1.
    "a ReLU straight into max pooling": (
        lambda: written(
            DeepLift(Y0, baselines=rows([1.0, 3.0])),
            *(pooled(nn.ReLU(), nn.MaxPool1d(2)), rows([2.0, 1.0])),
        ),
        rows([0.0, -1.0]),
    ),
    "windows that overlap": (
        lambda: written(DeepLift(Y0), pooled(nn.MaxPool1d(2, 1), ones(2)), rows([1.0, 5.0, 2.0])),
        rows([0.0, 10.0, 0.0]),
    ),
    "a function for a module": (
        lambda: written(DeepLift(Y0, baselines=-2.0), Of(F.relu), rows([2.0])),
        rows([2.0]),
    ),
    "an activation of another kind": (
        lambda: written(DeepLift(Y0), nn.GELU(), rows([1.0])),
        rows([0.5 * (1 + torch.erf(torch.tensor(0.5).double().sqrt()).item())]),
    ),
    "a product of two inputs": (
        lambda: written(DeepLift(Y0), PRODUCT, rows([2.0]), rows([3.0])),
        rows([3.0, 3.0]),
    ),
    # 2, through two ReLUs, from 0: the first halves the way of 4, the second keeps it.
    "one ReLU used twice": (
        lambda: written(
            *(DeepLift(Y0, baselines=-2.0), Of(lambda x, f, g: f(g(f(x))), ONE_RELU, ones(1))),
            rows([2.0]),
        ),
        rows([2.0]),
    ),
    "rectifiers that are functions": (
        lambda: written(
            *(GuidedBackprop(Y0, functional=True), Of(lambda x: -F.relu(2 - F.relu(x)))),
            rows([1.0]),
        ),
        rows([0.0]),
    ),
    "a trapezoid whose weights sum to one": (
        lambda: written(IntegratedGradients(Y0, method="riemann_trapezoid"), ones(1), rows([1.0])),
        rows([1.0]),
    ),
    "conductance that makes the whole change": (
        lambda: inside(Conductance(Y0, at=("layers.0",)), SQUARE, rows([1.0])),
        rows([1.0]),
    ),
    # Permuted together, a and b stay the same, and so does their product.
    "a permuted group that spans two inputs": (
        lambda: written(FeaturePermutation(Y0, masks=HALVES), PRODUCT, SIGNS, SIGNS),
        torch.zeros(8, 2, dtype=DOUBLE),
    ),
    "an attack where the slope is slight": (
        lambda: written(
            FGSM(Y0, epsilon=0.5), Of(lambda x: 1e-7 * x), rows([1.0]), root="adversarial"
        ),
        rows([0.5]),
    ),
    "the steepest way within a Euclidean ball": (
        lambda: written(
            PGD(Y0, epsilon=5.0, norm="l2"),
            *(Of(lambda x: x @ rows([3.0, -4.0]).mT), rows([0.0, 0.0])),
            root="adversarial",
        ),
        rows([-3.0, 4.0]),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_small_models_have_the_answers_worked_out_by_hand(name):
    give, expected = BY_HAND[name]
    torch.testing.assert_close(give(), expected, rtol=1e-10, atol=1e-10)


def test_a_softmax_row_has_the_same_attributions_beside_another_row():
    one, other = rows([1.0, 2.0, 0.0]), rows([0.0, 3.0, 1.0])
    alone = written(DeepLift(Y0), nn.Softmax(-1), one)
    beside = written(DeepLift(Y0), nn.Softmax(-1), torch.cat([one, other]))
    assert alone.abs().max() > 0.01
    torch.testing.assert_close(beside[:1], alone, rtol=1e-12, atol=1e-12)


def test_baselines_of_two_inputs_are_drawn_together():
    drawn: dict[Any, Tensor] = {"a": rows([1.0], [-1.0]), "b": rows([-1.0], [1.0])}
    method = ExpectedGradients(Y0, baselines=drawn, n_samples=4000, gap_tolerance=None)
    # a · b is −1 at either baseline, and 0 on average where each input has one of its own.
    found = written(method, PRODUCT, rows([1.0]), rows([1.0]))
    assert abs(found.sum().item() - 2.0) < 0.1


def test_a_variance_of_few_draws_is_not_too_small():
    method = NoiseTunnel(InputXGradient(Y0), kind="vargrad", n_samples=5, stdevs=1.0)
    found = written(method, ones(1), torch.ones(4000, 1, dtype=DOUBLE))
    error = (2 / 4 / 4000) ** 0.5  # of the mean of 4000 estimates, each of variance 2 σ⁴ / (n − 1)
    assert abs(found.mean().item() - 1.0) < 4 * error
