"""DeepLift: what the score's difference from a baseline's is made of, by one comparison of two runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.differences import Tape, rule_of
from tdhook_like.attribution.method import Attribution, PathMethod
from tdhook_like.attribution.perturbation import Mean, whole_number
from tdhook_like.baselines import BaselineSpec, resolve
from tdhook_like.columns import joined
from tdhook_like.errors import BaselineError, ContextError, InputError, TargetError, listed
from tdhook_like.gradients import gradients
from tdhook_like.ports import calls_at, port
from tdhook_like.randomness import OwnDraws
from tdhook_like.runner import View
from tdhook_like.score import Score

__all__ = ["DeepLift", "DeepLiftShap"]

Baselines = BaselineSpec | Mapping[NestedKey, BaselineSpec] | None


@dataclass(frozen=True)
class DeepLift(PathMethod):
    """Differences from a baseline, passed back through every function by its multiplier.

    Two runs: at the baseline, and at the input, compared with the first function by function. A
    function of one number is rescaled (``Δy / Δx``), a product is shared between its operands, a
    maximum is carried by the winner; softmax, normalisations, attention and recurrent layers are made
    of these. Modules and functions are treated alike. Attributions sum to
    ``score(input) − score(baseline)``; what they miss it by, where a function without a rule takes part,
    is written at ``gap_root``, and these functions are named.

    At submodules (``at=``) it gives multiplier × difference of what the submodule gives, which sum
    alike over any set of submodules that everything runs through.

    Source: Shrikumar et al. 2017, eq. 1 to 3 and section 3.4 (rescale rule); products, maxima and
    what is made of them as derived in ``attribution/differences``.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        baselines: One for all keys or a dict by key: a number, a tensor, a callable, ``FromKey``,
            ``FromBuffer``; zeros by default.
        multiply_by_inputs: Whether to give multiplier × difference; the multipliers alone if not.
        gap_tolerance: A warning is given where the gap exceeds this share of the larger of the
            score's change and the mean size of such changes in the batch. None for no warning.

    Raises:
        ContextError: If it is given rules, which it has of its own.
        BaselineError: In a call, if the model takes another path at the baseline than at the input.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.ReLU())
    >>> _ = torch.nn.init.constant_(net[0].weight, 1.0)
    >>> with DeepLift("y", baselines=-2.0).prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[4.0, 0.0]])}, [1]))
    >>> td["attr", "x"], td["attr_gap"]  # 4 = 6 · ½ + 2 · ½
    (tensor([[3., 1.]]), tensor([0.]))
    """

    baselines: Baselines = field(default=None, kw_only=True)
    multiply_by_inputs: bool = field(default=True, kw_only=True)
    gap_tolerance: float | None = field(default=0.01, kw_only=True)

    complete: ClassVar[bool] = True
    own_at: ClassVar[bool] = True
    runs_inputs: ClassVar[bool] = True
    gap_advice: ClassVar[str] = (
        "Functions without a rule take part, or differences lose their digits (try float64)"
    )

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if self.rules is not None or self.functions is not None:
            raise ContextError(f"{type(self).__name__} has rules of its own; leave rules= out.")
        if self.gap_tolerance is not None and not self.gap_tolerance > 0:
            raise InputError(f"gap_tolerance must be above 0 or None, got {self.gap_tolerance!r}.")

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Compares the run at ``score.inputs`` with that at the baselines."""
        here, there = ([t.unsqueeze(0) for t in part] for part in (score.inputs, baselines))
        found = self.compared(score, here, there)
        found.inputs = [[column[0] for column in columns] for columns in found.inputs]
        if found.gap is not None and found.scale is not None:
            found.gap, found.scale = found.gap[0], found.scale[0]
        found.modules = {
            path: [[column[0] for column in columns] for columns in calls]
            for path, calls in found.modules.items()
        }
        return found

    def compared(
        self, score: Score, inputs: Sequence[Tensor], baselines: Sequence[Tensor]
    ) -> Attribution:
        """Attributions ``[k, *B, *features]`` of k inputs against k baselines, stacked."""
        assert score.layout  # tried out before the tape runs
        narrowed = None if score.at_paths else score.narrowed(baselines)
        if narrowed is not None:
            try:
                return self._compared(score, inputs, baselines, *narrowed)
            except BaselineError:  # some tensor has no batch dimension that could be told
                pass
        return self._compared(score, inputs, baselines, score, baselines)

    def _compared(
        self,
        score: Score,
        inputs: Sequence[Tensor],
        baselines: Sequence[Tensor],
        first: Score,
        starts: Sequence[Tensor],
    ) -> Attribution:
        """The same, the first run being that of another score, of all or one of the elements."""
        tape = Tape(rule_of)
        start = dict(zip(score.keys, starts, strict=True))
        leaves = {
            key: x.detach().requires_grad_() for key, x in zip(score.keys, inputs, strict=True)
        }
        with score.installed(tape.mode):
            with torch.no_grad():
                parts, outputs = tape.mode.watched(first.evaluated, start)
            before = joined(parts)
            there = {path: calls_at(outputs, path) for path in score.at_paths}
            for path, calls in there.items():
                for i, value in enumerate(calls):
                    leaves[port(path, i, "add")] = torch.zeros_like(value).requires_grad_()
            tape.compare(narrow=0 if first is score else score.batch[0])
            parts, outputs = tape.mode.watched(score.evaluated, leaves)
        _check_finite(before, score, "baseline")
        found = gradients(parts, list(leaves.values()))
        after, n = joined(parts).detach(), len(inputs)
        _check_finite(after, score, "input")
        ends = list(zip(inputs, baselines, strict=True))
        for path, calls in there.items():
            ends += zip(calls_at(outputs, path), calls, strict=True)
        shares = [_times([g[i] for g in found], x.detach() - b) for i, (x, b) in enumerate(ends)]
        gap, scale = None, None
        if n:
            gap, scale = _missed(shares[:n], before, after, self.gap_tolerance or math.inf)
        if not self.multiply_by_inputs:
            shares = [[g[i] for g in found] for i in range(len(ends))]
        rest = iter(shares[n:])
        modules: dict[str, Sequence[Sequence[Tensor] | Tensor]] = {
            path: [next(rest) for _ in calls] for path, calls in there.items()
        }
        seen = None
        if isinstance(outputs, View) and len(inputs[0]) == 1:
            written = {key: value.detach()[0] for key, value in outputs.written.items()}
            seen = View(score.template, written)
        return Attribution(
            shares[:n], modules, gap, scale, unhandled=dict(tape.unhandled), outputs=seen
        )


@dataclass(frozen=True)
class DeepLiftShap(DeepLift):
    """DeepLift's mean over baselines that are drawn from what inputs look like.

    An estimate of Shapley values whose "absent" is the distribution of the baselines. Attributions
    sum to ``score(input) − mean score(baseline)``. Their standard errors, over the draws, are written
    at ``error_root``.

    Source: Lundberg & Lee 2017, section 4.2 (Deep SHAP).

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        baselines: One for all keys or a dict by key: a tensor ``[n, *features]`` of n baselines, the
            same n for all keys; or ``FromBuffer``, or a callable, of which ``n_samples`` are drawn
            for each batch element.
        n_samples: How many are drawn where no tensor says how many there are.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        multiply_by_inputs: As of :class:`DeepLift`.
        gap_tolerance: As of :class:`DeepLift`.

    Raises:
        BaselineError: If tensors have different numbers of baselines.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, 1.0)
    >>> several = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> with DeepLiftShap("y", baselines=several).prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[4.0, 5.0]])}, [1]))
    >>> td["attr", "x"], td["attr_error", "x"]
    (tensor([[3., 5.]]), tensor([[1., 0.]]))
    """

    n_samples: int = field(default=16, kw_only=True)
    internal_batch_size: int | None = field(default=None, kw_only=True)

    sampled: ClassVar[bool] = True
    runs_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the baselines' numbers."""
        super().__post_init__()
        whole_number("n_samples", self.n_samples, 1)
        if self.internal_batch_size is not None:
            whole_number("internal_batch_size", self.internal_batch_size, 1)
        given = self.baselines
        if isinstance(given, Mapping):
            self._settle("baselines", {key: _rows(spec) for key, spec in given.items()})
        else:
            self._settle("baselines", _rows(given))
        sizes = sorted({len(spec) for spec in self._specs() if isinstance(spec, Rows)})
        if len(sizes) > 1:
            raise BaselineError(
                f"DeepLiftShap: the keys have {listed(sizes)} baselines. One draw is one baseline of "
                "every key, so there must be as many of each."
            )

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """DeepLift against every baseline, as many at a time as fit."""
        drawn = self._drawn(score)
        n, size = len(drawn[0]), score.chunk()
        parts = []
        for start in range(0, n, size):
            chunk = [b[start : start + size] for b in drawn]
            stacked = [x.expand(len(b), *x.shape) for x, b in zip(score.inputs, chunk, strict=True)]
            parts.append(self.compared(score, stacked, chunk))
        means = [_Means([part.inputs[i] for part in parts]) for i in range(len(score.inputs))]
        found = Attribution(
            [mean.values for mean in means],
            errors=[mean.errors for mean in means],
            unhandled=parts[0].unhandled,
        )
        for path, calls in parts[0].modules.items():
            found.modules[path] = [
                _Means([part.modules[path][i] for part in parts]).values for i in range(len(calls))
            ]
        gaps = [part.gap for part in parts if part.gap is not None]
        scales = [part.scale for part in parts if part.scale is not None]
        found.gap, found.scale = torch.cat(gaps).mean(0), torch.cat(scales).mean(0)
        return found

    def _specs(self) -> list[Any]:
        given = self.baselines
        return list(given.values()) if isinstance(given, Mapping) else [given]

    def _drawn(self, score: Score) -> list[Tensor]:
        """For each key, its baselines ``[n, *B, *features]``."""
        sizes = [len(spec) for spec in self._specs() if isinstance(spec, Rows)]
        draws = []
        with OwnDraws():  # a buffer is sampled from
            for i in range(sizes[0] if sizes else self.n_samples):
                given = self.baselines
                if isinstance(given, Mapping):
                    given = {key: _row(spec, i) for key, spec in given.items()}
                else:
                    given = _row(given, i)
                draws.append(resolve(given, score.template, score.keys, score.inputs))
        return [torch.stack(rows) for rows in zip(*draws, strict=True)]


class Rows:
    """Several baselines of one key, as a baseline that is the first of them.

    Args:
        values: ``[n, *features]``, or anything behind n that broadcasts to the input.

    >>> Rows(torch.zeros(3, 2))
    Rows(3)
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __call__(self, x: Tensor) -> Tensor:
        return self.values[0]

    def __repr__(self) -> str:
        return f"Rows({len(self)})"


def _rows(spec: Any) -> Any:
    if not isinstance(spec, Tensor):
        return spec
    if not spec.ndim or not len(spec):
        raise BaselineError(
            "DeepLiftShap: a tensor of baselines has their number in front, at least 1."
        )
    if not spec.is_meta and not torch.isfinite(spec).all():
        raise BaselineError("The baseline holds NaN or Inf.")
    return Rows(spec)


def _row(spec: Any, i: int) -> Any:
    return spec.values[i] if isinstance(spec, Rows) else spec


class _Means:
    """Means over draws and their standard errors, column by column.

    Args:
        parts: For each chunk, T columns ``[k, *B, *features]``.
    """

    def __init__(self, parts: Sequence[Sequence[Tensor] | Tensor]) -> None:
        self.values: list[Tensor] = []
        self.errors: list[Tensor] = []
        for chunks in zip(*parts, strict=True):
            mean = Mean()
            for chunk in chunks:
                mean.add(chunk)
            self.values.append(mean.value().to(chunks[0].dtype))
            self.errors.append(mean.error().to(chunks[0].dtype))


def _check_finite(scores: Tensor, score: Score, end: str) -> None:
    # A sum is NaN or Inf if an entry is; if it overflowed, the entries are looked at.
    if not math.isfinite(scores.sum().item()) and not torch.isfinite(scores).all():
        raise TargetError(
            f"{score.what} is NaN or Inf at the {end}, so there is no change of it to attribute. Take "
            "another baseline, or explain other elements."
        )


def _times(multipliers: Sequence[Tensor], change: Tensor) -> list[Tensor]:
    """Each multiplier times the change, which is overwritten: fresh memory is slow to come by."""
    *others, last = multipliers
    return [*(m * change for m in others), change.mul_(last)]


def _missed(
    shares: Sequence[Sequence[Tensor]], before: Tensor, after: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """What attributions miss the score's change by, and the size that this is measured against."""
    dims, change = after.ndim - 1, after - before
    gap, size = _total(shares, dims, torch.sum) - change, change.abs()
    if not (gap.abs() > tolerance * size).any():
        return gap, size
    # Large attributions that cancel leave their rounding errors.
    sizes = _total(shares, dims, _size) + after.abs() + before.abs()
    return gap, torch.maximum(size, 1e3 * torch.finfo(after.dtype).eps * sizes)


def _total(columns: Sequence[Sequence[Tensor]], dims: int, summed: Callable[..., Tensor]) -> Tensor:
    """Sums over all keys' attributions for each element, ``[*E, T]``.

    Args:
        columns: For each key, T tensors.
        dims: How many dimensions elements have.
        summed: Sums entries, or their sizes, along a dimension.
    """
    sums = []
    for each in zip(*columns, strict=True):
        parts = [summed(a.flatten(dims) if a.ndim > dims else a.unsqueeze(-1), -1) for a in each]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        sums.append(total)
    return sums[0].unsqueeze(-1) if len(sums) == 1 else torch.stack(sums, -1)


def _size(a: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(a, 1, dim)
