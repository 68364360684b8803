"""Functions between ruled modules need no rule: sums, concatenations, heads that combine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import reference_lrp as ref
from rule_samples import Product, assert_close, explain, grid, made, on_dense
from tdhook_like import LRP, InputXGradient, IntegratedGradients, Saliency
from tdhook_like.attribution.lrp import (
    EpsilonPlus,
    EpsilonRule,
    GammaRule,
    UniformRule,
    ZPlusRule,
)

F64 = torch.float64


class Residual(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_functional_residual_sum_shares_by_the_terms_and_conserves(blocks: int):
    net = made("residual", lambda: Residual(blocks))
    x, R = grid((2, 4), "x"), grid((2, 4), "R") + 0.125
    activations = [x]
    for block in net.blocks:
        activations.append(activations[-1] + block(activations[-1]).detach())
    want = R
    for block, a in zip(reversed(net.blocks), reversed(activations[:-1]), strict=True):
        y = a + block(a).detach()
        share = want / y
        want = a * share + ref.relevance(
            block, a, block(a).detach() * share, ref.epsilon, eps=1e-12
        )
    got = explain(net, lambda n, m: EpsilonRule(1e-12) if n.startswith("blocks.") else None, [x], R)
    assert_close(got[0][0], want, 1e-9)
    torch.testing.assert_close(got[0][0].sum(1), R.sum(1), atol=1e-7, rtol=1e-7)


def test_concatenation_slices_and_differences_need_no_rule():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(8, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.last(torch.cat([self.left(a), self.right(b).neg()], -1)[:, :8])

    net, R = made("cat", Net), grid((2, 2), "R") + 0.125
    a, b = grid((2, 3), "a"), grid((2, 2), "b")
    hidden = torch.cat([net.left(a), -net.right(b)], -1).detach()
    behind = ref.relevance(net.last, hidden, R, ref.gamma)
    got = explain(net, on_dense(GammaRule()), [a, b], R)[0]
    assert_close(got[0], ref.relevance(net.left, a, behind[:, :4], ref.gamma), 1e-9)
    assert_close(got[1], ref.relevance(net.right, b, behind[:, 4:], ref.gamma), 1e-9)


def test_a_dueling_head_is_right_without_a_rule_for_its_combination():
    class Dueling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.advantage = nn.Linear(4, 1, bias=False), nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            a = self.advantage(x)
            return self.value(x) + a - a.mean(-1, keepdim=True)

    net, x, R = made("dueling", Dueling), grid((2, 4), "x"), grid((2, 3), "R") + 0.125
    whole = nn.Linear(4, 3, bias=False, dtype=F64)
    rows = net.advantage.weight.detach()
    whole.weight.data = net.value.weight.detach() + rows - rows.mean(0)
    got = explain(net, on_dense(EpsilonRule(1e-13)), [x], R)[0][0]
    assert_close(got, ref.relevance(whole, x, R, ref.epsilon, eps=0.0), 1e-9)


def test_a_product_of_modules_is_shared_by_a_uniform_rule_on_the_module_that_multiplies():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.gate = nn.Linear(4, 3), nn.Linear(4, 3)
            self.product = Product()

        def forward(self, x: Tensor) -> Tensor:
            return self.product(self.value(x), self.gate(x))

    net, x, R = made("gated", Gated), grid((2, 4), "x"), grid((2, 3), "R") + 0.125
    rules = {"product": UniformRule(), "value": ZPlusRule(), "gate": ZPlusRule()}
    got = explain(net, lambda name, m: rules.get(name), [x], R)[0][0]
    halves = [ref.relevance(net.get_submodule(n), x, R / 2, ref.zplus) for n in ("value", "gate")]
    assert_close(got, halves[0] + halves[1], 1e-9)


# --- rules in other methods, and relevance inside -------------------------------------------------


def small() -> Any:
    return made("small", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))


def test_relevance_inside_the_network_is_what_flows_behind_each_module():
    net, x = small(), grid((2, 4), "x")
    td = TensorDict({"x": x}, [2])
    with LRP(EpsilonPlus(), ("y", 1), at=["0", "1", "2"]).prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(td)
    R = torch.zeros(2, 2, dtype=F64)
    R[:, 1] = td["y"][:, 1]
    behind = ref.relevance(net[2], net[:2](x).detach(), R, ref.epsilon)
    assert_close(td["attr_at", "2"], R, 1e-12)
    assert_close(td["attr_at", "1"], behind, 1e-9)
    assert_close(td["attr_at", "0"], behind, 1e-9)
    assert_close(td["attr", "x"], ref.relevance(net[0], x, behind, ref.epsilon), 1e-9)


def test_every_gradient_method_takes_rules_and_gives_its_own_combination_of_them():
    net, x = small(), grid((3, 4), "x")
    td, found = TensorDict({"x": x}, [3]), {}
    mapper = on_dense(GammaRule())
    for name, method in {
        "lrp": LRP(mapper, ("y", 0)),
        "product": InputXGradient(("y", 0), rules=mapper),
        "slope": Saliency(("y", 0), abs=False, rules=mapper),
        "plain": InputXGradient(("y", 0)),
    }.items():
        with method.prepare(net, ["x"], ["y"]) as hooked:
            found[name] = hooked(td.clone())["attr", "x"]
    assert_close(found["product"], found["lrp"], 1e-12)
    assert_close(found["slope"] * x, found["lrp"], 1e-12)
    assert not torch.allclose(found["plain"], found["lrp"])


def test_rules_along_a_path_are_taken_at_every_point_of_it():
    net = made("path", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    x, mapper, n = grid((2, 4), "x"), on_dense(ZPlusRule()), 4
    method = IntegratedGradients(
        ("y", 0), rules=mapper, n_steps=n, method="riemann_middle", gap_tolerance=None
    )
    with method.prepare(net, ["x"], ["y"]) as hooked:
        found = hooked(TensorDict({"x": x}, [2]))["attr", "x"]
    slopes = []
    with Saliency(("y", 0), abs=False, rules=mapper).prepare(net, ["x"], ["y"]) as hooked:
        for step in range(n):
            point = x * (step + 0.5) / n
            slopes.append(hooked(TensorDict({"x": point}, [2]))["attr", "x"])
    assert_close(found, x * torch.stack(slopes).mean(0), 1e-9)
