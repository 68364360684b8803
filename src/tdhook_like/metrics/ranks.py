"""Do two explanations rank features alike?"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ranked", "spearman"]


def ranked(values: Tensor) -> Tensor:
    """Ranks along the last dimension, from 1 for the smallest; equal values share their mean rank.

    >>> ranked(torch.tensor([7.0, 1.0, 7.0]))
    tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    values = values.detach().contiguous()
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values, right=False)
    upto = torch.searchsorted(ordered, values, right=True)
    return (below + upto + 1).double() / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """The correlation of ranks along the last dimension, ``[..., N]`` to ``[...]``.

    1 where both order features alike, −1 where one is the other backwards; NaN where all values of one
    are equal, as nothing is ordered then.

    Source: Spearman 1904; Kendall & Gibbons 1990 for ties.

    >>> spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([[3.0, 4.0, 5.0], [9.0, 8.0, 7.0]]))
    tensor([ 1., -1.], dtype=torch.float64)
    """
    x, y = (ranked(values) - (values.shape[-1] + 1) / 2 for values in torch.broadcast_tensors(a, b))
    size = x.square().sum(-1) * y.square().sum(-1)
    return torch.where(size > 0, (x * y).sum(-1) / size.sqrt(), torch.full_like(size, torch.nan))
