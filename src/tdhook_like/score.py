"""The function that is explained: model + rules + target, and its gradient.

``Score`` knows how to run the model on changed inputs and how to differentiate the target's numbers.
It knows nothing of what a method makes of them, nor of where results are written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.captured import Captured
from tdhook_like.columns import TargetColumns, joined, members_last
from tdhook_like.gradients import gradients
from tdhook_like.hooks.functional import Functions
from tdhook_like.hooks.surrogate import Twice
from tdhook_like.layout import LAYOUTS, Layout, Run, folded, leading, verified
from tdhook_like.runner import View

if TYPE_CHECKING:
    from tdhook_like.attribution.lrp.ledger.recorder import Recorder
    from tdhook_like.attribution.method import Attribution, GradientMethod

__all__ = ["Evaluation", "Score"]


@dataclass
class Evaluation:
    """One differentiable run at the explained inputs.

    Attributes:
        leaves: The inputs, ``[*B, *features]`` each; what is differentiated.
        outputs: What the model wrote.
        parts: Scores, ``[*B, n]`` for each named target.
        captured: What flowed out of the chosen submodules.
        stopped: Whether a rule may let nothing pass, so that no gradient is an answer, too.
        reaches_zeros: Whether a rule may give relevance to what is exactly zero.
        twice: What lets relevance be differentiated again, where that is asked for.
        recorder: What has taken down the rules' inputs and outputs, where a ledger is asked for.
        at: The paths of the submodules that are to be attributed to.
    """

    leaves: tuple[Tensor, ...]
    outputs: TensorDictBase | View
    parts: list[Tensor]
    captured: Captured
    stopped: bool = False
    reaches_zeros: bool = False
    twice: Twice | None = None
    recorder: Recorder | None = None
    at: tuple[str, ...] = ()


class Score:
    """Model + rules + target, at one TensorDict.

    Args:
        run: Runs the model without leaving a trace (on a shadow, the RNG forked).
        rules: Gives a context manager that has the rules on, and a mode for functions if one is given;
            with ``plain=True`` one that has everything on but the rules.
        template: The explained TensorDict; what is not attributed is read from it.
        keys: The attributed keys.
        inputs: Their values, ``[*B, *features]`` each.
        targets: Scores of outputs.
        layouts: Where verified layouts' names are kept between calls, by the number of batch
            dimensions.
        rows: The most rows of one stacked evaluation; chosen by the inputs' size if None.
        overwrites: Whether the model writes into its inputs, so that it has to be given copies.
        baselines: What inputs are explained against; zeros if None.
        view: A shorter way to the outputs at stacked inputs, if the model has one.
    """

    def __init__(
        self,
        run: Run,
        rules: Callable[..., AbstractContextManager[object]],
        template: TensorDictBase,
        keys: Sequence[NestedKey],
        inputs: tuple[Tensor, ...],
        targets: TargetColumns,
        layouts: dict[int, str],
        rows: int | None = None,
        overwrites: bool = False,
        baselines: tuple[Tensor, ...] | None = None,
        view: Callable[[TensorDictBase, Mapping[NestedKey, Tensor]], View | None] | None = None,
    ) -> None:
        self._view = view
        self._run, self._rules = run, rules
        self._template, self._keys = template, tuple(keys)
        self._targets, self._layouts = targets, layouts
        self._rows, self._overwrites = rows, overwrites
        self.inputs = inputs
        self.baselines = baselines or tuple(torch.zeros_like(x) for x in inputs)
        self.batch = template.batch_size
        #: The submodules that a method which can is to attribute to, by path.
        self.at_paths: tuple[str, ...] = ()
        #: Whether the model reads nothing but the attributed keys.
        self.reads_all = False
        #: What a method of one run says of the explained inputs; None where they are others.
        self.once: Callable[[GradientMethod], Attribution] | None = None

    def scores(self, points: Sequence[Tensor]) -> Tensor:
        """Scores ``[k, *B, T]`` at stacked inputs ``[k, *B, *features]``, without a graph."""
        layout = self._layout()  # with rules of its own
        with torch.no_grad(), self._rules():
            return joined(self._evaluate(layout, points))

    @property
    def keys(self) -> tuple[NestedKey, ...]:
        """The attributed keys, in the order of ``inputs``."""
        return self._keys

    @property
    def dims(self) -> int:
        """How many dimensions of the batch a score has: fewer where a trajectory is one element."""
        if self._targets.lacking is None:
            self.scores([x.unsqueeze(0).clone() for x in self.inputs])
        assert self._targets.lacking is not None
        return len(self.batch) - self._targets.lacking

    @property
    def what(self) -> str:
        """What is explained, in words for messages."""
        return repr(self._targets)

    def chunk(self) -> int:
        """How many stacked evaluations keep peak memory bounded and the work in the caches."""
        numel = sum(x.numel() for x in self.inputs)
        batch = max(self.batch.numel(), 1)
        rows = self._rows or min(max(2**20 * batch // max(numel, 1), 8), 512)
        return max(rows // batch, 1)

    def path_gradient(
        self, path: Callable[[Tensor], Sequence[Tensor]], nodes: Tensor, weights: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """``Σₖ wₖ ∂S/∂x`` along a path, in chunks, and the scores at the nodes.

        Args:
            path: From nodes ``[c]`` to points ``[c, *B, *features]``.
            nodes: Positions along the path, ``[n]``.
            weights: One per node, ``[n]``; nodes of weight zero are evaluated but not summed.

        Returns:
            A gradient ``[T, *B, *features]`` per key, and scores ``[n, *B, T]``.
        """
        layout, chunk = self._layout(), self.chunk()
        total: list[Tensor] | None = None
        scores: list[Tensor] = []
        for start in range(0, len(nodes), chunk):
            part, weight = nodes[start : start + chunk], weights[start : start + chunk]
            counts = _counted(weight)
            points = [point.detach().requires_grad_() for point in path(part)]
            with self._rules():
                found = self._evaluate(layout, points)
                weight = weight.to(found[0]).reshape(-1, *[1] * (found[0].ndim - 1))
                each = gradients(found, points, weight)
            summed = [_summed(grads, counts) for grads in zip(*each, strict=True)]
            scores.append(joined(found).detach())
            total = (
                summed if total is None else [a.add_(b) for a, b in zip(total, summed, strict=True)]
            )
        assert total is not None
        return total, scores[0] if len(scores) == 1 else torch.cat(scores)

    @property
    def template(self) -> TensorDictBase:
        """The explained TensorDict, for what is read of it beside the attributed keys."""
        return self._template

    def at(self, inputs: Sequence[Tensor], baselines: Sequence[Tensor] | None = None) -> Score:
        """The same function, to be explained at other inputs of the same shapes.

        Args:
            inputs: ``[*B, *features]`` each.
            baselines: What they are explained against; as before if None.
        """
        other = copy.copy(self)
        other.inputs = tuple(inputs)
        other.baselines = self.baselines if baselines is None else tuple(baselines)
        other.once = None
        return other

    def plain(self) -> Score:
        """The same score without rules, for scores alone: rules change none, and take their time."""
        other = copy.copy(self)
        other._rules = partial(self._rules, plain=True)
        return other

    def gradients_at(
        self,
        points: Sequence[Tensor],
        of: Callable[[list[Tensor], slice], list[Tensor]] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """The gradient at each of several points, in chunks, and the scores there.

        Args:
            points: ``[k, *B, *features]`` for each key.
            of: What is differentiated instead of the scores: from their parts ``[c, *B, n]`` and the
                rows among k that these are of, to parts of U columns in all, each row by itself.

        Returns:
            Gradients ``[k, U, *B, *features]`` for each key, and the scores themselves
            ``[k, *B, T]``.
        """
        layout, chunk = self._layout(), self.chunk()
        grads: list[list[Tensor]] = [[] for _ in points]
        scores: list[Tensor] = []
        for start in range(0, len(points[0]), chunk):
            rows = slice(start, min(start + chunk, len(points[0])))
            leaves = [point[rows].detach().requires_grad_() for point in points]
            with self._rules():
                found = self._evaluate(layout, leaves)
                each = gradients(found if of is None else of(found, rows), leaves)
            for key, found_at in zip(grads, zip(*each, strict=True), strict=True):
                key.append(torch.stack(found_at, 1))
            scores.append(joined(found).detach())
        return [torch.cat(key) for key in grads], torch.cat(scores)

    def installed(self, functions: Functions | None = None) -> AbstractContextManager[object]:
        """The rules, and a mode of the method's own for functions, for the length of a block."""
        return self._rules(functions)

    def evaluated(
        self, values: Mapping[NestedKey, Tensor]
    ) -> tuple[list[Tensor], TensorDictBase | View]:
        """Scores, ``[k, *B, n]`` for each named target, and the outputs that they are read from.

        To be called inside :meth:`installed`, once :attr:`layout` is known.

        Args:
            values: Stacked, ``[k, *B, *features]``, by key: of the inputs, or what is to stand in
                submodules' places (see ``ports``).
        """
        keys, points = tuple(values), list(values.values())
        return self._evaluated(self._layout(), keys, points)

    def outputs(self) -> TensorDictBase:
        """What the model writes at the explained TensorDict as it is; inside :meth:`installed`."""
        return self._run(self._template.copy())

    def of(
        self,
        values: Mapping[NestedKey, Tensor],
        baselines: Sequence[Tensor],
        layouts: dict[int, str],
    ) -> Score:
        """The same score as a function of other entries, the explained inputs held as they are.

        Args:
            values: The entries, ``[*B, *features]`` each.
            baselines: What they are explained against, of the same shapes.
            layouts: Where verified layouts' names are kept between calls.
        """
        other = copy.copy(self)
        other._keys, other.inputs = tuple(values), tuple(values.values())
        other.baselines, other._layouts = tuple(baselines), layouts
        other.once = None
        return other

    def narrowed(self, points: Sequence[Tensor]) -> tuple[Score, list[Tensor]] | None:
        """The score of one batch element, where a run of all of them would tell the same of each.

        Only where the model is known to treat elements alike and apart.

        Args:
            points: Stacked, ``[k, *B, *features]`` each.
        """
        apart = self._layout() is leading or (self._layout() is folded and len(points[0]) == 1)
        if not (apart and self._view is not None and self.reads_all and len(self.batch) == 1):
            return None
        if self.batch[0] < 2 or not all(_alike(point) for point in points):
            return None
        other = copy.copy(self)
        other._template = self._template[0].unsqueeze(0)
        other.batch = torch.Size([1])
        return other, [p[:, :1] for p in points]

    def _evaluate(self, layout: Layout, points: Sequence[Tensor]) -> list[Tensor]:
        return self._evaluated(layout, self._keys, points)[0]

    def _evaluated(
        self, layout: Layout, keys: Sequence[NestedKey], points: Sequence[Tensor]
    ) -> tuple[list[Tensor], TensorDictBase | View]:
        if self._overwrites:
            points = [point.clone() for point in points]
        outputs: TensorDictBase | View | None = None
        if self._view is not None and layout is leading:
            outputs = self._view(self._template, dict(zip(keys, points, strict=True)))
        elif self._view is not None and layout is folded and self.reads_all and self.batch:
            outputs = self._folded_view(dict(zip(keys, points, strict=True)))
        if outputs is None:
            outputs = layout(self._run, self._template, keys, points)
        scores = self._targets(outputs, outputs.batch_dims)
        own = outputs.batch_dims - len(self.batch) - 1
        return [members_last(joined(scores), own)] if own > 0 else scores, outputs

    def _folded_view(self, values: Mapping[NestedKey, Tensor]) -> View | None:
        """As the folded layout, without a TensorDict."""
        assert self._view is not None
        lead = next(iter(values.values())).shape[:2]
        found = self._view(self._template, {k: v.flatten(0, 1) for k, v in values.items()})
        if found is None:
            return None
        written: dict[NestedKey, Tensor] = {
            key: value.unflatten(0, lead) for key, value in found.written.items()
        }
        return View(self._template, written, torch.Size([lead[0], *self.batch]))

    @property
    def layout(self) -> str:
        """How further evaluations are stacked; tried out at the first look."""
        self._layout()
        return self._layouts[len(self.batch)]

    def _layout(self) -> Layout:
        name = self._layouts.get(len(self.batch))
        if name is None:
            with torch.no_grad(), self._rules():
                name = verified(
                    lambda layout, points: joined(self._evaluate(layout, points)),
                    self.inputs,
                    self.baselines,
                    repr(self._targets),
                )
            self._layouts[len(self.batch)] = name
        return LAYOUTS[name]


def _counted(weight: Tensor) -> Tensor | slice:
    """The nodes that count: slopes at others may be infinite, and 0 · ∞ is not 0."""
    known = weight.tolist()
    first = next((i for i, w in enumerate(known) if w != 0), len(known))
    return slice(first, None) if 0.0 not in known[first:] else weight != 0


def _summed(grads: Sequence[Tensor], counts: Tensor | slice) -> Tensor:
    """Gradients ``[k, *B, *features]`` of each target as ``[T, *B, *features]``."""
    if len(grads) == 1:
        return grads[0][counts].sum(0, keepdim=True)
    return torch.stack([g[counts].sum(0) for g in grads])


def _alike(points: Tensor) -> bool:
    """Whether all batch elements of ``[k, B, *features]`` are the same."""
    return points.stride(1) == 0 or torch.equal(points, points[:, :1].expand_as(points))
