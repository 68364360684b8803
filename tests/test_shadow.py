"""What a shadow shares with its model, what it has for itself, and what needs none."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, nn
from torch.distributions import Categorical

from tdhook_like.shadow import Itself, Shadow, stand_in


class Remembers(nn.Module):
    """Averages over its last two inputs, which it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.past: collections.deque[Tensor] = collections.deque(maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        self.past.append(x)
        return torch.stack(list(self.past)).mean(0)


def test_what_is_forgotten_by_the_model_is_forgotten_by_its_shadow():
    net = Remembers()
    twin: Any = Shadow(net).model
    for i in range(4):
        found = twin(torch.tensor(float(i)))
    assert found == 2.5 and len(twin.past) == 2 and not net.past


def test_functions_over_modules_keep_their_defaults_and_run_on_shadows():
    inner = nn.Dropout(0.5)

    def scaled(x: Tensor, shift: float = 1.0, *, scale: float = 3.0) -> Tensor:
        return scale * inner(x) + shift

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.function = inner, scaled

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    x = torch.ones(100)
    assert torch.equal(Shadow(Calls()).model(x), torch.full((100,), 4.0))  # drops nothing
    assert inner.training


def test_shared_modules_have_one_shadow_and_parameters_are_the_models():
    layer = nn.Linear(2, 2)
    net = nn.Sequential(layer, nn.BatchNorm1d(2), layer)
    shadow = Shadow(net)
    twin: Any = shadow.model
    assert twin[0] is twin[2] is shadow.of(layer) is not layer
    assert all(a is b for a, b in zip(twin.parameters(), net.parameters(), strict=True))
    assert twin[1].running_mean is not net[1].running_mean
    assert shadow.of(other := nn.Linear(2, 2)) is other


def hooked_by(register: str) -> Callable[[nn.Module], Any]:
    return lambda module: getattr(module, register)(lambda *given: None)


def own_forward(module: nn.Module) -> None:
    module.forward = lambda x: x


LEFT_TRACES: dict[str, Callable[[nn.Module], Any]] = {
    "a forward hook": hooked_by("register_forward_hook"),
    "a forward pre-hook": hooked_by("register_forward_pre_hook"),
    "a backward hook": hooked_by("register_full_backward_hook"),
    "a backward pre-hook": hooked_by("register_full_backward_pre_hook"),
    "a forward of its own": own_forward,
    "a buffer": lambda module: module.register_buffer("seen", torch.zeros(())),
    "a module of one's own inside": lambda module: module.add_module("own", Remembers()),
}


@pytest.mark.parametrize("trace", LEFT_TRACES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "in a TensorDictModule"])
def test_only_layers_as_torch_made_them_stand_for_themselves(wrapped: bool, trace: str):
    net: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = TensorDictModule(net, ["x"], ["y"]) if wrapped else net
    assert isinstance(stand_in(model), Itself)
    LEFT_TRACES[trace](net[0])
    assert isinstance(stand_in(model), Shadow)


def test_a_tensordict_module_with_options_does_not_stand_for_itself():
    for options in ({"inplace": False}, {"method": "forward"}, {"strict": True}):
        model = TensorDictModule(nn.Linear(2, 2), ["x"], ["y"], **options)
        assert isinstance(stand_in(model), Shadow)
    assert isinstance(stand_in(TensorDictModule(lambda x: x, ["x"], ["y"])), Shadow)


def test_asking_a_shadow_for_parameters_switches_no_interaction_type():
    seen: list[Any] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(interaction_type())
            return x

    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(Looks(), ["x"], ["logits"]),
        ProbabilisticTensorDictModule(
            ["logits"], ["action"], distribution_class=Categorical, default_interaction_type="mode"
        ),
    )
    twin: Any = Shadow(policy).model
    plain = interaction_type()
    td = TensorDict({"x": torch.ones(2, 3)}, [2])
    found = twin.get_dist_params(td.copy())
    assert seen == [plain]  # the model's own switches it for everybody, as long as it runs
    policy.get_dist_params(td)
    assert seen[1] != plain and torch.equal(found["logits"], td["x"])
