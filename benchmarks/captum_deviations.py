"""Where captum departs from the formula, and what it refuses, on models that fit on a line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from captum_models import captum_name
from tdhook_like import (
    Conductance,
    DeepLift,
    ExpectedGradients,
    FeaturePermutation,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    Method,
    NoiseTunnel,
)
from tdhook_like.robustness import FGSM, PGD

DOUBLE = torch.float64


@dataclass(frozen=True)
class Deviation:
    """A claim: what the formula gives, what this library gives, what captum gives.

    Attributes:
        claim: What is asked.
        formula: The answer, worked out by hand.
        here: This library's.
        there: Captum's.
    """

    claim: str
    formula: str
    here: Callable[[], Any]
    there: Callable[[], Any]


@dataclass(frozen=True)
class Refusal:
    """Something that captum does not take.

    Attributes:
        claim: What.
        there: Asks captum.
    """

    claim: str
    there: Callable[[], Any]


class Of(nn.Module):
    """A function of tensors as a module, with layers that it is given."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *x: Any) -> Any:
        return self.function(*x, *self.layers)


def row(*numbers: Any) -> Tensor:
    """A batch of one."""
    return torch.tensor([numbers], dtype=DOUBLE)


def ones(n: int, m: int = 1) -> nn.Linear:
    """A dense layer of ones."""
    layer = nn.Linear(n, m, bias=False, dtype=DOUBLE)
    nn.init.ones_(layer.weight)
    return layer


def written(method: Method, net: nn.Module, *x: Tensor, at: tuple[str, ...] = ("attr",)) -> Any:
    """What a method writes for the inputs."""
    keys = ["a", "b"][: len(x)]
    with method.prepare(net, keys, ["y"]) as hooked:
        td = hooked.observe(TensorDict(dict(zip(keys, x, strict=True)), x[0].shape[:1]))
    return [td[(*at, key)] for key in keys]


def asked(name: str, net: nn.Module, x: Any, *args: Any, **options: Any) -> Any:
    """A method of captum's."""
    return captum_name(name)(net).attribute(x, *args, **options)


def shown(give: Callable[[], Any]) -> str:
    """An answer as numbers, or the first words of an error."""
    torch.manual_seed(0)
    importlib.import_module("numpy").random.seed(0)  # captum draws from there, too
    try:
        found = give()
    except Exception as error:  # whatever captum raises is the result
        words = str(error).split()
        return f"`{type(error).__name__}`: {' '.join(words[:9])}{' …' if len(words) > 9 else ''}"
    if isinstance(found, str):
        return found
    parts = found if isinstance(found, Sequence) else [found]
    flat = [v for part in parts for v in torch.as_tensor(part).detach().flatten().tolist()]
    return ", ".join(f"{round(v, 3) + 0.0:g}" for v in flat)


def deeplift(net: nn.Module, *x: Tensor, baseline: Tensor | None = None) -> Any:
    """The pair of answers of DeepLift, from zero or from one baseline."""
    first, *others = x
    return (
        lambda: written(DeepLift(("y", 0), baselines=baseline), net, *x),
        lambda: asked("DeepLift", net, x if others else first, baseline, target=0),
    )


# --- models -----------------------------------------------------------------------------------------

RELU_POOL = nn.Sequential(nn.Unflatten(1, (1, 2)), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten())
OVERLAP = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.MaxPool1d(2, 1), nn.Flatten(), ones(2))
TWICE = Of(lambda x, f, g: f(g(f(x))), nn.ReLU(), ones(1))
AGAIN = Of(lambda x, f: f(f(x)), ones(1))
FLAT = nn.Sequential(nn.Flatten(), ones(2))
PRODUCT = Of(lambda a, b: a * b)
SQUARE = Of(lambda x, f: f(x) ** 2, nn.Identity())
RELUS = Of(lambda x: -F.relu(2 - F.relu(x)))
FROZEN = nn.Sequential(ones(1), nn.ReLU(), ones(1)).requires_grad_(False)
LINE = nn.Sequential(ones(1), ones(1))
OTHER_ROW = torch.tensor([[0.0, 3.0, 1.0]], dtype=DOUBLE)


def lstm() -> Any:
    """A small LSTM's last output, the input and the change from zero."""
    torch.manual_seed(1)
    inner = nn.LSTM(2, 3, batch_first=True, dtype=DOUBLE)
    net = Of(lambda x, f: f(x)[0][:, -1, :1], inner)
    x = torch.randn(1, 4, 2, dtype=DOUBLE)
    with torch.no_grad():
        change = (net(x) - net(0 * x)).item()
    return net, x, change


def missed(found: Any, change: float) -> str:
    """What attributions' sum misses the change by, as a share of it."""
    total = sum(float(part.sum()) for part in (found if isinstance(found, Sequence) else [found]))
    return f"{abs(total - change) / abs(change):.0%}"


NET, X, CHANGE = lstm()


def beside(net: nn.Module) -> Tensor:
    """Captum's DeepLift of a row that stands in a batch with another one."""
    both = torch.cat([row(1.0, 2.0, 0.0), OTHER_ROW])
    return asked("DeepLift", net, both, target=0)[:1]


def spread(n: int = 5) -> float:
    """The mean of 4000 of captum's variances of n draws."""
    method = captum_name("NoiseTunnel")(captum_name("InputXGradient")(LINE))
    options: dict[str, Any] = {"nt_type": "vargrad", "nt_samples": n, "stdevs": 1.0, "target": 0}
    return method.attribute(torch.ones(4000, 1, dtype=DOUBLE), **options).mean().item()


def variances(n: int = 5) -> float:
    """The same here."""
    method = NoiseTunnel(
        InputXGradient("y"), kind="vargrad", n_samples=n, stdevs=1.0, internal_batch_size=40000
    )
    return written(method, LINE, torch.ones(4000, 1, dtype=DOUBLE))[0].mean().item()


def three_four(x: Tensor) -> Tensor:
    """A slope of (3, -4)."""
    return 3 * x[:, :1] - 4 * x[:, 1:]


def permuted() -> Tensor:
    """Permutation of a group that spans two inputs."""
    group = torch.zeros(1, dtype=torch.long)
    method = FeaturePermutation("y", masks={"a": group, "b": group})
    return written(method, PRODUCT, PAIRS, PAIRS)[0].mean()


def layer_conductance() -> Tensor:
    """Conductance of what the layer gives."""
    with Conductance("y", at=("layers.0",)).prepare(SQUARE, ["x"], ["y"]) as hooked:
        return hooked.observe(TensorDict({"x": row(1.0)}, [1]))["attr_at", "layers.0"]


# --- the tables -------------------------------------------------------------------------------------

MASK = torch.zeros(1, 1, dtype=torch.long)
PAIRS = torch.tensor([[1.0], [-1.0]] * 4, dtype=DOUBLE)
JOINT: dict[Any, Tensor] = {
    "a": torch.tensor([[1.0], [-1.0]]).double(),
    "b": torch.tensor([[-1.0], [1.0]]).double(),
}

DEVIATIONS = (
    Deviation(
        "DeepLift, ReLU straight into max pooling: (2, 1) from (1, 3)",
        "0, -1",
        *deeplift(RELU_POOL, row(2.0, 1.0), baseline=row(1.0, 3.0)),
    ),
    Deviation(
        "DeepLift, windows that overlap: (1, 5, 2) from 0",
        "0, 10, 0",
        *deeplift(OVERLAP, row(1.0, 5.0, 2.0)),
    ),
    Deviation(
        "DeepLift, `F.relu`: 2 from -2",
        "2",
        *deeplift(Of(F.relu), row(2.0), baseline=row(-2.0)),
    ),
    Deviation("DeepLift, GELU: 1 from 0", "0.841", *deeplift(nn.Sequential(nn.GELU()), row(1.0))),
    Deviation(
        "DeepLift, a product of two inputs: (2, 3) from 0",
        "3, 3",
        *deeplift(PRODUCT, row(2.0), row(3.0)),
    ),
    Deviation(
        "DeepLift, one ReLU used twice: 2 from -2",
        "2",
        *deeplift(TWICE, row(2.0), baseline=row(-2.0)),
    ),
    Deviation(
        "DeepLift, softmax: what (1, 2, 0) has, less what it has beside another row",
        "0, 0, 0",
        lambda: (
            written(DeepLift(("y", 0)), nn.Softmax(-1), row(1.0, 2.0, 0.0))[0]
            - written(
                DeepLift(("y", 0)), nn.Softmax(-1), torch.cat([row(1.0, 2.0, 0.0), OTHER_ROW])
            )[0][:1]
        ),
        lambda: (
            asked("DeepLift", nn.Sequential(nn.Softmax(-1)), row(1.0, 2.0, 0.0), target=0)
            - beside(nn.Sequential(nn.Softmax(-1)))
        ),
    ),
    Deviation(
        "DeepLift, an LSTM: what the sum misses the change by",
        "0%",
        lambda: missed(written(DeepLift("y"), NET, X), CHANGE),
        lambda: missed(asked("DeepLift", NET, X, target=0), CHANGE),
    ),
    Deviation(
        "GuidedBackprop, `F.relu`: -relu(2 - relu(x)) at 1",
        "0",
        lambda: written(GuidedBackprop("y", functional=True), RELUS, row(1.0)),
        lambda: asked("GuidedBackprop", RELUS, row(1.0), target=0),
    ),
    Deviation(
        "IntegratedGradients of x at 1, trapezoid, 50 steps",
        "1",
        lambda: written(IntegratedGradients("y", method="riemann_trapezoid"), LINE, row(1.0)),
        lambda: asked("IntegratedGradients", LINE, row(1.0), method="riemann_trapezoid"),
    ),
    Deviation(
        "NeuronConductance of x at 1, as it is by default",
        "1",
        lambda: written(IntegratedGradients("y"), LINE, row(1.0)),
        lambda: captum_name("NeuronConductance")(LINE, LINE[0]).attribute(row(1.0), 0),
    ),
    Deviation(
        "LayerConductance of x² at 1, 50 steps",
        "1",
        lambda: layer_conductance(),
        lambda: captum_name("LayerConductance")(SQUARE, SQUARE.layers[0]).attribute(row(1.0)),
    ),
    Deviation(
        "vargrad of noise of variance 1, the mean of 4000 estimates from 5 draws",
        "1",
        variances,
        spread,
    ),
    Deviation(
        "FeaturePermutation of a · b, a = b = ±1, one group of both",
        "0",
        lambda: permuted(),
        lambda: asked("FeaturePermutation", PRODUCT, (PAIRS, PAIRS), feature_mask=(MASK, MASK))[
            0
        ].mean(),
    ),
    Deviation(
        "GradientShap of a · b at (1, 1), baselines (1, -1), (-1, 1): the sum",
        "2",
        lambda: sum(
            part.sum()
            for part in written(
                ExpectedGradients("y", baselines=JOINT, n_samples=20000, gap_tolerance=None),
                PRODUCT,
                row(1.0),
                row(1.0),
            )
        ),
        lambda: sum(
            part.sum()
            for part in asked(
                "GradientShap",
                PRODUCT,
                (row(1.0), row(1.0)),
                tuple(JOINT.values()),
                n_samples=20000,
            )
        ),
    ),
    Deviation(
        "FGSM by 0.5 on 1e-7 · x at 1",
        "0.5",
        lambda: written(
            FGSM("y", epsilon=0.5), Of(lambda x: 1e-7 * x), row(1.0), at=("adversarial",)
        ),
        lambda: captum_name("FGSM")(Of(lambda x: 1e-7 * x), lambda y, t: -y[:, 0]).perturb(
            row(1.0), epsilon=0.5, target=0
        ),
    ),
    Deviation(
        "PGD within 5 of 0 (L2) that lowers 3a - 4b",
        "-3, 4",
        lambda: written(
            PGD("y", epsilon=5.0, norm="l2"), Of(three_four), row(0.0, 0.0), at=("adversarial",)
        ),
        lambda: captum_name("PGD")(Of(three_four), lambda y, t: -y[:, 0]).perturb(
            row(0.0, 0.0), radius=5.0, step_size=1.0, step_num=20, target=0, norm="L2"
        ),
    ),
)


REFUSED = (
    Refusal(
        "a dictionary as the input",
        lambda: asked("Saliency", Of(lambda x: x["a"]), {"a": row(1.0)}),
    ),
    Refusal(
        "a dictionary as the output", lambda: asked("Saliency", Of(lambda x: {"y": x}), row(1.0))
    ),
    Refusal("a tuple as the output", lambda: asked("Saliency", Of(lambda x: (x, x)), row(1.0))),
    Refusal(
        "an input that is a string", lambda: asked("Saliency", Of(lambda x, s: x), (row(1.0), "s"))
    ),
    Refusal(
        "several targets", lambda: asked("Saliency", Of(lambda x: x), row(1.0, 2.0), target=(0, 1))
    ),
    Refusal("DeepLift: a module used twice", lambda: asked("DeepLift", TWICE, row(2.0))),
    Refusal(
        "LRP: a module used twice",
        lambda: asked("LRP", Of(lambda x, f: f(f(x)), ones(1)), row(2.0)),
    ),
    Refusal("LRP: an LSTM", lambda: asked("LRP", NET, X)),
    Refusal("LRP: nn.Flatten", lambda: asked("LRP", FLAT, row(1.0, 2.0))),
    Refusal(
        "LayerFeaturePermutation: a target",
        lambda: captum_name("LayerFeaturePermutation")(LINE, LINE[0]).attribute(PAIRS, target=0),
    ),
    Refusal(
        "LayerDeepLift: frozen parameters",
        lambda: captum_name("LayerDeepLift")(FROZEN, FROZEN[2]).attribute(row(1.0), target=0),
    ),
)
