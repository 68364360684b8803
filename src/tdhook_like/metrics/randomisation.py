"""Does an explanation notice that the model has forgotten everything?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook_like.attribution.method import Method
from tdhook_like.attribution.perturbation import check_seed
from tdhook_like.errors import InputError, ModelError, PathError, listed
from tdhook_like.metrics.ranks import spearman
from tdhook_like.metrics.reading import by_key, rows
from tdhook_like.metrics.table import aligned
from tdhook_like.paths import walk
from tdhook_like.shadow import Shadow

__all__ = ["Randomisation", "parameter_randomisation"]

ORDERS = ("cascading", "independent")


@dataclass(frozen=True)
class Randomisation:
    """How alike attributions are before and after parameters are drawn anew. Prints as a table.

    Attributes:
        signed: By layer, the mean rank correlation of attributions.
        sizes: The same of their absolute values.
        order: ``"cascading"``: each layer together with all above; or ``"independent"``: each alone.
        n_rows: How many elements and targets that is the mean over.
    """

    signed: Mapping[str, float]
    sizes: Mapping[str, float]
    order: str
    n_rows: int

    def to_dict(self) -> dict[str, float]:
        """Flat names for a logger, such as ``"head/signed"``."""
        found = {f"{layer}/signed": value for layer, value in self.signed.items()}
        found.update({f"{layer}/sizes": value for layer, value in self.sizes.items()})
        return found

    def __str__(self) -> str:
        upto = "down to" if self.order == "cascading" else "only"
        lines = [("parameters drawn anew", "rank correlation", "of sizes")]
        for layer, value in self.signed.items():
            lines.append((f"{upto} {layer}", f"{value:.3f}", f"{self.sizes[layer]:.3f}"))
        return "\n".join([*aligned(lines), f"means over {self.n_rows} rows"])


def parameter_randomisation(
    method: Method,
    module: nn.Module,
    td: TensorDictBase,
    *,
    in_keys: Any = None,
    out_keys: Sequence[NestedKey] | None = None,
    layers: Sequence[str] | None = None,
    order: str = "cascading",
    seed: int = 0,
) -> Randomisation:
    """Draws parameters anew, layer by layer from the output down, and compares attributions.

    An explanation that stays as it was does not speak of what the model has learned. Each parameter is
    replaced by normal numbers of its own mean and standard deviation, on a shadow of the model: the
    model's own parameters are read, never written. Fix the target to an output or a recorded action:
    the greedy one of a randomised model is another.

    Source: Adebayo et al. 2018, section 4.

    Args:
        method: What is put to the test.
        module: The model; see :meth:`Method.prepare`, also for ``in_keys`` and ``out_keys``.
        td: A batch of inputs; it is left as it is.
        in_keys: See :meth:`Method.prepare`.
        out_keys: See :meth:`Method.prepare`.
        layers: Paths of the modules whose parameters are drawn, from the output down; all that have
            some if None, the last registered first.
        order: ``"cascading"`` or ``"independent"``.
        seed: Of the generator that parameters are drawn from, which is no other's.

    Raises:
        PathError: If a path names no module, or one without parameters.
        ModelError: If the model has no parameters.
        InputError: If ``order`` or ``seed`` make no sense.

    >>> from tensordict import TensorDict
    >>> from tdhook_like import InputXGradient
    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    >>> td = TensorDict({"x": torch.randn(20, 8)}, [20])
    >>> found = parameter_randomisation(
    ...     InputXGradient("y"), net, td, in_keys=["x"], out_keys=["y"]
    ... )
    >>> list(found.signed), all(abs(value) < 0.9 for value in found.signed.values())
    (['2', '0'], True)
    """
    if order not in ORDERS:
        raise InputError(f"order={order!r}: choose one of {', '.join(ORDERS)}.")
    check_seed(seed)
    with method.prepare(module, in_keys, out_keys) as hooked:
        context = hooked.context
        before = rows(by_key(context, hooked.observe(td.copy())))
        tree, model = context.tree, context.module
    chosen = _layers(tree, layers)
    signed, sizes = {}, {}
    shadow, fresh = Shadow(model), torch.Generator().manual_seed(seed)
    for path, layer in chosen:
        if order == "independent":
            shadow = Shadow(model)
        _randomise(shadow, [m for _, m, _ in walk(tree)], layer, fresh)
        subset = in_keys if out_keys is None else None  # a plain module is wrapped by now
        with method.prepare(shadow.model, subset) as hooked:
            after = rows(by_key(hooked.context, hooked.observe(td.copy())))
        signed[path or "(root)"] = _mean(spearman(before, after))
        sizes[path or "(root)"] = _mean(spearman(before.abs(), after.abs()))
    return Randomisation(signed, sizes, order, len(before))


def _layers(tree: nn.Module, asked: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """Modules that hold parameters themselves, from the output down."""
    every = {path: module for path, module, first in walk(tree) if first and _own(module)}
    if not every:
        raise ModelError(f"{type(tree).__name__} has no parameters that could be drawn anew.")
    if asked is None:
        return list(reversed(every.items()))
    wrong = [path for path in asked if path not in every]
    if wrong:
        raise PathError(
            f"{listed(wrong)} name no modules with parameters. There are {listed(every)}."
        )
    return [(path, every[path]) for path in asked]


def _own(module: nn.Module) -> list[Tensor]:
    if isinstance(module, TensorDictParams):
        return [value for value in module.values(True, True) if isinstance(value, Tensor)]
    return [value for value in module._parameters.values() if value is not None]


def _randomise(
    shadow: Shadow, modules: Sequence[nn.Module], layer: nn.Module, draw: torch.Generator
) -> None:
    """Gives a layer's shadow other parameters, and every module that shares them."""
    fresh: dict[int, nn.Parameter] = {}
    for value in _own(layer):
        own = value.detach().double().cpu()
        noise = torch.randn(own.shape, dtype=torch.float64, generator=draw)
        spread = own.std(correction=0) if own.numel() else 0.0
        fresh[id(value)] = nn.Parameter(
            (own.mean() + spread * noise).to(value), requires_grad=value.requires_grad
        )
    for module in modules:
        twin: Any = shadow.of(module)
        if isinstance(module, TensorDictParams):
            for key, value in module.items(True, True):
                if id(value) in fresh:
                    twin._param_td.set(key, fresh[id(value)])
            continue
        for name, value in module._parameters.items():
            if id(value) in fresh:
                twin._parameters[name] = fresh[id(value)]
        if hasattr(twin, "_flat_weights_names"):  # recurrent layers keep a list of their own
            twin._flat_weights = [getattr(twin, name) for name in twin._flat_weights_names]


def _mean(values: Tensor) -> float:
    """Over rows in which anything is ordered; NaN if there is none."""
    there = values[~values.isnan()]
    return there.mean().item() if there.numel() else float("nan")
