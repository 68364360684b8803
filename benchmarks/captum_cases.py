"""Methods of gradients, at inputs, inside the model and of its neurons, that captum has, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captum_models import (
    TARGET,
    Model,
    Row,
    Y,
    at_keys,
    at_layer,
    baselined,
    captum_name,
    layered,
    neural,
    unit,
    written,
)
from tdhook_like import (
    LRP,
    Conductance,
    Deconvolution,
    DeepLift,
    DeepLiftShap,
    FeatureAblation,
    GradCAM,
    GuidedBackprop,
    GuidedGradCAM,
    InputXGradient,
    IntegratedGradients,
    InternalInfluence,
    Method,
    Saliency,
)
from tdhook_like.attribution.lrp import EpsilonRule, IgnoreRule, MaskRule, PassRule, TypeMapper

GRADIENTS = (
    Row(
        *("Saliency", "Saliency", at_keys(lambda m: Saliency(Y))),
        lambda cls, m: cls(m.net).attribute(m.x, target=TARGET),
    ),
    Row(
        *("InputXGradient", "InputXGradient", at_keys(lambda m: InputXGradient(Y))),
        lambda cls, m: cls(m.net).attribute(m.x, target=TARGET),
    ),
    Row(
        *("GuidedBackprop", "GuidedBackprop", at_keys(lambda m: GuidedBackprop(Y))),
        lambda cls, m: cls(m.net).attribute(m.x, target=TARGET),
    ),
    Row(
        *("Deconvolution", "Deconvolution", at_keys(lambda m: Deconvolution(Y))),
        lambda cls, m: cls(m.net).attribute(m.x, target=TARGET),
    ),
    Row(
        *("IntegratedGradients", "IntegratedGradients"),
        at_keys(lambda m: IntegratedGradients(Y, baselines=m.baselines, gap_tolerance=None)),
        baselined,
        "50 steps; captum's weights are rounded to float32",
    ),
    Row(
        *("DeepLift", "DeepLift", at_keys(lambda m: DeepLift(Y, baselines=m.baselines))),
        baselined,
        "modules of captum's list alone, none right behind another one: see below",
    ),
    Row(
        *("DeepLiftShap", "DeepLiftShap"),
        at_keys(lambda m: DeepLiftShap(Y, baselines=m.several())),
        lambda cls, m: cls(m.net).attribute(m.x, m.packed(m.several()), target=TARGET),
        "7 baselines",
    ),
    Row(
        *("LRP", "LRP"),
        at_keys(lambda m: LRP(epsilon(), Y)),
        lambda cls, m: cls(m.net).attribute(m.x, target=TARGET),
        "epsilon 1e-9; captum's is signed, too",
    ),
)


def epsilon() -> Any:
    """The rules that captum gives to layers on its own."""
    return TypeMapper(
        {
            (nn.Linear, nn.Conv2d, nn.MaxPool2d): EpsilonRule(1e-9),
            (nn.ReLU, nn.Tanh): PassRule(),
        }
    )


INSIDE = (
    Row(
        *("activations=path", "LayerActivation"),
        at_layer(lambda m, at: Saliency(Y, activations=at), "activations"),
        lambda cls, m: cls(m.net, m.module).attribute(m.x),
    ),
    Row(
        *("InputXGradient(at=path)", "LayerGradientXActivation"),
        at_layer(lambda m, at: InputXGradient(Y, at=at)),
        layered,
    ),
    Row(
        *("GradCAM(at=path)", "LayerGradCam"),
        at_layer(lambda m, at: GradCAM(Y, at=at, interpolate=None)),
        lambda cls, m: layered(cls, m, relu_attributions=True).squeeze(1),
        "relu_attributions=True",
        only=("CNN",),
    ),
    Row(
        *("GuidedGradCAM(at=path)", "GuidedGradCam"),
        lambda m: written(GuidedGradCAM(Y, at=(m.layer,), interpolate="nearest"), m),
        layered,
        "interpolate='nearest'",
        only=("CNN",),
    ),
    Row(
        *("LRP(at=path)", "LayerLRP", at_layer(lambda m, at: LRP(epsilon(), Y, at=at))),
        layered,
    ),
    Row(
        *("DeepLift(at=path)", "LayerDeepLift"),
        at_layer(lambda m, at: DeepLift(Y, baselines=m.baselines, at=at)),
        lambda cls, m: layered(cls, m, baselines=m.b),
    ),
    Row(
        *("DeepLiftShap(at=path)", "LayerDeepLiftShap"),
        at_layer(lambda m, at: DeepLiftShap(Y, baselines=m.several(), at=at)),
        lambda cls, m: layered(cls, m, baselines=m.packed(m.several())),
    ),
    Row(
        *("IntegratedGradients(at=path)", "LayerIntegratedGradients"),
        at_layer(
            lambda m, at: IntegratedGradients(
                Y, baselines=m.baselines, keys=(), at=at, gap_tolerance=None
            )
        ),
        lambda cls, m: layered(cls, m, baselines=m.b),
    ),
    Row(
        *("InternalInfluence(at=path)", "InternalInfluence"),
        at_layer(lambda m, at: InternalInfluence(Y, baselines=m.baselines, at=at)),
        lambda cls, m: layered(cls, m, baselines=m.b),
    ),
    Row(
        *("Conductance(at=path)", "LayerConductance"),
        at_layer(lambda m, at: Conductance(Y, baselines=m.baselines, n_steps=3000, at=at)),
        lambda cls, m: layered(cls, m, baselines=m.b, n_steps=3000, method="riemann_trapezoid"),
        "3000 steps: other sums of one integral, see below",
    ),
    Row(
        *("FeatureAblation(at=path)", "LayerFeatureAblation"),
        at_layer(lambda m, at: FeatureAblation(Y, keys=(), at=at)),
        lambda cls, m: layered(cls, m, layer_baselines=at_zero(m)),
        "layer_baselines: what the layer gives at 0",
    ),
)


def at_zero(model: Model) -> Tensor:
    """What the module inside gives where all inputs are zero."""
    zeros = model.packed({key: torch.zeros_like(x[:1]) for key, x in model.inputs.items()})
    return captum_name("LayerActivation")(model.net, model.module).attribute(zeros)


NEURONS = (
    Row(
        *("Saliency(Unit(…), abs=False)", "NeuronGradient"),
        at_keys(lambda m: Saliency(unit(m), abs=False)),
        neural,
    ),
    Row(
        *("IntegratedGradients(Unit(…))", "NeuronIntegratedGradients"),
        at_keys(lambda m: IntegratedGradients(unit(m), baselines=m.baselines, gap_tolerance=None)),
        lambda cls, m: neural(cls, m, baselines=m.b),
    ),
    Row(
        *("DeepLift(Unit(…))", "NeuronDeepLift"),
        at_keys(lambda m: DeepLift(unit(m), baselines=m.baselines)),
        lambda cls, m: neural(cls, m, baselines=m.b),
    ),
    Row(
        *("DeepLiftShap(Unit(…))", "NeuronDeepLiftShap"),
        at_keys(lambda m: DeepLiftShap(unit(m), baselines=m.several())),
        lambda cls, m: neural(cls, m, baselines=m.packed(m.several())),
    ),
    Row(
        *("GuidedBackprop(Unit(…))", "NeuronGuidedBackprop"),
        at_keys(lambda m: GuidedBackprop(unit(m))),
        neural,
    ),
    Row(
        *("Deconvolution(Unit(…))", "NeuronDeconvolution"),
        at_keys(lambda m: Deconvolution(unit(m))),
        neural,
    ),
    Row(
        *("FeatureAblation(Unit(…))", "NeuronFeatureAblation"),
        at_keys(lambda m: FeatureAblation(unit(m), baselines=m.baselines)),
        lambda cls, m: neural(cls, m, baselines=m.b),
    ),
    Row(
        *("IntegratedGradients(rules=…MaskRule)", "NeuronConductance"),
        lambda m: written(through_unit(m), m),
        lambda cls, m: neural(cls, m, target=TARGET, baselines=m.b, method="gausslegendre"),
        "the gradient passes by one unit alone",
    ),
)


def through_unit(model: Model) -> Method:
    """Integrated gradients of which only what flows through one unit counts."""
    shape = written_shape(model)
    mask = torch.zeros(shape[1:], dtype=torch.float64)
    mask[model.unit] = 1.0
    rule = MaskRule(mask.unsqueeze(0))
    return IntegratedGradients(
        Y,
        baselines=model.baselines,
        gap_tolerance=None,
        # Nothing else has a rule: the model's own gradient is followed.
        rules=lambda name, module: rule if name == model.layer else IgnoreRule(),
    )


def written_shape(model: Model) -> torch.Size:
    """The shape of what the module inside gives."""
    return at_layer(lambda m, at: Saliency(Y, activations=at), "activations")(model).values[0].shape
