"""What a rule reads of a layer's parameters: some of them as zeros, none of them NaN."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.attribution.lrp.modifiers import effective_parameters, with_parameters
from tdhook_like.attribution.lrp.rules.rule import Inputs, Rule
from tdhook_like.errors import RuleError, listed
from tdhook_like.randomness import OwnDraws

__all__ = [
    "ZeroParams",
    "can_be_asked",
    "parameter_names",
    "read_with_zeros",
    "refuse_nonfinite",
    "running_again",
    "why_not_zeroed",
]

ZeroParams = str | Sequence[str] | None
"""The name of a parameter, or several, or none."""

_DRAW_NOTHING = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""Layers that may run again without a thought; others might draw a second time."""


def running_again(module: nn.Module) -> AbstractContextManager[Any]:
    """A block in which a layer may run a second time without moving anyone's random numbers.

    >>> with running_again(nn.Linear(1, 1)):
    ...     pass
    """
    return nullcontext() if type(module) in _DRAW_NOTHING else OwnDraws()


# --- parameters that are read as zeros --------------------------------------------------------------


def parameter_names(zero_params: ZeroParams, rule: str) -> tuple[str, ...]:
    """The names that a rule was given, each once.

    Raises:
        RuleError: If they are not names.

    >>> parameter_names("bias", "EpsilonRule"), parameter_names(["weight", "bias"], "EpsilonRule")
    (('bias',), ('weight', 'bias'))
    """
    names = (zero_params,) if isinstance(zero_params, str) else zero_params
    if names is None:
        return ()
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n for n in names):
        raise RuleError(
            f"{rule}: zero_params must be the name of a parameter or a list of names, such as 'bias', "
            f"got {zero_params!r}."
        )
    return tuple(dict.fromkeys(names))


def why_not_zeroed(module: nn.Module, names: Sequence[str]) -> str | None:
    """Why parameters of these names cannot be read as zeros here, or None where they can.

    A module without any parameters may have them: one rule then serves layers and pooling alike.

    >>> why_not_zeroed(nn.Linear(1, 1), ["bias"]) is None
    True
    >>> why_not_zeroed(nn.Linear(1, 1), ["bais"])
    "zero_params names 'bais', and its parameters are 'weight', 'bias'."
    """
    if not names:
        return None
    if isinstance(module, nn.RNNBase):
        return "zero_params does not reach into recurrent layers."
    parametrized = module._modules.get("parametrizations")
    if len(module._modules) > (parametrized is not None):
        return "zero_params names parameters of a layer, and this is a container of modules."
    known = [*module._parameters, *(parametrized._modules if parametrized is not None else ())]
    missing = [n for n in names if n not in known and n not in vars(module)]
    missing = [n for n in missing if not hasattr(type(module), n)]  # computed by a property
    if not known or not missing:
        return None
    return f"zero_params names {listed(missing)}, and its parameters are {listed(known)}."


def read_with_zeros(module: nn.Module, inputs: Inputs, names: Sequence[str]) -> Any:
    """What a layer gives when the named parameters are zeros; connected to the inputs' graph.

    >>> layer = nn.Linear(2, 1)
    >>> read_with_zeros(layer, Inputs((torch.zeros(2),)), ["bias"])
    tensor([0.])
    """
    zeros: dict[str, Tensor | None] = {
        name: torch.zeros_like(value) if name in names else value
        for name, value in effective_parameters(module).items()
    }
    with running_again(module):
        return with_parameters(module, zeros).forward(*inputs, **inputs.kwargs)


# --- parameters that are not numbers ----------------------------------------------------------------

_FINITE: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by identity: tensors compare elementwise


def refuse_nonfinite(
    rule: Rule, module: nn.Module, computed: Mapping[str, Tensor] | None = None
) -> None:
    """Raises where a layer's parameters hold NaN or Inf, by which nothing can be shared.

    A parameter is looked at when it is first seen and whenever it has changed since, going by its
    version counter; in between this costs no tensor operation. (Writing through ``.data`` does not
    count as a change.) Not under vmap, compilation, or while a CUDA graph is captured, where values
    cannot be asked for.

    Args:
        rule: What is about to read them.
        module: The layer; its own parameters are looked at, not those of modules inside.
        computed: Effective parameters that are computed in each call, looked at every time.

    Raises:
        RuleError: With the names of rule, module and parameter.

    >>> layer = nn.Linear(1, 1)
    >>> _ = nn.init.constant_(layer.weight, float("nan"))
    >>> refuse_nonfinite(Rule(), layer)
    Traceback (most recent call last):
    tdhook_like.errors.RuleError: Rule() on Linear: its parameter 'weight' holds NaN or Inf in 1 of ...
    """
    if torch.compiler.is_compiling():
        return
    for name, value in module._parameters.items():
        if value is not None and not _known_finite(value):
            _refuse(rule, module, name, value)
    for name, value in (computed or {}).items():
        if name not in module._parameters and can_be_asked(value) and not _all_finite(value):
            _refuse(rule, module, name, value)


def _known_finite(value: Tensor) -> bool:
    seen = _FINITE.get(id(value))
    if seen is not None and seen[0]() is value and seen[1] == _version(value):
        return True
    if not can_be_asked(value):
        return True
    version = _version(value)
    if not _all_finite(value):
        return False
    forget = partial(_FINITE.pop, id(value))
    _FINITE[id(value)] = weakref.ref(value, lambda _: forget(None)), version
    return True


def _version(value: Tensor) -> int:
    return -1 if value.is_inference() else value._version


def can_be_asked(value: Tensor) -> bool:
    """Whether a tensor tells its values without breaking a trace, a transform or a CUDA graph."""
    if torch.compiler.is_compiling():
        return False
    if type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point() or value.is_meta:
        return False
    if value.itemsize < 2 or torch._C._functorch.is_functorch_wrapped_tensor(value):  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def _all_finite(value: Tensor) -> bool:
    # A sum is NaN or Inf if an entry is; if it merely overflowed, the entries are looked at.
    value = value.detach()
    return isfinite(value.sum().item()) or bool(torch.isfinite(value).all())


def _refuse(rule: Rule, module: nn.Module, name: str, value: Tensor) -> None:
    bad = int((~torch.isfinite(value.detach())).sum())
    raise RuleError(
        f"{rule!r} on {type(module).__name__}: its parameter {name!r} holds NaN or Inf in {bad} of "
        f"{value.numel()} entries, by which no relevance can be shared. Repair the weights, or let "
        "the mapper give StopRule() for this module."
    )
