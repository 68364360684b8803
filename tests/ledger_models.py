"""Models with something to account for, and how their ledger is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdhook_like import LRP, EpsilonPlus
from tdhook_like.attribution.lrp import (
    CPLRP,
    AlphaBetaRule,
    EpsilonRule,
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
from tdhook_like.attribution.lrp.ledger.accounts import Ledger, Row

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


class Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
