"""The camera: a snapshot sees every kind of change, says where, and sees nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict
from torch import nn
from torch.nn.modules import module as nn_module
from torch.overrides import BaseTorchFunctionMode

from pristine import assert_same, snapshot, td_snapshot


def model() -> Any:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())
    net.__dict__["hidden"] = nn.Linear(2, 2)  # an attribute that is no registered child
    net.__dict__["table"] = {"inner": [nn.Linear(2, 2)]}
    return net


def _set(where: str, name: str, value: Any) -> Callable[[Any], object]:
    return lambda net: setattr(net.get_submodule(where), name, value)


def _backward(net: Any) -> None:
    net[0].weight.sum().backward()


def _replace_parameter(net: Any) -> None:
    linear = net[0]
    linear.weight = nn.Parameter(linear.weight.detach().clone())


def _bump_version(net: Any) -> None:
    with torch.no_grad():
        net[0].weight.mul_(1)


def _hidden(net: Any) -> Any:
    return vars(net)["hidden"]


MODEL_CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "an attribute": (_set("0", "note", 1), "model.0: note"),
    "an attribute that is gone": (lambda net: vars(net).pop("table"), "model: table"),
    "another value": (_set("2", "inplace", True), "model.2: inplace: False became True"),
    "an instance forward": (_set("0", "forward", print), "model.0: forward"),
    "a forward hook": (lambda net: net[0].register_forward_hook(print), "model.0: _forward_hooks"),
    "a forward pre-hook": (
        lambda net: net[0].register_forward_pre_hook(print),
        "model.0: _forward_pre_hooks",
    ),
    "a backward hook": (
        lambda net: net[2].register_full_backward_hook(print),
        "model.2: _backward_hooks",
    ),
    "a replaced hook table": (_set("0", "_forward_hooks", OrderedDict()), "another object"),
    "a hook on a parameter": (
        lambda net: net[0].weight.register_hook(print),
        "model.0.weight: tensor hooks",
    ),
    "an attribute of a parameter": (
        lambda net: setattr(net[0].weight, "note", 1),
        "model.0.weight: attributes",
    ),
    "another parameter of equal value": (_replace_parameter, "another object"),
    "the bytes of a parameter": (
        lambda net: net[0].weight.data.add_(1),
        "model.0.weight: bytes: its bytes changed",
    ),
    "the sign of a zero": (lambda net: net[1].bias.data.neg_(), "model.1.bias: bytes"),
    "a version counter": (_bump_version, "model.0.weight: _version: "),
    "requires_grad": (lambda net: net.requires_grad_(False), "model.0.weight: requires_grad"),
    "a gradient": (_backward, "model.0.weight: grad"),
    "a mode": (lambda net: net[2].eval(), "model.2: training: True became False"),
    "batch statistics": (lambda net: net(torch.ones(3, 2)), "model.1.running_mean: bytes"),
    "a counting buffer": (
        lambda net: net[1].num_batches_tracked.add_(1),
        "model.1.num_batches_tracked: _version",
    ),
    "a child": (lambda net: net.add_module("late", nn.ReLU()), "model.late"),
    "a class": (_set("2", "__class__", nn.Tanh), "model.2: class"),
    "a hidden module": (lambda net: _hidden(net).eval(), "model: hidden: training"),
    "a module in a container": (
        lambda net: vars(net)["table"]["inner"][0].eval(),
        "model: table['inner'][0]: training",
    ),
}


@pytest.mark.parametrize("kind", MODEL_CHANGES)
def test_a_snapshot_sees_a_change_of_the_model_and_says_where(kind):
    change, words = MODEL_CHANGES[kind]
    net = model()
    before = snapshot(net)
    assert_same(before, snapshot(net))
    change(net)
    with pytest.raises(AssertionError) as failure:
        assert_same(before, snapshot(net))
    assert words in str(failure.value)


def test_a_snapshot_sees_the_bytes_and_the_identity_of_a_gradient():
    net = model()
    _backward(net)
    weight = net[0].weight
    before = snapshot(net)
    weight.grad.data.add_(1)
    assert [line.split(":")[1] for line in before.differences(snapshot(net))] == [" bytes of grad"]
    before = snapshot(net)
    weight.grad = weight.grad.clone()
    assert "another object" in before.differences(snapshot(net))[0]


def test_a_snapshot_lets_go_what_it_was_told_to_ignore():
    net = model()
    before = snapshot(net)
    torch.rand(1)
    net[0].note = 1
    assert_same(before, snapshot(net), ignoring=("random state", "note"))


GLOBAL_CHANGES: dict[str, Callable[[], Any]] = {
    "grad mode": torch.no_grad,
    "inference mode": torch.inference_mode,
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "autocast": lambda: torch.autocast("cpu"),
    "function modes": BaseTorchFunctionMode,
    "saved tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(abs, abs),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("kind", GLOBAL_CHANGES)
def test_a_snapshot_sees_a_context_that_was_left_open(kind):
    before = snapshot()
    with GLOBAL_CHANGES[kind]():
        inside = snapshot()
    assert any(kind in line for line in before.differences(inside))
    assert_same(before, snapshot())


def test_a_snapshot_sees_global_hooks_random_draws_and_the_default_dtype():
    before = snapshot()
    handle = nn_module.register_module_forward_hook(print)
    torch.rand(1)
    torch.set_default_dtype(torch.float64)
    try:
        lines = before.differences(snapshot())
    finally:
        handle.remove()
        torch.set_default_dtype(torch.float32)
    assert [line.split(": ")[1] for line in lines] == [
        "random state",
        "default dtype",
        "_global_forward_hooks",
    ]


def tensordict() -> TensorDict:
    return TensorDict(
        {"a": torch.zeros(2, 3), "deep": TensorDict({"b": torch.ones(2)}, [2]), "text": "hello"},
        [2],
        names=["time"],
    )


TD_CHANGES: dict[str, tuple[Callable[[TensorDict], object], str]] = {
    "a key": (lambda td: td.set("new", torch.ones(2)), "keys"),
    "a nested key": (lambda td: td.set(("deep", "new"), torch.ones(2)), "td['deep']: keys"),
    "bytes": (lambda td: td["a"].add_(1), "td['a']: bytes"),
    "a tensor of equal value": (lambda td: td.set("a", td["a"].clone()), "another object"),
    "requires_grad": (lambda td: td["deep", "b"].requires_grad_(), "td['deep']['b']: requires"),
    "names": (lambda td: setattr(td, "names", ["env"]), "names"),
    "the batch size": (lambda td: setattr(td, "batch_size", []), "batch size"),
    "a lock": (lambda td: td.lock_(), "locked"),
    "an entry that is no tensor": (lambda td: td.set("text", "bye"), "td['text']"),
}


@pytest.mark.parametrize("kind", TD_CHANGES)
def test_a_snapshot_sees_a_change_of_a_tensordict_and_says_where(kind):
    change, words = TD_CHANGES[kind]
    td = tensordict()
    before = td_snapshot(td)
    assert_same(before, td_snapshot(td))
    change(td)
    with pytest.raises(AssertionError) as failure:
        assert_same(before, td_snapshot(td))
    assert words in str(failure.value)


def test_a_snapshot_of_a_lazy_stack_sees_its_members():
    members = [tensordict(), tensordict()]
    stack = LazyStackedTensorDict(*members)
    before = td_snapshot(stack)
    assert_same(before, td_snapshot(stack))
    members[1]["a"].requires_grad_()
    assert before.differences(td_snapshot(stack)) == [
        "td[1]['a']: requires_grad: False became True"
    ]


def test_a_snapshot_of_chosen_keys_overlooks_the_others():
    td = tensordict()
    before = td_snapshot(td, keys=["a", ("deep", "b")])
    td["new"] = torch.ones(2)
    assert_same(before, td_snapshot(td, keys=["a", ("deep", "b")]))
    td["deep", "b"] = torch.ones(2)
    assert before.differences(td_snapshot(td, keys=["a", ("deep", "b")]))
