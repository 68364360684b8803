"""Rules read the weights that forward reads, however they come about, in any precision."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MultiAgentMLP, NoisyLinear

import reference_lrp as ref
from pristine import assert_same, bits, snapshot
from rule_records import AFFINE_RULES, RECORDS, SITE_IDS, SITES, Record
from rule_samples import Sample, assert_close, explain, grid, made, only
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    AlphaBetaRule,
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    GammaRule,
    Rule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tdhook_like.targets import Each

F64 = torch.float64
NAMES = list(AFFINE_RULES)


def as_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain layer with these weights."""
    out, features = weight.shape
    plain = nn.Linear(features, out, bias=bias is not None, dtype=F64)
    plain.weight.data = weight.detach().clone()
    if bias is not None:
        plain.bias.data = bias.detach().clone()
    return plain


def check(net: nn.Module, plain: nn.Linear, name: str) -> None:
    """The rule on ``net`` gives what it gives on ``plain``, and leaves ``net`` as it was."""
    rule, reference = AFFINE_RULES[name]
    x = grid((2, plain.in_features), "x")
    R = grid((2, plain.out_features), "R") + 0.125
    before = snapshot(net)
    found, y = explain(net, only(net, rule), [x], R)
    assert_same(before, snapshot(net))
    assert_close(found[0], ref.relevance(plain, x, R, reference), 1e-9)
    torch.testing.assert_close(y, plain(x))


# --- where weights come from ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_weight_norm_by_parametrization(name: str, bias: bool):
    net = parametrizations.weight_norm(made("layer", lambda: nn.Linear(4, 3, bias=bias)))
    check(net, as_linear(net.weight, net.bias), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_weight_norm_of_the_older_kind(name: str, bias: bool):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = nn.utils.weight_norm(made("layer", lambda: nn.Linear(4, 3, bias=bias)))
    net(torch.zeros(1, 4).double())  # its hook computes the weight at a call
    plain = as_linear(net.weight, net.bias)
    rule, reference = AFFINE_RULES[name]
    x, R = grid((2, 4), "x"), grid((2, 3), "R") + 0.125
    found, y = explain(net, only(net, rule), [x], R)
    assert_close(found[0], ref.relevance(plain, x, R, reference), 1e-9)
    torch.testing.assert_close(y, plain(x))


@pytest.mark.parametrize("name", NAMES)
def test_spectral_norm_in_evaluation(name: str):
    net = parametrizations.spectral_norm(made("layer", lambda: nn.Linear(4, 3))).eval()
    check(net, as_linear(net.weight, net.bias), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drive", [True, False], ids=["driven", "observed"])
def test_spectral_norm_in_training_iterates_as_often_as_a_plain_call(name: str, drive: bool):
    net = parametrizations.spectral_norm(made("layer", lambda: nn.Linear(4, 3))).train()
    other = copy.deepcopy(net)
    td = TensorDict({"x": grid((2, 4), "x")}, [2])
    with LRP(only(net, AFFINE_RULES[name][0]), ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        if drive:
            assert bits(hooked(td)["y"]) == bits(other(td["x"]))
        else:
            hooked.observe(td)
    for (buffer, got), (_, want) in zip(net.named_buffers(), other.named_buffers(), strict=True):
        assert bits(got) == bits(want), buffer
    if drive:  # the weight that this call read: its power iteration done, none more
        plain = as_linear(other.eval().weight, other.bias)
        R = torch.zeros(2, 3, dtype=F64)
        R[:, 0] = plain(td["x"]).detach()[:, 0]
        want = ref.relevance(plain, td["x"], R, AFFINE_RULES[name][1])
        assert_close(td["attr", "x"], want, 1e-9)


class Exponential(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return raw.exp() - 1


@pytest.mark.parametrize("name", NAMES)
def test_a_parametrization_of_ones_own_on_weight_and_bias(name: str):
    net = made("layer", lambda: nn.Linear(4, 3))
    parametrize.register_parametrization(net, "weight", Exponential())
    parametrize.register_parametrization(net, "bias", Exponential())
    check(net, as_linear(net.weight, net.bias), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("exploring", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
def test_a_noisy_layer_with_and_without_its_noise(name: str, bias: bool, exploring: Any):
    net = NoisyLinear(4, 3, bias=bias, dtype=F64)
    for parameter in net.parameters():
        parameter.data = grid(parameter.shape, f"noisy {parameter.shape}")
    with set_exploration_type(exploring):
        plain = as_linear(net.weight, net.bias)
        assert plain.weight.equal(net.weight_mu) == (exploring != ExplorationType.RANDOM)
        check(net, plain, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_a_noisy_layer_that_goes_by_its_training_flag(name: str, training: bool):
    net = NoisyLinear(4, 3, dtype=F64, use_exploration_type=False).train(training)
    plain = as_linear(net.weight, net.bias)
    assert plain.weight.equal(net.weight_mu) != training
    check(net, plain, name)


def test_observing_a_noisy_layer_in_training_explains_it_without_noise():
    net = NoisyLinear(4, 3, dtype=F64, use_exploration_type=False).train()
    td = TensorDict({"x": grid((2, 4), "x")}, [2])
    with LRP(only(net, ZPlusRule()), ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        hooked.observe(td)
    plain = as_linear(net.weight_mu, net.bias_mu)
    R = torch.zeros(2, 3, dtype=F64)
    R[:, 0] = plain(td["x"]).detach()[:, 0]
    assert_close(td["attr", "x"], ref.relevance(plain, td["x"], R, ref.zplus), 1e-9)


class Computed(nn.Module):
    """A layer of a user's own: its weight is a property, and it has no bias at all."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(3, 4))

    @property
    def weight(self) -> Tensor:
        return self.raw * 2 - 0.25

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Masked(nn.Linear):
    """A linear layer with a forward of its own."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x * self.mask, self.weight, self.bias)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_a_property_of_a_users_layer(name: str):
    net = made("computed", Computed)
    check(net, as_linear(net.weight, None), name)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "flat"])
def test_a_subclass_with_a_forward_of_its_own_keeps_it(name: str):
    net = made("masked", Masked)
    check(net, as_linear(net.weight * net.mask, net.bias), name)


class Swapped(nn.Module):
    """Calls a network with other parameters than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        other = {name: 1 - p for name, p in self.net.named_parameters()}
        return torch.func.functional_call(self.net, other, (x,))


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_with_other_parameters(name: str):
    rule, reference = AFFINE_RULES[name]
    net, x, R = made("swapped", Swapped), grid((2, 4), "x"), grid((2, 3), "R") + 0.125
    before = snapshot(net)
    mapper = EpsilonPlus(rule_mapper=lambda n, m: rule if isinstance(m, nn.Linear) else None)
    got = explain(net, mapper, [x], R)[0][0]
    assert_same(before, snapshot(net))
    stack = [
        as_linear(1 - net.net[0].weight, 1 - net.net[0].bias),
        nn.ReLU(),
        as_linear(1 - net.net[2].weight, 1 - net.net[2].bias),
    ]
    assert_close(got, ref.propagate(stack, x, R, [reference, None, reference]), 1e-9)


AGENT_RULES: dict[str, Rule] = {
    **{name: rule for name, (rule, _) in AFFINE_RULES.items()},
    "z-box": ZBoxRule(-5.0, 5.0),
    "alpha 1 beta 0": AlphaBetaRule(1, 0),
}


@pytest.mark.parametrize("name", AGENT_RULES)
@pytest.mark.parametrize("share", [False, True], ids=["own weights", "shared weights"])
def test_agents_under_vmap_get_what_a_loop_over_them_gives(name: str, share: bool):
    rule, agents = AGENT_RULES[name], 3
    net = MultiAgentMLP(4, 2, agents, centralized=False, share_params=share, depth=1, num_cells=5)
    net.to(F64)
    x = torch.randn(2, agents, 4).double()
    td = TensorDict({"x": x}, [2])

    def mapper(_: str, module: nn.Module) -> Rule | None:
        return rule if isinstance(module, nn.Linear) else None

    def each(td: TensorDict) -> Tensor:  # every agent's first output, agents as targets
        return td["y"][..., 0]

    with LRP(mapper, Each(each)).prepare(net, ["x"], ["y"]) as hooked:
        found = hooked(td)["attr", "x"]  # [2, targets, agents, 4]
    for agent in range(agents):
        alone = _agent(net, agent, share)
        torch.testing.assert_close(td["y"][:, agent], alone(x[:, agent]))
        one = TensorDict({"x": x[:, agent]}, [2])
        with LRP(mapper, ("y", 0)).prepare(alone, ["x"], ["y"]) as hooked:
            want = hooked(one)["attr", "x"]
        assert_close(found[:, agent, agent], want, 1e-9)
        others = [other for other in range(agents) if other != agent]
        assert not found[:, agent, others].any()


def _agent(net: MultiAgentMLP, agent: int, share: bool) -> nn.Module:
    """One agent's network, with plain parameters of its own."""
    layers: list[nn.Module] = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)]
    alone = nn.Sequential(*layers).to(F64)
    for name, value in net.params.flatten_keys(".").items():
        alone.get_parameter(name).data = (value if share else value[agent]).detach().clone()
    return alone


def test_a_checkpointed_block_is_explained_as_it_is_without_checkpoints():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.saving = nn.Linear(4, 5), nn.Linear(5, 2), True

        def block(self, x: Tensor) -> Tensor:
            return torch.relu(self.first(x))

        def forward(self, x: Tensor) -> Any:
            h = checkpoint(self.block, x, use_reentrant=False) if self.saving else self.block(x)
            return self.last(h)

    net, x, R = made("saving", Net), grid((2, 4), "x"), grid((2, 2), "R") + 0.125
    mapper: Callable[..., Any] = lambda n, m: ZPlusRule() if n in ("first", "last") else None  # noqa: E731
    got = explain(net, mapper, [x], R)[0][0]
    net.saving = False
    assert_close(got, explain(net, mapper, [x], R)[0][0], 1e-12)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat"])
@pytest.mark.parametrize(("record", "sample"), SITES, ids=SITE_IDS)
def test_half_precision_runs_and_stays_finite(record: Record, sample: Sample, dtype: torch.dtype):
    module = sample.module(dtype)
    for signs in ("mixed", "non-negative"):
        inputs = [x.to(dtype) for x in sample.inputs(signs)]
        keys = [f"x{i}" for i in range(len(inputs))]
        td = TensorDict(dict(zip(keys, inputs, strict=True)), [2])
        plain = module(*inputs).detach()

        def total(td: TensorDict) -> Tensor:
            return td["y"].flatten(1).sum(-1)

        with LRP(only(module, record.rule()), total).prepare(module, keys, ["y"]) as hooked:
            td = hooked(td)
        assert bits(td["y"]) == bits(plain)
        for key, x in zip(keys, inputs, strict=True):
            assert td["attr", key].dtype == dtype and td["attr", key].shape == x.shape
            assert td["attr", key].isfinite().all()


@pytest.mark.parametrize(
    "rule", [ZPlusRule(), AlphaBetaRule(), GammaRule(), WSquareRule()], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_outputs_with_nothing_to_share_by_give_no_nan(rule: Rule, dtype: torch.dtype):
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = -torch.ones(2, 3)
    layer.weight.data[1] = 0.0  # and one that reads nothing
    layer, td = layer.to(dtype), TensorDict({"x": torch.rand(2, 3).to(dtype)}, [2])
    # With w = −1 and x > 0 there are negative parts alone: β of them, their own, or equal shares.
    x = td["x"].double()
    expected = {
        ZPlusRule: torch.zeros_like(x),
        AlphaBetaRule: x,
        GammaRule: -x,
        WSquareRule: -x.sum(-1, keepdim=True).expand_as(x) / 3,
    }[type(rule)]
    tolerance = 8 * torch.finfo(dtype).eps
    for index, wanted in enumerate((expected, torch.zeros_like(x))):
        with LRP(only(layer, rule), ("y", index)).prepare(layer, ["x"], ["y"]) as hooked:
            found = hooked(td.clone())["attr", "x"].double()
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=max(tolerance, 1e-5))


@pytest.mark.parametrize("record", RECORDS, ids=[record.name for record in RECORDS])
def test_relevance_in_half_precision_is_near_that_in_double(record: Record):
    sample = record.samples[0]
    module, inputs = sample.module(), [x + 0.125 for x in sample.inputs("mixed")]
    y = module(*inputs).detach()
    R = torch.where(y.abs() < 0.3, 0.0, record.start(y, sample.name))
    want = explain(module, only(module, record.rule(1e-3)), inputs, R)[0]
    half = sample.module(torch.float16)
    got = explain(half, only(half, record.rule(1e-3)), [x.half() for x in inputs], R.half())[0]
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 0.02)


def test_autocast_gives_relevance_in_the_inputs_precision():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    td = TensorDict({"x": torch.randn(3, 4)}, [3])
    for rule in (EpsilonRule(), ZPlusRule(), FlatRule(), GammaRule()):
        mapper = EpsilonPlus(
            rule_mapper=lambda n, m, rule=rule: rule if isinstance(m, nn.Linear) else None
        )
        with LRP(mapper, ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
            want = hooked(td.clone())["attr", "x"]
            with torch.autocast("cpu", torch.bfloat16):
                found = hooked(td.clone())
                plain = net(td["x"])
        assert bits(found["y"]) == bits(plain) and found["attr", "x"].dtype == torch.float32
        assert found["attr", "x"].isfinite().all()
        if isinstance(rule, FlatRule):
            assert_close(found["attr", "x"], want, 0.1)
