"""The contract about the model: pristine between calls, and explained through its original."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential, set_skip_existing
from torch import Tensor, nn

from pristine import assert_same, bits, snapshot, td_snapshot
from tdhook_like import (
    LRP,
    EpsilonPlus,
    InputXGradient,
    IntegratedGradients,
    ModelError,
    Saliency,
)
from tdhook_like.attribution.lrp import EpsilonRule, GammaRule, ZPlusRule

METHODS: dict[str, Callable[..., Any]] = {
    "saliency": lambda target, **o: Saliency(target, abs=False, **o),
    "input x gradient": InputXGradient,
    "integrated gradients": lambda t, **o: IntegratedGradients(
        t, n_steps=4, gap_tolerance=None, **o
    ),
    "lrp": lambda target, **o: LRP(EpsilonPlus(), target, **o),
}
MODES = {"driving": True, "observing": False}


class Net(nn.Module):
    """What a call could leave traces in: statistics, dropout, in-place, weight norm, a counter."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.body = nn.Sequential(
            nn.Conv1d(1, 2, 2), nn.ReLU(inplace=True), nn.Flatten(-2), nn.Linear(6, 6),
            nn.Identity() if plain else nn.BatchNorm1d(6), nn.Tanh(),
            nn.Linear(6, 6) if plain else normed, nn.Dropout(0.3), nn.LayerNorm(6),
        )  # fmt: skip
        self.head = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
        return self.head(self.body(x.unsqueeze(-2)) + 0.1)


def model(training: bool = False, plain: bool = False) -> Any:
    return TensorDictModule(Net(plain), ["x"], ["y"]).train(training)


def inputs(n: int = 6) -> TensorDict:
    return TensorDict({"x": torch.randn(n, 4)}, [n])


def run(hooked: Any, drive: bool, td: TensorDict) -> TensorDict:
    return (hooked if drive else hooked.observe)(td)


# --- pristine -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize("method", METHODS)
def test_observing_leaves_the_model_as_it_was_inside_the_block_too(method, training):
    policy = model(training)
    policy(inputs())["y"].sum().backward()  # there are gradients to be left alone
    before = snapshot(policy)
    options = {"activations" if method == "integrated gradients" else "at": "module.head"}
    context = METHODS[method](("y", 0), **options).prepare(policy)
    assert_same(before, snapshot(policy))
    with context as hooked:
        assert_same(before, snapshot(policy))
        for _ in range(2):
            hooked.observe(inputs_without_rng())
            assert_same(before, snapshot(policy))
    assert_same(before, snapshot(policy))


def inputs_without_rng() -> TensorDict:
    with torch.random.fork_rng():
        return inputs()


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize("method", METHODS)
def test_driving_leaves_the_model_as_the_plain_call_leaves_it(method, training):
    policy = model(training)
    twin = copy.deepcopy(policy)
    td = inputs()

    def versions(module: nn.Module) -> list[int]:
        return [tensor._version for tensor in (*module.parameters(), *module.buffers())]

    state, before = torch.get_rng_state(), [versions(policy), versions(twin)]
    plain = twin(td.clone())
    state_after = torch.get_rng_state()
    torch.set_rng_state(state)
    with METHODS[method](("y", 0)).prepare(policy) as hooked:
        hooked(td)
    assert torch.equal(state_after, torch.get_rng_state())
    assert bits(td["y"]) == bits(plain["y"])
    for name, value in twin.state_dict().items():
        assert bits(policy.state_dict()[name]) == bits(value), name
    writes = [
        [now - then for now, then in zip(versions(module), earlier, strict=True)]
        for module, earlier in zip((policy, twin), before, strict=True)
    ]
    assert writes[0] == writes[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_backward_is_never_called_and_parameters_take_no_part(method, mode):
    policy = model()
    policy.module.head.weight.requires_grad_(False)

    def refuse(grad: Tensor) -> Tensor:
        raise AssertionError("a parameter was differentiated")

    handles = [p.register_hook(refuse) for p in policy.parameters() if p.requires_grad]
    with METHODS[method](("y", 0)).prepare(policy) as hooked:
        run(hooked, MODES[mode], inputs())
    for handle in handles:
        handle.remove()
    assert all(p.grad is None for p in policy.parameters())
    assert not policy.module.head.weight.requires_grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_model_is_explained_as_a_trainable_one(method, mode):
    policy, td = model(), inputs()
    found = []
    for trainable in (True, False):
        policy.requires_grad_(trainable)
        with METHODS[method](("y", 0)).prepare(policy) as hooked:
            found.append(run(hooked, MODES[mode], td.clone())["attr", "x"])
    torch.testing.assert_close(found[0], found[1])


# --- what one does with a model afterwards --------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles_of_an_explained_model_are_those_of_one_that_was_not(method):
    policy, td = model(training=True, plain=True), inputs()
    pickled, saved = pickle.dumps(policy), io.BytesIO()
    torch.save(policy.state_dict(), saved)
    with METHODS[method](("y", 0)).prepare(policy) as hooked:
        hooked.observe(td)
        assert pickle.dumps(policy) == pickled
        inside = copy.deepcopy(policy)
    assert pickle.dumps(policy) == pickled
    again = io.BytesIO()
    torch.save(policy.state_dict(), again)
    assert again.getvalue() == saved.getvalue()
    plain, copied = policy.eval()(td.clone())["y"], inside.eval()(td.clone())["y"]
    assert bits(plain) == bits(copied)


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_bit_for_bit_between_observations(method):
    def trained(observer: Any) -> dict[str, Any]:
        torch.manual_seed(3)
        policy = model(training=True)
        optimiser = torch.optim.Adam(policy.parameters())
        for step in range(6):
            td = inputs()
            if observer is not None and step % 2:
                with observer.prepare(policy) as hooked:
                    hooked.observe(td)
            optimiser.zero_grad()
            policy(td)["y"].square().sum().backward()
            optimiser.step()
        return {name: bits(value) for name, value in policy.state_dict().items()}

    assert trained(METHODS[method](("y", 0))) == trained(None)


@pytest.mark.parametrize("method", METHODS)
def test_training_through_the_wrapped_policy_is_training_it(method):
    def trained(observer: Any) -> dict[str, Any]:
        torch.manual_seed(3)
        policy = model(training=True)
        optimiser = torch.optim.Adam(policy.parameters())
        for _ in range(4):
            td = inputs()
            if observer is not None:
                with observer.prepare(policy) as hooked:
                    hooked(td.clone())
                    policy(td)["y"].square().sum().backward()
            else:
                policy(td.clone())
                policy(td)["y"].square().sum().backward()
            optimiser.step()
        return {name: bits(value) for name, value in policy.state_dict().items()}

    assert trained(METHODS[method](("y", 0))) == trained(None)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_change_between_calls_are_seen(method):
    policy, td = model(), inputs()
    with METHODS[method](("y", 0)).prepare(policy) as hooked:
        hooked.observe(td)
        with torch.no_grad():
            policy.module.head.weight.mul_(-1)
            policy.module.body[3].weight.add_(0.1)
        changed = hooked.observe(td.clone())["attr", "x"]
    with METHODS[method](("y", 0)).prepare(policy) as hooked:
        assert torch.equal(hooked.observe(td.clone())["attr", "x"], changed)
    assert not torch.allclose(changed, td["attr", "x"])


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


# --- the modes of collectors ----------------------------------------------------------------------


class Attends(nn.Module):
    """Takes torch's fast path where gradients are off, whose last bits are others."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
        self.body = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.lift(x).unsqueeze(-2) * torch.linspace(0.5, 1.5, 7).unsqueeze(-1)
        return self.head(self.body(tokens).mean(-2))


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", [lambda: Net(plain=True), Attends], ids=["net", "attention"])
def test_attribution_works_where_gradients_are_off(net, method, mode, grad_mode):
    policy, td = TensorDictModule(net(), ["x"], ["y"]).eval(), inputs()
    before = snapshot(policy)
    with METHODS[method](("y", 0)).prepare(policy) as hooked:
        expected = run(hooked, MODES[mode], td.clone())
        with grad_mode():
            inside = run(hooked, MODES[mode], td.clone())
            made_here = TensorDict({"x": td["x"] * 1}, [6])
            from_here = run(hooked, MODES[mode], made_here)
            assert not torch.is_grad_enabled()
            plain = policy(td.clone())["y"]
    for found in (inside, from_here):
        torch.testing.assert_close(found["attr", "x"], expected["attr", "x"], rtol=1e-4, atol=1e-5)
        if MODES[mode]:
            assert bits(found["y"]) == bits(plain)
    assert_same(before, snapshot(policy), ignoring=["calls"])


def in_two_modules(policy: Any) -> Any:
    body = TensorDictModule(lambda x: policy.module.body(x.unsqueeze(-2)), ["x"], ["h"])
    return TensorDictSequential(body, TensorDictModule(policy.module.head, ["h"], ["y"]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["saliency", "integrated gradients"])
@pytest.mark.parametrize("form", [lambda policy: policy, in_two_modules], ids=["one", "two"])
def test_modules_that_would_skip_an_existing_output_are_run(form, method, mode):
    policy, td = form(model(plain=True)), inputs()
    with METHODS[method](("y", 0)).prepare(policy) as hooked:
        expected = run(hooked, MODES[mode], td.clone())["attr", "x"]
        td["y"] = torch.full((6, 3), 7.0)
        with set_skip_existing(True):
            found = run(hooked, MODES[mode], td)
    torch.testing.assert_close(found["attr", "x"], expected)
    assert torch.equal(td["y"], torch.full((6, 3), 7.0))  # as the plain call, which skips


# --- layers that are hard to read -----------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ELU(), nn.SiLU(), nn.Hardtanh(-0.1, 0.1)])
@pytest.mark.parametrize("rule", [EpsilonRule(), ZPlusRule(), GammaRule()], ids=repr)
def test_an_in_place_activation_behind_a_ruled_layer_changes_nothing(rule, activation, mode):
    td, found = inputs(), []
    net = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 3))
    mapper = EpsilonPlus(rule_mapper=lambda n, m: rule if isinstance(m, nn.Linear) else None)
    for inplace in (False, True):
        activation.inplace = inplace
        with LRP(mapper, ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
            found.append(run(hooked, MODES[mode], td.clone())["attr", "x"])
    assert torch.equal(found[0], found[1])


def test_rules_leave_parametrised_weights_alone():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    td, before = inputs(), snapshot(layer)
    read = td_snapshot(td, keys=["x"])
    with LRP(lambda n, m: ZPlusRule() if n == "" else None, ("y", 0)).prepare(
        layer, ["x"], ["y"]
    ) as hooked:
        hooked.observe(td)
    assert_same(before, snapshot(layer))
    assert_same(read, td_snapshot(td, keys=["x"]))
    share = (td["x"] * layer.weight[0]).clamp(min=0) / (
        (td["x"] * layer.weight[0]).clamp(min=0).sum(-1) + layer.bias[0].clamp(min=0) + 1e-6
    ).unsqueeze(-1)
    expected = share * layer(td["x"])[:, :1]
    torch.testing.assert_close(td["attr", "x"], expected.detach())


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
