"""The binding of a method to a model: ``HookContext``, and what entering it gives, ``HookedModule``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase, is_tensor_collection
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import nn

from tdhook_like.attribution.lrp.functions.lookup import functions_of
from tdhook_like.attribution.lrp.ledger.recorder import Ledger
from tdhook_like.attribution.lrp.plan import RulePlan
from tdhook_like.attribution.lrp.rules.rule import changes
from tdhook_like.baselines import check as check_baselines
from tdhook_like.call import Call
from tdhook_like.columns import TargetColumns
from tdhook_like.defaults import default_target, recurrent_modules
from tdhook_like.errors import ContextError, KeyNotFoundError, ModelError, TargetError, listed
from tdhook_like.hooks.scratch import Scratch
from tdhook_like.keys import as_tuple, check_known, key_list, shortest
from tdhook_like.paths import Selection, select, unwrapped, walk
from tdhook_like.ports import is_port
from tdhook_like.runner import Runner
from tdhook_like.shadow import is_scripted
from tdhook_like.targets import Output, Target, as_targets

if TYPE_CHECKING:
    from tdhook_like.attribution.method import Method

__all__ = ["HookContext", "HookedModule"]


class HookContext:
    """A method bound to a model; entering it gives the :class:`HookedModule`.

    Everything that can be checked without data is checked here. Prints what will be done: target,
    keys, the rules' plan and, once it is known, how further evaluations are stacked. A context can be
    entered again once it was left.

    Args:
        method: What is explained and how.
        module: A TensorDictModule, or any ``nn.Module`` with ``in_keys`` and ``out_keys``.
        in_keys: See :meth:`Method.prepare`.
        out_keys: See :meth:`Method.prepare`.

    Raises:
        ModelError: If the module cannot be explained.
        KeyNotFoundError: If a key does not exist.
        PathError: If a path, glob or type matches no submodule.
        TargetError: If no target is given and the model has no obvious one.
        RuleError: If a rule does not fit its module.

    >>> from tdhook_like import Saliency
    >>> print(Saliency(("y", 0)).prepare(nn.Linear(2, 2), in_keys=["x"], out_keys=["y"]))
    Saliency of TensorDictModule
      target       Output('y', 0)
      keys         'x'
      written at   ('attr', 'x')
    """

    def __init__(
        self,
        method: Method,
        module: nn.Module,
        in_keys: Sequence[NestedKey] | Mapping[str, NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        self.method = method
        self.module, subset = _as_td_module(module, in_keys, out_keys)
        inner = unwrapped(self.module)
        if not isinstance(inner, TensorDictModuleBase):
            raise ModelError(f"{type(inner).__name__} is not a TensorDictModule.")
        self.model: TensorDictModuleBase = inner
        # Paths are those of the module that the user gave, not of what it is wrapped in.
        self.tree = inner if inner is unwrapped(module) else unwrapped(module)
        self.in_keys = [shortest(as_tuple(key)) for key in _unique(self.model.in_keys)]
        self.out_keys = [shortest(as_tuple(k)) for k in self.model.out_keys if k != "_"]
        self._walked = list(walk(self.tree))
        self.keys = self._attributed(subset)
        self.targets = self._targets()
        self.at = _selection(self.tree, method.at)
        self.activations = _selection(self.tree, method.activations)
        #: What is captured, by path.
        self.captures: dict[str, nn.Module] = {}
        for selection in (self.at, self.activations):
            self.captures.update(selection.modules if selection else {})
        #: The submodules that targets read, by path.
        self.units = self._units()
        self.captures.update(self.units)
        #: Those whose outputs further evaluations read or set.
        self.ports = self.units if method.single_pass else {**self.units, **self._at_modules()}
        #: How evaluations at changed outputs of a submodule are stacked, by its path.
        self.layouts_at: dict[str, dict[int, str]] = {}
        self._plan = self._planned()
        parts = [module for _, module, first in self._walked if first]
        around = [] if self.tree is self.model else [self.model]
        self.runner = Runner(self.module, self.model, [*around, *parts])
        self.reads_keys = all(target.reads_keys for target in self.targets.values())
        #: How further evaluations are stacked, by the number of batch dimensions.
        self.layouts: dict[int, str] = {}
        #: Whether the model draws random numbers in evaluation mode; None until it was run.
        self.draws: bool | None = None
        self._recurrent = recurrent_modules([m for _, m, _ in self._walked])
        #: Whether targets do not depend on what a call gives; then they are bound once per shape.
        self.targets_are_fixed = all(type(target) is Output for target in self.targets.values())
        self.bound: dict[Any, TargetColumns] = {}
        #: Whether a differentiable run repeats the plain call bit for bit, by what was tried out.
        self.one_run: dict[Any, bool] = {}
        #: How often function rules were applied, and functions without one met, by name.
        self.functions = method.functions or functions_of(method.rules)
        self.applied: Counter[str] = Counter()
        self.unhandled: Counter[str] = Counter()
        #: Where relevance went in the latest call, if that is asked for.
        self.ledger: Ledger | None = None
        #: Memory that the calls' temporaries are borrowed from while the context is open.
        self.scratch = Scratch()
        self._open: HookedModule | None = None
        self._check_roots()
        known = (*(self._explained_keys() or self.in_keys), *self._at_modules())
        check_baselines(getattr(method, "baselines", None), known)

    def __enter__(self) -> HookedModule:
        if self._open is not None:
            raise ContextError(
                "This context is entered already. Call prepare() again for one beside it."
            )
        self._open = HookedModule(self)
        return self._open

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open is not None:
            self._open._close()
        self._open = None
        self.layouts.clear()
        self.layouts_at.clear()
        self.one_run.clear()
        self.bound.clear()
        self.scratch.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Always raises: what can be called is what entering the context gives."""
        raise ContextError(
            "A context is not called itself: `with method.prepare(module) as hooked: hooked(td)`."
        )

    observe = __call__

    def __str__(self) -> str:
        method = self.method
        keys = self._explained_keys()
        lines = [f"{type(method).__name__} of {type(self.model).__name__}"]
        for name, target in self.targets.items():
            lines.append(f"  target       {f'{name} = ' if name else ''}{target!r}")
        lines.append(f"  keys         {listed(keys)}")
        lines.append(f"  written at   {listed(self.written())}")
        for dims, layout in self.layouts.items():
            lines.append(f"  stacking     {layout} ({dims} batch dimensions)")
        if self.plan is not None:
            lines += ["  rules", *("    " + row for row in str(self.plan).splitlines())]
        for title, counts in (("functions", self.applied), ("no rule", self.unhandled)):
            if counts:
                names = ", ".join(f"{name}() × {n}" for name, n in sorted(counts.items()))
                lines.append(f"  {title:<12} {names}")
        return "\n".join(lines)

    def written(self) -> list[NestedKey]:
        """The keys that results go to, as far as they are known without data."""
        method = self.method
        if not method.writes_keys:
            return []
        named = [(method.root, name) if name else (method.root,) for name in self.targets]
        keys = self._explained_keys()
        found: list[NestedKey] = [
            shortest((*root, *as_tuple(key))) for root in named for key in keys
        ]
        if method.sampled:
            found += [
                shortest((method.error_root, *([name] if name else []), *as_tuple(key)))
                for name in self.targets
                for key in keys
            ]
        if method.complete:
            found += [
                shortest((method.gap_root, n) if n else (method.gap_root,)) for n in self.targets
            ]
        return found

    @property
    def plan(self) -> RulePlan | None:
        """Which rule every submodule gets, or None for a method without rules."""
        if self._plan is not None and self._plan.changes != changes():
            self._plan = self._planned()  # a rule was put on or taken off by hand
        return self._plan

    def _planned(self) -> RulePlan | None:
        mapper = self.method.rules
        if mapper is None:
            return None
        feeds_zeros = getattr(self.method, "feeds_zeros", False)
        return RulePlan(self.tree, mapper, feeds_zeros, self._walked)

    @property
    def time_is_mixed(self) -> bool:
        """Whether the model runs over whole trajectories at the moment, time its last batch dimension."""
        return any(module.recurrent_mode for module in self._recurrent)

    def _attributed(self, subset: Sequence[NestedKey] | None) -> tuple[NestedKey, ...] | None:
        if subset is not None and self.method.keys is not None:
            raise KeyNotFoundError(
                "Attributed keys are named twice: in the method's keys and in prepare's in_keys."
            )
        asked = self.method.keys if subset is None else subset
        if asked is None:
            return None
        if not asked and not self.method.at:
            raise KeyNotFoundError("No keys are left to attribute: name at least one.")
        check_known(asked, self.in_keys, "in_keys of the model")
        return tuple(shortest(as_tuple(key)) for key in asked)

    def _targets(self) -> dict[str | None, Target]:
        given = self.method.target
        if given is None:
            return {None: default_target(self.model, self.out_keys)}
        targets = as_targets(given)
        known = {as_tuple(key) for key in (*self.out_keys, *self.in_keys)}
        prefixes = {key[:n] for key in known for n in range(1, len(key) + 1)}
        for target in targets.values():
            for key in target.reads:
                if self.out_keys and not is_port(key) and as_tuple(key) not in prefixes:
                    raise TargetError(
                        f"{target!r}: the model does not write {key!r}. It writes "
                        f"{listed(self.out_keys)}."
                    )
        return targets

    def _explained_keys(self) -> tuple[NestedKey, ...]:
        return tuple(self.in_keys) if self.keys is None else self.keys

    def _at_modules(self) -> dict[str, nn.Module]:
        return dict(self.at.modules) if self.at is not None else {}

    def _units(self) -> dict[str, nn.Module]:
        paths = {
            as_tuple(key)[2]: None
            for target in self.targets.values()
            for key in target.reads
            if is_port(key)
        }
        return {path: select(self.tree, [path]).modules[path] for path in paths}

    def _check_roots(self) -> None:
        method = self.method
        taken = {as_tuple(key)[0] for key in (*self.in_keys, *self.out_keys)}
        for name in ("root", "at_root", "activations_root", "gap_root", "error_root"):
            if getattr(method, name) in taken:
                raise KeyNotFoundError(
                    f"Results would go under {getattr(method, name)!r}, which is a key of the model. "
                    f"Give another {name}=."
                )


class HookedModule(TensorDictModuleBase):
    """A model that is explained as it is called: it stands wherever the model stood.

    ``hooked(td)`` is the plain call, and writes attributions beside its outputs. ``observe`` changes
    nothing of the model: it writes attributions alone. Calls with tensors instead of a TensorDict
    work as on the model and give the attributions behind the outputs.

    >>> import torch
    >>> from tdhook_like import Saliency
    >>> with Saliency("y").prepare(nn.Linear(2, 1), in_keys=["x"], out_keys=["y"]) as hooked:
    ...     y, relevance = hooked(torch.ones(4, 2))
    >>> y.shape, relevance.shape
    (torch.Size([4, 1]), torch.Size([4, 2]))
    """

    def __init__(self, context: HookContext) -> None:
        super().__init__()
        self._context: HookContext | None = context
        self.module = context.module
        keys: Any = list(context.in_keys), [*context.out_keys, *context.written()]
        self.in_keys, self.out_keys = keys
        self.training = context.module.training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args or not is_tensor_collection(args[0]) or self._forward_hooks:
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model and explains the run.

        Args:
            args: A TensorDict; or tensors, one for each in_key.
            kwargs: ``tensordict_out`` for results to go elsewhere; or tensors by in_key.

        Returns:
            The same TensorDict, outputs and attributions written; or a tuple of tensors, one for
            each out_key.

        Raises:
            TdhookLikeError: One of its subclasses; model, TensorDict and RNG are as before.
        """
        td = args[0] if args else kwargs.pop("tensordict", None)
        if is_tensor_collection(td):
            return self._explain(
                td, kwargs.pop("tensordict_out", None), args[1:], kwargs, drive=True
            )
        self._opened()
        return self._from_tensors(*args, **kwargs)

    @dispatch(auto_batch_size=False)
    def _from_tensors(self, tensordict: TensorDictBase) -> TensorDictBase:
        return Call(self._opened(), tensordict, undeclared=True).drive(tensordict)

    def observe(
        self, tensordict: TensorDictBase, tensordict_out: TensorDictBase | None = None
    ) -> TensorDictBase:
        """Explains what the model would do at ``tensordict``, and changes nothing of the model.

        The model is evaluated in evaluation mode on a shadow of its modules, with the RNG forked. An
        action that stands in the TensorDict is the one that is explained. No outputs are written.

        Args:
            tensordict: The inputs.
            tensordict_out: Where attributions go; ``tensordict`` itself by default.

        Returns:
            Where attributions were written.
        """
        return self._explain(tensordict, tensordict_out, (), {}, drive=False)

    def _explain(
        self, td: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, drive: bool
    ) -> Any:
        context = self._opened()
        if not is_tensor_collection(td):
            raise ContextError(f"A TensorDict is needed, got {type(td).__name__}.")
        if args or kwargs:
            raise ContextError(
                f"Beside a TensorDict, only tensordict_out is understood; got {len(args)} more "
                f"arguments and {listed(kwargs)}."
            )
        call = Call(context, td)
        destination = td if out is None else out
        return call.drive(destination) if drive else call.observe(destination)

    @property
    def ledger(self) -> Ledger | None:
        """Where relevance went in the latest call, under ``LRP(ledger=True)``; else None."""
        return self._opened().ledger

    @property
    def context(self) -> HookContext:
        """The context that this module belongs to; raises :class:`ContextError` once it was left."""
        return self._opened()

    def _opened(self) -> HookContext:
        if self._context is None:
            raise ContextError(
                "This hooked module's context was left. Call it inside its `with` block, or enter the "
                "context again."
            )
        return self._context

    def _close(self) -> None:
        self._context = None

    def train(self, mode: bool = True) -> HookedModule:
        """Switches the model, as on the plain module."""
        super().train(mode)
        return self


def _as_td_module(
    module: nn.Module, in_keys: Any, out_keys: Sequence[NestedKey] | None
) -> tuple[nn.Module, Sequence[NestedKey] | None]:
    """The model as a TensorDictModule, and the subset of in_keys that is asked for."""
    if isinstance(module, HookedModule):
        module = module.module
    if not isinstance(module, nn.Module):
        name = module.__name__ if isinstance(module, type) else type(module).__name__
        raise ModelError(
            f"prepare() takes an nn.Module, got {name}"
            + (", a class: give an instance." if isinstance(module, type) else ".")
            + " Wrap a function in a TensorDictModule."
        )
    if is_scripted(module):
        raise ModelError(
            f"{type(module).__name__} holds TorchScript, which runs outside Python: no hook sees "
            "inside. Explain the module that it was scripted from."
        )
    inner = unwrapped(module)
    if isinstance(inner, TensorDictModuleBase):
        if out_keys is not None:
            raise KeyNotFoundError("out_keys belong to plain modules; this one names its own.")
        return module, None if in_keys is None else key_list(in_keys)
    if in_keys is None or out_keys is None:
        raise KeyNotFoundError(
            f"{type(inner).__name__} is a plain module: say which keys it reads and writes, "
            'prepare(module, in_keys=["observation"], out_keys=["value"]).'
        )
    reads: Any = dict(in_keys) if isinstance(in_keys, Mapping) else key_list(in_keys)
    writes: Any = key_list(out_keys)
    if not reads or not writes:
        raise KeyNotFoundError("A plain module needs at least one in_key and one out_key.")
    for key in (*(reads.values() if isinstance(reads, dict) else reads), *writes):
        as_tuple(key)
    return TensorDictModule(module, in_keys=reads, out_keys=writes), None


def _selection(model: nn.Module, asked: tuple[Any, ...]) -> Selection | None:
    return select(model, asked) if asked else None


def _unique(keys: Sequence[NestedKey]) -> list[NestedKey]:
    return list(dict.fromkeys(shortest(as_tuple(key)) for key in keys))
