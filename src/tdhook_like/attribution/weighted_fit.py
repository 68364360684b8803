"""Weighted least squares from running sums, with standard errors by leaving draws out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tdhook_like.errors import InputError

__all__ = ["FOLDS", "WeightedFit"]

FOLDS = 20
"""Into how many parts draws are divided; errors come from leaving out one after another."""


class WeightedFit:
    """Coefficients of zeros and ones: ``Σ w (y − c − z·φ)²`` is least, from sums that do not grow.

    Standard errors are the jackknife's: without one fold of the draws after another, the
    coefficients differ by what they owe to chance. Enumerated rows belong to no fold.

    Source: Efron & Stein 1981, eq. 1.1; for groups of draws Shao & Tu 1995, section 2.3.

    Args:
        n: The number of coefficients.
        like: What one row's y looks like, ``[*E, T]``.

    >>> fit = WeightedFit(2, torch.zeros(1))
    >>> z = torch.tensor([[True, False], [False, True], [True, True]])
    >>> fit.add(z, torch.ones(3), torch.tensor([[1.0], [2.0], [3.0]]))
    >>> values, errors = fit.summing_to(torch.tensor([3.0]))
    >>> values.flatten(), errors.flatten()
    (tensor([1., 2.], dtype=torch.float64), tensor([0., 0.], dtype=torch.float64))
    """

    def __init__(self, n: int, like: Tensor) -> None:
        self._n, self._shape = n, like.shape
        # A last column of ones, for the constant; the last fold is of rows that are enumerated.
        size, device = n + 1, like.device
        self._zz = torch.zeros(1, size, size, dtype=torch.float64, device=device)
        self._zy = torch.zeros(1, size, like.numel(), dtype=torch.float64, device=device)
        self._drawn = torch.zeros(FOLDS, dtype=torch.float64, device=device)

    def add(self, z: Tensor, weights: Tensor, y: Tensor, folds: Tensor | None = None) -> None:
        """Takes rows in.

        Args:
            z: ``[c, n]``, bool.
            weights: ``[c]``.
            y: ``[c, *E, T]``.
            folds: To which part of the draws each row belongs, ``[c]``; None if it is enumerated.
        """
        y = y.double().flatten(1)
        z = torch.cat([z.double(), torch.ones_like(z[:, :1], dtype=torch.float64)], 1)
        weights = weights.double().unsqueeze(1)
        if folds is None:
            self._zz[-1] += (weights * z).mT @ z
            self._zy[-1] += (weights * z).mT @ y
            return
        if len(self._zz) == 1:
            self._zz, self._zy = (
                torch.cat([t.new_zeros(FOLDS, *t.shape[1:]), t]) for t in (self._zz, self._zy)
            )
        # Rows of a fold beside each other, filled up with rows that weigh nothing.
        member = folds.unsqueeze(1) == torch.arange(FOLDS, device=folds.device)
        place = (member.cumsum(0) - 1).gather(1, folds.unsqueeze(1)).squeeze(1)
        shape = (FOLDS, int(member.sum(0).max()))

        def by_fold(rows: Tensor) -> Tensor:
            return rows.new_zeros(*shape, rows.shape[1]).index_put((folds, place), rows)

        z, weighted, y = by_fold(z), by_fold(weights * z), by_fold(y)
        self._zz[:FOLDS].baddbmm_(weighted.mT, z)
        self._zy[:FOLDS].baddbmm_(weighted.mT, y)
        self._drawn += member.sum(0)

    def summing_to(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients without a constant that sum to ``total``, and their standard errors.

        Args:
            total: ``[*E, T]``.

        Returns:
            Twice ``[n, *E, T]``.
        """
        n, total = self._n, total.double().reshape(1, -1)
        if n < 2:
            values = total.expand(n, -1)
            return self._shaped(values), self._shaped(torch.zeros_like(values))

        def solve(zz: Tensor, zy: Tensor) -> Tensor:
            # The column of ones is Lagrange's, whose multiplier keeps the sum.
            system = torch.nn.functional.pad(zz[..., :n, :n], (0, 1, 0, 1), value=1.0)
            system[..., n, n] = 0
            return _solved(
                system, torch.cat([zy[..., :n, :], total.expand(*zy.shape[:-2], 1, -1)], -2)
            )

        return self._jackknife(solve)

    def with_constant(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Coefficients beside a constant, and their standard errors.

        Args:
            ridge: The penalty on squared coefficients; the constant is free.

        Returns:
            Twice ``[n, *E, T]``.
        """
        if not self._n:
            none = self._zy[0, :0]
            return self._shaped(none), self._shaped(none)
        penalty = torch.full((self._n + 1,), float(ridge), dtype=torch.float64)
        penalty[-1] = 0
        penalty = penalty.diag().to(self._zz.device)
        return self._jackknife(lambda zz, zy: _solved(zz + penalty, zy))

    def _jackknife(self, solve: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        values = solve(self._zz.sum(0), self._zy.sum(0))[: self._n]
        if len(self._zz) == 1:
            return self._shaped(values), self._shaped(torch.zeros_like(values))
        # The draws that are left stand for all of them.
        scale = (self._drawn.sum() / (self._drawn.sum() - self._drawn)).reshape(-1, 1, 1)
        zz, zy = (t[FOLDS] + (t[:FOLDS].sum(0) - t[:FOLDS]) * scale for t in (self._zz, self._zy))
        without = solve(zz, zy)[:, : self._n]
        away = without - without.mean(0)
        errors = ((FOLDS - 1) / FOLDS * away.square().sum(0)).sqrt()
        return self._shaped(values), self._shaped(errors)

    def _shaped(self, values: Tensor) -> Tensor:
        return values.reshape(self._n, *self._shape)


def _solved(system: Tensor, right: Tensor) -> Tensor:
    found, info = torch.linalg.solve_ex(system, right)
    if info.any():
        raise InputError(
            "The coalitions that were drawn do not determine the coefficients: take more n_samples, "
            "larger groups, or (with Lime) a ridge above 0."
        )
    return found
