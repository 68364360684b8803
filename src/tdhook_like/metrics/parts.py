"""Sums of relevance over what is not asked for: one number per channel, per head, per token.

For relevance at inputs and at submodules (``LRP(at=…)``) alike. Each sum keeps the batch dimensions
(and the target dimension, where there is one) and conserves what it adds up.
"""

from __future__ import annotations

from torch import Tensor

from tdhook_like.errors import InputError

__all__ = ["per_channel", "per_head", "per_token"]


def per_channel(relevance: Tensor, dim: int = 1, batch_dims: int = 1) -> Tensor:
    """The relevance of each channel: summed over all positions.

    ``R_c = Σ_hw R_chw`` for feature maps ``[B, C, H, W]``.

    Args:
        relevance: ``[*B, …, C, …]``.
        dim: The dimension of channels; behind the batch dimensions.
        batch_dims: How many leading dimensions are kept (count a target dimension with them).

    Returns:
        ``[*B, C]``.

    Raises:
        InputError: If ``dim`` is none of the dimensions behind the batch.

    >>> import torch
    >>> per_channel(torch.ones(2, 3, 4, 4)).tolist()
    [[16.0, 16.0, 16.0], [16.0, 16.0, 16.0]]
    >>> per_channel(torch.ones(5, 2, 3, 4), dim=-1, batch_dims=2).shape
    torch.Size([5, 2, 4])
    """
    place = _behind(relevance, dim, batch_dims, "channels")
    others = [d for d in range(batch_dims, relevance.ndim) if d != place]
    return relevance.sum(others) if others else relevance


def per_head(relevance: Tensor, heads: int, dim: int = -1) -> Tensor:
    """The relevance of each attention head, of which each has an equal part of a dimension.

    ``R_h = Σ_d R_hd`` for what heads give side by side, ``[B, tokens, heads · d]``.

    Args:
        relevance: ``[*, heads · d, *]``.
        heads: How many heads there are.
        dim: The dimension in which they lie, the first head first.

    Returns:
        The same with ``heads`` numbers in that dimension.

    Raises:
        InputError: If the dimension does not exist, or is no multiple of ``heads``.

    >>> import torch
    >>> per_head(torch.arange(6.0).reshape(1, 6), heads=2).tolist()
    [[3.0, 12.0]]
    """
    place = _behind(relevance, dim, 0, "heads")
    size = relevance.shape[place]
    if heads < 1 or size % heads:
        raise InputError(
            f"per_head: dimension {dim} of relevance {tuple(relevance.shape)} holds {size} numbers, "
            f"which {heads} heads cannot share evenly. Name another dim=, or the right heads=."
        )
    return relevance.unflatten(place, (heads, size // heads)).sum(place + 1)


def per_token(relevance: Tensor, dim: int = -2, batch_dims: int = 1) -> Tensor:
    """The relevance of each token, or step: summed over its features.

    ``R_t = Σ_d R_td`` for embeddings ``[B, tokens, d]``.

    Args:
        relevance: ``[*B, …, tokens, …]``.
        dim: The dimension of tokens; behind the batch dimensions.
        batch_dims: How many leading dimensions are kept (count a target dimension with them).

    Returns:
        ``[*B, tokens]``.

    Raises:
        InputError: If ``dim`` is none of the dimensions behind the batch.

    >>> import torch
    >>> per_token(torch.ones(2, 5, 8)).tolist()
    [[8.0, 8.0, 8.0, 8.0, 8.0], [8.0, 8.0, 8.0, 8.0, 8.0]]
    """
    return per_channel(relevance, _behind(relevance, dim, batch_dims, "tokens"), batch_dims)


def _behind(relevance: Tensor, dim: int, batch_dims: int, what: str) -> int:
    """A dimension behind the batch, counted from the front; an error where it is none."""
    place = dim + relevance.ndim if dim < 0 else dim
    if batch_dims < 0 or not batch_dims <= place < relevance.ndim:
        raise InputError(
            f"dim={dim} is not a dimension of {what} of relevance {tuple(relevance.shape)} behind its "
            f"{batch_dims} batch dimensions."
        )
    return place
