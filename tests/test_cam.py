"""Grad-CAM and guided Grad-CAM against sums by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from pristine import assert_same, snapshot
from tdhook_like import ContextError, Each, InputError, PathError, Saliency
from tdhook_like.attribution.cam import GradCAM, GuidedGradCAM, resized
from tdhook_like.attribution.rectified import GuidedBackprop

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
KINDS = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Net(nn.Module):
    def __init__(self, places: int, size: int) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[places]
        self.first, self.second = convolution(2, 3, 3), convolution(3, 4, 2, stride=2)
        inner = (size - 4) // 2 + 1
        self.relu, self.top = nn.ReLU(), nn.Linear(4 * inner**places, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.second(self.relu(self.first(x))))
        return self.top(h.flatten(1))


def made(places: int) -> tuple[Net, Tensor]:
    size = {1: 12, 2: 9, 3: 7}[places]
    shape = (3, 2, *[size + i for i in range(1)], *[size] * (places - 1))
    return Net(places, size).double(), torch.randn(shape, dtype=torch.float64)


def map_by_hand(net: Net, x: Tensor, path: str, output: int, relu: bool) -> Tensor:
    """Selvaraju et al. 2017, eq. 1 and 2, position by position."""
    first = net.first(x)
    if path == "first":
        a = first.detach().requires_grad_()
        y = net.top(net.relu(net.second(net.relu(a))).flatten(1))
    else:
        a = net.second(net.relu(first)).detach().requires_grad_()
        y = net.top(net.relu(a).flatten(1))
    g = torch.autograd.grad(y[:, output].sum(), a)[0]
    a = a.detach()
    found = torch.zeros(len(x), *a.shape[2:], dtype=a.dtype)
    for b in range(len(x)):
        for place in itertools.product(*map(range, a.shape[2:])):
            value = sum(float(g[b, c].mean()) * float(a[(b, c, *place)]) for c in range(a.shape[1]))
            found[(b, *place)] = max(value, 0.0) if relu else value
    return found


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
@pytest.mark.parametrize("path", ["first", "second"])
@pytest.mark.parametrize("places", [1, 2, 3])
def test_maps_of_any_layer_are_those_by_hand(places, path, relu, drive):
    net, x = made(places)
    before = snapshot(net)
    with GradCAM(Each("y"), at=path, relu=relu).prepare(net, ["x"], ["y"]) as hooked:
        td = (hooked if drive else hooked.observe)(TensorDict({"x": x}, [3]))
    assert_same(before, snapshot(net))
    for i in range(2):
        expected = map_by_hand(net, x, path, i, relu)
        assert expected.abs().max() > 0
        torch.testing.assert_close(td["attr_at", path][:, i], expected)
        wide = F.interpolate(
            expected[:, None], x.shape[2:], mode=KINDS[places], align_corners=False
        )
        torch.testing.assert_close(td["attr", "x"][:, i], wide.expand_as(x))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "cubic", "area"])
def test_maps_are_resized_as_asked(mode):
    net, x = made(2)
    with GradCAM(("y", 0), at="second", interpolate=mode).prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, [3]))
    kind: Any = "bicubic" if mode == "cubic" else mode
    small = td["attr_at", "second"].unsqueeze(1)
    torch.testing.assert_close(
        td["attr", "x"], F.interpolate(small, (9, 9), mode=kind).expand_as(x)
    )


def test_without_interpolation_there_are_maps_of_several_layers_and_none_at_keys():
    net, x = made(2)
    method = GradCAM({"why": ("y", 1)}, at=["first", "second"], interpolate=None)
    with method.prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, [3]))
    assert set(td.keys()) == {"x", "y", "attr_at"}
    for path in ("first", "second"):
        torch.testing.assert_close(td["attr_at", "why", path], map_by_hand(net, x, path, 1, True))


def test_channels_may_stand_behind_positions():
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 1)).double()
    with GradCAM("y", at="0", channel_dim=-1, interpolate=None, relu=False).prepare(
        net, ["x"], ["y"]
    ) as hooked:
        td = hooked(TensorDict({"x": x}, [4]))
    a = net[0](x).detach().requires_grad_()
    g = torch.autograd.grad(net[1:](a).sum(), a)[0]
    torch.testing.assert_close(td["attr_at", "0"], (g.mean(1, keepdim=True) * a.detach()).sum(-1))


def test_only_keys_with_positions_get_a_map():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.top = nn.Conv2d(1, 2, 3), nn.Linear(8, 1)

        def forward(self, pixels: Tensor, speed: Tensor) -> Tensor:
            return self.top(self.conv(pixels).tanh().flatten(1)) * speed

    td = TensorDict({"pixels": torch.randn(3, 1, 4, 4), "speed": torch.randn(3, 1)}, [3])
    with GradCAM("y", at="conv", keys="pixels").prepare(
        Two(), ["pixels", "speed"], ["y"]
    ) as hooked:
        found = hooked(td.clone())
    assert set(found["attr"].keys()) == {"pixels"} and found["attr", "pixels"].shape == (3, 1, 4, 4)
    with (
        GradCAM("y", at="conv").prepare(Two(), ["pixels", "speed"], ["y"]) as hooked,
        pytest.raises(InputError, match=r"keys=\["),
    ):
        hooked(td)


def test_guided_grad_cam_is_guided_backprop_times_the_plain_map():
    net, x = made(2)
    td = TensorDict({"x": x}, [3])
    for drive in (True, False):
        with GuidedGradCAM(Each("y"), at="second").prepare(net, ["x"], ["y"]) as hooked:
            found = (hooked if drive else hooked.observe)(td.clone())
        with GuidedBackprop(Each("y")).prepare(net, ["x"], ["y"]) as hooked:
            guided = hooked(td.clone())["attr", "x"]
        for i in range(2):
            small = map_by_hand(net, x, "second", i, True)
            wide = F.interpolate(small[:, None], (9, 9), mode="bilinear", align_corners=False)
            torch.testing.assert_close(found["attr_at", "second"][:, i], small)
            torch.testing.assert_close(found["attr", "x"][:, i], guided[:, i] * wide)


def test_a_map_is_not_resized_to_a_key_of_other_leading_dimensions():
    found = torch.rand(2, 3, 5)  # of 2 elements and 3 agents
    assert resized(found, 1, torch.zeros(2, 3, 4, 10), "linear").shape == (2, 3, 4, 10)
    with pytest.raises(InputError, match="cannot be resized"):
        resized(found, 1, torch.zeros(2, 4, 10), "linear")


def test_what_has_no_map_is_refused():
    net, x = made(2)
    with pytest.raises(ContextError, match="needs a layer"):
        GradCAM("y")
    with pytest.raises(InputError, match="interpolate must be one of"):
        GradCAM("y", at="first", interpolate="lanczos")
    for make in (GradCAM, GuidedGradCAM):
        with pytest.raises(PathError, match="2 submodules"):
            make(("y", 0), at=["first", "second"]).prepare(net, ["x"], ["y"])
        with (
            make(("y", 0), at="top").prepare(net, ["x"], ["y"]) as hooked,
            pytest.raises(InputError, match="'top' gives has 1 dimensions"),
        ):
            hooked(TensorDict({"x": x}, [3]))
        with (
            make(("y", 0), at="relu").prepare(net, ["x"], ["y"]) as hooked,
            pytest.raises(PathError, match="gives 2 tensors"),
        ):
            hooked(TensorDict({"x": x}, [3]))


def test_agents_that_share_a_convolution_have_a_map_each():
    from torchrl.modules import MultiAgentConvNet

    net = MultiAgentConvNet(
        3,
        centralized=False,
        share_params=False,
        in_features=2,
        num_cells=[4, 3],
        kernel_sizes=3,
        strides=1,
    ).double()
    x = torch.randn(5, 3, 2, 8, 8, dtype=torch.float64)
    method = GradCAM(lambda td: td["y"][..., 1, :].sum(-1), at="_empty_net.2", relu=False)
    with method.prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, [5]))
    at = td["attr_at", "_empty_net.2"]
    assert at.shape == (5, 3, 4, 4) and not at[:, [0, 2]].any() and at[:, 1].any()
    assert td["attr", "x"].shape == x.shape
    kept: list[Tensor] = []
    with Saliency(
        lambda td: td["y"][..., 1, :].sum(-1),
        abs=False,
        at="_empty_net.2",
        activations="_empty_net.2",
    ).prepare(net, ["x"], ["y"]) as hooked:
        other = hooked(TensorDict({"x": x}, [5]))
    kept = [other["activations", "_empty_net.2"], other["attr_at", "_empty_net.2"]]
    expected = (kept[1].mean((-1, -2), keepdim=True) * kept[0]).sum(2)
    torch.testing.assert_close(at, expected)
