"""Methods that change inputs or draw samples, that captum has, too."""

from __future__ import annotations

from functools import partial
from math import comb
from typing import Any

import torch
from torch import Tensor

from captum_models import (
    TARGET,
    Model,
    Row,
    Y,
    as_list,
    at_keys,
    at_layer,
    baselined,
    captum_name,
    neural,
    unit,
)
from tdhook_like import (
    ExpectedGradients,
    FeatureAblation,
    FeaturePermutation,
    GradientShap,
    InputXGradient,
    KernelShap,
    Lime,
    NoiseTunnel,
    Occlusion,
    ShapleyValues,
    ShapleyValueSampling,
)


def grouped(cls: Any, model: Model, **options: Any) -> Any:
    """A method of captum's, whose masks have a batch dimension, of groups of features."""
    masks = model.packed({key: mask.unsqueeze(0) for key, mask in model.masks.items()})
    return baselined(cls, model, feature_mask=masks, **options)


def whole(cls: Any, **options: Any) -> Any:
    """A method that gives each feature the whole of what its group has, as captum's do."""
    return at_keys(lambda m: cls(Y, baselines=m.baselines, masks=m.masks, divide=False, **options))


def occluded(cls: Any, model: Model) -> Any:
    """Captum's occlusion."""
    first, *others = model.window.values()
    return baselined(cls, model, sliding_window_shapes=(first, *others) if others else first)


# --- permutations ---------------------------------------------------------------------------------


def apart(model: Model) -> dict[Any, Tensor]:
    """Masks of which no group spans two inputs, where captum permutes each input by itself."""
    return {**model.masks, "b": torch.tensor([2, 2, 3])} if "b" in model.masks else model.masks


def permuted(cls: Any, model: Model) -> list[Tensor]:
    """Captum's permutations, the one that changes nothing counted in."""
    masks = model.packed({key: mask.unsqueeze(0) for key, mask in apart(model).items()})
    found = as_list(cls(model.net).attribute(model.x, target=TARGET, feature_mask=masks))
    return [f * 23 / 24 for f in found]


def permuted_inside(cls: Any, model: Model) -> Tensor:
    """Captum's permutations of what the module inside gives; it raises where it is given a target."""
    method = cls(lambda *x: model.net(*x)[:, TARGET], model.module)
    return as_list(method.attribute(model.x))[0] * 23 / 24


# --- fits -----------------------------------------------------------------------------------------


class LeastSquares:
    """A weighted fit for captum's Lime and KernelShap, which leave theirs to scikit-learn.

    Args:
        ridge: The penalty on squared coefficients.
    """

    def __init__(self, ridge: float = 0.0) -> None:
        self.ridge, self.found = ridge, torch.empty(0)

    def fit(self, train_data: Any, **options: Any) -> None:
        """Solves the normal equations."""
        x, y, weight = (t.double() for t in next(iter(train_data)))
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        penalty = torch.tensor([*[self.ridge] * (x.shape[1] - 1), 0.0], dtype=x.dtype)
        normal = x.mT @ (weight.reshape(-1, 1) * x) + penalty.diag()
        self.found = torch.linalg.solve(normal, x.mT @ (weight.flatten() * y.flatten()))

    def representation(self) -> Tensor:
        """The coefficients."""
        return self.found[:-1].unsqueeze(0)


def kernel_shap(cls: Any, model: Model) -> Any:
    """KernelSHAP of captum's."""
    method = cls(model.net)
    method.interpretable_model = LeastSquares()
    return grouped(lambda net: method, model, n_samples=300, perturbations_per_eval=100)


def lime(cls: Any, model: Model) -> Any:
    """LIME of captum's, with all coalitions, our weights and ridge regression."""

    def weight(inputs: Any, changed: Any, present: Tensor, **options: Any) -> Tensor:
        n, size = present.numel(), int(present.sum())
        near = torch.tensor([-(((1 - (size / n) ** 0.5) / 0.25) ** 2)], dtype=torch.float64).exp()
        return near * 1000 / (n + 1) / comb(n, size)

    def every(inputs: Any, **options: Any) -> Any:
        n = options["num_interp_features"]
        for number in range(2**n):
            yield torch.tensor([[number >> i & 1 for i in range(n)]])

    return grouped(lambda net: cls(net, LeastSquares(1.0), weight, every), model, n_samples=2**4)


# --- draws ----------------------------------------------------------------------------------------


def one_by_one(model: Model) -> dict[Any, Any]:
    """Baselines that are drawn for each input by itself, which is what captum does."""

    def drawn(rows: Tensor, x: Tensor) -> Tensor:
        return rows[torch.randint(len(rows), x.shape[: x.ndim - rows.ndim + 1])]

    return {key: partial(drawn, rows) for key, rows in model.several().items()}


def expected(cls: Any, model: Model, **options: Any) -> Any:
    """GradientShap of captum's."""
    several = model.packed(model.several())
    return cls(model.net).attribute(model.x, several, target=TARGET, n_samples=1000, **options)


def smoothed(kind: str, cls: Any, model: Model) -> list[Tensor]:
    """Captum under noise; its variance is that of the draws, not of what they are drawn from."""
    inner = captum_name("InputXGradient")(model.net)
    options = {"nt_type": kind, "nt_samples": 250, "stdevs": 0.3, "target": TARGET}
    found = as_list(cls(inner).attribute(model.x, **options))
    return [f * 250 / 249 for f in found] if kind == "vargrad" else found


def noisy(kind: str) -> Any:
    """The same here."""
    options: dict[str, Any] = {"kind": kind, "stdevs": 0.3, "n_samples": 5000}
    return at_keys(lambda m: NoiseTunnel(InputXGradient(Y), **options))


MANY: dict[str, Any] = {"n_samples": 20000, "gap_tolerance": None}

PERTURBATIONS = (
    Row(
        *("FeatureAblation", "FeatureAblation"),
        at_keys(lambda m: FeatureAblation(Y, baselines=m.baselines)),
        baselined,
    ),
    Row(
        *("FeatureAblation(masks=…, divide=False)", "FeatureAblation(feature_mask=…)"),
        whole(FeatureAblation),
        grouped,
    ),
    Row(
        *("Occlusion", "Occlusion"),
        at_keys(lambda m: Occlusion(Y, window=m.window, baselines=m.baselines)),
        occluded,
        "captum averages in float32",
    ),
    Row(
        *("ShapleyValues(masks=…, divide=False)", "ShapleyValues", whole(ShapleyValues), grouped),
        "captum sums in float32",
    ),
    Row(
        *("Lime(masks=…, divide=False)", "Lime", whole(Lime), lime),
        "captum given all coalitions, our weights, ridge regression; in float32",
    ),
    Row(
        *("KernelShap(masks=…, divide=False)", "KernelShap", whole(KernelShap), kernel_shap),
        "here exact, of 4 groups; captum 20 × 300 coalitions",
        repeats=20,
    ),
    Row(
        *("ShapleyValueSampling(masks=…)", "ShapleyValueSampling"),
        whole(ShapleyValueSampling, n_samples=400),
        partial(grouped, n_samples=20, perturbations_per_eval=4),
        "400 orders",
        repeats=20,
    ),
    Row(
        *("FeaturePermutation(masks=…)", "FeaturePermutation"),
        at_keys(lambda m: FeaturePermutation(Y, masks=apart(m), divide=False, n_samples=600)),
        permuted,
        "600 permutations; captum leaves out the one of 24 that changes nothing",
        repeats=600,
    ),
    Row(
        *("FeaturePermutation(at=path)", "LayerFeaturePermutation"),
        at_layer(lambda m, at: FeaturePermutation(Y, keys=(), at=at, n_samples=20000)),
        permuted_inside,
        "20000 and 300 permutations",
        repeats=300,
    ),
)

SAMPLED = (
    Row(
        *("ExpectedGradients", "GradientShap"),
        at_keys(lambda m: ExpectedGradients(Y, baselines=one_by_one(m), **MANY)),
        expected,
        "20000 draws, of every input by itself",
        repeats=20,
    ),
    Row(
        *("GradientShap(stdevs=0.3)", "GradientShap"),
        at_keys(lambda m: GradientShap(Y, baselines=one_by_one(m), stdevs=0.3, **MANY)),
        partial(expected, stdevs=0.3),
        "20000 draws, of every input by itself",
        repeats=20,
    ),
    Row(
        *("GradientShap(Unit(…), stdevs=0.3)", "NeuronGradientShap"),
        at_keys(lambda m: GradientShap(unit(m), baselines=one_by_one(m), stdevs=0.3, **MANY)),
        lambda cls, m: neural(cls, m, baselines=m.packed(m.several()), n_samples=1000, stdevs=0.3),
        "20000 draws, of every input by itself",
        repeats=20,
    ),
    *(
        Row(
            *(f"NoiseTunnel(kind={kind!r})", "NoiseTunnel", noisy(kind), partial(smoothed, kind)),
            "5000 draws" + (", captum's variance times n / (n − 1)" if kind == "vargrad" else ""),
            repeats=20,
        )
        for kind in ("smoothgrad", "smoothgrad_sq", "vargrad")
    ),
)
