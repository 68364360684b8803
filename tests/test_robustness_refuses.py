"""What attacks, corruptions, smallest changes and comparisons refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from explaining import explained as attacked
from tdhook_like import (
    ContextError,
    Each,
    Greedy,
    InputError,
    KeyNotFoundError,
    Saliency,
    TargetError,
)
from tdhook_like.robustness import (
    FGSM,
    PGD,
    AttackComparator,
    Corruption,
    Lead,
    MinParamPerturbation,
    perturbed,
)

X = torch.zeros(2, 2)


def linear(method: Any) -> Any:
    return method.prepare(nn.Linear(2, 1), ["x"], ["y"])


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "negative epsilon": (lambda: FGSM("y", epsilon=-0.1), InputError, "epsilon"),
    "negative epsilon of a key": (lambda: PGD("y", epsilon={"x": -1.0}), InputError, "epsilon"),
    "NaN epsilon": (lambda: FGSM("y", epsilon=float("nan")), InputError, "epsilon"),
    "unknown norm": (lambda: FGSM("y", norm="l1"), InputError, "linf, l2"),
    "unknown goal": (lambda: FGSM("y", goal="up"), InputError, "lower, raise"),
    "no steps": (lambda: PGD("y", n_steps=0), InputError, "n_steps"),
    "no starts": (lambda: PGD("y", n_starts=0), InputError, "n_starts"),
    "negative step": (lambda: PGD("y", step_size=-1.0), InputError, "step_size"),
    "bounds upside down": (lambda: FGSM("y", bounds=(1.0, 0.0)), InputError, "above the high"),
    "bounds that are NaN": (
        lambda: FGSM("y", bounds=(float("nan"), 1.0)),
        InputError,
        "hold NaN",
    ),
    "submodules": (lambda: FGSM("y", at="0"), ContextError, "in_keys"),
    "no function": (lambda: Corruption("y", change=3), InputError, "function"),  # pyright: ignore
    "no attack": (lambda: MinParamPerturbation(Saliency("y")), ContextError, "attack"),  # pyright: ignore
    "NaN threshold": (
        lambda: MinParamPerturbation(FGSM("y"), threshold=float("nan")),
        InputError,
        "threshold",
    ),
    "no sizes": (lambda: MinParamPerturbation(FGSM("y"), n_sizes=0), InputError, "n_sizes"),
    "negative halvings": (
        lambda: MinParamPerturbation(FGSM("y"), n_halvings=-1),
        InputError,
        "n_halvings",
    ),
    "nothing to compare": (lambda: AttackComparator({}), InputError, "at least one"),
    "no change to compare": (
        lambda: AttackComparator({"a": Saliency("y")}),  # pyright: ignore
        InputError,
        "attacks or corruptions",
    ),
    "several targets to compare by": (
        lambda: AttackComparator({"a": FGSM()}, Each("y")),
        InputError,
        "one target",
    ),
    "a lead of no choice": (lambda: Lead(Each("y")), TargetError, "Greedy"),  # pyright: ignore
    "epsilon of an unknown key": (
        lambda: linear(FGSM("y", epsilon={"z": 1.0})),
        KeyNotFoundError,
        "'z'",
    ),
    "smallest change of an unknown key": (
        lambda: linear(MinParamPerturbation(FGSM("y", epsilon={"z": 1.0}))),
        KeyNotFoundError,
        "'z'",
    ),
    "bounds of an unknown key": (
        lambda: linear(FGSM("y", bounds={"z": (0, 1)})),
        KeyNotFoundError,
        "'z'",
    ),
    "inputs outside of bounds": (
        lambda: attacked(FGSM("y", bounds=(0.5, 1.0)), nn.Linear(2, 1), (2,), x=X),
        InputError,
        r"'x' lies outside of its bounds in 4 of 4",
    ),
    "a length that differs between features": (
        lambda: attacked(FGSM("y", epsilon=torch.ones(2), norm="l2"), nn.Linear(2, 1), (2,), x=X),
        InputError,
        "differs between features",
    ),
    "epsilon of another shape": (
        lambda: attacked(FGSM("y", epsilon=torch.ones(3)), nn.Linear(2, 1), (2,), x=X),
        InputError,
        "does not broadcast",
    ),
    "a function that changes shapes": (
        lambda: attacked(
            Corruption("y", change=lambda x, s, g: x[..., :1]), nn.Linear(2, 1), (2,), x=X
        ),
        InputError,
        "keep their shape",
    ),
    "a lead of one": (
        lambda: attacked(FGSM(Lead("y")), nn.Linear(2, 1), (2,), x=X),
        TargetError,
        "no second entry",
    ),
    "nothing was attacked": (
        lambda: perturbed(TensorDict({"x": X}, [2])),
        KeyNotFoundError,
        "hooked attack first",
    ),
    "one input for each output": (
        lambda: perturbed(attacked(FGSM(Each("y")), nn.Linear(2, 2), (2,), x=X)),
        InputError,
        "name one target",
    ),
    "a comparison of several targets": (
        lambda: AttackComparator({"a": FGSM({"b": ("y", 0)})}, Greedy("y")).compare(
            nn.Linear(2, 2), TensorDict({"x": X}, [2]), ["x"], ["y"]
        ),
        InputError,
        "several targets",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused(case):
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make()


def test_a_spec_without_limits_is_no_bounds():
    nothing = SimpleNamespace(space=None)
    td = attacked(FGSM("y", epsilon=1.0, bounds=nothing), nn.Linear(2, 1), (2,), x=X)
    assert (td["adversarial", "x"].abs() == 1).all()
