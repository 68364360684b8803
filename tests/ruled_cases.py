"""Models of every kind under rules, and their relevance by the public road."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    AttnLRP,
    EpsilonGammaBox,
    EpsilonPlus,
    GammaRule,
    Rule,
    RuleMapper,
    SignalTakesAllRule,
)

F64 = torch.float64
Values = Sequence[Tensor]


# --- models ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Sums, products, activations and normalisations that no module stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        h = x + 0.5 * a * (1 + torch.tanh(0.8 * (a + 0.04 * a**3)))  # gelu, written by hand
        h = F.gelu(h * torch.sigmoid(self.gate(h)))
        return self.out(F.normalize(F.layer_norm(h, (6,)), dim=-1))


class Block(nn.Module):
    """One block of a transformer over four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.mix(x, x, x, need_weights=False)
        return self.out(self.norm(x + mixed).mean(-2))


class TwoInputs(nn.Module):
    """A product of what is made of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 4), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.out(F.relu(self.a(x)) * self.b(z))


class Cells(nn.Module):
    """The last state of an LSTM, read out."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0][:, -1])


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(-3), nn.Linear(6, 2)),
    )


def dense() -> nn.Module:
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)]
    return nn.Sequential(*layers)


def normed() -> nn.Module:
    layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.SiLU(), nn.BatchNorm1d(8), nn.Linear(8, 2)]
    return nn.Sequential(*layers)


def agents() -> nn.Module:
    modules = pytest.importorskip("torchrl.modules")
    return modules.MultiAgentMLP(
        6, 2, 3, centralized=False, share_params=False, depth=2, num_cells=8
    )


def gamma(name: str, module: nn.Module) -> Rule | None:
    return GammaRule() if isinstance(module, nn.Linear) else None


def recurrent(name: str, module: nn.Module) -> Rule | None:
    return SignalTakesAllRule() if isinstance(module, nn.LSTM) else EpsilonPlus()(name, module)


@dataclass(frozen=True)
class Case:
    """A model, the shapes of its inputs and its mapper; outputs are ``[*B, 2]`` or more."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    mapper: RuleMapper

    def made(self) -> tuple[nn.Module, list[Tensor]]:
        net = self.build().double().eval()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
        return net, [torch.randn(3, *shape, dtype=F64) for shape in self.shapes]


CASES = {
    "dense": Case(dense, ((6,),), EpsilonPlus()),
    "gamma": Case(dense, ((6,),), gamma),
    "convolutional": Case(convolutional, ((2, 8, 8),), EpsilonPlus()),
    "gamma and box": Case(convolutional, ((2, 8, 8),), EpsilonGammaBox(low=-5.0, high=5.0)),
    "norms": Case(normed, ((6,),), EpsilonPlus()),
    "two inputs": Case(TwoInputs, ((6,), (5,)), EpsilonPlus()),
    "residual": Case(Residual, ((6,),), EpsilonPlus()),
    "attention": Case(Block, ((4, 6),), AttnLRP()),
    "recurrent": Case(Cells, ((3, 6),), recurrent),
    "agents": Case(agents, ((3, 6),), EpsilonPlus()),
}
# torch's own recurrent layers can neither be vmapped nor be part of one compiled graph.
feed_forward = pytest.mark.parametrize(
    "case",
    [case for name, case in CASES.items() if name != "recurrent"],
    ids=[name for name in CASES if name != "recurrent"],
)
quiet = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def read(y: Tensor) -> Tensor:
    """Two numbers for each sample: the outputs, or those of the second agent."""
    return y if y.ndim == 2 else y[..., 1, :]


def hooked(net: nn.Module, mapper: RuleMapper, xs: Values, output: int) -> list[Tensor]:
    """Relevance for one of the two numbers by the public road."""
    keys = [f"x{i}" for i in range(len(xs))]
    td = TensorDict(dict(zip(keys, xs, strict=True)), [len(xs[0])])
    target = lambda td: read(td["y"])[..., output]  # noqa: E731
    with LRP(mapper, target=target).prepare(net, keys, ["y"]) as explained:
        td = explained(td)
    return [td["attr", key] for key in keys]


def assert_same(found: Values | Tensor, want: Values | Tensor, tolerance: float = 1e-10) -> None:
    found, want = ([v] if isinstance(v, Tensor) else list(v) for v in (found, want))
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
