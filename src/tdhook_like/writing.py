"""What a call writes: the model's outputs as if it had been called plainly, and the attributions."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.method import Attribution
from tdhook_like.captured import Captured
from tdhook_like.errors import InputError, RuleError, UnhandledOperationWarning, without_a_rule
from tdhook_like.keys import as_tuple, place
from tdhook_like.runner import View
from tdhook_like.targets import Each

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = ["CompletenessWarning", "Written", "report", "results", "write", "write_outputs"]


class CompletenessWarning(UserWarning):
    """Attributions miss the sum that they promise by more than the tolerance."""


@dataclass
class Written:
    """Everything that a call has to write beside the outputs.

    Attributes:
        keys: The attributed keys.
        attribution: What the method found.
        columns: Which of its targets belong to which name.
        dims: The number of batch dimensions.
        captured: What flowed out of the chosen submodules.
    """

    keys: tuple[NestedKey, ...]
    attribution: Attribution
    columns: dict[str | None, slice]
    dims: int
    captured: Captured


def write_outputs(
    context: HookContext,
    before: TensorDictBase,
    outputs: TensorDictBase | View,
    destination: TensorDictBase,
    own: TensorDictBase | None,
) -> TensorDictBase:
    """What the plain call would have written, without graphs; gives what it would have returned.

    Args:
        context: The binding of a method to the model.
        before: The TensorDict that the call was made on.
        outputs: What the model returned for a private copy of it.
        destination: Where to write.
        own: The TensorDict that the model returned, where it is one of its own making.
    """
    if isinstance(outputs, View):
        for key, value in outputs.written.items():
            if type(key) is str:
                destination.set(key, _plain(value))
            else:
                _set(destination, outputs.td, key, _plain(value))
        return destination
    if own is not None:
        for key, value in list(own.items(True, True)):
            own.set(key, _plain(value))
        return own
    lazy = isinstance(outputs, LazyStackedTensorDict)  # it makes its tensors anew at each look
    declared = {as_tuple(key) for key in context.out_keys}
    read = {as_tuple(key) for key in context.in_keys}
    for key, value in list(outputs.items(True, True, is_leaf=_is_leaf)):
        flat = as_tuple(key)
        old = before.get(key, None)
        changed = old is not value and flat not in read and not lazy
        if flat in declared or old is None or changed:
            _set(destination, outputs, key, _plain(value))
    return destination


Result = tuple[tuple[str, ...], NestedKey, Tensor]
"""A root, a key (which may be one of the TensorDict's), and what is to be written there."""


def results(context: HookContext, batch: torch.Size, found: Written) -> list[Result]:
    """Attributions, their errors and gaps, activations, each with where it goes; nothing is written.

    Raises:
        InputError: If what a submodule gives does not begin with the batch dimensions.
    """
    method, attribution = context.method, found.attribution
    made: list[Result] = []
    for name, columns in found.columns.items():
        named = () if name is None else (name,)
        # Each() has a target dimension behind the batch dimensions; other targets are one column.
        several = isinstance(context.targets[name], Each)

        def one(values: Any, columns: slice = columns, several: bool = several) -> Tensor:
            chosen = values[columns] if several else values[columns.start]
            value = torch.stack(list(chosen), found.dims) if several else chosen
            return value if method.create_graph else value.detach()

        keys = found.keys if method.writes_keys else ()
        for key, values in zip(keys, attribution.inputs, strict=True):
            made.append(((method.root, *named), key, one(values)))
        for key, values in zip(found.keys, attribution.errors or (), strict=False):
            made.append(((method.error_root, *named), key, one(values)))
        for path in context.at.modules if context.at else ():
            calls = [
                one(_arranged(found, method.single_pass, path, i, values))
                for i, values in enumerate(attribution.modules.get(path, []))
            ]
            made += _calls((method.at_root, *named), path, calls, batch)
        if attribution.gap is not None:
            gap = one(attribution.gap.unbind(-1))
            if gap.ndim < len(batch):  # one gap per trajectory, at each of its steps
                gap = (
                    gap.reshape((*gap.shape, *[1] * (len(batch) - gap.ndim))).expand(batch).clone()
                )
            *root, last = (method.gap_root, *named)
            made.append((tuple(root), last, gap))
    for path in context.activations.modules if context.activations else ():
        calls = [
            found.captured.batch_first(value.detach().clone(), path, i, found.dims)
            for i, value in enumerate(found.captured.outputs.get(path, []))
        ]
        made += _calls((method.activations_root,), path, calls, batch)
    return made


def write(context: HookContext, td: TensorDictBase, made: list[Result], found: Written) -> None:
    """Writes results; where completeness is promised and missed, says so."""
    for root, key, value in made:
        place(td, root, key, value)
    attribution = found.attribution
    if attribution.gap is not None and attribution.scale is not None:
        _warn_of_gap(context, attribution.gap.abs(), attribution.scale)


def report(method: Any, names: list[str]) -> None:
    """Says which non-linear functions followed their gradient, as the method wants it said."""
    text = without_a_rule(type(method).__name__, names)
    if method.unhandled == "raise":
        raise RuleError(text)
    warnings.warn(text, UnhandledOperationWarning, stacklevel=_depth_of_caller())


def _calls(
    root: tuple[str, ...], path: str, calls: list[Tensor], batch: torch.Size
) -> list[Result]:
    """What one submodule gave: at its path, or at (path, "0"), (path, "1"), … for several."""
    name = path or "(root)"
    for value in calls:
        if value.shape[: len(batch)] != batch:
            raise InputError(
                f"What {name!r} gives has shape {tuple(value.shape)}, which does not begin with the "
                f"batch dimensions {tuple(batch)}, so it cannot be written beside them. Choose a "
                "submodule that keeps the batch first."
            )
    if len(calls) == 1:
        return [(root, name, calls[0])]
    return [((*root, name), str(i), value) for i, value in enumerate(calls)]


def _arranged(found: Written, captured: bool, path: str, call: int, values: Any) -> list[Tensor]:
    """A submodule's attributions, batch first, as methods of many evaluations give them by themselves."""
    if not captured:
        return list(values)
    return [found.captured.batch_first(value, path, call, found.dims) for value in values]


def _warn_of_gap(context: HookContext, gap: Tensor, scale: Tensor) -> None:
    tolerance = getattr(context.method, "gap_tolerance", None)
    if tolerance is None or not gap.numel():
        return
    if (gap - tolerance * scale).max().item() <= 0:  # no need of the mean
        return
    allowed = tolerance * torch.maximum(scale, scale.mean()).clamp_min(1e-12)
    large = int((gap > allowed).sum())
    if large:
        worst = (gap / torch.maximum(scale, scale.mean()).clamp_min(1e-12)).max().item()
        warnings.warn(
            f"{type(context.method).__name__}: attributions miss score(input) - score(baseline) by more "
            f"than {tolerance:.0%} in {large} of {gap.numel()} cases (at worst {worst:.0%}). "
            f"{getattr(context.method, 'gap_advice', _GAP_ADVICE)}; the gaps are at "
            f"{context.method.gap_root!r}.",
            CompletenessWarning,
            stacklevel=_depth_of_caller(),
        )


_GAP_ADVICE = "Take more n_steps, or a baseline at which the model is smooth"


def _depth_of_caller() -> int:
    """How many frames above a warning the first one lies that is not the library's."""
    frame, depth = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("tdhook_like."):
        frame, depth = frame.f_back, depth + 1
    return depth


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _is_leaf(kind: type) -> bool:
    return not issubclass(kind, TensorDictBase)


def _set(
    destination: TensorDictBase, source: TensorDictBase | None, key: NestedKey, value: Any
) -> None:
    """Writes an output, nested ones in parents of the batch sizes that the model gave them."""
    path = as_tuple(key)
    for name in path[:-1]:
        inner = None if source is None else source.get(name, None)
        if destination.get(name, None) is None:
            destination.set(name, (destination if inner is None else inner).empty())
        destination, source = destination.get(name), inner
    destination.set(path[-1], value)
