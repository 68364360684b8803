"""Running a model: plainly as the caller would, directly with less overhead, or on its shadow."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.nn.utils import set_skip_existing, skip_existing
from torch import Tensor, nn

from tdhook_like.paths import submodules, unwrapped

__all__ = ["Runner"]

# Where gradients are off, these take code paths whose results differ in the last bits.
_FAST_PATHS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.RNNBase)


class Runner:
    """How a given model is run.

    Args:
        module: What the user gave, perhaps compiled or wrapped.
        model: The TensorDictModule that it is made of.
    """

    def __init__(self, module: nn.Module, model: TensorDictModuleBase) -> None:
        self.module, self.model = module, model
        parts = list(submodules(model).values())
        self._fast_paths = any(isinstance(part, _FAST_PATHS) for part in parts)
        self._wrapped = module is not model or any(
            unwrapped(child) is not child for part in parts for child in part._modules.values() if child
        )
        self._with_buffers = [part for part in parts if part._buffers]
        #: Whether some module overwrites its input, so that leaves have to be copied for it.
        self.overwrites = any(
            getattr(part, "inplace", False) is True
            for part in parts
            if not isinstance(part, TensorDictModuleBase)
        )

    @property
    def writes_out_keys(self) -> bool:
        """Whether the model is known to write its out_keys and nothing else."""
        return type(self.model) is TensorDictModule and _simple(self.model)

    def buffers_in_training(self) -> list[Tensor]:
        """The buffers that a run may write because their module is in training mode."""
        return [
            buffer
            for part in self._with_buffers
            if part.training
            for buffer in part._buffers.values()
            if isinstance(buffer, Tensor) and not buffer.is_inference()
        ]

    def explains_itself(self, grad_enabled: bool) -> bool:
        """Whether a differentiable run of the model gives, bit for bit, what the plain call gives."""
        if self._wrapped or skip_existing():
            return False
        return grad_enabled or not self._fast_paths

    def plain(self, td: TensorDictBase) -> TensorDictBase:
        """The plain call, under whatever modes the caller has set."""
        return self.module(td)

    def run(self, td: TensorDictBase) -> TensorDictBase:
        """The same call on the model itself, past the wrappers of TensorDictModule's forward."""
        return direct(self.model, td)


def direct(model: nn.Module, td: TensorDictBase) -> TensorDictBase:
    """Runs ``model`` on ``td``; on a simple TensorDictModule, reads and writes by itself.

    Every module runs, also where the caller has set skip_existing: an output that is already there
    has no graph.
    """
    if type(model) is not TensorDictModule or not _simple(model):
        if not skip_existing():
            return model(td)
        with set_skip_existing(False):
            return model(td)
    found: Any = model.module(*[td.get(key, None) for key in model.in_keys])  # pyright: ignore
    if isinstance(found, Tensor) and len(model.out_keys) == 1:
        td.set(model.out_keys[0], found)
        return td
    if not isinstance(found, tuple) or len(found) != len(model.out_keys):
        return _written(model, td, found)
    for key, value in zip(model.out_keys, found, strict=True):
        if key != "_":
            td.set(key, value if isinstance(value, Tensor) else TensorDict.from_any(value))
    return td


def _simple(model: Any) -> bool:
    return (
        model._kwargs is None
        and model.method is None
        and not model.method_kwargs
        and model.inplace is True
        and not model.strict
        and not model._get_kwargs
        and not (model._forward_hooks or model._forward_pre_hooks)
        and not (model._backward_hooks or model._backward_pre_hooks)
    )


def _written(model: Any, td: TensorDictBase, found: Any) -> TensorDictBase:
    """The rarer kinds of output, written by TensorDictModule's own forward."""

    class Given(nn.Module):
        def forward(self, *args: Any) -> Any:
            return found

    writer = TensorDictModule(Given(), in_keys=list(model.in_keys), out_keys=list(model.out_keys))
    return writer(td)


def rng_state(tensors: list[Tensor]) -> list[Any]:
    """The state of every generator that a run on these tensors may advance."""
    devices = {x.device for x in tensors if x.is_cuda}
    return [torch.get_rng_state(), *[(d, torch.cuda.get_rng_state(d)) for d in devices]]


def restore_rng(state: list[Any]) -> None:
    """Puts generators back to a state from :func:`rng_state`."""
    torch.set_rng_state(state[0])
    for device, saved in state[1:]:
        torch.cuda.set_rng_state(saved, device)
