"""A stand-in for a model, for evaluations that must leave no trace on it.

Switching a model to evaluation mode and back would be seen by other threads, and running it may
write buffers and attributes. A shadow is a copy of the module objects alone: it shares every
parameter with the original, is in evaluation mode, and owns what a run may write.
"""

from __future__ import annotations

import collections
import copy
import functools
import types
from typing import Any

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn

from tdhook_like.paths import kept_in, unwrapped

__all__ = ["Shadow", "is_scripted", "stand_in"]


class Shadow:
    """The shadow of a model and which shadow module stands for which original.

    Args:
        model: The model; it is read, never changed.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> shadow = Shadow(net)
    >>> shadow.model[1].training, net[1].training, shadow.model[0].weight is net[0].weight
    (False, True, True)
    """

    def __init__(self, model: nn.Module) -> None:
        self._twins: dict[int, nn.Module] = {}
        self._originals: list[nn.Module] = []  # keeps identities valid
        self.model = self._twin(model)

    def of(self, module: nn.Module) -> nn.Module:
        """The shadow of one of the model's modules, or the module itself where it has none."""
        return self._twins.get(id(module), module)

    def _twin(self, module: nn.Module) -> nn.Module:
        known = self._twins.get(id(module))
        if known is not None:
            return known
        if isinstance(module, TensorDictParams):
            # A container of parameters: nothing runs in it, but it notes to which module its
            # parameters were last lent.
            held: Any = module._param_td
            twin = self._twins[id(module)] = TensorDictParams(held.copy(), no_convert=True)
            return twin
        inner = unwrapped(module)
        if inner is not module:  # compiled code would not see rules: run what it was made from
            twin = self._twins[id(module)] = self._twin(inner)
            return twin
        twin = object.__new__(type(module))
        self._twins[id(module)] = twin
        self._originals.append(module)
        state = dict(vars(module))
        state["training"] = False
        state["_parameters"] = dict(module._parameters)
        state["_buffers"] = {
            name: None if buffer is None else buffer.detach().clone()
            for name, buffer in module._buffers.items()
        }
        state["_modules"] = {
            name: None if child is None else self._twin(child)
            for name, child in module._modules.items()
        }
        twin.__dict__ = state
        for name, value in vars(module).items():
            if type(value) not in _NO_MODULES and name not in _OWN_TREATMENT:
                state[name] = self._remade(value, depth=2)
        if isinstance(twin, ProbabilisticTensorDictSequential):
            # Its own version switches the exploration type of the whole process for a moment.
            state["get_dist_params"] = functools.partial(_dist_params, twin)
        return twin

    def _remade(self, value: Any, depth: int) -> Any:
        """``value`` with modules, and methods bound to modules, replaced by their shadows."""
        if isinstance(value, nn.Module):
            return self._twin(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self._twin(value.__self__))
        if isinstance(value, functools.partial) and depth:
            function = self._remade(value.func, depth - 1)
            arguments = [self._remade(item, depth - 1) for item in value.args]
            keywords = {key: self._remade(item, depth - 1) for key, item in value.keywords.items()}
            return functools.partial(function, *arguments, **keywords)
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, TensorDictBase):
            return value.clone()
        if isinstance(value, collections.deque) and depth:
            return type(value)((self._remade(v, depth - 1) for v in value), value.maxlen)
        if isinstance(value, collections.OrderedDict | collections.defaultdict) and depth:
            twin = copy.copy(value)
            twin.update((key, self._remade(item, depth - 1)) for key, item in value.items())
            return twin
        if type(value) is torch.Tensor:  # state in a plain attribute: a run may write it in place
            return value.detach().clone()
        if isinstance(value, types.FunctionType) and value.__closure__ and depth:
            return self._function(value, depth)
        kind: Any = type(value)
        held: Any = value
        if kind in (list, tuple, set) and depth:
            return kind(self._remade(item, depth - 1) for item in held)
        if kind is dict and depth:
            return {key: self._remade(item, depth - 1) for key, item in held.items()}
        return value

    def _function(self, function: types.FunctionType, depth: int) -> types.FunctionType:
        """A function over the shadows of the modules that it closes over."""
        cells = []
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                held = None
            if any(True for _ in kept_in("", held, depth)):
                cell = types.CellType(self._remade(held, depth - 1))
            cells.append(cell)
        twin = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(cells),
        )
        twin.__kwdefaults__ = function.__kwdefaults__
        return twin


class Itself:
    """A model that is its own stand-in, as a run of it can leave no trace.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def of(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return module


def stand_in(model: nn.Module) -> Shadow | Itself:
    """What further evaluations run on: the model's shadow, or the model where that is as good.

    A model of nothing but torch's own stateless layers writes nothing, draws nothing, and does the
    same in training and evaluation mode. It is looked at anew each time: hooks may have been added.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> stand_in(net).model is net, stand_in(nn.Sequential(net, nn.Dropout())).model is net
    (True, False)
    """
    return Itself(model) if is_stateless(model) else Shadow(model)


def is_stateless(model: nn.Module) -> bool:
    """Whether a model is made of torch's own stateless layers alone, as torch made them."""
    held = vars(model)
    if type(model) is TensorDictModule:
        plain = held["_kwargs"] is None and not held["method_kwargs"] and held["method"] is None
        inside = "module" in held["_modules"]  # and not a function, which may call anything
        if not (plain and inside and model.inplace is True and not model.strict):
            return False
    elif type(model) not in _STATELESS:
        return False
    if "forward" in held or held["_buffers"] or any(held[name] for name in _HOOKS):
        return False
    return all(child is None or is_stateless(child) for child in held["_modules"].values())


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATELESS = frozenset(
    {
        *(nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Bilinear),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
        *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.PReLU),
        *(nn.Softmax, nn.LogSoftmax, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d),
        *(nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    }
)


def _dist_params(twin: Any, td: Any, tensordict_out: Any = None, **kwargs: Any) -> Any:
    return twin.det_part(td, tensordict_out, **kwargs)


_NO_MODULES = frozenset({bool, int, float, str, type(None), type, torch.Size, torch.dtype})
_OWN_TREATMENT = frozenset(
    {"training", "_parameters", "_buffers", "_modules"}
    | {name for name in vars(nn.Module()) if name.endswith("hooks") or "hooks_" in name}
)


def is_scripted(module: nn.Module) -> bool:
    """Whether any part of the module is TorchScript, which calls no Python."""
    seen: set[int] = set()
    waiting: list[nn.Module] = [module]
    while waiting:
        part = waiting.pop()
        if isinstance(part, torch.jit.ScriptModule):
            return True
        if id(part) not in seen:
            seen.add(id(part))
            waiting.extend(child for child in part._modules.values() if child is not None)
    return False
