"""The methods: pure functions of inputs, baselines, scores and gradients."""

from tdhook_like.attribution.ablation import FeatureAblation, FeaturePermutation
from tdhook_like.attribution.cam import GradCAM, GuidedGradCAM
from tdhook_like.attribution.combined import (
    AttributionContrast,
    AttributionMean,
    AttributionSum,
)
from tdhook_like.attribution.deeplift import DeepLift, DeepLiftShap
from tdhook_like.attribution.expected import ExpectedGradients, GradientShap, OverBaselines
from tdhook_like.attribution.given_path import PathIntegratedGradients
from tdhook_like.attribution.gradient import LRP, InputXGradient, Saliency
from tdhook_like.attribution.layers import Conductance, InternalInfluence
from tdhook_like.attribution.maximisation import ActivationMaximisation
from tdhook_like.attribution.method import Attribution, GradientMethod, Method, PathMethod
from tdhook_like.attribution.noise import NoiseTunnel
from tdhook_like.attribution.occlusion import Blurred, Occlusion
from tdhook_like.attribution.path import IntegratedGradients
from tdhook_like.attribution.rectified import Deconvolution, GuidedBackprop
from tdhook_like.attribution.shapley import ShapleyValues, ShapleyValueSampling
from tdhook_like.attribution.surrogate_models import KernelShap, Lime

__all__ = [
    "LRP",
    "ActivationMaximisation",
    "Attribution",
    "AttributionContrast",
    "AttributionMean",
    "AttributionSum",
    "Blurred",
    "Conductance",
    "Deconvolution",
    "DeepLift",
    "DeepLiftShap",
    "ExpectedGradients",
    "FeatureAblation",
    "FeaturePermutation",
    "GradCAM",
    "GradientMethod",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCAM",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "KernelShap",
    "Lime",
    "Method",
    "NoiseTunnel",
    "Occlusion",
    "OverBaselines",
    "PathIntegratedGradients",
    "PathMethod",
    "Saliency",
    "ShapleyValueSampling",
    "ShapleyValues",
]
