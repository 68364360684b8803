"""The methods: pure functions of inputs, baselines, scores and gradients."""

from tdhook_like.attribution.ablation import FeatureAblation, FeaturePermutation
from tdhook_like.attribution.gradient import LRP, InputXGradient, Saliency
from tdhook_like.attribution.method import Attribution, GradientMethod, Method, PathMethod
from tdhook_like.attribution.occlusion import Blurred, Occlusion
from tdhook_like.attribution.path import IntegratedGradients
from tdhook_like.attribution.shapley import ShapleyValues, ShapleyValueSampling
from tdhook_like.attribution.surrogate_models import KernelShap, Lime

__all__ = [
    "LRP",
    "Attribution",
    "Blurred",
    "FeatureAblation",
    "FeaturePermutation",
    "GradientMethod",
    "InputXGradient",
    "IntegratedGradients",
    "KernelShap",
    "Lime",
    "Method",
    "Occlusion",
    "PathMethod",
    "Saliency",
    "ShapleyValueSampling",
    "ShapleyValues",
]
