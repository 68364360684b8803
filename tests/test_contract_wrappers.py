"""The contract about wrapped models: compiled ones and thin wrappers are explained by what they wrap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from pristine import assert_same, bits, snapshot
from tdhook_like import LRP, EpsilonPlus, ModelError, Saliency
from traceable_model import METHODS, MODES, inputs, model, run

# --- wrappers -------------------------------------------------------------------------------------


def eager(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


@contextmanager
def _compiler_reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "a compiled policy": eager,
    "a policy of a compiled network": lambda p: TensorDictModule(eager(p.module), ["x"], ["y"]),
    "a data-parallel network": lambda p: TensorDictModule(nn.DataParallel(p.module), ["x"], ["y"]),
    "a compiled part": lambda p: TensorDictSequential(
        TensorDictModule(eager(p.module.body), ["lifted"], ["h"]),
        TensorDictModule(p.module.head, ["h"], ["y"]),
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_policy_is_explained_through_its_original(wrapper, method, mode):
    policy, td = model(plain=True), inputs()
    if "part" in wrapper:
        td["lifted"] = td["x"].unsqueeze(-2)
        body, head = policy.module.body, policy.module.head
        original: Any = TensorDictSequential(
            TensorDictModule(body, ["lifted"], ["h"]), TensorDictModule(head, ["h"], ["y"])
        )
    else:
        original = policy
    with _compiler_reset():
        wrapped = WRAPPERS[wrapper](policy)
        wrapped.eval()
        plain = wrapped(td.clone())["y"]
        before = snapshot(policy)
        with METHODS[method](("y", 0)).prepare(wrapped) as hooked:
            found = run(hooked, MODES[mode], td.clone())
        assert_same(before, snapshot(policy), ignoring=["calls"] if MODES[mode] else [])
    with METHODS[method](("y", 0)).prepare(original) as hooked:
        expected = run(hooked, MODES[mode], td.clone())
    for key, value in expected["attr"].items():
        torch.testing.assert_close(found["attr", key], value)
    if MODES[mode]:
        assert bits(found["y"]) == bits(plain)


def test_paths_and_plans_of_a_wrapped_policy_are_those_of_the_original():
    policy = model(plain=True)
    wrapped = [
        WRAPPERS[f"a {kind} network"](policy) for kind in ("policy of a compiled", "data-parallel")
    ]
    plans = {str(LRP(target=("y", 0)).prepare(each).plan) for each in (policy, *wrapped)}
    assert len(plans) == 1 and "module.body.3" in plans.pop()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_policy_is_refused_with_the_reason():
    scripted = torch.jit.trace(nn.Linear(4, 3), torch.zeros(1, 4))
    for given in (scripted, nn.Sequential(nn.Linear(4, 4), scripted)):
        with pytest.raises(ModelError, match=r"TorchScript.*Explain the module"):
            Saliency(("y", 0)).prepare(given, ["x"], ["y"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_a_model_can_be_compiled_inside_the_block_and_gives_what_it_gives(method, mode):
    policy, td = model(plain=True), inputs()
    plain = policy(td.clone())["y"]
    with _compiler_reset(), METHODS[method](("y", 0)).prepare(policy) as hooked:
        run(hooked, MODES[mode], td.clone())
        compiled = eager(policy.module)
        torch.testing.assert_close(compiled(td["x"]), plain)
        run(hooked, MODES[mode], td.clone())
        torch.testing.assert_close(compiled(td["x"]), plain)


def test_a_compiled_plain_module_is_explained_through_its_original():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    compiled = torch.compile(net, backend="eager")
    td = TensorDict({"x": torch.randn(4, 3)}, [4])
    compiled(td["x"])  # compiled before any rule is on
    found = {}
    for name, module in {"plain": net, "compiled": compiled}.items():
        with LRP(EpsilonPlus(), ("y", 1)).prepare(module, ["x"], ["y"]) as hooked:
            assert hooked.context.runner.is_wrapped == (name == "compiled")
            found[name] = hooked(td.copy())["attr", "x"]
    assert torch.equal(found["plain"], found["compiled"])
