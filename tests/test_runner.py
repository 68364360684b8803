"""How models are run with less overhead: nothing that the plain call would show is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from tdhook_like import InputXGradient, IntegratedGradients, Saliency, TargetError
from tdhook_like.runner import Runner, View

METHODS: dict[str, Any] = {
    "saliency": Saliency,
    "input x gradient": InputXGradient,
    "integrated gradients": lambda t: IntegratedGradients(t, n_steps=3, gap_tolerance=None),
}


def inputs(n: int = 4) -> TensorDict:
    return TensorDict({"x": torch.randn(n, 3)}, [n])


@pytest.mark.parametrize("name", METHODS)
def test_a_buffer_that_was_made_in_inference_mode_is_no_hindrance(name: str):
    model, td = TensorDictModule(nn.Linear(3, 2), ["x"], ["y"]), inputs()
    expected = model(td.copy())["y"]
    with torch.inference_mode():
        model.module.register_buffer("seen", torch.zeros(3))
    with METHODS[name](("y", 0)).prepare(model) as hooked:
        assert torch.equal(hooked(td)["y"], expected)


@pytest.mark.parametrize(
    "register", [register_module_forward_hook, register_module_forward_pre_hook]
)
def test_hooks_on_all_modules_see_the_call_of_the_tensordict_module_too(register: Any):
    model, td = TensorDictModule(nn.Linear(3, 2), ["x"], ["y"]), inputs()
    seen: list[str] = []
    method = IntegratedGradients(("y", 0), n_steps=3, gap_tolerance=None)
    with method.prepare(model) as hooked:
        watch = register(lambda module, *given: seen.append(type(module).__name__))
        try:
            hooked(td)
        finally:
            watch.remove()
    assert seen.count("TensorDictModule") >= 1 and "Linear" in seen


@pytest.mark.parametrize("name", METHODS)
def test_an_output_that_is_thrown_away_is_nowhere(name: str):
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x)
            return y.sum(-1), y

    model, td = TensorDictModule(Two(3, 2), ["x"], ["_", "y"]), inputs()
    with METHODS[name](("y", 0)).prepare(model) as hooked:
        hooked(td)
    assert set(td.keys()) - {"attr_gap"} == {"x", "y", "attr"}
    seen: list[set[Any]] = []

    def looks(outputs: Any) -> Tensor:
        seen.append(set(outputs.keys()))
        return outputs["y"][..., 0] if isinstance(outputs, TensorDict) else outputs.get("y")[..., 0]

    with METHODS[name](looks).prepare(model) as hooked:
        hooked.observe(td.select("x"))
    assert all("_" not in keys for keys in seen) and seen
    with pytest.raises(TargetError, match="It writes 'y'"):
        METHODS[name]("z").prepare(model)


CHANGED: dict[str, Any] = {
    "not in place": lambda m: setattr(m, "inplace", False),
    "strict": lambda m: setattr(m, "strict", True),
    "a forward of its own": lambda m: setattr(m, "forward", lambda td: td.set("y", td["x"])),
    "a forward hook": lambda m: m.register_forward_hook(lambda *given: None),
    "a backward hook": lambda m: m.register_full_backward_hook(lambda *given: None),
    "a backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *given: None),
}


@pytest.mark.parametrize("change", CHANGED)
def test_only_a_tensordict_module_as_it_was_made_is_cut_short(change: str):
    model = TensorDictModule(nn.Linear(3, 2), ["x"], ["y"])
    assert Runner(model, model, [model, model.module]).writes_out_keys
    CHANGED[change](model)
    assert not Runner(model, model, [model, model.module]).writes_out_keys


def test_a_forward_of_its_own_is_what_is_explained():
    model, td = TensorDictModule(nn.Linear(3, 3), ["x"], ["y"]), inputs()
    model.forward = lambda td: td.set("y", 5 * td["x"])
    with Saliency(("y", 1), abs=False).prepare(model) as hooked:
        hooked(td)
    assert torch.equal(td["y"], 5 * td["x"])
    assert torch.equal(td["attr", "x"], torch.tensor([0.0, 5.0, 0.0]).expand(4, 3))


def test_a_view_lists_what_was_read_and_written_once_and_reads_what_was_written():
    td = TensorDict({"x": torch.zeros(3), ("agents", "y"): torch.zeros(3)}, [3])
    view = View(td, {"x": torch.ones(3), "z": torch.ones(3)})
    assert sorted(map(str, view.keys(True, True))) == ["('agents', 'y')", "x", "z"]
    assert view.get("x").all() and view.get("z").all() and not view.get(("agents", "y")).any()
    assert view.get("none", 7) == 7 and view.batch_size == (3,)
