"""The ledger: it closes, changes nothing, costs nothing when off, and its causes are those by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pristine import assert_same, bits, snapshot
from tdhook_like import LRP, Each, EpsilonPlus
from tdhook_like.attribution.lrp import (
    CPLRP,
    AlphaBetaRule,
    EpsilonRule,
    FunctionRules,
    IgnoreRule,
    Inputs,
    PassRule,
    Rule,
    SignalTakesAllRule,
    SoftmaxEpsilonRule,
    StopRule,
    UniformEpsilonRule,
    UniformRule,
    ZPlusRule,
)
from tdhook_like.attribution.lrp.ledger.accounts import CAUSES, Ledger, Row
from tdhook_like.errors import ConservationError, RuleError

F64 = torch.float64
B = 5


# --- models with something to account for ---------------------------------------------------------


class Functional(nn.Module):
    """Additions of constants, a mask, positions, biases of functional layers, a norm, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 6)
        self.norm = nn.LayerNorm(6)
        self.w, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(len(x), 4, 6) + self.table(torch.arange(4))
        h = self.norm(h) + 0.5
        h = torch.addmm(self.b, h.flatten(0, 1), self.w).reshape(h.shape)
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        weights = (h @ F.linear(h, self.w, self.b).mT).masked_fill(~mask, -torch.inf).softmax(-1)
        h = h + weights @ F.gelu(h)
        return self.head(F.relu(h).mean(1))


class Overwrites(nn.Module):
    """In-place modules and functions, views that are written to, a buffer that is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 6), nn.Linear(6, 3)
        self.act = nn.LeakyReLU(0.3, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h += 0.5
        h[:, 2:] *= 2.0
        h[:, 0] = h[:, 1] * 3
        held = torch.zeros(len(x), 6, dtype=x.dtype)
        held[:, 3:] = self.act(h)[:, :3]
        held.add_(h)
        return self.second(held.tanh_())


class Twice(nn.Module):
    """One layer that is used twice, and a container with a rule of its own around layers with rules."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(24, 24)
        self.block = nn.Sequential(nn.Linear(24, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.again(torch.tanh(self.again(x))) + x)


class Branches(nn.Module):
    """A branch that is stopped, added to, joined with and multiplied by one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.stop = nn.Linear(24, 6), nn.Linear(24, 6), nn.Identity()
        self.behind, self.joined = nn.Linear(6, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), torch.sigmoid(self.behind(self.stop(self.right(x))))
        return self.joined(torch.cat([left + right, right], -1)) * right[:, :3]


class Summed(nn.Module):
    """Takes its inputs by name."""

    def forward(self, one: Tensor, *, other: Tensor) -> Tensor:
        return one + other


class Named(nn.Module):
    """Calls modules with keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.sum, self.first, self.last = Summed(), nn.Linear(24, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(input=x)
        return self.last(input=self.sum(h, other=torch.tanh(h)) + h)


class Recurrent(nn.Module):
    """An LSTM over steps, time in front."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.lstm(x.reshape(len(x), 4, 6).transpose(0, 1))
        return self.head(steps[-1])


class Checkpointed(nn.Module):
    """A block that runs again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda h: self.block(h) + 1.0, x, use_reentrant=False)
        return self.head(torch.tanh(h))  # pyright: ignore[reportArgumentType]


class Vmapped(nn.Module):
    """Three networks' parameters, stacked, and one pass over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
        many = {
            name: torch.stack([torch.randn_like(p) for _ in range(3)]).double()
            for name, p in self.net.named_parameters()
        }
        self.many = nn.ParameterDict({name.replace(".", "_"): p for name, p in many.items()})

    def forward(self, x: Tensor) -> Tensor:
        names = [name for name, _ in self.net.named_parameters()]
        many = {name: self.many[name.replace(".", "_")] for name in names}

        def one(parameters: Any, x: Tensor) -> Tensor:
            return torch.func.functional_call(self.net, parameters, (x,))

        return torch.vmap(one, (0, 1), out_dims=1)(many, x.reshape(len(x), 3, 8)).squeeze(-1)


class Normed(nn.Module):
    """Batch norms behind layers: one alone, two on one layer's output, one on a layer used otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(1, 3, 3, padding=1, bias=False), nn.BatchNorm1d(3)
        self.conv2, self.bn2, self.bn3 = nn.Conv1d(3, 3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.bn4, self.conv3 = nn.BatchNorm1d(3), nn.Conv1d(3, 2, 2)
        self.head = nn.Linear(42, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x.unsqueeze(1))))
        h = self.conv2(h)
        h = self.bn2(h) + self.bn3(h) + h
        return self.head(self.conv3(self.bn4(torch.relu(h))).flatten(1))


class Halved(Rule):
    """Gives on half, in the papers' terms."""

    def relevance(self, module: nn.Module, inputs: Inputs, output: Any, R_out: Any) -> Any:
        return R_out / 2


class Thirds(Rule):
    """Gives on a third, as a gradient."""

    absorbs = "two thirds"

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        return inputs[0] * (output / inputs[0] / 3).detach()


def by_path(**rules: Rule | None) -> Callable[[str, nn.Module], Rule | None]:
    """A mapper with rules by path, and EpsilonPlus elsewhere."""
    usual = EpsilonPlus(epsilon=1e-3, stabilizer=1e-3)
    return lambda path, module: rules[path] if path in rules else usual(path, module)


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 9), nn.ReLU(), nn.Softmax(-1), nn.Linear(9, 3)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "layers": (sequential, by_path()),
    "z-plus": (sequential, by_path(**{"0": ZPlusRule(0.1), "2": AlphaBetaRule(2.0, 1.0)})),
    "a softmax with its rule": (sequential, by_path(**{"4": SoftmaxEpsilonRule(0.1)})),
    "no rule": (sequential, lambda path, module: None),
    "ignored": (sequential, lambda path, module: IgnoreRule()),
    "a stop in a chain": (sequential, by_path(**{"1": StopRule()})),
    "rules of one's own": (sequential, by_path(**{"1": Halved(), "3": Thirds()})),
    "functional": (Functional, by_path()),
    "functional, CP-LRP": (Functional, CPLRP()),
    "overwriting": (Overwrites, by_path()),
    "overwriting, with a rule": (Overwrites, by_path(act=EpsilonRule(0.1))),
    "overwriting, passed": (Overwrites, by_path(act=PassRule())),
    "overwriting, ignored": (Overwrites, by_path(act=IgnoreRule())),
    "used twice": (Twice, by_path()),
    "nested": (Twice, by_path(block=EpsilonRule(0.1))),
    "nested, inside without rules": (
        Twice,
        lambda path, module: EpsilonRule(0.1) if path in ("again", "block") else None,
    ),
    "nested, around the whole": (Twice, by_path(**{"": EpsilonRule(0.2)})),
    "a stop around rules": (Twice, by_path(block=StopRule())),
    "a stopped branch": (Branches, by_path(stop=StopRule())),
    "by name": (Named, by_path(sum=UniformEpsilonRule(0.1))),
    "by name, shared evenly": (Named, by_path(sum=UniformRule())),
    "recurrent": (Recurrent, by_path(lstm=SignalTakesAllRule())),
    "recurrent by its gradient": (Recurrent, by_path(lstm=EpsilonRule())),
    "checkpointed": (Checkpointed, by_path()),
    "vmapped": (Vmapped, by_path()),
    "batch norm folded": (Normed, by_path()),
    "batch norm affine": (Normed, EpsilonPlus(batch_norm="affine")),
    "batch norm in a container": (Normed, by_path(**{"": EpsilonRule(0.1)})),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str, dtype: torch.dtype = F64) -> tuple[nn.Module, Any, Tensor]:
    """A model in evaluation mode whose parameters and statistics are those of no initialisation."""
    build, mapper = MODELS[name]
    net = build().to(dtype).eval()
    with torch.no_grad():
        for p in (*net.parameters(), *net.buffers()):
            if p.is_floating_point():
                p.add_(0.3 * torch.rand_like(p))
    return net, mapper, torch.randn(B, 24, dtype=dtype)


def run(net: nn.Module, mapper: Any, x: Tensor, target: Any = ("y", 0), **options: Any) -> Any:
    """The TensorDict with relevance, and the ledger."""
    options = {"unhandled": "ignore", "unreached": "ignore", **options}
    with LRP(mapper, target, **options).prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x.clone()}, [len(x)]))
        return td, hooked.ledger


def assert_rows_close(ledger: Ledger, tolerance: float = 1e-9) -> None:
    """``out = in + absorbed`` in every row, for every batch element and target."""
    for row in ledger.rows:
        inside = 0 if row.inside is None else row.inside
        rest = row.out - row.into - inside - sum(row.absorbed.values())
        assert rest.abs().max() <= tolerance * ledger.start.abs().max().clamp_min(1), row.where


def absorbed(row: Row, *causes: str) -> Tensor:
    """What a row absorbed, for some causes or for all of them."""
    found = [row.absorbed[c] for c in causes or row.absorbed if c in row.absorbed]
    return sum(found, torch.zeros_like(row.out))


# --- it closes, and changes nothing ---------------------------------------------------------------


@every_model
def test_of_every_elements_start_everything_arrives_or_was_absorbed(name: str):
    td, ledger = run(*made(name), ledger=True)
    assert_rows_close(ledger)
    scale = ledger.start.abs().max()
    assert ledger.gap.abs().max() <= 1e-9 * scale
    assert not any(row.spread for row in ledger.rows)
    torch.testing.assert_close(ledger.start[:, 0], td["y"][:, 0])
    torch.testing.assert_close(ledger.arrived[:, 0], td["attr", "x"].sum(-1))
    ledger.check(1e-6, allow=ledger.causes)


@every_model
def test_relevance_and_outputs_with_a_ledger_are_those_without_to_the_last_bit(name: str):
    net, mapper, x = made(name)
    plain, none = run(net, mapper, x)
    before = snapshot(net)
    td, ledger = run(net, mapper, x, ledger=True)
    assert none is None and ledger is not None
    assert_same(before, snapshot(net))
    assert bits(td["y"]) == bits(plain["y"])
    assert bits(td["attr", "x"]) == bits(plain["attr", "x"])


@every_model
def test_each_of_several_targets_and_outputs_has_columns_that_close(name: str):
    net, mapper, x = made(name)
    targets = {"first": ("y", 0), "all": Each("y"), "apart": lambda td: td["y"][..., 1].square()}
    _, ledger = run(net, mapper, x, targets, ledger=True)
    assert ledger.start.shape == (B, 5)
    assert_rows_close(ledger)
    assert ledger.gap.abs().max() <= 1e-9 * ledger.start.abs().max()
    torch.testing.assert_close(ledger.start[:, 0], ledger.start[:, 1])
    for row in ledger.rows:
        torch.testing.assert_close(row.out[:, 0], row.out[:, 1])


@every_model
def test_the_ledger_of_one_element_is_its_part_of_the_ledger_of_all(name: str):
    net, mapper, x = made(name)
    _, ledger = run(net, mapper, x, ledger=True)
    for i in range(B):
        _, alone = run(net, mapper, x[i : i + 1], ledger=True)
        for where in {row.where for row in ledger.rows}:
            for of in (lambda row: row.out, lambda row: row.into, absorbed):
                mine = sum((of(row)[i] for row in ledger.at(where)), torch.zeros(1, dtype=F64))
                own = sum((of(row)[0] for row in alone.at(where)), torch.zeros(1, dtype=F64))
                torch.testing.assert_close(mine, own, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["layers", "functional", "batch norm folded", "a stopped branch"])
def test_it_closes_in_single_precision_as_far_as_that_goes(name: str):
    _, ledger = run(*made(name, torch.float32), ledger=True)
    assert ledger.gap.abs().max() <= 1e-4 * ledger.start.abs().max()


@pytest.mark.parametrize("start", ["one", "value", torch.linspace(-1, 2, B, dtype=F64)])
@pytest.mark.parametrize("name", ["layers", "functional", "batch norm folded"])
def test_it_closes_whatever_relevance_is_started_with(name: str, start: Any):
    net, mapper, x = made(name)
    td, ledger = run(net, mapper, x, ledger=True, start=start)
    wanted = td["y"][:, 0] if isinstance(start, str) else start
    wanted = torch.ones(B, dtype=F64) if isinstance(start, str) and start == "one" else wanted
    torch.testing.assert_close(ledger.start[:, 0], wanted)
    assert ledger.gap.abs().max() <= 1e-9 * ledger.start.abs().max()


def test_two_keys_of_which_one_is_not_attributed_absorb_what_that_one_gets():
    net = nn.Linear(7, 2).double()

    class Joined(nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return torch.cat([x, z], -1)

    join: Any = TensorDictModule(Joined(), ["x", "z"], ["h"])
    last: Any = TensorDictModule(net, ["h"], ["y"])
    policy = TensorDictSequential(join, last)
    x, z = torch.randn(B, 4, dtype=F64), torch.randn(B, 3, dtype=F64)
    td = TensorDict({"x": x, "z": z}, [B])
    rule = EpsilonRule(1e-12)
    mapper = lambda path, module: rule if isinstance(module, nn.Linear) else None  # noqa: E731
    with LRP(mapper, ("y", 1), ledger=1e-9, keys=["x"]).prepare(policy) as hooked:
        hooked(td)
        ledger = hooked.ledger
    assert ledger is not None
    torch.testing.assert_close(
        ledger.absorbed("constant")[:, 0], z @ net.weight[1, 4:], rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(ledger.absorbed("bias")[:, 0], net.bias[1].expand(B))


# --- causes, by hand ------------------------------------------------------------------------------


def st(z: Tensor, epsilon: float) -> Tensor:
    """``z + ε·sign(z)`` with ``sign(0) = +1``."""
    return z + epsilon * torch.where(z < 0, -1.0, 1.0)


def test_epsilons_share_of_bias_and_stabiliser_is_what_the_formula_says():
    # Bach et al. 2015, eq. 58: R_i = Σ_j x_i w_ij R_j / st(y_j); so b_j R_j / st(y_j) goes to the bias
    # and ε·sign(y_j) R_j / st(y_j) to the stabiliser.
    epsilon, x = 0.3, torch.randn(B, 4, dtype=F64)
    net: Any = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    _, ledger = run(net, EpsilonPlus(epsilon=epsilon), x, ledger=True)
    y1 = x @ net[0].weight.T + net[0].bias
    h = y1.clamp(min=0)
    y2 = h @ net[2].weight[0] + net[2].bias[0]
    R2 = y2
    bias2, lost2 = net[2].bias[0] * R2 / st(y2, epsilon), R2 * (1 - y2 / st(y2, epsilon))
    R1 = h * net[2].weight[0] * (R2 / st(y2, epsilon)).unsqueeze(-1)
    R1 = torch.where(y1 > 0, R1, 0)
    bias1 = (net[0].bias * R1 / st(y1, epsilon)).sum(-1)
    lost1 = (R1 * (1 - y1 / st(y1, epsilon))).sum(-1)
    for path, bias, lost in (("0", bias1, lost1), ("2", bias2, lost2)):
        (row,) = ledger.at(path)
        torch.testing.assert_close(row.absorbed["bias"][:, 0], bias)
        torch.testing.assert_close(row.absorbed["stabiliser"][:, 0], lost)
    torch.testing.assert_close(ledger.at("2")[0].into[:, 0], R1.sum(-1))


def test_z_pluss_share_of_bias_and_stabiliser_is_what_the_formula_says():
    # z⁺: only positive parts of contributions and bias take part, p_j = Σ_i (x_i w_ij)⁺ + b_j⁺.
    epsilon, x = 0.2, torch.randn(B, 4, dtype=F64)
    layer = nn.Linear(4, 3).double()
    _, ledger = run(layer, lambda path, module: ZPlusRule(epsilon), x, ("y", 2), ledger=True)
    p = (x * layer.weight[2]).clamp(min=0).sum(-1) + layer.bias[2].clamp(min=0)
    y = x @ layer.weight[2] + layer.bias[2]
    (row,) = ledger.rows
    bias = layer.bias[2].clamp(min=0) * y / (p + epsilon)
    torch.testing.assert_close(row.absorbed.get("bias", torch.zeros(B, 1, dtype=F64))[:, 0], bias)
    torch.testing.assert_close(row.absorbed["stabiliser"][:, 0], y * epsilon / (p + epsilon))


def test_a_softmax_absorbs_what_its_jacobian_says():
    # AttnLRP, eq. 13: R_i = x_i (R_i − s_i Σ_j R_j) for R in units of the outputs' relevance.
    x = torch.randn(B, 4, dtype=F64)
    want = torch.zeros(B, dtype=F64)
    for b in range(B):
        s = x[b].softmax(-1)
        jacobian = torch.diag(s) - torch.outer(s, s)
        want[b] = s[1] - (x[b] * jacobian[1]).sum()
    net = nn.Softmax(-1)
    for model, mapper in (
        (net, lambda path, module: SoftmaxEpsilonRule(1e-12)),
        (net, lambda path, module: None),
        (nn.Sequential(), None),
    ):
        if mapper is None:
            model, mapper = _Calls(lambda x: x.softmax(-1)), EpsilonPlus()
        _, ledger = run(model, mapper, x, ("y", 1), ledger=True)
        torch.testing.assert_close(ledger.absorbed("softmax")[:, 0], want, rtol=1e-8, atol=1e-8)


class _Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_a_constant_summand_a_mask_and_a_functional_bias_absorb_their_parts():
    w, b, pos = (torch.randn(*shape, dtype=F64) for shape in ((3, 4), (3,), (3,)))
    x = torch.randn(B, 4, dtype=F64)

    def plain(x: Tensor) -> Tensor:
        h = F.linear(x, w, b) + pos
        return torch.where(torch.tensor([True, False, True]), h, 7.0).sum(-1, keepdim=True)

    _, ledger = run(_Calls(plain), EpsilonPlus(), x, "y", ledger=True)
    want = {"linear": (b[0] + b[2]), "add": pos[0] + pos[2], "where": torch.tensor(7.0, dtype=F64)}
    for name, value in want.items():
        (row,) = ledger.at(name)
        (absorbed,) = row.absorbed.values()
        torch.testing.assert_close(absorbed[:, 0], value.expand(B))
    assert ledger.causes == ("bias", "constant")


def test_what_arrives_at_a_stop_is_absorbed_there_and_layers_behind_it_absorb_their_own_part():
    epsilon, x = 0.5, torch.randn(B, 4, dtype=F64)
    net: Any = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    mapper = by_path(**{"1": StopRule(), "2": EpsilonRule(epsilon)})
    td, ledger = run(net, mapper, x, ledger=True)
    y = td["y"][:, 0]
    h = torch.tanh(net[0](x))
    arrives = (h * net[2].weight[0] * (y / st(y, epsilon)).unsqueeze(-1)).sum(-1)
    torch.testing.assert_close(ledger.absorbed("stop")[:, 0], arrives)
    torch.testing.assert_close(ledger.absorbed("bias")[:, 0], net[2].bias[0] * y / st(y, epsilon))
    assert not td["attr", "x"].any() and not ledger.arrived.any()


def test_rules_of_ones_own_are_told_by_the_name_they_give_or_as_the_rules_doing():
    _, ledger = run(*made("rules of one's own"), ledger=True)
    (halved,), (thirds,) = ledger.at("1"), ledger.at("3")
    torch.testing.assert_close(halved.absorbed["rule"], halved.out / 2)
    torch.testing.assert_close(thirds.absorbed["two thirds"], thirds.out * 2 / 3)


def test_an_operation_without_a_rule_is_in_the_ledger_and_what_it_loses_is_refused():
    x = torch.rand(B, 3, dtype=F64) + 0.5
    net = _Calls(lambda x: torch.atan2(x, torch.ones_like(x)).sum(-1, keepdim=True))
    _, ledger = run(net, EpsilonPlus(), x, "y", ledger=True)
    # By the gradient, x / (1 + x²) of each arctan(x) is given on.
    lost = (torch.atan(x) - x / (1 + x**2)).sum(-1)
    torch.testing.assert_close(ledger.absorbed("no rule")[:, 0], lost)
    assert ledger.gap.abs().max() < 1e-12
    with pytest.raises(ConservationError, match=r"no rule .*allow= more causes"):
        ledger.check(1e-6)
    ledger.check(1e-6, allow=["no rule"])
    with pytest.raises(ConservationError, match="no rule"):
        run(net, EpsilonPlus(), x, "y", ledger=1e-6)


def test_a_target_that_is_no_sum_of_outputs_absorbs_what_it_does_to_them():
    # log p_a = z_a − log Σ exp z: by its gradient, z_a − Σ p_i z_i arrives at the logits.
    x, net = torch.randn(B, 4, dtype=F64), nn.Linear(4, 3, bias=False).double()
    td, ledger = run(
        net, EpsilonPlus(epsilon=1e-12), x, lambda td: td["y"].log_softmax(-1)[..., 0], ledger=True
    )
    z = td["y"]
    want = z.log_softmax(-1)[:, 0] - (z[:, 0] - (z.softmax(-1) * z).sum(-1))
    torch.testing.assert_close(ledger.absorbed("target")[:, 0], want, rtol=1e-8, atol=1e-8)
    assert ledger.rows[-1].where == "(target)"


def test_rows_of_a_container_tell_only_what_its_inside_does_not():
    net, mapper, x = made("nested")
    _, ledger = run(net, mapper, x, ledger=True)
    (block,) = ledger.at("block")
    # By the container's ε alone; what biases inside absorb is told inside.
    assert set(block.absorbed) == {"stabiliser"}
    assert "bias" in ledger.at("block.0")[0].absorbed and "bias" in ledger.at("block.2")[0].absorbed
    assert len(ledger.at("again")) == 2
    bare = lambda path, module: EpsilonRule(0.1) if path == "block" else None  # noqa: E731
    _, ledger = run(net, bare, x, ledger=True)
    assert set(ledger.at("block")[0].absorbed) == {"stabiliser", "no rule"}


def test_a_merged_normalisation_shares_one_row_with_its_layer():
    conv: Any = nn.Conv1d(1, 2, 2).double()
    bn: Any = nn.BatchNorm1d(2).double()
    net: Any = nn.Sequential(conv, bn, nn.Flatten(), nn.Linear(6, 1, bias=False).double()).eval()
    with torch.no_grad():
        for p in (*bn.parameters(), bn.running_mean, bn.running_var):
            p.copy_(torch.rand_like(p) + 0.5)
    x, epsilon = torch.randn(B, 1, 4, dtype=F64), 0.1
    mapper = by_path(**{"0": EpsilonRule(epsilon), "3": EpsilonRule(1e-14)})
    td, ledger = run(net, mapper, x, "y", ledger=True)
    (row,) = ledger.at("0 + 1")
    assert row.kind == "Conv1d + BatchNorm1d" and not ledger.at("0") and not ledger.at("1")
    y, y_bn = td["y"][:, 0], bn(conv(x))
    R = y_bn.flatten(1) * net[3].weight[0] * (y / st(y, 1e-14)).unsqueeze(-1)
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    b = (conv.bias - bn.running_mean) * scale + bn.bias
    share = R.reshape(y_bn.shape) / st(y_bn, epsilon)
    torch.testing.assert_close(row.absorbed["bias"][:, 0], (b[:, None] * share).sum((1, 2)))
    lost = (epsilon * y_bn.sign() * share).sum((1, 2))
    torch.testing.assert_close(row.absorbed["stabiliser"][:, 0], lost)


def test_every_cause_that_the_library_names_is_explained():
    named: set[str] = set()
    for name in MODELS:
        _, ledger = run(*made(name), ledger=True)
        named |= set(ledger.causes)
    assert named - {"two thirds", "biases and stabiliser"} <= set(CAUSES)
    assert {"bias", "stabiliser", "constant", "softmax", "stop", "rule", "no rule"} <= named


# --- who is whose ---------------------------------------------------------------------------------


class Turned(nn.Module):
    """Steps in front of a batch of the same size, and samples folded with steps, last sample first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.transpose(0, 1)))  # [steps, batch, …]
        h = self.second(h.flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0]))
        return h.flip(0).sum(0)


@pytest.mark.parametrize("steps", [1, 2, B, 2 * B])
def test_each_elements_part_is_found_wherever_the_model_puts_its_batch_dimension(steps: int):
    net, x = Turned().double(), torch.randn(B, steps, 4, dtype=F64)
    _, ledger = run(net, EpsilonPlus(epsilon=0.1), x, "y", ledger=True)
    for i in range(B):
        _, alone = run(net, EpsilonPlus(epsilon=0.1), x[i : i + 1], "y", ledger=True)
        for row, one in zip(ledger.rows, alone.rows, strict=True):
            torch.testing.assert_close(absorbed(row)[i], absorbed(one)[0])
            torch.testing.assert_close(row.out[i], one.out[0])


@pytest.mark.parametrize("batch", [(), (1,), (3, 2), (17,), (260,)])
def test_batches_of_any_size_and_number_of_dimensions_close(batch: tuple[int, ...]):
    net, x = sequential().double(), torch.randn(*batch, 24, dtype=F64)
    with LRP(by_path(), ("y", 1), ledger=1e-9).prepare(net, ["x"], ["y"]) as hooked:
        hooked(TensorDict({"x": x}, batch))
        ledger = hooked.ledger
    assert ledger is not None and ledger.start.shape == (*batch, 1)
    assert not any(row.spread for row in ledger.rows)
    assert_rows_close(ledger)


def test_what_belongs_to_no_element_is_spread_and_checked_as_a_sum():
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0, keepdim=True).square()) * 2.0

    x = torch.randn(3, 2, dtype=F64)
    _, ledger = run(Centred(), EpsilonPlus(), x, ("y", 0), ledger=True)
    assert ledger.at("square")[0].spread
    assert ledger.gap.sum().abs() < 1e-12
    ledger.check(1e-9)


# --- free when off --------------------------------------------------------------------------------


class _Operations(TorchDispatchMode):
    """Writes down which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["layers", "functional", "batch norm folded", "recurrent"])
def test_when_off_nothing_of_the_ledger_runs(name: str, monkeypatch: pytest.MonkeyPatch):
    net, mapper, x = made(name)
    run(net, mapper, x)  # what is looked up once has been
    off = _Operations()
    with off:
        run(net, mapper, x)
    on = _Operations()
    with on:
        run(net, mapper, x, ledger=True)
    assert len(on.names) > len(off.names)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the ledger is off")

    for cls in (
        "tdhook_like.attribution.lrp.ledger.recorder.Recorder",
        "tdhook_like.call.Recorder",
    ):
        monkeypatch.setattr(cls, forbidden)
    without = _Operations()
    with without:
        run(net, mapper, x)
    assert without.names == off.names


def test_when_off_a_linear_layer_costs_its_rule_and_nothing_else():
    # Forward: the layer. Rule: |y| within bounds, over itself plus ε, times y, its value put back.
    net, x = nn.Linear(4, 2, bias=False).double(), torch.randn(B, 4, dtype=F64)
    with LRP(EpsilonPlus(), ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        td = TensorDict({"x": x}, [B])
        hooked(td)
        with _Operations() as seen:
            hooked(td)
    assert not [name for name in seen.names if "where" in name or "log2" in name]
    assert sum("mm" in name for name in seen.names) == 2  # one forward, one backward


# --- asking, printing, refusing -------------------------------------------------------------------


def test_a_ledger_prints_as_a_table():
    one, none = torch.ones(2, 1), torch.zeros(2, 1)
    rows = [
        Row("", "Linear", "EpsilonRule()", one, 0.75 * one, {"bias": 0.25 * one}),
        Row("add", "function", "", 0.75 * one, 0.5 * one, {"constant": 0.25 * one}),
    ]
    lines = str(Ledger(rows, one, 0.5 * one)).splitlines()
    assert lines[0].split() == ["where", "type", "rule", "out", "in", "absorbed"]
    assert lines[1].split() == ["(root)", "Linear", "EpsilonRule()", "2", "1.5", "bias", "0.5"]
    assert lines[2].split() == ["add", "function", "1.5", "1", "constant", "0.5"]
    assert [line.split()[0] for line in lines[3:]] == ["(start)", "(inputs)", "(gap)"]
    assert lines[-1].split()[1] == "0"
    assert str(Ledger([], one, none)).splitlines()[-1].split()[1] == "2"


def test_a_ledger_with_a_tolerance_is_checked_at_every_call():
    net = _Calls(
        lambda x: torch.atan2(x, torch.ones_like(x))
    )  # gives on 1 − 2x²/3 + … of its start
    small, large = torch.full((B, 1), 1e-3, dtype=F64), torch.ones(B, 1, dtype=F64)
    with LRP(EpsilonPlus(), "y", ledger=1e-3, unhandled="ignore").prepare(
        net, ["x"], ["y"]
    ) as hooked:
        hooked(TensorDict({"x": small}, [B]))
        with pytest.raises(ConservationError, match=r"0\.363 of the start, more than 0\.001"):
            hooked(TensorDict({"x": large}, [B]))
        hooked(TensorDict({"x": small}, [B]))


def test_refused_causes_do_not_make_up_for_one_another():
    one = torch.ones(1, 1)
    rows = [Row("0", "Linear", "r", one, one, {"bias": 0.5 * one, "stabiliser": -0.5 * one})]
    ledger = Ledger(rows, one, one)
    ledger.check(1e-6)
    with pytest.raises(ConservationError, match="1 of the start"):
        ledger.check(1e-6, allow=())


@pytest.mark.parametrize("value", ["yes", -1.0, 0.0, None])
def test_what_is_no_tolerance_is_refused(value: Any):
    with pytest.raises(RuleError, match="ledger must be True, False or a tolerance"):
        LRP(ledger=value)


def test_an_observed_policy_has_a_ledger_and_a_second_call_has_its_own():
    net, mapper, x = made("functional")
    with LRP(mapper, ("y", 0), ledger=True).prepare(net, ["x"], ["y"]) as hooked:
        assert hooked.ledger is None
        hooked.observe(TensorDict({"x": x}, [B]))
        first = hooked.ledger
        hooked(TensorDict({"x": 2 * x}, [B]))
        second = hooked.ledger
    assert first is not None and second is not None and first is not second
    assert first.gap.abs().max() < 1e-9 and second.gap.abs().max() < 1e-9
    assert not torch.equal(first.start, second.start)


def test_relevance_with_a_graph_has_a_ledger_without_one():
    net, mapper, x = made("functional")
    td, ledger = run(net, mapper, x.requires_grad_(), ledger=True, create_graph=True)
    assert td["attr", "x"].requires_grad and not ledger.start.requires_grad
    assert ledger.gap.abs().max() <= 1e-9 * ledger.start.abs().max()
    _, plain = run(net, mapper, x.detach(), ledger=True)
    for one, other in zip(ledger.rows, plain.rows, strict=True):
        assert one.where == other.where and not one.out.requires_grad
        torch.testing.assert_close(one.out, other.out)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_stopped_operand_counts_for_nothing_with_a_ledger_and_where_a_graph_is_asked_for(
    create_graph: bool,
):
    class Product(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return one * other

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.product = nn.Sigmoid(), Product()

        def forward(self, x: Tensor) -> Tensor:
            return self.product(x, self.gate(x)) + x * self.gate(x)

    x = torch.randn(B, 3, dtype=F64)
    mapper = by_path(gate=StopRule(), product=UniformEpsilonRule(1e-12))
    for ledger in (False, True):
        td, _ = run(Gated(), mapper, x, ("y", 1), ledger=ledger, create_graph=create_graph)
        want = torch.zeros_like(x)
        want[:, 1] = 2 * x[:, 1] * torch.sigmoid(x[:, 1])  # each product goes to the signal, whole
        torch.testing.assert_close(td["attr", "x"], want, rtol=1e-9, atol=1e-9)


def test_rules_of_functions_of_ones_own_are_in_the_ledger():
    x = torch.randn(B, 3, dtype=F64)
    functions = FunctionRules(rules={"tanh": None})
    net = _Calls(lambda x: torch.tanh(x).sum(-1, keepdim=True))
    _, ledger = run(net, EpsilonPlus(), x, "y", ledger=True, functions=functions)
    want = (torch.tanh(x) - x * (1 - torch.tanh(x) ** 2)).sum(-1)
    torch.testing.assert_close(ledger.absorbed("no rule")[:, 0], want)
