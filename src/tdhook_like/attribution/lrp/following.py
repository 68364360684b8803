"""A copied module that reads what its original holds at the moment, and writes nothing of it."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictParams
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

__all__ = ["follow", "inside_transforms", "left"]


def follow(copied: Any, original: Any, live: bool) -> None:
    """Lets a copied module read what the original holds now.

    Args:
        copied: The module that runs.
        original: The module of the model.
        live: Whether it reads the parameters themselves, not the same numbers without a graph.
    """
    if isinstance(original, TensorDictParams):
        if not torch.compiler.is_compiling():
            held: Any = original._param_td
            vars(copied)["_param_td"] = held.copy() if live else held.detach()
        return
    if copied.training is not original.training:
        copied.training = original.training
    own, buffers = copied._parameters, copied._buffers
    for name in own:
        # Not from _parameters alone: what is lent for a call (functional_call, vmapped weights) may
        # stand elsewhere.
        value = getattr(original, name)
        own[name] = value if live or value is None else _detached(value)
    if isinstance(original, nn.RNNBase):
        copied._flat_weights = [own.get(name) for name in original._flat_weights_names]
    writes = original.training or not type(original).__module__.startswith("torch.nn.")
    for name, value in original._buffers.items():
        if isinstance(value, Tensor):
            value = value.detach().clone() if writes else value
        buffers[name] = value


def inside_transforms() -> bool:
    """Whether one of torch.func's transforms is under way.

    >>> inside_transforms()
    False
    """
    return torch._C._functorch.maybe_current_level() is not None  # pyright: ignore[reportAttributeAccessIssue]


def _detached(value: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return value.detach()
    if not inside_transforms() or torch._C._functorch.is_functorch_wrapped_tensor(value):  # pyright: ignore[reportAttributeAccessIssue]
        return value.detach()
    # Not wrapped by a transform that other threads know nothing of.
    with temporarily_clear_interpreter_stack():
        return value.detach()


def left(copied: Any, original: Any) -> None:
    """Takes back what was lent: what is made in a graph must not stay behind in modules."""
    if not isinstance(original, TensorDictParams):
        for name in copied._parameters:
            copied._parameters[name] = getattr(original, name)
        if isinstance(original, nn.RNNBase):
            copied._flat_weights = original._flat_weights
        for name, value in original._buffers.items():
            copied._buffers[name] = value
