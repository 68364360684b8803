"""Rules that change how a gradient passes rectifiers, and excitation backprop for layers.

The first three are about gradients: go with ``Saliency(target, abs=False, rules=mapper)`` for
the attribution of their papers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.attribution.lrp.rules.as_is import single_input
from tdhook_like.attribution.lrp.rules.layers import LayerRun, WeightRule
from tdhook_like.attribution.lrp.rules.rule import Inputs, Rule
from tdhook_like.attribution.lrp.rules.stabilizer import positive
from tdhook_like.errors import RuleError
from tdhook_like.hooks.surrogate import constant

__all__ = ["BetaSmoothRule", "DeconvReLURule", "ExcitationRule", "GuidedReLURule"]


class _RectifierRule(Rule):
    """A rule on a ReLU that replaces its backward pass."""

    feeds_zeros = False
    absorbs = "rectifier"

    def check(self, module: nn.Module) -> str | None:
        if isinstance(module, nn.ReLU):
            return None
        return "it replaces the backward pass of a rectifier, nn.ReLU, and this is none."

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        reason = self.check(module)
        if reason:
            raise RuleError(f"{self!r} cannot sit on {type(module).__name__}: {reason}")
        return self.replaced(single_input(self, module, inputs))

    def replaced(self, x: Tensor) -> Tensor:
        """The rectifier's surrogate, from its input."""
        raise RuleError(f"{type(self).__name__} must override replaced(x).")


class GuidedReLURule(_RectifierRule):
    """Guided backpropagation: a gradient passes a ReLU where input and gradient are positive.

    ``g_in = g_out · [x > 0] · [g_out > 0]``, g the gradient (not relevance).

    Source: Springenberg et al. 2015, section 3.4 and figure 1.

    >>> GuidedReLURule()
    GuidedReLURule()
    """

    feeds_zeros = False

    def replaced(self, x: Tensor) -> Tensor:
        return _Rectified.apply(x, True)  # pyright: ignore[reportReturnType]


class DeconvReLURule(_RectifierRule):
    """The deconvolutional network's rectifier: it acts on the gradient, whatever the input was.

    ``g_in = g_out · [g_out > 0]``, g the gradient (not relevance).

    Source: Zeiler & Fergus 2014, section 2.1 ("Rectification"), as a gradient in Springenberg et
    al. 2015, figure 1.

    >>> DeconvReLURule()
    DeconvReLURule()
    """

    feeds_zeros = False

    def replaced(self, x: Tensor) -> Tensor:
        return _Rectified.apply(x, False)  # pyright: ignore[reportReturnType]


class BetaSmoothRule(_RectifierRule):
    """A ReLU with the backward pass of softplus: explanations without kinks.

    ``g_in = g_out · σ(βx)``, the derivative of ``softplus_β(x) = log(1 + e^{βx}) / β``.

    Source: Dombrowski et al. 2019, eq. 13 (β-smoothing).

    Args:
        beta: How sharp the bend is, in units of 1 / input; ReLU's own gradient for large values.

    Raises:
        RuleError: If beta is not a finite number above zero.

    >>> BetaSmoothRule(beta=10)
    BetaSmoothRule(beta=10.0)
    """

    feeds_zeros = False
    fresh = True

    def __init__(self, beta: float = 10.0) -> None:
        self.beta = positive("beta", beta, type(self).__name__)

    def replaced(self, x: Tensor) -> Tensor:
        # Not F.softplus, which takes a shortcut where it is straight to about seven digits.
        return x * torch.sigmoid(self.beta * constant(x))


class _Rectified(torch.autograd.Function):
    """A ReLU whose backward pass rectifies the gradient, and masks it by the input if asked to."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, masked: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.clamp(min=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.masked = inputs
        ctx.save_for_backward(x > 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        passes = (ctx.saved_tensors[0] & (grad > 0)) if ctx.masked else grad > 0
        return grad * passes, None


class ExcitationRule(WeightRule):
    """Excitation backprop: the probability that an input is the winner of an output.

    ``R_i = Σ_j x⁺_i w⁺_ij / (Σ_k x⁺_k w⁺_kj) · R_j``: scaled ``z′ = f(x⁺; w⁺, 0)``. The paper has
    activations that are not negative; inputs that are (of a first layer) take no part here. Conserves
    everything, so that probabilities that start as one add up to one.

    Source: Zhang et al. 2016, section 3.2 (conditional winning probability, excitatory weights).

    Args:
        stabilizer: Added to the size of every denominator, in units of the output; or a
            :class:`Stabilizer`.
        zero_params: Names of the parameters that are read as zeros.

    >>> ExcitationRule()
    ExcitationRule(stabilizer=1e-06)
    """

    feeds_zeros = False
    fresh = True

    def share(self, run: LayerRun, x: Tensor, y: Tensor) -> Tensor:
        return run.scaled(run(x.clamp(min=0), lambda w: w.clamp(min=0), None), y)
