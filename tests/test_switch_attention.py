"""A rule on an attention module of one's own, and attribution at it: where captum's LRP fails.

The module is in the style of a switch transformer (Fedus et al. 2022): attention by functions, a
router that sends every token to one of several small networks. captum keeps a rule's state on
modules without children alone, and so raises for a rule, or an attribution, at this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import reference_lrp as ref
from pristine import assert_same, snapshot, td_snapshot
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    BaseRuleMapper,
    EpsilonRule,
    NameMapper,
    Rule,
    RuleMapper,
    TypeMapper,
)

F64 = torch.float64
B, TOKENS, WIDTH, EXPERTS = 2, 5, 4, 3


class SwitchAttention(nn.Module):
    """Attention, and then one expert for each token, weighed by the router's probability."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT / WIDTH**0.5
        attended = scores.softmax(-1) @ self.value(x)
        probability, chosen = self.router(attended).softmax(-1).max(-1)
        each = torch.stack([expert(attended) for expert in self.experts], -2)
        index = chosen[..., None, None].expand(*chosen.shape, 1, WIDTH)
        return x + probability[..., None] * each.gather(-2, index).squeeze(-2)


class Net(nn.Module):
    """Tokens of three numbers each, the switch attention, and a linear head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(3, WIDTH), SwitchAttention()
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(self.embed(x)).mean(1))


def on_attention(name: str, module: nn.Module) -> Rule | None:
    """Epsilon on the attention as a whole, and on the layers around it."""
    return EpsilonRule() if name in ("embed", "attention", "head") else None


MAPPERS: dict[str, RuleMapper] = {
    "a function": on_attention,
    "by name": NameMapper({name: EpsilonRule() for name in ("embed", "attention", "head")}),
    "by type": TypeMapper({SwitchAttention: EpsilonRule()})
    | NameMapper({"embed": EpsilonRule(), "head": EpsilonRule(), "attention.*": None}),
}
every_mapper = pytest.mark.parametrize("name", MAPPERS)


def inputs() -> TensorDict:
    return TensorDict({"x": torch.randn(B, TOKENS, 3, dtype=F64)}, [B])


def explained(net: Net, td: TensorDict, mapper: RuleMapper, **options: Any) -> TensorDict:
    method = LRP(mapper, ("y", 0), at=("attention",), unreached="ignore", **options)
    with method.prepare(net, ["x"], ["y"]) as hooked:
        return hooked(td)


def epsilon_through(module: Callable[[Tensor], Tensor], x: Tensor, R: Tensor) -> Tensor:
    """Bach et al. 2015, eq. 58, with the Jacobian of a whole module as its weights."""
    rows = []
    for sample, R_sample in zip(x, R, strict=True):
        slope: Any = torch.autograd.functional.jacobian(
            lambda s: module(s[None])[0].flatten(), sample
        )
        y = module(sample[None])[0].flatten().detach()
        rows.append(
            sample * torch.tensordot(R_sample.flatten() / ref.stabilised(y, ref.EPSILON), slope, 1)
        )
    return torch.stack(rows)


def expected(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of what the attention gives, and of the input: by hand, and by the Jacobian."""
    with torch.no_grad():
        tokens = net.embed(x)
        given = net.attention(tokens)
        y = net(x)[:, 0]
    share = y / ref.stabilised(y, ref.EPSILON)
    R_given = given * net.head.weight[0] / TOKENS * share[:, None, None]
    R_tokens = epsilon_through(net.attention, tokens, R_given.detach())
    rows, R_rows = x.flatten(0, 1), R_tokens.flatten(0, 1)
    return R_given.detach(), ref.relevance(net.embed, rows, R_rows).reshape(x.shape)


@every_mapper
def test_epsilon_on_the_attention_as_a_whole_shares_by_its_jacobian_at_input_and_layer(name: str):
    net, td = Net().double(), inputs()
    at_layer, at_input = expected(net, td["x"])
    td = explained(net, td, MAPPERS[name])
    torch.testing.assert_close(td["attr_at", "attention"], at_layer)
    torch.testing.assert_close(td["attr", "x"], at_input)


@every_mapper
@pytest.mark.parametrize("observing", [False, True], ids=["driven", "observed"])
def test_a_second_call_gives_what_the_first_one_gave_and_neither_leaves_a_trace(
    name: str, observing: bool
):
    net, td = Net().double(), inputs()
    plain = net(td["x"])
    method = LRP(MAPPERS[name], ("y", 0), at=("attention",), unreached="ignore")
    before, data = snapshot(net), td_snapshot(td)
    found = []
    with method.prepare(net, ["x"], ["y"]) as hooked:
        for _ in range(2):
            called = (hooked.observe if observing else hooked)(td.copy())
            found.append((called["attr", "x"], called["attr_at", "attention"]))
            assert_same(before, snapshot(net))
    found.append((called := explained(net, td.copy(), MAPPERS[name]))["attr", "x"])
    assert all(torch.equal(one, two) for one, two in zip(*found[:2], strict=True))
    assert torch.equal(found[0][0], called["attr", "x"])
    assert torch.equal(called["y"], plain)
    assert_same(before, snapshot(net))
    assert_same(data, td_snapshot(td))


def test_a_rule_that_is_put_on_the_attention_by_hand_does_the_same_and_stays_the_users():
    net, td = Net().double(), inputs()
    expected = explained(net, td.copy(), on_attention)
    rule = EpsilonRule()
    state = dict(vars(rule))
    with rule.register(net.attention):
        mapper = lambda name, m: EpsilonRule() if name in ("embed", "head") else None  # noqa: E731
        for _ in range(2):
            found = explained(net, td.copy(), mapper)
            assert torch.equal(found["attr", "x"], expected["attr", "x"])
    assert vars(rule) == state
    without = explained(net, td.copy(), mapper)
    assert not torch.allclose(without["attr", "x"], expected["attr", "x"])


def test_relevance_at_the_layer_is_the_outputs_but_for_the_heads_bias():
    net, td = Net().double(), inputs()
    td = explained(net, td, on_attention)
    total = td["attr_at", "attention"].flatten(1).sum(1)
    torch.testing.assert_close(total, td["y"][:, 0] - net.head.bias[0].detach(), rtol=1e-5, atol=0)


def test_without_a_rule_on_it_the_attention_is_read_by_what_is_inside_and_its_ledger_closes():
    # Softmax, products, the choice of an expert: each has a rule, so nothing is lost on the way.
    net, td = Net().double(), inputs()
    dense = lambda name, m: EpsilonRule() if isinstance(m, nn.Linear) else None  # noqa: E731
    method = LRP(BaseRuleMapper(rule_mapper=dense), ("y", 0), at=("attention",), ledger=1e-6)
    with method.prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(td)
        assert not hooked.context.unhandled
    at_layer, as_a_whole = expected(net, td["x"])
    torch.testing.assert_close(td["attr_at", "attention"], at_layer)
    assert not torch.allclose(td["attr", "x"], as_a_whole)


def test_in_single_precision_the_attention_gives_the_same_to_the_digits_it_holds():
    net, td = Net().double(), inputs()
    exact = explained(net, td.copy(), on_attention)["attr", "x"]
    single = explained(net.float(), td.float(), on_attention)["attr", "x"]
    assert single.dtype == torch.float32
    assert (single.double() - exact).abs().max() < 1e-4 * exact.abs().max()
