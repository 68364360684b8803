"""Methods of one gradient: saliency, input × gradient, and LRP, which is the latter under rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tdhook_like.attribution.lrp.ledger.recorder import Ledger, Recorder
from tdhook_like.attribution.lrp.mappers.policies import PolicyMapper
from tdhook_like.attribution.lrp.rules.rule import RuleMapper
from tdhook_like.attribution.method import Attribution, GradientMethod, Targets
from tdhook_like.columns import joined
from tdhook_like.errors import RuleError, listed
from tdhook_like.hooks.surrogate import nonzero
from tdhook_like.score import Evaluation

__all__ = ["LRP", "InputXGradient", "Saliency"]

Start = str | Tensor
"""``"value"``, ``"one"`` or a tensor of relevances."""


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
        rule_mapper: ``(name, module) -> Rule | None``; :class:`PolicyMapper` if None.
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        start: The relevance that is propagated: ``"value"`` for the target's value, ``"one"``, or a
            tensor that broadcasts to the scores ``[*B, n_targets]``. Or a dict of these by the names
            of the targets, ``[*B]`` or ``[*B, n]`` each, ``"value"`` where none is given.
        ledger: Whether to take down where relevance went: True, or a number for an error wherever
            more than that share of the start is unaccounted for. Read it at ``hooked.ledger``.

    Raises:
        RuleError: If ``start`` is none of these, or the mapper is not callable.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> with LRP(target="y").prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.randn(4, 2)}, [4]))
    >>> td["attr", "x"].shape
    torch.Size([4, 2])
    """

    rule_mapper: RuleMapper | None = None
    # What the mapper is to every other method; where an option is replaced, it comes from the mapper.
    rules: RuleMapper | None = field(default=None, init=False)
    start: Start | Mapping[str, Start] = field(default="value", kw_only=True)
    ledger: bool | float = field(default=False, kw_only=True)

    def __init__(
        self,
        rule_mapper: RuleMapper | None = None,
        target: Targets = None,
        *,
        start: Start | Mapping[str, Start] = "value",
        ledger: bool | float = False,
        **options: Any,
    ) -> None:
        if "rules" in options:
            raise RuleError(f"LRP: its rules are rule_mapper; got rules={options['rules']!r}, too.")
        mapper = PolicyMapper() if rule_mapper is None else rule_mapper
        if not callable(mapper):
            raise RuleError(f"LRP: rule_mapper must be callable (name, module), got {mapper!r}.")
        if isinstance(start, Mapping):
            unknown = [
                name for name in start if not (isinstance(target, Mapping) and name in target)
            ]
            if unknown:
                raise RuleError(
                    f"LRP: start names {listed(unknown)}, but the targets are "
                    f"{listed(target) if isinstance(target, Mapping) else 'not named'}."
                )
        for given in start.values() if isinstance(start, Mapping) else (start,):
            _check_start(given)
        if not isinstance(ledger, bool) and not (isinstance(ledger, int | float) and ledger > 0):
            raise RuleError(f"LRP: ledger must be True, False or a tolerance, got {ledger!r}.")
        self._settle("rule_mapper", mapper)
        self._settle("start", start)
        self._settle("ledger", ledger)
        GradientMethod.__init__(self, target, rules=mapper, **options)

    def replaced(self, **changes: object) -> LRP:
        """The same method with some options changed; ``rules`` are its ``rule_mapper``."""
        if "rules" in changes:
            changes.setdefault("rule_mapper", changes.pop("rules"))
        return super().replaced(**changes)  # pyright: ignore[reportReturnType]

    @property
    def feeds_zeros(self) -> bool:
        """Whether the start gives relevance to scores that are exactly zero."""
        return not isinstance(self.start, str) or self.start != "value"

    def combine(self, value: Tensor, gradient: Tensor) -> Tensor:
        """Activation times relevance per unit of activation, zeros standing for a tiny value."""
        return nonzero(value) * gradient

    def combine_nonzero(self, value: Tensor, gradient: Tensor) -> Tensor:
        """Activation times relevance per unit of activation."""
        return value * gradient

    def weigh(self, parts: Sequence[Tensor]) -> Tensor | None:
        """The start, per unit of the score."""
        start = self.start
        if isinstance(start, Mapping):
            assert isinstance(self.target, Mapping)
            each = [
                _weight(start.get(name, "value"), part)
                for name, part in zip(self.target, parts, strict=True)
            ]
            found = [
                torch.ones_like(part) if weight is None else weight
                for weight, part in zip(each, parts, strict=True)
            ]
            return joined(found)
        return (
            None if isinstance(start, str) and start == "value" else _weight(start, joined(parts))
        )

    def balanced(
        self,
        evaluation: Evaluation,
        recorder: Recorder,
        grads: Sequence[Sequence[Tensor]],
        weight: Tensor | None,
        attribution: Attribution,
    ) -> Ledger:
        """What came in, what arrived, and what each rule absorbed."""
        scores = nonzero(joined(evaluation.parts)).detach()
        batch = scores.shape[:-1]
        arrived = scores.new_zeros(scores.shape)
        for columns in attribution.inputs:
            sums = [column.detach().reshape(*batch, -1).sum(-1) for column in columns]
            arrived = arrived + torch.stack(sums, -1)
        start = scores if weight is None else scores * weight.detach()
        ledger = recorder.close(grads, batch, start, arrived)
        if not isinstance(self.ledger, bool):
            ledger.check(self.ledger)
        return ledger


def _check_start(start: object) -> None:
    """Raises :class:`RuleError` where a start is none."""
    if not (start in ("value", "one") if isinstance(start, str) else isinstance(start, Tensor)):
        raise RuleError(f"LRP: start must be 'value', 'one' or a tensor, got {start!r}.")
    if isinstance(start, Tensor) and not (start.is_meta or torch.isfinite(start).all()):
        raise RuleError("LRP: start holds NaN or Inf.")


def _weight(start: Start, scores: Tensor) -> Tensor | None:
    """A start per unit of the scores ``[*B, n]``; None for one."""
    if isinstance(start, str):
        return None if start == "value" else 1 / nonzero(scores)
    try:
        given = start.to(scores)
        if given.ndim == scores.ndim - 1 and given.shape == scores.shape[:-1]:
            given = given.unsqueeze(-1)  # one number per batch element
        given = given.expand(scores.shape)
    except RuntimeError:
        raise RuleError(
            f"LRP: start of shape {tuple(start.shape)} does not broadcast to the scores' "
            f"{tuple(scores.shape)} (batch dimensions, then targets)."
        ) from None
    return given / nonzero(scores)
