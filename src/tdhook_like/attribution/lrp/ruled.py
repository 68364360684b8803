"""A model whose gradient is relevance: for vjp, vmap, jacrev, compilation and autocast around it.

A hooked module works for one call, on keys. What stands here is a plain module with the model's own
signature and outputs, and rules for its gradient, so that whatever torch does with gradients it does
with relevance.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.following import follow, inside_transforms, left
from tdhook_like.attribution.lrp.functions.lookup import FunctionRules, functions_of
from tdhook_like.attribution.lrp.handlers import handlers
from tdhook_like.attribution.lrp.mappers.policies import PolicyMapper
from tdhook_like.attribution.lrp.once import check_levels, once
from tdhook_like.attribution.lrp.plan import Planned, RulePlan
from tdhook_like.attribution.lrp.rules.rule import RuleMapper, is_float
from tdhook_like.errors import (
    ContextError,
    InputError,
    ModelError,
    RuleError,
    TargetError,
    UnhandledOperationWarning,
    without_a_rule,
)
from tdhook_like.hooks.functional import Functions, open_all
from tdhook_like.hooks.installation import Before, Handler
from tdhook_like.hooks.structure import mapped
from tdhook_like.hooks.surrogate import Twice, differentiated_again, has_graph, nonzero
from tdhook_like.paths import submodules
from tdhook_like.shadow import Shadow, is_scripted

__all__ = ["RuledModel", "relevance"]


class RuledModel(nn.Module):
    """A model with rules for its gradient; what it gives is what the model gives, bit for bit.

    The gradient of an output with respect to an input is relevance per unit of activation, so that
    relevance is :func:`relevance`, or ``nonzero(x)`` times a vector-Jacobian product taken in any
    way that torch knows: ``torch.func.vjp`` and ``jacrev``, ``vmap`` over samples,
    ``autograd.grad(is_grads_batched=True)``, ``torch.compile(fullgraph=True)``, ``autocast``.

    The model runs on copies of its module objects. Each call reads the model's parameters, buffers
    and training flags as they are at that moment, so that it may be trained, moved or loaded
    meanwhile; what a run writes to buffers is lost. Rules, the modules themselves, their hooks and
    plain attributes are those of the time when this was made. Only inputs carry a graph: parameters
    enter as if they required no gradient (by which torch chooses between ways to multiply, and with
    it the last bit). The gradient cannot be differentiated again, nor in forward mode: both are
    errors; :func:`relevance` can build a graph. Without gradients (``no_grad``) there are no rules.

    Args:
        model: Any module. It becomes the submodule ``model``, and is only read.
        rule_mapper: ``(name, module) -> Rule | None``; :class:`PolicyMapper` if None.
        functions: Rules of operations that no module stands for; the mapper's, or the usual ones,
            if None.
        unreached: What happens to a rule whose module is never called: ``"raise"`` or ``"ignore"``.
        unhandled: What happens where a non-linear function has no rule and follows its gradient:
            ``"warn"`` (once for each function), ``"raise"`` or ``"ignore"``. While torch compiles,
            neither of the two is looked at.

    Attributes:
        plan: Which module got which rule; prints as a table.

    Raises:
        RuleError: If the mapper is none, or gives a rule that cannot sit on its module.
        ModelError: If the model is no module, or a scripted one.

    >>> from tdhook_like.attribution.lrp import EpsilonRule
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> ruled = RuledModel(net)
    >>> x = torch.randn(4, 2)
    >>> bool((ruled(x) == net(x)).all())
    True
    >>> jacobian = torch.func.vmap(torch.func.jacrev(ruled))(x)
    >>> (x.unsqueeze(1) * jacobian).shape
    torch.Size([4, 1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        rule_mapper: RuleMapper | None = None,
        *,
        functions: FunctionRules | None = None,
        unreached: str = "raise",
        unhandled: str = "warn",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ModelError(f"RuledModel needs a module, got {type(model).__name__}.")
        if is_scripted(model):
            raise ModelError(
                f"{type(model).__name__} is scripted, or holds a scripted module: it calls no Python, "
                "so no rule can act on it. Give the module that it was scripted from."
            )
        for name, given, known in (
            ("unreached", unreached, ("raise", "ignore")),
            ("unhandled", unhandled, ("warn", "raise", "ignore")),
        ):
            if given not in known:
                raise ContextError(f"{name} must be one of {known}, got {given!r}.")
        if functions is not None and not isinstance(functions, FunctionRules):
            raise RuleError(f"functions must be FunctionRules or None, got {functions!r}.")
        self.model = model
        self.rule_mapper = PolicyMapper() if rule_mapper is None else rule_mapper
        self.unreached, self.unhandled = unreached, unhandled
        # Relevance may start at outputs that are zero: nobody has said yet where it starts.
        self.plan = RulePlan(model, self.rule_mapper, feeds_zeros=True)
        self.functions = functions_of(self.rule_mapper) if functions is None else functions
        if self.plan.calls_functions:
            open_all()
        self._given = functions
        self._current = _Current()
        self._told: set[str] = set()
        # Inside tuples, so that they are not taken for submodules.
        self._stand_in, self._pairs = self._made()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives; its gradient is relevance per unit of activation."""
        compiling, again = torch.compiler.is_compiling(), differentiated_again()
        grads = torch.is_grad_enabled()
        for copied, original in self._pairs:
            follow(copied, original, again or not grads)
        if not grads:
            return self._stand_in[0](*args, **kwargs)
        # Compiled, an argument does not say that it is differentiated; what is made of it does.
        seen = _viewed if compiling else once
        if not again:
            args, kwargs = mapped(seen, args), mapped(seen, kwargs)
        flow = _RuledFlow()
        if self.plan.calls_functions:
            flow.mode = Functions(self.functions.around(flow))
            flow.mode.running = 1
        self.plan.begin(flow)
        outer, self._current.run = self._current.run, _Run(flow)
        try:
            with nullcontext() if flow.mode is None else flow.mode:
                output = self._stand_in[0](*args, **kwargs)
        finally:
            self._current.run = outer
            if compiling:
                for copied, original in self._pairs:
                    left(copied, original)
        if not compiling:
            self._check(flow)
        return output

    def _made(self) -> tuple[tuple[nn.Module], tuple[tuple[nn.Module, nn.Module], ...]]:
        """The copies that run in the model's place, with rules on them; and copies with originals."""
        shadow = Shadow(self.model)
        every = [module for _, module in submodules(self.model).items()]
        pairs = [(shadow.of(m), m) for m in every if type(shadow.of(m)) is type(m)]
        for copied, _ in pairs:
            for name in vars(nn.Module()):
                if "hooks" in name and name in vars(copied):  # so far they are the model's
                    vars(copied)[name] = copy.copy(vars(copied)[name])
        for line in self.plan.lines:
            if not line.acts and not self.plan.calls_functions:
                continue
            copied = shadow.of(line.module)
            ruled = _Ruled(self._current, line)
            copied.register_forward_pre_hook(ruled.ahead)
            copied.register_forward_hook(ruled.behind, prepend=True, with_kwargs=True)
        return (shadow.model,), tuple(pairs)

    def _check(self, flow: Flow) -> None:
        if self.unreached == "raise":
            self.plan.check_reached(flow.reached)
        new = [name for name in flow.unhandled if name not in self._told]
        if not new or self.unhandled == "ignore":
            return
        text = without_a_rule("RuledModel", new)
        if self.unhandled == "raise":
            raise RuleError(text)
        self._told.update(new)
        warnings.warn(text, UnhandledOperationWarning, stacklevel=5)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy stands for the copied model, with copies of its own.
        options = (self._given, self.unreached, self.unhandled)
        return _rebuilt, (self.model, self.rule_mapper, *options)

    def extra_repr(self) -> str:
        """The mapper."""
        return f"rule_mapper={self.rule_mapper!r}"


def relevance(
    function: Callable[..., Tensor],
    *inputs: Any,
    start: str | Tensor,
    create_graph: bool = False,
) -> Any:
    """The relevance of inputs: ``nonzero(x)`` times the gradient of a :class:`RuledModel`.

    A pure function: put ``vmap`` or ``torch.compile(fullgraph=True)`` around it.

    Args:
        function: A :class:`RuledModel`, or a function that calls one (to choose an output, say) and
            returns one tensor.
        inputs: What it is called with. Floating-point tensors are attributed.
        start: The relevance that is propagated: ``"value"`` for what ``function`` returns,
            ``"one"``, or a tensor that broadcasts to it. Where several numbers are returned for one
            input, they are explained together, as their sum.
        create_graph: Whether relevance can be differentiated, with respect to inputs and parameters:
            relevance in a loss. Then it is found by ``torch.autograd.grad``, and ``function`` cannot
            be compiled or transformed.

    Returns:
        A tensor for each of ``inputs``, of its shape, None for what is no floating-point tensor; not
        in a tuple where there is one input.

    Raises:
        InputError: If there is no floating-point tensor among the inputs.
        TargetError: If what is returned is no floating-point tensor.
        RuleError: If ``start`` is none of these.
        ContextError: If relevance is differentiated without ``create_graph``, or with it inside a
            function transform.

    >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    >>> ruled, x = RuledModel(net), torch.randn(4, 2)
    >>> torch.allclose(relevance(ruled, x, start="value").sum(-1), net(x)[:, 0], atol=1e-4)
    True
    """
    at = [i for i, value in enumerate(inputs) if is_float(value)]
    if not at:
        kinds = ", ".join(type(value).__name__ for value in inputs) or "nothing"
        raise InputError(f"relevance() attributes floating-point tensors, and was given {kinds}.")
    points = [inputs[i] for i in at]
    if not torch.compiler.is_compiling():
        check_levels(points, create_graph)

    def of(*values: Tensor) -> Tensor:
        given = list(inputs)
        for i, value in zip(at, values, strict=True):
            given[i] = value
        return _one_tensor(function(*given))

    found = _graphed(of, points, start) if create_graph else _plain(of, points, start)
    results: list[Tensor | None] = [None] * len(inputs)
    for i, value in zip(at, found, strict=True):
        results[i] = value
    return results[0] if len(results) == 1 else tuple(results)


def _plain(of: Callable[..., Tensor], points: list[Tensor], start: str | Tensor) -> list[Tensor]:
    points = [x.detach() for x in points]
    if torch.compiler.is_compiling() or inside_transforms():
        output, pull = torch.func.vjp(of, *points)  # pyright: ignore[reportAssignmentType]
        grads = pull(_seed(start, output.detach()))
    else:  # the same with less around it
        with torch.enable_grad():
            output = of(*[x.requires_grad_() for x in points])
        if not output.requires_grad:
            return [torch.zeros_like(x) for x in points]
        seed = _seed(start, output.detach())
        grads = torch.autograd.grad(output, points, seed, materialize_grads=True)
    return [nonzero(x) * g.detach() for x, g in zip(points, grads, strict=True)]


def _graphed(of: Callable[..., Tensor], points: list[Tensor], start: str | Tensor) -> list[Tensor]:
    with torch.enable_grad(), Twice() as twice:
        points = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in points]
        output = of(*points)
        seed = _seed(start, output)
        twice.relevance = True
        try:
            grads = torch.autograd.grad(
                output, points, seed, create_graph=True, materialize_grads=True
            )
        finally:
            twice.relevance = False
        return [nonzero(x) * g for x, g in zip(points, grads, strict=True)]


def _seed(start: str | Tensor, output: Tensor) -> Tensor:
    """What the backward pass starts with: the relevance of the output per unit of it."""
    if isinstance(start, str) and start == "value":
        return torch.ones_like(output)
    if isinstance(start, str) and start == "one":
        return 1 / nonzero(output)
    if not isinstance(start, Tensor):
        raise RuleError(f"relevance(): start must be 'value', 'one' or a tensor, got {start!r}.")
    try:
        given = start.to(output).expand(output.shape)
    except RuntimeError:
        raise RuleError(
            f"relevance(): start of shape {tuple(start.shape)} does not broadcast to what the "
            f"function returns, of shape {tuple(output.shape)}."
        ) from None
    return given / nonzero(output)


def _one_tensor(output: Any) -> Tensor:
    if is_float(output):
        return output
    raise TargetError(
        f"relevance() explains one floating-point tensor, and the function returned a "
        f"{type(output).__name__}. Give a function that picks it: lambda x: ruled(x)[0]."
    )


# --- what a call's rules find --------------------------------------------------------------------


@dataclass
class _RuledFlow(Flow):
    """The flow of a stand-in, whose parameters carry no graph: what has one depends on inputs."""

    # Plain sets and dicts, of which a trace can be taken.
    applied: Any = field(default_factory=lambda: defaultdict(int))
    unhandled: Any = field(default_factory=lambda: defaultdict(int))

    def depends(self, value: Any) -> bool:
        if differentiated_again():
            return super().depends(value)
        return isinstance(value, Tensor) and has_graph(value)

    def missing(self, name: str, result: Tensor) -> None:
        self.unhandled[name] += 1


class _Run:
    """One call of a stand-in: its flow, and its handlers by the paths of their modules."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.handlers: dict[str, tuple[Before | None, Handler]] = {}


class _Current(threading.local):
    """The call that is under way in this thread, if any."""

    def __init__(self) -> None:
        self.run: _Run | None = None


class _Ruled:
    """The hooks of one copied module."""

    def __init__(self, current: _Current, line: Planned) -> None:
        self.current, self.line = current, line

    def ahead(self, module: nn.Module, args: Any) -> Any:
        run, line = self.current.run, self.line
        if run is None:
            return None
        if run.flow.mode is not None:
            run.flow.mode.inside += 1
        if not line.acts:
            return None
        in_place = getattr(module, "inplace", False) is True
        made = handlers(line.path, line.rule, run.flow, in_place=in_place)
        run.handlers[line.path] = made
        return None if made[0] is None else made[0](module, args)

    def behind(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        run, line = self.current.run, self.line
        if run is None:
            return None
        result = None
        if line.acts:
            result = run.handlers[line.path][1](module, args, kwargs, output)
        if run.flow.mode is not None:
            run.flow.mode.inside -= 1
        return result


def _viewed(value: Any) -> Any:
    return value.view_as(value) if is_float(value) else value


def _rebuilt(model: nn.Module, mapper: Any, functions: Any, unreached: str, unhandled: str) -> Any:
    return RuledModel(model, mapper, functions=functions, unreached=unreached, unhandled=unhandled)
