"""Sums, means and contrasts of several methods' attributions of one model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

from tensordict.utils import NestedKey
from torch import nn

from tdhook_like.attribution.method import Method
from tdhook_like.errors import ContextError, InputError, TargetError, listed
from tdhook_like.targets import as_targets

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = ["AttributionContrast", "AttributionMean", "AttributionSum"]


@dataclass(frozen=True, init=False)
class AttributionSum(Method):
    """The weighted sum of several methods' attributions, each with its own rules and target.

    Every method is asked for itself, with all of its options but the roots. Standard errors add up as
    those of independent draws; the completeness gap is the sum of all gaps, where every method has one.

    Args:
        methods: What is added up. Targets are theirs; where they are named, all have the same names.
        weights: What each one counts; 1 if None.
        options: Roots and keys, as for :class:`Method`.

    Raises:
        ContextError: If there is no method, or one that attributes submodules or keeps a graph.
        TargetError: If the targets' names differ.
        InputError: If weights are not as many finite numbers.

    >>> import torch
    >>> from tensordict import TensorDict
    >>> from tdhook_like import InputXGradient
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = torch.nn.init.eye_(net.weight)
    >>> both = AttributionSum(InputXGradient(("y", 0)), InputXGradient(("y", 1)), weights=[1.0, 10.0])
    >>> with both.prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[2.0, 3.0]])}, [1]))
    >>> td["attr", "x"]
    tensor([[ 2., 30.]])
    """

    methods: tuple[Method, ...] = field(kw_only=True)
    weights: tuple[float, ...] = field(kw_only=True)

    single_pass: ClassVar[bool] = False

    def __init__(
        self, *methods: Method, weights: Sequence[float] | None = None, **options: Any
    ) -> None:
        given = options.pop("methods", methods)  # by name where an instance is replaced
        wrong = [method for method in given if not isinstance(method, Method)]
        if not given or wrong:
            raise ContextError(f"{type(self).__name__} takes methods, got {list(given)!r}.")
        weights = self.usual(len(given)) if weights is None else tuple(weights)
        if len(weights) != len(given) or not all(isfinite(weight) for weight in weights):
            raise InputError(
                f"weights={weights!r}: give one finite number for each of {len(given)}."
            )
        flat = [
            (one, weight * share)
            for method, weight in zip(given, weights, strict=True)
            for one, share in _parts(method)
        ]
        self._settle("methods", tuple(method for method, _ in flat))
        self._settle("weights", tuple(weight for _, weight in flat))
        first = self.methods[0]
        if "keys" not in options and any(method.keys != first.keys for method in self.methods):
            raise ContextError(
                f"{type(self).__name__}: the methods attribute different keys, "
                f"{listed(list(dict.fromkeys(method.keys for method in self.methods)))}. Name those of "
                "the result with keys=."
            )
        named = {f.name: f.default for f in fields(Method)}
        named.update(target=first.target, keys=first.keys, unreached=first.unreached)
        unknown = [name for name in options if name not in named]
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no argument {unknown[0]!r}.")
        for name, value in {**named, **options}.items():
            self._settle(name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Checks that what the methods write can be added up."""
        super().__post_init__()
        for method in (self, *self.methods):
            if method.at or method.activations or method.create_graph:
                raise ContextError(
                    f"{type(self).__name__} adds up attributions of keys: leave at=, activations= and "
                    f"create_graph= out of {type(method).__name__}."
                )
        names = [_names(method) for method in self.methods]
        if any(other != names[0] for other in names):
            raise TargetError(
                f"The methods' targets are named differently, so they cannot be added up: "
                f"{listed([sorted(map(str, each)) for each in names])}."
            )

    @staticmethod
    def usual(n: int) -> tuple[float, ...]:
        """What each of n methods counts if nothing is said."""
        return (1.0,) * n

    @property
    def complete(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every method promises a sum."""
        return all(method.complete for method in self.methods)

    @property
    def sampled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any method draws samples."""
        return any(method.sampled for method in self.methods)

    def parts(self) -> list[Method]:
        """The methods, writing to this one's roots."""
        found = []
        for method in self.methods:
            part = copy.copy(method)
            for name in ("root", "at_root", "activations_root", "gap_root", "error_root"):
                object.__setattr__(part, name, getattr(self, name))
            object.__setattr__(part, "keys", self.keys)
            found.append(part)
        return found

    def prepare(
        self,
        module: nn.Module,
        in_keys: Sequence[NestedKey] | Mapping[str, NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> HookContext:
        """Binds every method to a model; see :meth:`Method.prepare`."""
        from tdhook_like.combination import CombinedContext

        return CombinedContext(self, module, in_keys, out_keys)


@dataclass(frozen=True, init=False)
class AttributionMean(AttributionSum):
    """The mean of several methods' attributions.

    Args:
        methods: What the mean is taken of; see :class:`AttributionSum`.
        weights: What each one counts; 1 / n if None.
        options: Roots and keys, as for :class:`Method`.

    >>> from tdhook_like import InputXGradient, IntegratedGradients
    >>> AttributionMean(InputXGradient("y"), IntegratedGradients("y")).weights
    (0.5, 0.5)
    """

    @staticmethod
    def usual(n: int) -> tuple[float, ...]:
        """One share for each."""
        return (1.0 / n,) * n


@dataclass(frozen=True, init=False)
class AttributionContrast(AttributionSum):
    """The attributions of one method minus those of another: for this, and not for that.

    Of one linear method (InputXGradient, LRP, IntegratedGradients) for two targets it is that method
    for the targets' difference, which is cheaper: ``target=Contrast(a, b)``. It is something else
    where sizes, squares, rules or baselines differ.

    Args:
        methods: Two methods.
        options: Roots and keys, as for :class:`Method`.

    Raises:
        ContextError: If there are not two methods.

    >>> from tdhook_like import LRP
    >>> AttributionContrast(LRP(target=("logits", 0)), LRP(target=("logits", 1))).weights
    (1.0, -1.0)
    """

    @staticmethod
    def usual(n: int) -> tuple[float, ...]:
        """The first, and against it the second."""
        if n != 2:
            raise ContextError(f"A contrast is of two methods, got {n}.")
        return (1.0, -1.0)


def _parts(method: Method) -> list[tuple[Method, float]]:
    """A sum's methods and weights; or a method itself."""
    if isinstance(method, AttributionSum):
        return list(zip(method.methods, method.weights, strict=True))
    return [(method, 1.0)]


def _names(method: Method) -> set[str | None]:
    return {None} if method.target is None else set(as_targets(method.target))
