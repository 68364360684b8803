"""Activation maximisation where the best input is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from explaining import BATCHES
from explaining import explained as found
from method_references import DOUBLE, Formula
from pristine import assert_same, snapshot
from tdhook_like import ContextError, Each, InputError, KeyNotFoundError
from tdhook_like.attribution.maximisation import ActivationMaximisation


@pytest.mark.parametrize("batch", BATCHES)
def test_of_a_linear_score_it_is_a_corner_of_the_box(batch):
    net = nn.Linear(4, 2).double()
    low, high = torch.tensor([-1.0, 0.0, -3.0, 1.0]), torch.tensor([2.0, 0.5, -2.0, 9.0])
    method = ActivationMaximisation(Each("y"), bounds=(low, high))
    td = found(method, net, batch, x=torch.randn(*batch, 4, dtype=DOUBLE))
    corner = torch.where(net.weight > 0, high.double(), low.double())
    torch.testing.assert_close(td["maximising", "x"], corner.expand(*batch, 2, 4))


def test_of_a_parabola_with_decay_it_is_where_the_slope_is_none():
    centre = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    net = Formula(lambda x: -(x - centre).square().sum(-1))
    method = ActivationMaximisation("y", decay=0.5, n_steps=600, learning_rate=0.05)
    td = found(method, net, (3,), x=torch.randn(3, 2, dtype=DOUBLE))
    # max −(x − c)² − x²/2: x = c / 1.5
    expected = (centre / 1.5).expand(3, 2)
    torch.testing.assert_close(td["maximising", "x"], expected, rtol=0, atol=2e-3)


def test_many_starts_find_the_higher_hill():
    def hills(x: Tensor) -> Tensor:
        return torch.exp(-((x + 2) ** 2) * 4) + 3 * torch.exp(-((x - 2) ** 2) * 4)

    x = torch.full((4, 1), -1.8, dtype=DOUBLE)
    one = ActivationMaximisation("y", bounds=(-4.0, 4.0), n_steps=200, learning_rate=0.01)
    torch.testing.assert_close(
        found(one, Formula(hills), (4,), x=x)["maximising", "x"],
        torch.full_like(x, -2.0),
        rtol=0,
        atol=1e-3,
    )
    many = one.replaced(n_starts=12)
    first, second = (found(many, Formula(hills), (4,), x=x)["maximising", "x"] for _ in range(2))
    torch.testing.assert_close(first, torch.full_like(x, 2.0), rtol=0, atol=1e-3)
    assert torch.equal(first, second)


def test_each_target_keeps_the_best_of_its_own_starts():
    def hill(x: Tensor, at: float) -> Tensor:
        return torch.exp(-((x - at) ** 2) * 4)

    net = Formula(
        lambda x: torch.cat([3 * hill(x, -2) + hill(x, 2), hill(x, -2) + 3 * hill(x, 2)], -1)
    )
    method = ActivationMaximisation(
        Each("y"), bounds=(-4.0, 4.0), n_steps=200, learning_rate=0.01, n_starts=12
    )
    x = torch.zeros(4, 1, dtype=DOUBLE)
    for rows in (None, 5):  # chunks that begin at any target
        td = found(method.replaced(internal_batch_size=rows), net, (4,), x=x)
        best = torch.tensor([[-2.0], [2.0]], dtype=DOUBLE).expand(4, 2, 1)
        torch.testing.assert_close(td["maximising", "x"], best, rtol=0, atol=1e-3)


def test_each_named_target_and_key_has_its_own_and_others_stay():
    model = TensorDictModule(Formula(lambda a, b: torch.cat([a, -a], -1) * b), ["a", "b"], ["y"])
    target = {"up": ("y", 0), "down": ("y", 1)}
    method = ActivationMaximisation(target, keys=["a"], bounds={"a": (-1.0, 1.0)})
    td = found(method, model, (2,), a=torch.zeros(2, 1), b=torch.ones(2, 1))
    assert torch.equal(td["maximising", "up", "a"], torch.ones(2, 1))
    assert torch.equal(td["maximising", "down", "a"], -torch.ones(2, 1))
    assert ("maximising", "up", "b") not in td.keys(True)


def test_bounds_may_be_a_spec_for_a_batch_of_environments():
    from torchrl.data import Bounded, Composite

    spec = Composite(
        observation=Bounded(-torch.ones(8, 2), 2 * torch.ones(8, 2)),
        other=Bounded(-1.0, 1.0, (8, 1)),
        shape=(8,),
    )
    net = nn.Linear(2, 1)
    with ActivationMaximisation("y", bounds=spec).prepare(net, ["observation"], ["y"]) as hooked:
        td = hooked.observe(TensorDict({"observation": torch.zeros(3, 5, 2)}, [3, 5]))
    corner = torch.where(net.weight > 0, 2.0, -1.0).expand(3, 5, 2)
    torch.testing.assert_close(td["maximising", "observation"], corner)


def test_inputs_that_lie_outside_start_at_the_border():
    method = ActivationMaximisation("y", bounds=(0.0, 1.0))
    td = found(method, Formula(lambda x: x), (2,), x=torch.tensor([[-5.0], [7.0]]))
    assert torch.equal(td["maximising", "x"], torch.ones(2, 1))


def test_the_model_and_the_generators_are_left_alone():
    model = TensorDictModule(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), ["x"], ["y"]).train()
    td, before = TensorDict({"x": torch.zeros(3, 2)}, [3]), snapshot(model)
    method = ActivationMaximisation(("y", 0), bounds=(-1.0, 1.0), n_starts=3, n_steps=5)
    with method.prepare(model) as hooked:
        hooked.observe(td)
    assert_same(before, snapshot(model))


X = torch.zeros(2, 2)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "bounds upside down": (
        lambda: ActivationMaximisation("y", bounds=(1.0, 0.0)),
        InputError,
        "above the high one",
    ),
    "one bound": (lambda: ActivationMaximisation("y", bounds=(1.0,)), InputError, "bounds="),
    "bounds that are a word": (
        lambda: ActivationMaximisation("y", bounds="ab"),
        InputError,
        "spec",
    ),
    "NaN bounds": (
        lambda: ActivationMaximisation("y", bounds=(float("nan"), 1.0)),
        InputError,
        "bounds",
    ),
    "no steps": (lambda: ActivationMaximisation("y", n_steps=0), InputError, "n_steps"),
    "no starts": (lambda: ActivationMaximisation("y", n_starts=0), InputError, "n_starts"),
    "no rate": (
        lambda: ActivationMaximisation("y", learning_rate=0.0),
        InputError,
        "learning_rate",
    ),
    "negative decay": (lambda: ActivationMaximisation("y", decay=-1.0), InputError, "decay"),
    "submodules": (lambda: ActivationMaximisation("y", at="0"), ContextError, "in_keys"),
    "bounds of an unknown key": (
        lambda: ActivationMaximisation("y", bounds={"z": (0, 1)}).prepare(
            nn.Linear(2, 1), ["x"], ["y"]
        ),
        KeyNotFoundError,
        "'z'",
    ),
    "bounds of another shape": (
        lambda: found(
            ActivationMaximisation("y", bounds=(torch.zeros(3), torch.ones(3))),
            nn.Linear(2, 1),
            (2,),
            x=X,
        ),
        InputError,
        "does not broadcast",
    ),
    "starts without bounds": (
        lambda: found(ActivationMaximisation("y", n_starts=2), nn.Linear(2, 1), (2,), x=X),
        InputError,
        "finite bounds",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused(case):
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make()


def test_a_spec_is_anything_with_a_space():
    spec = SimpleNamespace(
        space=SimpleNamespace(low=torch.tensor([-1.0]), high=torch.tensor([3.0]))
    )
    td = found(
        ActivationMaximisation("y", bounds={"x": spec}), Formula(lambda x: x), (1,), x=X[:1, :1]
    )
    assert td["maximising", "x"].item() == 3.0
    nothing = SimpleNamespace(space=SimpleNamespace(n=4))
    method = ActivationMaximisation("y", bounds=nothing, n_steps=3, learning_rate=1.0)
    td = found(method, Formula(lambda x: x), (1,), x=X[:1, :1])
    assert td["maximising", "x"].item() == pytest.approx(2.0)  # 1 + 2/3 + 1/3
