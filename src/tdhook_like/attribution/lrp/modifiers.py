"""Modified parameters as temporaries: a layer's own map with other weights, the layer untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.errors import RuleError
from tdhook_like.hooks.surrogate import constant, differentiated_again
from tdhook_like.shadow import Shadow

__all__ = ["ParamModifier", "effective_parameters", "with_parameters"]

ModifyFn = Callable[[str, Tensor], Tensor]
SelectFn = Callable[[str, Tensor], bool]


class ParamModifier:
    """What becomes of a layer's parameters in a rule.

    Applied to the *effective* parameters at call time, so weight-norm and other parametrizations,
    NoisyLinear's noise, ``functional_call`` and vmapped stacked parameters are right. Nothing is
    assigned to the layer.

    Args:
        modify_fn: From name (``"weight"``, ``"bias"``) and value to the modified value, of the same
            shape; the identity if None.
        select_fn: Which parameters are modified; all of them if None.

    >>> positive = ParamModifier(lambda name, p: p.clamp(min=0))
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> bool((positive(layer)["weight"] >= 0).all())
    True
    """

    def __init__(
        self, modify_fn: ModifyFn | None = None, select_fn: SelectFn | None = None
    ) -> None:
        for name, given in (("modify_fn", modify_fn), ("select_fn", select_fn)):
            if given is not None and not callable(given):
                raise RuleError(f"ParamModifier: {name} must be callable, got {given!r}.")
        self._modify_fn = modify_fn or (lambda name, param: param)
        self._select_fn = select_fn or (lambda name, param: True)

    def modify(self, name: str, param: Tensor) -> Tensor:
        """The modified value of one parameter, or the value itself where it is not selected.

        Raises:
            RuleError: If the modified value has another shape or dtype, or is no tensor.
        """
        if not self._select_fn(name, param):
            return param
        modified = self._modify_fn(name, constant(param).clone())  # it may work in place
        if isinstance(modified, Tensor):
            got = f"{tuple(modified.shape)} of {modified.dtype}"
            if modified.shape == param.shape and modified.dtype == param.dtype:
                return modified
        else:
            got = type(modified).__name__
        raise RuleError(
            f"ParamModifier made {got} of parameter {name!r}, which is {tuple(param.shape)} of "
            f"{param.dtype}: modify_fn must return a tensor of the same shape and dtype."
        )

    def __repr__(self) -> str:
        names = [
            getattr(f, "__qualname__", type(f).__name__) for f in (self._modify_fn, self._select_fn)
        ]
        return f"ParamModifier({', '.join(names)})"

    def __call__(self, module: nn.Module) -> dict[str, Tensor]:
        """The modified effective parameters of a layer, by name, without a graph."""
        effective = effective_parameters(module)
        return {name: self.modify(name, value) for name, value in effective.items()}

    @staticmethod
    def from_modifiers(modifiers: Sequence[ParamModifier]) -> ParamModifier:
        """One modifier that applies several, in order.

        >>> double = ParamModifier(lambda name, p: 2 * p)
        >>> no_bias = ParamModifier(lambda name, p: 0 * p, lambda name, p: name == "bias")
        >>> both = ParamModifier.from_modifiers([double, no_bias])
        >>> both.modify("weight", torch.ones(1)), both.modify("bias", torch.ones(1))
        (tensor([2.]), tensor([0.]))
        """
        chain = tuple(modifiers) if isinstance(modifiers, Sequence) else (modifiers,)
        for modifier in chain:
            if not isinstance(modifier, ParamModifier):
                raise RuleError(f"from_modifiers takes a list of ParamModifiers, got {modifier!r}.")

        def modify_all(name: str, param: Tensor) -> Tensor:
            for modifier in chain:
                param = modifier.modify(name, param)
            return param

        return ParamModifier(modify_all)


def effective_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that a layer's forward reads, as it reads them; no graph.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> sorted(effective_parameters(layer))
    ['bias', 'weight']
    """
    if module.training and _parametrized(module):
        # Looking at a parametrization runs it, and some count their runs (spectral norm).
        module = Shadow(module).model
    names = [name for name, value in module._parameters.items() if value is not None]
    names += [name for name in _parametrized(module) if name not in names]
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and "weight" not in names:
        # A weight that is computed (NoisyLinear's property, the older weight_norm's attribute):
        # what it is computed from is not what forward reads.
        names = [
            name for name in ("weight", "bias") if isinstance(getattr(module, name, None), Tensor)
        ]
    with nullcontext() if differentiated_again() else torch.no_grad():
        return {name: constant(getattr(module, name)) for name in names}


def with_parameters(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """A stand-in for a layer whose forward reads ``parameters`` and everything else of the layer.

    Call its ``forward``; the layer itself is only read.

    >>> layer = nn.Linear(2, 1)
    >>> with_parameters(layer, {"weight": torch.ones(1, 2), "bias": None}).forward(torch.ones(2))
    tensor([2.])
    """
    kind = type(module)
    state: dict[str, Any] = dict(vars(module))
    state["_parameters"] = {**module._parameters, **parameters}
    computed = [name for name in parameters if isinstance(getattr(kind, name, None), property)]
    if computed:
        # The class computes these (NoisyLinear, parametrizations): here they are plain attributes.
        kind = _uncomputed(kind, tuple(computed))
    for name in parameters:
        state.pop(name, None)
        if name in computed:
            state["_parameters"].pop(name)
            state[name] = parameters[name]
    if module.training and module._buffers:  # a second run must not count as a second batch
        state["_buffers"] = {
            k: None if b is None else b.clone() for k, b in module._buffers.items()
        }
    twin = object.__new__(kind)
    twin.__dict__ = state
    return twin


@lru_cache(maxsize=64)
def _uncomputed(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), dict.fromkeys(names))


def _parametrized(module: nn.Module) -> list[str]:
    held = module._modules.get("parametrizations")
    return list(held._modules) if isinstance(held, nn.ModuleDict) else []
