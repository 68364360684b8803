"""Which layer a norm is part of: what flows decides, not names or order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from batch_norm_models import F64, LAYERS, RULES, B, explained, lived_in, merged, on, same
from pristine import assert_same, bits, snapshot
from tdhook_like import LRP, Each, EpsilonPlus
from tdhook_like.attribution.lrp import (
    EpsilonPlusFlat,
    EpsilonRule,
    GammaRule,
    IgnoreRule,
    Rule,
    ZPlusRule,
)
from tdhook_like.attribution.lrp.batchnorm import BatchNormRule


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
