"""The contract about the model: pristine between calls, in every mode and training."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential, set_skip_existing
from torch import Tensor, nn

from pristine import assert_same, bits, snapshot, td_snapshot
from tdhook_like import LRP, EpsilonPlus
from tdhook_like.attribution.lrp import EpsilonRule, GammaRule, ZPlusRule
from traceable_model import METHODS, MODES, Net, inputs, model, run

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
