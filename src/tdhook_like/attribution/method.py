"""What every method is: an immutable description of what to explain and how to write it down."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook_like.attribution.lrp.functions.lookup import FunctionRules
from tdhook_like.attribution.lrp.ledger.recorder import Ledger, Recorder
from tdhook_like.attribution.lrp.rules.rule import RuleMapper
from tdhook_like.errors import ContextError, PathError, RuleError, TargetError
from tdhook_like.gradients import gradients
from tdhook_like.keys import as_tuple, key_list, shortest
from tdhook_like.paths import Selector
from tdhook_like.runner import View
from tdhook_like.score import Evaluation, Score
from tdhook_like.targets import TargetSpec, as_targets

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = ["Attribution", "GradientMethod", "Method", "PathMethod"]

Targets = TargetSpec | Mapping[str, TargetSpec] | None


@dataclass
class Attribution:
    """What a method found, before it is written under keys.

    Attributes:
        inputs: For each attributed key, T tensors ``[*B, *features]`` (or one, stacked).
        modules: For each call of a chosen submodule, by its path, T tensors of its output's shape.
        gap: What completeness is missed by, ``[*B, T]``, where the method promises it.
        scale: The size that the gap is measured against, ``[*B, T]``.
        errors: Standard errors of ``inputs``, of the same shapes, where the method draws samples.
        ledger: Where relevance went, where that was asked for.
        unhandled: Names of functions that the method has no rule for, and how often they were met.
    """

    inputs: Sequence[Sequence[Tensor] | Tensor]
    modules: dict[str, Sequence[Sequence[Tensor] | Tensor]] = field(default_factory=dict)
    gap: Tensor | None = None
    scale: Tensor | None = None
    errors: Sequence[Sequence[Tensor] | Tensor] | None = None
    ledger: Ledger | None = None
    unhandled: Mapping[str, int] = field(default_factory=dict)
    outputs: View | None = None


def by_member(attribution: Attribution, members: Sequence[int], place: int) -> Attribution:
    """Attributions whose columns are an ensemble's members, with the members as dimensions.

    Args:
        attribution: With ``prod(members) × T`` columns, members first.
        members: The batch dimensions that the model adds.
        place: Where these dimensions go: 0 for in front.
    """
    n = math.prod(members)

    def grouped(columns: Sequence[Tensor] | Tensor) -> list[Tensor]:
        size = len(columns) // n
        each = [torch.stack([columns[m * size + t] for m in range(n)], place) for t in range(size)]
        return [stacked.unflatten(place, tuple(members)) for stacked in each]

    modules: dict[str, Sequence[Sequence[Tensor] | Tensor]] = {
        path: [grouped(c) for c in calls] for path, calls in attribution.modules.items()
    }
    found = Attribution([grouped(columns) for columns in attribution.inputs], modules)
    if attribution.gap is not None and attribution.scale is not None:
        gaps, scales = (grouped(t.unbind(-1)) for t in (attribution.gap, attribution.scale))
        found.gap, found.scale = torch.stack(gaps, -1), torch.stack(scales, -1)
    if attribution.errors is not None:
        found.errors = [grouped(columns) for columns in attribution.errors]
    return found


@dataclass(frozen=True)
class Method(ABC):  # noqa: B024 (its two kinds below say what is abstract)
    """Base of all methods: what is explained, of which keys, and where results go.

    ``prepare`` binds the description to a model; entering what it gives yields the hooked module::

        with Method(...).prepare(module) as hooked:
            td = hooked(td)

    Args:
        target: What is explained (see ``tdhook_like.targets``); the model's obvious target if None.
        keys: The in_keys that are attributed; all floating-point ones if None.
        at: Submodules (paths, globs, types) whose outputs are attributed too.
        activations: Submodules whose outputs are written down.
        root: Where attributions of keys go: ``(root, *in_key)``, or ``(root, name, *in_key)`` with
            named targets.
        at_root: Where attributions of submodules go, by path.
        activations_root: Where activations go, by path.
        gap_root: Where the completeness gap goes, for methods that promise completeness.
        error_root: Where standard errors go, for methods that draw samples: at
            ``(error_root, *in_key)``, as attributions do under ``root``.
        create_graph: Whether attributions stay differentiable.
        rules: A mapper of LRP rules under which gradients are taken.
        functions: Rules of operations that no module stands for; the mapper's, or the usual ones,
            if None.
        unreached: What happens to a rule whose module is never called: ``"raise"`` or ``"ignore"``.
        unhandled: What happens where a non-linear function has no rule and follows its gradient:
            ``"warn"`` (once for each function), ``"raise"`` or ``"ignore"``.
    """

    target: Targets = None
    keys: tuple[NestedKey, ...] | None = field(default=None, kw_only=True)
    at: tuple[Selector, ...] = field(default=(), kw_only=True)
    activations: tuple[Selector, ...] = field(default=(), kw_only=True)
    root: str = field(default="attr", kw_only=True)
    at_root: str = field(default="attr_at", kw_only=True)
    activations_root: str = field(default="activations", kw_only=True)
    gap_root: str = field(default="attr_gap", kw_only=True)
    error_root: str = field(default="attr_error", kw_only=True)
    create_graph: bool = field(default=False, kw_only=True)
    rules: RuleMapper | None = field(default=None, kw_only=True)
    functions: FunctionRules | None = field(default=None, kw_only=True)
    unreached: str = field(default="raise", kw_only=True)
    unhandled: str = field(default="warn", kw_only=True)

    #: Whether one differentiable run at the explained inputs is all that the method needs.
    single_pass: ClassVar[bool] = True
    #: Whether the method writes a completeness gap.
    complete: ClassVar[bool] = False
    #: Whether the method draws samples and writes the standard errors of what it estimates.
    sampled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Brings the options to one form and refuses what cannot be meant."""
        keys = self.keys
        if keys is not None:
            self._settle("keys", tuple(shortest(as_tuple(key)) for key in key_list(keys)))
        for name in ("at", "activations"):
            given = getattr(self, name)
            if not isinstance(given, str | type | Sequence):
                raise PathError(
                    f"{name}={given!r} chooses no submodule: give paths, globs or module types."
                )
            self._settle(name, (given,) if isinstance(given, str | type) else tuple(given))
        if self.target is not None:
            as_targets(self.target)
        roots = (
            self.root,
            self.at_root,
            self.activations_root,
            self.gap_root,
            self.error_root,
        )
        if len(set(roots)) < len(roots) or not all(isinstance(r, str) and r for r in roots):
            raise TargetError(f"Results need five different roots, each a string; got {roots}.")
        if self.unreached not in ("raise", "ignore"):
            raise ContextError(f"unreached must be 'raise' or 'ignore', got {self.unreached!r}.")
        if self.unhandled not in ("warn", "raise", "ignore"):
            raise ContextError(
                f"unhandled must be 'warn', 'raise' or 'ignore', got {self.unhandled!r}."
            )
        if self.functions is not None and not isinstance(self.functions, FunctionRules):
            raise RuleError(f"functions must be FunctionRules or None, got {self.functions!r}.")

    @property
    def writes_keys(self) -> bool:
        """Whether results go to keys, and not to submodules alone."""
        return True

    def _settle(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def prepare(
        self,
        module: nn.Module,
        in_keys: Sequence[NestedKey] | Mapping[str, NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> HookContext:
        """Binds the method to a model and checks everything that can be checked without data.

        Args:
            module: A TensorDictModule, or any ``nn.Module`` with ``in_keys`` and ``out_keys``.
            in_keys: For a plain module: the keys that its arguments are read from, a mapping for
                keyword arguments. For a TensorDictModule: the subset of its in_keys to attribute.
            out_keys: For a plain module: where its outputs go.

        Raises:
            TdhookLikeError: One of its subclasses, where a name does not exist, the target is
                ambiguous, a rule does not fit or the model cannot be explained.
        """
        from tdhook_like.context import HookContext

        return HookContext(self, module, in_keys, out_keys)

    def replaced(self, **changes: object) -> Method:
        """The same method with some options changed."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class GradientMethod(Method):
    """A method that combines an activation with the target's gradient, element by element."""

    @property
    def feeds_zeros(self) -> bool:
        """Whether scores that are exactly zero may start with relevance all the same."""
        return False

    @abstractmethod
    def combine(self, value: Tensor, gradient: Tensor) -> Tensor:
        """The attribution of ``value``, of its shape."""

    def combine_nonzero(self, value: Tensor, gradient: Tensor) -> Tensor:
        """The same where nothing can have been given to values that are exactly zero."""
        return self.combine(value, gradient)

    def weigh(self, parts: Sequence[Tensor]) -> Tensor | None:
        """What each score counts at the start of the backward pass, ``[*B, T]``; one if None.

        Args:
            parts: The scores, ``[*B, n]`` for each named target; T columns in all.
        """
        return None

    def attribute(self, evaluation: Evaluation) -> Attribution:
        """Attributions of the inputs, and of what flowed out of the chosen submodules."""
        values = [*evaluation.leaves, *evaluation.captured.flat()]
        recorder, twice = evaluation.recorder, evaluation.twice
        watched = [] if recorder is None else recorder.tensors()
        weight = self.weigh(evaluation.parts)
        if twice is not None:
            twice.relevance = True
        try:
            found = gradients(
                evaluation.parts,
                [*values, *watched],
                weight,
                create_graph=self.create_graph,
                stopped=evaluation.stopped,
                retain=recorder is not None,
            )
            if recorder is not None:
                self._tell_apart(evaluation.parts, recorder, watched, weight)
        finally:
            if twice is not None:
                twice.relevance = False
        if not self.create_graph:
            values = [value.detach() for value in values]
        combine = self.combine if evaluation.reaches_zeros else self.combine_nonzero
        combined = [[combine(value, grads[i]) for grads in found] for i, value in enumerate(values)]
        attribution = Attribution(combined[: len(evaluation.leaves)])
        if evaluation.captured.outputs:
            rest = iter(combined[len(evaluation.leaves) :])
            attribution.modules = {
                path: [next(rest) for _ in outputs]
                for path, outputs in evaluation.captured.outputs.items()
            }
        if recorder is not None:
            at = [grads[len(values) :] for grads in found]
            attribution.ledger = self.balanced(evaluation, recorder, at, weight, attribution)
        return attribution

    @staticmethod
    def _tell_apart(
        parts: Sequence[Tensor], recorder: Recorder, watched: list[Tensor], weight: Tensor | None
    ) -> None:
        """Further backward passes, that tell the ledger what belongs to which batch element."""
        tags = recorder.tags(parts)
        weights = [tag if weight is None else tag * weight.detach() for tag in tags]
        recorder.tagged([gradients(parts, watched, w, stopped=True, retain=True) for w in weights])

    def balanced(
        self,
        evaluation: Evaluation,
        recorder: Recorder,
        grads: Sequence[Sequence[Tensor]],
        weight: Tensor | None,
        attribution: Attribution,
    ) -> Ledger | None:
        """The ledger of what the recorder has taken down; only relevance has one."""
        return None


@dataclass(frozen=True)
class PathMethod(Method):
    """A method that asks for scores and gradients at points other than the explained inputs."""

    single_pass: ClassVar[bool] = False

    #: Whether the method itself attributes to submodules. If not, the score is explained anew for each
    #: of them, as a function of what the submodule gives, the model's inputs held as they are.
    own_at: ClassVar[bool] = False
    #: Whether one of the method's evaluations runs the model at the inputs, and it gives the outputs.
    runs_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """As for every method; second derivatives are refused."""
        super().__post_init__()
        if self.create_graph:
            raise ContextError(f"{type(self).__name__} does not build a graph of its attributions.")

    @abstractmethod
    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Attributions of the inputs ``score.inputs`` against baselines of the same shapes."""
