"""Gradients that are rectified on their way back: guided backpropagation and the deconvnet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from tdhook_like.attribution.lrp.mappers.gradients import DeconvnetMapper, GuidedBackpropMapper
from tdhook_like.attribution.method import GradientMethod
from tdhook_like.errors import RuleError

__all__ = ["Deconvolution", "GuidedBackprop"]


@dataclass(frozen=True)
class _Rectified(GradientMethod):
    """A gradient under a rule for ReLUs, written as it is."""

    functional: bool = field(default=False, kw_only=True)

    mapper: ClassVar[type[GuidedBackpropMapper] | type[DeconvnetMapper]]

    def __post_init__(self) -> None:
        """Puts the rule in place."""
        if self.rules is not None or self.functions is not None:
            raise RuleError(f"{type(self).__name__} is a rule of its own; leave rules= out.")
        self._settle("rules", self.mapper(functional=self.functional))
        self._settle("unreached", "ignore")  # a ReLU that is not called rectifies nothing
        super().__post_init__()

    def replaced(self, **changes: object) -> _Rectified:
        """The same method with some options changed."""
        return super().replaced(**{"rules": None, **changes})  # pyright: ignore[reportReturnType]

    def combine(self, value: Tensor, gradient: Tensor) -> Tensor:
        """The gradient that arrives."""
        return gradient


@dataclass(frozen=True)
class GuidedBackprop(_Rectified):
    """The gradient, passing a ReLU only where the ReLU's input and the gradient are positive.

    Exactly at ReLUs: modules and functions (``F.relu(x)``, ``x.relu_()``), each call of a module that
    is used twice; every other layer keeps its own gradient.

    Source: Springenberg et al. 2015, section 3.4.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        functional: Whether a model without a single ``nn.ReLU`` is one that calls ``relu()`` instead;
            else it is refused, as there the result would be the plain gradient.

    Raises:
        PathError: If the model has no ``nn.ReLU``, unless ``functional``.
        RuleError: If rules are given.

    >>> import torch
    >>> from tensordict import TensorDict
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.ReLU())
    >>> _ = torch.nn.init.constant_(net[0].weight, 2.0)
    >>> with GuidedBackprop({"one": ("y", 0)}).prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[1.0], [-1.0]])}, [2]))
    >>> td["attr", "one", "x"].flatten()
    tensor([2., 0.])
    """

    mapper: ClassVar = GuidedBackpropMapper


@dataclass(frozen=True)
class Deconvolution(_Rectified):
    """The gradient, passing a ReLU where the gradient is positive, whatever the ReLU's input was.

    At the same ReLUs as :class:`GuidedBackprop`.

    Source: Zeiler & Fergus 2014, section 2.1; as a gradient in Springenberg et al. 2015, figure 1.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        functional: As of :class:`GuidedBackprop`.

    Raises:
        PathError: If the model has no ``nn.ReLU``, unless ``functional``.
        RuleError: If rules are given.

    >>> Deconvolution("y").functional
    False
    """

    mapper: ClassVar = DeconvnetMapper
