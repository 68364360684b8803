"""Attacks and corruptions side by side: how large, how far the score moved, how often it flipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook_like.attribution.bounds import Box
from tdhook_like.attribution.method import Targets
from tdhook_like.errors import InputError
from tdhook_like.keys import as_tuple, shortest
from tdhook_like.metrics.table import aligned
from tdhook_like.robustness.change import Change
from tdhook_like.robustness.corruptions import GaussianNoise
from tdhook_like.robustness.lead import Lead
from tdhook_like.score import Score
from tdhook_like.targets import Each, as_targets

__all__ = ["AttackComparator", "Comparison", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What one change did.

    Attributes:
        score: The mean score, of all elements.
        flipped: The share of elements whose score is beyond the threshold.
        largest: By key, the mean over elements of the largest change of a feature.
        length: By key, the mean over elements of the change's Euclidean length.
    """

    score: float
    flipped: float
    largest: Mapping[NestedKey, float]
    length: Mapping[NestedKey, float]


@dataclass(frozen=True)
class Comparison:
    """What several changes did to one batch. Prints as a table.

    Attributes:
        outcomes: By name; ``"(unchanged)"`` first.
        n_elements: How many elements that is the mean over.
    """

    outcomes: Mapping[str, Outcome]
    n_elements: int

    def to_dict(self) -> dict[str, float]:
        """Flat names for a logger, such as ``"pgd/flipped"`` and ``"pgd/largest/observation"``."""
        found = {}
        for name, outcome in self.outcomes.items():
            found[f"{name}/score"] = outcome.score
            found[f"{name}/flipped"] = outcome.flipped
            for kind in ("largest", "length"):
                for key, value in getattr(outcome, kind).items():
                    found[f"{name}/{kind}/{'.'.join(as_tuple(key))}"] = value
        return found

    def __str__(self) -> str:
        keys = list(next(iter(self.outcomes.values())).largest)
        names = [".".join(as_tuple(key)) for key in keys]
        rows: list[Sequence[str]] = [["change", "score", "flipped", *(f"max |{n}|" for n in names)]]
        for name, outcome in self.outcomes.items():
            sizes = [f"{outcome.largest[key]:.3g}" for key in keys]
            rows.append([name, f"{outcome.score:.4g}", f"{outcome.flipped:.1%}", *sizes])
        return "\n".join([*aligned(rows), f"means over {self.n_elements} elements"])


@dataclass(frozen=True)
class _Placed(Change):
    """Inputs that were changed before."""

    values: Mapping[NestedKey, Tensor] = field(kw_only=True)

    def changed(
        self, score: Score, sizes: Sequence[Tensor], limits: Sequence[Box], n: int
    ) -> list[Tensor]:
        """The values as they are."""
        by_key = {as_tuple(key): value for key, value in self.values.items()}
        found = [by_key[as_tuple(key)] for key in score.keys]
        return [value.expand(n, *value.shape) for value in found]


class AttackComparator:
    """Measures attacks and corruptions by one and the same score.

    The model is observed: nothing of it and no generator changes, and nothing is written.

    Args:
        changes: Attacks and corruptions by name; those without a target take the one below.
        target: The score that all are measured by, whatever each was aimed at; the lead of the
            greedy action by default. One number per element.
        threshold: Where a decision has flipped: the score is below.

    Raises:
        InputError: If there is nothing to compare, or something that is no change.

    >>> import torch
    >>> from tensordict import TensorDict
    >>> from tdhook_like.robustness import FGSM, Lead
    >>> net = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.eye_(net.weight)
    >>> comparator = AttackComparator(
    ...     {"fgsm": FGSM(Lead("logits"), epsilon=0.5), "noise": GaussianNoise(epsilon=0.01)}
    ... )
    >>> td = TensorDict({"x": torch.tensor([[1.0, 0.5], [3.0, 0.0]])}, [2])
    >>> print(comparator.compare(net, td, in_keys=["x"], out_keys=["logits"]))
    change       score  flipped  max |x|
    (unchanged)   1.75     0.0%        0
    fgsm          0.75    50.0%      0.5
    noise        1.745     0.0%   0.0186
    means over 2 elements
    """

    def __init__(
        self, changes: Mapping[str, Change], target: Targets = None, threshold: float = 0.0
    ) -> None:
        wrong = [name for name, change in changes.items() if not isinstance(change, Change)]
        if not changes or wrong:
            raise InputError(
                f"Give attacks or corruptions by name, at least one; got {dict(changes)!r}."
            )
        self.changes = dict(changes)
        self.target = Lead("logits") if target is None else target
        named = as_targets(self.target)
        if len(named) > 1 or isinstance(next(iter(named.values())), Each):
            raise InputError("Changes are compared by one number per element: give one target.")
        self.threshold = threshold

    def compare(
        self,
        module: nn.Module,
        td: TensorDictBase,
        in_keys: Any = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> Comparison:
        """Changes a batch in every way, and looks at what that does.

        Args:
            module: The model; see :meth:`Method.prepare`, also for ``in_keys`` and ``out_keys``.
            td: The batch; it is left as it is.
            in_keys: See :meth:`Method.prepare`.
            out_keys: See :meth:`Method.prepare`.

        Raises:
            TdhookLikeError: As :meth:`Method.prepare` and calls do.
            InputError: If a change has several targets.
        """
        outcomes: dict[str, Outcome] = {}
        nothing = GaussianNoise(self.target, epsilon=0.0)
        for name, given in {"(unchanged)": nothing, **self.changes}.items():
            # Without a target of its own, it is aimed at what all are measured by.
            change = given.replaced(target=self.target) if given.target is None else given
            with change.prepare(module, in_keys, out_keys) as hooked:
                found = hooked.observe(td.copy())
                keys = hooked.context.keys or tuple(hooked.context.in_keys)
            changed = found.get(change.root)
            pairs = {}
            for key in keys:
                value, old = changed.get(key, None), td.get(key)
                if not isinstance(old, Tensor) or not old.is_floating_point():
                    continue
                if value is None or value.shape != old.shape:
                    raise InputError(f"{name!r} has several targets: it is compared with one.")
                pairs[shortest(as_tuple(key))] = (value, old)
            outcomes[name] = self._outcome(module, td, pairs, in_keys, out_keys)
        return Comparison(outcomes, max(td.numel(), 1))

    def _outcome(
        self,
        module: nn.Module,
        td: TensorDictBase,
        pairs: Mapping[NestedKey, tuple[Tensor, Tensor]],
        in_keys: Any,
        out_keys: Sequence[NestedKey] | None,
    ) -> Outcome:
        # Bound at the same inputs for all, so that what was chosen stays what it was.
        probe = _Placed(self.target, values={key: value for key, (value, _) in pairs.items()})
        with probe.prepare(module, in_keys, out_keys) as hooked:
            score = hooked.observe(td.copy()).get(probe.gap_root)
        dims = td.batch_dims
        sizes = {
            key: (value - old).abs().unsqueeze(-1).flatten(dims).double()
            for key, (value, old) in pairs.items()
        }
        return Outcome(
            score=score.double().mean().item(),
            flipped=(score < self.threshold).double().mean().item(),
            largest={key: size.amax(-1).mean().item() for key, size in sizes.items()},
            length={key: size.norm(dim=-1).mean().item() for key, size in sizes.items()},
        )
