"""Attributions where torchrl works: replay buffers, trainers, evaluations. Needs the ``rl`` extra.

A hooked policy needs none of this to act, in ``env.rollout`` or in a collector: it stands wherever
the policy stood. The parts here *observe*: nothing of model, random numbers or training changes.
"""

from tdhook_like.rl.defaults import ExpectedValue
from tdhook_like.rl.evaluation import attribution_metrics
from tdhook_like.rl.trainer import AttributionHook
from tdhook_like.rl.transform import AttributionTransform

__all__ = ["AttributionHook", "AttributionTransform", "ExpectedValue", "attribution_metrics"]
