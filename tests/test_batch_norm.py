"""Folded batch norm against the network that is merged explicitly; what cannot be merged is affine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from batch_norm_models import (
    F64,
    LAYERS,
    B,
    every_layer,
    every_rule,
    explained,
    lived_in,
    merged,
    norm_for,
    on,
    same,
)
from pristine import assert_same, snapshot
from tdhook_like import LRP, Each, EpsilonPlus
from tdhook_like.attribution.lrp import (
    BaseRuleMapper,
    EpsilonRule,
    FlatRule,
    PassRule,
    Rule,
    UniformRule,
    ZPlusRule,
)
from tdhook_like.attribution.lrp.batchnorm import BatchNormRule
from tdhook_like.errors import RuleError


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@every_rule
@every_layer
def test_behind_a_layer_it_is_the_layer_that_torch_merges_the_two_into(
    layer: Any, rule: Callable[[], Rule], bias: bool, affine: bool
):
    build, shape, channels = layer
    first = build(bias=bias)
    net = lived_in(nn.Sequential(first, norm_for(first, channels, affine=affine), nn.ReLU()))
    one = nn.Sequential(merged(net[0], net[1]), nn.ReLU())
    x = torch.randn(B, *shape, dtype=F64)
    torch.testing.assert_close(net(x), one(x))
    mapper = on(LAYERS, rule())
    same(explained(net, mapper, x), explained(one, mapper, x))


@every_layer
def test_affine_is_the_layers_rule_behind_the_norms_own_gradient(layer: Any):
    build, shape, channels = layer
    first = build()
    net = lived_in(nn.Sequential(first, norm_for(first, channels), nn.ReLU()))
    x = torch.randn(B, *shape, dtype=F64)
    epsilon = 0.1
    found = explained(net, on(LAYERS, EpsilonRule(epsilon), BatchNormRule(fold=False)), x)
    leaf = x.clone().requires_grad_()
    z = net[0](leaf)
    y = net[1](z)
    out = y.clamp(min=0)
    with torch.no_grad():
        slope = net[1].weight / (net[1].running_var + net[1].eps).sqrt()
        slope = slope.reshape(-1, *[1] * (z.ndim - 2))
        at_z = 2 * out * slope * z  # of Σ out², each number starts with 2·out per unit of it
    (g,) = torch.autograd.grad(z, leaf, at_z / (z + epsilon * z.detach().sign()))
    same(found, x * g)


@pytest.mark.parametrize("mode", ["fold", "affine", "pass"])
def test_the_mappers_option_chooses_how_it_is_read(mode: str):
    net = lived_in(nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU()))
    x = torch.randn(B, 2, 5, dtype=F64)
    rules = {"fold": BatchNormRule(), "affine": BatchNormRule(fold=False), "pass": PassRule()}
    found = explained(net, EpsilonPlus(batch_norm=mode), x)
    same(found, explained(net, on(LAYERS, ZPlusRule(), rules[mode]), x))
    others = [explained(net, EpsilonPlus(batch_norm=m), x) for m in rules if m != mode]
    assert all((found - other).abs().max() > 1e-3 for other in others)


def test_passed_it_gives_on_all_that_comes():
    net = lived_in(nn.Sequential(nn.BatchNorm1d(4)))
    x = torch.randn(B, 4, dtype=F64)
    target = ("y", 2)
    found = explained(net, BaseRuleMapper(batch_norm="pass"), x, target)
    same(found.sum(1), net(x)[:, 2])
    assert not found[:, [0, 1, 3]].any()


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(
        RuleError, match="batch_norm must be 'fold', 'affine' or 'pass', got 'merge'"
    ):
        EpsilonPlus(batch_norm="merge")


# --- in front of a layer --------------------------------------------------------------------------

IN_FRONT: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "dense": (partial(nn.Linear, 4, 3), (4,)),
    "1d": (partial(nn.Conv1d, 4, 6, 3), (4, 7)),
    "2d": (partial(nn.Conv2d, 4, 6, 3, stride=2), (4, 6, 5)),
    "2d, groups": (partial(nn.Conv2d, 4, 6, 2, groups=2), (4, 4, 4)),
    "2d, valid": (partial(nn.Conv2d, 4, 2, 2, padding="valid"), (4, 4, 4)),
    "2d, circular": (
        partial(nn.Conv2d, 4, 2, 3, padding=1, padding_mode="circular"),
        (4, 4, 4),
    ),
    "3d, replicated": (
        partial(nn.Conv3d, 4, 2, 3, padding=1, padding_mode="replicate"),
        (4, 3, 3, 3),
    ),
}


def merged_in_front(norm: Any, layer: Any) -> nn.Module:
    """``f(s·x + t; w, b) = f(x; w·s, b + Σ w·t)``, written out in loops."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        s = norm.weight / (norm.running_var + norm.eps).sqrt()
        t = norm.bias - norm.running_mean * s
        weight, bias = layer.weight.clone(), torch.zeros(len(layer.weight), dtype=F64)
        bias += 0 if layer.bias is None else layer.bias
        groups = getattr(layer, "groups", 1)
        for o in range(weight.shape[0]):
            for i in range(weight.shape[1]):
                channel = o // (weight.shape[0] // groups) * weight.shape[1] + i
                bias[o] += weight[o, i].sum() * t[channel]
                weight[o, i] *= s[channel]
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@every_rule
@pytest.mark.parametrize("layer", IN_FRONT.values(), ids=IN_FRONT)
def test_in_front_of_a_layer_that_pads_no_zeros_it_is_part_of_it_too(
    layer: Any, rule: Callable[[], Rule], bias: bool
):
    build, shape = layer
    last = build(bias=bias)
    net = lived_in(nn.Sequential(norm_for(last, 4), last, nn.ReLU()))
    one = nn.Sequential(merged_in_front(net[0], net[1]), nn.ReLU())
    x = torch.randn(B, *shape, dtype=F64)
    torch.testing.assert_close(net(x), one(x))
    mapper = on(LAYERS, rule())
    same(explained(net, mapper, x), explained(one, mapper, x))


@pytest.mark.parametrize(
    "last",
    [
        nn.Conv2d(4, 2, 3, padding=1),
        nn.Conv2d(4, 2, 3, padding="same"),
        nn.Conv2d(4, 2, 2, padding=(0, 1)),
        nn.ConvTranspose2d(4, 2, 2),
    ],
    ids=["padded", "same", "padded on one side", "transposed"],
)
def test_where_zeros_are_padded_on_it_is_affine(last: nn.Module):
    net = lived_in(nn.Sequential(nn.BatchNorm2d(4), last))
    x = torch.randn(B, 4, 4, 4, dtype=F64)
    mapper = on(LAYERS, ZPlusRule(1e-3))
    folded, affine = (
        explained(net, mapper, x),
        explained(net, on(LAYERS, ZPlusRule(1e-3), BatchNormRule(fold=False)), x),
    )
    assert torch.equal(folded, affine)


def test_between_two_layers_it_is_part_of_the_one_in_front():
    net = lived_in(nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Conv1d(3, 2, 2)))
    one = nn.Sequential(merged(net[0], net[1]), copy.deepcopy(net[2]))
    x = torch.randn(B, 2, 6, dtype=F64)
    mapper = on(LAYERS, ZPlusRule(1e-3))
    same(explained(net, mapper, x), explained(one, mapper, x))


# --- statistics of the batch ----------------------------------------------------------------------


@pytest.mark.parametrize("tracked", [True, False])
def test_with_the_batchs_own_statistics_these_are_held_constant(tracked: bool):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=tracked), nn.ReLU())
    net = lived_in(net)
    if tracked:
        net.train()
    x, epsilon = torch.randn(7, 4, dtype=F64), 0.1
    statistics = copy.deepcopy(net[1])
    found = explained(net, on(LAYERS, EpsilonRule(epsilon)), x, ("y", 0))
    z = net[0](x)
    mean, std = z.mean(0), (z.var(0, unbiased=False) + net[1].eps).sqrt()
    y = (z - mean) / std * net[1].weight + net[1].bias
    # Relevance of y, which the input of the norm gets in parts z·slope of y, the rest the shift.
    R = torch.where(y > 0, y, 0)[:, 0]
    slope = (net[1].weight / std)[0]
    at_z = torch.where(y[:, 0] > 0, z[:, 0] * slope * R / y[:, 0], 0)
    share = at_z / (z[:, 0] + epsilon * z[:, 0].sign())
    same(found, x * net[0].weight[0] * share.unsqueeze(-1))
    if tracked:  # a call that stands for the plain one counts as one batch
        assert net[1].num_batches_tracked == statistics.num_batches_tracked + 1


def test_an_observed_call_of_a_model_in_training_uses_its_running_statistics_and_folds():
    net = lived_in(nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU()))
    one, x = nn.Sequential(merged(net[0], net[1]), nn.ReLU()), torch.randn(B, 2, 5).double()
    net.train()
    before = snapshot(net)
    target = lambda td: td["y"].square().flatten(1).sum(1)  # noqa: E731
    with LRP(EpsilonPlus(), target).prepare(net, ["x"], ["y"]) as hooked:
        found = hooked.observe(TensorDict({"x": x}, [B]))["attr", "x"]
    assert_same(before, snapshot(net))
    same(found, explained(one, EpsilonPlus(), x))


def test_it_can_be_differentiated_again_as_the_merged_layer_can():
    net = lived_in(nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU()))
    one, x = nn.Sequential(merged(net[0], net[1]), nn.ReLU()), torch.randn(B, 2, 5).double()
    slopes = []
    for model in (net, one):
        leaf = x.clone().requires_grad_()
        R = explained(model, EpsilonPlus(stabilizer=1e-3), leaf, create_graph=True)
        slopes.append(torch.autograd.grad(R.square().sum(), leaf)[0])
    assert slopes[0].abs().max() > 0
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-8)


# --- a rule that is made at need ------------------------------------------------------------------


@pytest.mark.parametrize("target", [("y", 1), Each("y")], ids=["one target", "several"])
def test_the_rule_of_a_layer_whose_output_is_read_by_its_norm_alone_is_applied_once(target: Any):
    calls: list[nn.Module] = []

    class Counted(ZPlusRule):
        def share(self, run: Any, x: Tensor, y: Tensor) -> Tensor:
            calls.append(run.module)
            return super().share(run, x, y)

    net = lived_in(nn.Sequential(nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten()))
    explained(net, on(LAYERS, Counted()), torch.randn(B, 2, 4).double(), target)
    assert len(calls) == 1 and calls[0] is not net[0]


@pytest.mark.parametrize("target", [("y", 1), Each("y")], ids=["one target", "several"])
def test_a_layer_that_relevance_arrives_at_otherwise_gives_what_its_rule_says(target: Any):
    # A norm elsewhere in the model lets rules of layers wait; here one is asked for after all.
    build = lambda: [nn.Conv1d(2, 4, 2), nn.ReLU(), nn.Conv1d(4, 3, 2), nn.Flatten()]  # noqa: E731
    plain = lived_in(nn.Sequential(*build(), nn.Linear(6, 4)))
    norm = nn.BatchNorm1d(6, affine=False, eps=0.0).double().eval()  # the identity
    with_norm = nn.Sequential(*plain[:4], norm, plain[4])
    x = torch.randn(B, 2, 4, dtype=F64)
    mapper = on(nn.Conv1d, UniformZ(1e-3), None)
    same(explained(with_norm, mapper, x, target), explained(plain, mapper, x, target))


class UniformZ(ZPlusRule):
    """A subclass, whose own words are the parent's."""


def test_on_what_is_no_batch_norm_the_rule_is_refused():
    with pytest.raises(RuleError, match="no running statistics"):
        LRP(lambda path, module: BatchNormRule(), "y").prepare(
            nn.Linear(2, 1), ["x"], ["y"]
        ).__enter__()


def test_an_instance_norm_takes_it_where_it_has_statistics_of_the_training():
    mapper = on(LAYERS, ZPlusRule(1e-3))
    by_path = lambda path, m: BatchNormRule() if path == "1" else mapper(path, m)  # noqa: E731
    net: Any = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    )
    net, x = lived_in(net), torch.randn(B, 2, 5, dtype=F64)
    norm = nn.BatchNorm1d(3).double().eval()
    norm.load_state_dict(net[1].state_dict())
    same(explained(net, by_path, x), explained(merged(net[0], norm), mapper, x))
    net[1] = nn.InstanceNorm1d(3).double()
    with pytest.raises(RuleError, match="statistics of each sample"):
        explained(net, by_path, x)


def test_uniform_sharing_over_a_norm_and_what_it_reads_is_told_apart():
    class Sum(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return one + other

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.sum = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), Sum()

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            return self.sum(self.norm(h), h)

    net, x = lived_in(Net()), torch.randn(B, 2, 4, dtype=F64)
    mapper = lambda path, m: {  # noqa: E731
        "conv": FlatRule(1e-12),
        "norm": BatchNormRule(),
        "sum": UniformRule(),
    }.get(path)
    found = explained(net, mapper, x, lambda td: td["y"].flatten(1).sum(1))
    # Half of each number goes through the merged layer, half through the layer: flat both times.
    R = net(x)
    same(found, (R.sum(1, keepdim=True) / 2).expand_as(x))
