"""What happens to the score as the most relevant features go, or come, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.method import Method
from tdhook_like.attribution.perturbation import whole_number
from tdhook_like.attribution.wrapper import private_draws, resolved
from tdhook_like.baselines import BaselineSpec
from tdhook_like.baselines import check as check_baselines
from tdhook_like.errors import InputError
from tdhook_like.metrics.measure import Measure
from tdhook_like.score import Score

__all__ = ["Deletion", "Insertion", "area", "first_ranks"]

Fill = BaselineSpec | Mapping[NestedKey, BaselineSpec] | None
BY = ("features", "keys")


@dataclass(frozen=True, init=False)
class Curve(Measure):
    """The score along the way from the input to what stands for "nothing there", or back.

    Args:
        method: What is measured.
        by: ``"features"``: all features of all keys in one order; ``"keys"``: whole keys, in the order
            of the sums of their attributions.
        absolute: Whether the size of an attribution counts; else large positive ones come first, and
            large negative ones last.
        n_steps: How many steps the curve has at most; with fewer features (or keys), one for each.
        fill: What stands for "nothing there": a baseline, for all keys or by key; the method's own,
            or zeros, if None.
        seed: Of the generator that baselines are drawn from, which is no other's.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        options: Those of :class:`Method` that shall not be as ``method`` has them.
    """

    by: str = field(default="features", kw_only=True)
    absolute: bool = field(default=False, kw_only=True)
    n_steps: int = field(default=20, kw_only=True)
    fill: Fill = field(default=None, kw_only=True)

    #: Where the curve goes, and whether features come instead of going.
    place: ClassVar[str] = ""
    comes: ClassVar[bool] = False

    def __init__(
        self,
        method: Method,
        *,
        by: str = "features",
        absolute: bool = False,
        n_steps: int = 20,
        fill: Fill = None,
        seed: int = 0,
        internal_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.settle(
            method,
            options,
            self.place,
            by=by,
            absolute=absolute,
            n_steps=n_steps,
            fill=fill,
            seed=seed,
            internal_batch_size=internal_batch_size,
        )

    def __post_init__(self) -> None:
        """Checks order and steps."""
        super().__post_init__()
        if self.by not in BY:
            raise InputError(f"by={self.by!r}: choose one of {', '.join(BY)}.")
        whole_number("n_steps", self.n_steps, 1)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As for every method; the fill has to be a baseline of attributed keys."""
        context = super().prepare(*args, **kwargs)
        check_baselines(self.fill, context.keys or tuple(context.in_keys))
        return context

    def measured(self, score: Score, own: Sequence[Tensor]) -> Tensor:
        """Scores ``[*E, steps + 1, T]``, in chunks of steps and targets."""
        fill = self.baselines if self.fill is None else self.fill
        nothing = resolved(fill, score, private_draws(self.seed, score.inputs))
        ranks, count = first_ranks(own, 1 + score.dims, self.by, self.absolute)
        n, targets = min(self.n_steps, count), len(own[0])
        gone = (torch.arange(n + 1, device=own[0].device) * count / n).round()
        rows = torch.arange((n + 1) * targets, device=own[0].device)
        found = []
        for row in rows.split(score.chunk()):
            step, target = row.div(targets, rounding_mode="floor"), row % targets
            points = []
            for x, b, rank in zip(score.inputs, nothing, ranks, strict=True):
                first = rank[target] < gone[step].reshape(-1, *[1] * x.ndim)
                points.append(torch.where(first == self.comes, x, b))
            values = score.scores(points)
            # Rows of a chunk may begin at any target.
            at = target.reshape(-1, *[1] * (values.ndim - 1)).expand(*values.shape[:-1], 1)
            found.append(values.gather(-1, at).squeeze(-1))
        curve = torch.cat(found).unflatten(0, (n + 1, targets))
        return curve.movedim((0, 1), (-2, -1))


class Deletion(Curve):
    """The score as the most relevant features go first: a good order makes it fall early.

    Written at ``"deletion"``: ``[*B, steps + 1]``, from the input to "nothing there"; its :func:`area`
    sums it up, small for a good order.

    Source: Petsiuk et al. 2018, section 3.2; Samek et al. 2017.

    Args:
        method: What is measured; for the other arguments see :class:`Curve`.

    Raises:
        InputError: If an option makes no sense.
        BaselineError: If ``fill`` is no baseline, or of a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> from tdhook_like import InputXGradient
    >>> net = torch.nn.Linear(3, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 4.0, 2.0]]))
    >>> with Deletion(InputXGradient("y")).prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked.observe(TensorDict({"x": torch.ones(1, 3)}, [1]))
    >>> td["deletion"], area(td["deletion"])
    (tensor([[7., 3., 1., 0.]]), tensor([2.5000]))
    """

    place: ClassVar[str] = "deletion"


class Insertion(Curve):
    """The score as the most relevant features come first: a good order makes it rise early.

    Written at ``"insertion"``: ``[*B, steps + 1]``, from "nothing there" to the input; its :func:`area`
    sums it up, large for a good order.

    Source: Petsiuk et al. 2018, section 3.2.

    Args:
        method: What is measured; for the other arguments see :class:`Curve`.

    Raises:
        InputError: If an option makes no sense.
        BaselineError: If ``fill`` is no baseline, or of a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> from tdhook_like import InputXGradient
    >>> net = torch.nn.Linear(3, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 4.0, 2.0]]))
    >>> with Insertion(InputXGradient("y")).prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked.observe(TensorDict({"x": torch.ones(1, 3)}, [1]))
    >>> td["insertion"]
    tensor([[0., 4., 6., 7.]])
    """

    place: ClassVar[str] = "insertion"
    comes: ClassVar[bool] = True


def area(curve: Tensor) -> Tensor:
    """The area under curves ``[..., steps + 1]`` over the share of features, from 0 to 1: ``[...]``.

    >>> area(torch.tensor([4.0, 2.0, 0.0]))
    tensor(2.)
    """
    return torch.trapezoid(curve, dx=1.0 / (curve.shape[-1] - 1))


def first_ranks(
    values: Sequence[Tensor], dims: int, by: str = "features", absolute: bool = False
) -> tuple[list[Tensor], int]:
    """The place of every feature among all keys' features, the most relevant at 0.

    Args:
        values: Attributions ``[*E, …]`` for each key.
        dims: The number of dimensions of ``[*E]``.
        by: ``"features"``, or ``"keys"``: features of a key share its place.
        absolute: Whether sizes count.

    Returns:
        Places, of the values' shapes, and how many there are.

    >>> first_ranks([torch.tensor([[1.0, 5.0]]), torch.tensor([[-7.0]])], 1)
    ([tensor([[1, 0]]), tensor([[2]])], 3)
    """
    flat = [v.double().unsqueeze(-1).flatten(dims) for v in values]
    flat = [v.abs() if absolute else v for v in flat]
    sizes = [v.shape[-1] for v in flat]
    if by == "keys":
        flat = [v.sum(-1, keepdim=True) for v in flat]
    order = torch.argsort(torch.cat(flat, -1), dim=-1, descending=True, stable=True)
    ranks = order.argsort(-1)
    if by == "keys":
        parts = [ranks[..., i : i + 1].expand(*ranks.shape[:-1], n) for i, n in enumerate(sizes)]
    else:
        parts = list(ranks.split(sizes, -1))
    found = [part.reshape(v.shape) for part, v in zip(parts, values, strict=True)]
    return found, ranks.shape[-1]
