"""Attributions that exist already: read by key or under a root, and measured like a method's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, TensorDictModule
from torch import nn

from explaining import BATCHES, driven
from explaining import explained as measured
from method_references import DOUBLE, Joined
from tdhook_like import (
    AttributionMean,
    ContextError,
    Each,
    InputError,
    InputXGradient,
    IntegratedGradients,
    KeyNotFoundError,
    NoiseTunnel,
    Saliency,
)
from tdhook_like.metrics import (
    Completeness,
    Deletion,
    Given,
    Infidelity,
    Insertion,
    MaxSensitivity,
    area,
)

MEASURES = [Infidelity, Completeness, Deletion, Insertion]


def inputs(batch: tuple[int, ...], dtype: torch.dtype = DOUBLE) -> dict[str, torch.Tensor]:
    return {"a": torch.randn(*batch, 3, dtype=dtype), "b": torch.randn(*batch, 2, 2, dtype=dtype)}


def net(outputs: int = 3) -> Joined:
    return Joined([3, 4], outputs, dims=[1, 2]).double()


# --- what is read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [measured, driven])
@pytest.mark.parametrize("batch", BATCHES)
def test_what_is_given_by_key_is_written_as_it_is(batch, run):
    given = inputs(batch)
    td = run(Given(given, ("y", 1)), net(), batch, **inputs(batch))
    assert torch.equal(td["attr", "a"], given["a"]) and torch.equal(td["attr", "b"], given["b"])


@pytest.mark.parametrize("root", ["theirs", ("others", "theirs")])
def test_under_a_root_the_batch_may_be_cut_as_one_likes(root):
    values, given = inputs((6,)), inputs((6,))
    td = TensorDict(values, [6])
    td[root] = TensorDict(given, [6])
    with Given(root, ("y", 1)).prepare(TensorDictModule(net(), ["a", "b"], ["y"])) as hooked:
        for rows in ([0, 1], [5, 1, 3]):
            part: Any = td[rows]
            found = hooked.observe(part)
            assert torch.equal(found["attr", "b"], given["b"][rows])


def test_what_another_method_wrote_is_read_as_it_wrote_it():
    model = TensorDictModule(net(), ["a", "b"], ["y"])
    for target in (("y", 0), {"left": ("y", 0), "right": Each("y")}, Each("y")):
        td = TensorDict(inputs((4,)), [4])
        with Saliency(target, abs=False, root="first").prepare(model) as hooked:
            hooked.observe(td)
        first: Any = td["first"]
        for given in ("first", first, first.to_dict()):
            with Given(given, target).prepare(model) as hooked:
                found = hooked.observe(td.copy())["attr"]
            for key, value in first.items(True, True):
                assert torch.equal(found[key], value)


def test_keys_may_be_nested_and_others_are_left_out():
    model = TensorDictModule(nn.Linear(3, 1).double(), [("agent", "x")], ["y"])
    given = torch.randn(4, 3, dtype=DOUBLE)
    td = TensorDict({"agent": {"x": torch.ones(4, 3, dtype=DOUBLE)}}, [4])
    for tree in ({("agent", "x"): given}, {"agent": {"x": given, "other": given}}):
        with Given(tree, "y").prepare(model) as hooked:
            assert torch.equal(hooked.observe(td.copy())["attr", "agent", "x"], given)


def test_a_dtype_of_its_own_becomes_the_inputs():
    x = torch.randn(4, 3, dtype=DOUBLE)
    td = measured(Given({"x": x.half()}, "y"), nn.Linear(3, 1).double(), (4,), x=x)
    assert td["attr", "x"].dtype == DOUBLE and torch.equal(td["attr", "x"], x.half().double())


def test_members_of_an_ensemble_have_their_own():
    ensemble = EnsembleModule(TensorDictModule(nn.Linear(3, 1), ["x"], ["y"]), 2)
    td = TensorDict({"x": torch.randn(4, 3)}, [4])
    for kind in (
        InputXGradient("y", root="first"),
        Given("first", "y"),
        Deletion(Given("first", "y")),
    ):
        with kind.prepare(ensemble) as hooked:
            hooked.observe(td)
    assert torch.equal(td["attr", "x"], td["first", "x"])
    with Deletion(InputXGradient("y")).prepare(ensemble) as hooked:
        own = hooked.observe(TensorDict({"x": td["x"]}, [4]))["deletion"]
    torch.testing.assert_close(td["deletion"], own)


# --- what is made of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MEASURES)
@pytest.mark.parametrize("target", [("y", 1), Each("y"), {"a": ("y", 0), "b": ("y", 2)}], ids=str)
def test_measured_it_is_what_the_method_that_wrote_it_is(target, kind):
    model, td = TensorDictModule(net(), ["a", "b"], ["y"]), TensorDict(inputs((4,)), [4])
    with kind(InputXGradient(target)).prepare(model) as hooked:
        own = hooked.observe(td.copy())
    td["first"] = own["attr"]
    with kind(Given("first", target)).prepare(model) as hooked:
        found = hooked.observe(td)
    place = kind(Saliency("y")).gap_root
    names = [(place, name) for name in target] if isinstance(target, dict) else [place]
    for name in names:
        torch.testing.assert_close(found[name], own[name], rtol=0, atol=1e-12)


def test_random_attributions_make_a_worse_curve_than_exact_ones():
    linear, x = nn.Linear(12, 1).double(), torch.randn(50, 12, dtype=DOUBLE)
    random = {"x": torch.randn(50, 12, dtype=DOUBLE)}
    for kind, better in ((Deletion, torch.lt), (Insertion, torch.gt)):
        place = kind.place
        exact, noise = (
            area(measured(kind(one), linear, (50,), x=x)[place])
            for one in (InputXGradient("y"), Given(random, "y"))
        )
        assert better(exact, noise + 1e-12).float().mean() > 0.9


def test_it_is_added_up_with_methods():
    linear, x = nn.Linear(3, 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    given = torch.randn(4, 3, dtype=DOUBLE)
    mean = AttributionMean(InputXGradient("y"), Given({"x": given}, "y"))
    td = measured(mean, linear, (4,), x=x)
    torch.testing.assert_close(td["attr", "x"], (x * linear.weight.detach() + given) / 2)


def test_slopes_are_declared_as_such():
    linear, x = nn.Linear(3, 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    slopes = Given({"x": linear.weight.detach().expand(4, 3)}, "y")
    right = measured(Infidelity(slopes, per_unit=True), linear, (4,), x=x)["infidelity"]
    wrong = measured(Infidelity(slopes), linear, (4,), x=x)["infidelity"]
    assert right.max() < 1e-12 and wrong.min() > 1e-6


# --- what is refused --------------------------------------------------------------------------------

X = torch.ones(4, 3)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a key that has none": (lambda: {"z": X}, KeyNotFoundError, "'z'"),
    "a root that is not there": (lambda: "nowhere", KeyNotFoundError, "'nowhere', 'x'"),
    "a root that is a tensor": (lambda: "x", KeyNotFoundError, "in the TensorDict"),
    "none at all": (dict, KeyNotFoundError, "no attributions"),
    "no key": (lambda: 3, KeyNotFoundError, "not a key"),
    "another batch": (lambda: {"x": X[:3]}, InputError, r"\(3, 3\), where \(4, 3\)"),
    "other features": (lambda: {"x": X[:, :2]}, InputError, r"\(4, 2\)"),
    "NaN": (lambda: {"x": X * torch.nan}, InputError, "NaN"),
    "no tensor": (lambda: {"x": X.numpy()}, InputError, "torch.as_tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case):
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        measured(Given(make(), "y"), nn.Linear(3, 1), (4,), x=X)


def test_attributions_of_other_targets_are_refused():
    with pytest.raises(InputError, match="dimension of targets"):
        measured(Given({"x": X}, Each("y")), nn.Linear(3, 2), (4,), x=X)
    with pytest.raises(InputError, match=r"for 3 targets, and the score .* has 2"):
        given = {"x": X.unsqueeze(1).expand(4, 3, 3)}
        measured(Given(given, Each("y")), nn.Linear(3, 2), (4,), x=X)
    with pytest.raises(KeyNotFoundError, match="'left', 'x'"):
        measured(Given({"x": X}, {"left": ("y", 0)}), nn.Linear(3, 2), (4,), x=X)


@pytest.mark.parametrize(
    "make",
    [
        lambda given: MaxSensitivity(given),
        lambda given: NoiseTunnel(given),
        lambda given: given.replaced(at=("0",)),
        lambda given: given.replaced(rules=lambda name, module: None),
        lambda given: given.replaced(create_graph=True),
    ],
)
def test_what_would_need_more_than_is_there_is_refused(make):
    given = Given({"x": X}, "y")
    with pytest.raises(ContextError, match="Given"):
        make(given)


def test_a_method_that_takes_no_part_is_left_as_it_is():
    x = torch.randn(4, 3, dtype=DOUBLE)
    td = measured(MaxSensitivity(IntegratedGradients("y")), nn.Linear(3, 1).double(), (4,), x=x)
    assert td["sensitivity"].shape == (4,)
