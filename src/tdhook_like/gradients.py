"""Gradients of scores, column by column or all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tdhook_like.errors import TargetError, TdhookLikeError

__all__ = ["gradients"]


def gradients(
    parts: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weight: Tensor | None = None,
    *,
    create_graph: bool = False,
    stopped: bool = False,
    retain: bool = False,
) -> list[tuple[Tensor, ...]]:
    """The gradient of every column of the scores with respect to every input.

    Args:
        parts: Scores, ``[*batch, n]`` each; T columns in all.
        inputs: What the scores depend on.
        weight: What each score counts, broadcasting to ``[*batch, T]``; one if None.
        create_graph: Whether the gradients can be differentiated again.
        stopped: Whether it is right that nothing arrives; the gradients are zeros then.
        retain: Whether the graph is needed again.

    Returns:
        For each of the T columns, a tuple of gradients of the inputs' shapes; zeros where an input
        has no part in the score.

    Raises:
        TargetError: If the scores depend on none of the inputs in a differentiable way.
    """
    if len(parts) == 1 and parts[0].shape[-1] == 1 and parts[0].requires_grad:
        kept = create_graph or retain
        return [_one_column(parts[0], inputs, weight, kept, create_graph, stopped)]
    total = sum(part.shape[-1] for part in parts)
    if len(parts) == 1 and total > 2 and parts[0].numel() * total <= 2**14 and not create_graph:
        found = _at_once(parts[0], inputs, weight)
        if found is not None:
            return found
    seeds = [seed for part in _seeds(parts, weight, total) for seed in part]
    roots = [part for part in parts for _ in range(part.shape[-1])]
    live = [t for t, root in enumerate(roots) if root.requires_grad]
    found, reached = [], False
    for t, (root, seed) in enumerate(zip(roots, seeds, strict=True)):
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        if root.requires_grad:
            grads = torch.autograd.grad(
                root,
                inputs,
                seed,
                retain_graph=create_graph or retain or t < live[-1],
                create_graph=create_graph,
                allow_unused=True,
            )
        reached = reached or any(g is not None for g in grads)
        found.append(
            tuple(
                torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)
            )
        )
    if not reached and not stopped:
        raise TargetError(_NO_PATH)
    return found


def _one_column(
    part: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor | None,
    retain: bool,
    create_graph: bool,
    stopped: bool,
) -> tuple[Tensor, ...]:
    """The gradients of scores ``[*batch, 1]``."""
    seed = part.new_ones(()) if weight is None else weight
    found = torch.autograd.grad(
        part,
        inputs,
        seed.expand_as(part),
        retain_graph=retain,
        create_graph=create_graph,
        allow_unused=True,
    )
    missed = [g is None for g in found]
    if any(missed):
        if all(missed) and not stopped:
            raise TargetError(_NO_PATH)
        return tuple(
            torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)
        )
    return found


def _at_once(
    part: Tensor, inputs: Sequence[Tensor], weight: Tensor | None
) -> list[tuple[Tensor, ...]] | None:
    """The gradients of all columns in one batched backward pass, which pays while they are small.

    None where an operation cannot be batched: a rule written as relevance, a checkpointed block.
    """
    n = part.shape[-1]
    if not part.requires_grad:
        return None
    seeds = torch.eye(n, dtype=part.dtype, device=part.device)
    seeds = seeds.reshape(n, *[1] * (part.ndim - 1), n).expand(n, *part.shape)
    if weight is not None:
        seeds = seeds * weight.expand(part.shape)
    try:
        found = torch.autograd.grad(
            part, inputs, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except (RuntimeError, TdhookLikeError):
        return None  # one by one; what is really wrong comes up again there
    if all(g is None for g in found):
        return None
    each = [
        [torch.zeros_like(x)] * n if g is None else g.unbind()
        for g, x in zip(found, inputs, strict=True)
    ]
    return list(zip(*each, strict=True))


def _seeds(parts: Sequence[Tensor], weight: Tensor | None, total: int) -> Iterator[list[Tensor]]:
    """For each part, the start of the backward pass of each of its columns."""
    start = 0
    for part in parts:
        n = part.shape[-1]
        if weight is None:
            whole = part.new_ones(()).expand_as(part)
        else:
            whole = weight.expand((*part.shape[:-1], total))[..., start : start + n]
        start += n
        if n == 1:
            yield [whole]
            continue
        seeds = []
        for t in range(n):
            seed = torch.zeros_like(part)
            seed[..., t] = whole[..., t]
            seeds.append(seed)
        yield seeds


_NO_PATH = (
    "No differentiable path leads from the attributed keys to the target: the model detaches them, "
    "rounds them, or computes the target from other keys."
)
