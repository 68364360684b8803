"""Baselines in every form, against integrated gradients of models whose integral is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torch import Tensor, nn

from pristine import assert_same, bits, snapshot, td_snapshot
from tdhook_like import BaselineError, FromBuffer, FromKey, IntegratedGradients
from tdhook_like.baselines import resolve

KEYS = ("observation", ("agents", "speed"))


class Linear(nn.Module):
    """A linear function of two keys: its integral is (input − baseline) × weight, exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 1), nn.Linear(2, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.first(first) + self.second(second)


def inputs(*batch: int) -> TensorDict:
    td = {"observation": torch.randn(*batch, 3), ("agents", "speed"): torch.randn(*batch, 2)}
    rest = {"rest": torch.randn(*batch, 3), ("agents", "rest"): torch.randn(*batch, 2)}
    return TensorDict({**td, **rest}, batch)


def explained(baselines: Any, td: TensorDict, drive: bool = True) -> tuple[Tensor, Tensor]:
    """The baselines that attributions speak of: what is subtracted before the weights."""
    net = Linear()
    before, read = snapshot(net), td_snapshot(td, keys=["rest", *KEYS])
    method = IntegratedGradients("y", baselines=baselines, n_steps=4)
    with method.prepare(net, list(KEYS), ["y"]) as hooked:
        (hooked if drive else hooked.observe)(td)
    assert_same(before, snapshot(net))
    assert_same(read, td_snapshot(td, keys=["rest", *KEYS]))
    assert td["attr_gap"].abs().max() < 1e-5
    weights = net.first.weight.detach(), net.second.weight.detach()
    found = [td["attr"].get(key) / w.squeeze(0) for key, w in zip(KEYS, weights, strict=True)]
    return td["observation"] - found[0], td["agents", "speed"] - found[1]


class Buffer:
    """A replay buffer: rows whose two keys belong together."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def sample(self, n: int) -> TensorDict:
        self.drawn.append(n)
        row = torch.randint(100, (n, 1)).float()
        observation, speed = row.expand(n, 3), row.expand(n, 2)
        rows = {"observation": observation, ("agents", "speed"): speed, "other": -row}
        return TensorDict(rows, [n])


FORMS: dict[str, tuple[Any, Any]] = {
    "nothing": (None, lambda td: (0.0, 0.0)),
    "a number": (0.5, lambda td: (0.5, 0.5)),
    "a whole number": (2, lambda td: (2.0, 2.0)),
    "an empty dict": ({}, lambda td: (0.0, 0.0)),
    "a number for one key": ({"observation": 1.5}, lambda td: (1.5, 0.0)),
    "numbers by key": ({"observation": 1.5, ("agents", "speed"): -1.0}, lambda td: (1.5, -1.0)),
    "a key in a tuple": ({("observation",): 1.5}, lambda td: (1.5, 0.0)),
    "a tensor of one number": (torch.tensor(0.25), lambda td: (0.25, 0.25)),
    "a tensor of features": (
        {"observation": torch.tensor([1.0, 2.0, 3.0])},
        lambda td: (torch.tensor([1.0, 2.0, 3.0]), 0.0),
    ),
    "a tensor of another dtype": (
        {"observation": torch.tensor([1, 2, 3])}, lambda td: (torch.tensor([1.0, 2.0, 3.0]), 0.0),
    ),
    "a tensor in double precision": (
        {"observation": torch.full((3,), 0.5, dtype=torch.float64)}, lambda td: (0.5, 0.0),
    ),
    "a tensor that is a parameter": (
        {"observation": nn.Parameter(torch.ones(3))}, lambda td: (1.0, 0.0),
    ),
    "a function": (lambda x: x / 2, lambda td: (td["observation"] / 2, td["agents", "speed"] / 2)),
    "a function for one key": (
        {("agents", "speed"): lambda x: x.flip(-1)[..., :1]},
        lambda td: (0.0, td["agents", "speed"][..., 1:]),
    ),
    "another key": ({"observation": FromKey("rest")}, lambda td: (td["rest"], 0.0)),
    "another nested key": (
        {("agents", "speed"): FromKey(("agents", "rest"))}, lambda td: (0.0, td["agents", "rest"]),
    ),
    "the same key": ({"observation": FromKey("observation")}, lambda td: (td["observation"], 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("batch", [(4,), (), (2, 3)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_baseline_is_what_it_says(form, batch, drive):
    spec, expected = FORMS[form]
    td = inputs(*batch)
    for found, value in zip(explained(spec, td, drive), expected(td), strict=True):
        torch.testing.assert_close(
            found, torch.as_tensor(value).expand(found.shape).float(), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("batch", [(4,), (), (2, 3)], ids=str)
def test_a_buffer_gives_one_row_per_element_and_the_keys_of_a_row_stay_together(batch):
    td, buffer = inputs(*batch), Buffer()
    first, second = explained(FromBuffer(buffer), td)
    assert buffer.drawn == [max(td.numel(), 1)]
    rows = first.round().reshape(-1, 3)
    torch.testing.assert_close(first, first.round(), rtol=0, atol=1e-3)
    torch.testing.assert_close(second.round().reshape(-1, 2), rows[:, :2])
    if td.numel() > 2:
        assert len(rows[:, 0].unique()) > 1


def test_a_buffer_can_be_read_at_another_key():
    td, buffer = inputs(4), Buffer()
    first, second = explained({"observation": FromBuffer(buffer, "other")}, td)
    assert (first <= 0).all() and first.min() < -1
    torch.testing.assert_close(second, torch.zeros(4, 2), atol=1e-5, rtol=0)


def test_two_buffers_are_drawn_from_apart():
    buffers = Buffer(), Buffer()
    baselines = {"observation": FromBuffer(buffers[0]), ("agents", "speed"): FromBuffer(buffers[1])}
    explained(baselines, inputs(4))
    assert [buffer.drawn for buffer in buffers] == [[4], [4]]


def test_drawing_from_a_buffer_leaves_the_rng_as_it_was():
    td, net = inputs(4), Linear()
    method = IntegratedGradients("y", baselines=FromBuffer(Buffer()), n_steps=2)
    with method.prepare(net, list(KEYS), ["y"]) as hooked:
        before = snapshot(net)
        hooked.observe(td)
        assert_same(before, snapshot(net))
        first = td["attr", "observation"].clone()
        torch.rand(1)
        assert not torch.equal(hooked.observe(td)["attr", "observation"], first)


def test_a_real_replay_buffer_gives_baselines():
    data = pytest.importorskip("torchrl.data")
    buffer = data.ReplayBuffer(storage=data.LazyTensorStorage(10))
    buffer.extend(TensorDict({"observation": torch.full((10, 3), 7.0)}, [10]))
    first, _ = explained({"observation": FromBuffer(buffer)}, inputs(2, 2))
    torch.testing.assert_close(first, torch.full((2, 2, 3), 7.0), rtol=1e-4, atol=1e-4)


def test_a_baseline_equal_to_the_input_leaves_nothing_to_explain():
    td = inputs(4)
    net = Linear()
    with IntegratedGradients("y", baselines=lambda x: x).prepare(net, list(KEYS), ["y"]) as hooked:
        hooked(td)
    assert not td["attr", "observation"].any() and not td["attr_gap"].any()


def test_a_lazy_stack_gives_baselines_by_key():
    rows = [inputs(3) for _ in range(2)]
    td = lazy_stack(rows, 1)
    net = Linear()
    method = IntegratedGradients("y", baselines={"observation": FromKey("rest")}, n_steps=2)
    with method.prepare(net, list(KEYS), ["y"]) as hooked:
        hooked(td)
    expected = (td["observation"] - td["rest"]) * net.first.weight[0]
    torch.testing.assert_close(td["attr", "observation"], expected.detach())


def test_resolved_baselines_carry_no_graph_and_leave_what_they_were_made_of():
    td, given = inputs(4), torch.ones(3).requires_grad_()
    (found,) = resolve({"observation": given}, td, ("observation",), (td["observation"],))
    assert not found.requires_grad and found.shape == (4, 3) and found.dtype == torch.float32
    assert bits(given) == bits(torch.ones(3))


def test_a_tensor_baseline_follows_a_broadcast_from_the_right_only():
    td = inputs(3)  # as many elements as features: a column must be given as one
    column = torch.tensor([[1.0], [2.0], [3.0]])
    first, _ = explained({"observation": column}, td)
    torch.testing.assert_close(first, column.expand(3, 3), rtol=1e-4, atol=1e-4)
    first, _ = explained({"observation": column.squeeze(-1)}, inputs(3))
    torch.testing.assert_close(first, column.T.expand(3, 3), rtol=1e-4, atol=1e-4)


def test_what_is_wrong_is_said_before_the_model_runs():
    ran: list[int] = []

    class Counts(Linear):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            ran.append(1)
            return super().forward(first, second)

    with pytest.raises(BaselineError, match="'obs'"):
        IntegratedGradients("y", baselines={"obs": 0.0}).prepare(Counts(), list(KEYS), ["y"])
    assert not ran
