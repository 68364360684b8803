"""The life of one call: keys, leaves, score, method, write."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tdhook_like.attribution.method import Attribution, GradientMethod, PathMethod
from tdhook_like.baselines import resolve
from tdhook_like.errors import InputError, KeyNotFoundError, TargetError, listed
from tdhook_like.hooks.installation import Handler, Installation
from tdhook_like.keys import as_tuple, check_writable, place, shortest
from tdhook_like.runner import direct, restore_rng, rng_state
from tdhook_like.score import Captured, Evaluation, Score, TargetColumns
from tdhook_like.shadow import Shadow
from tdhook_like.targets import Each, Reference

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = ["CompletenessWarning"]


class CompletenessWarning(UserWarning):
    """Attributions miss the sum that they promise by more than the tolerance."""


class Call:
    """One call of a hooked module on one TensorDict.

    Args:
        context: The method and the model.
        td: The inputs; not written to by anything here but :meth:`drive` and :meth:`observe`.
        undeclared: Whether batch dimensions may lie in the tensors without being declared by ``td``,
            as in a call with tensors. They are then read off the outputs.

    Raises:
        KeyNotFoundError: If an attributed key is missing.
        InputError: If an input is not finite or cannot be attributed.
    """

    def __init__(self, context: HookContext, td: TensorDictBase, undeclared: bool = False) -> None:
        self._context, self._td, self._undeclared = context, td, undeclared
        self._method = context.method
        self._inputs = _attributed(context, td)
        self._reached: set[str] = set()
        self._shadow: Shadow | None = None

    def drive(self, destination: TensorDictBase) -> TensorDictBase:
        """The plain call, and its explanation; outputs and attributions go to ``destination``."""
        context = self._context
        check_writable(destination, context.out_keys)
        grad_enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        one_run = isinstance(self._method, GradientMethod) and context.runner.explains_itself(
            grad_enabled and not inference
        )
        with self._undone_on_error():
            if one_run:
                with _differentiable(inference):
                    evaluation = self._evaluate(context.runner.run, shadow=False)
                    outputs = evaluation.outputs
                    attribution = self._explain(evaluation)
            else:
                private = _private(self._td)
                outputs = context.runner.plain(private)
                with _differentiable(inference), self._unobserved():
                    attribution = self._explain_apart(outputs)
            result = self._written(outputs, destination)
            self._write(result, attribution)
        return result

    def observe(self, destination: TensorDictBase) -> TensorDictBase:
        """The explanation alone: nothing of the model, its buffers or the RNG changes."""
        check_writable(destination, self._context.written())
        with (
            self._undone_on_error(),
            _differentiable(torch.is_inference_mode_enabled()),
            self._unobserved(),
        ):
            attribution = self._explain_apart(None)
            self._write(destination, attribution)
        return destination

    # --- what is evaluated -----------------------------------------------------------------------

    def _evaluate(self, run: Any, *, shadow: bool, plain: TensorDictBase | None = None) -> Evaluation:
        """A differentiable run at the inputs themselves; targets are bound at ``plain``'s outputs."""
        leaves = tuple(self._leaf(x) for x in self._inputs.values())
        others = [key for key in self._context.in_keys if key not in self._inputs]
        private = _private(self._td, others)
        clone = self._context.runner.overwrites
        for key, leaf in zip(self._inputs, leaves, strict=True):
            private.set(key, leaf.clone() if clone else leaf)
        captured = Captured()
        try:
            with self._installed(captured, shadow):
                outputs = run(private)
        except RuntimeError as error:
            self._explain_failure(error)
            raise
        self._declare(outputs)
        targets = self._bound(outputs if plain is None else plain, observed=shadow and plain is None)
        scores = targets(outputs, outputs.batch_dims)
        self._check_scores(scores, outputs.batch_dims)
        self._targets = targets
        return Evaluation(leaves, outputs, scores, captured)

    def _explain(self, evaluation: Evaluation) -> Attribution:
        assert isinstance(self._method, GradientMethod)
        self._check_reached()
        attribution = self._method.attribute(evaluation)
        self._batch_dims = evaluation.outputs.batch_dims
        self._captured = evaluation.captured
        return attribution

    def _explain_apart(self, plain: TensorDictBase | None) -> Attribution:
        """Explains on a shadow; targets are bound at what the plain call wrote, if there was one."""
        shadow = self._shadow = Shadow(self._context.model)

        def run(td: TensorDictBase) -> TensorDictBase:
            return direct(shadow.model, td)

        if plain is not None:
            plain = _private(plain)
            for key, value in self._td.items():
                if key not in plain.keys():  # noqa: SIM118 (a TensorDict is not a dict)
                    plain.set(key, value)
            self._declare(plain)
        method = self._method
        if isinstance(method, GradientMethod):
            return self._explain(self._evaluate(run, shadow=True, plain=plain))
        assert isinstance(method, PathMethod)
        if plain is None:
            with torch.no_grad(), self._installed(Captured(), shadow=True):
                outputs = run(_private(self._td, self._context.in_keys))
            self._declare(outputs)
            self._targets = self._bound(outputs, observed=True)
        else:
            self._targets = self._bound(plain, observed=False)
            outputs = plain
        template = _private(self._td, self._context.in_keys)
        if self._undeclared:
            template.batch_size = outputs.batch_size
        keys, inputs = tuple(self._inputs), tuple(x.detach() for x in self._inputs.values())
        score = Score(
            run,
            lambda: self._installed(Captured(), shadow=True),
            template,
            keys,
            inputs,
            self._targets,
            self._context.layouts,
            getattr(method, "internal_batch_size", None),
        )
        baselines = resolve(getattr(method, "baselines", None), template, keys, inputs)
        attribution = method.attribute(score, baselines)
        self._check_reached()
        self._batch_dims = len(score.batch)
        self._captured = self._activations(run) if self._context.activations else Captured()
        return attribution

    def _activations(self, run: Any) -> Captured:
        captured = Captured()
        with torch.no_grad(), self._installed(captured, shadow=True):
            run(_private(self._td, self._context.in_keys))
        return captured

    def _leaf(self, x: Tensor) -> Tensor:
        if self._method.create_graph and x.requires_grad:
            return x.view_as(x)
        return (x.detach().clone() if x.is_inference() else x.detach()).requires_grad_()

    def _declare(self, outputs: TensorDictBase) -> None:
        """Batch dimensions that a call with tensors did not declare, read off inputs and outputs."""
        if not self._undeclared:
            return
        shapes = [x.shape for x in self._inputs.values()]
        found = [outputs.get(key, None) for key in self._context.out_keys]
        shapes += [value.shape for value in found if isinstance(value, Tensor)]
        dims = 0
        while all(len(s) > dims + 1 and s[dims] == shapes[0][dims] for s in shapes):
            dims += 1
        outputs.batch_size = shapes[0][:dims]

    def _bound(self, outputs: TensorDictBase, *, observed: bool) -> TargetColumns:
        context = self._context
        recorded = self._td if observed else None
        reference = Reference(
            outputs, outputs.batch_dims, context.model, tuple(context.out_keys), recorded
        )
        return TargetColumns(context.targets, reference)

    # --- hooks and guards ------------------------------------------------------------------------

    def _installed(self, captured: Captured, shadow: bool) -> Any:
        """Rules and captures on, for this thread and the length of a block."""
        context = self._context
        if context.plan is None and context.at is None and context.activations is None:
            return nullcontext()
        of = self._shadow.of if shadow and self._shadow is not None else _same
        after, before = context.plan.hooks(self._reached, of) if context.plan else ({}, {})
        chosen: dict[str, nn.Module] = {}
        for selection in (context.at, context.activations):
            chosen.update(selection.modules if selection else {})
        for path, original in chosen.items():
            module = of(original)
            after[module] = _capturing(captured, path, after.get(module))
        return Installation(after, before)

    @contextmanager
    def _unobserved(self) -> Iterator[None]:
        """The RNG as it was, whatever happens inside."""
        state = rng_state(list(self._inputs.values()))
        try:
            yield
        finally:
            restore_rng(state)

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """On an error, RNG and (of a model that is training) buffers as they were."""
        state = rng_state(list(self._inputs.values()))
        held = self._context.runner.buffers_in_training()
        buffers = [(b, b.detach().clone(), b._version) for b in held]
        try:
            yield
        except BaseException:
            restore_rng(state)
            for buffer, saved, version in buffers:
                if buffer._version != version:
                    buffer.data.copy_(saved)
                    torch._C._autograd._unsafe_set_version_counter((buffer,), (version,))
            raise

    def _explain_failure(self, error: RuntimeError) -> None:
        if "leaf Variable that requires grad" in str(error):
            raise InputError(
                "The model overwrites one of its inputs in place, which cannot be differentiated: "
                f"attributed keys are {listed(self._inputs)}. Let it work on a copy, or attribute "
                "other keys."
            ) from error

    def _check_reached(self) -> None:
        plan = self._context.plan
        if plan is not None and self._method.unreached == "raise":
            plan.check_reached(self._reached)

    def _check_scores(self, scores: Tensor, dims: int) -> None:
        if not isfinite(scores.detach().sum().item()):
            bad = (~torch.isfinite(scores)).flatten(dims).any(-1).sum().item()
            if bad:
                raise TargetError(
                    f"The target is NaN or Inf in {bad} of {scores[..., 0].numel()} batch elements: "
                    f"{listed(self._context.targets.values())}."
                )

    # --- writing ---------------------------------------------------------------------------------

    def _written(self, outputs: TensorDictBase, destination: TensorDictBase) -> TensorDictBase:
        """What the plain call would have written, into ``destination``; what it would return."""
        if outputs.batch_size != destination.batch_size and not self._undeclared:
            for key, value in list(outputs.items(True, True)):
                outputs.set(key, _plain(value))
            return outputs  # the model returns a TensorDict of its own making
        if self._context.runner.writes_out_keys:
            for key in self._context.out_keys:
                _set(destination, outputs, key, _plain(outputs.get(key)))
            return destination
        before = self._td
        lazy = isinstance(outputs, LazyStackedTensorDict)
        declared = {as_tuple(key) for key in self._context.out_keys}
        for key, value in outputs.items(True, True, is_leaf=_is_leaf):
            flat = as_tuple(key)
            if flat in declared or before.get(key, None) is None or (
                not lazy and flat not in self._input_paths() and before.get(key) is not value
            ):  # fmt: skip
                _set(destination, outputs, key, _plain(value))
        return destination

    def _input_paths(self) -> set[tuple[str, ...]]:
        return {as_tuple(key) for key in self._inputs}

    def _write(self, td: TensorDictBase, attribution: Attribution) -> None:
        """Attributions, activations and gaps under their keys."""
        method, dims = self._method, self._batch_dims
        for name, columns in self._targets.slices.items():
            root = (method.root,) if name is None else (method.root, name)
            several = isinstance(self._context.targets[name], Each)
            for key, found in zip(self._inputs, attribution.inputs, strict=True):
                value = found[columns].movedim(0, dims) if several else found[columns.start]
                place(td, root, key, self._out(value))
            at_root = (method.at_root,) if name is None else (method.at_root, name)
            for path in self._context.at.modules if self._context.at else ():
                calls = attribution.modules.get(path, [])
                values = [
                    v[columns].movedim(0, min(dims, v.ndim - 1)) if several else v[columns.start]
                    for v in calls
                ]
                _write_calls(td, at_root, path, [self._out(v) for v in values])
            if attribution.gap is not None:
                gap = attribution.gap[..., columns] if several else attribution.gap[..., columns.start]
                gap_key = (method.gap_root,) if name is None else (method.gap_root, name)
                place(td, gap_key[:-1], gap_key[-1:], gap)
        if self._context.activations:
            for path in self._context.activations.modules:
                calls = [v.detach().clone() for v in self._captured.outputs.get(path, [])]
                _write_calls(td, (method.activations_root,), path, calls)
        self._warn_of_gap(attribution)

    def _out(self, value: Tensor) -> Tensor:
        return value if self._method.create_graph else value.detach()

    def _warn_of_gap(self, attribution: Attribution) -> None:
        tolerance = getattr(self._method, "gap_tolerance", None)
        if attribution.gap is None or attribution.scale is None or tolerance is None:
            return
        if not attribution.gap.numel():
            return
        gap, scale = attribution.gap.abs(), attribution.scale
        allowed = tolerance * torch.maximum(scale, scale.mean()).clamp_min(1e-12)
        large = (gap > allowed).sum().item()
        if large:
            worst = (gap / scale.clamp_min(1e-12)).max().item()
            warnings.warn(
                f"{type(self._method).__name__}: attributions miss score(input) - score(baseline) by "
                f"more than {tolerance:.0%} in {large} of {gap.numel()} cases (at worst {worst:.0%}). "
                "Take more n_steps, or a baseline at which the model is smooth; gaps are at "
                f"{self._method.gap_root!r}.",
                CompletenessWarning,
                stacklevel=6,
            )


def _attributed(context: HookContext, td: TensorDictBase) -> dict[NestedKey, Tensor]:
    """The attributed keys and their values; checks that they can be attributed."""
    asked = context.keys
    found: dict[NestedKey, Tensor] = {}
    for key in context.in_keys if asked is None else asked:
        value = td.get(key, None)
        if isinstance(value, Tensor) and value.is_floating_point():
            # A sum is NaN or Inf if an entry is; if it overflowed, the entries are looked at.
            if not isfinite(value.detach().sum().item()) and not torch.isfinite(value).all():
                raise InputError(
                    f"The input {key!r} holds NaN or Inf in "
                    f"{int((~torch.isfinite(value)).sum())} of {value.numel()} entries: no attribution "
                    "can be given."
                )
            found[key] = value
        elif asked is not None:
            if value is None:
                raise KeyNotFoundError(
                    f"The TensorDict has no key {key!r}. It has "
                    f"{listed(shortest(as_tuple(k)) for k in td.keys(True, True))}."
                )
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"{key!r} is {kind}; only floating-point tensors can be attributed. Convert it, or "
                "attribute what the model embeds it to, with at=."
            )
    if found:
        return found
    missing = [key for key in context.in_keys if td.get(key, None) is None]
    if missing:
        raise KeyNotFoundError(
            f"The TensorDict has none of {listed(missing)}, which the model reads. It has "
            f"{listed(shortest(as_tuple(k)) for k in td.keys(True, True))}."
        )
    if context.at is not None:
        return found
    raise InputError(
        f"None of {listed(context.in_keys)} is a floating-point tensor: nothing can be attributed. "
        "Attribute what the model embeds them to, with at=."
    )


@contextmanager
def _differentiable(inference: bool) -> Iterator[None]:
    """Gradients on, whatever the caller has set; collectors run under no_grad."""
    if inference:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    else:
        with torch.enable_grad():
            yield


def _private(td: TensorDictBase, reads: Iterable[NestedKey] = ()) -> TensorDictBase:
    """A shallow copy to run the model on; inference tensors at ``reads`` are copied for good."""
    private = td.copy()
    for key in reads:
        value = td.get(key, None)
        if isinstance(value, Tensor) and value.is_inference():  # it cannot be part of a graph
            private.set(key, value.clone())
    return private


def _capturing(captured: Captured, path: str, rule: Handler | None) -> Handler:
    def handle(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if rule is not None:
            changed = rule(module, args, kwargs, output)
            output = output if changed is None else changed
        found = [v for v in tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]
        captured.outputs.setdefault(path, []).extend(found)
        # What is captured must not be overwritten by an in-place successor.
        return output.clone() if isinstance(output, Tensor) else output

    return handle


def _write_calls(
    td: TensorDictBase, root: tuple[str, ...], path: str, calls: list[Tensor]
) -> None:
    """What one submodule gave: at its path, or at (path, "0"), (path, "1"), … for several."""
    if len(calls) == 1:
        td.set((*root, path or "(root)"), calls[0])
        return
    for i, value in enumerate(calls):
        td.set((*root, path or "(root)", str(i)), value)


def _same(module: nn.Module) -> nn.Module:
    return module


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _is_leaf(kind: type) -> bool:
    return not issubclass(kind, TensorDictBase)


def _set(destination: TensorDictBase, source: TensorDictBase, key: NestedKey, value: Any) -> None:
    flat = as_tuple(key)
    if len(flat) > 1:
        place_like(destination, source, flat, value)
    else:
        destination.set(flat[0], value)


def place_like(
    destination: TensorDictBase, source: TensorDictBase, path: tuple[str, ...], value: Any
) -> None:
    """Writes a nested output, its parents with the batch sizes that the model gave them."""
    for name in path[:-1]:
        inner = source.get(name)
        if destination.get(name, None) is None:
            destination.set(name, inner.empty())
        destination, source = destination.get(name), inner
    destination.set(path[-1], value)

