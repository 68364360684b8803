"""Where other libraries' relevance departs from the papers, in numbers small enough to check by hand.

Run with the peers installed (any of them may be missing): ``python benchmarks/peer_deviations.py``.
Prints one line for each case: what the formula gives, what this library gives, and what each peer
gives under its own rule of that name. ``docs/coming-from-captum-and-zennit.md`` quotes the table.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from deviation_models import (
    Across,
    Container,
    Fused,
    Gated,
    Inner,
    Masked,
    Normed,
    OfTwo,
    Residual,
    Twice,
    Weighed,
    linear,
    normed_weight,
)
from tdhook_like import LRP, IntegratedGradients, Saliency
from tdhook_like.attribution.lrp import (
    AHQKVRule,
    AlphaBetaRule,
    EpsilonRule,
    GammaRule,
    GuidedBackpropMapper,
    LayerNormRule,
    PseudoIdentityRule,
    SoftmaxEpsilonRule,
    WSquareRule,
)

Give = Callable[[nn.Module, Tensor], Tensor]
PEERS = ("captum", "zennit", "tdhook", "lxt")


@dataclass(frozen=True)
class Case:
    """One claim.

    Attributes:
        claim: What is compared.
        build: Makes the model, with weights that one can compute with.
        x: Its input, one sample.
        formula: What the source gives for it, worked out by hand.
        ours: Relevance, from model and input.
        peers: Likewise, by the peer's name.
    """

    claim: str
    build: Callable[[], nn.Module]
    x: Any
    formula: str
    ours: Give
    peers: dict[str, Give] = field(default_factory=dict)


# --- this library ---------------------------------------------------------------------------------


def ours(rule: Any, kinds: Any = nn.Linear) -> Give:
    """Relevance by one rule on modules of some types, from the output's value."""

    def give(net: nn.Module, x: Tensor) -> Tensor:
        def mapper(name: str, module: nn.Module) -> Any:
            return rule if isinstance(module, kinds) else None

        return written(LRP(mapper, "y"), net, x)

    return give


def written(method: Any, net: nn.Module, x: Tensor) -> Tensor:
    """What a method writes for the input."""
    with method.prepare(net, ["x"], ["y"]) as hooked:
        return hooked(TensorDict({"x": x}, [1]))["attr", "x"]


# --- peers ----------------------------------------------------------------------------------------


def captum(make: Callable[[Any], Any], *others: type[nn.Module]) -> Give:
    """LRP of captum with one rule on dense layers, and its identity rule on modules of other types."""

    def give(net: nn.Module, x: Tensor) -> Tensor:
        attr = importlib.import_module("captum.attr")
        rules = importlib.import_module("captum.attr._utils.lrp_rules")
        net = nn.Sequential(net)  # it looks for rules on the children of the model
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.rule = make(rules)
            elif isinstance(module, others):
                module.rule = rules.IdentityRule()  # type: ignore[assignment]
        return attr.LRP(net).attribute(x)

    return give


def captum_at_a_container(net: nn.Module, x: Tensor) -> Tensor:
    """The epsilon rule of captum on a module that has another one inside, and attribution at it."""
    rules = importlib.import_module("captum.attr._utils.lrp_rules")
    inner: Any = net.inner
    inner.rule = rules.EpsilonRule()
    return importlib.import_module("captum.attr").LayerLRP(net, inner).attribute(x)


def captum_again(net: nn.Module, x: Tensor) -> Tensor:
    """The gamma rule of captum, given once, in the second of two calls."""
    rules = importlib.import_module("captum.attr._utils.lrp_rules")
    model = nn.Sequential(net)
    held: Any = net
    held.rule = rules.GammaRule(gamma=1.0)
    method = importlib.import_module("captum.attr").LRP(model)
    method.attribute(x)
    return method.attribute(x)


def again(give: Give) -> Give:
    """What is given the second time."""

    def twice(net: nn.Module, x: Tensor) -> Tensor:
        give(net, x)
        return give(net, x)

    return twice


def zennit(make: Callable[[Any], Any], kinds: Any = nn.Linear) -> Give:
    """A rule of zennit on modules of some types, relevance carried from the output's value."""

    def give(net: nn.Module, x: Tensor) -> Tensor:
        rules = importlib.import_module("zennit.rules")
        composites = importlib.import_module("zennit.composites")
        x = x.clone().requires_grad_()
        with composites.LayerMapComposite([(kinds, make(rules))]).context(net) as hooked:
            y = hooked(x)
            return torch.autograd.grad(y, x, y.detach())[0]

    return give


def tdhook(make: Callable[[Any], Any], kinds: Any = nn.Linear) -> Give:
    """A rule of tdhook on modules of some types."""

    def give(net: nn.Module, x: Tensor) -> Tensor:
        rules = importlib.import_module("tdhook.attribution.lrp_helpers.rules")
        attribution = importlib.import_module("tdhook.attribution")
        method = attribution.LRP(
            rule_mapper=lambda _, m: make(rules) if isinstance(m, kinds) else None,
            warn_on_missing_rule=False,
        )
        # Relevance starts with ones there; it is as many times what it would be from the output.
        return by_tdhook(method, net, x) * net(x).detach()

    return give


def by_tdhook(method: Any, net: nn.Module, x: Tensor) -> Tensor:
    """What a method of tdhook's writes."""
    td = TensorDict({"x": x, ("baseline", "x"): torch.zeros_like(x)}, [1])
    with method.prepare(TensorDictModule(net, ["x"], ["y"])) as hooked:
        return hooked(td)["attr", "x"]


def lxt_epsilon(net: nn.Module, x: Tensor) -> Tensor:
    """LXT's epsilon on one dense layer."""
    functional = importlib.import_module("lxt.explicit.functional")
    layer: Any = net
    x = x.clone().requires_grad_()
    y = functional.linear_epsilon(x, layer.weight, layer.bias, 0.25)
    return torch.autograd.grad(y, x, y.detach())[0]


def captum_quadrature(net: nn.Module, x: Tensor) -> Tensor:
    """Integrated gradients of captum with the trapezoid, at the default number of steps."""
    attr = importlib.import_module("captum.attr")
    return attr.IntegratedGradients(net).attribute(x, method="riemann_trapezoid", n_steps=50)


def guided_by_captum(net: nn.Module, x: Tensor) -> Tensor:
    """Captum and guided backpropagation."""
    return importlib.import_module("captum.attr").GuidedBackprop(net).attribute(x)


def guided_by_tdhook(net: nn.Module, x: Tensor) -> Tensor:
    """Tdhook and guided backpropagation."""
    return by_tdhook(importlib.import_module("tdhook.attribution").GuidedBackpropagation(), net, x)


# --- the cases ------------------------------------------------------------------------------------

EPSILON = {
    "captum": captum(lambda r: r.EpsilonRule(1e-6)),
    "zennit": zennit(lambda r: r.Epsilon(1e-6)),
    "tdhook": tdhook(lambda r: r.EpsilonRule(1e-6)),
}

CASES = (
    Case("x + f(x), three times", Residual, [[1.0]], "8", ours(EpsilonRule()), EPSILON),
    Case("a product of two layers", Gated, [[1.0]], "6", ours(EpsilonRule()), EPSILON),
    Case("a layer called twice", Twice, [[1.0, 2.0]], "3, 2", ours(EpsilonRule()), EPSILON),
    Case(
        *("a module 3a + b of two inputs", OfTwo, [[1.0, 1.0]], "3, 1"),
        ours(EpsilonRule(), Weighed),
        {
            "zennit": zennit(lambda r: r.Epsilon(1e-6), Weighed),
            "tdhook": tdhook(lambda r: r.EpsilonRule(1e-6), Weighed),
        },
    ),
    Case(
        *("the same, called by keyword", lambda: OfTwo(True), [[1.0, 1.0]], "3, 1"),
        ours(EpsilonRule(), Weighed),
        {
            "zennit": zennit(lambda r: r.Epsilon(1e-6), Weighed),
            "tdhook": tdhook(lambda r: r.EpsilonRule(1e-6), Weighed),
        },
    ),
    Case(
        *("epsilon on a container, read at it", Container, [[2.0]], "6"),
        ours(EpsilonRule(), Inner),
        {"captum": captum_at_a_container, "tdhook": tdhook(lambda r: r.EpsilonRule(), Inner)},
    ),
    Case(
        *("gamma 1, the second of two calls", lambda: linear([[2.0, -1.0]]), [[1.0, 1.0]]),
        *("1.333, -0.333", again(ours(GammaRule(1.0)))),
        {"captum": captum_again, "zennit": again(zennit(lambda r: r.Gamma(1.0)))},
    ),
    Case(
        *("epsilon 0.25 of an output -1", lambda: linear([[-1.0]]), [[1.0]], "-0.8"),
        ours(EpsilonRule(0.25)),
        {
            "captum": captum(lambda r: r.EpsilonRule(0.25)),
            "zennit": zennit(lambda r: r.Epsilon(0.25)),
            "tdhook": tdhook(lambda r: r.EpsilonRule(0.25)),
            "lxt": lxt_epsilon,
        },
    ),
    Case(
        *("gamma 1 beside a bias of 1", lambda: linear([[2.0]], [1.0]), [[1.0]], "2"),
        ours(GammaRule(1.0)),
        {
            "captum": captum(lambda r: r.GammaRule(gamma=1.0)),
            "zennit": zennit(lambda r: r.Gamma(1.0)),
        },
    ),
    Case(
        *("gamma 1 of inputs 1, -1", lambda: linear([[2.0, 1.0]]), [[1.0, -1.0]]),
        *("1.333, -0.333", ours(GammaRule(1.0))),
        {
            "captum": captum(lambda r: r.GammaRule(gamma=1.0)),
            "zennit": zennit(lambda r: r.Gamma(1.0)),
        },
    ),
    Case(
        *("alpha 1 beta 0 beside a bias of -1.4", lambda: linear([[2.0]], [-1.4]), [[1.0]], "0.6"),
        ours(AlphaBetaRule(1.0, 0.0)),
        {
            "captum": captum(lambda r: r.Alpha1_Beta0_Rule()),
            "zennit": zennit(lambda r: r.AlphaBeta(1.0, 0.0)),
            "tdhook": tdhook(lambda r: r.AlphaBetaRule(1.0, 0.0)),
        },
    ),
    Case(
        *("alpha 1 beta 0 of inputs 2, -1", lambda: linear([[1.0, -1.0]]), [[2.0, -1.0]]),
        *("2, 1", ours(AlphaBetaRule(1.0, 0.0))),
        {
            "captum": captum(lambda r: r.Alpha1_Beta0_Rule()),
            "zennit": zennit(lambda r: r.AlphaBeta(1.0, 0.0)),
            "tdhook": tdhook(lambda r: r.AlphaBetaRule(1.0, 0.0)),
        },
    ),
    Case(
        *("w-square beside a bias of 1", lambda: linear([[1.0, 1.0]], [1.0]), [[1.0, 1.0]]),
        *("1.5, 1.5", ours(WSquareRule())),
        {
            "zennit": zennit(lambda r: r.WSquare()),
            "tdhook": tdhook(lambda r: r.WSquareRule()),
        },
    ),
    Case(
        *("w-square of a normed weight", normed_weight, [[1.0, 1.0]], "0.6, 2.4"),
        ours(WSquareRule()),
        {
            "zennit": zennit(lambda r: r.WSquare()),
            "tdhook": tdhook(lambda r: r.WSquareRule()),
        },
    ),
    Case(
        *("layer norm, first of 4, 1, 1", Normed, [[4.0, 1.0, 1.0]], "1.886, -0.236, -0.236"),
        ours(LayerNormRule(), nn.LayerNorm),
        {"tdhook": tdhook(lambda r: r.LayerNormRule(), nn.LayerNorm)},
    ),
    Case(
        *("identity rule on tanh at 2", nn.Tanh, [[2.0]], "0.964"),
        ours(PseudoIdentityRule(), nn.Tanh),
        {"tdhook": tdhook(lambda r: r.PseudoIdentityRule(), nn.Tanh)},
    ),
    Case(
        *("values alone pass q, k, v = 1, 2, 3", Fused, [[1.0]], "3"),
        ours(AHQKVRule()),
        {"tdhook": tdhook(lambda r: r.AHQKVRule())},
    ),
    Case(
        *("softmax along dim 1, first of 1, 2", Across, [[[1.0, 5.0], [2.0, 7.0]]]),
        *("0.197, 0 / -0.393, 0", ours(SoftmaxEpsilonRule(), nn.Softmax)),
        {"tdhook": tdhook(lambda r: r.SoftmaxEpsilonRule(), nn.Softmax)},
    ),
    Case(
        *("softmax of 1, 2, masked", Masked, [[1.0, 2.0, 0.0]]),
        *("0.197, -0.393, 0", ours(SoftmaxEpsilonRule(), nn.Softmax)),
        {"tdhook": tdhook(lambda r: r.SoftmaxEpsilonRule(), nn.Softmax)},
    ),
    Case(
        *("integrated gradients of 1 · x, 50 steps", lambda: linear([[1.0]]), [[1.0]], "1"),
        lambda net, x: written(IntegratedGradients("y", n_steps=50), net, x),
        {"captum": captum_quadrature},
    ),
    Case(
        "guided backpropagation of -relu(x)",
        lambda: nn.Sequential(nn.ReLU(), linear([[1.0]]), linear([[-1.0]]), linear([[-1.0]])),
        *([[1.0]], "1"),
        lambda net, x: written(Saliency("y", abs=False, rules=GuidedBackpropMapper()), net, x),
        {"captum": guided_by_captum, "tdhook": guided_by_tdhook},
    ),
)


# --- the table ------------------------------------------------------------------------------------


def shown(give: Give, case: Case) -> str:
    """What is given in a case, as numbers or as the first words of an error."""
    x = torch.tensor(case.x)
    try:
        found = give(case.build(), x)
    except Exception as error:  # whatever a peer raises is the result
        return f"{type(error).__name__}: {str(error).splitlines()[0][:70]}"
    rows = found.detach().reshape(-1, found.shape[-1]).tolist()
    return " / ".join(", ".join(f"{round(v, 3) + 0.0:g}" for v in row) for row in rows)


def versions() -> dict[str, str]:
    """The peers that import, and their versions."""
    found = {}
    if importlib.util.find_spec("tvfix") is not None:  # makes torchvision load beside a CPU torch
        importlib.import_module("tvfix")
    for name in PEERS:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    """Prints the table."""
    present = versions()
    print(", ".join(f"{name} {version}" for name, version in present.items()) or "no peers found")
    for case in CASES:
        print(f"\n{case.claim}")
        print(f"  {'formula':<12}{case.formula}")
        print(f"  {'tdhook_like':<12}{shown(case.ours, case)}")
        for name, give in case.peers.items():
            if name in present:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    print(f"  {name:<12}{shown(give, case)}")


if __name__ == "__main__":
    main()
