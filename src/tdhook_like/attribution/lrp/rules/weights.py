"""The rules that read a layer with other weights: alpha-beta, z⁺, gamma, z-box, w², flat.

Same notation as in ``rules``. ``run(x, w, b)`` is the layer's own map with other parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tdhook_like.attribution.lrp.modifiers import ParamModifier, with_parameters
from tdhook_like.attribution.lrp.rules.as_is import single_input
from tdhook_like.attribution.lrp.rules.layers import Change, LayerRun, WeightRule, known_nonnegative
from tdhook_like.attribution.lrp.rules.parameters import ZeroParams, refuse_nonfinite, running_again
from tdhook_like.attribution.lrp.rules.rule import Inputs
from tdhook_like.attribution.lrp.rules.stabilizer import Stabilizing, ratio_by
from tdhook_like.errors import RuleError
from tdhook_like.hooks.scratch import borrowed
from tdhook_like.hooks.surrogate import constant, unit

__all__ = [
    "AlphaBetaRule",
    "FlatRule",
    "GammaRule",
    "ModifiedRule",
    "WSquareRule",
    "ZBoxRule",
    "ZPlusRule",
]


class ModifiedRule(WeightRule):
    """The epsilon rule read through modified parameters.

    ``R_i = x_i Σ_j w′_ij R_j / st(z′_j)`` with ``z′ = f(x; w′, b′)``.

    Args:
        modifier: What becomes of the parameters.
        stabilizer: Added to the size of every denominator, in units of the output; or a
            :class:`Stabilizer`.
        zero_params: Names of the parameters that are read as zeros.

    >>> rule = ModifiedRule(ParamModifier(lambda name, p: p.clamp(min=0)))
    """

    fresh = True
    feeds_zeros = False

    def __init__(
        self,
        modifier: ParamModifier,
        stabilizer: Stabilizing = 1e-6,
        *,
        zero_params: ZeroParams = (),
    ) -> None:
        super().__init__(stabilizer, zero_params=zero_params)
        if not isinstance(modifier, ParamModifier):
            raise RuleError(f"ModifiedRule needs a ParamModifier, got {modifier!r}.")
        self.modifier = modifier

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        single_input(self, module, inputs)
        if self.check(module) or not isinstance(output, Tensor):
            return super().surrogate(module, inputs, output)  # which says why not
        changed = self.modifier(module)
        for name in self.zero_params:
            if name in changed:
                changed[name] = torch.zeros_like(changed[name])
        refuse_nonfinite(self, module, changed)
        with running_again(module):
            z = with_parameters(module, changed).forward(*inputs, **inputs.kwargs)
        return z * ratio_by(self.stabilizer, output, z, module)


class AlphaBetaRule(WeightRule):
    """Positive contributions weigh α, negative ones β, with α − β = 1.

    ``p = f(x⁺; w⁺, b⁺) + f(x⁻; w⁻, 0)``, ``n = f(x⁺; w⁻, b⁻) + f(x⁻; w⁺, 0)``; surrogate
    ``α·p·G(y/st(p)) − β·n·G(y/st(n))``. Conserves what biases do not absorb.

    Source: Bach et al. 2015, eq. 60.

    Args:
        alpha: Weight of positive contributions, at least 1.
        beta: Weight of negative contributions, at least 0; ``alpha - beta`` must be 1.
        stabilizer: Added to the size of every denominator, in units of the output; or a
            :class:`Stabilizer`.
        zero_params: Names of the parameters that are read as zeros.

    Raises:
        RuleError: If a weight is negative or their difference is not 1.

    >>> AlphaBetaRule(alpha=2.0, beta=1.0)
    AlphaBetaRule(stabilizer=1e-06, alpha=2.0, beta=1.0)
    """

    fresh = True
    feeds_zeros = False

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 1.0,
        stabilizer: Stabilizing = 1e-6,
        *,
        zero_params: ZeroParams = (),
    ) -> None:
        super().__init__(stabilizer, zero_params=zero_params)
        name = type(self).__name__
        if not (isinstance(alpha, int | float) and isinstance(beta, int | float)):
            raise RuleError(f"{name}: alpha and beta must be numbers, got {alpha!r} and {beta!r}.")
        if alpha < 0 or beta < 0 or not abs(alpha - beta - 1) < 1e-9:
            raise RuleError(
                f"{name}: alpha and beta must not be negative and alpha - beta must be 1, "
                f"got {alpha} and {beta}."
            )
        self.alpha, self.beta = float(alpha), float(beta)

    def share(self, run: LayerRun, x: Tensor, y: Tensor) -> Tensor:
        up, down = _by_sign(x)
        p = _contributions(run, up, down, _positive, _negative)
        if self.beta == 0:
            return run.scaled(p, y)
        n = _contributions(run, up, down, _negative, _positive)
        return p * (self.alpha * run.ratio(y, p)) - n * (self.beta * run.ratio(y, n))


class ZPlusRule(AlphaBetaRule):
    """Positive contributions only: alpha-beta with α = 1, β = 0.

    Source: Montavon et al. 2017, eq. 13 (z⁺), for inputs of any sign.

    Args:
        stabilizer: Added to the size of every denominator, in units of the output; or a
            :class:`Stabilizer`.
        zero_params: Names of the parameters that are read as zeros.

    >>> ZPlusRule()
    ZPlusRule(stabilizer=1e-06)
    """

    def __init__(self, stabilizer: Stabilizing = 1e-6, *, zero_params: ZeroParams = ()) -> None:
        super().__init__(1.0, 0.0, stabilizer, zero_params=zero_params)

    def __repr__(self) -> str:
        zeros = f", zero_params={self.zero_params!r}" if self.zero_params else ""
        return f"ZPlusRule(stabilizer={self.stabilizer!r}{zeros})"


class GammaRule(WeightRule):
    """Favours contributions of the output's own sign by a factor 1 + γ.

    Where ``y > 0``: shares by ``p = f(x⁺; w+γw⁺, b+γb⁺) + f(x⁻; w+γw⁻, 0)``; where ``y < 0``: by
    ``n = f(x⁺; w+γw⁻, b+γb⁻) + f(x⁻; w+γw⁺, 0)``; where ``y = 0`` nothing arrives.

    Source: Montavon et al. 2019, section 10.2.2; Andéol et al. 2021 for inputs of any sign.

    Args:
        gamma: How much the favoured contributions gain, at least 0.
        stabilizer: Added to the size of every denominator, in units of the output; or a
            :class:`Stabilizer`.
        zero_params: Names of the parameters that are read as zeros.

    Raises:
        RuleError: If gamma is negative.

    >>> GammaRule(gamma=0.25)
    GammaRule(stabilizer=1e-06, gamma=0.25)
    """

    fresh = True
    feeds_zeros = False

    def __init__(
        self,
        gamma: float = 0.25,
        stabilizer: Stabilizing = 1e-6,
        *,
        zero_params: ZeroParams = (),
    ) -> None:
        super().__init__(stabilizer, zero_params=zero_params)
        if not isinstance(gamma, int | float) or not 0 <= gamma < float("inf"):
            raise RuleError(
                f"GammaRule: gamma must be a finite number of at least 0, got {gamma!r}."
            )
        self.gamma = float(gamma)

    def share(self, run: LayerRun, x: Tensor, y: Tensor) -> Tensor:
        # With the positive contributions q and all of them z, the negative ones are z - q. So
        # p = z + γq and n = z + γ(z - q), where nothing cancels: z > 0 in the one, z < 0 in the other.
        z = run(x, _same, _same) if self.zero_params else y
        q = _contributions(run, *_by_sign(x), _positive, _negative)
        all_of, positive = constant(z), constant(q)
        p, n = all_of + self.gamma * positive, all_of + self.gamma * (all_of - positive)
        sign = constant(y)
        wins = torch.where(sign > 0, run.ratio(y, p), 0.0)
        loses = torch.where(sign < 0, run.ratio(y, n), 0.0)
        return z * (wins + (1 + self.gamma) * loses) + q * (self.gamma * (wins - loses))


class ZBoxRule(WeightRule):
    """For inputs within known bounds, such as pixels: shares by distance to the bounds.

    Scaled ``z′ = f(x; w, b) − f(l·u; w⁺, b⁺) − f(h·u; w⁻, b⁻)``, with u ones.

    Source: Montavon et al. 2017, eq. 15 (zᴮ).

    Args:
        low: The least value of an input: a number, or a tensor that broadcasts to the input. On a
            convolution a tensor [C] is one bound per channel, as [C, 1, 1] would be.
        high: The largest value, likewise.
        stabilizer: Added to the size of every denominator, in units of the output; or a
            :class:`Stabilizer`.
        zero_params: Names of the parameters that are read as zeros.

    Raises:
        RuleError: If ``low`` is anywhere above ``high``, or a bound is not finite; at the call, if
            the bounds do not fit the input.

    >>> ZBoxRule(0.0, 1.0)
    ZBoxRule(stabilizer=1e-06, low=0.0, high=1.0)
    """

    fresh = True
    feeds_zeros = True

    def __init__(
        self,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        stabilizer: Stabilizing = 1e-6,
        *,
        zero_params: ZeroParams = (),
    ) -> None:
        super().__init__(stabilizer, zero_params=zero_params)
        try:
            below, above = torch.as_tensor(low), torch.as_tensor(high)
            ordered = bool((below <= above).all())
            known = bool(below.isfinite().all() and above.isfinite().all())
        except (RuntimeError, TypeError, ValueError):
            raise RuleError(
                f"ZBoxRule: low and high do not go together: {low!r}, {high!r}."
            ) from None
        if not ordered or not known:
            raise RuleError(
                "ZBoxRule: low must not be above high, and both must be finite, "
                f"got {low!r} and {high!r}."
            )
        self.low, self.high = low, high

    def share(self, run: LayerRun, x: Tensor, y: Tensor) -> Tensor:
        ones = unit(x)
        low, high = (self._bound(bound, x, run.module) * ones for bound in (self.low, self.high))
        z = run(x, _same, _same) - run(low, _positive, _positive) - run(high, _negative, _negative)
        return run.scaled(z, y)

    def _bound(self, bound: float | Tensor, x: Tensor, module: nn.Module) -> float | Tensor:
        if not isinstance(bound, Tensor):
            return bound
        try:
            if isinstance(module, _ConvNd) and bound.dim() == 1:
                fitting = bound.reshape(-1, *(1 for _ in module.kernel_size))
            else:
                fitting = bound
            return fitting.to(x).expand(x.shape)
        except RuntimeError:
            per = (
                f", one per channel ([{module.in_channels}])" if isinstance(module, _ConvNd) else ""
            )
            raise RuleError(
                f"{type(self).__name__} on {type(module).__name__}: the bounds do not broadcast to an "
                f"input of shape {tuple(x.shape)}, one has shape {tuple(bound.shape)}. Give a number"
                f"{per} or a tensor of the shape of one sample."
            ) from None


class WSquareRule(WeightRule):
    """Shares by squared weights, regardless of the input: for layers on unbounded inputs.

    Scaled ``z′ = f(u; w², 0)`` with u ones, or ``f(u; w², b²)``. Zero padding takes no part; where
    padding repeats inputs, these collect the shares of their copies.

    Source: Montavon et al. 2017, eq. 12 (w²).

    Args:
        stabilizer: Added to the size of every denominator, in units of the output; or a
            :class:`Stabilizer`.
        with_bias: Whether the bias takes part by its square, and absorbs its share.
        zero_params: Names of the parameters that are read as zeros.

    >>> WSquareRule(), WSquareRule(with_bias=True)
    (WSquareRule(stabilizer=1e-06), WSquareRule(stabilizer=1e-06, with_bias=True))
    """

    fresh = True
    feeds_zeros = True
    #: Whether the bias takes part.
    with_bias: bool = False

    def __init__(
        self,
        stabilizer: Stabilizing = 1e-6,
        *,
        with_bias: bool = False,
        zero_params: ZeroParams = (),
    ) -> None:
        super().__init__(stabilizer, zero_params=zero_params)
        if not isinstance(with_bias, bool):
            raise RuleError(f"WSquareRule: with_bias must be True or False, got {with_bias!r}.")
        if with_bias:  # else it does not show
            self.with_bias = True

    def share(self, run: LayerRun, x: Tensor, y: Tensor) -> Tensor:
        bias = torch.square if self.with_bias else None
        return run.scaled(run(unit(x), torch.square, bias), y)


class FlatRule(WeightRule):
    """Shares evenly over the inputs that an output reads, regardless of input and weights.

    Scaled ``z′ = f(u; 1, 0)`` with u ones. Zero padding takes no part; where padding repeats inputs,
    these collect the shares of their copies.

    Source: Lapuschkin et al. 2019, methods section "flat".

    Args:
        stabilizer: Added to the size of every denominator, in units of the output; or a
            :class:`Stabilizer`.
        zero_params: Names of the parameters that are read as zeros.

    >>> FlatRule()
    FlatRule(stabilizer=1e-06)
    """

    fresh = True
    feeds_zeros = True

    def share(self, run: LayerRun, x: Tensor, y: Tensor) -> Tensor:
        return run.scaled(run(unit(x), torch.ones_like, None), y)


def _by_sign(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Positive and negative part; None for the latter where it is known to be nothing."""
    return (x, None) if known_nonnegative(x) else (x.clamp(min=0), x.clamp(max=0))


def _contributions(
    run: LayerRun, up: Tensor, down: Tensor | None, of_up: Change, of_down: Change
) -> Tensor:
    """Contributions of one sign: of the positive inputs and bias, and of the negative inputs."""
    found = run(up, of_up, of_up)
    return found if down is None else found + run(down, of_down, None)


def _positive(t: Tensor) -> Tensor:
    place = None if t.requires_grad else borrowed(t)
    return t.clamp(min=0) if place is None else torch.clamp(t, min=0, out=place)


def _negative(t: Tensor) -> Tensor:
    place = None if t.requires_grad else borrowed(t)
    return t.clamp(max=0) if place is None else torch.clamp(t, max=0, out=place)


def _same(t: Tensor) -> Tensor:
    return t
