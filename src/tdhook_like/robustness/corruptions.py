"""Changes that no gradient leads: noise, or any function of the input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdhook_like.attribution.bounds import Box, clipped
from tdhook_like.attribution.noise import normal_rows
from tdhook_like.attribution.perturbation import check_seed
from tdhook_like.errors import InputError
from tdhook_like.robustness.change import Change
from tdhook_like.score import Score

__all__ = ["Corruption", "GaussianNoise"]


@dataclass(frozen=True)
class _Drawn(Change):
    """A change that knows nothing of the target."""

    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the seed."""
        super().__post_init__()
        check_seed(self.seed)

    def changed(
        self, score: Score, sizes: Sequence[Tensor], limits: Sequence[Box], n: int
    ) -> list[Tensor]:
        """The same change for all targets, where it may be of the same size."""
        draw = torch.Generator().manual_seed(self.seed)
        rows = [self.away(x, draw) for x in score.inputs]
        return [
            clipped(move(x.expand(n, *x.shape), size), box)
            for x, size, move, box in zip(score.inputs, sizes, rows, limits, strict=True)
        ]

    @abstractmethod
    def away(self, x: Tensor, draw: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
        """What changes inputs ``[n, *B, *F]`` by sizes that broadcast to them."""


@dataclass(frozen=True)
class GaussianNoise(_Drawn):
    """The input with noise on it, ``x + ε · n`` with standard normal n; the same n for every size.

    Args:
        target: What is looked at; see :class:`Change`, also for the keyword arguments.
        epsilon: The noise's standard deviation, for all keys or by key.
        seed: Of the generator that noise is drawn from, which is no other's.
        bounds: See :class:`Change`.
        goal: Whether a ``"lower"`` or a higher score (``"raise"``) is what is looked for.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.

    Raises:
        InputError: If ``epsilon`` is below 0, or inputs lie outside of bounds.
        KeyNotFoundError: If ``epsilon`` or ``bounds`` name a key that is not attributed.

    >>> GaussianNoise("y", epsilon={"x": 0.5}).epsilon
    {'x': 0.5}
    """

    def away(self, x: Tensor, draw: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
        """Adds noise."""
        noise = normal_rows([x], 1, draw)[0][0]
        return lambda points, size: points + size * noise


@dataclass(frozen=True)
class Corruption(_Drawn):
    """The input changed by a function of one's own.

    Args:
        target: What is looked at; see :class:`Change`, also for the keyword arguments.
        change: From inputs ``[n, *B, *F]`` of a key, and sizes that broadcast to them, to changed
            inputs of the same shape. At size 0 it shall change nothing, if how small a change may be
            is asked for. It draws from the generator that it is given, if at all.
        epsilon: The sizes, for all keys or by key; keys of size 0 are not given to it.
        seed: Of the generator.
        bounds: See :class:`Change`.
        goal: Whether a ``"lower"`` or a higher score (``"raise"``) is what is looked for.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.

    Raises:
        InputError: If ``change`` is no function or changes shapes, or inputs lie outside of bounds.
        KeyNotFoundError: If ``epsilon`` or ``bounds`` name a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> def dimmed(x, size, generator):
    ...     return x * (1 - size)
    >>> net = torch.nn.Linear(2, 1)
    >>> with Corruption("y", change=dimmed, epsilon=0.5).prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[1.0, 3.0]])}, [1]))
    >>> td["adversarial", "x"]
    tensor([[0.5000, 1.5000]])
    """

    change: Callable[[Tensor, Tensor, torch.Generator], Tensor] = field(kw_only=True)

    def __post_init__(self) -> None:
        """Checks that there is a function."""
        super().__post_init__()
        if not callable(self.change):
            raise InputError(
                f"change={self.change!r} must be a function of inputs, sizes, generator."
            )

    def away(self, x: Tensor, draw: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
        """Asks the function, where there is a size."""
        state = draw.initial_seed()

        def move(points: Tensor, size: Tensor) -> Tensor:
            if not bool((size != 0).any()):
                return points
            # The same draws for every size, so that sizes can be compared.
            own = torch.Generator().manual_seed(state)
            with torch.no_grad():
                found = self.change(points, size, own)
            if not isinstance(found, Tensor) or found.shape != points.shape:
                raise InputError(
                    f"change= gave {tuple(found.shape) if isinstance(found, Tensor) else found!r} for "
                    f"inputs of shape {tuple(points.shape)}: it has to keep their shape."
                )
            return found.to(points)

        return move
