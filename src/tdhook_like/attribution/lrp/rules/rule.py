"""What a rule is: the base class with its two doors, and how a rule is put on a module by hand."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.errors import RuleError
from tdhook_like.hooks.structure import leaves, mapped
from tdhook_like.hooks.surrogate import attach, differentiated_again, has_graph, nonzero

__all__ = ["Inputs", "RemovableRuleHandle", "Rule", "RuleMapper", "registered"]


class Inputs(tuple[Any, ...]):
    """The positional arguments of a module's call, with its keyword arguments beside them.

    >>> inputs = Inputs((torch.ones(2),), {"mask": torch.tensor([True])})
    >>> len(inputs), list(inputs.kwargs), len(inputs.tensors)
    (1, ['mask'], 1)
    """

    kwargs: dict[str, Any]

    def __new__(cls, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Inputs:
        made = super().__new__(cls, args)
        made.kwargs = kwargs or {}
        return made

    @property
    def tensors(self) -> list[Tensor]:
        """The floating-point tensors among all arguments, in order."""
        return [item for item in leaves((tuple(self), self.kwargs)) if is_float(item)]

    @property
    def attributed(self) -> list[Tensor]:
        """Those of :attr:`tensors` through which relevance flows on."""
        return [tensor for tensor in self.tensors if has_graph(tensor)]


class Rule:
    """How relevance passes through a module. Holds no per-call state; use one as often as you like.

    There are two doors for rules of your own; override one of them:

    * :meth:`surrogate` gives an expression whose *gradient* is the rule (relevance per unit of
      activation). This is how every rule of the library is written.
    * :meth:`relevance` takes the output's relevance and gives the inputs', as in the papers.

    >>> class Halve(Rule):
    ...     def relevance(self, module, inputs, output, R_out):
    ...         return R_out / 2
    >>> Halve()
    Halve()
    """

    #: Whether the surrogate is made for the call and its last operation does not keep its result, as
    #: sums and products don't; it may then be overwritten instead of copied.
    fresh: bool = False
    #: Whether the rule may give relevance to inputs that are exactly zero.
    feeds_zeros: bool = True
    #: What the ledger calls the relevance that is not given on, where it is not the bias's.
    absorbs: str | None = None

    def __init_subclass__(cls) -> None:
        # What a class says of its surrogate does not hold for that of a subclass.
        if {"surrogate", "share", "relevance"} & set(vars(cls)):
            for name, careful in (("fresh", False), ("feeds_zeros", True)):
                if name not in vars(cls):
                    setattr(cls, name, careful)

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        """An expression in ``inputs`` of ``output``'s shape (or structure) that is differentiated.

        Args:
            module: The module that was called.
            inputs: Its arguments, connected to the graph.
            output: What it returned, connected to the graph.

        Returns:
            The surrogate, or None for the output's own gradient.
        """
        return _through_relevance(self, module, inputs, output)

    def relevance(self, module: nn.Module, inputs: Inputs, output: Any, R_out: Any) -> Any:
        """The relevance of the inputs, given that of the output.

        Args:
            module: The module that was called.
            inputs: Its arguments, without a graph (wrap in ``torch.enable_grad`` to build one).
            output: What it returned, without a graph.
            R_out: The output's relevance, of its shape (a tuple where it returned several tensors).

        Returns:
            The relevance of ``inputs.tensors``: one tensor, or a tuple of as many.
        """
        raise RuleError(
            f"{type(self).__name__} must override surrogate(module, inputs, output) or "
            "relevance(module, inputs, output, R_out)."
        )

    def factor(self, module: nn.Module, output: Tensor) -> Callable[[Tensor], Tensor] | None:
        """How to find what the gradient at the output is multiplied by, where that is all there is to do.

        None where the rule needs its surrogate, as it does unless a rule says otherwise. Asked only of
        layers that return a tensor of their own making.

        Args:
            module: The module that was called.
            output: What it returned.
        """
        return None

    def apply(
        self,
        module: nn.Module,
        inputs: Inputs,
        output: Any,
        watch: Callable[[Any], None] | None = None,
    ) -> Any:
        """The output with this rule's gradient: what the hook puts in the output's place.

        Args:
            module: The module that was called.
            inputs: Its arguments.
            output: What it returned.
            watch: Called with the surrogate, before the output's value takes the place of its own.
        """
        if not is_float(output) and not any(is_float(value) for value in leaves(output)):
            raise RuleError(
                f"{self!r} cannot look into the {type(output).__name__} that {type(module).__name__} "
                "returns: it treats tensors, and tuples, lists and dicts of them. Put the rule on the "
                "modules inside."
            )
        surrogate = self.surrogate(module, inputs, output)
        if watch is not None:
            watch(surrogate)
        if surrogate is None:
            return None
        if isinstance(output, Tensor) and isinstance(surrogate, Tensor):
            self._check_shape(module, output, surrogate)
            return attach(output, surrogate, fresh=self.fresh)
        try:
            return mapped(lambda y, held: self._attached(module, y, held), output, surrogate)
        except (KeyError, TypeError, ValueError):
            raise RuleError(
                f"{self!r} on {type(module).__name__} gave surrogates of another structure than the "
                "output: give one tensor for each tensor of it."
            ) from None

    def _attached(self, module: nn.Module, output: Any, surrogate: Any) -> Any:
        if not is_float(output):
            return output
        if not is_float(surrogate):
            raise RuleError(
                f"{self!r} on {type(module).__name__} gave a {type(surrogate).__name__} for an output "
                f"of shape {tuple(output.shape)}: a surrogate is a tensor of that shape."
            )
        self._check_shape(module, output, surrogate)
        return attach(output, surrogate)

    def _check_shape(self, module: nn.Module, output: Tensor, surrogate: Tensor) -> None:
        if surrogate.shape != output.shape:
            raise RuleError(
                f"{self!r} on {type(module).__name__} gave a surrogate of shape "
                f"{tuple(surrogate.shape)} for an output of shape {tuple(output.shape)}."
            )

    def check(self, module: nn.Module) -> str | None:
        """Why the rule cannot sit on this module, or None where it can. Asked before any run."""
        return None

    def register(self, module: nn.Module) -> RemovableRuleHandle:
        """Puts the rule on ``module`` for every LRP call until the handle is removed.

        The module is not touched: the library remembers the rule beside it. A rule put on by hand
        goes before the mapper's.

        Raises:
            RuleError: If the rule cannot sit on this module.

        >>> layer = nn.Linear(2, 2)
        >>> with Rule().register(layer):
        ...     registered(layer)
        Rule()
        >>> registered(layer) is None
        True
        """
        if not isinstance(module, nn.Module):
            raise RuleError(f"{self!r} registers on a module, not on a {type(module).__name__}.")
        reason = self.check(module)
        if reason:
            raise RuleError(f"{self!r} cannot sit on {type(module).__name__}: {reason}")
        return RemovableRuleHandle(self, module)

    def __repr__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({given})"


RuleMapper = Callable[[str, nn.Module], Rule | None]
"""From a submodule's path and the submodule to its rule, or None for the plain gradient."""


class RemovableRuleHandle:
    """A rule's place on a module; ``remove()`` or the end of a ``with`` block takes it off.

    Args:
        rule: The rule.
        module: The module; held weakly.
    """

    def __init__(self, rule: Rule, module: nn.Module) -> None:
        self._rule = rule
        self._module = weakref.ref(module)
        with _LOCK:
            _REGISTERED.setdefault(id(module), []).append(self)
            weakref.finalize(module, _REGISTERED.pop, id(module), None)
            _CHANGES[0] += 1

    @property
    def rule(self) -> Rule:
        """The rule that was registered."""
        return self._rule

    def remove(self) -> None:
        """Takes the rule off; doing so twice does nothing."""
        module = self._module()
        if module is None:
            return
        with _LOCK:
            _CHANGES[0] += 1
            kept = [handle for handle in _REGISTERED.get(id(module), []) if handle is not self]
            if kept:
                _REGISTERED[id(module)] = kept
            else:
                _REGISTERED.pop(id(module), None)

    def __enter__(self) -> RemovableRuleHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


_LOCK = threading.Lock()
_CHANGES = [0]
_REGISTERED: dict[int, list[RemovableRuleHandle]] = {}  # by identity: modules may define equality


def changes() -> int:
    """How often rules were put on or taken off by hand: tells whether a plan is still current."""
    return _CHANGES[0]


def registered(module: nn.Module) -> Rule | None:
    """The rule that was last put on the module by hand, if any."""
    handles = _REGISTERED.get(id(module))
    return handles[-1].rule if handles else None


def is_float(value: Any) -> bool:
    """Whether a value is a floating-point tensor, which relevance can flow through."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _through_relevance(rule: Rule, module: nn.Module, inputs: Inputs, output: Any) -> Any:
    """The output behind a node that turns gradients into relevance, asks the rule, and back."""
    tensors = inputs.tensors
    compiling = torch.compiler.is_compiling()
    if compiling or any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):  # pyright: ignore
        raise RuleError(
            f"{rule!r} on {type(module).__name__}: a rule written as relevance() cannot run inside vmap "
            "or other function transforms, as agents and ensembles do, and cannot be compiled. Write it "
            "as surrogate()."
        )
    if differentiated_again():
        raise RuleError(
            f"{rule!r} on {type(module).__name__}: what a rule written as relevance() gives cannot be "
            "differentiated again, as create_graph=True asks for. Write it as surrogate()."
        )
    plain = Inputs(mapped(_detached, tuple(inputs)), mapped(_detached, inputs.kwargs))
    job = _Job(rule, module, plain, mapped(_detached, output), isinstance(output, Tensor))
    found = iter(_Border.apply(job, *tensors))  # pyright: ignore[reportArgumentType]
    return mapped(lambda value: next(found) if is_float(value) else value, output)


@dataclass
class _Job:
    """What a border needs to know in the backward pass; all without graphs."""

    rule: Rule
    module: nn.Module
    inputs: Inputs
    output: Any
    single: bool

    def share(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of the inputs, from those of the outputs."""
        values = [value for value in leaves(self.output) if is_float(value)]
        arriving = [g * nonzero(value) for g, value in zip(grads, values, strict=True)]
        asked = arriving[0] if self.single else tuple(arriving)
        found = self.rule.relevance(self.module, self.inputs, self.output, asked)
        shares = (found,) if isinstance(found, Tensor) else found
        tensors = self.inputs.tensors
        good = isinstance(shares, tuple | list) and all(isinstance(s, Tensor) for s in shares)
        if not good or [s.shape for s in shares] != [x.shape for x in tensors]:
            got = [tuple(s.shape) for s in shares] if good else type(found).__name__
            raise RuleError(
                f"{self.rule!r} on {type(self.module).__name__}: relevance() gave {got} for inputs of "
                f"shapes {[tuple(x.shape) for x in tensors]}. Return one tensor for each, of its shape."
            )
        return tuple(s / nonzero(x) for s, x in zip(shares, tensors, strict=True))


class _Border(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.job = job
        return tuple(value.clone() for value in leaves(job.output) if is_float(value))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.job.share(grads)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
