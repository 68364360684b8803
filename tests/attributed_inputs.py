"""TensorDicts that hold attributions, as a hooked module leaves them."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict


def attributed(batch_size: list[int], names: Any = None, **leaves: torch.Tensor) -> TensorDict:
    """A td with these attributions and, as a hooked module leaves it, the inputs beside them."""
    inputs = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
    return TensorDict({**inputs, "attr": leaves}, batch_size, names=names)
