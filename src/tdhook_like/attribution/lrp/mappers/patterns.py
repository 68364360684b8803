"""Rules by type, by name or glob, and by position, each checked against the model beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from tdhook_like.attribution.lrp.mappers.choosing import (
    Kind,
    Mapper,
    Scope,
    a_mapper,
    a_rule,
    bound_to,
    first_functions,
    nearest,
    reason,
    type_shown,
)
from tdhook_like.attribution.lrp.mappers.positions import first_layers, has_weights, is_leaf
from tdhook_like.attribution.lrp.rules.as_is import IgnoreRule
from tdhook_like.attribution.lrp.rules.rule import Rule, RuleMapper
from tdhook_like.errors import PathError, RuleError, listed

__all__ = ["FirstLayer", "NameMapper", "TypeMapper"]


class TypeMapper(Mapper):
    """Rules by type: of the types that a module is an instance of, the most specific one counts.

    The output projection of ``nn.MultiheadAttention`` is a ``nn.Linear`` that is never called; only
    its own type means it.

    Args:
        rules: From types, or tuples of types, to rules; None stands for the module's own gradient.

    Raises:
        RuleError: If a key is no module type, or a value no rule.
        PathError: When bound to a model that has no module of a type.

    >>> from tdhook_like.attribution.lrp import EpsilonRule, PassRule
    >>> mapper = TypeMapper({nn.Linear: EpsilonRule(), (nn.ReLU, nn.Tanh): PassRule()})
    >>> mapper("0", nn.Tanh()), mapper("1", nn.Softmax(-1))
    (PassRule(), None)
    """

    def __init__(self, rules: Mapping[Kind | tuple[Kind, ...], Rule | None]) -> None:
        self._groups = [(k if isinstance(k, tuple) else (k,), rule) for k, rule in rules.items()]
        self._rules: dict[Kind, Rule] = {}
        for kinds, rule in self._groups:
            for kind in kinds:
                if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                    raise RuleError(f"TypeMapper: {kind!r} is no module type, such as nn.Linear.")
                self._rules[kind] = a_rule(rule, f"TypeMapper: {kind.__name__}")

    def __call__(self, name: str, module: nn.Module) -> Rule | None:
        """The rule of the module's nearest type."""
        kind = nearest(self._rules, module)
        return None if kind is None else self._rules[kind]

    def within(self, scope: Scope) -> Mapper:
        """Itself, once every type was found in the model."""
        for kinds, _ in self._groups:
            if not any(nearest(kinds, module) for _, module, _ in scope.walked):
                here = dict.fromkeys(type(module).__name__ for _, module, _ in scope.walked)
                raise PathError(
                    f"TypeMapper: the model has no {' or '.join(k.__name__ for k in kinds)}. "
                    f"Types here: {listed(here)}."
                )
        return self

    def why(self, name: str, module: nn.Module) -> str:
        """``type Linear``."""
        return type_shown(nearest(self._rules, module), module)

    def __repr__(self) -> str:
        rows = (f"{'/'.join(k.__name__ for k in kinds)}: {rule}" for kinds, rule in self._groups)
        return f"TypeMapper({{{', '.join(rows)}}})"


class NameMapper(Mapper):
    """Rules by path or glob, or other mappers for a part of the model.

    * A rule under an exact path sits there, be it a layer or a container.
    * A rule under a glob (``"encoder.*"``; ``*`` goes across dots) sits on the matching modules
      without children that it can sit on.
    * A mapper under an exact path is asked about that module and all inside it, under a glob about
      all that matches: ``{"encoder": EpsilonPlusFlat(), "head.*": EpsilonPlus()}``.
    * None under either: all of these keep their own gradient.

    Exact paths go before globs, and the pattern that was given first before those behind it. A module
    that stands at several paths is found under each of them. Function rules are the whole model's: of
    the first mapper that has some.

    Args:
        rules: From paths and globs to rules, mappers or None.

    Raises:
        RuleError: If a value is none of these, or a rule can sit on nothing that its glob matches.
        PathError: When bound to a model in which a pattern matches nothing.

    >>> from tdhook_like.attribution.lrp import FlatRule, ZPlusRule
    >>> mapper = NameMapper({"0": FlatRule(), "[1-9]": ZPlusRule()})
    >>> print(mapper.plan(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))))
    path  type    rule                         why
    0     Linear  FlatRule(stabilizer=1e-06)   name '0'
    2     Linear  ZPlusRule(stabilizer=1e-06)  pattern '[1-9]'
    """

    def __init__(self, rules: Mapping[str, Rule | RuleMapper | None]) -> None:
        mappers: list[RuleMapper] = []
        for pattern, given in rules.items():
            if not isinstance(pattern, str):
                raise RuleError(
                    f"NameMapper: {pattern!r} is no path or glob. Rules by type: TypeMapper."
                )
            if given is not None and not isinstance(given, Rule):
                mappers.append(a_mapper(given, f"NameMapper: {pattern!r}", "a rule, None or "))
        self._rules = dict(rules)
        self.functions = first_functions(mappers)
        self._found: dict[int, list[tuple[nn.Module, str, Rule | RuleMapper]]] | None = None

    def __call__(self, name: str, module: nn.Module) -> Rule | None:
        """The rule under the first pattern that has one for the module."""
        return next((rule for _, rule, _ in self._asked(name, module)), None)

    def within(self, scope: Scope) -> Mapper:
        """The mapper that knows which modules its patterns mean."""
        exact = {path for path, _, _ in scope.walked}
        found: dict[int, list[tuple[nn.Module, str, Rule | RuleMapper]]] = {}
        for pattern in sorted(self._rules, key=lambda p: p not in exact):
            for module, given in self._meant(pattern, pattern in exact, scope):
                found.setdefault(id(module), []).append((module, pattern, given))
        return self._with(_found=found)

    def _meant(
        self, pattern: str, exact: bool, scope: Scope
    ) -> Iterable[tuple[nn.Module, Rule | RuleMapper]]:
        given, part = self._rules[pattern], scope.matching(pattern, type(self).__name__)
        if isinstance(given, Rule):
            return [(module, given) for module in self._sites(pattern, given, part)]
        if exact:
            part = scope.part(lambda path: inside(path, pattern))
        known = IgnoreRule() if given is None else bound_to(given, part)
        return [(module, known) for _, module, _ in part.walked]

    def _sites(self, pattern: str, rule: Rule, part: Scope) -> list[nn.Module]:
        if any(path == pattern for path, _, _ in part.walked):
            return [module for path, module, _ in part.walked if path == pattern]
        sites = [m for path, m, _ in part.walked if is_leaf(path, m) and not rule.check(m)]
        if not sites:
            _, module, _ = part.walked[0]
            raise RuleError(
                f"NameMapper: {rule!r} can sit on nothing that {pattern!r} matches "
                f"({listed(path for path, _, _ in part.walked)}): "
                f"{rule.check(module) or 'these are containers. Name one by its exact path'}."
            )
        return sites

    def _asked(self, name: str, module: nn.Module) -> Iterable[tuple[str, Rule, RuleMapper | None]]:
        if self._found is None:
            raise RuleError(unbound(self))
        for _, pattern, given in self._found.get(id(module), ()):
            if isinstance(given, Rule):
                yield pattern, given, None
            elif (rule := given(name, module)) is not None:
                yield pattern, rule, given

    def why(self, name: str, module: nn.Module) -> str:
        """``name 'head'`` or ``pattern 'encoder.*'``, with the inner mapper's reason."""
        for pattern, _, mapper in self._asked(name, module):
            kind = "pattern" if any(c in pattern for c in "*?[") else "name"
            inner = f", {reason(mapper, name, module)}" if mapper else ""
            return f"{kind} {pattern!r}{inner}"
        return super().why(name, module)

    def __repr__(self) -> str:
        return f"NameMapper({self._rules!r})"


class FirstLayer(Mapper):
    """A rule for the layers that read the model's inputs.

    Found from the model's structure. In a ``TensorDictSequential``: the first layer with weights (a
    dense layer or a convolution) of every module that reads only inputs of the sequence. Anywhere
    else, the first one in the order of registration, which need not be the order of the calls: look
    at the plan, and where the model branches, name the layers.

    Args:
        rule: The rule.
        first: The layers' paths or globs; found if None.

    Raises:
        RuleError: If ``rule`` is none.
        PathError: When bound to a model in which no such layer is found.

    >>> from tdhook_like.attribution.lrp import FlatRule
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> print(FirstLayer(FlatRule()).plan(net))
    path  type    rule                        why
    1     Linear  FlatRule(stabilizer=1e-06)  first layer
    """

    def __init__(self, rule: Rule, first: str | Sequence[str] | None = None) -> None:
        self.rule = a_rule(rule, "FirstLayer")
        self.first = (first,) if isinstance(first, str) else first and tuple(first)
        self._found: dict[int, nn.Module] | None = None

    def __call__(self, name: str, module: nn.Module) -> Rule | None:
        """The rule, where the module is a first layer."""
        if self._found is None:
            raise RuleError(unbound(self))
        return self.rule if id(module) in self._found else None

    def within(self, scope: Scope) -> Mapper:
        """The mapper that knows which layers these are."""
        layers: list[nn.Module] = []
        for pattern in self.first or ():
            part = scope.matching(pattern, type(self).__name__)
            exact = [module for path, module, _ in part.walked if path == pattern]
            sites = exact or [m for path, m, _ in part.walked if has_weights(path, m)]
            if not sites:
                raise PathError(f"FirstLayer: {pattern!r} matches no layer with weights.")
            layers += sites
        if not self.first:
            layers = first_layers(scope.model if scope.whole else None, scope.walked)
        if not layers:
            raise PathError(
                "FirstLayer: no dense layer or convolution was found to read the model's inputs first. "
                "Name the layers, as in first='encoder.0', or take a mapper without a first layer. "
                f"Paths here: {listed(path for path, _, _ in scope.walked if path)}."
            )
        return self._with(_found={id(layer): layer for layer in layers})

    def why(self, name: str, module: nn.Module) -> str:
        """``first layer``."""
        return "first layer"


def inside(path: str, at: str) -> bool:
    """Whether a path is ``at`` or lies in it."""
    return not at or path == at or path.startswith(f"{at}.")


def unbound(mapper: Mapper) -> str:
    """What to say to those who ask a mapper before it knows the model."""
    return (
        f"{type(mapper).__name__} does not know the model that it is asked about. Give it to LRP as it "
        "is, below another mapper by rule_mapper=… or a | b, or bind it: mapper.bind(model)."
    )
