"""The libraries to compare with, as their users call them. None of them is needed."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from floors import ORDERS, STEPS, STRIDE, WINDOW
from timing import Contestant

Maker = Callable[[str, nn.Module, Tensor, int, ExitStack], "Contestant | None"]


def _import(name: str) -> None:
    # zennit imports torchvision, whose operators do not load beside a CPU torch; where a
    # module of this name is on the path, it registers them.
    if name == "zennit" and importlib.util.find_spec("tvfix") is not None:
        importlib.import_module("tvfix")
    for part in {
        "captum": ("captum.attr", "captum.attr._utils.lrp_rules"),
        "zennit": ("zennit.attribution", "zennit.composites", "zennit.rules"),
        "tdhook": ("tdhook.attribution", "tdhook.attribution.lrp_helpers.rules"),
    }[name]:
        importlib.import_module(part)


def find() -> tuple[dict[str, Maker], dict[str, str]]:
    """Tell the peers that import from those that are left out, the latter with the reason."""
    present: dict[str, Maker] = {}
    missing: dict[str, str] = {}
    for name, maker in {"captum": captum, "zennit": zennit, "tdhook": tdhook}.items():
        if importlib.util.find_spec(name) is None:
            missing[name] = "not installed"
            continue
        try:
            _import(name)
        except Exception as error:  # whatever a broken installation raises
            missing[name] = f"does not import: {type(error).__name__}: {error}"
        else:
            present[name] = maker
    return present, missing


def captum(
    method: str, net: nn.Module, x: Tensor, targets: int, stack: ExitStack
) -> Contestant | None:
    """Give captum's call; it takes one target per call."""
    del stack
    from captum import attr
    from captum.attr._utils.lrp_rules import EpsilonRule

    net = copy.deepcopy(net)
    # It has no default for the last two, and passes relevance through them only if told to.
    ruled = (nn.Linear, nn.Conv2d, nn.Flatten, nn.Identity)
    modules = [module for module in net.modules() if isinstance(module, ruled)]

    def epsilon(x: Tensor) -> Tensor:
        # A call takes the rules off the modules again.
        for module in modules:
            module.rule = EpsilonRule()  # type: ignore[assignment]
        return lrp.attribute(x, target=0)

    def integrated(x: Tensor) -> list[Tensor]:
        return [ig.attribute(x, target=index, n_steps=STEPS) for index in range(targets)]

    def occluded(x: Tensor) -> Tensor:
        window, stride = (x.shape[1], WINDOW, WINDOW), (x.shape[1], STRIDE, STRIDE)
        return occlusion.attribute(x, window, stride, target=0)

    saliency, product = attr.Saliency(net), attr.InputXGradient(net)
    ig, lrp = attr.IntegratedGradients(net), attr.LRP(net)
    occlusion, ablation = attr.Occlusion(net), attr.FeatureAblation(net)
    shapley = attr.ShapleyValueSampling(net)
    call = {
        "saliency": lambda x: saliency.attribute(x, target=0, abs=False),
        "input_x_gradient": lambda x: product.attribute(x, target=0),
        "ig": integrated,
        "lrp": epsilon,
        # A fresh one each time: every call leaves handles behind that all later ones go through.
        "deeplift": lambda x: attr.DeepLift(net).attribute(x, target=0),
        "ablation": lambda x: ablation.attribute(x, target=0),
        "shapley": lambda x: shapley.attribute(x, target=0, n_samples=ORDERS),
        "occlusion": occluded,
    }.get(method)
    return None if call is None else Contestant(call, x.clone)


def zennit(
    method: str, net: nn.Module, x: Tensor, targets: int, stack: ExitStack
) -> Contestant | None:
    """Give zennit's call inside its context, or that context alone."""
    del targets
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlus, LayerMapComposite
    from zennit.rules import AlphaBeta, Epsilon, Gamma, Pass

    net = copy.deepcopy(net)
    composite = {
        "saliency": None,
        "lrp": LayerMapComposite([((nn.Linear, nn.Conv2d), Epsilon())]),
        "alpha2beta1": LayerMapComposite([((nn.Linear, nn.Conv2d), AlphaBeta())]),
        "gamma": LayerMapComposite([((nn.Linear, nn.Conv2d), Gamma())]),
        "epsilon_plus": EpsilonPlus(),
        "enter": LayerMapComposite([((nn.Identity,), Pass())]),
    }.get(method, method)
    if composite is method:
        return None
    if method == "enter":

        def enter(x: Tensor) -> None:
            del x
            with composite.context(net):
                pass

        return Contestant(enter, x.clone)
    start = torch.zeros_like(net(x))
    start[..., 0] = 1
    attributor = stack.enter_context(Gradient(model=net, composite=composite))

    def explain(x: Tensor) -> Tensor:
        return attributor(x, start)[1]

    return Contestant(explain, lambda: x.clone().requires_grad_())


def _pick(index: int) -> Callable[[TensorDict, TensorDict], TensorDict]:
    def pick(outputs: TensorDict, others: TensorDict) -> TensorDict:
        del others
        return TensorDict({"y": outputs["y"][..., index]}, batch_size=outputs.batch_size)

    return pick


def tdhook(
    method: str, net: nn.Module, x: Tensor, targets: int, stack: ExitStack
) -> Contestant | None:
    """Give tdhook's call inside its context, or that context alone; one target per call."""
    from tdhook.attribution import LRP, IntegratedGradients, Saliency
    from tdhook.attribution.lrp_helpers.rules import EpsilonPlus, EpsilonRule, PassRule

    module = TensorDictModule(copy.deepcopy(net), ["x"], ["y"])
    epsilon, ignored = EpsilonRule(), PassRule()

    def lrp(mapper: Callable[[str, nn.Module], Any]) -> Any:
        return LRP(init_attr_targets=_pick(0), rule_mapper=mapper, warn_on_missing_rule=False)

    makers: dict[str, Callable[[], list[Any]]] = {
        "saliency": lambda: [Saliency(init_attr_targets=_pick(0))],
        "input_x_gradient": lambda: [Saliency(init_attr_targets=_pick(0), multiply_by_inputs=True)],
        "ig": lambda: [
            IntegratedGradients(
                init_attr_targets=_pick(index), n_steps=STEPS, multiply_by_inputs=True
            )
            for index in range(targets)
        ],
        "lrp": lambda: [
            lrp(lambda _, child: epsilon if isinstance(child, nn.Linear | nn.Conv2d) else None)
        ],
        "epsilon_plus": lambda: [
            LRP(
                init_attr_targets=_pick(0),
                rule_mapper=EpsilonPlus(),
                skip_modules=LRP.default_skip,
                warn_on_missing_rule=False,
            )
        ],
        "enter": lambda: [
            lrp(lambda _, child: ignored if isinstance(child, nn.Identity) else None)
        ],
    }
    if method not in makers:
        return None
    methods = makers[method]()
    if method == "enter":

        def enter(td: TensorDict) -> None:
            del td
            with methods[0].prepare(module):
                pass

        return Contestant(enter, x.clone)
    hooked = [stack.enter_context(each.prepare(module)) for each in methods]

    def explain(tds: list[TensorDict]) -> None:
        for call, td in zip(hooked, tds, strict=True):
            call(td)

    def fresh() -> list[TensorDict]:
        content = {"x": x, ("baseline", "x"): torch.zeros_like(x)}
        return [TensorDict(content, batch_size=[len(x)]).clone() for _ in hooked]

    return Contestant(explain, fresh)
