"""Stacking further evaluations of a model: four ways, and which one is right for this model.

Modules differ in what they take: most take any leading dimensions, a plain ``nn.Conv2d`` takes one,
a recurrent module over ``[env, time]`` must not have time folded, a module that centres over its
batch must not see other rows at all. So the way is verified, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.errors import LayoutError, TargetError

__all__ = ["LAYOUTS", "Layout", "verified"]

Run = Callable[[TensorDictBase], TensorDictBase]
Layout = Callable[[Run, TensorDictBase, Sequence[NestedKey], Sequence[Tensor]], TensorDictBase]
"""From a run, a template with batch ``[*B]``, keys and their values ``[k, *B, *features]`` to
outputs with batch ``[k, *B]``."""


def leading(
    run: Run, template: TensorDictBase, keys: Sequence[NestedKey], points: Sequence[Tensor]
) -> TensorDictBase:
    """A new leading batch dimension."""
    k = points[0].shape[0]
    return run(_filled(template.expand(k, *template.batch_size), keys, points))


def folded(
    run: Run, template: TensorDictBase, keys: Sequence[NestedKey], points: Sequence[Tensor]
) -> TensorDictBase:
    """Folded into the first batch dimension."""
    k, batch = points[0].shape[0], template.batch_size
    if not batch:
        return leading(run, template, keys, points)
    wide = template.expand(k, *batch).reshape(k * batch[0], *batch[1:])
    outputs = run(_filled(wide, keys, [x.flatten(0, 1) for x in points]))
    return outputs.reshape(k, *batch)


def vmapped(
    run: Run, template: TensorDictBase, keys: Sequence[NestedKey], points: Sequence[Tensor]
) -> TensorDictBase:
    """``torch.func.vmap`` over the evaluations."""

    def one(values: tuple[Tensor, ...]) -> dict[Any, Tensor]:
        outputs = run(_filled(template, keys, values))
        return {
            key: value
            for key, value in outputs.items(True, True)
            if isinstance(value, Tensor) and value.shape[: outputs.batch_dims] == outputs.batch_size
        }

    found = torch.func.vmap(one, randomness="same")(tuple(points))
    outputs = TensorDict({}, batch_size=[points[0].shape[0], *template.batch_size])
    for key, value in found.items():
        outputs.set(key, value)
    return outputs


def apart(
    run: Run, template: TensorDictBase, keys: Sequence[NestedKey], points: Sequence[Tensor]
) -> TensorDictBase:
    """One after another."""
    rows = [run(_filled(template, keys, row)) for row in zip(*points, strict=True)]
    own = rows[0].batch_dims - template.batch_dims  # an ensemble's members stay in front
    return torch.stack(rows, own)  # pyright: ignore[reportArgumentType, reportReturnType]


LAYOUTS: dict[str, Layout] = {
    "leading": leading,
    "folded": folded,
    "vmap": vmapped,
    "one by one": apart,
}
"""The ways of stacking, the fastest first."""


def _filled(
    template: TensorDictBase, keys: Sequence[NestedKey], values: Sequence[Tensor]
) -> TensorDictBase:
    td = template.copy()
    for key, value in zip(keys, values, strict=True):
        td.set(key, value)
    return td


def verified(
    score: Callable[[Layout, Sequence[Tensor]], Tensor],
    inputs: Sequence[Tensor],
    baselines: Sequence[Tensor],
    what: str,
) -> str:
    """The name of the first layout under which stacking changes nothing.

    The real inputs are stacked between points on the way to their baselines; the scores of the real
    row must be those that it has alone.

    Args:
        score: From a layout and stacked inputs ``[k, *B, *features]`` to scores ``[k, *B, T]``.
        inputs: The real ones, ``[*B, *features]`` each.
        baselines: Where paths begin, of the same shapes. Points between the two are in the model's
            domain, where others might not be.
        what: What the scores are of, for messages.

    Raises:
        TargetError: If the real inputs' scores are not finite.
        LayoutError: If not even one evaluation after another repeats itself, because the model is
            random in evaluation mode.
    """
    alone = score(apart, [x[None].clone() for x in inputs])[0]
    ways = list(zip(inputs, baselines, strict=True))
    stacked = [torch.stack([b + 0.25 * (x - b), x, b + 0.75 * (x - b)]) for x, b in ways]
    if not torch.isfinite(alone).all():
        raise TargetError(f"{what} is NaN or Inf at the input that is to be explained.")
    for name, layout in LAYOUTS.items():
        try:
            row = score(layout, stacked)[1]
        except Exception:  # whatever a model raises on a shape that it does not take
            if layout is apart:
                raise
            continue
        if row.shape == alone.shape and _close(row, alone):
            return name
    raise LayoutError(
        "The model gives another score for the same input each time, in evaluation mode too: "
        "its randomness has to be seeded inside the model or switched off to be explained."
    )


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-4}.get(b.dtype, 3e-2)
    scale = b.abs().max().item() if b.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(scale, 1e-6))
