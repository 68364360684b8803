"""Relevance differentiated again, and what cannot be done with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rule_samples import only
from ruled_cases import CASES, Case, assert_same, every_case, hooked, read
from tdhook_like.attribution.lrp import EpsilonRule, Inputs, Rule
from tdhook_like.attribution.lrp.ruled import RuledModel, relevance
from tdhook_like.errors import ContextError, InputError, ModelError, RuleError, TargetError

# --- differentiated again -------------------------------------------------------------------------


@every_case
def test_relevance_with_a_graph_is_the_same_relevance(case: Case):
    net, xs = case.made()
    ruled = RuledModel(net, case.mapper)
    one = lambda *x: read(ruled(*x))[..., 0]  # noqa: E731
    found = relevance(one, *xs, start="value", create_graph=True)
    found = [found] if isinstance(found, Tensor) else list(found)
    assert all(value.requires_grad for value in found)
    assert_same([value.detach() for value in found], hooked(net, case.mapper, xs, 0))


def test_relevance_in_a_loss_has_the_slope_that_finite_differences_find():
    net, (x,) = CASES["residual"].made()
    ruled, weights = RuledModel(net), torch.randn_like(x)

    def score(create_graph: bool) -> Tensor:
        found = relevance(lambda x: ruled(x)[..., 0], x, start="value", create_graph=create_graph)
        return (weights * found).sum()

    places = [x.requires_grad_(), *net.parameters()]
    for place, slope in zip(places, torch.autograd.grad(score(True), places), strict=True):
        direction, ends = torch.randn_like(place), []
        for step in (1e-6, -1e-6):
            place.data += step * direction
            ends.append(score(False))
            place.data -= step * direction
        numeric = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((slope * direction).sum(), numeric, rtol=1e-5, atol=1e-6)


def again_by_autograd(ruled: nn.Module, x: Tensor) -> object:
    x = x.requires_grad_()
    (g,) = torch.autograd.grad(ruled(x).sum(), x, create_graph=True)
    return torch.autograd.grad((x * g).sum(), x)


def again_by_backward(ruled: nn.Module, x: Tensor) -> object:
    x = x.requires_grad_()
    ruled(x).sum().backward(create_graph=True)
    assert x.grad is not None
    return x.grad.sum().backward()


def again_under_vjp(ruled: nn.Module, x: Tensor) -> object:
    x = x.requires_grad_()
    y, pull = torch.func.vjp(ruled, x)
    return torch.autograd.grad(pull(torch.ones_like(y))[0].sum(), x)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("name", ["dense", "residual"])
@pytest.mark.parametrize(
    "again",
    [
        again_by_autograd,
        again_by_backward,
        again_under_vjp,
        lambda ruled, x: torch.func.jacrev(torch.func.jacrev(lambda x: ruled(x).sum()))(x),
        lambda ruled, x: torch.func.grad(lambda x: relevance(ruled, x, start="value").sum())(x),
    ],
    ids=["grad", "backward", "vjp of a leaf", "jacrev of jacrev", "grad of relevance"],
)
def test_a_second_derivative_is_refused_where_it_would_be_wrong(
    again: Callable[[nn.Module, Tensor], object], name: str
):
    net, (x,) = CASES[name].made()
    with pytest.raises(ContextError, match=r"create_graph=True"):
        again(RuledModel(net), x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "forward",
    [
        lambda ruled, x: torch.func.jacfwd(ruled)(x),
        lambda ruled, x: torch.func.jvp(ruled, (x,), (x,)),
        lambda ruled, x: torch.func.hessian(lambda x: ruled(x).sum())(x),
    ],
    ids=["jacfwd", "jvp", "hessian"],
)
def test_forward_mode_would_pass_rules_by_and_is_refused(
    forward: Callable[[nn.Module, Tensor], object],
):
    net, (x,) = CASES["dense"].made()
    with pytest.raises(ContextError, match=r"forward mode .*vjp or jacrev"):
        forward(RuledModel(net), x)


# --- what cannot be -------------------------------------------------------------------------------


def test_a_rule_that_is_written_as_relevance_says_that_it_cannot_be_transformed():
    class Written(Rule):
        def relevance(
            self, module: nn.Module, inputs: Inputs, output: Tensor, R_out: Tensor
        ) -> Tensor:
            return R_out

    net, x = nn.Linear(3, 3), torch.randn(2, 3)
    ruled = RuledModel(net, only(net, Written()))
    with pytest.raises(RuleError, match=r"Written\(\) on Linear.*Write it as surrogate\(\)"):
        torch.func.vjp(ruled, x)
    with pytest.raises(RuleError, match=r"create_graph=True.*surrogate\(\)"):
        relevance(ruled, x, start="value", create_graph=True)
    assert_same(relevance(ruled, x, start="value"), net(x).detach(), 1e-5)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(ruled(leaf).sum(), leaf)  # autograd itself is no transform
    assert_same(x * g, net(x).detach(), 1e-5)


def test_functions_without_a_rule_are_told_once_or_refused():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.matrix_exp(x)

    x = torch.randn(3, 3)
    x.requires_grad_()
    ruled = RuledModel(Odd())
    with pytest.warns(UserWarning, match=r"matrix_exp\(\) is not linear and without a rule"):
        ruled(x)
    ruled(x)
    with pytest.raises(RuleError, match=r"matrix_exp\(\).*FunctionRules"):
        RuledModel(Odd(), unhandled="raise")(x)
    RuledModel(Odd(), unhandled="ignore")(x)


def test_rules_that_are_never_reached_are_told():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.skipped = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(RuleError, match=r"'skipped'.*unreached='ignore'"):
        RuledModel(Skips())(torch.ones(1, 2))
    RuledModel(Skips(), unreached="ignore")(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: RuledModel(torch.nn.functional.relu), ModelError, "module, got function"),  # pyright: ignore
        (lambda: RuledModel(nn.Linear(1, 1), 3), RuleError, "mapper"),  # pyright: ignore
        (lambda: RuledModel(nn.Linear(1, 1), unreached="no"), ContextError, "unreached"),
        (lambda: RuledModel(nn.Linear(1, 1), functions=3), RuleError, "FunctionRules"),  # pyright: ignore
        (lambda: relevance(nn.ReLU(), torch.arange(3), start="one"), InputError, "floating-point"),
        (lambda: relevance(lambda x: [x], torch.ones(1), start="one"), TargetError, "list"),
        (lambda: relevance(nn.ReLU(), torch.ones(1), start="two"), RuleError, "'two'"),
        (lambda: relevance(nn.ReLU(), torch.ones(1), start=torch.ones(3)), RuleError, r"\(3,\)"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    wrong: Callable[[], object], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        wrong()


def test_a_graph_of_relevance_is_refused_inside_transforms():
    ruled, x = RuledModel(nn.Linear(2, 1)), torch.randn(3, 2)
    with pytest.raises(ContextError, match=r"create_graph=True.*backward"):
        torch.func.vmap(lambda x: relevance(ruled, x, start="value", create_graph=True))(x)


def test_a_scripted_module_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="scripted"):
        RuledModel(nn.Sequential(scripted), lambda name, m: EpsilonRule())
