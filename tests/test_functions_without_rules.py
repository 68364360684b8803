"""FunctionRules.none(): rules on modules alone, every function as autograd has it."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_like import LRP, InputXGradient, IntegratedGradients, RuleError, Saliency
from tdhook_like.attribution.lrp import EpsilonRule, FunctionRule, FunctionRules, Rule
from tdhook_like.attribution.lrp.ruled import RuledModel

DOUBLE = torch.float64
NONE = FunctionRules.none()


class Doubled(Rule):
    """Twice the module's gradient, so that the reference is autograd's with a factor."""

    fresh, feeds_zeros = True, False

    def surrogate(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return 2 * output


class Halved(FunctionRule):
    def surrogate(self, flow: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return output / 2


class Net(nn.Module):
    """Everything that function rules treat apart: gates, products, softmax, norms, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.factor = 1.0  # of the first layer's gradient, where this is its own reference

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        h = z.detach() + self.factor * (z - z.detach())
        h = torch.tanh(h) * F.silu(h) + F.layer_norm(h, (6,)) / (1 + h.square())
        h = h + torch.softmax(h, -1) * h.exp().log1p() + torch.atan2(h, 2 + h.cos())
        tokens = h.unflatten(-1, (3, 2))
        h = h + F.scaled_dot_product_attention(tokens, tokens, tokens).flatten(-2)
        outer = h.unsqueeze(-1) * h.sigmoid().unsqueeze(-2)
        return self.last((F.gelu(h).unsqueeze(-2) @ outer).squeeze(-2))


def doubled_first(name: str, module: nn.Module) -> Rule | None:
    return Doubled() if name == "first" else None


def made() -> tuple[Net, Tensor]:
    return Net().double(), torch.randn(3, 4, dtype=DOUBLE)


def found(method: Any, net: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what has no rule is not reported either
        with method.prepare(net, ["x"], ["y"]) as hooked:
            return hooked.observe(TensorDict({"x": x}, [len(x)]))["attr", "x"]


def gradient(net: Net, x: Tensor, factor: float) -> Tensor:
    net.factor = factor
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)
    net.factor = 1.0
    return slope


def test_with_one_rule_the_rest_is_the_plain_gradient():
    net, x = made()
    rules = {"rules": doubled_first, "functions": NONE}
    slope = gradient(net, x, 2.0)
    for method, expected in (
        (Saliency(("y", 1), abs=False, **rules), slope),
        (InputXGradient(("y", 1), **rules), x * slope),
        (LRP(doubled_first, ("y", 1), functions=NONE), x * slope),
    ):
        torch.testing.assert_close(found(method, net, x), expected, rtol=1e-12, atol=1e-12)


def test_along_a_path_the_rest_is_the_plain_gradient_at_every_point():
    net, x = made()
    n = 4
    method = IntegratedGradients(
        ("y", 1),
        rules=doubled_first,
        functions=NONE,
        n_steps=n,
        method="riemann_middle",
        gap_tolerance=None,
    )
    slopes = [gradient(net, (i + 0.5) / n * x, 2.0) for i in range(n)]
    expected = x * torch.stack(slopes).mean(0)
    torch.testing.assert_close(found(method, net, x), expected, rtol=1e-10, atol=1e-12)


def test_the_usual_function_rules_are_not_the_plain_gradient():
    net, x = made()
    usual = InputXGradient(("y", 1), rules=doubled_first, unhandled="ignore")
    assert not torch.allclose(found(usual, net, x), x * gradient(net, x, 2.0), rtol=0.01)


@pytest.mark.parametrize("ledger", [False, True])
def test_exceptions_hold_inside_functions_too_that_are_made_of_others(ledger):
    class Softened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h, _ = self.attention(x, x, x)  # calls F.softmax inside
            return (torch.sigmoid(x * h)).sum((-2, -1)).unsqueeze(-1)

    net, x = Softened().double(), torch.randn(3, 5, 4, dtype=DOUBLE)
    functions = FunctionRules.none({"sigmoid": Halved()})
    method = LRP(lambda name, module: None, "y", functions=functions, ledger=ledger)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(leaf).sum(), leaf)
    torch.testing.assert_close(found(method, net, x), x * slope / 2, rtol=1e-10, atol=1e-12)
    softmax = method.replaced(functions=FunctionRules.none({"softmax": Halved()}))
    assert not torch.allclose(found(softmax, net, x), x * slope)
    torch.testing.assert_close(
        found(method.replaced(functions=NONE), net, x), x * slope, rtol=1e-10, atol=1e-12
    )


def test_a_model_under_rules_has_the_plain_gradient_too():
    net, x = made()
    ruled = RuledModel(net, doubled_first, functions=NONE)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(ruled(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(slope, gradient(net, x, 2.0), rtol=1e-12, atol=1e-12)


def test_the_ledger_says_what_plain_gradients_lose():
    class Tanh(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x).sum(-1, keepdim=True)

    x = torch.randn(3, 4, dtype=DOUBLE)
    method = LRP(lambda name, module: None, "y", functions=NONE, ledger=True)
    with method.prepare(Tanh(), ["x"], ["y"]) as hooked:
        arrived = hooked.observe(TensorDict({"x": x}, [3]))["attr", "x"].sum(-1)
        ledger = hooked.ledger
    slope = 1 - torch.tanh(x).square()
    torch.testing.assert_close(arrived, (x * slope).sum(-1))
    assert ledger is not None
    torch.testing.assert_close(ledger.gap.flatten(), torch.zeros(3, dtype=DOUBLE))


def test_exceptions_are_the_functions_that_are_named():
    net, x = nn.Linear(4, 1).double(), torch.randn(3, 4, dtype=DOUBLE)

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(net(x)) + torch.tanh(net(x)).exp()

    given = FunctionRules.none(rules={"tanh": Halved()})
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(Twice()(leaf).sum(), leaf)
    method = Saliency("y", abs=False, rules=lambda name, module: None, functions=given)
    torch.testing.assert_close(found(method, Twice(), x), slope / 2)
    assert repr(given) == "FunctionRules.none(rules={'tanh': Halved()})"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_it_is_copied_and_pickled(again):
    functions = again(NONE)
    assert repr(functions) == "FunctionRules.none()"
    assert functions.find(torch.tanh)[1].is_plain
    assert not hasattr(again(FunctionRules()).find(torch.tanh)[1], "is_plain")


def test_wrong_exceptions_are_refused():
    with pytest.raises(RuleError, match="no function 'tanhh'"):
        FunctionRules.none({"tanhh": None})
    with pytest.raises(RuleError, match="FunctionRule or None"):
        FunctionRules.none({"tanh": EpsilonRule()})  # pyright: ignore[reportArgumentType]
