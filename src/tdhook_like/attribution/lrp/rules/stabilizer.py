"""Stabilisers: what keeps a rule's denominator away from zero.

A number ``ε`` wherever a rule takes one means ``z + ε·sign(z)``, as in the papers. The objects here
stand in its place where that is not what is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tdhook_like.errors import RuleError
from tdhook_like.hooks.scratch import borrowed, spare
from tdhook_like.hooks.surrogate import (
    constant,
    finite,
    nonzero,
    quotient,
    ratio,
    stabilised,
    tiny,
)

__all__ = [
    "ClippedStabilizer",
    "RelativeStabilizer",
    "Stabilizer",
    "Stabilizing",
    "checked",
    "own_ratio",
    "positive",
    "ratio_by",
    "sample_dims",
]


@dataclass(frozen=True)
class Stabilizer:
    """``z + ε·sign(z)`` with ``sign(0) = +1``: the same as giving the number ε itself.

    Subclass it and override :meth:`__call__` for a stabiliser of your own.

    Source: Bach et al. 2015, eq. 58.

    Args:
        epsilon: Added to the size of every denominator, in the denominator's units.

    Raises:
        RuleError: If epsilon is not a finite number above zero.

    >>> Stabilizer(0.5)(torch.tensor([0.0, -1.0]))
    tensor([ 0.5000, -1.5000])
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", positive("epsilon", self.epsilon, type(self).__name__))

    def __call__(self, z: Tensor, dims: int = 1) -> Tensor:
        """What to divide by in the place of ``z``: a constant of the same shape, never zero.

        Args:
            z: The denominator; any shape.
            dims: How many of its last dimensions belong to one sample; those before are batches.
        """
        return stabilised(z, self.epsilon)


@dataclass(frozen=True)
class ClippedStabilizer(Stabilizer):
    """``sign(z) · max(|z|, ε)``: leaves alone what is not small, and so absorbs nothing of it.

    Args:
        epsilon: The least size of a denominator, in the denominator's units.

    >>> ClippedStabilizer(0.5)(torch.tensor([0.0, -1.0, 0.25]))
    tensor([ 0.5000, -1.0000,  0.5000])
    """

    def __call__(self, z: Tensor, dims: int = 1) -> Tensor:
        """``z``, pushed out of the interval from -ε to ε."""
        z = constant(z)
        least = max(self.epsilon, 1e-3) if z.dtype == torch.float16 else self.epsilon
        return torch.where(z < 0, z.clamp(max=-least), z.clamp(min=least))


@dataclass(frozen=True)
class RelativeStabilizer(Stabilizer):
    """``z + ε·rms(z)·sign(z)``: ε as a share of what is usual in the sample, of whatever scale.

    The root mean square is taken within each sample: over channels and positions where the module is
    a convolution or pools, over the last dimension elsewhere. A sample whose denominators are all
    zero is divided by ε itself.

    Args:
        epsilon: Share of the root mean square that is added; a pure number.
        dims: How many of the last dimensions make one sample, where that is not right.

    Raises:
        RuleError: If epsilon is not a finite number above zero, or dims not a whole one.

    >>> RelativeStabilizer(0.1)(torch.tensor([[3.0, -3.0], [0.0, 0.0]]))
    tensor([[ 3.3000, -3.3000],
            [ 0.1000,  0.1000]])
    """

    dims: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims is not None and (type(self.dims) is not int or self.dims < 1):
            raise RuleError(
                f"RelativeStabilizer: dims must be a whole number above 0 or None, got {self.dims!r}."
            )

    def __call__(self, z: Tensor, dims: int = 1) -> Tensor:
        """``z`` and ε times the root mean square of its last ``dims`` dimensions."""
        z = constant(z)
        over = tuple(range(-min(self.dims or dims, z.dim()), 0))
        count = torch.Size(z.shape[i] for i in over).numel()
        wide = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        # The norm, and not the root of a mean: its slope at zero is zero, that of a root is infinite.
        usual = torch.linalg.vector_norm(wide, dim=over, keepdim=True) / max(count, 1) ** 0.5
        usual = torch.where(usual == 0, 1.0, usual)
        size = (self.epsilon * usual).clamp(min=tiny(z.dtype)).to(z.dtype)
        return torch.where(z < 0, z - size, z + size)


Stabilizing = float | Stabilizer
"""What rules take for a stabiliser: a number means ``z + ε·sign(z)``."""


def positive(name: str, value: float, rule: str) -> float:
    """``value`` as a float, or a :class:`RuleError` where it is not a finite number above zero.

    >>> positive("epsilon", 1, "EpsilonRule")
    1.0
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < float("inf")
    ):
        raise RuleError(f"{rule}: {name} must be a finite number above 0, got {value!r}.")
    return float(value)


def checked(name: str, value: Stabilizing, rule: str) -> Stabilizing:
    """A stabiliser as given, a number as a float, or a :class:`RuleError`.

    >>> checked("epsilon", 1, "EpsilonRule"), checked("epsilon", Stabilizer(1), "EpsilonRule")
    (1.0, Stabilizer(epsilon=1.0))
    """
    return value if isinstance(value, Stabilizer) else positive(name, value, rule)


def ratio_by(stabilizer: Stabilizing, y: Tensor, z: Tensor, module: nn.Module) -> Tensor:
    """``nonzero(y) / st(z)`` of what ``module`` gave, by a number or an object. No graph.

    >>> ratio_by(1e-6, torch.tensor([2.0]), torch.tensor([4.0]), nn.Identity())
    tensor([0.5000])
    """
    if not isinstance(stabilizer, Stabilizer):
        return ratio(y, z, stabilizer)
    return quotient(nonzero(y), stabilizer(z, sample_dims(module)))


def own_ratio(stabilizer: Stabilizing, y: Tensor, module: nn.Module) -> Tensor:
    """``y / st(y)``, which does not depend on y's sign. No graph; same shape.

    >>> own_ratio(1.0, torch.tensor([3.0, -1.0]), nn.Identity())
    tensor([0.7500, 0.5000])
    """
    most = torch.finfo(y.dtype).max
    if not isinstance(stabilizer, Stabilizer):
        y = constant(y)
        place = None if y.requires_grad else borrowed(y)
        if place is not None:
            size = torch.abs(y, out=place).clamp_(tiny(y.dtype), most)
            with spare(y) as sum_:
                return finite(size.div_(torch.add(size, stabilizer, out=sum_)))
        size = y.abs().clamp(tiny(y.dtype), most)
        return quotient(size, size + stabilizer)
    filled = nonzero(y).clamp(-most, most)
    return quotient(filled, stabilizer(filled, sample_dims(module)))


_POOLS = (
    (nn.AvgPool1d, nn.LPPool1d, nn.AdaptiveAvgPool1d, nn.MaxPool1d, nn.AdaptiveMaxPool1d),
    (nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d),
    (nn.AvgPool3d, nn.LPPool3d, nn.AdaptiveAvgPool3d, nn.MaxPool3d, nn.AdaptiveMaxPool3d),
)


def sample_dims(module: nn.Module) -> int:
    """How many of the last dimensions of a module's output make one sample.

    >>> sample_dims(nn.Conv2d(1, 1, 1)), sample_dims(nn.AvgPool1d(2)), sample_dims(nn.Linear(1, 1))
    (3, 2, 1)
    """
    if isinstance(module, _ConvNd):
        return len(module.kernel_size) + 1
    found = (dims for dims, kinds in enumerate(_POOLS, 2) if isinstance(module, kinds))
    return next(found, 1)
