"""Every method that captum has, too, on three models: do the two libraries say the same?

Run with captum installed: ``python benchmarks/captum_agreement.py``. Differences are the largest of
all entries, relative to the largest attribution; of methods that draw samples, in standard errors
(both libraries' together), beside the number of entries that are compared. Then come small models on
which captum departs from the formula, and what it refuses. ``docs/coming-from-captum.md`` quotes all.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from captum_attacks import ATTACKS
from captum_cases import GRADIENTS, INSIDE, NEURONS
from captum_deviations import DEVIATIONS, REFUSED, shown
from captum_draws import PERTURBATIONS, SAMPLED
from captum_models import Found, Model, Row, as_list, captum_name, models


def difference(row: Row, model: Model) -> str:
    """How far apart the two answers are, in words."""
    torch.manual_seed(0)
    importlib.import_module("numpy").random.seed(0)  # captum draws from there, too
    here, cls = row.here(model), captum_name(row.captum.partition("(")[0])
    if row.repeats:
        return in_errors(here, [as_list(row.there(cls, model)) for _ in range(row.repeats)])
    there = as_list(row.there(cls, model))
    size = max(a[a.isfinite()].abs().max().item() for a in here.values)
    pairs = list(zip(here.values, there, strict=True))
    if any(a.shape != b.shape for a, b in pairs) or not size > 0:
        raise ValueError(f"{row.ours}: nothing to compare")
    gaps = [torch.where(a == b, 0.0, a - b).abs() for a, b in pairs]  # ∞ is ∞
    apart = max(gap.max().item() for gap in gaps) / size
    return "0" if apart == 0 else f"{apart:.0e}"


def in_errors(here: Found, runs: list[list[Tensor]]) -> str:
    """The largest difference, in standard errors; captum's come from asking it often."""
    most, n = 0.0, 0
    for i, value in enumerate(here.values):
        drawn = torch.stack([run[i].double() for run in runs])
        if drawn[0].shape != value.shape:
            raise ValueError(f"shapes {tuple(drawn[0].shape)} and {tuple(value.shape)}")
        errors = [drawn.std(0) / len(runs) ** 0.5]
        if here.errors is not None:
            errors.append(here.errors[i])
        error = torch.stack(errors).square().sum(0).sqrt()
        apart = (value - drawn.mean(0)).abs()
        rounding = 1e-6 * value.abs().max()
        most = max(most, (apart / error.clamp_min(rounding)).max().item())
        n += value.numel()
    return f"{most:.1f} σ of {n}"


def table(rows: list[list[str]]) -> str:
    """Cells as a table of Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def agreement() -> list[list[str]]:
    """The rows of the first table."""
    asked = models()
    rows = [["here", "captum", *asked, "remark"]]
    for row in (*GRADIENTS, *INSIDE, *NEURONS, *PERTURBATIONS, *SAMPLED, *ATTACKS):
        cells: list[str] = [
            difference(row, model) if not row.only or name in row.only else ""
            for name, model in asked.items()
        ]
        rows.append([f"`{row.ours}`", f"`{row.captum}`", *cells, row.remark])
    return rows


def main() -> None:
    """Prints the tables."""
    if importlib.util.find_spec("captum") is None:
        print("captum is not installed")
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"captum {importlib.metadata.version('captum')}, torch {torch.__version__}\n")
    print(table(agreement()))
    found: list[Any] = [[d.claim, d.formula, shown(d.here), shown(d.there)] for d in DEVIATIONS]
    print("\n" + table([["", "by the formula", "here", "captum"], *found]))
    found = [[r.claim, shown(r.there)] for r in REFUSED]
    print("\n" + table([["", "captum"], *found]))


if __name__ == "__main__":
    main()
