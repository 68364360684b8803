"""Function rules where models meet them: reports, rules of one's own, attention layers, transforms."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from function_calls import numbers
from tdhook_like import LRP, UnhandledOperationWarning
from tdhook_like.attribution.lrp import CPLRP, AttnLRP, FunctionRule, FunctionRules, Rule
from tdhook_like.errors import RuleError
from test_function_rules import Calls, Nothing, explained, worst

# --- what nobody handles --------------------------------------------------------------------------


def test_a_function_that_nobody_handles_follows_its_gradient_and_is_reported_once():
    xs = [numbers(2, 6), numbers(2, 6, seed=1)]
    keys = ["a", "b"]
    td = TensorDict(dict(zip(keys, xs, strict=True)), [2])
    method = LRP(Nothing(FunctionRules()), lambda td: td["y"].sum(-1))
    context = method.prepare(Calls(torch.atan2), in_keys=keys, out_keys=["y"])
    with context as hooked:
        with pytest.warns(UnhandledOperationWarning, match=r"atan2\(\)") as caught:
            hooked(td)
        assert len(caught) == 1
        hooked(td)  # warnings are errors here
    assert set(context.unhandled) == {"atan2"}
    square = xs[0] ** 2 + xs[1] ** 2
    torch.testing.assert_close(td["attr", "a"], xs[0] * xs[1] / square)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + torch.round(x).detach(),
        lambda x: x * torch.round(torch.ones(6) * 1.5),
        lambda x: x[:, x[0].round().argsort()],
        lambda x: x * F.cosine_similarity(torch.ones(2, 3), torch.ones(2, 3), dim=-1)[:, None],
    ],
)
def test_a_function_that_no_relevance_reaches_is_not_reported(function):
    _, _, _, context = explained(function, [numbers(2, 6)], unhandled="raise")
    assert not context.unhandled


def test_a_name_that_torch_does_not_have_is_refused_with_those_that_it_has():
    with pytest.raises(RuleError, match=r"torch has no function 'soft_max'"):
        FunctionRules(rules={"soft_max": None})
    with pytest.raises(RuleError, match=r"'gelus'.*\Z"):
        FunctionRules(rules={"gelus": None})
    with pytest.raises(RuleError, match="must be a FunctionRule or None"):
        FunctionRules(rules={"gelu": nn.GELU()})  # pyright: ignore
    with pytest.raises(RuleError, match="attention must be"):
        FunctionRules(attention="detach")
    with pytest.raises(RuleError, match="gates must be"):
        FunctionRules(gates="all")


# --- rules of one's own ---------------------------------------------------------------------------


class Doubled(FunctionRule):
    """Twice the relevance passes."""

    def surrogate(self, flow: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = flow.operands(args, kwargs)
        return x * (2 * output / x).detach()


@pytest.mark.parametrize("name", ["tanh", "tanh_", "special_tanh"])
@pytest.mark.parametrize("call", [torch.tanh, Tensor.tanh, lambda x: (x * 1).tanh_(), F.tanh])
def test_a_rule_of_ones_own_is_taken_for_all_spellings(name, call):
    found, _, R, _ = explained(call, [numbers(2, 6)], FunctionRules(rules={name: Doubled()}))
    torch.testing.assert_close(found[0], 2 * R)


def test_none_in_place_of_a_rule_gives_a_functions_own_gradient():
    x = numbers(2, 6)
    found, y, R, _ = explained(torch.tanh, [x], FunctionRules(rules={"tanh": None}))
    torch.testing.assert_close(found[0], x * (1 - y**2) * R / y)


def test_a_rule_may_stand_for_what_nobody_handles():
    found, _, R, context = explained(
        lambda x: torch.round(x * 4), [numbers(2, 6)], FunctionRules(rules={"round": Doubled()})
    )
    torch.testing.assert_close(found[0], 2 * R)
    assert context.applied["round"] and not context.unhandled


class Halves(FunctionRule):
    """Of a function that gives two tensors."""

    def surrogate(self, flow: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        return output[0] / 2, None


def test_a_rule_gives_a_surrogate_for_each_of_several_outputs():
    def both(x: Tensor) -> Tensor:
        first, second = torch.aminmax(x, dim=-1)
        return torch.stack([first, second], -1)

    x = numbers(2, 6)
    found, _, R, _ = explained(both, [x], FunctionRules(rules={"aminmax": Halves()}))
    torch.testing.assert_close(found[0].sum(-1), R[:, 0] / 2 + R[:, 1])


class Wrong(FunctionRule):
    """Of another shape."""

    def surrogate(self, flow: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return output.sum()


def test_a_surrogate_of_another_shape_is_refused_with_the_functions_name():
    with pytest.raises(RuleError, match=r"Wrong on tanh\(\) gave a surrogate of shape \(\)"):
        explained(torch.tanh, [numbers(2, 6)], FunctionRules(rules={"tanh": Wrong()}))
    with pytest.raises(RuleError, match=r"Wrong on aminmax\(\), which gives 2 tensors"):
        explained(
            lambda x: torch.aminmax(x)[0],
            [numbers(2, 6)],
            FunctionRules(rules={"aminmax": type("Wrong", (Wrong,), {"surrogate": _one})()}),
        )
    with pytest.raises(RuleError, match="must override surrogate"):
        explained(torch.tanh, [numbers(2, 6)], FunctionRules(rules={"tanh": FunctionRule()}))


def _one(self: Any, flow: Any, output: Any, *args: Any, **kwargs: Any) -> Tensor:
    return output[0]


# --- what depends on the inputs, and what does not ------------------------------------------------


class Scaled(nn.Module):
    """Scales by parameters, in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(6))
        self.gate = nn.Parameter(numbers(6, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 + self.weight)
        x = x * self.gate.sigmoid() / self.weight.norm()
        return x @ torch.outer(self.gate, self.weight)


def test_factors_made_of_parameters_alone_take_no_relevance():
    net, x = Scaled(), numbers(2, 6)
    found, _, R, context = explained(net, [x])
    assert not context.applied
    torch.testing.assert_close(found[0].sum(-1), R.sum(-1))


def test_a_weight_of_a_parametrization_takes_no_relevance():
    net = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3, bias=False).double())
    found, _, R, context = explained(lambda x: F.linear(x, net.weight), [numbers(2, 6)])
    assert not context.applied and not context.unhandled
    torch.testing.assert_close(found[0].sum(-1), R.sum(-1))


def test_writing_into_out_is_refused_by_torch_as_ever():
    def function(x: Tensor) -> Tensor:
        return torch.tanh(x, out=torch.empty_like(x))

    with pytest.raises(RuntimeError, match="out="):
        explained(function, [numbers(2, 6)])


def test_an_in_place_product_with_a_view_gives_what_it_gives_out_of_place():
    def written(x: Tensor, g: Tensor) -> Tensor:
        y = x * 1
        y[:, 1:] *= g
        return y.exp()

    def fresh(x: Tensor, g: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[:, 1:] * g], 1).exp()

    xs = [numbers(2, 4), numbers(2, 3)]
    (one, *_), (other, *_) = explained(written, xs), explained(fresh, xs)
    assert worst(one, other) < 1e-14


def test_a_product_of_mixed_entries_is_no_gate():
    weight = numbers(6, 6, seed=4)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return x * F.linear(torch.sigmoid(y), weight)

    xs = [numbers(2, 6), numbers(2, 6, seed=1)]
    found, _, R, _ = explained(function, xs, FunctionRules(gates="signal"))
    torch.testing.assert_close(found[0], R / 2)


# --- layers of attention --------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_multi_head_attention_is_the_attention_that_it_is_made_of(weights, constant):
    layer = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = numbers(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def function(x: Tensor) -> Tensor:
        return layer(x, x, x, key_padding_mask=mask, need_weights=weights)[0]

    def by_hand(x: Tensor) -> Tensor:
        packed = x @ layer.in_proj_weight.T + layer.in_proj_bias
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in packed.chunk(3, -1))
        scores = halves(q, k.mT) / 2
        A = scores.masked_fill(mask[:, None, None], -torch.inf).softmax(-1)
        y = A.detach() @ v if constant else halves(A, v)
        return layer.out_proj(y.transpose(1, 2).flatten(2))

    def halves(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.detach() + a.detach() @ b) / 2

    functions = FunctionRules(attention="constant" if constant else "gradient")
    found, y, R, _ = explained(function, [x], functions)
    leaf = x.clone().requires_grad_()
    want = leaf * torch.autograd.grad(by_hand(leaf), leaf, R / y)[0]
    assert worst(found, [want.detach()]) < 1e-10


@pytest.mark.parametrize("mapper", [AttnLRP, CPLRP])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_encoder_accounts_for_all_relevance(mapper, norm_first):
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, activation="gelu", batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    td = TensorDict({"x": numbers(2, 3, 8)}, [2])
    method = LRP(mapper(1e-15), ("y", 0, 1), ledger=1e-6, unhandled="raise")
    with method.prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
        hooked(td)
        assert hooked.ledger is not None
        assert ("softmax" in hooked.ledger.causes) == (mapper is AttnLRP)
    torch.testing.assert_close(td["y"], net(td["x"]))
    if mapper is CPLRP:
        torch.testing.assert_close(td["attr", "x"].sum((1, 2)), td["y"][:, 0, 1], rtol=1e-4, atol=0)


# --- ways to run a model --------------------------------------------------------------------------


class Block(nn.Module):
    """Functions around a layer, perhaps not kept but run again."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.layer, self.again = nn.Linear(6, 6, dtype=torch.float64), again

    def inside(self, x: Tensor) -> Tensor:
        y = F.softmax(self.layer(x).tanh(), -1)
        return x * torch.sigmoid(y) + F.layer_norm(y * x, (6,))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=False) if self.again else self.inside(x)


def test_a_checkpointed_block_gives_what_it_gives_otherwise():
    kept = Block(again=False)
    again = copy.deepcopy(kept)
    again.again = True
    (one, *_), (other, *_) = (explained(net, [numbers(2, 6)]) for net in (kept, again))
    assert worst(one, other) == 0


def test_autocast_gives_nearly_what_full_precision_gives():
    net, x = Block(again=False).float(), numbers(2, 6).float()
    want, *_ = explained(net, [x])

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float()

    found, *_ = explained(cast, [x])
    assert worst(found, want) < 0.03


def test_a_call_leaves_nothing_behind():
    net, x = Block(again=False), numbers(2, 6)
    seen: list[Any] = []

    def watched(x: Tensor) -> Tensor:
        y = net(x)
        seen.append(weakref.ref(y))
        return y * 1.5

    gc.disable()
    try:
        explained(watched, [x])
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


class Differentiating(Rule):
    """A rule that takes a gradient of its own in the backward pass."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def relevance(self, module: Any, inputs: Any, output: Any, R_out: Tensor) -> Tensor:
        x = inputs[0].detach().requires_grad_()
        with torch.enable_grad():
            gradient = torch.autograd.grad((x * x).pow(2).sum() + x.tanh().sum(), x)[0]
        want = 4 * x.detach() ** 3 + 1 - x.detach().tanh() ** 2
        self.errors.append((gradient - want).abs().max().item())
        return R_out


def test_what_a_rule_computes_in_the_backward_pass_has_no_rules():
    rule, layer = Differentiating(), nn.Linear(6, 6, dtype=torch.float64)
    net = nn.Sequential(layer, Calls(torch.tanh))
    mapper = lambda name, module: rule if module is layer else None  # noqa: E731
    with LRP(mapper, ("y", 0)).prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
        hooked(TensorDict({"x": numbers(2, 6)}, [2]))
    assert rule.errors and max(rule.errors) < 1e-12


class Blocked(torch.autograd.Function):
    """Lets no gradient pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # pyright: ignore
        return None


@pytest.mark.parametrize("function", [torch.tanh, torch.atan2, torch.mul, torch.matmul, F.softmax])
def test_nothing_may_arrive_at_a_function(function):
    def of(x: Tensor) -> Tensor:
        y = x * 2
        given = (y, -1) if function is F.softmax else (y,) if function is torch.tanh else (y, x)
        return x + Blocked.apply(function(*given))  # pyright: ignore

    x = numbers(3, 3)
    found, _, R, _ = explained(of, [x], unhandled="raise")
    torch.testing.assert_close(found[0], x / of(x) * R)
