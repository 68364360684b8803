"""What expected gradients, means over baselines and given paths refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from explaining import explained
from tdhook_like import (
    BaselineError,
    ContextError,
    InputError,
    IntegratedGradients,
    KeyNotFoundError,
    Saliency,
)
from tdhook_like.attribution.expected import ExpectedGradients, GradientShap, OverBaselines
from tdhook_like.attribution.given_path import PathIntegratedGradients

ROWS = torch.zeros(2, 2)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no baselines": (lambda: ExpectedGradients("y"), BaselineError, "from what"),
    "no rows": (
        lambda: ExpectedGradients("y", baselines=torch.zeros(0, 2)),
        BaselineError,
        "rows to draw from",
    ),
    "no dimension": (
        lambda: ExpectedGradients("y", baselines=torch.tensor(1.0)),
        BaselineError,
        "rows to draw from",
    ),
    "rows that differ": (
        lambda: ExpectedGradients("y", baselines={"x": ROWS, "z": ROWS[:1]}),
        BaselineError,
        "drawn together",
    ),
    "NaN": (lambda: ExpectedGradients("y", baselines=ROWS / 0), BaselineError, "NaN or Inf"),
    "several batch dimensions": (
        lambda: ExpectedGradients("y", baselines=TensorDict({"x": ROWS}, [2, 2])),
        BaselineError,
        "Flatten it",
    ),
    "no batch dimension": (
        lambda: ExpectedGradients("y", baselines=TensorDict({"x": ROWS}, [])),
        BaselineError,
        "Flatten it",
    ),
    "no samples": (
        lambda: ExpectedGradients("y", baselines=ROWS, n_samples=0),
        InputError,
        "n_samples",
    ),
    "negative noise": (
        lambda: GradientShap("y", baselines=ROWS, stdevs=-1.0),
        InputError,
        "stdevs",
    ),
    "unknown key": (
        lambda: ExpectedGradients("y", baselines={"z": ROWS}).prepare(
            nn.Linear(2, 1), ["x"], ["y"]
        ),
        BaselineError,
        "'z'",
    ),
    "noise of an unknown key": (
        lambda: GradientShap("y", baselines=ROWS, stdevs={"z": 0.1}).prepare(
            nn.Linear(2, 1), ["x"], ["y"]
        ),
        KeyNotFoundError,
        "'z'",
    ),
    "one row that is none": (
        lambda: explained(
            ExpectedGradients("y", baselines=torch.zeros(2)), nn.Linear(2, 1), (2,), x=ROWS
        ),
        BaselineError,
        r"rows of shape \(\)",
    ),
    "submodules": (
        lambda: ExpectedGradients("y", baselines=ROWS, at="0"),
        ContextError,
        "in_keys",
    ),
    "zero tolerance": (
        lambda: ExpectedGradients("y", baselines=ROWS, gap_tolerance=0.0),
        InputError,
        "gap_tolerance",
    ),
    "over nothing": (
        lambda: OverBaselines(IntegratedGradients("y"), over=[]),
        BaselineError,
        "no baselines",
    ),
    "a method without baselines": (
        lambda: OverBaselines(Saliency("y"), over=[0.0]),
        BaselineError,
        "Saliency takes no baselines",
    ),
    "over an unknown key": (
        lambda: OverBaselines(IntegratedGradients("y"), over=[0.0, {"z": 1.0}]).prepare(
            nn.Linear(2, 1), ["x"], ["y"]
        ),
        BaselineError,
        "'z'",
    ),
    "no path": (lambda: PathIntegratedGradients("y", path={}), InputError, "path="),
    "a path of nothing": (
        lambda: PathIntegratedGradients("y", path=torch.zeros(0, 2)),
        InputError,
        "at least one point",
    ),
    "paths of unequal lengths": (
        lambda: PathIntegratedGradients("y", path={"x": ROWS, "z": ROWS[:1]}),
        InputError,
        "as many points",
    ),
    "a path that ends elsewhere": (
        lambda: explained(
            PathIntegratedGradients("y", path=lambda t, x: t.reshape(-1, 1, 1) * x + 1),
            nn.Linear(2, 1),
            (2,),
            x=ROWS,
        ),
        InputError,
        "does not end at the input",
    ),
    "a path that ends nearby": (
        lambda: explained(
            PathIntegratedGradients("y", path=lambda t, x: t.reshape(-1, 1, 1) * (x + 1e-7)),
            nn.Linear(2, 1).double(),
            (2,),
            x=ROWS.double() + 1,
        ),
        InputError,
        "does not end at the input",
    ),
    "a path of other shapes": (
        lambda: explained(
            PathIntegratedGradients("y", path=torch.zeros(1, 3)), nn.Linear(2, 1), (2,), x=ROWS
        ),
        InputError,
        "do not broadcast",
    ),
    "a path of an unknown key": (
        lambda: PathIntegratedGradients("y", path={"z": ROWS}).prepare(
            nn.Linear(2, 1), ["x"], ["y"]
        ),
        KeyNotFoundError,
        "'z'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused(case):
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make()
