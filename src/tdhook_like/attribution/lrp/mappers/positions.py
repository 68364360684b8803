"""Where layers stand in a model: which of them read its inputs, told from structure alone."""

from __future__ import annotations

from collections.abc import Iterable

from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tdhook_like.keys import as_tuple
from tdhook_like.paths import Walked, children, unwrapped, walk

__all__ = ["first_layers", "has_weights", "is_leaf"]

_OTHERWISE = (*(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),)
"""Modules with weights that read their inputs otherwise than an affine layer does."""

_NO_LAYER = (nn.Embedding, nn.EmbeddingBag, nn.Bilinear, NonDynamicallyQuantizableLinear)
"""Modules with a matrix of weights that are no affine layers of a floating-point input."""


def is_leaf(path: str, module: nn.Module) -> bool:
    """Whether a module is called and has no modules inside, parametrizations apart.

    >>> is_leaf("0", nn.ReLU()), is_leaf("", nn.Sequential(nn.ReLU())), is_leaf("", nn.ModuleList())
    (True, False, False)
    """
    if "parametrizations" in path.split("."):
        return False  # it makes a weight
    called = type(module).forward is not nn.Module.forward
    return called and all(name.startswith("parametrizations") for name, _ in children(module))


def has_weights(path: str, module: nn.Module) -> bool:
    """Whether a module is a layer with weights: dense, a convolution, or with a matrix of its own.

    >>> [has_weights("", m) for m in (nn.Linear(1, 1), nn.LayerNorm(1), nn.ReLU())]
    [True, False, False]
    """
    if not is_leaf(path, module) or isinstance(module, (*_NO_LAYER, *_OTHERWISE)):
        return False
    if isinstance(module, nn.Linear | _ConvNd):
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2


def first_layers(model: nn.Module | None, walked: Walked) -> list[nn.Module]:
    """The layers with weights that read a model's inputs; empty where none is found.

    Args:
        model: The model; None where ``walked`` is a part of one, in which the first layer is meant.
        walked: What :func:`tdhook_like.paths.walk` gave for it.
    """
    if model is None:
        return _first(walked)
    model = unwrapped(model)
    if not isinstance(model, TensorDictModuleBase):
        return _first(walked)
    return _readers(model, {as_tuple(key) for key in model.in_keys})


def _readers(module: TensorDictModuleBase, given: set[tuple[str, ...]]) -> list[nn.Module]:
    """The first layer of each module that reads nothing but what was ``given``.

    What a module without weights makes of these (a concatenation, a scaling) counts as given too;
    ``given`` is brought up to date with what the module writes.
    """
    if isinstance(module, TensorDictSequential):
        return [layer for step in _steps(module) for layer in _readers(step, given)]
    reads = all(as_tuple(key) in given for key in module.in_keys)
    weighted = any(parameter.ndim >= 2 for parameter in module.parameters())
    written = {as_tuple(key) for key in module.out_keys}
    layers = _inner(module, given) if reads else []
    given -= {key for key in given if any(_overlap(key, other) for other in written)}
    if reads and not weighted and not layers:
        given |= written
    return layers


def _inner(module: TensorDictModuleBase, given: set[tuple[str, ...]]) -> list[nn.Module]:
    """The readers in a wrapper around one module with keys; else the first layer in order."""
    wrapped = [child for _, child in children(module) if isinstance(child, TensorDictModuleBase)]
    if len(wrapped) == 1:
        inner = wrapped[0]
        return _readers(inner, given | {as_tuple(key) for key in inner.in_keys})
    return _first(walk(module))


def _steps(sequence: TensorDictSequential) -> list[TensorDictModuleBase]:
    held = sequence.module
    steps = held.values() if isinstance(held, nn.ModuleDict) else held
    return [step for step in map(unwrapped, steps) if isinstance(step, TensorDictModuleBase)]


def _overlap(key: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether one key holds the other's entry."""
    return all(a == b for a, b in zip(key, other, strict=False))


def _first(walked: Iterable[tuple[str, nn.Module, bool]]) -> list[nn.Module]:
    for path, module, _ in walked:
        if isinstance(module, _OTHERWISE):
            return []  # a layer behind it does not read the inputs
        if has_weights(path, module):
            return [module]
    return []
