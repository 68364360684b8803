"""Networks to compare two libraries on, and how each of them is asked about one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_like import Method, Unit

TARGET = 2
"""The output that is explained."""
Y = ("y", TARGET)
"""That output as a target here."""
SEED = 3
"""Of weights and inputs."""


@dataclass(frozen=True)
class Model:
    """A network and what it is asked about.

    Attributes:
        net: The network, in float64.
        inputs: By argument, ``[4, *features]``.
        baselines: By argument, ``[1, *features]``.
        layer: The path of a module inside.
        unit: An entry of what that module gives.
        masks: By argument, the number of each feature's group, ``[*features]``.
        window: By argument, what occlusion covers.
    """

    net: nn.Module
    inputs: dict[Any, Tensor]
    baselines: dict[Any, Tensor]
    layer: str
    unit: tuple[int, ...]
    masks: dict[Any, Tensor]
    window: dict[Any, tuple[int, ...]]

    @property
    def module(self) -> nn.Module:
        """The module inside."""
        return self.net.get_submodule(self.layer)

    def packed(self, values: dict[Any, Tensor]) -> Any:
        """What captum is given: a tensor, or a tuple of several."""
        return tuple(values.values()) if len(values) > 1 else next(iter(values.values()))

    @property
    def x(self) -> Any:
        """The inputs."""
        return self.packed({key: x.clone() for key, x in self.inputs.items()})

    @property
    def b(self) -> Any:
        """One baseline of every input."""
        return self.packed(self.baselines)

    def several(self, n: int = 7) -> dict[Any, Tensor]:
        """Baselines to choose from, ``[n, *features]``."""
        draw = torch.Generator().manual_seed(5)
        return {
            key: 0.5 * torch.randn(n, *x.shape[1:], generator=draw, dtype=x.dtype)
            for key, x in self.inputs.items()
        }


class Convolutions(nn.Module):
    """Convolutions, a maximum between them, and a dense layer.

    No non-linear module stands right behind another one: captum's DeepLift cannot do that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 6, 2), nn.ReLU()),
        )
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class TwoInputs(nn.Module):
    """A layer for each of two inputs, and two for what they give."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(13)  # weights of which every decision can be flipped
        self.one, self.other = nn.Linear(3, 6), nn.Linear(3, 6)
        self.relu, self.joint = nn.ReLU(), nn.Linear(12, 8)
        self.last, self.head = nn.ReLU(), nn.Linear(8, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        both = self.relu(torch.cat([self.one(a), self.other(b)], -1))
        return self.head(self.last(self.joint(both)))


def models() -> dict[str, Model]:
    """The three models."""
    torch.manual_seed(SEED)
    dense = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)]
    halves = torch.arange(8).div(4, rounding_mode="floor")
    found = {
        "MLP": Model(
            nn.Sequential(*dense).double(),
            {"x": torch.randn(4, 6, dtype=torch.float64)},
            {"x": 0.3 * torch.randn(1, 6, dtype=torch.float64)},
            *("2", (3,)),
            {"x": torch.tensor([0, 0, 1, 2, 2, 3])},
            {"x": (2,)},
        ),
        "CNN": Model(
            Convolutions().double(),
            {"x": torch.randn(4, 1, 8, 8, dtype=torch.float64)},
            {"x": 0.3 * torch.randn(1, 1, 8, 8, dtype=torch.float64)},
            *("features.4", (3, 1, 0)),
            {"x": (2 * halves.unsqueeze(1) + halves).unsqueeze(0)},
            {"x": (1, 3, 3)},
        ),
        "two inputs": Model(
            TwoInputs().double(),
            {key: torch.randn(4, 3, dtype=torch.float64) for key in "ab"},
            {key: 0.3 * torch.randn(1, 3, dtype=torch.float64) for key in "ab"},
            *("joint", (3,)),
            {"a": torch.tensor([0, 1, 1]), "b": torch.tensor([1, 2, 3])},
            {"a": (2,), "b": (2,)},
        ),
    }
    return found


# --- answers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """An answer: one tensor for each input, and their standard errors if it was drawn."""

    values: list[Tensor]
    errors: list[Tensor] | None = None


@dataclass(frozen=True)
class Row:
    """A method that both libraries have.

    Attributes:
        ours: How it is called here.
        captum: The name of captum's class or function.
        here: This library's answer about a model.
        there: Captum's, from that class and the model.
        remark: What the comparison needs to be told.
        only: The models that are asked about; all if empty.
        repeats: How often captum is asked, where it draws samples: its standard error comes from that.
    """

    ours: str
    captum: str
    here: Callable[[Model], Found]
    there: Callable[[Any, Model], Any]
    remark: str = ""
    only: tuple[str, ...] = ()
    repeats: int = 0


def captum_name(name: str) -> Any:
    """A public name of captum's."""
    for part in ("captum.attr", "captum.robust", "captum.metrics"):
        found = getattr(importlib.import_module(part), name, None)
        if found is not None:
            return found
    raise AttributeError(name)


def as_list(found: Any) -> list[Tensor]:
    """What captum gives, as a list of tensors."""
    return [f.detach() for f in (found if isinstance(found, Sequence) else [found])]


def written(method: Method, model: Model, root: str = "attr") -> Found:
    """What a method writes for the inputs."""
    keys = list(model.inputs)
    with method.prepare(model.net, keys, ["y"]) as hooked:
        td = hooked.observe(TensorDict({**model.inputs}, [4]))
    sampled = "attr_error" in td.keys()  # noqa: SIM118 (a TensorDict's keys)
    errors = [td["attr_error", key] for key in keys] if sampled else None
    return Found([td[root, key] for key in keys], errors)


def at_keys(make: Callable[[Model], Method]) -> Callable[[Model], Found]:
    """Attributions of the inputs."""
    return lambda model: written(make(model), model)


def at_layer(
    make: Callable[[Model, tuple[str, ...]], Method], root: str = "attr_at"
) -> Callable[[Model], Found]:
    """Attributions of what the module inside gives, or that itself."""

    def here(model: Model) -> Found:
        method = make(model, (model.layer,))
        with method.prepare(model.net, list(model.inputs), ["y"]) as hooked:
            return Found([hooked.observe(TensorDict({**model.inputs}, [4]))[root, model.layer]])

    return here


def unit(model: Model) -> Unit:
    """The neuron that is explained."""
    return Unit(model.layer, *model.unit)


def baselined(cls: Any, model: Model, **options: Any) -> Any:
    """A method of captum's, of the network against the baseline."""
    return cls(model.net).attribute(model.x, baselines=model.b, target=TARGET, **options)


def layered(cls: Any, model: Model, **options: Any) -> Any:
    """A method of captum's, of the module inside."""
    return cls(model.net, model.module).attribute(model.x, target=TARGET, **options)


def neural(cls: Any, model: Model, **options: Any) -> Any:
    """A method of captum's, of the neuron inside."""
    (*rest, last) = model.unit
    index = model.unit if rest else last
    return cls(model.net, model.module).attribute(model.x, index, **options)
