"""The rules, each as its surrogate.

Notation: ``x`` the module's input, ``y`` its output, ``f(x; w, b)`` its map, ``x⁺``/``x⁻`` positive
and negative part, ``st(z) = z + ε·sign(z)``. Relevance per unit of activation is what flows
backward, so a rule scales ``z`` by ``y / st(z)``, a factor that carries no graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.attribution.lrp.rule import Inputs, Rule
from tdhook_like.errors import RuleError
from tdhook_like.hooks.structure import mapped
from tdhook_like.hooks.surrogate import finite, nonzero, ratio, tiny, unit

__all__ = [
    "AHQKVRule",
    "EpsilonRule",
    "IgnoreRule",
    "LayerNormRule",
    "PassRule",
    "PseudoIdentityRule",
    "SoftmaxEpsilonRule",
    "StopRule",
    "UniformEpsilonRule",
    "UniformRule",
]


def positive(name: str, value: float, rule: str) -> float:
    """``value`` as a float, or a :class:`RuleError` where it is not a finite number above zero."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < float("inf")
    ):
        raise RuleError(f"{rule}: {name} must be a finite number above 0, got {value!r}.")
    return float(value)


def own_ratio(y: Tensor, epsilon: float) -> Tensor:
    """``y / st(y)``, which does not depend on y's sign. No graph; same shape."""
    size = y.detach().abs().clamp(tiny(y.dtype), torch.finfo(y.dtype).max)
    return size.div_(size + epsilon)


def nonzero_mask(y: Tensor) -> Tensor:
    """One where ``y`` is not zero: what arrives at a zero has nothing to be shared by.

    No graph; same shape.
    """
    return (y.detach().abs() >= tiny(y.dtype)).to(y.dtype)


class EpsilonRule(Rule):
    """The epsilon rule: shares by contribution, a little absorbed for stability.

    ``R_i = x_i Σ_j w_ij R_j / st(y_j)``: surrogate ``y · G(y / st(y))``. On a non-linear module it
    shares by input × gradient. Conserves what bias and ε do not absorb.

    Source: Bach et al. 2015, eq. 58.

    Args:
        epsilon: Added to the size of every denominator, in units of the output.

    Raises:
        RuleError: If epsilon is not a finite number above zero.

    >>> EpsilonRule(epsilon=1e-6)
    EpsilonRule(epsilon=1e-06)
    """

    feeds_zeros = False
    fresh = True

    def __init__(self, epsilon: float = 1e-6) -> None:
        self.epsilon = positive("epsilon", epsilon, type(self).__name__)

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output * self._factor(output)
        return mapped(
            lambda y: y * self._factor(y) if isinstance(y, Tensor) and y.is_floating_point() else y,
            output,
        )

    def _factor(self, y: Tensor) -> Tensor:
        return own_ratio(y, self.epsilon)


class UniformEpsilonRule(EpsilonRule):
    """The epsilon rule, shared evenly among the operands: for products of several inputs.

    Source: Achtibat et al. 2024, eq. 15 (the uniform rule for bilinear operations).

    Args:
        epsilon: Added to the size of every denominator, in units of the output.

    >>> UniformEpsilonRule()
    UniformEpsilonRule(epsilon=1e-06)
    """

    fresh = True
    feeds_zeros = False

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        n = max(len(inputs.attributed), 1)
        return mapped(
            lambda y: y / n if isinstance(y, Tensor) and y.is_floating_point() else y,
            super().surrogate(module, inputs, output),
        )


class SoftmaxEpsilonRule(EpsilonRule):
    """AttnLRP's rule for softmax: ``R_i = x_i (R_i − s_i Σ_j R_j)``.

    In the signal that flows here, relevance per unit of activation, it is softmax's own gradient,
    along whatever dimension and under whatever mask.

    Source: Achtibat et al. 2024, eq. 13.

    Args:
        epsilon: Added to the size of every denominator, in units of the output.

    >>> SoftmaxEpsilonRule()
    SoftmaxEpsilonRule(epsilon=1e-06)
    """


class PassRule(Rule):
    """Relevance passes an elementwise module unchanged, also where input or output is zero.

    Surrogate ``x · G(y / x)``. Conserves everything.

    Source: Bach et al. 2015, section "Pooling and activations"; Ali et al. 2022.

    Raises:
        RuleError: At the call, if input and output do not correspond element by element.

    >>> PassRule()
    PassRule()
    """

    feeds_zeros = False
    fresh = True

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        tensors = inputs.attributed or inputs.tensors
        outputs = [output] if isinstance(output, Tensor) else output
        if not isinstance(outputs, list | tuple) or len(outputs) != len(tensors):
            raise RuleError(
                f"PassRule on {type(module).__name__}: {len(tensors)} inputs and "
                f"{type(output).__name__} do not correspond. Use EpsilonRule or UniformRule."
            )
        passed = [self._passed(module, x, y) for x, y in zip(tensors, outputs, strict=True)]
        return passed[0] if isinstance(output, Tensor) else tuple(passed)

    def _passed(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if x.numel() != y.numel():
            raise RuleError(
                f"PassRule on {type(module).__name__}: input of shape {tuple(x.shape)} and output of "
                f"shape {tuple(y.shape)} do not correspond element by element. Use EpsilonRule."
            )
        x = x.reshape(y.shape)
        return x * finite(nonzero(y).div_(nonzero(x)))


class IgnoreRule(Rule):
    """The module keeps its own gradient, whatever a mapper further out would say.

    Right for what is linear (dropout, flatten) or picks entries (max pooling).

    >>> IgnoreRule()
    IgnoreRule()
    """

    feeds_zeros = False

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        return None


class StopRule(Rule):
    """No relevance passes. Everything that arrives is absorbed.

    >>> StopRule()
    StopRule()
    """

    feeds_zeros = False

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        return mapped(lambda y: y.detach() if isinstance(y, Tensor) else y, output)


class UniformRule(Rule):
    """Relevance is shared evenly among the operands, regardless of their values.

    Surrogate ``Σ_i u(x_i) · y / n`` over the n operands that are attributed. For sums and products
    of inputs that broadcast to the output's shape. Conserves everything.

    Source: Achtibat et al. 2024, eq. 7; Lapuschkin et al. 2019 (flat sharing).

    Raises:
        RuleError: At the call, if an operand does not broadcast to the output.

    >>> UniformRule()
    UniformRule()
    """

    fresh = True
    feeds_zeros = True

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        operands = inputs.attributed
        if not isinstance(output, Tensor) or not operands:
            return None if isinstance(output, Tensor) else self._refuse(module, inputs)
        try:
            ones = sum(unit(x).expand(output.shape) for x in operands)
        except RuntimeError:
            return self._refuse(module, inputs)
        return ones * (finite(nonzero(output)) / len(operands))

    def _refuse(self, module: nn.Module, inputs: Inputs) -> None:
        raise RuleError(
            f"UniformRule on {type(module).__name__}: inputs of shapes "
            f"{[tuple(x.shape) for x in inputs.tensors]} do not broadcast to its output. It is for "
            "sums and products of operands; use FlatRule on layers with weights."
        )


class LayerNormRule(Rule):
    """Normalisation with its statistics held fixed: linear in the input.

    Layer norm: ``(x − mean x) / G(std) · w + b``; RMS norm: ``x / G(rms) · w``. Conserves what the
    bias does not absorb.

    Source: Ali et al. 2022, eq. 10 (LN rule); Achtibat et al. 2024, proposition 3.4.

    Raises:
        RuleError: If the module is neither nn.LayerNorm nor nn.RMSNorm, nor has their attributes.

    >>> LayerNormRule()
    LayerNormRule()
    """

    feeds_zeros = False

    def check(self, module: nn.Module) -> str | None:
        if isinstance(getattr(module, "normalized_shape", None), tuple | list):
            return None
        return "it has no normalized_shape, as nn.LayerNorm and nn.RMSNorm have. Use EpsilonRule."

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        x = inputs.tensors[0]
        shape: Any = module.normalized_shape
        dims = tuple(range(-len(shape), 0))
        centred = x - x.mean(dims, keepdim=True) if isinstance(module, nn.LayerNorm) else x
        eps = module.eps if module.eps is not None else torch.finfo(x.dtype).eps
        power = centred.detach().pow(2).mean(dims, keepdim=True)
        z = centred * torch.rsqrt(power + eps)  # pyright: ignore[reportOperatorIssue]
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor):
            z = z * weight
        z = z + bias if isinstance(bias, Tensor) else z
        return z * nonzero_mask(output)


class PseudoIdentityRule(Rule):
    """The identity rule for elementwise non-linearities, with a stabilised ratio.

    Surrogate ``x · G(y / st(x))``: like :class:`PassRule`, but where the input is within the
    stabiliser of zero, relevance is absorbed.

    Source: Achtibat et al. 2024, eq. 9.

    Args:
        stabilizer: Added to the size of every denominator, in units of the input.

    >>> PseudoIdentityRule()
    PseudoIdentityRule(stabilizer=1e-06)
    """

    feeds_zeros = False
    fresh = True

    def __init__(self, stabilizer: float = 1e-6) -> None:
        self.stabilizer = positive("stabilizer", stabilizer, type(self).__name__)

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        x = single_input(self, module, inputs)
        if not isinstance(output, Tensor) or x.shape != output.shape:
            raise RuleError(f"{self!r} on {type(module).__name__}: it must keep its input's shape.")
        return x * ratio(output, x, self.stabilizer)


class AHQKVRule(Rule):
    """Attention weights as constants: relevance passes a fused query-key-value layer by the values.

    On a layer whose output holds queries, keys and values in three equal parts of its last
    dimension: queries and keys pass nothing, so the attention weights that are made of them are held
    fixed, and everything flows through the values.

    Source: Ali et al. 2022, eq. 9 (AH rule); CP-LRP in Achtibat et al. 2024.

    Raises:
        RuleError: At the call, if the last dimension is not divisible by three.

    >>> AHQKVRule()
    AHQKVRule()
    """

    feeds_zeros = False

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.shape[-1] % 3:
            raise RuleError(
                f"AHQKVRule on {type(module).__name__}: its output must hold queries, keys and values "
                "in three equal parts of the last dimension."
            )
        query, key, value = output.chunk(3, dim=-1)
        value = value * nonzero_mask(value)
        return torch.cat([query.detach(), key.detach(), value], dim=-1)


def single_input(rule: Rule, module: nn.Module, inputs: Inputs) -> Tensor:
    """The one floating-point input of a call, or a :class:`RuleError`."""
    tensors = inputs.tensors
    if len(tensors) == 1:
        return tensors[0]
    attributed = inputs.attributed
    if len(attributed) == 1:
        return attributed[0]
    raise RuleError(
        f"{rule!r} on {type(module).__name__} treats one input, but was called with {len(tensors)}. "
        "Use EpsilonRule, UniformEpsilonRule or a rule of your own."
    )
