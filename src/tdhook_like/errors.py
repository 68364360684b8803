"""The exceptions of the library: one root, and one class for each thing that can be wrong.

Every message names the key or module path that is at fault, what was given and what to do. Each
class also derives from the built-in exception that fits, so that ``except ValueError`` works.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = [
    "BaselineError",
    "ConservationError",
    "ContextError",
    "InputError",
    "KeyNotFoundError",
    "LayoutError",
    "LockedError",
    "ModelError",
    "PathError",
    "RuleError",
    "TargetError",
    "TdhookLikeError",
    "UnhandledOperationWarning",
]


class TdhookLikeError(Exception):
    """Root of every exception that the library raises on purpose.

    >>> issubclass(TargetError, TdhookLikeError) and issubclass(TargetError, ValueError)
    True
    """


class KeyNotFoundError(TdhookLikeError, LookupError):
    """A key was named that the TensorDict or the module does not have."""


class PathError(TdhookLikeError, LookupError):
    """A path, glob or type was named that matches no submodule."""


class TargetError(TdhookLikeError, ValueError):
    """What is to be explained is missing, ambiguous or not differentiable."""


class InputError(TdhookLikeError, ValueError):
    """An input cannot be explained: wrong type, shape, device, or not finite."""


class BaselineError(TdhookLikeError, ValueError):
    """A baseline does not fit the input that it stands against."""


class RuleError(TdhookLikeError, ValueError):
    """A rule has wrong parameters, cannot treat its module, or was never reached."""


class ConservationError(TdhookLikeError, ArithmeticError):
    """Relevance went missing, by more than was allowed."""


class ContextError(TdhookLikeError, RuntimeError):
    """A hooked module was used outside its ``with`` block, or a block was entered twice."""


class ModelError(TdhookLikeError, TypeError):
    """The model is of a kind that cannot be explained, such as a scripted module."""


class LayoutError(TdhookLikeError, RuntimeError):
    """No way of stacking further evaluations reproduces the model's own outputs."""


class LockedError(TdhookLikeError, RuntimeError):
    """Results have to be written into a TensorDict that is locked."""


class UnhandledOperationWarning(UserWarning):
    """A non-linear function has no rule: relevance follows its gradient there."""


def without_a_rule(who: str, names: Sequence[str]) -> str:
    """What is said of non-linear functions that have no rule.

    >>> print(without_a_rule("LRP", ["atan2"]))
    LRP: atan2() is not linear and without a rule, ...
    """
    return (
        f"{who}: {', '.join(f'{name}()' for name in names)} "
        f"{'is' if len(names) == 1 else 'are'} not linear and without a rule, so relevance follows the "
        "gradient there and is not conserved. Put a rule on the module that calls it, or give one: "
        f"functions=FunctionRules(rules={{{names[0]!r}: ...}}), None for the gradient."
    )


def listed(names: Iterable[object], most: int = 12) -> str:
    """Names as they appear in messages: sorted as given, shortened past ``most``.

    >>> listed(["a", ("b", "c")])
    "'a', ('b', 'c')"
    >>> listed([])
    '(none)'
    """
    items = list(names)
    if not items:
        return "(none)"
    shown = ", ".join(repr(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown}, … ({len(items)} in all)"
