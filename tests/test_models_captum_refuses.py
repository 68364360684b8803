"""Models that captum refuses or gets wrong, under every method that promises to work on them.

Each model is a chain of layers in a costume: dictionaries, tuples, layers used twice, functions for
modules, arguments that are no tensors. The chain is what references know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import NonTensorData, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

import chain_references as ref
from chain_references import Bent, Chain, Dense, Times
from tdhook_like import (
    LRP,
    Deconvolution,
    DeepLift,
    Each,
    FeatureAblation,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    Occlusion,
    Saliency,
    ShapleyValues,
)
from tdhook_like.attribution.lrp import EpsilonRule, PassRule, TypeMapper

N, OUTPUTS, STEPS, EPSILON, DOUBLE = 2, 2, 40, 0.25, torch.float64

# --- models ---------------------------------------------------------------------------------------


def dense(layer: nn.Linear) -> Dense:
    return Dense(layer.weight.detach().double(), layer.bias.detach().double())


class Dictionaries(nn.Module):
    """From a dictionary to a dictionary, one inside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        joined = torch.cat([batch["body"]["left"], batch["body"]["right"]], -1)
        return {"heads": {"y": self.last(self.relu(self.first(joined)))}, "seen": joined.detach()}

    @property
    def chain(self) -> Chain:
        return [dense(self.first), Bent("relu"), dense(self.last)]


class Tuples(Dictionaries):
    """Two arguments, two outputs in a tuple; what is explained is the second one."""

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = self.relu(self.first(torch.cat([left, right], -1)))
        return hidden, self.last(hidden)


class Twice(nn.Module):
    """One layer and one ReLU, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.relu, self.last = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        x = torch.cat([left, right], -1)
        for _ in range(3):
            x = self.relu(self.layer(x))
        return self.last(x)

    @property
    def chain(self) -> Chain:
        return [*[dense(self.layer), Bent("relu")] * 3, dense(self.last)]


RELUS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    torch.relu,
    Tensor.relu,
    Tensor.relu_,
    torch.relu_,
    lambda x: F.relu(x, inplace=True),
)


class Functions(nn.Module):
    """Activations in every spelling that is no module, and a tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in RELUS)
        self.last = nn.Linear(4, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        x = torch.cat([left, right], -1)
        for layer, relu in zip(self.layers, RELUS, strict=True):
            x = torch.tanh(relu(layer(x) + 0.0))
        return self.last(x)

    @property
    def chain(self) -> Chain:
        layers: Any = self.layers
        each = [[dense(layer), Bent("relu"), Bent("tanh")] for layer in layers]
        return [*[step for steps in each for step in steps], dense(self.last)]


class Words(Tuples):
    """Arguments that are no tensors, one of which may be left out."""

    def forward(self, left: Tensor, mode: str, right: Tensor, scale: Any = None) -> Tensor:  # type: ignore[override]
        hidden = self.relu(self.first(torch.cat([left, right], -1)))
        return self.last(hidden) * (3.0 if mode == "loud" and scale is None else 1.0)

    @property
    def chain(self) -> Chain:
        return [*super().chain, Times(3.0)]


class OfDictionaries(TensorDictModuleBase):
    """What hands a TensorDict to a model that takes dictionaries, as a user writes it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        read: Any = [("body", "left"), ("body", "right")]
        written: Any = [("heads", "y"), "seen"]
        self.in_keys, self.out_keys = read, written

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.update(self.net(tensordict.select("body").to_dict()))


@dataclass(frozen=True)
class Costume:
    """How a model is prepared.

    Attributes:
        net: The class.
        in_keys: Of a plain module; None if a wrapper declares them.
        out_keys: Likewise.
        keys: Where the chain's input comes from.
        y: The key that is explained.
        wrap: Puts the model into a TensorDict's terms.
    """

    net: Any
    in_keys: Any = ("left", "right")
    out_keys: Any = ("y",)
    keys: tuple[Any, Any] = ("left", "right")
    y: Any = "y"
    wrap: Callable[[nn.Module], nn.Module] = lambda net: net


COSTUMES = {
    "dictionaries": Costume(
        Dictionaries,
        *(None, None, (("body", "left"), ("body", "right")), ("heads", "y"), OfDictionaries),
    ),
    "a tuple as output": Costume(Tuples, out_keys=("hidden", "y")),
    "modules used three times": Costume(Twice),
    "functional activations": Costume(Functions),
    "arguments that are no tensors": Costume(Words, in_keys=("left", "mode", "right")),
}


class Case:
    """A model, its data and its references."""

    def __init__(self, costume: Costume, dtype: torch.dtype) -> None:
        self.costume = costume
        self.functional = costume.net is Functions
        while True:  # until ReLUs let something through, forwards and back
            net = costume.net().double()
            for parameter in net.parameters():
                nn.init.normal_(parameter, mean=0.4, std=0.8)
            net = net.to(dtype)
            self.x, self.base = torch.randn(N, 4, dtype=dtype), torch.randn(4, dtype=dtype)
            self.chain = net.chain
            if self.lively():
                break
        self.module = costume.wrap(net)

    def lively(self) -> bool:
        """Whether there is something to compare, of every kind of slope and both outputs."""
        kinds = (ref.gradient, ref.guided, ref.deconvolution)
        slopes = [
            self.expected(lambda x, f=f, k=k: f(self.chain, x, k)) for f in kinds for k in (0, 1)
        ]
        return all(slope.abs().max() > 0.01 for slope in slopes)

    def data(self) -> TensorDict:
        left, right = self.costume.keys
        td = TensorDict({left: self.x[:, :2].clone(), right: self.x[:, 2:].clone()}, [N])
        return td.set("mode", NonTensorData("loud", batch_size=[N]))

    @property
    def baselines(self) -> dict[Any, Tensor]:
        left, right = self.costume.keys
        return {left: self.base[:2], right: self.base[2:]}

    def explained(self, method: Any, td: TensorDictBase | None = None) -> TensorDictBase:
        given = self.costume.in_keys, self.costume.out_keys
        with method.prepare(self.module, *map(_list, given)) as hooked:
            return hooked(self.data() if td is None else td)

    def found(self, td: TensorDictBase, *name: str) -> Tensor:
        """The attributions of all inputs in one row: ``[N, …, 4]``."""
        return torch.cat([td[("attr", *name, *_path(key))] for key in self.costume.keys], -1)

    def expected(self, one: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([one(x) for x in self.x.double()])


def _list(keys: Any) -> Any:
    return None if keys is None else list(keys)


def _path(key: Any) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)


# --- methods --------------------------------------------------------------------------------------

Make = Callable[[Any, Case], Any]
Reference = Callable[[Case, Tensor, int], Tensor]


def base(case: Case) -> Tensor:
    return case.base.double()


def epsilon(case: Case) -> TypeMapper:
    modules = {} if case.functional else {nn.ReLU: PassRule()}  # functions have rules of their own
    return TypeMapper({nn.Linear: EpsilonRule(EPSILON), **modules})


METHODS: dict[str, tuple[Make, Reference]] = {
    "Saliency": (
        lambda y, case: Saliency(y),
        lambda case, x, k: ref.gradient(case.chain, x, k).abs(),
    ),
    "InputXGradient": (
        lambda y, case: InputXGradient(y),
        lambda case, x, k: x * ref.gradient(case.chain, x, k),
    ),
    "GuidedBackprop": (
        lambda y, case: GuidedBackprop(y, functional=case.functional),
        lambda case, x, k: ref.guided(case.chain, x, k),
    ),
    "Deconvolution": (
        lambda y, case: Deconvolution(y, functional=case.functional),
        lambda case, x, k: ref.deconvolution(case.chain, x, k),
    ),
    "LRP": (
        lambda y, case: LRP(epsilon(case), y),
        lambda case, x, k: ref.relevance(case.chain, x, k, EPSILON),
    ),
    "IntegratedGradients": (
        lambda y, case: IntegratedGradients(
            *(y,),
            baselines=case.baselines,
            method="riemann_middle",
            n_steps=STEPS,
            gap_tolerance=None,
        ),
        lambda case, x, k: ref.integrated(case.chain, x, base(case), k, STEPS),
    ),
    "DeepLift": (
        lambda y, case: DeepLift(y, baselines=case.baselines, gap_tolerance=1e-3),
        lambda case, x, k: ref.deeplift(case.chain, x, base(case), k),
    ),
    "FeatureAblation": (
        lambda y, case: FeatureAblation(y, baselines=case.baselines),
        lambda case, x, k: ref.ablated(ref.score(case.chain, k), x, base(case)),
    ),
    "Occlusion": (
        lambda y, case: Occlusion(y, window=2, baselines=case.baselines),
        lambda case, x, k: ref.occluded(
            ref.score(case.chain, k), x, base(case), [range(2), range(2, 4)], 2
        ),
    ),
    "ShapleyValues": (
        lambda y, case: ShapleyValues(y, baselines=case.baselines),
        lambda case, x, k: ref.shapley(ref.score(case.chain, k), x, base(case)),
    ),
    "KernelShap": (
        lambda y, case: KernelShap(y, baselines=case.baselines),
        lambda case, x, k: ref.shapley(ref.score(case.chain, k), x, base(case)),
    ),
}
COMPLETE = ("DeepLift", "ShapleyValues", "KernelShap")
every_method = pytest.mark.parametrize("method", METHODS)
every_costume = pytest.mark.parametrize("costume", COSTUMES)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    size = expected.abs().max().item()
    assert size > 1e-6, "there is nothing to compare"
    most = 1e-10 if found.dtype == DOUBLE else 2e-4
    torch.testing.assert_close(found.double(), expected, rtol=most, atol=most * size)


# --- claims ---------------------------------------------------------------------------------------


@every_costume
def test_the_chain_is_what_the_model_computes(costume):
    case = Case(COSTUMES[costume], DOUBLE)
    given = case.explained(Saliency(Each(case.costume.y)))[case.costume.y]
    close(given, case.expected(lambda x: ref.followed(case.chain, x)[-1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_method
@every_costume
def test_attributions_are_those_carried_back_by_hand(costume, method, dtype):
    case = Case(COSTUMES[costume], dtype)
    make, reference = METHODS[method]
    td = case.explained(make((*_path(case.costume.y), 1), case))
    close(case.found(td), case.expected(lambda x: reference(case, x, 1)))


@every_method
@every_costume
def test_several_targets_of_one_call_are_those_of_one_at_a_time(costume, method):
    case = Case(COSTUMES[costume], DOUBLE)
    make, reference = METHODS[method]
    td = case.explained(make(Each(case.costume.y), case))
    each = [case.expected(lambda x, k=k: reference(case, x, k)) for k in range(OUTPUTS)]
    close(case.found(td), torch.stack(each, 1))
    names = {"one": (*_path(case.costume.y), 0), "other": (*_path(case.costume.y), 1)}
    td = case.explained(make(names, case))
    for name, expected in zip(names, each, strict=True):
        close(case.found(td, name), expected)


@pytest.mark.parametrize("method", COMPLETE)
@every_costume
def test_complete_methods_make_the_whole_change(costume, method):
    case = Case(COSTUMES[costume], DOUBLE)
    td = case.explained(METHODS[method][0]((*_path(case.costume.y), 0), case))
    score = ref.score(case.chain, 0)
    change = case.expected(lambda x: score(x) - score(base(case)))
    assert (case.found(td).sum(-1) - change).abs().max() < 1e-10
    assert td["attr_gap"].abs().max() < 1e-10


def test_each_call_of_a_module_used_three_times_has_attributions_of_its_own():
    case = Case(COSTUMES["modules used three times"], DOUBLE)
    td = case.explained(InputXGradient(("y", 0), at=("layer",)))
    for call in range(3):
        behind = 2 * call + 1  # of the layer's call, in the chain

        def one(x: Tensor, behind: int = behind) -> Tensor:
            h = ref.followed(case.chain, x)[behind]
            return h * ref.gradient(case.chain[behind:], h, 0)

        close(td["attr_at", "layer", str(call)], case.expected(one))


def test_frozen_parameters_and_inputs_without_gradients_are_explained_alike():
    case = Case(COSTUMES["modules used three times"], DOUBLE)
    case.module.requires_grad_(False)
    with torch.no_grad():
        td = case.explained(DeepLift(("y", 0), baselines=case.baselines))
    close(case.found(td), case.expected(lambda x: ref.deeplift(case.chain, x, base(case), 0)))
