"""The binding of several methods to one model, whose attributions are added up as it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook_like.call import Call
from tdhook_like.context import HookContext, HookedModule
from tdhook_like.errors import ContextError, TargetError, listed
from tdhook_like.keys import as_tuple, check_writable, place
from tdhook_like.randomness import rng_state
from tdhook_like.runner import Undo

if TYPE_CHECKING:
    from tdhook_like.attribution.combined import AttributionSum

__all__ = ["CombinedContext", "CombinedModule"]


class CombinedContext(HookContext):
    """Several methods bound to one model.

    Args:
        method: Which methods, and what each one counts.
        module: The model.
        in_keys: See :meth:`Method.prepare`.
        out_keys: See :meth:`Method.prepare`.

    >>> from tdhook_like import InputXGradient, Saliency
    >>> from tdhook_like.attribution.combined import AttributionMean
    >>> mean = AttributionMean(InputXGradient(("y", 0)), Saliency(("y", 0)))
    >>> print(mean.prepare(nn.Linear(2, 2), in_keys=["x"], out_keys=["y"]))
    AttributionMean of TensorDictModule
      target       Output('y', 0)
      keys         'x'
      written at   ('attr', 'x')
      0.5 × InputXGradient of TensorDictModule
        target       Output('y', 0)
        keys         'x'
        written at   ('attr', 'x')
      0.5 × Saliency of TensorDictModule
        target       Output('y', 0)
        keys         'x'
        written at   ('attr', 'x')
    """

    def __init__(
        self,
        method: AttributionSum,
        module: nn.Module,
        in_keys: Sequence[NestedKey] | Mapping[str, NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        super().__init__(method, module, in_keys, out_keys)
        self.weights = method.weights
        #: The binding of each method.
        self.parts = [part.prepare(module, in_keys, out_keys) for part in method.parts()]

    def __enter__(self) -> HookedModule:
        super().__enter__()
        for part in self.parts:
            part.__enter__()
        self._open = CombinedModule(self)
        return self._open

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        for part in self.parts:
            part.__exit__(kind, error, trace)

    def __str__(self) -> str:
        lines = [super().__str__()]
        for weight, part in zip(self.weights, self.parts, strict=True):
            first, *rest = str(part).splitlines()
            lines += [f"  {weight:g} × {first}", *(f"  {line}" for line in rest)]
        return "\n".join(lines)


class CombinedModule(HookedModule):
    """A model that is explained by several methods as it is called.

    The plain call is made once, and explained by the first method; the others observe what it gave.

    >>> import torch
    >>> from tdhook_like import InputXGradient
    >>> from tdhook_like.attribution.combined import AttributionSum
    >>> twice = AttributionSum(InputXGradient("y"), InputXGradient("y"))
    >>> with twice.prepare(nn.Linear(2, 1), in_keys=["x"], out_keys=["y"]) as hooked:
    ...     y, relevance = hooked(torch.ones(4, 2))
    >>> relevance.shape
    torch.Size([4, 2])
    """

    def _explain(
        self, td: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, drive: bool
    ) -> Any:
        context = self._combined()
        if not isinstance(td, TensorDictBase) or args or kwargs:
            # The base class knows what to say of these; a tensorclass holds a TensorDict.
            if hasattr(td, "_tensordict") and not (args or kwargs):
                self._run(context, td._tensordict, out, drive=drive)
                return td if out is None else out
            return super()._explain(td, out, args, kwargs, drive=drive)
        return self._run(context, td, out, drive=drive)

    @dispatch(auto_batch_size=False)
    def _from_tensors(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._run(self._combined(), tensordict, None, drive=True, undeclared=True)

    def _combined(self) -> CombinedContext:
        context = self._opened()
        assert isinstance(context, CombinedContext)
        return context

    def _run(
        self,
        context: CombinedContext,
        td: TensorDictBase,
        out: TensorDictBase | None,
        *,
        drive: bool,
        undeclared: bool = False,
    ) -> TensorDictBase:
        destination = td if out is None else out
        first, *others = context.parts
        source = td.copy()
        if not drive:
            check_writable(destination, context.written())
            found = [_observed(part, source, undeclared) for part in context.parts]
            _add_up(context, found, destination)
            return destination
        tensors = [value for value in td.values(True, True) if isinstance(value, Tensor)]
        undo = Undo(context.runner, rng_state(tensors))
        try:
            result = Call(first, td, undeclared).drive(destination)
            read = {as_tuple(key) for key in context.in_keys}
            for key in context.out_keys:
                value = result.get(key, None)
                if value is not None and as_tuple(key) not in read:
                    source.set(key, value)
            found = [result, *(_observed(part, source, undeclared) for part in others)]
            if first.method.complete and not context.method.complete:
                del result[context.method.gap_root]  # a gap of one part alone
            _add_up(context, found, result)
        except BaseException:
            undo.all()
            raise
        return result


def _observed(part: HookContext, source: TensorDictBase, undeclared: bool) -> TensorDictBase:
    return Call(part, source.copy(), undeclared).observe(source.copy())


def _add_up(
    context: CombinedContext, found: Sequence[TensorDictBase], destination: TensorDictBase
) -> None:
    method, weights = context.method, context.weights
    keys = context.keys or tuple(context.in_keys)
    made: list[tuple[tuple[str, ...], NestedKey, Tensor]] = []
    for name in context.targets:
        named = () if name is None else (name,)
        for key in keys:
            root = (method.root, *named)
            parts = _values(found, root, key)
            if parts:
                made.append((root, key, _weighted(parts, weights, key)))
            root = (method.error_root, *named)
            errors = [
                (w * w, td.get((*root, *as_tuple(key)), None))
                for w, td in zip(weights, found, strict=True)
            ]
            squares = [w * error.square() for w, error in errors if error is not None]
            if method.sampled and squares:
                made.append((root, key, sum(squares[1:], squares[0]).sqrt()))
        if method.complete:
            *root, last = (method.gap_root, *named)
            made.append(
                (tuple(root), last, _weighted(_values(found, tuple(root), last), weights, last))
            )
    for root, key, value in made:
        place(destination, root, key, value)


def _values(found: Sequence[TensorDictBase], root: tuple[str, ...], key: NestedKey) -> list[Tensor]:
    values = [td.get((*root, *as_tuple(key)), None) for td in found]
    there = [value for value in values if isinstance(value, Tensor)]
    if there and len(there) < len(values):
        raise ContextError(f"Not every method attributes {key!r}: give all of them the same keys.")
    return there


def _weighted(parts: Sequence[Tensor], weights: Sequence[float], key: NestedKey) -> Tensor:
    shapes = [tuple(part.shape) for part in parts]
    if len(set(shapes)) > 1:
        raise TargetError(
            f"The methods give attributions of {key!r} of different shapes, {listed(shapes)}: their "
            "targets are not as many."
        )
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total = total + weight * part
    return total
