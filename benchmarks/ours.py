"""What is measured: every method through keys, a TensorDict in and a TensorDict out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from floors import ORDERS, STEPS, STRIDE, WINDOW
from tdhook_like import LRP, InputXGradient, IntegratedGradients, Saliency
from tdhook_like.attribution.ablation import FeatureAblation
from tdhook_like.attribution.deeplift import DeepLift
from tdhook_like.attribution.lrp import (
    CPLRP,
    AlphaBetaRule,
    AttnLRP,
    EpsilonPlus,
    EpsilonRule,
    GammaRule,
    Rule,
    RuleMapper,
)
from tdhook_like.attribution.occlusion import Occlusion
from tdhook_like.attribution.shapley import ShapleyValueSampling
from tdhook_like.targets import Each
from timing import Contestant

FIRST = ("logits", 0)


def _on_layers(rule: Rule) -> RuleMapper:
    return lambda name, module: rule if isinstance(module, nn.Linear | nn.Conv2d) else None


class Watch(Rule):
    """Reached at every call, and changes nothing: the hook alone is what it costs."""

    def surrogate(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the module's own gradient."""
        del module, inputs, output


def _on_every_link(name: str, module: nn.Module) -> Rule | None:
    del name
    return Watch() if isinstance(module, nn.Identity) else None


_METHODS: dict[str, Callable[[int], Any]] = {
    "saliency": lambda targets: Saliency(FIRST, abs=False),
    "input_x_gradient": lambda targets: InputXGradient(FIRST),
    "ig": lambda targets: IntegratedGradients(
        {f"action {index}": ("logits", index) for index in range(targets)}, n_steps=STEPS
    ),
    "ig_each": lambda targets: IntegratedGradients(Each("logits"), n_steps=STEPS),
    "deeplift": lambda targets: DeepLift(FIRST),
    "ablation": lambda targets: FeatureAblation(FIRST),
    "shapley": lambda targets: ShapleyValueSampling(FIRST, n_samples=ORDERS),
    "occlusion": lambda targets: Occlusion(FIRST, window=(WINDOW, WINDOW), stride=(STRIDE, STRIDE)),
    "lrp": lambda targets: LRP(_on_layers(EpsilonRule()), target=FIRST),
    "epsilon_plus": lambda targets: LRP(EpsilonPlus(), target=FIRST),
    "alpha2beta1": lambda targets: LRP(_on_layers(AlphaBetaRule()), target=FIRST),
    "gamma": lambda targets: LRP(_on_layers(GammaRule()), target=FIRST),
    "attn_lrp": lambda targets: LRP(AttnLRP(), target=FIRST),
    "cp_lrp": lambda targets: LRP(CPLRP(), target=FIRST),
    "enter": lambda targets: LRP(_on_every_link, target=FIRST),
    "call": lambda targets: LRP(_on_every_link, target=FIRST),
    "plain": lambda targets: Saliency(FIRST),
}


def _policy(net: nn.Module) -> TensorDictModule:
    return TensorDictModule(copy.deepcopy(net), ["observation"], ["logits"])


def _fresh(x: Tensor) -> Callable[[], TensorDict]:
    return lambda: TensorDict({"observation": x.clone()}, batch_size=[len(x)])


def contestant(
    method: str, net: nn.Module, x: Tensor, targets: int, stack: ExitStack
) -> Contestant:
    """Give our call: inside its context, or entering it, or the plain call beside it."""
    policy = _policy(net)
    description = _METHODS[method](targets)
    if method == "enter":

        def enter(td: TensorDict) -> None:
            del td
            with description.prepare(policy):
                pass

        return Contestant(enter, _fresh(x))
    hooked = stack.enter_context(description.prepare(policy))
    return Contestant(policy if method == "plain" else hooked, _fresh(x))


def integrated(net: nn.Module, x: Tensor, steps: int, stack: ExitStack) -> Contestant:
    """Integrated gradients with so many steps."""
    method = IntegratedGradients(FIRST, n_steps=steps)
    return Contestant(stack.enter_context(method.prepare(_policy(net))), _fresh(x))


def plain_floor(net: nn.Module, x: Tensor) -> Contestant:
    """The plain call of a policy that nothing was ever wrapped around."""
    return Contestant(_policy(net), _fresh(x))
