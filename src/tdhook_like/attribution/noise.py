"""Attributions near the input: their mean, their mean square, or their variance under noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.method import Attribution, GradientMethod, Method
from tdhook_like.attribution.perturbation import Mean, check_seed, whole_number
from tdhook_like.attribution.wrapper import Wrapper, checked, private_draws
from tdhook_like.errors import InputError
from tdhook_like.keys import as_tuple, check_known
from tdhook_like.score import Score

__all__ = ["Moments", "NoiseTunnel", "PerKey", "by_key", "check_sizes", "normal_rows"]

PerKey = float | Tensor | Mapping[NestedKey, float | Tensor]
"""A number or a tensor that broadcasts to the features, for all keys or by key; 0 where a dict names
no other."""

KINDS = ("smoothgrad", "smoothgrad_sq", "vargrad")


@dataclass(frozen=True, init=False)
class NoiseTunnel(Wrapper):
    """Attributions of inputs with noise on them, by any method: what stays, or how much they vary.

    With ``A`` the method's attribution and ``ε ~ N(0, stdevs²)``: ``E[A(x + ε)]`` (``"smoothgrad"``),
    ``E[A(x + ε)²]`` (``"smoothgrad_sq"``), or ``Var[A(x + ε)]`` (``"vargrad"``, without bias: squares
    are divided by ``n_samples − 1``). Standard errors are written at ``error_root``. At submodules
    (``at=``) the noise is on what they give; of the same size for all, if ``stdevs`` is no dict.

    Sources: Smilkov et al. 2017, section 3; Hooker et al. 2019, section 3.2 (the square); Adebayo et
    al. 2018, section 3 (the variance).

    Args:
        method: What is asked at each draw, with a target of its own.
        n_samples: How many draws; at least 2 for a variance.
        stdevs: The noise's size, for all keys or by key; keys that a dict leaves out have none. A
            number, or a tensor that broadcasts to the features.
        kind: ``"smoothgrad"``, ``"smoothgrad_sq"`` or ``"vargrad"``.
        seed: Of the generator that the noise is drawn from, which is no other's.
        internal_batch_size: The most rows of one stacked evaluation; chosen by input size if None.
        options: Those of :class:`Method` that shall not be as ``method`` has them.

    Raises:
        InputError: If ``n_samples``, ``stdevs``, ``kind`` or ``seed`` make no sense.
        KeyNotFoundError: If ``stdevs`` names a key that is not attributed.
        ContextError: If ``method`` is a sum of methods, or keeps a graph.

    >>> from tensordict import TensorDict
    >>> from tdhook_like import Saliency
    >>> net = torch.nn.Linear(2, 1)
    >>> _ = torch.nn.init.constant_(net.weight, 2.0)
    >>> method = NoiseTunnel(Saliency("y", abs=False), n_samples=8, stdevs=0.1)
    >>> with method.prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[1.0, 3.0]])}, [1]))
    >>> td["attr", "x"], td["attr_error", "x"]  # a straight line has one slope
    (tensor([[2., 2.]]), tensor([[0., 0.]]))
    """

    n_samples: int = field(default=25, kw_only=True)
    stdevs: PerKey = field(default=0.1, kw_only=True)
    kind: str = field(default="smoothgrad", kw_only=True)
    seed: int = field(default=0, kw_only=True)

    sampled: ClassVar[bool] = True

    def __init__(
        self,
        method: Method,
        *,
        n_samples: int = 25,
        stdevs: PerKey = 0.1,
        kind: str = "smoothgrad",
        seed: int = 0,
        internal_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.wrap(
            method,
            options,
            n_samples=n_samples,
            stdevs=stdevs,
            kind=kind,
            seed=seed,
            internal_batch_size=internal_batch_size,
        )

    def __post_init__(self) -> None:
        """Checks the noise."""
        super().__post_init__()
        if self.kind not in KINDS:
            raise InputError(f"kind={self.kind!r}: choose one of {', '.join(KINDS)}.")
        whole_number("n_samples", self.n_samples, 2 if self.kind == "vargrad" else 1)
        check_sizes("stdevs", self.stdevs)
        check_seed(self.seed)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As for every method; ``stdevs`` have to be of attributed keys."""
        context = super().prepare(*args, **kwargs)
        if isinstance(self.stdevs, Mapping):
            known = context.keys or tuple(context.in_keys)
            check_known(self.stdevs, known, "attributed keys")
        return context

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """Asks at ``n_samples`` noisy inputs, in chunks."""
        sizes = by_key("stdevs", self.stdevs, score)
        noise = torch.Generator().manual_seed(self.seed)
        draws = private_draws(self.seed, score.inputs)
        found = [Moments() if self.kind == "vargrad" else Mean() for _ in score.inputs]
        at_once = score.chunk() if isinstance(self.method, GradientMethod) else 1
        for start in range(0, self.n_samples, at_once):
            n = min(at_once, self.n_samples - start)
            steps = normal_rows(score.inputs, n, noise)
            points = [x + s * e for x, s, e in zip(score.inputs, sizes, steps, strict=True)]
            each = self.attributions(score, points, start, draws)
            for moments, values in zip(found, each, strict=True):
                values = values.double()
                moments.add(values.square() if self.kind == "smoothgrad_sq" else values)
        values = [m.variance() if isinstance(m, Moments) else m.value() for m in found]
        errors = [m.error().to(x.dtype) for m, x in zip(found, score.inputs, strict=True)]
        return Attribution(checked(self, score, values), errors=errors)


class Moments:
    """Running central moments of draws, for their variance and its standard error, in float64.

    Source: Pébay 2008, eq. 3.1 (of two sets of draws taken together).

    >>> moments = Moments()
    >>> moments.add(torch.tensor([1.0, 2.0]))
    >>> moments.add(torch.tensor([6.0]))
    >>> moments.variance()
    tensor(7., dtype=torch.float64)
    """

    def __init__(self) -> None:
        self._n = 0

    def add(self, draws: Tensor) -> None:
        """Takes more draws in, ``[n, ...]``."""
        draws, b = draws.double(), len(draws)
        mean = draws.mean(0)
        away = draws - mean
        m2, m3, m4 = (away.pow(p).sum(0) for p in (2, 3, 4))
        if not self._n:
            self._n, self._mean, self._m2, self._m3, self._m4 = b, mean, m2, m3, m4
            return
        a, n, d = self._n, self._n + b, mean - self._mean
        self._m4 = (
            self._m4 + m4
            + d.pow(4) * (a * b * (a * a - a * b + b * b) / n**3)
            + 6 * d.square() * (a * a * m2 + b * b * self._m2) / n**2
            + 4 * d * (a * m3 - b * self._m3) / n
        )  # fmt: skip
        self._m3 = (
            self._m3 + m3 + d.pow(3) * (a * b * (a - b) / n**2)
            + 3 * d * (a * m2 - b * self._m2) / n
        )  # fmt: skip
        self._m2 = self._m2 + m2 + d.square() * (a * b / n)
        self._mean = self._mean + d * (b / n)
        self._n = n

    def variance(self) -> Tensor:
        """The variance, without bias."""
        return self._m2 / (self._n - 1)

    def error(self) -> Tensor:
        """Its standard error, ``√((m₄ − s⁴ (n − 3) / (n − 1)) / n)``; NaN for fewer than 4 draws."""
        n = self._n
        if n < 4:
            return torch.full_like(self._m2, torch.nan)
        squares = self._m4 / n - self.variance().square() * ((n - 3) / (n - 1))
        return (squares.clamp_min(0) / n).sqrt()


def check_sizes(name: str, sizes: Any) -> None:
    """Raises :class:`InputError` for what is neither a size from 0 on, nor a dict of such by key."""
    if isinstance(sizes, Mapping):
        for key, size in sizes.items():
            as_tuple(key)
            check_sizes(f"{name}[{key!r}]", size)
        return
    if isinstance(sizes, Tensor):
        fine = sizes.is_floating_point() and bool((torch.isfinite(sizes) & (sizes >= 0)).all())
    else:
        number = isinstance(sizes, int | float) and not isinstance(sizes, bool)
        fine = number and isfinite(sizes) and sizes >= 0
    if not fine:
        raise InputError(f"{name} must be 0 or more and finite, got {sizes!r}.")


def by_key(name: str, sizes: PerKey, score: Score) -> list[Tensor]:
    """Sizes for each key, tensors that broadcast to ``[*B, *F]``; 0 for keys that are not named.

    Raises:
        InputError: If a tensor does not broadcast.
    """
    given: Any = sizes
    if isinstance(sizes, Mapping):
        named = {as_tuple(key): size for key, size in sizes.items()}
        given = [named.get(as_tuple(key), 0.0) for key in score.keys]
    else:
        given = [sizes] * len(score.keys)
    found = []
    for key, x, size in zip(score.keys, score.inputs, given, strict=True):
        size = torch.as_tensor(size, dtype=x.dtype, device=x.device)
        try:
            size.expand(x.shape)
        except RuntimeError:
            raise InputError(
                f"{name} of {key!r} has shape {tuple(size.shape)}, which does not broadcast to the "
                f"input's {tuple(x.shape)}."
            ) from None
        found.append(size)
    return found


def normal_rows(inputs: Sequence[Tensor], n: int, generator: torch.Generator) -> list[Tensor]:
    """Standard normal numbers ``[n, *B, *F]`` for each key.

    Drawn row by row, in float64 and on the CPU, so that neither chunks, dtypes nor devices matter.
    """
    rows = [
        [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in inputs]
        for _ in range(n)
    ]
    return [
        torch.stack(key).to(dtype=x.dtype, device=x.device)
        for key, x in zip(zip(*rows, strict=True), inputs, strict=True)
    ]
