"""Attributions that exist already, as a method: to be measured, or added up, like any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.method import Attribution, PathMethod, Targets
from tdhook_like.attribution.wrapper import keys_only
from tdhook_like.errors import ContextError, InputError, KeyNotFoundError, listed
from tdhook_like.keys import as_tuple, shortest
from tdhook_like.score import Score
from tdhook_like.targets import Each, as_targets

__all__ = ["Given"]


@dataclass(frozen=True, init=False)
class Given(PathMethod):
    """Attributions that exist already: another library's, random ones, or those of an earlier call.

    They are laid out as a method writes them: by key, ``[*B, *F]``, as the key's values are; under
    the targets' names first, where these are named; ``[*B, targets, *F]`` for :class:`Each`.

    Args:
        attributions: Where they are. A root in the TensorDict that is explained, such as
            ``"captum"`` for ``td["captum", *key]``: batches may then be cut as one likes. Or the
            attributions of one batch by key: a mapping, or a TensorDict such as ``td["attr"]``.
        target: What they are of: what a measure scores. See :class:`Method`, also for the keyword
            arguments.

    Raises:
        KeyNotFoundError: If ``attributions`` is neither; in a call, if there are none for a key.
        ContextError: If submodules or rules are named.
        InputError: In a call, if shapes do not fit, or an attribution is NaN or Inf.

    >>> from tensordict import TensorDict
    >>> from tdhook_like.metrics import Deletion
    >>> net = torch.nn.Linear(3, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 4.0, 2.0]]))
    >>> theirs = {"x": torch.tensor([[0.1, 0.2, 0.3]])}
    >>> with Deletion(Given(theirs, "y")).prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked.observe(TensorDict({"x": torch.ones(1, 3)}, [1]))
    >>> td["deletion"]  # the last feature first, by their account
    tensor([[7., 5., 1., 0.]])
    """

    attributions: NestedKey | dict[tuple[str, ...], Tensor] = field(kw_only=True)

    #: They are known of the explained inputs, and of no others.
    only_here: ClassVar[bool] = True

    def __init__(
        self,
        attributions: NestedKey | Mapping[Any, Any] | TensorDictBase,
        target: Targets = None,
        **options: Any,
    ) -> None:
        given: Any = attributions
        if isinstance(given, Mapping | TensorDictBase):
            given = dict(_leaves(given))
            if not given:
                raise KeyNotFoundError("Given: there are no attributions: name at least one key's.")
        else:
            given = shortest(as_tuple(given))
        self._settle("attributions", given)
        PathMethod.__init__(self, target, **options)

    def __post_init__(self) -> None:
        """Refuses what only a method with a gradient could mean."""
        super().__post_init__()
        keys_only(self)
        if self.rules is not None or self.functions is not None:
            raise ContextError("Given reads attributions, no gradient: leave rules= out.")

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Looks them up."""
        targets = as_targets(self.target) if self.target is not None else {None: None}
        columns = score.scores([x.unsqueeze(0) for x in score.inputs]).shape[-1]
        found = []
        for key, x in zip(score.keys, score.inputs, strict=True):
            parts = [
                self._of(score, key, x, name, several=isinstance(target, Each))
                for name, target in targets.items()
            ]
            whole = torch.cat(parts)
            if len(whole) != columns:
                raise InputError(
                    f"Given: there are attributions of {key!r} for {len(whole)} targets, and the score "
                    f"{score.what} has {columns}."
                )
            found.append(whole)
        return Attribution(found)

    def _of(
        self, score: Score, key: NestedKey, x: Tensor, name: str | None, *, several: bool
    ) -> Tensor:
        """The attributions of a key for one named target, ``[n, *B, *F]``."""
        place = (*(() if name is None else (name,)), *as_tuple(key))
        values = self._at(score, place)
        dims, extra = len(score.batch), values.ndim - x.ndim
        # An ensemble's members are dimensions of their own, ahead of the targets'.
        fits = extra == several or (name is None and extra > several)
        if not fits or values.shape[:dims] + values.shape[dims + extra :] != x.shape:
            each = " with a dimension of targets behind the batch dimensions" if several else ""
            raise InputError(
                f"Given: the attributions at {shortest(place)!r} have shape {tuple(values.shape)}, where "
                f"{tuple(x.shape)} is needed{each}. If batches differ from call to call, write "
                "attributions into the TensorDict, and give their root."
            )
        if not torch.isfinite(values).all():
            raise InputError(f"Given: the attributions at {shortest(place)!r} hold NaN or Inf.")
        values = values.detach().to(x)
        return values.flatten(dims, dims + extra - 1).movedim(dims, 0) if extra else values[None]

    def _at(self, score: Score, place: tuple[str, ...]) -> Tensor:
        if isinstance(self.attributions, dict):
            values, there = self.attributions.get(place), list(map(shortest, self.attributions))
            where = "among them"
        else:
            root = as_tuple(self.attributions)
            values = _entry(score.template, (*root, *place))
            there = list(map(shortest, map(as_tuple, score.template.keys(True, True))))
            where, place = "in the TensorDict", (*root, *place)
        if not isinstance(values, Tensor):
            raise KeyNotFoundError(
                f"Given: there are no attributions at {shortest(place)!r} {where}. There is "
                f"{listed(there)}."
            )
        return values


def _leaves(tree: Any, before: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Tensor]]:
    """Every tensor of nested mappings, by its whole key."""
    found = []
    for key, value in tree.items():
        path = (*before, *as_tuple(key))
        if isinstance(value, Mapping | TensorDictBase):
            found += _leaves(value, path)
        elif isinstance(value, Tensor):
            found.append((path, value))
        else:
            raise InputError(
                f"Given: {shortest(path)!r} is a {type(value).__name__}, not a tensor: convert it, "
                "torch.as_tensor(…)."
            )
    return found


def _entry(td: Any, path: tuple[str, ...]) -> Any:
    """What stands at a path, or None: also where a part of the way is a tensor."""
    for name in path:
        if td is None or isinstance(td, Tensor):
            return None
        td = td.get(name, None)
    return td
