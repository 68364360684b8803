"""What methods share that ask another method for attributions: its options, its rules, its calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.method import Attribution, GradientMethod, Method, PathMethod
from tdhook_like.baselines import BaselineSpec, resolve
from tdhook_like.columns import joined
from tdhook_like.errors import ContextError, TargetError
from tdhook_like.keys import check_known
from tdhook_like.randomness import ForeignDraws, OwnDraws
from tdhook_like.score import Score

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = [
    "Wrapper",
    "checked",
    "columns",
    "is_one_run",
    "keys_only",
    "private_draws",
    "resolved",
]


@dataclass(frozen=True, init=False)
class Wrapper(PathMethod):
    """A method that asks another one for attributions, at the explained inputs or near them.

    What the other method was told (its target, keys, roots, rules and so on) holds for the wrapper,
    unless the wrapper is told otherwise.

    Args:
        method: The method that is asked: any but a sum of several.
        options: Those of :class:`Method` that shall differ.

    Raises:
        ContextError: If ``method`` cannot be asked at several inputs, and the wrapper does so.
    """

    method: Method = field(kw_only=True)
    internal_batch_size: int | None = field(default=None, kw_only=True)

    #: Whether the method is asked at other inputs than the explained ones.
    asks_elsewhere: ClassVar[bool] = True

    def wrap(self, method: Method, options: Mapping[str, Any], **own: Any) -> None:
        """Settles all fields: the wrapper's own, what it was told, and the rest as ``method`` has it."""
        if not isinstance(method, GradientMethod | PathMethod):
            what = type(method).__name__
            raise ContextError(
                f"{type(self).__name__} cannot ask {method!r}: it takes a method, such as "
                "Saliency('state_value')."
                if not isinstance(method, Method)
                else f"{type(self).__name__} cannot wrap {what}, which asks several methods itself. "
                f"Wrap each of them, and combine what comes out: {what}({type(self).__name__}(…), …)."
            )
        if self.asks_elsewhere and is_one_run(method):
            raise ContextError(
                f"{type(self).__name__} cannot wrap {type(method).__name__}, which is made for one "
                "run at the explained inputs alone."
            )
        if self.asks_elsewhere and getattr(method, "only_here", False):
            raise ContextError(
                f"{type(self).__name__} asks its method at other inputs than the explained ones, and "
                f"{type(method).__name__} has attributions of those alone."
            )
        if self.asks_elsewhere and method.at and getattr(method, "own_at", False):
            raise ContextError(
                f"{type(self).__name__} cannot ask {type(method).__name__} about submodules, which it "
                "follows along a path of its own: leave at= out."
            )
        inherited = {f.name: getattr(method, f.name) for f in fields(Method)}
        unknown = [name for name in options if name not in inherited]
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no argument {unknown[0]!r}.")
        rows = own.pop("internal_batch_size", None)
        rows = getattr(method, "internal_batch_size", None) if rows is None else rows
        given = {**inherited, **options, **own, "method": method, "internal_batch_size": rows}
        for name, value in given.items():
            self._settle(name, value)
        self.__post_init__()

    @property
    def baselines(self) -> Any:
        """Those of the method that is asked, where it has any."""
        return getattr(self.method, "baselines", None)

    @property
    def feeds_zeros(self) -> bool:
        """Whether scores that are exactly zero may start with relevance all the same."""
        return getattr(self.method, "feeds_zeros", False)

    def prepare(self, *args: Any, **kwargs: Any) -> HookContext:
        """As for every method; masks of the method that is asked have to be of attributed keys."""
        context = super().prepare(*args, **kwargs)
        known = context.keys or tuple(context.in_keys)
        for method in _chain(self):
            check_known(getattr(method, "masks", None) or (), known, "attributed keys")
        return context

    def asked(self, number: int) -> PathMethod:
        """The method for the ``number``-th time: one that draws samples draws others each time."""
        method = self.method
        assert isinstance(method, PathMethod)
        if method.sampled and hasattr(method, "seed"):
            seed: int = getattr(method, "seed")  # noqa: B009
            changes: dict[str, Any] = {"seed": seed + number}
            return dataclasses.replace(method, **changes)
        return method

    def attributions(
        self, score: Score, points: Sequence[Tensor], first: int, draws: OwnDraws
    ) -> list[Tensor]:
        """The method's attributions at each of several points.

        Args:
            score: What is explained.
            points: ``[k, *B, *F]`` for each key.
            first: How many points there were before, in other chunks.
            draws: What baselines are drawn under.

        Returns:
            For each key ``[k, T, *B, *F]``.
        """
        method = self.method
        if isinstance(method, GradientMethod):
            grads, scores = score.gradients_at(points, _weighed(method))
            if not torch.isfinite(scores).all():
                raise _not_finite(self, score)
            return [
                method.combine(point.unsqueeze(1).expand_as(grad), grad)
                for point, grad in zip(points, grads, strict=True)
            ]
        rows = []
        for i, point in enumerate(zip(*points, strict=True)):
            there = score.at(point)
            baselines = resolved(self.baselines, there, draws)
            found = self.asked(first + i).attribute(score.at(point, baselines), baselines)
            rows.append(columns(found))
        return [torch.stack(key) for key in zip(*rows, strict=True)]


def is_one_run(method: Method) -> bool:
    """Whether a method reads more of a run than inputs and gradients, so that points cannot be stacked.

    >>> from tdhook_like import GradCAM, Saliency
    >>> is_one_run(GradCAM("y", at="0")), is_one_run(Saliency("y"))
    (True, False)
    """
    own = type(method).attribute is not GradientMethod.attribute  # pyright: ignore
    return isinstance(method, GradientMethod) and own


def columns(attribution: Attribution) -> list[Tensor]:
    """What was found for each key, as one tensor ``[T, *B, *F]``."""
    return [
        found if isinstance(found, Tensor) else torch.stack(list(found))
        for found in attribution.inputs
    ]


def private_draws(seed: int, inputs: Sequence[Tensor]) -> OwnDraws:
    """What is drawn inside its block, on any of the inputs' devices, comes from this seed.

    >>> with private_draws(0, [torch.ones(1)]):
    ...     first = torch.rand(2)
    >>> torch.equal(first, torch.rand(2, generator=torch.Generator().manual_seed(0)))
    True
    """
    state: list[Any] = [torch.Generator().manual_seed(seed).get_state()]
    for device in {x.device for x in inputs if x.device.type == "cuda"}:
        state.append((device, torch.Generator(device).manual_seed(seed).get_state()))
    return OwnDraws(state)


def resolved(
    spec: BaselineSpec | Mapping[NestedKey, BaselineSpec] | None, score: Score, draws: OwnDraws
) -> tuple[Tensor, ...]:
    """Baselines of ``score.inputs``; what is drawn for them comes from ``draws`` alone.

    Where the score is a function of what a submodule gives, it has brought its baselines along.
    """
    if any(score.template.get(key, None) is None for key in score.keys):
        return score.baselines
    with ForeignDraws(), draws:
        return resolve(spec, score.template, score.keys, score.inputs)


def checked(method: Method, score: Score, found: Sequence[Tensor]) -> list[Tensor]:
    """Results of the inputs' dtypes; what was NaN or Inf at any point shows in them.

    Raises:
        TargetError: If so.
    """
    for key, values in zip(score.keys, found, strict=True):
        if not torch.isfinite(values).all():
            raise _not_finite(method, score, f" (it shows at {key!r})")
    return [values.to(x.dtype) for values, x in zip(found, score.inputs, strict=True)]


def keys_only(method: Method) -> None:
    """Raises :class:`ContextError` where submodules are named for a method that has no use for them."""
    if method.at:
        raise ContextError(
            f"{type(method).__name__} is about in_keys; at={method.at!r} needs a method of one gradient, "
            "or one along a path, such as IntegratedGradients."
        )


def _not_finite(method: Method, score: Score, where: str = "") -> TargetError:
    return TargetError(
        f"{score.what}, or its gradient, is NaN or Inf at a point that {type(method).__name__} changes "
        f"the input to{where}. Stay closer to the input, or explain other elements."
    )


def _weighed(
    method: GradientMethod,
) -> Callable[[list[Tensor], slice], list[Tensor]] | None:
    """Scores times what each counts at the start of the backward pass."""
    if type(method).weigh is GradientMethod.weigh:
        return None

    def weighed(parts: list[Tensor], rows: slice) -> list[Tensor]:
        # Row by row, as weights may be given for a batch.
        each = [method.weigh([part[i] for part in parts]) for i in range(len(parts[0]))]
        weights = [weight for weight in each if weight is not None]
        return [joined(parts) * torch.stack(weights).detach()] if weights else parts

    return weighed


def _chain(method: Method) -> Iterator[Method]:
    """A wrapper, what it wraps, and so on."""
    yield method
    if isinstance(method, Wrapper):
        yield from _chain(method.method)
