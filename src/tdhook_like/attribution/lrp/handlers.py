"""What stands at a module's call while rules are on: one handler ahead of it and one behind."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tdhook_like.attribution.lrp.batchnorm import (
    BatchNormRule,
    behind,
    foldable,
    in_front,
    scale_and_shift,
)
from tdhook_like.attribution.lrp.flow import Flow, Made
from tdhook_like.attribution.lrp.rule import Inputs, Rule
from tdhook_like.attribution.lrp.rules import PassRule
from tdhook_like.errors import RuleError
from tdhook_like.hooks.installation import Before, Handler
from tdhook_like.hooks.surrogate import attach

__all__ = ["handlers"]


def handlers(path: str, rule: Rule, flow: Flow, *, in_place: bool) -> tuple[Before | None, Handler]:
    """Handlers for one module with a rule, for one call.

    Args:
        path: The module's path.
        rule: Its rule.
        flow: What the call's handlers share.
        in_place: Whether the module overwrites its input, which is kept for the rule.
    """
    kept: list[Any] = []
    recorder = flow.recorder

    def ahead(module: nn.Module, args: tuple[Any, ...]) -> Any:
        watched = None
        if recorder is not None:
            watched = recorder.enter(path, module, rule, args, flow.depends)
        given = args if watched is None else watched
        if in_place and given:
            kept.append(given[0].clone())  # the module is about to overwrite it
        elif recorder is not None:
            kept.append(None)
        return watched

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        flow.reached.add(path)
        if in_place:
            if not kept:
                raise RuleError(
                    f"At {path!r}: a rule on a module that works in place needs its input as a "
                    "positional argument, to keep it before it is overwritten."
                )
            args = (kept.pop(), *args[1:])
        watched: list[Any] = []
        watch = None
        if recorder is not None:
            values = recorder.values
            watch = lambda surrogate: watched.extend(values(surrogate))  # noqa: E731
        try:
            result = _applied(rule, flow, module, Inputs(args, kwargs), output, watch)
        except RuleError as error:
            raise RuleError(f"At {path!r}: {error}") from error
        if recorder is not None:
            recorder.leave(output if result is None else result, watched)
        return result

    return (ahead if in_place or recorder is not None else None), after


def _applied(
    rule: Rule, flow: Flow, module: nn.Module, inputs: Inputs, output: Any, watch: Any
) -> Any:
    """The rule's result, with normalisations read as part of the layers beside them."""
    if flow.layers is None or not isinstance(output, Tensor):
        result = rule.apply(module, inputs, output, watch)
        if type(rule) is PassRule:
            flow.mark("gate", output if result is None else result)
        return result
    if isinstance(rule, BatchNormRule):
        return _normalised(rule, flow, module, inputs, output, watch)
    merged = in_front(flow, module, inputs)
    if merged is None:
        result = rule.apply(module, inputs, output, watch)
    else:
        result = rule.apply(*merged, output, watch)
    if foldable(module, output):
        flow.made(Made(output if result is None else result, module, inputs, output, rule))
    elif type(rule) is PassRule:
        flow.mark("gate", output if result is None else result)
    return result


def _normalised(
    rule: BatchNormRule, flow: Flow, module: Any, inputs: Inputs, output: Tensor, watch: Any
) -> Any:
    if not rule.fold or module.training or module.running_mean is None:
        return rule.apply(module, inputs, output, watch)
    scale, shift = scale_and_shift(
        module.running_mean, module.running_var, module.weight, module.bias, module.eps
    )
    surrogate = behind(flow, inputs[0], output, scale, shift)
    if surrogate is not None:
        if watch is not None:
            watch(surrogate)
        return attach(output, surrogate)
    result = rule.apply(module, inputs, output, watch)
    flow.normalised(output if result is None else result, inputs[0], scale, shift)
    return result
