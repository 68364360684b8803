"""What the parts of this room share: a hooked module that only observes, and its log entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import nn

from tdhook_like.attribution.method import Method
from tdhook_like.context import HookContext, HookedModule
from tdhook_like.errors import ContextError, InputError
from tdhook_like.metrics import key_shares
from tdhook_like.targets import Each

__all__ = ["Explains", "LoggedShares", "Observer"]

Explains = Method | HookContext | HookedModule
"""A method (with the module beside it), what it was prepared to, or what entering that gave."""

MASK = ("collector", "mask")


class Observer:
    """A hooked module that observes, whoever prepared it.

    Args:
        explains: A method; or a context or hooked module that was made from one.
        module: What is explained, where ``explains`` is a method.

    Raises:
        ContextError: If a module is missing, or given twice.
    """

    def __init__(self, explains: Explains, module: nn.Module | None = None) -> None:
        self._entered: HookContext | None = None
        if isinstance(explains, Method):
            if module is None:
                raise ContextError(
                    f"Which module is {type(explains).__name__} to explain? Name it."
                )
            explains = explains.prepare(module)
        elif module is not None:
            raise ContextError(
                f"A {type(explains).__name__} is bound to its module already; leave {module!r} out."
            )
        if isinstance(explains, HookContext):
            self._entered = explains
            self.hooked = explains.__enter__()
        elif isinstance(explains, HookedModule):
            self.hooked = explains
        else:
            raise ContextError(
                f"Give a method and a module, or a prepared module; got {type(explains).__name__}."
            )
        # Asked now, so that a left context is reported here and not in the middle of a training.
        self.context = self.hooked._opened()

    def observe(self, td: TensorDictBase) -> TensorDictBase:
        """Attributions written into ``td``; see :meth:`HookedModule.observe`."""
        return self.hooked.observe(td)

    def close(self) -> None:
        """Leaves the context, where it was entered here; one that was handed in stays open."""
        if self._entered is not None:
            self._entered.__exit__(None, None, None)
        self._entered = None


class LoggedShares:
    """Each key's share of the absolute relevance in a batch, under flat names for a logger.

    Args:
        observer: Explains the batch.
        prefix: What the names begin with.
        statistics: Which of ``"share"``, ``"relevance"``, ``"absolute"``, ``"first"`` are wanted.
        max_rows: At most so many rows (along the first batch dimension) are explained.
        n_resamples: For the intervals; see :func:`tdhook_like.metrics.key_shares`.
    """

    def __init__(
        self,
        observer: Observer,
        prefix: str,
        statistics: Sequence[str],
        max_rows: int | None,
        n_resamples: int,
    ) -> None:
        known = ("share", "relevance", "absolute", "first")
        wrong = [name for name in statistics if name not in known]
        if wrong or isinstance(statistics, str) or not statistics:
            raise InputError(f"statistics={statistics!r}: choose some of {known}.")
        if max_rows is not None and max_rows < 1:
            raise InputError(f"max_rows={max_rows!r} must be at least 1, or None for all rows.")
        self._observer, self._prefix, self._max_rows = observer, prefix, max_rows
        self._ends = tuple(f"/{name}{end}" for name in statistics for end in ("", "_low", "_high"))
        self._n_resamples = n_resamples

    def of(self, batch: TensorDictBase) -> dict[str, float]:
        """The shares in a batch ``[*B]``, which is left as it is; padding does not count."""
        if self._max_rows is not None and batch.batch_dims:
            batch = cast(TensorDictBase, batch[: self._max_rows])
        # What the policy wrote as it acted is another explanation; none of its keys may count here.
        td = self._observer.observe(batch.exclude(self._observer.context.method.root))
        mask = MASK if td.get(MASK, None) is not None else None
        logged: dict[str, float] = {}
        for name, index in self._targets(td):
            shares = key_shares(
                td,
                self._observer.context.method.root,
                target=name,
                index=index,
                mask=mask,
                n_resamples=self._n_resamples,
            )
            parts = [part for part in (self._prefix, name, index) if part not in (None, "")]
            stem = "".join(f"{part}/" for part in parts)
            for key, value in shares.to_dict().items():
                if key.endswith(self._ends):
                    logged[stem + key] = value
        return logged

    def _targets(self, td: TensorDictBase) -> list[tuple[str | None, int | None]]:
        """Every target by its name, and by its number where a target is every output apart."""
        found: list[tuple[str | None, int | None]] = []
        context = self._observer.context
        for name, target in context.targets.items():
            if not isinstance(target, Each):
                found.append((name, None))
                continue
            root: NestedKey = (
                (context.method.root,) if name is None else (context.method.root, name)
            )
            first = next(iter(td.get(root).values(True, True)))
            found += [(name, index) for index in range(first.shape[td.batch_dims])]
        return found
