"""Relevance in a loss: ``create_graph=True`` gives relevance whose own gradient is right.

The reference is always relevance without a graph, at points a little to either side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from rule_records import RECORDS, Record
from rule_samples import Sample, only
from tdhook_like import LRP, InputXGradient, Saliency
from tdhook_like.attribution import lrp
from tdhook_like.attribution.lrp import Rule, RuleMapper
from tdhook_like.errors import RuleError
from tdhook_like.targets import Each

F64 = torch.float64
Parts = Sequence[Tensor]


# --- models ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Sums, products, an activation, a normalisation and a softmax that no module stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x + F.gelu(self.a(x)) * torch.sigmoid(self.gate(x))
        h = F.layer_norm(h, (4,)) + x / x.norm(dim=-1, keepdim=True)
        return self.out(h * torch.softmax(h, -1))


class Attending(nn.Module):
    """One block of a transformer over three tokens, with torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        mixed, _ = self.mix(x, x, x, need_weights=False)
        return self.out(self.norm(x + mixed).sum(1))


class Recurrent(nn.Module):
    """The last state of a recurrent layer, read out."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.cells, self.out = kind(3, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0][:, -1])


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))


def convolution() -> nn.Module:
    layers = [nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(3, 2, 2)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))


def folded() -> nn.Module:
    layers = [nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 9)]
    return nn.Sequential(*layers, nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 2))


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 9), nn.LayerNorm(9), nn.SiLU(), nn.RMSNorm(9), nn.Linear(9, 2)
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (dense, (4,)),
    "convolution": (convolution, (2, 6)),
    "batch norm folded": (folded, (2, 6)),
    "norms": (normed, (4,)),
    "residual": (Residual, (4,)),
    "attention": (Attending, (3, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 3)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 3)),
}
WITH_RELU = ("dense", "convolution", "batch norm folded")


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A model in evaluation mode, with statistics and biases that are not zero, and inputs."""
    build, shape = NETS[name]
    net = build().double().eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.5)  # so that most of it is alive
    return net, torch.randn(2, *shape, dtype=F64)


def twice_differentiable(name: str) -> AbstractContextManager[object]:
    """torch's fused attention has no second derivative; its plain one has."""
    return sdpa_kernel(SDPBackend.MATH) if name == "attention" else nullcontext()


class RecurrentToo(lrp.EpsilonPlus):
    """Epsilon everywhere, and a rule of gates on recurrent layers."""

    def __init__(self, gates: Rule) -> None:
        self._gates = gates
        super().__init__()

    def rules_by_type(self) -> dict[type[nn.Module], Rule]:
        return {**super().rules_by_type(), nn.LSTM: self._gates, nn.GRU: self._gates}


COMPOSITES: dict[str, RuleMapper] = {
    "epsilon": lambda name, m: lrp.EpsilonRule(0.1) if isinstance(m, nn.Linear) else None,
    "base": lrp.BaseRuleMapper(),
    "epsilon plus": lrp.EpsilonPlus(),
    "batch norm affine": lrp.EpsilonPlus(batch_norm="affine"),
    "epsilon plus flat": lrp.EpsilonPlusFlat(),
    "alpha 2 beta 1": lrp.EpsilonAlpha2Beta1(),
    "alpha 2 beta 1 flat": lrp.EpsilonAlpha2Beta1Flat(),
    "gamma box": lrp.EpsilonGammaBox(low=-4.0, high=4.0),
    "attnlrp": lrp.AttnLRP(),
    "cp-lrp": lrp.CPLRP(),
    "policy": lrp.PolicyMapper(),
    "excitation": lrp.ExcitationMapper(),
}
RECTIFIERS: dict[str, RuleMapper] = {
    "guided": lrp.GuidedBackpropMapper(),
    "deconvnet": lrp.DeconvnetMapper(),
    "beta smooth": lrp.BetaSmoothMapper(),
}
GATES: dict[str, RuleMapper] = {
    "signal takes all": RecurrentToo(lrp.SignalTakesAllRule()),
    "half": RecurrentToo(lrp.HalfRule()),
    "proportional": RecurrentToo(lrp.ProportionalRule()),
}
RECURRENT = ("lstm", "gru")
CASES = [
    *((net, name, m) for name, m in COMPOSITES.items() for net in NETS if net not in RECURRENT),
    *((net, name, m) for name, m in RECTIFIERS.items() for net in WITH_RELU),
    *((net, name, m) for name, m in GATES.items() for net in RECURRENT),
]
CASE_IDS = [f"{name}-{net}" for net, name, _ in CASES]
every_case = pytest.mark.parametrize(
    ("net_name", "mapper"), [(n, m) for n, _, m in CASES], ids=CASE_IDS
)


# --- the public road, and differences of what comes out of it --------------------------------------


def relevance(net: nn.Module, mapper: RuleMapper, x: Tensor, create_graph: bool = False) -> Tensor:
    """Relevance of the inputs for the first output."""
    options = {"unhandled": "ignore", "unreached": "ignore", "create_graph": create_graph}
    td = TensorDict({"x": x}, [len(x)])
    with LRP(mapper, target=("y", 0), **options).prepare(net, ["x"], ["y"]) as hooked:
        return hooked(td)["attr", "x"]


def assert_slopes(
    score: Callable[[bool], Tensor],
    at: Iterable[Tensor],
    step: float = 1e-6,
    tolerance: float = 1e-5,
) -> None:
    """The gradient of ``score(True)`` is the slope of ``score(False)`` in a random direction.

    Args:
        score: A number made of relevance, with or without a graph of it.
        at: The tensors that it depends on; they are moved in place.
    """
    places = list(at)
    slopes = torch.autograd.grad(score(True), places, allow_unused=True, materialize_grads=True)
    assert any(bool(slope.any()) for slope in slopes), score(False)
    for place, slope in zip(places, slopes, strict=True):
        direction, kept, ends = torch.randn_like(place), place.detach().clone(), []
        for signed in (step, -step):
            with torch.no_grad():
                place.copy_(kept + signed * direction)
            ends.append(score(False).detach())
        with torch.no_grad():
            place.copy_(kept)
        numeric, found = (ends[0] - ends[1]) / (2 * step), (slope * direction).sum()
        torch.testing.assert_close(found, numeric, rtol=tolerance, atol=tolerance)


@every_case
def test_relevance_with_a_graph_has_the_slope_of_relevance_without(
    net_name: str, mapper: RuleMapper
):
    net, x = made(net_name)
    x.requires_grad_()
    weights = torch.randn_like(x)

    def score(create_graph: bool) -> Tensor:
        return (weights * relevance(net, mapper, x, create_graph)).sum()

    with twice_differentiable(net_name):
        torch.testing.assert_close(score(True), score(False), rtol=1e-12, atol=1e-12)
        assert_slopes(score, [x, *net.parameters()])


@every_case
def test_relevance_passes_gradcheck(net_name: str, mapper: RuleMapper):
    net, x = made(net_name)

    def of(x: Tensor, *parameters: Tensor) -> Tensor:
        return relevance(net, mapper, x, create_graph=True)

    with twice_differentiable(net_name):
        assert gradcheck(of, (x.requires_grad_(), *net.parameters()), fast_mode=True, atol=1e-4)


# --- rules one by one -----------------------------------------------------------------------------

SITES = [(record, sample) for record in RECORDS for sample in record.samples[::6][:3]]
SITE_IDS = [f"{record.name}-{sample.name}" for record, sample in SITES]


@pytest.mark.parametrize(("record", "sample"), SITES, ids=SITE_IDS)
def test_what_each_rule_gives_can_be_differentiated(record: Record, sample: Sample):
    module, rule = sample.module(), record.rule()
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    xs = [torch.randn(2, *shape, dtype=F64, requires_grad=True) for shape in sample.shapes]
    keys, y = [f"x{i}" for i in range(len(xs))], module(*xs).detach()
    reading, weights = torch.randn_like(y), [torch.randn_like(x) for x in xs]

    def score(create_graph: bool) -> Tensor:
        """A number made of the relevance of all inputs, for a fixed reading of the outputs."""
        method = LRP(
            only(module, rule),
            target=lambda td: (td["y"] * reading).flatten(1).sum(-1),
            create_graph=create_graph,
        )
        with method.prepare(module, keys, ["y"]) as hooked:
            td = hooked(TensorDict(dict(zip(keys, xs, strict=True)), [2]))
        found = [td["attr", key] for key in keys]
        return torch.stack([(w * r).sum() for w, r in zip(weights, found, strict=True)]).sum()

    if record.name == "stop":
        assert not score(True).any()
        return
    assert_slopes(score, [*xs, *module.parameters()])


def test_every_rule_that_is_exported_was_differentiated_here():
    seen = {type(record.rule()) for record in RECORDS}
    for net_name, _, mapper in CASES:
        net, _ = made(net_name)
        plan = LRP(mapper, target=("y", 0)).prepare(net, ["x"], ["y"]).plan
        assert plan is not None
        seen |= {type(line.rule) for line in plan.lines}
    exported = {getattr(lrp, name) for name in lrp.__all__}
    rules = {item for item in exported if isinstance(item, type) and issubclass(item, Rule)}
    assert rules - {Rule} - seen == set()


class Written(Rule):
    """The epsilon rule of a dense layer without bias, as in the papers."""

    def relevance(
        self, module: nn.Module, inputs: lrp.Inputs, output: Tensor, R_out: Tensor
    ) -> Tensor:
        return inputs[0] * ((R_out / output) @ module.weight)  # pyright: ignore


def test_a_rule_that_is_written_as_relevance_says_that_it_cannot_be_differentiated():
    net, x = nn.Linear(3, 2, bias=False).double(), torch.randn(2, 3, dtype=F64)
    mapper = only(net, Written())
    assert relevance(net, mapper, x).shape == x.shape
    with pytest.raises(RuleError, match=r"Written\(\) on Linear.*surrogate\(\)"):
        relevance(net, mapper, x, create_graph=True)


# --- what carries a graph -------------------------------------------------------------------------


def test_without_create_graph_nothing_that_is_written_carries_a_graph():
    net, x = made("residual")
    td = TensorDict({"x": x.requires_grad_()}, [len(x)])
    with LRP(target=("y", 0), unhandled="ignore").prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(td)
    assert not td["attr", "x"].requires_grad


def test_taking_relevance_leaves_no_gradient_on_parameters_and_a_loss_of_it_does():
    net, x = made("dense")
    found = relevance(net, lrp.EpsilonPlus(), x, create_graph=True)
    assert all(parameter.grad is None for parameter in net.parameters())
    found.square().sum().backward()
    first = next(net.parameters())
    assert first.grad is not None and bool(first.grad.any())


@pytest.mark.parametrize("method", [Saliency, InputXGradient], ids=lambda m: m.__name__)
def test_gradients_under_rules_can_be_differentiated_as_relevance_can(method: type[Saliency]):
    net, x = made("dense")
    x.requires_grad_()

    def score(create_graph: bool) -> Tensor:
        made_of = method(("y", 1), rules=lrp.EpsilonPlus(0.1), create_graph=create_graph)
        with made_of.prepare(net, ["x"], ["y"]) as hooked:
            return hooked(TensorDict({"x": x}, [2]))["attr", "x"].square().sum()

    assert_slopes(score, [x, *net.parameters()])


def test_each_of_several_targets_can_be_differentiated():
    net, x = made("batch norm folded")
    x.requires_grad_()
    weights = torch.randn(2, 2, 2, 6, dtype=F64)

    def score(create_graph: bool) -> Tensor:
        method = LRP(lrp.EpsilonAlpha2Beta1(), target=Each("y"), create_graph=create_graph)
        with method.prepare(net, ["x"], ["y"]) as hooked:
            return (hooked(TensorDict({"x": x}, [2]))["attr", "x"] * weights).sum()

    assert_slopes(score, [x, *net.parameters()])


# --- training -------------------------------------------------------------------------------------


class Joined(nn.Module):
    """A model of both its inputs together."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(torch.cat([a, b], -1))


def trained(penalty: float) -> tuple[float, float]:
    """A regression with a distractor that tells as much as the signal, where nothing forbids it.

    Returns:
        The distractor's share of all relevance, and the error where it is drawn anew.
    """
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    model = TensorDictModule(Joined(net), in_keys=["signal", "distractor"], out_keys=["y"])
    signal = torch.randn(64, 2)
    wanted = signal.sum(-1, keepdim=True)
    td = TensorDict({"signal": signal, "distractor": signal + 0.05 * torch.randn(64, 2)}, [64])
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    method = LRP(lrp.EpsilonPlus(0.01), target="y", create_graph=True)
    with method.prepare(model) as hooked:
        for _ in range(150):
            loss = F.mse_loss(model(td.copy())["y"], wanted)
            if penalty:
                loss = loss + penalty * hooked(td.copy())["attr", "distractor"].square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        run = hooked(td.copy())
        sizes = {key: run["attr", key].abs().sum().item() for key in ("signal", "distractor")}
        other = td.copy().set("distractor", torch.randn(64, 2))
        error = F.mse_loss(model(other)["y"], wanted).item()
    return sizes["distractor"] / sum(sizes.values()), error


def test_a_penalty_on_a_distractors_relevance_takes_it_out_of_the_model():
    share, error = trained(penalty=0.0)
    assert share > 0.3 and error > 0.5  # it reads the distractor, and is wrong without it
    share, error = trained(penalty=10.0)
    assert share < 0.05 and error < 0.1
