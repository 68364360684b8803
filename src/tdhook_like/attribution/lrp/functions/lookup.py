"""Which torch function gets which rule.

A function is told by its name, in every spelling: ``F.gelu``, ``torch.tanh``, ``x.tanh_()``,
``x * gate``. What is linear, or picks entries, needs no rule: its gradient is the rule already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch.overrides import get_overridable_functions

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.functions.operations import (
    FOLLOWED,
    UNHANDLED,
    Followed,
    FunctionRule,
    Opened,
)
from tdhook_like.attribution.lrp.functions.tables import table
from tdhook_like.attribution.lrp.names import TRANSPARENT, spoken
from tdhook_like.errors import RuleError, listed
from tdhook_like.hooks.functional import Around, written_in_python

__all__ = ["FunctionRules", "functions_of"]


class FunctionRules:
    """The rules of all torch functions, by name; :meth:`none` for plain gradients.

    Args:
        attention: What attention weights, and every softmax, are: ``"gradient"`` as in AttnLRP, or
            ``"constant"`` as in CP-LRP.
        gates: Who gets a product of an activation function's result and a signal: each one ``"half"``,
            or the ``"signal"`` all.
        rules: Rules of one's own by the function's name, for all its spellings (``"softmax"``); None
            for a function's own gradient.

    Raises:
        RuleError: If an option is unknown, a rule is none, or torch has no function of that name.

    >>> FunctionRules(gates="signal")
    FunctionRules(attention='gradient', gates='signal')
    """

    def __init__(
        self,
        attention: str = "gradient",
        gates: str = "half",
        rules: Mapping[str, FunctionRule | None] | None = None,
    ) -> None:
        if attention not in ("gradient", "constant"):
            raise RuleError(f"attention must be 'gradient' or 'constant', got {attention!r}.")
        if gates not in ("half", "signal"):
            raise RuleError(f"gates must be 'half' or 'signal', got {gates!r}.")
        self.attention, self.gates, self._plain = attention, gates, False
        self.rules = {_known(name): _a_rule(name, rule) for name, rule in (rules or {}).items()}
        self._settle()

    @classmethod
    def none(cls, rules: Mapping[str, FunctionRule | None] | None = None) -> FunctionRules:
        """No rules: every function follows its own gradient, and none is reported.

        For rules on modules alone, where what is called beside them shall stay as autograd has it.

        Args:
            rules: The exceptions, if any; as of the class.

        Raises:
            RuleError: If one of them is no rule, or torch has no function of that name.

        >>> FunctionRules.none(), FunctionRules().find(torch.tanh), FunctionRules.none().find(torch.tanh)
        (FunctionRules.none(), ('tanh', Passed()), ('tanh', ))
        """
        found = cls(rules=rules)
        found._plain = True
        found._settle()
        return found

    def _settle(self) -> None:
        ruled = {} if self._plain else table(self.attention == "constant", self.gates == "signal")
        self._table: dict[str, FunctionRule] = ruled
        self._table.update(
            {name: Followed() if rule is None else rule for name, rule in self.rules.items()}
        )
        self._found: dict[Any, tuple[str, FunctionRule | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What is made of the options is made again: torch's functions cannot be copied or pickled.
        return {name: v for name, v in vars(self).items() if name not in ("_table", "_found")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._settle()

    def find(self, function: Any) -> tuple[str, FunctionRule | None]:
        """A torch function's name, and its rule; None where it can do nothing to relevance."""
        compiling = torch.compiler.is_compiling()
        found = None if compiling else self._found.get(function)
        if found is None:
            name = _spoken(function)
            rule = self._table.get(name)
            if rule is None and name not in TRANSPARENT:
                rule = self._untold(function)
            found = (name, rule)
            if not compiling:  # a trace must not depend on what was asked before
                self._found[function] = found
        return found

    def _untold(self, function: Any) -> FunctionRule:
        """The rule of a function that stands in no table."""
        if self._plain and not self.rules:
            return FOLLOWED
        if _written_in_python(function):
            return _OPENED  # what it is made of may have a rule
        return FOLLOWED if self._plain else UNHANDLED

    def around(self, flow: Flow) -> Callable[[Any], Around | None]:
        """For the length of one call: from a function to what takes its place."""
        known: dict[Any, Around | None] = {}

        def of(function: Any) -> Around | None:
            try:
                return known[function]
            except KeyError:
                pass
            name, rule = self.find(function)
            idle = isinstance(rule, Followed) and rule.is_plain and flow.recorder is None
            if rule is None or idle:
                found = None
            elif flow.recorder is None:
                found = partial(rule.call, flow, name)
            else:
                found = partial(flow.recorder.call, flow, name, rule)
            known[function] = found
            return found

        return of

    def __repr__(self) -> str:
        if self._plain:
            return f"FunctionRules.none({f'rules={self.rules!r}' if self.rules else ''})"
        own = f", rules={self.rules!r}" if self.rules else ""
        return f"FunctionRules(attention={self.attention!r}, gates={self.gates!r}{own})"


_OPENED = Opened()


def _known(name: Any) -> str:
    """A name as it is told; raises :class:`RuleError` where torch has none such."""
    if isinstance(name, str) and spoken(name) in _names():
        return spoken(name)
    close = [known for known in _names() if isinstance(name, str) and name.strip("_") in known]
    raise RuleError(
        f"FunctionRules: torch has no function {name!r}."
        + (f" Did you mean {listed(sorted(close)[:6])}?" if close else "")
    )


@lru_cache(maxsize=1)
def _names() -> frozenset[str]:
    found = {spoken(f) for functions in get_overridable_functions().values() for f in functions}
    return frozenset(found | TRANSPARENT | set(table(False, False)))


def _a_rule(name: str, rule: FunctionRule | None) -> FunctionRule | None:
    if rule is None or isinstance(rule, FunctionRule):
        return rule
    raise RuleError(f"The rule of {name}() must be a FunctionRule or None, got {rule!r}.")


# While torch compiles, functions cannot be asked for their names.
_spoken = torch.compiler.assume_constant_result(spoken)
_written_in_python = torch.compiler.assume_constant_result(written_in_python)


_DEFAULT = FunctionRules()


def functions_of(mapper: Any) -> FunctionRules:
    """The function rules that come with a mapper; the usual ones where it has none.

    >>> functions_of(lambda name, module: None)
    FunctionRules(attention='gradient', gates='half')
    """
    found = getattr(mapper, "functions", None)
    return found if isinstance(found, FunctionRules) else _DEFAULT
