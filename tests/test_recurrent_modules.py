"""Gate rules through the public road: policies, torchrl's modules, transforms, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode
from torchrl.modules.tensordict_module.rnn import GRU as PythonGRU
from torchrl.modules.tensordict_module.rnn import LSTM as PythonLSTM

import reference_recurrent as ref
from pristine import bits
from rule_samples import only
from tdhook_like import LRP, AtStep
from tdhook_like.attribution.lrp import EpsilonPlus, Inputs
from tdhook_like.attribution.lrp.recurrent.rules import (
    HalfRule,
    ProportionalRule,
    RecurrentRule,
    SignalTakesAllRule,
)
from tdhook_like.attribution.lrp.rules.stabilizer import ClippedStabilizer
from tdhook_like.errors import RuleError
from tdhook_like.hooks.surrogate import Twice
from tdhook_like.targets import Each
from torchrl_records.nets import recurrent, steps

F, H, B, T = 3, 4, 2, 4
F64, F32 = torch.float64, torch.float32

# torch looks at the gradient of what the scan back end closes over, as it compiles that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

RULES = [SignalTakesAllRule(1e-3), HalfRule(1e-3), ProportionalRule(1e-3, absolute=True)]
SHARES = [ref.all_to_signal, ref.half_each, ref.in_proportion_of_sizes]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def assert_like(got: Tensor, want: Any, most: float) -> None:
    want = torch.as_tensor(want, dtype=F64)
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= most


# --- through the public road ----------------------------------------------------------------------


class Policy(nn.Module):
    """A recurrent net and a head, over the batch's own sequences."""

    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(H, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        out, _ = self.rnn(x, (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()))
        return self.head(out[:, -1])


KEYS = ["x", "h", "c"]


def played(dtype: torch.dtype = F32) -> tuple[Policy, TensorDict]:
    torch.manual_seed(0)
    policy = Policy(nn.LSTM(F, H, num_layers=2, batch_first=True)).to(dtype)
    shapes = {"x": (B, T, F), "h": (B, 2, H), "c": (B, 2, H)}
    return policy, TensorDict({k: torch.randn(v).to(dtype) for k, v in shapes.items()}, [B])


@pytest.mark.parametrize("how", ["mapper", "by hand"])
def test_every_step_and_every_state_of_a_policy_gets_its_relevance(how):
    policy, td = played(F64)
    rule = HalfRule(1e-3)
    mapper = EpsilonPlus(1e-3, rule_mapper=only(policy.rnn, rule) if how == "mapper" else None)
    context = LRP(mapper, ("y", 1)).prepare(policy, KEYS, ["y"])
    if how == "by hand":
        handle = rule.register(policy.rnn)
    with context as hooked:
        td = hooked(td)
    if how == "by hand":
        handle.remove()
    y, out = td["y"][:, 1], policy.rnn(td["x"], tuple(td[k].transpose(0, 1) for k in "hc"))[0]
    assert torch.equal(td["y"], policy(*(td[k] for k in KEYS)))
    factor = (y / (y + 1e-3 * y.sign())).detach()
    for b in range(B):
        v_last = policy.head.weight[1] * factor[b]
        v = torch.cat([torch.zeros(T - 1, H, dtype=F64), v_last[None]]).tolist()
        states = [td[k][b].tolist() for k in "hc"]
        nothing = [[[0.0] * H] * 2] * 2
        want, (want_h, want_c) = ref.relevance(
            policy.rnn, td["x"][b].tolist(), states, v, nothing, ref.half_each, 1e-3
        )
        assert out.shape == (B, T, H)
        for key, expected in (("x", want), ("h", want_h), ("c", want_c)):
            assert_like(td["attr", key][b], expected, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_what_it_is_and_finite(dtype):
    policy, td = played(dtype)
    with LRP(EpsilonPlus(rule_mapper=only(policy.rnn, SignalTakesAllRule())), ("y", 0)).prepare(
        policy, KEYS, ["y"]
    ) as hooked:
        td = hooked(td)
    for key in KEYS:
        assert td["attr", key].dtype == dtype
        assert torch.isfinite(td["attr", key]).all() and td["attr", key].any()


def test_each_output_apart_is_what_one_alone_is():
    policy, td = played(F64)
    mapper = EpsilonPlus(rule_mapper=only(policy.rnn, HalfRule()))
    with LRP(mapper, Each("y")).prepare(policy, KEYS, ["y"]) as hooked:
        together = hooked.observe(td.copy())["attr", "x"]
    for action in range(2):
        with LRP(mapper, ("y", action)).prepare(policy, KEYS, ["y"]) as hooked:
            alone = hooked.observe(td.copy())["attr", "x"]
        torch.testing.assert_close(together[:, action], alone)


# --- torchrl's modules over time ------------------------------------------------------------------

KINDS = {"LSTM": (LSTMModule, ["h", "c"]), "GRU": (GRUModule, ["h"])}
BACKENDS: dict[str, dict[str, Any]] = {
    "pad": {},
    "python": {"python_based": True},
    "scan": {"recurrent_backend": "scan"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def agent(kind: str, backend: str) -> Any:
    torch.manual_seed(0)
    module, states = KINDS[kind]
    return recurrent(module, states, num_layers=2, **BACKENDS[backend]).to(F64)


def episode(kind: str, *, states: bool = True, resets: bool = True) -> TensorDict:
    torch.manual_seed(1)
    names = KINDS[kind][1] if states else []
    td = steps(3, T, states=(), resets=resets)
    for name in names:
        td.set(name, torch.randn(3, T, 2, 8))
    return td.apply(lambda x: x.double() if x.is_floating_point() else x)


def of_kind(kind: str, rule: RecurrentRule) -> EpsilonPlus:
    """Epsilon on dense layers, and the rule on torchrl's module itself."""
    module = KINDS[kind][0]
    return EpsilonPlus(1e-3, rule_mapper=lambda n, m: rule if type(m) is module else None)


def over_time(model: Any, mapper: Any, td: TensorDict, step: int = -1) -> TensorDict:
    method = LRP(mapper, AtStep(("logits", 0), step))
    with method.prepare(model) as hooked, set_recurrent_mode():
        return hooked(td)


@every_rule
@every_backend
@every_kind
def test_relevance_over_time_is_that_of_the_trajectory_that_the_step_belongs_to(
    kind, backend, rule
):
    model, td = agent(kind, backend), episode(kind)
    names, rnn = KINDS[kind][1], model[0].lstm if kind == "LSTM" else model[0].gru
    found = over_time(model, of_kind(kind, rule), td)
    share = SHARES[RULES.index(rule)]
    for row, start in enumerate((0, 2, 2)):  # where the last trajectory begins
        y = found["logits"][row, -1, 0].item()
        head = model[1].module.weight[0].detach() * (y / ref.stabilised(y, 1e-3))
        v = torch.zeros(T - start, 8, dtype=F64)
        v[-1] = head
        states = [td[name][row, start].tolist() for name in names]
        nothing = [[[0.0] * 8] * 2 for _ in names]
        want, want_states = ref.relevance(
            rnn, td["observation"][row, start:].tolist(), states, v.tolist(), nothing, share, 1e-3
        )
        got = found["attr", "observation"][row]
        assert not got[:start].any()
        assert_like(got[start:], want, 1e-8)
        for name, expected in zip(names, want_states, strict=True):
            got = found["attr", name][row]
            assert_like(got[start], expected, 1e-8)
            assert not got[:start].any() and not got[start + 1 :].any()


@every_backend
@every_kind
def test_what_a_module_writes_is_its_own_to_the_last_bit(kind, backend):
    model, td = agent(kind, backend), episode(kind)
    with set_recurrent_mode():
        plain = model(td.copy())
    found = over_time(model, of_kind(kind, HalfRule()), td.copy())
    for key in ("embed", "logits", *(("next", name) for name in KINDS[kind][1])):
        assert bits(found[key]) == bits(plain[key])


@pytest.mark.parametrize("backend", ["pad", "python"])
@pytest.mark.parametrize("resets", [False, True])
@every_kind
def test_a_rule_may_sit_on_the_net_inside_where_the_back_end_calls_it(kind, resets, backend):
    model, td = agent(kind, backend), episode(kind, resets=resets)
    around = over_time(model, of_kind(kind, HalfRule(1e-3)), td.copy())
    inner = EpsilonPlus(
        1e-3, rule_mapper=lambda n, m: HalfRule(1e-3) if isinstance(m, nn.RNNBase) else None
    )
    inside = over_time(model, inner, td.copy())
    for key in ("observation", *KINDS[kind][1]):
        torch.testing.assert_close(inside["attr", key], around["attr", key], rtol=1e-9, atol=1e-12)


@every_backend
@every_kind
def test_absent_states_are_zeros_that_have_no_relevance(kind, backend):
    model, td = agent(kind, backend), episode(kind, states=False)
    absent = over_time(model, of_kind(kind, HalfRule()), td.copy())
    for name in KINDS[kind][1]:
        td.set(name, torch.zeros(3, T, 2, 8, dtype=F64))
    present = over_time(model, of_kind(kind, HalfRule()), td)
    key = ("attr", "observation")
    torch.testing.assert_close(absent[key], present[key])
    for name in KINDS[kind][1]:  # up to what stands for an exact zero
        assert present["attr", name].abs().max() < 1e-12


@every_kind
def test_one_step_at_a_time_a_new_episode_s_state_has_no_relevance(kind):
    model, td = agent(kind, "pad"), episode(kind)[:, 0]
    td["is_init"][1] = True
    with LRP(of_kind(kind, SignalTakesAllRule()), ("logits", 0)).prepare(model) as hooked:
        found = hooked(td)
    for name in KINDS[kind][1]:
        relevance = found["attr", name].abs().flatten(1).sum(1)
        assert torch.equal(relevance > 0, ~td["is_init"].squeeze(-1))


@every_kind
def test_relevance_sums_up_over_steps_keys_and_states(kind):
    states = KINDS[kind][1]
    model = recurrent(KINDS[kind][0], states, bias=False).to(F64)
    model[1].module.bias.data.zero_()
    td = episode(kind)
    for name in states:
        td.set(name, torch.randn(3, T, 1, 8, dtype=F64))
    rule = HalfRule(1e-15)
    mapper = EpsilonPlus(
        1e-15, rule_mapper=lambda n, m: rule if isinstance(m, nn.RNNBase) else None
    )
    for step in range(T):
        found = over_time(model, mapper, td.copy(), step)
        total = sum(found["attr", key].flatten(1).sum(1) for key in ("observation", *states))
        torch.testing.assert_close(total, found["logits"][:, step, 0], rtol=1e-6, atol=1e-8)


def test_a_state_at_a_later_step_without_a_reset_is_not_read():
    model, td = agent("LSTM", "pad"), episode("LSTM", resets=False)
    found = over_time(model, of_kind("LSTM", HalfRule()), td)
    for name in ("h", "c"):
        assert found["attr", name][:, 0].all() and not found["attr", name][:, 1:].any()


# --- transforms -----------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("build", [PythonLSTM, PythonGRU], ids=["LSTM", "GRU"])
def test_stacked_nets_under_vmap_are_each_net_alone(build, rule):
    nets = [build(F, H).to(F64) for _ in range(3)]
    params, _ = torch.func.stack_module_state(nets)  # pyright: ignore[reportArgumentType]
    x = torch.randn(3, B, T, F, dtype=F64)

    def attributed(params: dict[str, Tensor], x: Tensor) -> Tensor:
        class Ruled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = nets[0]

            def forward(self, x: Tensor) -> Tensor:
                return rule.apply(self.net, Inputs((x,)), self.net(x))[0].sum()

        named = {f"net.{name}": value for name, value in params.items()}
        return torch.func.grad(lambda x: torch.func.functional_call(Ruled(), named, (x,)))(x)

    found = torch.vmap(attributed)(params, x)
    for net, given, got in zip(nets, x, found, strict=True):
        leaf = given.clone().requires_grad_()
        out, _ = rule.apply(net, Inputs((leaf,)), net(leaf))
        torch.testing.assert_close(got, torch.autograd.grad(out.sum(), leaf)[0])


@every_rule
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_relevance_can_be_differentiated_itself(kind, rule):
    net = getattr(nn, kind)(F, H).to(F64)
    x = torch.randn(3, 1, F, dtype=F64, requires_grad=True)
    weight = torch.randn_like(x)

    def relevance(x: Tensor, twice: Twice) -> Tensor:
        with twice:
            out, _ = rule.apply(net, Inputs((x,)), net(x))
            twice.relevance = True
            (g,) = torch.autograd.grad(out[-1].sum(), x, create_graph=True)
            twice.relevance = False
        return (x * g * weight).sum()

    (found,) = torch.autograd.grad(relevance(x, Twice()), x)
    for place in ((0, 0, 1), (1, 0, 0), (2, 0, 2)):
        moved = [x.detach().clone().requires_grad_() for _ in range(2)]
        for sign, leaf in zip((1, -1), moved, strict=True):
            leaf.data[place] += sign * 1e-6
        high, low = (relevance(leaf, Twice()).item() for leaf in moved)
        assert abs((high - low) / 2e-6 - found[place].item()) <= 1e-5 * max(1, found.abs().max())


# --- what is refused ------------------------------------------------------------------------------


def test_dropout_between_layers_is_refused_while_training_and_harmless_otherwise():
    model = nn.LSTM(F, H, num_layers=2, dropout=0.5)
    x = torch.randn(T, B, F)
    with pytest.raises(RuleError, match=r"dropout of 0\.5 .* eval\(\)"):
        HalfRule().apply(model, Inputs((x,)), model(x))
    policy, td = played()
    policy.rnn.dropout = 0.5
    mapper = EpsilonPlus(rule_mapper=only(policy.rnn, HalfRule()))
    with LRP(mapper, ("y", 0)).prepare(policy, KEYS, ["y"]) as hooked:
        assert hooked.observe(td)["attr", "x"].any()  # evaluates
    assert policy.rnn.training


def test_a_module_without_gates_is_refused_before_anything_runs():
    with pytest.raises(RuleError, match=r"reads the gates of nn\.LSTM"):
        HalfRule().register(nn.Linear(2, 2))
    with pytest.raises(RuleError, match="'head'"):
        policy, _ = played()
        LRP(only(policy.head, HalfRule()), "y").prepare(policy, KEYS, ["y"])


def test_a_class_that_computes_something_else_is_found_out():
    class Louder(nn.LSTM):
        def forward(self, *args: Any) -> Any:
            out, states = super().forward(*args)
            return 2 * out, states

    class GRUCell(nn.RNNCellBase):
        def __init__(self) -> None:
            super().__init__(F, H, True, 3)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return h + x.sum()

    x = torch.randn(T, B, F)
    for module, args in ((Louder(F, H), (x,)), (GRUCell(), (x[0], torch.rand(B, H)))):
        with pytest.raises(RuleError, match="does not compute what torch's own"):
            HalfRule().apply(module, Inputs(args), module(*args))


def test_a_module_that_overwrites_what_it_reads_is_refused_with_a_way_out():
    module = LSTMModule(
        8, 8, in_keys=["embed", "h", "c"], out_keys=["embed", ("next", "h"), ("next", "c")]
    )
    td = TensorDict({"embed": torch.randn(B, 8), "is_init": torch.zeros(B, 1).bool()}, [B])
    with pytest.raises(RuleError, match=r"'embed' is overwritten .* 'lstm' inside"):
        HalfRule().apply(module, Inputs((td,)), module(td))


@pytest.mark.parametrize("epsilon", [0, -1.0, float("nan"), "1e-6", True])
@pytest.mark.parametrize("rule", [SignalTakesAllRule, HalfRule, ProportionalRule])
def test_epsilon_is_a_number_above_zero_or_a_stabiliser(rule, epsilon):
    with pytest.raises(RuleError, match="epsilon must be a finite number above 0"):
        rule(epsilon)
    net, x = nn.GRU(F, H), torch.randn(T, B, F, requires_grad=True)
    out, _ = rule(ClippedStabilizer(1e-3)).apply(net, Inputs((x,)), net(x))
    assert torch.autograd.grad(out.sum(), x)[0].all()


def test_a_rule_without_shares_says_so():
    with pytest.raises(RuleError, match="must override shares"):
        net, x = nn.LSTM(F, H), torch.randn(T, B, F)
        RecurrentRule().apply(net, Inputs((x,)), net(x))
