"""Which torch function gets which rule.

A function is told by its name, in every spelling: ``F.gelu``, ``torch.tanh``, ``x.tanh_()``,
``x * gate``. What is linear, or picks entries, needs no rule: its gradient is the rule already.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.names import FOLLOWED, PASSED, PRODUCTS, TRANSPARENT, spoken
from tdhook_like.attribution.lrp.normalised import group_norm, instance_norm, layer_norm, rms_norm
from tdhook_like.attribution.lrp.operations import (
    Attention,
    BatchNormalised,
    Followed,
    FunctionRule,
    GatedLinear,
    Normalised,
    Opened,
    Passed,
    Power,
    Product,
    Quotient,
    Reduced,
    Softmax,
    Sum,
    Unhandled,
)
from tdhook_like.errors import RuleError
from tdhook_like.hooks.functional import Around

__all__ = ["FunctionRules", "functions_of"]


class FunctionRules:
    """The rules of all torch functions, by name.

    Args:
        attention: What attention weights, and every softmax, are: ``"gradient"`` as in AttnLRP, or
            ``"constant"`` as in CP-LRP.
        gates: Who gets a product of an activation function's result and a signal: each one ``"half"``,
            or the ``"signal"`` all.
        rules: Rules of one's own by name; None for a function's own gradient.

    Raises:
        RuleError: If an option is unknown, or a rule is none.

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
        self.attention, self.gates = attention, gates
        for name, rule in (rules or {}).items():
            if rule is not None and not isinstance(rule, FunctionRule):
                raise RuleError(f"The rule of {name}() must be a FunctionRule or None, got {rule!r}.")
        self.rules = dict(rules or {})
        self._table = _table(attention == "constant", gates == "signal")
        self._table.update(
            {name: Followed() if rule is None else rule for name, rule in self.rules.items()}
        )
        self._found: dict[Any, tuple[str, FunctionRule | None]] = {}

    def find(self, function: Any) -> tuple[str, FunctionRule | None]:
        """A torch function's name, and its rule; None where it can do nothing to relevance."""
        found = self._found.get(function)
        if found is None:
            name = spoken(function)
            rule = self._table.get(name, _UNHANDLED)
            if rule is _UNHANDLED and _written_in_python(function):
                rule = _OPENED
            found = self._found[function] = (name, None if name in TRANSPARENT else rule)
        return found

    def around(self, flow: Flow) -> Callable[[Any], Around | None]:
        """For the length of one call: from a function to what takes its place."""

        def of(function: Any) -> Around | None:
            name, rule = self.find(function)
            if rule is None:
                return None
            return lambda func, args, kwargs: rule.call(flow, name, func, args, kwargs)

        return of

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_found": {}}  # torch's functions do not all travel

    def __repr__(self) -> str:
        own = f", rules={self.rules!r}" if self.rules else ""
        return f"FunctionRules(attention={self.attention!r}, gates={self.gates!r}{own})"


_OPENED, _UNHANDLED = Opened(), Unhandled()


def _table(fixed: bool, signal: bool) -> dict[str, FunctionRule]:
    followed, passed, gate = Followed(), Passed(), Passed("gate")
    table: dict[str, FunctionRule] = dict.fromkeys(FOLLOWED, followed)
    table.update(dict.fromkeys(PASSED, passed))
    table.update(dict.fromkeys(PASSED & GATES, gate))
    table.update(dict.fromkeys(PRODUCTS, Product(signal)))
    table.update(dict.fromkeys(("rsqrt", "reciprocal"), Passed("scale")))
    table.update(dict.fromkeys(("pow", "float_power"), Power()))
    table.update(dict.fromkeys(("div", "divide", "truediv"), Quotient()))
    table.update(dict.fromkeys(("rdiv", "rtruediv"), Quotient(reverse=True)))
    table.update(dict.fromkeys(("softmax", "softmin", "masked_softmax"), Softmax(fixed)))
    table["scaled_dot_product_attention"] = Attention(fixed)
    table["glu"] = GatedLinear(signal)
    table["var"] = Reduced()
    # bias + a @ b; and layers whose weights depend on the inputs.
    table.update(
        dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm", "addr", "addcmul"), Sum(1, 2))
    )
    table.update(dict.fromkeys(CONVOLUTIONS | {"linear"}, Sum(0, 1)))
    table["bilinear"] = Sum(0, 1, 2)
    for name, linear in (
        ("layer_norm", layer_norm),
        ("rms_norm", rms_norm),
        ("group_norm", group_norm),
        ("instance_norm", instance_norm),
    ):
        table[name] = Normalised(linear)
    table["batch_norm"] = BatchNormalised()
    return table


GATES = frozenset({"sigmoid", "hardsigmoid", "tanh", "silu", "gelu", "relu", "mish", "softplus"})
CONVOLUTIONS = frozenset(
    f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)
)


def _written_in_python(function: Any) -> bool:
    return isinstance(function, types.FunctionType) and any(
        name.startswith("has_torch_function") for name in function.__code__.co_names
    )


_DEFAULT = FunctionRules()


def functions_of(mapper: Any) -> FunctionRules:
    """The function rules that come with a mapper; the usual ones where it has none.

    >>> functions_of(lambda name, module: None)
    FunctionRules(attention='gradient', gates='half')
    """
    found = getattr(mapper, "functions", None)
    return found if isinstance(found, FunctionRules) else _DEFAULT
