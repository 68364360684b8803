"""Which key, which feature, which time step, which agent made the policy do that?

Attribution for policies and models that speak TensorDict::

    with LRP(EpsilonPlus(), target="state_value").prepare(critic) as hooked:
        td = hooked(td)                 # the critic's outputs, unchanged, plus
    td["attr", "observation"]           # relevance, of the shape of td["observation"]
"""

from tdhook_like.attribution import (
    LRP,
    FeatureAblation,
    FeaturePermutation,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    Lime,
    Method,
    Occlusion,
    Saliency,
    ShapleyValues,
    ShapleyValueSampling,
)
from tdhook_like.attribution.lrp import CPLRP, AttnLRP, EpsilonPlus
from tdhook_like.baselines import FromBuffer, FromKey
from tdhook_like.context import HookContext, HookedModule
from tdhook_like.errors import (
    BaselineError,
    ConservationError,
    ContextError,
    InputError,
    KeyNotFoundError,
    LayoutError,
    LockedError,
    ModelError,
    PathError,
    RuleError,
    TargetError,
    TdhookLikeError,
    UnhandledOperationWarning,
)
from tdhook_like.targets import (
    AtStep,
    Contrast,
    Each,
    Function,
    Greedy,
    LogProb,
    Output,
    Taken,
    Target,
)
from tdhook_like.writing import CompletenessWarning

__version__ = "0.1.0"

__all__ = [
    "CPLRP",
    "LRP",
    "AtStep",
    "AttnLRP",
    "BaselineError",
    "CompletenessWarning",
    "ConservationError",
    "ContextError",
    "Contrast",
    "Each",
    "EpsilonPlus",
    "FeatureAblation",
    "FeaturePermutation",
    "FromBuffer",
    "FromKey",
    "Function",
    "Greedy",
    "HookContext",
    "HookedModule",
    "InputError",
    "InputXGradient",
    "IntegratedGradients",
    "KernelShap",
    "KeyNotFoundError",
    "LayoutError",
    "Lime",
    "LockedError",
    "LogProb",
    "Method",
    "ModelError",
    "Occlusion",
    "Output",
    "PathError",
    "RuleError",
    "Saliency",
    "ShapleyValueSampling",
    "ShapleyValues",
    "Taken",
    "Target",
    "TargetError",
    "TdhookLikeError",
    "UnhandledOperationWarning",
]
