"""Folded batch norm against the network that is merged explicitly; what cannot be merged is affine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from pristine import assert_same, bits, snapshot
from tdhook_like import LRP, Each, EpsilonPlus
from tdhook_like.attribution.lrp import (
    AlphaBetaRule,
    BaseRuleMapper,
    EpsilonPlusFlat,
    EpsilonRule,
    FlatRule,
    GammaRule,
    IgnoreRule,
    Inputs,
    PassRule,
    Rule,
    UniformRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tdhook_like.attribution.lrp.batchnorm import BatchNormRule
from tdhook_like.errors import RuleError

F64 = torch.float64
B = 3


class Proportional(Rule):
    """Epsilon, in the papers' terms: relevance in, relevance out."""

    def relevance(self, module: nn.Module, inputs: Inputs, output: Any, R_out: Any) -> Any:
        with torch.enable_grad():
            x = inputs[0].clone().requires_grad_()
            z = module.forward(x)
            (g,) = torch.autograd.grad(z, x, R_out / (z + 1e-6 * z.sign()))
        return x.detach() * g


RULES: dict[str, Callable[[], Rule]] = {
    "epsilon": partial(EpsilonRule, 1e-3),
    "z-plus": partial(ZPlusRule, 1e-3),
    "alpha-beta": partial(AlphaBetaRule, 2.0, 1.0),
    "gamma": partial(GammaRule, 0.5),
    "w-square": WSquareRule,
    "w-square with bias": partial(WSquareRule, with_bias=True),
    "flat": FlatRule,
    "z-box": partial(ZBoxRule, -3.0, 3.0),
    "epsilon without bias": partial(EpsilonRule, 1e-3, zero_params="bias"),
    "in relevance": Proportional,
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def lived_in(net: nn.Module) -> Any:
    """The net in evaluation mode, with statistics and parameters of no initialisation."""
    net = net.double().eval()
    with torch.no_grad():
        for name, value in (*net.named_buffers(), *net.named_parameters()):
            if value.is_floating_point():
                value.copy_(
                    torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value)
                )
    return net


def on(kinds: Any, rule: Rule, norm: Rule | None = None) -> Any:
    """One rule on all layers of some kinds, :class:`BaseRuleMapper` elsewhere."""
    base = BaseRuleMapper()

    def mapper(path: str, module: nn.Module) -> Rule | None:
        if isinstance(module, kinds):
            return rule
        if norm is not None and isinstance(module, nn.modules.batchnorm._BatchNorm):
            return norm
        return base(path, module)

    return mapper


LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def explained(net: nn.Module, mapper: Any, x: Tensor, target: Any = None, **options: Any) -> Any:
    """Relevance of the input, started at the sum of squares of all outputs."""
    target = (lambda td: td["y"].square().flatten(1).sum(1)) if target is None else target
    options = {"unhandled": "ignore", "unreached": "ignore", **options}
    with LRP(mapper, target, **options).prepare(net, ["x"], ["y"]) as hooked:
        return hooked(TensorDict({"x": x}, [len(x)]))["attr", "x"]


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# --- behind a layer -------------------------------------------------------------------------------

CONVS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], int]] = {
    # The layer, an input's shape, how many channels come out.
    "1d": (partial(nn.Conv1d, 4, 6, 3), (4, 7), 6),
    "2d": (partial(nn.Conv2d, 4, 6, 3, padding=1, stride=2), (4, 6, 5), 6),
    "3d": (partial(nn.Conv3d, 2, 3, 2), (2, 3, 4, 3), 3),
    "2d, groups": (partial(nn.Conv2d, 4, 6, 2, groups=2), (4, 4, 4), 6),
    "2d, depthwise": (partial(nn.Conv2d, 4, 8, 2, groups=4), (4, 4, 4), 8),
    "2d, dilated, reflected": (
        partial(nn.Conv2d, 2, 3, 2, dilation=2, padding=1, padding_mode="reflect"),
        (2, 5, 5),
        3,
    ),
    "2d, same": (partial(nn.Conv2d, 2, 3, 3, padding="same"), (2, 4, 4), 3),
    "transposed 1d": (partial(nn.ConvTranspose1d, 4, 6, 3, stride=2), (4, 4), 6),
    "transposed 2d, groups": (
        partial(nn.ConvTranspose2d, 4, 6, 3, stride=2, groups=2, output_padding=1),
        (4, 3, 3),
        6,
    ),
    "transposed 3d": (partial(nn.ConvTranspose3d, 2, 3, 2, padding=1), (2, 3, 3, 3), 3),
    "dense": (partial(nn.Linear, 5, 6), (5,), 6),
}
every_layer = pytest.mark.parametrize("layer", CONVS.values(), ids=CONVS)


def norm_for(layer: nn.Module, channels: int, **options: Any) -> Any:
    dims = 1 if isinstance(layer, nn.Linear) else len(layer.kernel_size)  # pyright: ignore
    return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](channels, **options)


def merged(layer: nn.Module, norm: Any) -> nn.Module:
    """What torch merges the two into, on copies of both."""
    layer, norm = copy.deepcopy(layer), copy.deepcopy(norm)
    if norm.weight is None:
        norm.weight = nn.Parameter(torch.ones_like(norm.running_mean))
        norm.bias = nn.Parameter(torch.zeros_like(norm.running_mean))
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    if not transposed or layer.groups == 1:
        return fuse_conv_bn_eval(layer, norm, transpose=transposed)  # pyright: ignore
    # torch takes the weight's first dimension for all inputs: group by group.
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    weight = layer.weight.detach().clone()
    rows, each = weight.shape[0] // layer.groups, weight.shape[1]
    for group in range(layer.groups):
        for i in range(rows):
            for o in range(each):
                weight[group * rows + i, o] *= scale[group * each + o]
    bias = shift if layer.bias is None else layer.bias * scale + shift
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias.detach())
    return layer


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


# --- who is behind whom is what flows, not names --------------------------------------------------


class Functional(nn.Module):
    """Calls its layer and its normalisation as functions."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        h = F.batch_norm(
            self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps
        )
        return F.relu(h)


class Block(nn.Module):
    """A basic block, as torchvision writes it."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Merged(nn.Module):
    """The same block, its normalisations merged into its convolutions."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = merged(block.conv1, block.bn1), merged(block.conv2, block.bn2)
        down = block.downsample
        self.down = nn.Identity() if down is None else merged(down[0], down[1])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.down(x))


def resnet() -> Any:
    stem = [nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    blocks = [Block(4, 4), Block(4, 6, 2), Block(6, 6), Block(6, 8, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def merged_resnet(net: Any) -> nn.Module:
    blocks = [Merged(module) for module in net if isinstance(module, Block)]
    tail = [copy.deepcopy(module) for module in net[-3:]]
    return nn.Sequential(merged(net[0], net[1]), nn.ReLU(), nn.MaxPool2d(2), *blocks, *tail)


MAPPERS: dict[str, Any] = {
    "epsilon plus": EpsilonPlus(1e-3, 1e-3),
    "epsilon plus flat": EpsilonPlusFlat(),
    "epsilon": on(LAYERS, EpsilonRule(1e-3)),
    "gamma": on(LAYERS, GammaRule(0.25)),
}


@pytest.mark.parametrize("target", [("y", 1), Each("y")], ids=["one target", "several"])
@pytest.mark.parametrize("mapper", MAPPERS.values(), ids=MAPPERS)
def test_a_resnet_is_explained_as_the_merged_one_and_nothing_of_it_is_touched(
    mapper: Any, target: Any
):
    net = lived_in(resnet())
    with torch.no_grad():
        for module in net.modules():  # weights of both signs, but outputs that are alive
            if isinstance(module, nn.BatchNorm2d):
                module.bias.add_(1.0)
    one, x = merged_resnet(net), torch.randn(B, 2, 17, 17, dtype=F64)
    torch.testing.assert_close(net(x), one(x))
    outputs, before = bits(net(x)), snapshot(net)
    with LRP(mapper, target).prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, [B]))
    assert bits(td["y"]) == outputs
    assert_same(before, snapshot(net))
    wanted = explained(one, mapper, x, target)
    same(td["attr", "x"] / wanted.abs().max(), wanted / wanted.abs().max())


def test_a_functional_norm_behind_a_layer_is_part_of_it():
    net = lived_in(Functional(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)))
    one = nn.Sequential(merged(net.conv, net.norm), nn.ReLU())
    x, mapper = torch.randn(B, 2, 4, 4, dtype=F64), on(LAYERS, ZPlusRule(1e-3))
    same(explained(net, mapper, x), explained(one, mapper, x))


class Wired(nn.Module):
    """Layers and norms, and how they are wired."""

    def __init__(self, wiring: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
        self.norm, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.many = nn.ModuleList(nn.Conv2d(2, 3, 1) for _ in range(6))
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def _each_then_each(net: Any, x: Tensor) -> Tensor:
    made = [conv(x) for conv in net.many]
    return torch.stack([net.norm(h) for h in made]).sum(0)


MERGED: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "one norm on two layers' outputs": (
        lambda net, x: net.norm(net.conv(x)) + net.norm(net.other(x)),
        lambda net, x: net.conv_norm(x) + net.other_norm(x),
    ),
    "two norms on one layer's output": (
        lambda net, x: (lambda h: net.norm(h) + net.second(h))(net.conv(x)),
        lambda net, x: net.conv_norm(x) + net.conv_second(x),
    ),
    "a layer's output that is used otherwise, too": (
        lambda net, x: (lambda h: net.norm(h) * 2 + h)(net.conv(x)),
        lambda net, x: net.conv_norm(x) * 2 + net.conv(x),
    ),
    "layers first, norms later": (
        _each_then_each,
        lambda net, x: torch.stack([part(x) for part in net.many_norm]).sum(0),
    ),
    "a norm by name": (
        lambda net, x: net.norm(input=net.conv(x)),
        lambda net, x: net.conv_norm(x),
    ),
}


@pytest.mark.parametrize("ledger", [False, 1e-9])
@pytest.mark.parametrize("rule", ["epsilon", "z-plus", "gamma"])
@pytest.mark.parametrize("wiring", MERGED.values(), ids=MERGED)
def test_layers_and_norms_are_merged_along_what_flows(wiring: Any, rule: str, ledger: Any):
    net: Any = lived_in(Wired(wiring[0]))
    one = Wired(wiring[1])
    for name in ("conv", "other"):
        setattr(one, name, getattr(net, name))
        for norm in ("norm", "second"):
            setattr(one, f"{name}_{norm}", merged(getattr(net, name), getattr(net, norm)))
    one.many_norm = nn.ModuleList(merged(conv, net.norm) for conv in net.many)
    one = one.double().eval()
    x, mapper = torch.randn(B, 2, 3, 3, dtype=F64), on(LAYERS, RULES[rule]())
    same(explained(net, mapper, x, ledger=ledger), explained(one, mapper, x))


APART: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "overwritten by a module in between": lambda net, x: net.norm(net.act(net.conv(x))),
    "overwritten by a function in between": lambda net, x: net.norm(net.conv(x).mul_(-1.0)),
    "changed in between": lambda net, x: net.norm(net.conv(x) + 1.0),
    "transposed in between": lambda net, x: net.norm(net.conv(x).transpose(2, 3)),
}


@pytest.mark.parametrize("ledger", [False, 1e-9])
@pytest.mark.parametrize("wiring", APART.values(), ids=APART)
def test_what_is_changed_between_layer_and_norm_keeps_them_apart(wiring: Any, ledger: Any):
    net, x = lived_in(Wired(wiring)), torch.randn(B, 2, 3, 3, dtype=F64)
    rule = ZPlusRule(1e-3)
    found = explained(net, on(LAYERS, rule), x, ledger=ledger)
    assert torch.equal(found, explained(net, on(LAYERS, rule, BatchNormRule(fold=False)), x))


def test_a_dense_layer_over_steps_is_not_merged_with_a_norm_of_channels():
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.dense(x).permute(0, 2, 1))

    class OfSteps(Steps):  # as many steps as numbers, so that shapes would not tell
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.dense(x))

    for build in (Steps, OfSteps):
        net, x = lived_in(build()), torch.randn(B, 5, 4, dtype=F64)
        found = explained(net, on(LAYERS, ZPlusRule(1e-3)), x)
        affine = on(LAYERS, ZPlusRule(1e-3), BatchNormRule(fold=False))
        assert torch.equal(found, explained(net, affine, x))


def test_a_convolution_without_a_batch_dimension_is_not_merged_with_a_norm_over_positions():
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))  # [3, 3]: a batch of three with three channels

    net, x = lived_in(Unbatched()), torch.randn(2, 3, dtype=F64)
    found = []
    for norm in (BatchNormRule(), BatchNormRule(fold=False)):
        mapper = on(LAYERS, ZPlusRule(1e-3), norm)
        with LRP(mapper, lambda td: td["y"].square().sum()).prepare(net, ["x"], ["y"]) as hooked:
            found.append(hooked(TensorDict({"x": x}, []))["attr", "x"])
    assert torch.equal(*found)


@pytest.mark.parametrize("rule", [None, IgnoreRule()], ids=["no rule", "ignored"])
def test_a_layer_without_a_rule_keeps_its_gradient_and_the_norm_its_own(rule: Rule | None):
    net, x = lived_in(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))), torch.randn(B, 4).double()
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)
    mapper = lambda path, m: BatchNormRule() if isinstance(m, nn.BatchNorm1d) else rule  # noqa: E731
    same(explained(net, mapper, x, ("y", 1)), x * g)


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
