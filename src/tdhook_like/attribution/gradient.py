"""Methods of one gradient: saliency, input × gradient, and LRP, which is the latter under rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tdhook_like.attribution.lrp.mappers import EpsilonPlus
from tdhook_like.attribution.lrp.rule import RuleMapper
from tdhook_like.attribution.method import GradientMethod, Targets
from tdhook_like.errors import RuleError
from tdhook_like.hooks.surrogate import nonzero
from tdhook_like.score import joined

__all__ = ["LRP", "InputXGradient", "Saliency"]


@dataclass(frozen=True)
class Saliency(GradientMethod):
    """The gradient of the target with respect to the inputs, in size or with its sign.

    Source: Simonyan et al. 2014.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        abs: Whether to give the size of the gradient; its signed value if False.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, -3.0)
    >>> with Saliency("y", abs=False).prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.ones(1, 2)}, [1]))
    >>> td["attr", "x"]
    tensor([[-3., -3.]])
    """

    abs: bool = field(default=True, kw_only=True)

    def combine(self, value: Tensor, gradient: Tensor) -> Tensor:
        """The gradient, or its size."""
        return gradient.abs() if self.abs else gradient


@dataclass(frozen=True)
class InputXGradient(GradientMethod):
    """Input times gradient: exact for a linear model, a first-order estimate otherwise.

    Source: Shrikumar et al. 2016.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, -3.0)
    >>> with InputXGradient("y").prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[1.0, 2.0]])}, [1]))
    >>> td["attr", "x"]
    tensor([[-3., -6.]])
    """

    def combine(self, value: Tensor, gradient: Tensor) -> Tensor:
        """Their product."""
        return value * gradient


@dataclass(frozen=True, init=False)
class LRP(GradientMethod):
    """Layer-wise relevance propagation: relevance flows back through every module by its rule.

    Where no rule is given, the module's own gradient is followed, which is right for everything
    linear: functional sums, slices, concatenations and scalings need nothing.

    Source: Bach et al. 2015; how rules become gradients is told in ``hooks/surrogate.py``.

    Args:
        rule_mapper: ``(name, module) -> Rule | None``; :class:`EpsilonPlus` if None.
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        start: The relevance that is propagated: ``"value"`` for the target's value, ``"one"``, or a
            tensor that broadcasts to the scores ``[*B, n_targets]``.

    Raises:
        RuleError: If ``start`` is none of these, or the mapper is not callable.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> with LRP(EpsilonPlus(), target="y").prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.randn(4, 2)}, [4]))
    >>> td["attr", "x"].shape
    torch.Size([4, 2])
    """

    rule_mapper: RuleMapper | None = None
    start: str | Tensor = field(default="value", kw_only=True)

    def __init__(
        self,
        rule_mapper: RuleMapper | None = None,
        target: Targets = None,
        *,
        start: str | Tensor = "value",
        **options: Any,
    ) -> None:
        mapper = EpsilonPlus() if rule_mapper is None else rule_mapper
        if not callable(mapper):
            raise RuleError(f"LRP: rule_mapper must be callable (name, module), got {mapper!r}.")
        if not (start in ("value", "one") if isinstance(start, str) else isinstance(start, Tensor)):
            raise RuleError(f"LRP: start must be 'value', 'one' or a tensor, got {start!r}.")
        if isinstance(start, Tensor) and not (start.is_meta or torch.isfinite(start).all()):
            raise RuleError("LRP: start holds NaN or Inf.")
        self._settle("rule_mapper", mapper)
        self._settle("start", start)
        GradientMethod.__init__(self, target, rules=mapper, **options)

    @property
    def feeds_zeros(self) -> bool:
        """Whether the start gives relevance to scores that are exactly zero."""
        return not isinstance(self.start, str) or self.start != "value"

    def combine(self, value: Tensor, gradient: Tensor) -> Tensor:
        """Activation times relevance per unit of activation, zeros standing for a tiny value."""
        return nonzero(value) * gradient

    def weigh(self, parts: Sequence[Tensor]) -> Tensor | None:
        """The start, per unit of the score."""
        if isinstance(self.start, str) and self.start == "value":
            return None
        scores = joined(parts)
        if isinstance(self.start, str):
            return 1 / nonzero(scores)
        try:
            start = self.start.to(scores).expand(scores.shape)
        except RuntimeError:
            raise RuleError(
                f"LRP: start of shape {tuple(self.start.shape)} does not broadcast to the scores' "
                f"{tuple(scores.shape)} (batch dimensions, then targets)."
            ) from None
        return start / nonzero(scores)
