"""The rules, each as its surrogate.

Notation: ``x`` the module's input, ``y`` its output, ``f(x; w, b)`` its map, ``x⁺``/``x⁻`` positive
and negative part, ``st(z) = z + ε·sign(z)``. Relevance per unit of activation is what flows
backward, so a rule scales ``z`` by ``y / st(z)``, a factor that carries no graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.attribution.lrp.rules.normalised import affine
from tdhook_like.attribution.lrp.rules.parameters import (
    ZeroParams,
    can_be_asked,
    parameter_names,
    read_with_zeros,
    refuse_nonfinite,
    why_not_zeroed,
)
from tdhook_like.attribution.lrp.rules.rule import Inputs, Rule, is_float
from tdhook_like.attribution.lrp.rules.stabilizer import Stabilizing, checked, own_ratio, ratio_by
from tdhook_like.attribution.lrp.rules.stabilizer import positive as positive
from tdhook_like.errors import RuleError
from tdhook_like.hooks.structure import mapped
from tdhook_like.hooks.surrogate import constant, finite, nonzero, quotient, tiny, unit

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


def nonzero_mask(y: Tensor) -> Tensor:
    """One where ``y`` is not zero: what arrives at a zero has nothing to be shared by.

    No graph; same shape.
    """
    return (y.detach().abs() >= tiny(y.dtype)).to(y.dtype)


def _known_nonzero(y: Tensor) -> bool:
    """Whether no entry is zero, where that can be asked without breaking a trace or waiting."""
    if not can_be_asked(y) or y.device.type != "cpu" or not y.numel():
        return False
    return y.detach().abs().min().item() >= tiny(y.dtype)


class EpsilonRule(Rule):
    """The epsilon rule: shares by contribution, a little absorbed for stability.

    ``R_i = x_i Σ_j w_ij R_j / st(y_j)``: surrogate ``y · G(y / st(y))``. On a non-linear module it
    shares by input × gradient. Conserves what bias and ε do not absorb.

    Source: Bach et al. 2015, eq. 58.

    Args:
        epsilon: Added to the size of every denominator, in units of the output; or a
            :class:`Stabilizer`.
        zero_params: Parameters that are read as zeros. With ``"bias"``, y's relevance is shared by
            contributions alone, ``z′ · G(y / st(z′))`` with ``z′ = f(x; w, 0)``: the bias absorbs
            nothing. The layer then runs a second time.

    Raises:
        RuleError: If epsilon is neither a finite number above zero nor a stabiliser.

    >>> EpsilonRule(epsilon=1e-6), EpsilonRule(zero_params="bias")
    (EpsilonRule(epsilon=1e-06), EpsilonRule(epsilon=1e-06, zero_params=('bias',)))
    """

    feeds_zeros = False
    fresh = True
    #: Names of the parameters that are read as zeros.
    zero_params: tuple[str, ...] = ()

    def __init__(self, epsilon: Stabilizing = 1e-6, *, zero_params: ZeroParams = ()) -> None:
        name = type(self).__name__
        self.epsilon = checked("epsilon", epsilon, name)
        if names := parameter_names(zero_params, name):  # else it does not show
            self.zero_params = names

    def check(self, module: nn.Module) -> str | None:
        return why_not_zeroed(module, self.zero_params)

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        if module._parameters:
            refuse_nonfinite(self, module)
        # Not asked of _parameters: stacked ones under vmap stand elsewhere.
        if any(hasattr(module, name) for name in self.zero_params):
            return self._without(module, inputs, output)
        if isinstance(output, Tensor):
            return output * own_ratio(self.epsilon, output, module)
        return mapped(
            lambda y: y * own_ratio(self.epsilon, y, module) if is_float(y) else y, output
        )

    def factor(self, module: nn.Module, output: Tensor) -> Callable[[Tensor], Tensor] | None:
        if self.zero_params or type(self).surrogate is not EpsilonRule.surrogate:
            return None
        refuse_nonfinite(self, module)
        return lambda y: own_ratio(self.epsilon, y, module)

    def _without(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        read = read_with_zeros(module, inputs, self.zero_params)
        return mapped(
            lambda y, z: z * ratio_by(self.epsilon, y, z, module) if is_float(y) else y,
            output,
            read,
        )


class UniformEpsilonRule(EpsilonRule):
    """The epsilon rule, shared evenly among the operands: for products of several inputs.

    Source: Achtibat et al. 2024, eq. 15 (the uniform rule for bilinear operations).

    Args:
        epsilon: Added to the size of every denominator, in units of the output; or a
            :class:`Stabilizer`.
        zero_params: Parameters that are read as zeros, as in :class:`EpsilonRule`.

    >>> UniformEpsilonRule()
    UniformEpsilonRule(epsilon=1e-06)
    """

    fresh = True
    feeds_zeros = False

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        n = max(len(inputs.attributed), 1)
        return mapped(
            lambda y: y / n if is_float(y) else y,
            super().surrogate(module, inputs, output),
        )


class SoftmaxEpsilonRule(EpsilonRule):
    """AttnLRP's rule for softmax: ``R_i = x_i (R_i − s_i Σ_j R_j)``.

    In the signal that flows here, relevance per unit of activation, it is softmax's own gradient,
    along whatever dimension and under whatever mask.

    Source: Achtibat et al. 2024, eq. 13.

    Args:
        epsilon: Added to the size of every denominator, in units of the output; or a
            :class:`Stabilizer`.
        zero_params: As in :class:`EpsilonRule`; softmax itself has no parameters.

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
        return x * quotient(nonzero(y), nonzero(x))


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
        return mapped(lambda y: constant(y) if isinstance(y, Tensor) else y, output)


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

    Args:
        zero_params: Parameters that are read as zeros. With ``"bias"``, all relevance is shared by
            what is normalised, ``z′ · G(y / st(z′))``, and the bias absorbs nothing.
        stabilizer: Of that denominator; not used without ``zero_params``.

    Raises:
        RuleError: If the module is neither nn.LayerNorm nor nn.RMSNorm, nor has their attributes.

    >>> LayerNormRule()
    LayerNormRule()
    """

    fresh = True
    feeds_zeros = False
    #: Names of the parameters that are read as zeros.
    zero_params: tuple[str, ...] = ()

    def __init__(self, *, zero_params: ZeroParams = (), stabilizer: Stabilizing = 1e-6) -> None:
        held = checked("stabilizer", stabilizer, type(self).__name__)
        if names := parameter_names(zero_params, type(self).__name__):  # else neither shows
            self.zero_params, self.stabilizer = names, held

    def check(self, module: nn.Module) -> str | None:
        if isinstance(getattr(module, "normalized_shape", None), tuple | list):
            return why_not_zeroed(module, self.zero_params)
        return "it has no normalized_shape, as nn.LayerNorm and nn.RMSNorm have. Use EpsilonRule."

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        x = inputs.tensors[0]
        shape: Any = module.normalized_shape
        dims = tuple(range(-len(shape), 0))
        centred = x - x.mean(dims, keepdim=True) if isinstance(module, nn.LayerNorm) else x
        eps = module.eps if module.eps is not None else torch.finfo(x.dtype).eps
        power = constant(centred).pow(2).mean(dims, keepdim=True)
        weight, bias = (self._read(module, name) for name in ("weight", "bias"))
        if module._parameters:
            refuse_nonfinite(self, module)
        z = affine(centred, torch.rsqrt(power + eps), weight, bias)  # pyright: ignore[reportOperatorIssue]
        if self.zero_params:
            return z * ratio_by(self.stabilizer, output, z, module)
        return z if _known_nonzero(output) else z * nonzero_mask(output)

    def _read(self, module: nn.Module, name: str) -> Tensor | None:
        value = getattr(module, name, None)
        if not isinstance(value, Tensor):
            return None
        return torch.zeros_like(value) if name in self.zero_params else value


class PseudoIdentityRule(Rule):
    """The identity rule for elementwise non-linearities, with a stabilised ratio.

    Surrogate ``x · G(y / st(x))``: like :class:`PassRule`, but where the input is within the
    stabiliser of zero, relevance is absorbed.

    Source: Achtibat et al. 2024, eq. 9.

    Args:
        stabilizer: Added to the size of every denominator, in units of the input; or a
            :class:`Stabilizer`.

    >>> PseudoIdentityRule()
    PseudoIdentityRule(stabilizer=1e-06)
    """

    feeds_zeros = False
    fresh = True

    def __init__(self, stabilizer: Stabilizing = 1e-6) -> None:
        self.stabilizer = checked("stabilizer", stabilizer, type(self).__name__)

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        x = single_input(self, module, inputs)
        if not isinstance(output, Tensor) or x.shape != output.shape:
            raise RuleError(f"{self!r} on {type(module).__name__}: it must keep its input's shape.")
        return x * ratio_by(self.stabilizer, output, x, module)


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
        return torch.cat([constant(query), constant(key), value], dim=-1)


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
