"""What stands at a module's call while rules are on: one handler ahead of it and one behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from tdhook_like.attribution.lrp.batchnorm import (
    BatchNormRule,
    behind,
    foldable,
    in_front,
    scale_and_shift,
)
from tdhook_like.attribution.lrp.deferred import deferred
from tdhook_like.attribution.lrp.flow import Flow, Made
from tdhook_like.attribution.lrp.ledger.causes import accounted
from tdhook_like.attribution.lrp.rules.as_is import IgnoreRule, PassRule
from tdhook_like.attribution.lrp.rules.rule import Inputs, Rule
from tdhook_like.errors import RuleError
from tdhook_like.hooks.arrival import multiplied
from tdhook_like.hooks.installation import Handler
from tdhook_like.hooks.surrogate import attach, differentiated_again

__all__ = ["handlers"]


def handlers(
    path: str, rule: Rule, flow: Flow, *, in_place: bool
) -> tuple[Callable[..., Any] | None, Handler]:
    """Handlers for one module with a rule, for one call.

    Args:
        path: The module's path.
        rule: Its rule.
        flow: What the call's handlers share.
        in_place: Whether the module overwrites its input, which is kept for the rule.

    Returns:
        The handler ahead, if there is need of one: called with the module, its arguments and, where
        these are to be replaced as well, its keyword arguments. And the handler behind.
    """
    #: Of calls under way: what is taken down, and the input as it was.
    calls: list[tuple[Any, Tensor | None]] = []
    # A module that keeps its own gradient is only taken down.
    recorder, acts = flow.recorder, not isinstance(rule, IgnoreRule)
    in_place = in_place and acts
    if isinstance(rule, BatchNormRule) and rule.fold:
        flow.folds = True
    if recorder is None and acts and not in_place and flow.layers is None and flow.mode is None:
        return None, _alone(path, rule, flow)

    def ahead(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        watched = None
        if recorder is not None:
            watched = recorder.enter(path, rule, module, args, kwargs or {}, flow)
        given = args if watched is None else watched.args
        # The module is about to overwrite it.
        calls.append((watched, given[0].clone() if in_place and given else None))
        if watched is None:
            return None
        return watched.args if kwargs is None else (watched.args, watched.kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        flow.reached.add(path)
        watched, kept = calls.pop() if calls else (None, None)
        if in_place:
            if kept is None:
                raise RuleError(
                    f"At {path!r}: a rule on a module that works in place needs its input as a "
                    "positional argument, to keep it before it is overwritten."
                )
            args = (kept, *args[1:])
        inputs = _inputs(flow, args, kwargs)
        shares: list[Any] = []
        watch = None
        if watched is not None:
            watch = lambda by, surrogate: shares.extend(accounted(by, inputs, surrogate))  # noqa: E731
        try:
            result = _applied(rule, flow, module, inputs, output, watch) if acts else None
        except RuleError as error:
            raise RuleError(f"At {path!r}: {error}") from error
        if watched is not None:
            given = output if result is None else result
            assert recorder is not None
            result = recorder.leave(watched, given, output, shares)
        if acts:
            _remember(rule, flow, module, inputs, output, output if result is None else result)
        return result

    return (ahead if in_place or recorder is not None else None), after


def _alone(path: str, rule: Rule, flow: Flow) -> Handler:
    """The handler behind a module's call where nothing but its rule has a part in it."""
    reached = flow.reached

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        reached.add(path)
        try:
            if _makes_its_output(module) and isinstance(output, Tensor):
                factor = rule.factor(module, output)
                if factor is not None and multiplied(output, factor):
                    return None
            return rule.apply(module, _inputs(flow, args, kwargs), output)
        except RuleError as error:
            raise RuleError(f"At {path!r}: {error}") from error

    return after


def _makes_its_output(module: nn.Module) -> bool:
    """Whether what a module gives is a tensor of the call's own, which nobody else holds."""
    return type(module).forward in _AFFINE and "forward" not in vars(module)


_AFFINE = frozenset(
    kind.forward
    for kind in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
)


class _Shown(Inputs):
    """Inputs of which graphs that are not relevance's count for nothing."""

    flow: Flow

    @property
    def attributed(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors if self.flow.shows(tensor)]


def _inputs(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    if flow.recorder is None and not differentiated_again():
        return Inputs(args, kwargs)
    shown: Any = _Shown(args, kwargs)
    shown.flow = flow
    return shown


def _applied(
    rule: Rule, flow: Flow, module: nn.Module, inputs: Inputs, output: Any, watch: Any
) -> Any:
    """The rule's result, with normalisations read as part of the layers beside them."""
    told = None if watch is None else partial(watch, rule)
    if flow.layers is not None and isinstance(output, Tensor):
        if isinstance(rule, BatchNormRule):
            made = flow.origin(_first(inputs))
            fixed = _fixed(rule, module)
            surrogate = None if fixed is None else behind(flow, _first(inputs), output, *fixed)
            if surrogate is not None and isinstance(made, Made):
                if watch is not None:
                    watch(made.rule, surrogate)
                return attach(output, surrogate, fresh=True)
        merged = in_front(flow, module, inputs)
        if merged is not None:
            return rule.apply(*merged, output, told)
        if flow.folds and foldable(module, output):
            return deferred(rule, flow, module, inputs, output, told)
    return rule.apply(module, inputs, output, told)


def _first(inputs: Inputs) -> Any:
    return inputs[0] if inputs else inputs.kwargs.get("input")


def _fixed(rule: BatchNormRule, module: Any) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of a normalisation by the statistics of the training, if it is one."""
    if not rule.fold or module.training or module.running_mean is None:
        return None
    return scale_and_shift(
        module.running_mean, module.running_var, module.weight, module.bias, module.eps
    )


def _remember(rule: Rule, flow: Flow, module: Any, inputs: Inputs, output: Any, given: Any) -> None:
    """Notes how what the model is given was made, for what comes behind."""
    if type(rule) is PassRule:
        flow.mark("gate", given)
    if flow.layers is None or not isinstance(given, Tensor):
        return
    if isinstance(rule, BatchNormRule):
        found = _fixed(rule, module)
        x = _first(inputs)
        if found is not None and not isinstance(flow.origin(x), Made):
            flow.normalised(given, x, *found)
    elif foldable(module, given):
        flow.made(given, Made(module, inputs, output, rule))
