"""The methods: pure functions of inputs, baselines, scores and gradients."""

from tdhook_like.attribution.gradient import LRP, InputXGradient, Saliency
from tdhook_like.attribution.method import Attribution, GradientMethod, Method, PathMethod
from tdhook_like.attribution.path import IntegratedGradients

__all__ = [
    "LRP",
    "Attribution",
    "GradientMethod",
    "InputXGradient",
    "IntegratedGradients",
    "Method",
    "PathMethod",
    "Saliency",
]
