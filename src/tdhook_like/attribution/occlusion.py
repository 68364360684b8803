"""Windows of neighbouring features that slide over each key and are covered, one at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.method import Attribution
from tdhook_like.attribution.mixing import Mixer
from tdhook_like.attribution.perturbation import Baselines, PerturbationMethod, whole_number
from tdhook_like.errors import InputError
from tdhook_like.keys import as_tuple, check_known
from tdhook_like.score import Score

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = ["Blurred", "Occlusion"]

Extent = int | tuple[int, ...]
Extents = Extent | Mapping[NestedKey, Extent]

#: How many features' numbers are looked up instead of computed.
_LARGEST_TABLE = 2**18


@dataclass(frozen=True)
class Blurred:
    """A baseline: the input itself, out of focus in its last dimensions.

    A Gaussian mean over neighbours; at borders over those that there are, so that what is even stays
    as it is. A window that is blurred loses its detail and keeps its brightness, which an agent has
    seen before; a black one it may never have seen.

    Source: Greydanus et al. 2018, eq. 2.

    Args:
        sigma: The width of the Gaussian, in features.
        dims: In how many of the last dimensions: 2 for ``[..., height, width]``.

    Raises:
        InputError: If ``sigma`` is not above 0, or ``dims`` not at least 1 and at most the input's.

    >>> Blurred(1.0, dims=1)(torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]]))
    tensor([[0.0772, 0.2571, 0.4026, 0.2571, 0.0772],
            [2.0000, 2.0000, 2.0000, 2.0000, 2.0000]])
    """

    sigma: float = 3.0
    dims: int = 2

    def __post_init__(self) -> None:
        """Checks the options."""
        if not 0 < self.sigma < math.inf:
            raise InputError(f"sigma must be above 0, got {self.sigma!r}.")
        whole_number("dims", self.dims, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """The input, blurred."""
        if x.ndim < self.dims:
            raise InputError(
                f"An input of shape {tuple(x.shape)} has no {self.dims} dimensions to blur."
            )
        blurred = x.double()
        for dim in range(-self.dims, 0):
            place = torch.arange(x.shape[dim], device=x.device, dtype=torch.float64)
            away = (place - place.unsqueeze(1)) / self.sigma
            weights = (-away.square() / 2).softmax(-1)
            blurred = (blurred.movedim(dim, -1) @ weights.mT).movedim(-1, dim)
        return blurred.to(x.dtype)


@dataclass(frozen=True)
class Occlusion(PerturbationMethod):
    """What the score loses when a window is covered, averaged over the windows that cover a feature.

    The mean, over the windows w that a feature lies in, of ``S(x) − S(x with w at the baseline)``. One
    evaluation per window and one at the input; each key is covered by itself. With windows of one
    feature it is :class:`FeatureAblation`.

    Source: Zeiler & Fergus 2014, section 4.2; with blurred windows Greydanus et al. 2018.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments.
        window: How large the window is: a number for every dimension of the features, or a tuple for
            the last ones (windows are as large as the input in those before: all channels, say). One
            for all keys, or a dict by key; one feature at a time in keys that it leaves out.
        stride: How far it moves, in the same form. One step by default. Windows that would reach
            over the end are cut off there.
        baselines: What a window is covered with: as for other methods; ``Blurred()`` for the input
            itself out of focus.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        progress: Whether a progress bar counts the evaluations, for long runs; it needs tqdm.

    Raises:
        InputError: If a window is larger than the input, a stride larger than its window, or either
            has more dimensions than the features.
        KeyNotFoundError: If either is given for a key that is not attributed.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Linear(4, 1)
    >>> with torch.no_grad():
    ...     _ = net.weight.copy_(torch.tensor([[0.0, 4.0, 0.0, 0.0]]))
    >>> with Occlusion("y", window=2).prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.ones(1, 4)}, [1]))
    >>> td["attr", "x"]
    tensor([[4., 4., 2., 0.]])
    """

    window: Extents = field(default=1, kw_only=True)
    stride: Extents = field(default=1, kw_only=True)
    baselines: Baselines = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Checks windows and strides, as far as that is possible without inputs."""
        super().__post_init__()
        for name in ("window", "stride"):
            given = getattr(self, name)
            for extent in given.values() if isinstance(given, Mapping) else [given]:
                for n in extent if isinstance(extent, tuple) else (extent,):
                    whole_number(name, n, 1)

    def prepare(self, *args: Any, **kwargs: Any) -> HookContext:
        """As for every method; windows and strides have to be of attributed keys."""
        context = super().prepare(*args, **kwargs)
        for given in (self.window, self.stride):
            if isinstance(given, Mapping):
                check_known(given, context.keys or context.in_keys, "attributed keys")
        return context

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Covers every window of every key, in chunks."""
        dims, chunk, mixer = score.dims, score.chunk(), Mixer(score)
        windows = [
            Windows(x.shape[dims:], *self._extents(key, x.shape[dims:]), x.device)
            for key, x in zip(score.keys, score.inputs, strict=True)
        ]
        found = []
        with self.counting(sum(each.count + 1 for each in windows)) as advance:
            for i, each in enumerate(windows):
                rows = []
                for start in range(-1, each.count, chunk):  # number −1 covers nothing
                    stop = min(start + chunk, each.count)
                    at = each.covered(max(start, 0), stop)
                    points = [x.expand(stop - start, *x.shape) for x in score.inputs]
                    points[i] = mixer.covered(i, at, baselines[i], dims, whole=int(start < 0))
                    rows.append(mixer.scores(points))
                    advance(stop - start)
                scores = torch.cat(rows)
                found.append(each.mean(scores[:1] - scores[1:]))
        return Attribution(self.checked(score, found))

    def _extents(self, key: NestedKey, features: torch.Size) -> tuple[list[int], list[int]]:
        """Window and stride in every dimension of a key's features."""
        found = []
        for name in ("window", "stride"):
            given = getattr(self, name)
            if isinstance(given, Mapping):
                given = {as_tuple(k): extent for k, extent in given.items()}.get(as_tuple(key), 1)
            last = given if isinstance(given, tuple) else (given,) * len(features)
            if len(last) > len(features):
                raise InputError(
                    f"{name}={given} has {len(last)} dimensions, the features of {key!r} have "
                    f"{len(features)}: {tuple(features)}."
                )
            found.append([*features[: len(features) - len(last)], *last])
        sizes, strides = found
        # In dimensions that the window spans whole there is nowhere to move.
        strides = [
            min(stride, size) if size == n else stride
            for n, size, stride in zip(features, sizes, strides, strict=True)
        ]
        for n, size, stride in zip(features, sizes, strides, strict=True):
            if size > max(n, 1):
                raise InputError(
                    f"The window {tuple(sizes)} is larger than the features of {key!r}, "
                    f"{tuple(features)}."
                )
            if stride > size:
                raise InputError(
                    f"The stride {tuple(strides)} is larger than the window {tuple(sizes)} on {key!r}: "
                    "features between two windows would never be covered."
                )
        return sizes, strides


class Windows:
    """All places of a window on features of one shape.

    Args:
        features: The shape ``[*F]``.
        sizes: Of the window, in every dimension.
        strides: How far it moves, in every dimension.
        device: Where they are made.

    Attributes:
        count: How many places there are.
    """

    def __init__(
        self,
        features: torch.Size,
        sizes: Sequence[int],
        strides: Sequence[int],
        device: torch.device,
    ) -> None:
        self._features, self._device = features, device
        self._spans: list[Tensor] = []  # for each dimension of F, [places, size]
        for n, size, stride in zip(features, sizes, strides, strict=True):
            places = max(math.ceil((n - size) / stride), 0) + 1 if n else 0
            start = torch.arange(places, device=device).unsqueeze(1) * stride
            # Cut off at the end, a window has its last feature several times.
            self._spans.append((start + torch.arange(size, device=device)).clamp(max=max(n - 1, 0)))
        self.count = math.prod(len(span) for span in self._spans)
        #: The same of several dimensions at once, as long as that is small; the last ones first.
        self._tables = [torch.zeros(1, 1, dtype=torch.long, device=device)]
        step = 1
        for n, span in zip(reversed(features), reversed(self._spans), strict=True):
            table = self._tables[-1]
            if table.numel() * span.numel() <= _LARGEST_TABLE:
                both = (span * step)[:, None, :, None] + table[None, :, None, :]
                self._tables[-1] = both.flatten(2).flatten(0, 1)
            else:
                self._tables.append(span * step)
            step *= n

    def covered(self, start: int, stop: int) -> Tensor:
        """The features, as numbers, in the windows from ``start`` to ``stop``: ``[windows, n]``."""
        first = self._tables[0]
        if len(self._tables) == 1:
            return first[start:stop]
        number = torch.arange(start, stop, device=self._device)
        found = first[number % len(first)]
        for before, table in itertools.pairwise(self._tables):
            number = number.div(len(before), rounding_mode="floor")
            here = table[number % len(table)]
            found = (here.unsqueeze(2) + found.unsqueeze(1)).flatten(1)
        return found

    def mean(self, changes: Tensor) -> Tensor:
        """Changes of the score ``[count, *E, T]``, averaged over the windows that cover a feature.

        Returns:
            ``[T, *E, *F]``.
        """
        found = changes.movedim(0, -1).movedim(-2, 0).double()
        found = found.unflatten(-1, [len(span) for span in self._spans] or [1])
        for dim, (n, span) in enumerate(zip(self._features, self._spans, strict=True)):
            cover = found.new_zeros(len(span), n).scatter_(1, span, 1.0)
            at = dim - len(self._spans)
            found = (found.movedim(at, -1) @ (cover / cover.sum(0))).movedim(-1, at)
        return found if self._spans else found.squeeze(-1)
