"""The rules that read a layer with other weights: alpha-beta, z⁺, gamma, z-box, w², flat.

Same notation as in ``rules``. ``run(x, w, b)`` is the layer's own map with other parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tdhook_like.attribution.lrp.modifiers import (
    ParamModifier,
    effective_parameters,
    with_parameters,
)
from tdhook_like.attribution.lrp.rule import Inputs, Rule
from tdhook_like.attribution.lrp.rules import positive, single_input
from tdhook_like.errors import RuleError
from tdhook_like.hooks.surrogate import ratio, unit
from tdhook_like.randomness import OwnDraws

__all__ = [
    "AlphaBetaRule",
    "FlatRule",
    "GammaRule",
    "ModifiedRule",
    "WSquareRule",
    "ZBoxRule",
    "ZPlusRule",
]

Change = Callable[[Tensor], Tensor]
"""From a parameter to what stands in its place."""


_NOT_AFFINE = (
    *(_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm),
    *(nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag, nn.PReLU, nn.Bilinear),
)


_DRAW_NOTHING = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""Layers that may run again without a thought; others might draw a second time."""


class _WeightRule(Rule):
    """A rule on a layer with weights of its own: one input, one output."""

    feeds_zeros = False
    fresh = True

    def __init__(self, stabilizer: float = 1e-6) -> None:
        self.stabilizer = positive("stabilizer", stabilizer, type(self).__name__)

    def check(self, module: nn.Module) -> str | None:
        children = [name for name in module._modules if name != "parametrizations"]
        if children:
            return (
                "it reads a layer with other weights, and this is a container of "
                f"{len(children)} modules. Put it on the layers inside, or use EpsilonRule here."
            )
        if isinstance(module, _NOT_AFFINE):
            return (
                "its output is not a weighted sum of its input alone: statistics, states or indices "
                "take part. Use PassRule, LayerNormRule or EpsilonRule."
            )
        own = any(value is not None for value in module._parameters.values())
        if not own and not isinstance(getattr(module, "weight", None), Tensor):
            return "it reads a layer with other weights, and this has none. Use PassRule or EpsilonRule."
        return None

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        reason = self.check(module)
        if reason or not isinstance(output, Tensor):
            reason = reason or f"it returns a {type(output).__name__}, not a tensor."
            raise RuleError(f"{self!r} cannot sit on {type(module).__name__}: {reason}")
        x = single_input(self, module, inputs)
        parameters = effective_parameters(module)

        def run(value: Tensor, weight: Change, bias: Change | None) -> Tensor:
            changed: dict[str, Tensor | None] = {
                name: weight(p) if name != "bias" else (bias(p) if bias else None)
                for name, p in parameters.items()
            }
            args = [value if item is x else item for item in inputs]
            kwargs = {key: value if item is x else item for key, item in inputs.kwargs.items()}
            with nullcontext() if type(module) in _DRAW_NOTHING else OwnDraws():
                return with_parameters(module, changed).forward(*args, **kwargs)

        return self.share(run, x, output)

    def share(self, run: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The surrogate, from ``run(x, change of weights, change of bias or None for no bias)``."""
        raise RuleError(f"{type(self).__name__} must override share(run, x, y).")

    def scaled(self, z: Tensor, y: Tensor) -> Tensor:
        """``z · G(y / st(z))``: shares relevance by the parts of z, and scales it to y."""
        return z * ratio(y, z, self.stabilizer)


class ModifiedRule(_WeightRule):
    """The epsilon rule read through modified parameters.

    ``R_i = x_i Σ_j w′_ij R_j / st(z′_j)`` with ``z′ = f(x; w′, b′)``.

    Args:
        modifier: What becomes of the parameters.
        stabilizer: Added to the size of every denominator, in units of the output.

    >>> rule = ModifiedRule(ParamModifier(lambda name, p: p.clamp(min=0)))
    """

    fresh = True
    feeds_zeros = False

    def __init__(self, modifier: ParamModifier, stabilizer: float = 1e-6) -> None:
        super().__init__(stabilizer)
        if not isinstance(modifier, ParamModifier):
            raise RuleError(f"ModifiedRule needs a ParamModifier, got {modifier!r}.")
        self.modifier = modifier

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        single_input(self, module, inputs)
        if self.check(module) or not isinstance(output, Tensor):
            return super().surrogate(module, inputs, output)  # which says why not
        with nullcontext() if type(module) in _DRAW_NOTHING else OwnDraws():
            z = with_parameters(module, self.modifier(module)).forward(*inputs, **inputs.kwargs)
        return self.scaled(z, output)


class AlphaBetaRule(_WeightRule):
    """Positive contributions weigh α, negative ones β, with α − β = 1.

    ``p = f(x⁺; w⁺, b⁺) + f(x⁻; w⁻, 0)``, ``n = f(x⁺; w⁻, b⁻) + f(x⁻; w⁺, 0)``; surrogate
    ``α·p·G(y/st(p)) − β·n·G(y/st(n))``. Conserves what biases do not absorb.

    Source: Bach et al. 2015, eq. 60.

    Args:
        alpha: Weight of positive contributions, at least 1.
        beta: Weight of negative contributions, at least 0; ``alpha - beta`` must be 1.
        stabilizer: Added to the size of every denominator, in units of the output.

    Raises:
        RuleError: If a weight is negative or their difference is not 1.

    >>> AlphaBetaRule(alpha=2.0, beta=1.0)
    AlphaBetaRule(stabilizer=1e-06, alpha=2.0, beta=1.0)
    """

    fresh = True
    feeds_zeros = False

    def __init__(self, alpha: float = 2.0, beta: float = 1.0, stabilizer: float = 1e-6) -> None:
        super().__init__(stabilizer)
        name = type(self).__name__
        if not (isinstance(alpha, int | float) and isinstance(beta, int | float)):
            raise RuleError(f"{name}: alpha and beta must be numbers, got {alpha!r} and {beta!r}.")
        if alpha < 0 or beta < 0 or not abs(alpha - beta - 1) < 1e-9:
            raise RuleError(
                f"{name}: alpha and beta must not be negative and alpha - beta must be 1, "
                f"got {alpha} and {beta}."
            )
        self.alpha, self.beta = float(alpha), float(beta)

    def share(self, run: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        above = known_nonnegative(x)
        up, down = (x, None) if above else (x.clamp(min=0), x.clamp(max=0))
        p = run(up, _positive, _positive)
        if down is not None:
            p = p + run(down, _negative, None)
        surrogate = self.scaled(p, y) if self.alpha == 1 else self.alpha * self.scaled(p, y)
        if self.beta == 0:
            return surrogate
        n = run(up, _negative, _negative)
        if down is not None:
            n = n + run(down, _positive, None)
        return surrogate - self.beta * self.scaled(n, y)


class ZPlusRule(AlphaBetaRule):
    """Positive contributions only: alpha-beta with α = 1, β = 0.

    Source: Montavon et al. 2017, eq. 13 (z⁺), for inputs of any sign.

    Args:
        stabilizer: Added to the size of every denominator, in units of the output.

    >>> ZPlusRule()
    ZPlusRule(stabilizer=1e-06)
    """

    def __init__(self, stabilizer: float = 1e-6) -> None:
        super().__init__(1.0, 0.0, stabilizer)

    def __repr__(self) -> str:
        return f"ZPlusRule(stabilizer={self.stabilizer!r})"


class GammaRule(_WeightRule):
    """Favours contributions of the output's own sign by a factor 1 + γ.

    Where ``y > 0``: shares by ``p = f(x⁺; w+γw⁺, b+γb⁺) + f(x⁻; w+γw⁻, 0)``; where ``y < 0``: by
    ``n = f(x⁺; w+γw⁻, b+γb⁻) + f(x⁻; w+γw⁺, 0)``; where ``y = 0`` nothing arrives.

    Source: Montavon et al. 2019, section 10.2.2; Andéol et al. 2021 for inputs of any sign.

    Args:
        gamma: How much the favoured contributions gain, at least 0.
        stabilizer: Added to the size of every denominator, in units of the output.

    Raises:
        RuleError: If gamma is negative.

    >>> GammaRule(gamma=0.25)
    GammaRule(stabilizer=1e-06, gamma=0.25)
    """

    fresh = True
    feeds_zeros = False

    def __init__(self, gamma: float = 0.25, stabilizer: float = 1e-6) -> None:
        super().__init__(stabilizer)
        if not isinstance(gamma, int | float) or not 0 <= gamma < float("inf"):
            raise RuleError(
                f"GammaRule: gamma must be a finite number of at least 0, got {gamma!r}."
            )
        self.gamma = float(gamma)

    def share(self, run: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        def more(part: Change) -> Change:
            return lambda w: w + self.gamma * part(w)

        above = known_nonnegative(x)
        up, down = (x, None) if above else (x.clamp(min=0), x.clamp(max=0))
        p, n = run(up, more(_positive), more(_positive)), run(up, more(_negative), more(_negative))
        if down is not None:
            p, n = p + run(down, more(_negative), None), n + run(down, more(_positive), None)
        sign = y.detach()
        wins = torch.where(sign > 0, ratio(y, p, self.stabilizer), 0.0)
        loses = torch.where(sign < 0, ratio(y, n, self.stabilizer), 0.0)
        return p * wins + n * loses


class ZBoxRule(_WeightRule):
    """For inputs within known bounds, such as pixels: shares by distance to the bounds.

    Scaled ``z′ = f(x; w, b) − f(l·u; w⁺, b⁺) − f(h·u; w⁻, b⁻)``, with u ones.

    Source: Montavon et al. 2017, eq. 15 (zᴮ).

    Args:
        low: The least value of an input: a number or a tensor that broadcasts to the input.
        high: The largest value, likewise.
        stabilizer: Added to the size of every denominator, in units of the output.

    Raises:
        RuleError: If ``low`` is anywhere above ``high``.

    >>> ZBoxRule(0.0, 1.0)
    ZBoxRule(stabilizer=1e-06, low=0.0, high=1.0)
    """

    fresh = True
    feeds_zeros = True

    def __init__(
        self, low: float | Tensor = -1.0, high: float | Tensor = 1.0, stabilizer: float = 1e-6
    ) -> None:
        super().__init__(stabilizer)
        try:
            ordered = bool((torch.as_tensor(low) <= torch.as_tensor(high)).all())
        except (RuntimeError, TypeError, ValueError):
            raise RuleError(
                f"ZBoxRule: low and high do not go together: {low!r}, {high!r}."
            ) from None
        if not ordered:
            raise RuleError(f"ZBoxRule: low must not be above high, got {low!r} and {high!r}.")
        self.low, self.high = low, high

    def share(self, run: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        ones = unit(x)
        try:
            low, high = (self._bound(bound, x) * ones for bound in (self.low, self.high))
        except RuntimeError:
            raise RuleError(
                f"{self!r}: the bounds do not broadcast to an input of shape {tuple(x.shape)}."
            ) from None
        z = run(x, _same, _same) - run(low, _positive, _positive) - run(high, _negative, _negative)
        return self.scaled(z, y)

    @staticmethod
    def _bound(bound: float | Tensor, x: Tensor) -> float | Tensor:
        return bound.to(x).expand(x.shape) if isinstance(bound, Tensor) else bound


class WSquareRule(_WeightRule):
    """Shares by squared weights, regardless of the input: for layers on unbounded inputs.

    Scaled ``z′ = f(u; w², 0)`` with u ones; the bias takes no part.

    Source: Montavon et al. 2017, eq. 12 (w²).

    Args:
        stabilizer: Added to the size of every denominator, in units of the output.

    >>> WSquareRule()
    WSquareRule(stabilizer=1e-06)
    """

    fresh = True
    feeds_zeros = True

    def share(self, run: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self.scaled(run(unit(x), torch.square, None), y)


class FlatRule(WSquareRule):
    """Shares evenly over the inputs that an output reads, regardless of input and weights.

    Scaled ``z′ = f(u; 1, 0)`` with u ones. Padding takes no part.

    Source: Lapuschkin et al. 2019, methods section "flat".

    Args:
        stabilizer: Added to the size of every denominator, in units of the output.

    >>> FlatRule()
    FlatRule(stabilizer=1e-06)
    """

    fresh = True
    feeds_zeros = True

    def share(self, run: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self.scaled(run(unit(x), torch.ones_like, None), y)


def known_nonnegative(x: Tensor) -> bool:
    """Whether no entry is negative, where that can be asked without breaking a trace.

    Under vmap, grad transforms, compilation and CUDA graphs it cannot, and the answer is no.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):  # pyright: ignore[reportAttributeAccessIssue]
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return bool((x.detach() >= 0).all())


def _positive(t: Tensor) -> Tensor:
    return t.clamp(min=0)


def _negative(t: Tensor) -> Tensor:
    return t.clamp(max=0)


def _same(t: Tensor) -> Tensor:
    return t
