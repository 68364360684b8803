"""Does a method rank keys as permuting them does?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import nn

from tdhook_like.attribution.ablation import FeaturePermutation
from tdhook_like.attribution.method import Method
from tdhook_like.errors import InputError
from tdhook_like.keys import as_tuple
from tdhook_like.metrics.ranks import spearman
from tdhook_like.metrics.reading import by_key
from tdhook_like.metrics.table import aligned

__all__ = ["Agreement", "permutation_agreement"]

BY = ("keys", "features")


@dataclass(frozen=True)
class Agreement:
    """A method's importances beside those of permutation. Prints as a table.

    Attributes:
        method: By key or feature, the share of the mean absolute attribution.
        permutation: By key or feature, the share of the mean absolute change of the score.
        correlation: The rank correlation of the two; NaN for fewer than two keys.
        first: Whether both put the same one first.
        n_rows: How many elements and targets are averaged over.
    """

    method: Mapping[str, float]
    permutation: Mapping[str, float]
    correlation: float
    first: bool
    n_rows: int

    def __str__(self) -> str:
        lines = [("key", "attribution", "permutation")]
        for name, share in self.method.items():
            lines.append((name, f"{share:.1%}", f"{self.permutation[name]:.1%}"))
        return "\n".join(
            [
                *aligned(lines),
                f"rank correlation {self.correlation:.3f}, "
                f"{'the same' if self.first else 'another'} first, means over {self.n_rows} rows",
            ]
        )


def permutation_agreement(
    method: Method,
    module: nn.Module,
    td: TensorDictBase,
    *,
    in_keys: Any = None,
    out_keys: Sequence[NestedKey] | None = None,
    by: str = "keys",
    n_samples: int = 10,
    seed: int = 0,
) -> Agreement:
    """Compares what a method says matters with what moves the score when it comes from elsewhere.

    Permutation takes a key's values from other batch elements, so ``td`` has to be a batch of states
    as the policy meets them. It is ground truth for what the *score* depends on.

    Source: Breiman 2001, section 10; Fisher et al. 2019, for the importance of a key.

    Args:
        method: What is put to the test; its target is permutation's, too.
        module: The model; see :meth:`Method.prepare`, also for ``in_keys`` and ``out_keys``.
        td: A batch of inputs; it is left as it is.
        in_keys: See :meth:`Method.prepare`.
        out_keys: See :meth:`Method.prepare`.
        by: ``"keys"``, or ``"features"``: each one apart.
        n_samples: How many permutations of each.
        seed: Of the generator that these are drawn from, which is no other's.

    Raises:
        InputError: If there are fewer than two batch elements, or an option makes no sense.

    >>> from tensordict import TensorDict
    >>> from tensordict.nn import TensorDictModule
    >>> from tdhook_like import InputXGradient
    >>> net = TensorDictModule(lambda a, b: 3 * a + b, in_keys=["a", "b"], out_keys=["y"])
    >>> td = TensorDict({"a": torch.randn(64, 1), "b": torch.randn(64, 1)}, [64])
    >>> found = permutation_agreement(InputXGradient("y"), net, td)
    >>> found.correlation, found.first
    (1.0, True)
    """
    if by not in BY:
        raise InputError(f"by={by!r}: choose one of {', '.join(BY)}.")
    permuted = FeaturePermutation(
        method.target, keys=method.keys, groups=by, n_samples=n_samples, seed=seed
    )
    shares, n_rows = [], 0
    for one in (method, permuted):
        with one.prepare(module, in_keys, out_keys) as hooked:
            found = by_key(hooked.context, hooked.observe(td.copy()))
        importance: dict[str, float] = {}
        for key, values in found.items():
            name, n_rows = ".".join(as_tuple(key)), len(values)
            # A key's change is a single number; a method's share of a key is that of its features.
            values = values.sum(-1).abs() if by == "keys" and one is permuted else values.abs()
            each = values.mean(0)
            if by == "keys":
                importance[name] = each.sum().item()
            else:
                importance.update({f"{name}[{i}]": v for i, v in enumerate(each.tolist())})
        total = sum(importance.values()) or 1.0
        shares.append({name: value / total for name, value in importance.items()})
    ours, theirs = shares
    a, b = (torch.tensor([share[n] for n in ours], dtype=torch.float64) for share in shares)
    return Agreement(
        method=ours,
        permutation=theirs,
        correlation=spearman(a, b).item() if len(a) > 1 else float("nan"),
        first=bool(len(a)) and int(a.argmax()) == int(b.argmax()),
        n_rows=n_rows,
    )
