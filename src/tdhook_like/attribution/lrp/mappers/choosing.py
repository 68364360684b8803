"""What a mapper of the library knows, and one mapper over another.

A mapper is any callable ``(name, module) -> Rule | None``, where None leaves the module to whoever
is asked next. Those here know two things more: ``bind(model)`` checks them against a model before
anything runs (a pattern that matches nothing is an error), and ``why(name, module)`` tells a plan
the reason of a choice.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tdhook_like.attribution.lrp.rules.as_is import IgnoreRule
from tdhook_like.attribution.lrp.rules.rule import Rule, RuleMapper
from tdhook_like.errors import PathError, RuleError, listed
from tdhook_like.paths import Walked, walk

if TYPE_CHECKING:
    from tdhook_like.attribution.lrp.functions.lookup import FunctionRules
    from tdhook_like.attribution.lrp.plan import RulePlan

__all__ = ["LayeredMapper", "Mapper", "Scope"]

Kind = type[nn.Module]


@dataclass(frozen=True)
class Scope:
    """A model, or the part of it that a mapper is asked about.

    Attributes:
        model: The whole model.
        walked: The part, as :func:`tdhook_like.paths.walk` gives it.
        whole: Whether that is all of it.
    """

    model: nn.Module
    walked: Walked
    whole: bool = True

    @classmethod
    def of(cls, model: nn.Module) -> Scope:
        """All of a model."""
        return cls(model, list(walk(model)))

    def part(self, inside: Callable[[str], bool]) -> Scope:
        """What lies at the paths for which ``inside`` says yes."""
        return replace(self, walked=[item for item in self.walked if inside(item[0])], whole=False)

    def matching(self, pattern: str, of: str) -> Scope:
        """What an exact path or a glob means.

        Raises:
            PathError: If that is nothing; ``of`` is named in the message.
        """
        found = self.part(lambda path: path == pattern or fnmatch.fnmatchcase(path, pattern))
        if found.walked:
            return found
        paths = [path for path, _, _ in self.walked if path]
        close = [path for path in paths if path.endswith(f".{pattern}")]
        close = close or difflib.get_close_matches(pattern, paths)
        guess = f"Did you mean {listed(close[:3])}? " if close else ""
        raise PathError(
            f"{of}: {pattern!r} matches no submodule. {guess}Paths here: {listed(paths)}."
        )


class Mapper:
    """Base of the library's mappers: a callable that knows models and gives reasons.

    Override :meth:`__call__`; :meth:`within` to look at the model first; :meth:`why`.

    >>> class Everywhere(Mapper):
    ...     def __call__(self, name, module):
    ...         return IgnoreRule()
    >>> print(Everywhere().plan(nn.Tanh()))
    path    type  rule          why
    (root)  Tanh  IgnoreRule()  by the mapper: its own gradient is this rule
    """

    #: Rules of functions that are called without a module; None for the default ones.
    functions: FunctionRules | None = None

    def __call__(self, name: str, module: nn.Module) -> Rule | None:
        """The rule of the submodule ``module`` at path ``name``, or None for no opinion."""
        raise RuleError(f"{type(self).__name__} must override __call__(name, module).")

    def bind(self, model: nn.Module) -> Mapper:
        """The mapper that knows ``model``: patterns checked against it, positions found in it.

        Raises:
            PathError: If a path, pattern, type or position of the mapper matches nothing there.
        """
        return self.within(Scope.of(model))

    def within(self, scope: Scope) -> Mapper:
        """As :meth:`bind`, for a part of a model."""
        return self

    def why(self, name: str, module: nn.Module) -> str:
        """Why the module gets the rule that it gets."""
        return "by the mapper"

    def plan(self, model: nn.Module) -> RulePlan:
        """Which rule every submodule of ``model`` gets, and why; prints as a table. Nothing runs."""
        from tdhook_like.attribution.lrp.plan import RulePlan  # which knows mappers

        return RulePlan(model, self)

    def __or__(self, other: RuleMapper) -> LayeredMapper:
        return LayeredMapper(self, other)

    def __ror__(self, other: RuleMapper) -> LayeredMapper:
        return LayeredMapper(other, self)

    def __repr__(self) -> str:
        asked_for = inspect.signature(type(self)).parameters
        given = [(name, getattr(self, name, p.default), p.default) for name, p in asked_for.items()]
        shown = [f"{name}={value!r}" for name, value, default in given if value is not default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _with(self, **known: Any) -> Any:
        """A copy that knows something of a model; the mapper itself serves other models, too."""
        twin = copy.copy(self)
        vars(twin).update(known)
        return twin


class LayeredMapper(Mapper):
    """Mappers over one another: the first one that has a rule for a module gives it.

    ``a | b`` reads the same where one of them is a mapper of the library.
    :class:`~tdhook_like.attribution.lrp.IgnoreRule` says "its own gradient, look no further".

    Args:
        mappers: Asked in this order.

    Raises:
        RuleError: If one is no mapper.

    >>> from tdhook_like.attribution.lrp import EpsilonPlus, FlatRule
    >>> from tdhook_like.attribution.lrp.mappers.patterns import FirstLayer
    >>> mapper = LayeredMapper(FirstLayer(FlatRule()), EpsilonPlus())
    >>> print(mapper.plan(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))))
    path  type    rule                        why
    0     Linear  FlatRule(stabilizer=1e-06)  first layer
    1     Tanh    PassRule()                  type Tanh
    2     Linear  EpsilonRule(epsilon=1e-06)  type Linear
    """

    def __init__(self, *mappers: RuleMapper) -> None:
        if not mappers:
            raise RuleError("LayeredMapper needs at least one mapper.")
        flat: list[RuleMapper] = []
        for mapper in mappers:
            inner = mapper._mappers if isinstance(mapper, LayeredMapper) else (mapper,)
            flat += [a_mapper(m, type(self).__name__) for m in inner]
        self._mappers = tuple(flat)
        self.functions = first_functions(self._mappers)

    def __call__(self, name: str, module: nn.Module) -> Rule | None:
        """The rule of the first mapper that has one."""
        return next((rule for rule, _ in asked(self._mappers, name, module)), None)

    def within(self, scope: Scope) -> Mapper:
        """The mapper whose parts all know the model."""
        return self._with(_mappers=tuple(bound_to(mapper, scope) for mapper in self._mappers))

    def why(self, name: str, module: nn.Module) -> str:
        """The reason of the mapper that gave the rule."""
        return next((reason(m, name, module) for _, m in asked(self._mappers, name, module)), "")

    def __repr__(self) -> str:
        return f"LayeredMapper({', '.join(map(repr, self._mappers))})"


def asked(
    mappers: Iterable[RuleMapper], name: str, module: nn.Module
) -> Iterable[tuple[Rule, RuleMapper]]:
    """The rules that mappers have for a module, in order, and whose they are."""
    for mapper in mappers:
        rule = mapper(name, module)
        if rule is not None:
            yield rule, mapper


def bound_to(mapper: RuleMapper, scope: Scope) -> RuleMapper:
    """A mapper of any kind, bound to a model or to a part of it, if it can be."""
    if isinstance(mapper, Mapper):
        return mapper.within(scope)
    bind = getattr(mapper, "bind", None)
    return mapper if bind is None else bind(scope.model)


def reason(mapper: RuleMapper, name: str, module: nn.Module) -> str:
    """Why a mapper of any kind gives a module its rule: by what it says, or by its own name."""
    why = getattr(mapper, "why", None)
    if why is not None:
        return why(name, module)
    own = getattr(mapper, "__name__", type(mapper).__name__)
    return "by the mapper" if own in ("<lambda>", "partial") else f"by {own}"


def first_functions(mappers: Iterable[RuleMapper]) -> FunctionRules | None:
    """The function rules of the first mapper that has some."""
    every = (getattr(mapper, "functions", None) for mapper in mappers)
    return next((functions for functions in every if functions is not None), None)


def nearest(kinds: Iterable[Kind], module: nn.Module) -> Kind | None:
    """The most specific of the types that a module is an instance of."""
    order = type(module).__mro__
    matching = [kind for kind in kinds if isinstance(module, kind)]
    if isinstance(module, NonDynamicallyQuantizableLinear):  # never called: its weights are read
        matching = [k for k in matching if issubclass(k, NonDynamicallyQuantizableLinear)]
    key = lambda kind: order.index(kind) if kind in order else len(order)  # noqa: E731
    return min(matching, key=key, default=None)


def type_shown(kind: Kind | None, module: nn.Module) -> str:
    """The type that a rule is for, as plans show it: of a base without a public name, the module's."""
    if kind is not None and not kind.__name__.startswith("_"):
        return f"type {kind.__name__}"
    torchs = (c for c in type(module).__mro__ if c.__module__.startswith("torch.nn."))
    public = (c for c in torchs if kind and issubclass(c, kind) and not c.__name__.startswith("_"))
    return f"type {next(public, type(module)).__name__}"


def a_rule(given: Any, place: str) -> Rule:
    """A rule, where None means the module's own gradient; or an error that names the place."""
    if given is None:
        return IgnoreRule()
    if isinstance(given, Rule):
        return given
    hint = ": an instance is needed where this is a class" if isinstance(given, type) else ""
    raise RuleError(
        f"{place} needs a Rule, or None for the module's own gradient{hint}; got {given!r}."
    )


def a_mapper(given: Any, place: str, also: str = "") -> RuleMapper:
    """A mapper, or an error that names the place and what else could stand there."""
    if callable(given) and not isinstance(given, type | Rule):
        return cast(RuleMapper, given)
    hint = " An instance is needed where this is a class." if isinstance(given, type) else ""
    raise RuleError(
        f"{place} must be {also}callable (name, module) -> Rule | None, got {given!r}.{hint}"
    )
