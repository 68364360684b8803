"""Sums without weights: pooling, and sums of several inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdhook_like.attribution.lrp.rules.as_is import single_input
from tdhook_like.attribution.lrp.rules.rule import Inputs, Rule
from tdhook_like.attribution.lrp.rules.stabilizer import Stabilizing, checked, ratio_by
from tdhook_like.errors import RuleError

__all__ = ["NormRule"]

_PICKS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_ADAPTIVE_PICKS = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)


class NormRule(Rule):
    """Shares by contribution to a sum: average, sum and Lp pooling, sums of several inputs.

    ``R_i = Σ_j x_i / st(Σ_k x_k) · R_j`` over the sums j that read input i: surrogate
    ``z · G(y / st(z))``, where z is the module's output if that is linear, and the mean of the window
    for Lp pooling (whose own gradient would share by ``x_i^p``). An operand through which no
    relevance flows on absorbs its share. Conserves what ε and such operands do not absorb.

    Source: Bach et al. 2015, section "Pooling and activations"; Montavon et al. 2018, section 5.1
    (sum pooling as a layer of equal weights).

    Args:
        stabilizer: Added to the size of every denominator, in units of the output (Lp pooling: of
            the input); or a :class:`Stabilizer`.

    Raises:
        RuleError: If the stabiliser is neither a finite number above zero nor a stabiliser.

    >>> NormRule()
    NormRule(stabilizer=1e-06)
    """

    feeds_zeros = False
    fresh = True

    def __init__(self, stabilizer: Stabilizing = 1e-6) -> None:
        self.stabilizer = checked("stabilizer", stabilizer, type(self).__name__)

    def check(self, module: nn.Module) -> str | None:
        if any(value is not None for value in module._parameters.values()):
            return "it is for sums without weights, and this has some. Use EpsilonRule."
        if isinstance(module, _PICKS + _ADAPTIVE_PICKS):
            return "it shares sums, and this picks one entry of each window. Use IgnoreRule."
        return None

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        reason = self.check(module)
        if reason or not isinstance(output, Tensor):
            reason = reason or f"it returns a {type(output).__name__}, not a tensor."
            raise RuleError(f"{self!r} cannot sit on {type(module).__name__}: {reason}")
        z = output
        if isinstance(module, nn.LPPool1d | nn.LPPool2d | nn.LPPool3d):
            z = _window_means(module, single_input(self, module, inputs))
        return z * ratio_by(self.stabilizer, output, z, module)


def _window_means(module: Any, x: Tensor) -> Tensor:
    kinds = ((nn.LPPool1d, F.avg_pool1d), (nn.LPPool2d, F.avg_pool2d), (nn.LPPool3d, F.avg_pool3d))
    pool = next(pool for kind, pool in kinds if isinstance(module, kind))
    means = pool(x, module.kernel_size, module.stride, 0, module.ceil_mode)
    return means if isinstance(means, Tensor) else torch.as_tensor(means)
