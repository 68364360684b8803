"""The plan: which submodule of a given model gets which rule and why; and its hooks for one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook_like.attribution.lrp.batchnorm import BatchNormRule
from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.handlers import handlers
from tdhook_like.attribution.lrp.mappers.by_type import HOMOGENEOUS, LINEAR_OR_PICKING, ZERO_AT_ZERO
from tdhook_like.attribution.lrp.rules.as_is import IgnoreRule, PassRule, StopRule
from tdhook_like.attribution.lrp.rules.rule import Rule, RuleMapper, changes, registered
from tdhook_like.errors import RuleError, listed
from tdhook_like.hooks.installation import Before, Handler
from tdhook_like.paths import Walked, walk

__all__ = ["Planned", "RulePlan"]


class Planned(NamedTuple):
    """One line of a plan.

    Attributes:
        path: The submodule's path.
        module: The submodule.
        rule: Its rule.
        why: ``"by hand"``, or what the mapper's ``why`` says (``"by the mapper"`` where it has none);
            what it amounts to where that is a plain gradient.
        acts: Whether a hook is needed for it.
        exact_only: Whether the hook only matters for relevance at exact zeros, which the module's own
            gradient would lose.
    """

    path: str
    module: nn.Module
    rule: Rule
    why: str
    acts: bool
    exact_only: bool


class RulePlan:
    """Which rule every submodule of a model gets. Prints as a table.

    Args:
        model: The model.
        mapper: From path and submodule to a rule, or None. It is bound to the model first if it has a
            method ``bind(model)``, and its reasons are shown if it has one ``why(name, module)``.
        feeds_zeros: Whether relevance may start at scores that are exactly zero.
        walked: What :func:`walk` gave for the model, if that is known.

    Raises:
        RuleError: If the mapper is not callable, gives something else than a rule, or a rule that
            cannot sit on its module.

    >>> from tdhook_like.attribution.lrp import EpsilonPlus
    >>> print(RulePlan(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), EpsilonPlus()))
    path  type    rule                        why
    0     Linear  EpsilonRule(epsilon=1e-06)  type Linear
    1     ReLU    PassRule()                  type ReLU: its own gradient is this rule
    """

    def __init__(
        self,
        model: nn.Module,
        mapper: RuleMapper,
        feeds_zeros: bool = False,
        walked: Walked | None = None,
    ) -> None:
        if not callable(mapper) or isinstance(mapper, type | Rule):
            raise RuleError(
                f"The rule mapper must be a callable (name, module) -> Rule | None, got {mapper!r}. "
                "An instance is needed where it is a class; for one rule everywhere, "
                "give lambda name, module: rule if isinstance(module, ...) else None."
            )
        try:
            inspect.signature(mapper).bind("path", model)
        except TypeError as error:
            raise RuleError(
                f"The rule mapper {mapper!r} must take two arguments, (name, module): {error}."
            ) from None
        except ValueError:  # a callable without a signature to look at
            pass
        mapper = bound(mapper, model)
        why_of = getattr(mapper, "why", None) or (lambda path, module: "by the mapper")
        walked = list(walk(model)) if walked is None else walked
        every = [module for _, module, first in walked if first]
        found: dict[int, tuple[str, nn.Module, Rule, str]] = {}
        for path, module, _ in walked:
            if id(module) in found:
                continue
            rule, why = registered(module), "by hand"
            if rule is None:
                rule, why = mapper(path, module), None
            if rule is None:
                continue
            if not isinstance(rule, Rule):
                raise RuleError(
                    f"The mapper gave {rule!r} for module {path!r} ({type(module).__name__}): it must "
                    "give a Rule instance or None."
                )
            reason = rule.check(module)
            if reason:
                raise RuleError(
                    f"{rule!r} cannot sit on {path!r} ({type(module).__name__}): {reason}"
                )
            why = why_of(path, module) if why is None else why
            found[id(module)] = (path, module, rule, why)
        self.changes = changes()
        self._folds = any(
            isinstance(line[2], BatchNormRule) and line[2].fold for line in found.values()
        )
        #: Whether code runs that may call non-linear functions outside of every rule.
        self.calls_functions = any(id(m) not in found and not _transparent(m) for m in every)
        #: Whether a rule may let nothing pass.
        self.stops = any(isinstance(rule, StopRule) for _, _, rule, _ in found.values())
        exact = feeds_zeros or _feeds_zeros(every, {key: line[2] for key, line in found.items()})
        self._model = model
        self.lines = tuple(_planned(*item, exact=exact) for item in found.values())
        #: Whether an input that is exactly zero may be given relevance.
        self.reaches_zeros = (
            feeds_zeros
            or self.calls_functions
            or any(
                line.acts and (line.rule.feeds_zeros or isinstance(line.rule, PassRule))
                for line in self.lines
            )
        )

    def __str__(self) -> str:
        rows = [("path", "type", "rule", "why")]
        rows += [
            (p.path or "(root)", type(p.module).__name__, repr(p.rule), p.why) for p in self.lines
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        )

    def hooks(
        self, flow: Flow, of: Callable[[nn.Module], nn.Module]
    ) -> tuple[
        dict[int, tuple[nn.Module, Handler]], dict[int, tuple[nn.Module, Before]], list[nn.Module]
    ]:
        """Handlers for one call by identity, on the modules that ``of`` gives for the plan's.

        Args:
            flow: What the call's handlers share.
            of: From a module of the plan to the one that runs in its place.

        Returns:
            Handlers behind calls, handlers ahead of them, and the modules that have rules: what
            happens inside those is theirs to answer for.
        """
        self.begin(flow)
        after: dict[int, tuple[nn.Module, Handler]] = {}
        before: dict[int, tuple[nn.Module, Before]] = {}
        for line in self.lines:
            noted = flow.recorder is not None and isinstance(line.rule, IgnoreRule)
            if not line.acts and not noted:
                continue
            module = of(line.module)
            in_place = getattr(module, "inplace", False) is True
            ahead, behind = handlers(line.path, line.rule, flow, in_place=in_place)
            after[id(module)] = (module, behind)
            if ahead is not None:
                before[id(module)] = (module, ahead)
        if flow.mode is None:
            return after, before, []
        return after, before, [of(line.module) for line in self.lines]

    def begin(self, flow: Flow) -> None:
        """Has a call remember what layers gave, where a normalisation may be read as part of one."""
        if self._folds or flow.mode is not None:
            flow.layers = {}

    def check_reached(self, reached: set[str]) -> None:
        """Raises :class:`RuleError` where a rule's module was never called."""
        missed = [
            line
            for line in self.lines
            if line.acts and not line.exact_only and line.path not in reached
        ]
        if missed:
            # What merely stands in a list or a closure need not run: it may be there for its weights.
            registered = {id(module) for module in self._model.modules()}
            missed = [line for line in missed if id(line.module) in registered]
        if missed:
            raise RuleError(
                f"The rules of {listed(line.path for line in missed)} were never reached: the forward "
                "does not call these modules (it may use their weights directly, or skip them). "
                "Let the mapper give None for them, or pass unreached='ignore' to LRP."
            )


def bound(mapper: RuleMapper, model: nn.Module) -> RuleMapper:
    """The mapper that knows the model, where it wants to; else itself.

    >>> bound(print, nn.ReLU()) is print
    True
    """
    bind = getattr(mapper, "bind", None)
    return mapper if bind is None else bind(model)


def _transparent(module: nn.Module) -> bool:
    """Whether a module is known to do nothing but call others, or what is linear."""
    forward = type(module).forward
    if isinstance(module, TensorDictModule) and forward is TensorDictModule.forward:
        return isinstance(module.module, nn.Module)
    return any(forward is kind.forward for kind in _TRANSPARENT)


_TRANSPARENT = (
    *(nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.ReLU, nn.Dropout),
    *(nn.ModuleList, nn.ModuleDict, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding),
    TensorDictSequential,
)


def _feeds_zeros(every: list[nn.Module], rules: dict[int, Rule]) -> bool:
    """Whether some rule gives relevance to what a dead ReLU gives, going by the order of modules."""
    behind_zeros = False
    for module in every:
        rule = rules.get(id(module))
        if type(rule) is PassRule and not isinstance(module, HOMOGENEOUS + ZERO_AT_ZERO):
            # A batch norm (or a sigmoid) behind a convolution does not meet exact zeros.
            if behind_zeros:
                return True
        elif rule is not None and rule.feeds_zeros:
            return True
        if not module._modules and not isinstance(module, LINEAR_OR_PICKING):
            behind_zeros = isinstance(module, HOMOGENEOUS)
    return False


def _planned(path: str, module: nn.Module, rule: Rule, why: str, *, exact: bool) -> Planned:
    acts = not isinstance(rule, IgnoreRule)
    exact_only = type(rule) is PassRule and isinstance(module, HOMOGENEOUS)
    if exact_only and not exact:
        # Where no other rule gives relevance to zeros, the gradient passes all of it on.
        acts = False
    why = why if acts else f"{why}: its own gradient is this rule"
    return Planned(path, module, rule, why, acts, exact_only)
