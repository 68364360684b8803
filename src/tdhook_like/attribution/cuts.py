"""Methods of many evaluations at submodules: the score as a function of what a submodule gives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.method import Attribution, PathMethod
from tdhook_like.baselines import resolve
from tdhook_like.errors import PathError
from tdhook_like.ports import calls_at, port
from tdhook_like.score import Score

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = ["at_submodules", "given_at"]


def at_submodules(
    method: PathMethod, score: Score, context: HookContext, attribution: Attribution
) -> None:
    """Explains the score once more for each chosen submodule, as a function of what it gives.

    The model's inputs are held as they are, so that what does not run through the submodule is no part
    of the change. Its baseline is what it gives at the baseline's inputs, or what ``baselines`` says of
    its path.

    Args:
        method: The method.
        score: The score as a function of the model's inputs.
        context: Which submodules.
        attribution: What was found at the keys; what is found here is added to it.
    """
    assert context.at is not None
    here = given_at(score, score.inputs, context.at.modules)
    there = given_at(score, score.baselines, context.at.modules) if score.inputs else here
    for path in context.at.modules:
        if not here[path]:
            continue  # that it was named and never called is said elsewhere
        values = {port(path, i, "set"): value for i, value in enumerate(here[path])}
        baselines = _baselines(method, score, path, values, there[path])
        cut = score.of(values, baselines, context.layouts_at.setdefault(path, {}))
        found = method.attribute(cut, baselines)
        attribution.modules[path] = list(found.inputs)
        if not attribution.inputs and len(context.at.modules) == 1:
            attribution.gap, attribution.scale = found.gap, found.scale


def given_at(
    score: Score, inputs: tuple[Tensor, ...], paths: Iterable[str]
) -> dict[str, list[Tensor]]:
    """What submodules give at given inputs, ``[*B, *features]``, call by call; by path."""
    if not inputs:
        with torch.no_grad(), score.installed():
            outputs = score.outputs()
        return {path: calls_at(outputs, path) for path in paths}
    values: dict[NestedKey, Tensor] = {
        key: x.unsqueeze(0) for key, x in zip(score.keys, inputs, strict=True)
    }
    assert score.layout  # tried out before anything is installed
    with torch.no_grad(), score.installed():
        _, outputs = score.evaluated(values)
    return {path: [value[0] for value in calls_at(outputs, path)] for path in paths}


def _baselines(
    method: PathMethod,
    score: Score,
    path: str,
    values: dict[NestedKey, Tensor],
    there: list[Tensor],
) -> tuple[Tensor, ...]:
    given = getattr(method, "baselines", None)
    keys, tensors = tuple(values), tuple(values.values())
    if isinstance(given, dict) and path in given:
        return resolve({key: given[path] for key in keys}, score.template, keys, tensors)
    if not score.inputs:
        return resolve(None if isinstance(given, dict) else given, score.template, keys, tensors)
    if [t.shape for t in there] != [t.shape for t in tensors]:
        raise PathError(
            f"The submodule {path!r} is called differently at the baseline's inputs than at those that "
            "are explained, so it has no baseline: give one, baselines={" + f"{path!r}: …" + "}."
        )
    return tuple(there)
