"""The contract about batches: bounded chunks, no mixing, and a layout that is verified."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_like import InputXGradient, IntegratedGradients, LayoutError, Saliency


class Seen:
    """The shapes that a model is called with. Not a list: a copied model shall write here too."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []


class Noted(nn.Module):
    """Notes what it is called with, and runs the network inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, Seen()

    def forward(self, *x: Tensor) -> Tensor:
        self.seen.shapes.append(tuple(x[0].shape))
        return self.inner(*x)


class Image(nn.Sequential):
    """A plain Conv2d network: takes [C, H, W] or [N, C, H, W], nothing else."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(-3), nn.Linear(3 * 16, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Recurrent(nn.Module):
    """A GRU over [time] or [env, time]; the last dimension before the features is time."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim > 3:
            raise ValueError("[env, time, features], please")
        return self.head(self.gru(x)[0])


class Cumulative(nn.Module):
    """Sums over time, the first dimension; takes anything and must not have time folded."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.head(x).cumsum(0))


class Centring(nn.Module):
    """Subtracts the mean over the batch, the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.head(x - x.mean(0)))


class Picky(Centring):
    """As centring, and reads a number off its input, which vmap refuses."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 + 0.0 * x.detach().sum().item())


class FirstOfBatch(nn.Module):
    """Reads a number of the first row of whatever batch it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.head(x) + x.reshape(-1, 3)[0].sum())


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))


# The network, the shape of its input, its batch dimensions, and the layout that is right for it.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, str]] = {
    "dense": (dense, (5, 3), 1, "leading"),
    "dense over two dimensions": (dense, (2, 3, 3), 2, "leading"),
    "dense without a batch": (dense, (3,), 0, "leading"),
    "images": (Image, (5, 1, 4, 4), 1, "folded"),
    "one image": (Image, (1, 4, 4), 0, "leading"),
    "recurrent over env and time": (Recurrent, (4, 5, 3), 2, "folded"),
    "recurrent over time": (Recurrent, (5, 3), 1, "leading"),
    "sums over time": (Cumulative, (5, 3), 1, "vmap"),
    "centres over the batch": (Centring, (5, 3), 1, "vmap"),
    "looks at its first row": (FirstOfBatch, (5, 3), 1, "vmap"),
    "centres and refuses vmap": (Picky, (5, 3), 1, "one by one"),
}


def policy(case: str) -> tuple[Any, TensorDict]:
    make, shape, dims, _ = CASES[case]
    td = TensorDict({"x": torch.randn(shape, dtype=torch.float64)}, shape[:dims])
    return TensorDictModule(Noted(make().double()), ["x"], ["y"]), td


def loop(model: Any, td: TensorDict, n_steps: int) -> Tensor:
    """Midpoint integrated gradients of the first output, one plain call after another."""
    x, total = td["x"], torch.zeros_like(td["x"])
    for k in range(n_steps):
        point = (x * (k + 0.5) / n_steps).requires_grad_()
        total += torch.autograd.grad(model.module(point)[..., 0].sum(), point)[0] / n_steps
    return total * x


def integrated(**options: Any) -> IntegratedGradients:
    given = {"n_steps": 12, "method": "riemann_middle", "gap_tolerance": None, **options}
    return IntegratedGradients(("y", 0), **given)


@pytest.mark.parametrize("rows", [None, 1, 17])
@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("case", CASES)
def test_stacked_evaluations_are_those_of_a_loop_for_every_kind_of_model(case, drive, rows):
    model, td = policy(case)
    expected = loop(model, td, 12)
    with integrated(internal_batch_size=rows).prepare(model) as hooked:
        for _ in range(2):  # the second call finds the layout decided
            (hooked if drive else hooked.observe)(td)
            torch.testing.assert_close(td["attr", "x"], expected, rtol=1e-9, atol=1e-11)
    change = model.module(td["x"])[..., 0] - model.module(torch.zeros_like(td["x"]))[..., 0]
    if dims := CASES[case][2]:
        gap = expected.flatten(dims).sum(-1) - change
        torch.testing.assert_close(td["attr_gap"], gap.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_the_first_layout_that_is_right_is_chosen_and_printed(case):
    model, td = policy(case)
    context = integrated().prepare(model)
    assert "stacking" not in str(context)
    with context as hooked:
        hooked(td)
        assert f"stacking     {CASES[case][3]}" in str(context)


def test_the_layout_is_tried_out_at_points_that_the_path_visits():
    def bounded(x: Tensor) -> Tensor:
        if bool((x < 0).any()) or bool((x > 1).any()):
            raise ValueError("pixels lie between 0 and 1")
        return (x**2).sum(-1)

    def entropy(p: Tensor) -> Tensor:
        return torch.distributions.Categorical(probs=p, validate_args=True).entropy()

    pixels = torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64)
    chances = torch.softmax(torch.randn(5, 3, dtype=torch.float64), -1)
    for function, x, baseline in ((bounded, pixels, 0.0), (entropy, chances, 1 / 3)):
        method = integrated(n_steps=200, baselines=baseline).replaced(target="y")
        model = TensorDictModule(function, ["x"], ["y"])
        with method.prepare(model) as hooked:
            td = hooked(TensorDict({"x": x}, x.shape[:1]))
        change = function(x) - function(torch.full_like(x, baseline))
        torch.testing.assert_close(td["attr", "x"].sum(-1), change, rtol=1e-3, atol=1e-4)


def test_the_layout_is_decided_once_per_context():
    model, td = policy("centres over the batch")
    seen = model.module.seen
    with integrated().prepare(model) as hooked:
        hooked(td)
        first = len(seen.shapes)
        seen.shapes.clear()
        hooked(td)
        second = len(seen.shapes)
        seen.shapes.clear()
        hooked(td)
    assert first > second == len(seen.shapes)


def test_a_layout_of_one_batch_shape_is_not_trusted_for_another():
    model, td = policy("images")
    one = TensorDict({"x": torch.randn(1, 4, 4, dtype=torch.float64)}, [])
    expected = [loop(model, one, 12), loop(model, td, 12)]
    with integrated().prepare(model) as hooked:
        found = [hooked(one)["attr", "x"], hooked(td)["attr", "x"]]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", ["dense", "images", "centres over the batch"])
def test_the_most_rows_in_one_evaluation_do_not_grow_with_the_steps(case):
    def most(n_steps: int, **options: Any) -> int:
        torch.manual_seed(0)
        model, td = policy(case)
        with integrated(n_steps=n_steps, **options).prepare(model) as hooked:
            hooked(td)
        per_row = td["x"][0].numel()
        return max(torch.Size(shape).numel() // per_row for shape in model.module.seen.shapes)

    assert most(2000) == most(1000) <= 512 + 5
    assert most(300, internal_batch_size=20) <= 20
    # The layout is tried out with three evaluations; apart from that, one is the least.
    assert most(300, internal_batch_size=1) <= 15


def test_peak_memory_does_not_grow_with_the_steps():
    """What autograd keeps between forward and backward is counted."""

    def kept(n_steps: int) -> int:
        sizes: list[int] = []
        alive: list[int] = [0]

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor, self.size = tensor, tensor.numel()
                alive[0] += self.size
                sizes.append(alive[0])

            def __del__(self) -> None:
                alive[0] -= self.size

        torch.manual_seed(0)
        x = torch.randn(16, 3)
        with (
            torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor),
            integrated(n_steps=n_steps).prepare(dense(), ["x"], ["y"]) as hooked,
        ):
            hooked(TensorDict({"x": x}, [16]))
        return max(sizes)

    assert kept(1000) == kept(100)


@pytest.mark.parametrize("make", [Saliency, InputXGradient, lambda t: integrated()])
def test_batch_elements_are_never_mixed(make):
    model, td = policy("dense")
    other = td.clone()
    other["x"][1:] = torch.randn(4, 3, dtype=torch.float64) * 100
    with make(("y", 0)).prepare(model) as hooked:
        first, second = hooked(td)["attr", "x"], hooked(other)["attr", "x"]
    torch.testing.assert_close(first[0], second[0], rtol=1e-12, atol=0)


def test_what_is_not_attributed_is_the_same_at_every_evaluation():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = dense()

        def forward(self, x: Tensor, scale: Tensor, index: Tensor) -> Tensor:
            return (self.net(x) * scale).gather(-1, index)

    net = Scaled().double()
    td = TensorDict(
        {
            "x": torch.randn(5, 3, dtype=torch.float64),
            "scale": torch.randn(5, 1, dtype=torch.float64),
            "index": torch.randint(2, (5, 1)),
        },
        [5],
    )
    method = integrated(keys=["x"]).replaced(target="y")
    with method.prepare(net, ["x", "scale", "index"], ["y"]) as hooked:
        hooked(td)
    total = torch.zeros_like(td["x"])
    for k in range(12):
        point = (td["x"] * (k + 0.5) / 12).requires_grad_()
        out = net(point, td["scale"], td["index"]).sum()
        total += torch.autograd.grad(out, point)[0] / 12
    torch.testing.assert_close(td["attr", "x"], total * td["x"], rtol=1e-9, atol=1e-11)
    assert ("attr", "scale") not in td.keys(True)


class Noisy(nn.Module):
    """Random in evaluation mode too: a weight that is drawn anew at each call."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :2] * (1 + torch.rand(2, dtype=x.dtype))


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
def test_a_model_that_draws_is_explained_at_one_and_the_same_draw(drive):
    td = TensorDict({"x": torch.randn(5, 3, dtype=torch.float64)}, [5])
    with integrated().prepare(Noisy(), ["x"], ["y"]) as hooked:
        before = torch.get_rng_state()
        (hooked if drive else hooked.observe)(td)
        assert drive or torch.equal(before, torch.get_rng_state())
    weight = td["attr", "x"] / td["x"]
    torch.testing.assert_close(weight, weight[:1].expand(5, 3), rtol=1e-9, atol=1e-12)
    assert 1 <= weight[0, 0] <= 2 and not weight[:, 1:].any()
    torch.testing.assert_close(td["attr_gap"], torch.zeros_like(td["attr_gap"]), rtol=0, atol=1e-9)


def test_a_model_that_gives_something_else_each_time_is_refused_rather_than_guessed():
    count = itertools.count(1)
    model = TensorDictModule(lambda x: x[..., :2] * next(count), ["x"], ["y"])
    td = TensorDict({"x": torch.randn(5, 3, dtype=torch.float64)}, [5])
    with integrated().prepare(model) as hooked:
        for call in (hooked, hooked.observe):
            with pytest.raises(LayoutError, match="random"):
                call(td)
