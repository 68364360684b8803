"""The life of one call: read the keys, make leaves, run model and rules, ask the method, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook_like.attribution.cuts import at_submodules
from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.ledger.recorder import Recorder
from tdhook_like.attribution.method import Attribution, GradientMethod, PathMethod, by_member
from tdhook_like.baselines import resolve
from tdhook_like.captured import Captured
from tdhook_like.checks import (
    check_destination,
    check_reached,
    check_scores,
    explain_failure,
    tell_of,
)
from tdhook_like.columns import TargetColumns, joined, members_last
from tdhook_like.errors import (
    InputError,
    PathError,
    TdhookLikeError,
)
from tdhook_like.hooks.functional import Functions
from tdhook_like.hooks.surrogate import Twice
from tdhook_like.installed import GradientsOn, installed
from tdhook_like.keys import as_tuple
from tdhook_like.layout import Run
from tdhook_like.ports import Ports, with_ports
from tdhook_like.randomness import ForeignDraws, OwnDraws, moved, restore_rng, rng_state
from tdhook_like.reading import attributed, declare, private_copy, same_bits
from tdhook_like.runner import Undo, View, direct
from tdhook_like.score import Evaluation, Score
from tdhook_like.shadow import Itself, Shadow, is_stateless, stand_in
from tdhook_like.targets import AtStep, Reference
from tdhook_like.writing import Written, results, write, write_outputs

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = ["Call"]

RunAt = Callable[[TensorDictBase, Mapping[NestedKey, Tensor]], Any]
"""A run on a TensorDict with other values at some keys; gives the outputs."""


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
        self._inputs = attributed(context, td)
        ledger = getattr(self._method, "ledger", False) is not False
        self._flow = Flow(recorder=Recorder() if ledger else None)
        twice = self._method.create_graph and context.plan is not None
        self._twice = Twice() if twice else None
        self._own: TensorDictBase | None = None
        self._batch = td.batch_size  # of where results go
        self._observing = False
        self._state = rng_state(list(self._inputs.values()))

    def drive(self, destination: TensorDictBase) -> TensorDictBase:
        """The plain call, and its explanation; outputs and attributions go to ``destination``."""
        runner, method = self._context.runner, self._method
        check_destination(self._context, destination, self._context.out_keys)
        grads, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        undo = Undo(runner, self._state)
        try:
            if isinstance(method, GradientMethod) and self._is_one_run(grads, inference):
                # The plain call is differentiated itself.
                light = self._is_light and self._flow.recorder is None
                run, captured = runner.view if light else self._filled(runner.run), Captured()
                # Rules stay on for the backward pass, in which checkpointed blocks run again.
                with GradientsOn(inference), self._ruled(captured, _same):
                    evaluation, targets = self._evaluate(run, captured)
                    outputs = evaluation.outputs
                    found = self._combined(method, evaluation, targets)
                own = self._own
            else:
                outputs, own, found = self._apart(grads, inference)
            batch = destination.batch_size if own is None else own.batch_size
            made = results(self._context, batch, found)
            result = write_outputs(self._context, self._td, outputs, destination, own)
            write(self._context, result, made, found)
        except BaseException:
            undo.all()
            raise
        return result

    def _apart(
        self, grads: bool, inference: bool
    ) -> tuple[TensorDictBase | View, TensorDictBase | None, Written]:
        """The plain call (its outputs, the TensorDict of its own if it made one), and what explains it.

        A method that runs the model at the inputs anyway gives what the plain call would. That it
        does, bit for bit, is seen where both are made, once for inputs of the same shapes.
        """
        known, tried = self._context.one_run, (grads, inference, self._shapes())
        may = isinstance(self._method, PathMethod) and self._method.runs_inputs
        may = may and self._is_light and self._context.targets_are_fixed
        may = may and not self._context.runner.is_wrapped
        may = may and is_stateless(self._context.model)
        if may and known.get(tried):
            with GradientsOn(inference):
                found = self._explained(None, Itself(self._context.model))
            outputs = found.attribution.outputs
            return self._plainly() if outputs is None else outputs, None, found
        outputs = self._plainly()
        own = self._own  # which the explanation's runs overwrite
        with GradientsOn(inference):
            found = self._explained(None if isinstance(outputs, View) else outputs)
        if may and tried not in known and len(known) < 256:
            seen = found.attribution.outputs
            known[tried] = seen is not None and same_bits(outputs, seen, self._context.out_keys)
        return outputs, own, found

    def _shapes(self) -> tuple[Any, ...]:
        return tuple((key, x.shape, x.dtype, x.device) for key, x in self._inputs.items())

    def _plainly(self) -> TensorDictBase | View:
        """The plain call; without a TensorDict of its outputs where nobody would miss one."""
        context = self._context
        if self._is_light and context.targets_are_fixed and not context.runner.is_wrapped:
            return self._attempt(context.runner.view, self._td, {})
        private = private_copy(self._td)
        return self._returned(private, self._attempt(context.runner.plain, private))

    @property
    def _is_light(self) -> bool:
        """Whether the model just reads its in_keys, and writes its out_keys."""
        context = self._context
        return context.runner.writes_out_keys and context.reads_keys and not self._undeclared

    def observe(self, destination: TensorDictBase) -> TensorDictBase:
        """The explanation alone: nothing of the model, its buffers or the RNG changes."""
        check_destination(self._context, destination, self._context.written())
        self._observing, self._batch = True, destination.batch_size
        with GradientsOn(torch.is_inference_mode_enabled()):
            found = self._explained(None)
        write(
            self._context,
            destination,
            results(self._context, destination.batch_size, found),
            found,
        )
        return destination

    def _foreign(self, shadow: Shadow | Itself) -> AbstractContextManager[None]:
        """Keeps Python's and numpy's generators as they are, where code may run that draws."""
        context = self._context
        known = context.targets_are_fixed and context.plan is None
        if known and self._draws_no_baselines and isinstance(shadow, Itself):
            return nullcontext()
        return ForeignDraws()

    @property
    def _draws_no_baselines(self) -> bool:
        given = getattr(self._method, "baselines", None)
        return given is None or isinstance(given, int | float | Tensor)

    def _is_one_run(self, grads: bool, inference: bool) -> bool:
        """Whether a differentiable run gives, bit for bit, what the plain call gives.

        Compiled code does not see rules. And torch has code paths that depend on whether gradients
        are on or an operand requires them, with other last bits: that is tried out, once for inputs
        of the same shapes, on a shadow and with the RNG put back.
        """
        if self._context.runner.is_wrapped:
            return False
        known, tried = self._context.one_run, (grads, inference, self._shapes())
        if tried not in known:
            with GradientsOn(inference):  # what is made under inference mode takes part in no graph
                shadow = Shadow(self._context.model)
            copied = private_copy(self._td, self._context.in_keys, own=True)
            with ForeignDraws():
                plain = self._attempt(self._steady, shadow, copied)
            with GradientsOn(inference), ForeignDraws():
                run = self._filled(lambda td: self._steady(shadow, td))
                traced = self._attempt(run, self._td, self._fed(self._leaves()))
            if len(known) > 256:  # batches of ever new sizes
                known.clear()
            known[tried] = same_bits(plain, traced, self._context.out_keys)
        return known[tried]

    def _steady(self, shadow: Shadow | Itself, td: TensorDictBase) -> TensorDictBase:
        """Runs a shadow; if the model draws, then from generators of its own."""
        context = self._context
        if isinstance(shadow, Itself):  # nothing in it could draw
            return direct(shadow.model, td)
        if context.draws is False:
            state = rng_state(list(self._inputs.values()))
            outputs = direct(shadow.model, td)
            if not moved(state):
                return outputs
            # Either the model draws by now (exploration was off before, say), or another thread has.
            with OwnDraws(self._state) as draws:
                direct(Shadow(context.model).model, td)
            if draws.drew:
                restore_rng(state)
        else:
            # Each run starts alike: what is explained must not change from one to the next.
            with OwnDraws(self._state) as draws:
                outputs = direct(shadow.model, td)
        context.draws = draws.drew
        return outputs

    def _attempt(self, run: Callable[..., Any], *args: Any) -> Any:
        """``run(*args)``; where it fails for a reason that has a name, that is said."""
        mode = self._flow.mode
        try:
            if mode is not None:
                mode.running += 1
            return run(*args)
        except TdhookLikeError:
            raise
        except Exception as error:
            explain_failure(self._context, self._td, self._inputs, error)
            raise
        finally:
            if mode is not None:
                mode.running -= 1

    def _explained(
        self, plain: TensorDictBase | None, shadow: Shadow | Itself | None = None
    ) -> Written:
        """Explains on a shadow of the model, which no evaluation can leave a trace on.

        Args:
            plain: What the plain call wrote, where there was one; targets are bound there.
            shadow: What the explanation runs on, where that is known already.
        """
        shadow = stand_in(self._context.model) if shadow is None else shadow
        with self._foreign(shadow):
            return self._explained_on(shadow, plain)

    def _explained_on(self, shadow: Shadow | Itself, plain: TensorDictBase | None) -> Written:
        def run(td: TensorDictBase) -> TensorDictBase:
            return self._steady(shadow, td)

        reference = None
        if plain is not None:
            reference = private_copy(plain)
            if self._own is not None:
                for key, value in self._td.items():
                    if key not in reference.keys():  # noqa: SIM118 (a TensorDict is not a dict)
                        reference.set(key, value)
            self._declared(reference)
        method = self._method
        if isinstance(method, GradientMethod):
            captured = Captured()
            with self._ruled(captured, shadow.of):
                filled = self._filled(run)
                evaluated = self._evaluate(filled, captured, reference)
                return self._combined(method, *evaluated)
        assert isinstance(method, PathMethod)
        return self._along_path(method, run, shadow, reference)

    def _evaluate(
        self,
        run: RunAt,
        captured: Captured,
        reference: TensorDictBase | None = None,
    ) -> tuple[Evaluation, TargetColumns]:
        """A differentiable run at the inputs themselves, under what is installed."""
        context, plan = self._context, self._context.plan
        leaves = self._leaves()
        outputs = self._attempt(run, self._td, self._fed(leaves))
        captured.open = False
        self._declared(outputs)
        targets = self._bound(outputs if reference is None else reference)
        seen: Any = outputs
        if context.units:
            dims = outputs.batch_dims
            seen = with_ports(outputs, {p: captured.arranged(p, dims) for p in context.units})
        if self._flow.recorder is not None:
            seen = self._flow.recorder.outputs(seen, self._flow)
        scores = targets(seen, outputs.batch_dims)
        for part in scores:
            check_scores(context, part)
        # An ensemble gives a batch of its own, members first: each member is a target apart.
        own = outputs.batch_dims - self._td.batch_dims
        if own and not self._undeclared:
            scores = [members_last(joined(scores), own)]
        evaluation = Evaluation(
            tuple(leaves.values()),
            outputs,
            scores,
            captured,
            stopped=plan is not None and plan.stops,
            reaches_zeros=plan is not None and plan.reaches_zeros,
            twice=self._twice,
            recorder=self._flow.recorder,
            at=tuple(context.at.modules) if context.at is not None else (),
        )
        return evaluation, targets

    def _filled(self, run: Run) -> RunAt:
        """``run`` on a private copy of a TensorDict with other values at some keys."""

        def run_at(td: TensorDictBase, leaves: Mapping[NestedKey, Tensor]) -> TensorDictBase:
            others = [key for key in self._context.in_keys if key not in leaves]
            private = private_copy(td, others)
            for key, leaf in leaves.items():
                private.set(key, leaf)
            return self._returned(private, run(private))

        return run_at

    def _combined(
        self,
        method: GradientMethod,
        evaluation: Evaluation,
        targets: TargetColumns,
    ) -> Written:
        attribution = method.attribute(evaluation)
        # Behind the backward pass: what has no rule is counted once relevance arrives there.
        check_reached(self._context, self._flow)
        self._context.ledger = attribution.ledger
        return self._result(attribution, targets, evaluation.outputs, evaluation.captured)

    def _along_path(
        self,
        method: PathMethod,
        run: Run,
        shadow: Shadow | Itself,
        reference: TensorDictBase | None,
    ) -> Written:
        context, captured = self._context, Captured()
        known = None if reference is not None else self._bound_before()
        if known is not None:
            outputs, targets = known
        elif reference is None or context.activations is not None:
            with torch.no_grad(), self._ruled(captured, shadow.of):
                outputs = self._attempt(run, private_copy(self._td, context.in_keys, own=True))
            self._declared(outputs)
            targets = self._bound(outputs if reference is None else reference)
        else:
            outputs = reference
            targets = self._bound(reference)
        template = private_copy(self._td, context.in_keys, own=context.runner.overwrites)
        if self._undeclared:
            template.batch_size = outputs.batch_size  # pyright: ignore[reportAttributeAccessIssue]
        varied = self._inputs or self._floating(template)
        keys, inputs = tuple(varied), tuple(x.detach() for x in varied.values())
        plain = self._draws_no_baselines
        with nullcontext() if plain else OwnDraws(self._state):  # a buffer is sampled from
            baselines = resolve(getattr(method, "baselines", None), template, keys, inputs)
        ports, tried = Ports(context.ports), lambda td: self._attempt(run, td)
        score = Score(
            ports.around(tried) if ports.modules else tried,
            lambda functions=None, plain=False: self._ruled(
                None, shadow.of, functions, ports, plain
            ),
            template,
            keys,
            inputs,
            targets,
            context.layouts,
            getattr(method, "internal_batch_size", None),
            overwrites=context.runner.overwrites,
            baselines=baselines,
            view=self._view(shadow),
        )
        score.reads_all = len(keys) == len(context.in_keys)
        score.once = lambda asked: self._once(asked, run, shadow, reference)
        at = context.at is not None and method.own_at
        score.at_paths = tuple(context.at.modules) if context.at is not None and at else ()
        if at and not keys:
            raise InputError(
                f"{type(method).__name__} follows what changes between a baseline's inputs and these, "
                "and no key is attributed. IntegratedGradients(at=…) changes what a submodule gives."
            )
        shown = bool(self._inputs)
        attribution = method.attribute(score, baselines) if shown or at else Attribution([])
        if not shown:
            attribution.inputs, attribution.errors = [], None
        if context.at is not None and not at:
            at_submodules(method, score, context, attribution)
        check_reached(self._context, self._flow)
        tell_of(context, Counter(attribution.unhandled))
        return self._result(attribution, targets, outputs, captured)

    def _once(
        self,
        method: GradientMethod,
        run: Run,
        shadow: Shadow | Itself,
        reference: TensorDictBase | None,
    ) -> Attribution:
        """What a method of one run says of the inputs, where another one of many runs asks it."""
        captured, before = Captured(), (self._own, self._batch)
        try:
            with self._ruled(captured, shadow.of):
                evaluation, _ = self._evaluate(self._filled(run), captured, reference)
                found = method.attribute(evaluation)
        finally:
            self._own, self._batch = before  # what the plain call returned
        dims = evaluation.outputs.batch_dims
        found.modules = {
            path: [
                [captured.batch_first(column, path, i, dims) for column in columns]
                for i, columns in enumerate(calls)
            ]
            for path, calls in found.modules.items()
        }
        return found

    def _view(
        self, shadow: Shadow | Itself
    ) -> Callable[[TensorDictBase, Mapping[NestedKey, Tensor]], Any] | None:
        """A way to outputs at stacked inputs that makes no TensorDict, where nobody would miss one."""
        context, runner = self._context, self._context.runner
        if not (isinstance(shadow, Itself) and context.targets_are_fixed and not self._undeclared):
            return None
        if context.ports:
            return None
        written = {as_tuple(key) for key in context.out_keys}
        if not all(as_tuple(key) in written for t in context.targets.values() for key in t.reads):
            return None
        if not runner.writes_out_keys:
            return None
        return lambda td, leaves: self._attempt(runner.stacked_view, td, leaves)

    def _result(
        self, attribution: Attribution, targets: TargetColumns, outputs: Any, captured: Captured
    ) -> Written:
        context = self._context
        members = (
            ()
            if self._undeclared
            else outputs.batch_size[: outputs.batch_dims - self._td.batch_dims]
        )
        if members:
            # In front, as the model returns them, where there is a place for them; else behind.
            front = (
                self._batch[: len(members)] == members and len(self._batch) > self._td.batch_dims
            )
            attribution = by_member(attribution, members, 0 if front else self._td.batch_dims)
        dims = outputs.batch_dims
        for selection in (context.at, context.activations):
            for path in selection.named if selection else ():
                if path not in captured.outputs and not attribution.modules.get(path):
                    raise PathError(
                        f"The submodule {path!r} was never called, so there is nothing to write of it: "
                        "the forward skips it, or uses its weights directly."
                    )
        return Written(tuple(self._inputs), attribution, targets.slices, dims, captured)

    def _returned(self, given: TensorDictBase, outputs: TensorDictBase) -> TensorDictBase:
        """Outputs over what was given, where the model returns a TensorDict of its own making."""
        self._own = None if outputs is given else outputs
        if outputs is not given and not self._observing:
            self._batch = outputs.batch_size
        if outputs is given or outputs.batch_dims >= given.batch_dims:
            return outputs
        merged = given.copy()
        for key, value in outputs.items():
            merged.set(key, value)
        return merged

    def _leaves(self) -> dict[NestedKey, Tensor]:
        return {key: self._leaf(x) for key, x in self._inputs.items()}

    def _fed(self, leaves: dict[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
        """What the model is given for the leaves: copies, if it writes into its inputs."""
        if not self._context.runner.overwrites:
            return leaves
        return {key: leaf.clone() for key, leaf in leaves.items()}

    def _leaf(self, x: Tensor) -> Tensor:
        if self._method.create_graph and x.requires_grad:
            return x.view_as(x)
        return (x.clone() if x.is_inference() else x.detach()).requires_grad_()

    def _declared(self, outputs: Any) -> None:
        if self._undeclared:
            declare(outputs, list(self._inputs.values()), self._context.out_keys)

    def _floating(self, td: TensorDictBase) -> dict[NestedKey, Tensor]:
        """What leads to submodules, where they alone are attributed to."""
        found = {key: td.get(key, None) for key in self._context.in_keys}
        return {
            key: value
            for key, value in found.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }

    def _bound_before(self) -> tuple[View, TargetColumns] | None:
        """Targets that were bound in an earlier call, where a run would tell nothing new."""
        context = self._context
        if context.activations is not None or self._undeclared or context.time_is_mixed:
            return None
        shapes = [x.shape for x in self._inputs.values()]
        for (batch, *others), columns in context.bound.items():
            if (
                others == shapes
                and batch[len(batch) - self._td.batch_dims :] == self._td.batch_size
            ):
                return View(self._td, {}, batch), columns
        return None

    def _bound(self, outputs: Any) -> TargetColumns:
        context = self._context
        # An output's entry is the same for all inputs of the same shapes: it is bound once.
        mixed = context.time_is_mixed
        fixed = context.bound if context.targets_are_fixed and not mixed else {}
        tried = (outputs.batch_size, *[x.shape for x in self._inputs.values()])
        if tried in fixed:
            return fixed[tried]
        recorded = self._td if self._observing else None
        known = tuple(context.out_keys)
        reference = Reference(outputs, outputs.batch_dims, context.model, known, recorded)
        targets = context.targets
        if mixed and self._method.target is None:
            targets = {name: AtStep(target) for name, target in targets.items()}
        columns = TargetColumns(targets, reference, time_is_mixed=mixed)
        if context.targets_are_fixed and not mixed and len(fixed) < 256:
            fixed[tried] = columns
        return columns

    def _ruled(
        self,
        captured: Captured | None,
        of: Callable[[nn.Module], nn.Module],
        functions: Functions | None = None,
        ports: Ports | None = None,
        plain: bool = False,
    ) -> AbstractContextManager[object]:
        """Rules on, for this thread and the length of a block; see :func:`installed`."""
        context = self._context
        return installed(context, self._flow, self._twice, captured, of, functions, ports, plain)


def _same(module: nn.Module) -> nn.Module:
    return module
