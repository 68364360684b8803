"""What a record of a family of torchrl modules holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

Score = Callable[[Any, TensorDictBase], Tensor]


@dataclass(frozen=True)
class Family:
    """A family of modules.

    Attributes:
        build: Makes the module; called under a fixed seed.
        td: Makes its input; called under a fixed seed.
        default: The default target's repr, or words of the error where there is no obvious one.
        score: The explained number [*B] from the model and its outputs, in plain torch.
        target: What is given as target; None for the default.
        keys: The in_keys that an attribution is due for.
        relu: Whether the network is made of linear layers and ReLUs alone up to the score's inputs,
            so that LRP with a vanishing epsilon is input × gradient.
        scope: A context that calls need (recurrent mode).
        held: What the policy draws and the score holds fixed.
        again: Whether what was written can be read as input (a decision transformer's cannot).
    """

    build: Callable[[], Any]
    td: Callable[[], TensorDict]
    default: str
    score: Score
    target: Any = None
    keys: Sequence[NestedKey] = ("observation",)
    relu: bool = True
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    held: Sequence[NestedKey] = ()
    again: bool = True


SEVERAL = "No target is given and the model writes"
"""What the error says where a model writes several things and none is the obvious one."""
