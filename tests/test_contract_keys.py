"""The contract about keys: where results go, what is written, which TensorDicts are understood."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack, tensorclass
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from pristine import assert_same, bits, td_snapshot
from tdhook_like import (
    LRP,
    Each,
    EpsilonPlus,
    InputXGradient,
    IntegratedGradients,
    LockedError,
    Saliency,
)

METHODS = {
    "saliency": lambda target, **options: Saliency(target, abs=False, **options),
    "input x gradient": InputXGradient,
    "integrated gradients": lambda target, **options: IntegratedGradients(
        target, n_steps=8, gap_tolerance=None, **options
    ),
    "lrp": lambda target, **options: LRP(EpsilonPlus(), target, **options),
}


class Adds(nn.Module):
    """Two linear maps of the last dimension, added; a third input that it ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, first: Tensor, second: Tensor, ignored: Any = None) -> Tensor:
        return torch.tanh(self.first(first) + self.second(second))


def policy(**keys: Any) -> TensorDictModule:
    given = {"in_keys": ["observation", ("agents", "state", "speed")], "out_keys": ["logits"]}
    return TensorDictModule(Adds(), **{**given, **keys})


def inputs(*batch: int) -> TensorDict:
    td = {
        "observation": torch.randn(*batch, 3),
        ("agents", "state", "speed"): torch.randn(*batch, 4),
    }
    return TensorDict(td, batch)


def gradients(model: TensorDictModule, td: TensorDictBase, index: int) -> list[Tensor]:
    leaves = [td.get(key).detach().clone().requires_grad_() for key in model.in_keys[:2]]
    return list(torch.autograd.grad(model.module(*leaves)[..., index].sum(), leaves))


def keys_of(td: Any) -> set[Any]:
    return set(td.keys(True, True))


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
def test_attributions_lie_at_attr_and_the_in_key_in_the_shape_of_the_input(drive):
    model, td = policy(), inputs(5)
    with Saliency(("logits", 1), abs=False).prepare(model) as hooked:
        (hooked if drive else hooked.observe)(td)
    for key, expected in zip(model.in_keys, gradients(model, td, 1), strict=True):
        torch.testing.assert_close(td["attr"].get(key), expected)


@pytest.mark.parametrize("method", METHODS)
def test_named_targets_lie_between_attr_and_the_in_key(method):
    model, td = policy(), inputs(5)
    with METHODS[method]({"left": ("logits", 0), "right": ("logits", 1)}).prepare(model) as hooked:
        hooked(td)
    alone = {}
    for index, name in enumerate(["left", "right"]):
        with METHODS[method](("logits", index)).prepare(model) as hooked:
            alone[name] = hooked(inputs(5).update(td.select(*model.in_keys)))["attr"]
    for name, expected in alone.items():
        torch.testing.assert_close(td["attr", name, "observation"], expected["observation"])
        torch.testing.assert_close(
            td["attr", name, "agents", "state", "speed"], expected["agents", "state", "speed"]
        )
    assert keys_of(td["attr"].select("left", "right")) == keys_of(td["attr"])


def test_every_root_is_an_option():
    model, td = policy(), inputs(5)
    roots = {"root": "why", "at_root": "inside", "activations_root": "seen"}
    method = LRP(target=("logits", 0), at="module.first", activations="module.second", **roots)
    with method.prepare(model) as hooked:
        hooked(td)
    assert td["why", "agents", "state", "speed"].shape == (5, 4)
    assert td["inside", "module.first"].shape == td["seen", "module.second"].shape == (5, 2)
    assert {"attr", "attr_at", "activations"}.isdisjoint(td.keys())
    with IntegratedGradients(("logits", 0), gap_root="missing").prepare(model) as hooked:
        assert hooked(td)["missing"].shape == (5,)


def test_results_of_submodules_collide_with_no_in_key():
    model = TensorDictModule(nn.Sequential(nn.Linear(3, 1, bias=False)), ["0"], ["1"])
    td = TensorDict({"0": torch.randn(5, 3)}, [5])
    with LRP(target="1", at="module.0", activations="module.0").prepare(model) as hooked:
        hooked(td)
    weight = model.module[0].weight.detach()
    torch.testing.assert_close(td["attr", "0"], td["0"] * weight, rtol=1e-3, atol=1e-5)
    for root in ("attr_at", "activations"):  # all relevance that there is starts there
        torch.testing.assert_close(td[root, "module.0"], td["0"] @ weight.mT)


@pytest.mark.parametrize("method", METHODS)
def test_nested_batch_sizes_and_names_are_kept(method):
    model = TensorDictModule(nn.Linear(3, 2), [("agents", "observation")], [("agents", "logits")])
    agents = TensorDict({"observation": torch.randn(5, 4, 3)}, [5, 4], names=["env", "agent"])
    td = TensorDict({"agents": agents, "done": torch.zeros(5)}, [5], names=["env"])
    target = (("agents", "logits"), 2, 1)
    with METHODS[method](target).prepare(model) as hooked:
        out = hooked(td)
    assert out is td and td["agents"] is agents
    assert td.names == ["env"] and td["agents"].names == ["env", "agent"]
    assert td["attr"].batch_size == (5,) and td["attr"].names == ["env"]
    assert td["attr", "agents"].batch_size == (5, 4)
    assert td["attr", "agents"].names == ["env", "agent"]
    # The entry of agent 2 depends on the observation of agent 2 alone.
    reached = td["attr", "agents", "observation"].abs().sum(-1) > 0
    assert reached[:, 2].all() and not reached[:, [0, 1, 3]].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
def test_the_same_td_comes_back_with_the_same_tensors_in_it(method, drive):
    model, td = policy(), inputs(5)
    td["observation"].requires_grad_()
    before = td_snapshot(td, keys=model.in_keys)
    with METHODS[method](("logits", 0)).prepare(model) as hooked:
        assert (hooked if drive else hooked.observe)(td) is td
    assert_same(before, td_snapshot(td, keys=model.in_keys))


@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_those_of_the_plain_call_bit_for_bit(method):
    model, td = policy(), inputs(5)
    plain = model(td.clone())
    with METHODS[method](("logits", 0)).prepare(model) as hooked:
        hooked(td)
    assert bits(td["logits"]) == bits(plain["logits"])


def test_a_second_call_replaces_the_results_of_the_first():
    model, td = policy(), inputs(5)
    with Saliency(Each("logits"), abs=False).prepare(model) as hooked:
        assert hooked(td)["attr", "observation"].shape == (5, 2, 3)
    with Saliency(("logits", 1), abs=False).prepare(model) as hooked:
        hooked(td)
        first = td["attr", "observation"]
        td["observation"] = torch.randn(5, 3)
        hooked(td)
    torch.testing.assert_close(td["attr", "observation"], gradients(model, td, 1)[0])
    assert not torch.equal(first, td["attr", "observation"])


# --- kinds of TensorDict -------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [TensorDict.lock_, TensorDict.memmap_, TensorDict.share_memory_])
def test_a_td_that_refuses_the_plain_modules_outputs_refuses_ours_and_a_copy_takes_them(lock):
    model, td = policy(), lock(inputs(5))
    with pytest.raises(RuntimeError, match="lock"):
        model(td)
    with Saliency(("logits", 0), abs=False).prepare(model) as hooked:
        before = td_snapshot(td)
        for call in (hooked, hooked.observe):
            with pytest.raises(LockedError, match=r"copy\(\)"):
                call(td)
        elsewhere = hooked(td, tensordict_out=TensorDict({}, [5]))
        copied = hooked(td.copy())
        assert_same(before, td_snapshot(td))
    expected = gradients(model, td, 0)
    for out in (elsewhere, copied):
        torch.testing.assert_close(out["attr", "observation"], expected[0])
        torch.testing.assert_close(out["attr", "agents", "state", "speed"], expected[1])


def test_results_can_go_to_another_td_and_the_first_stays_as_it_was():
    model, td, out = policy(), inputs(5), TensorDict({}, [5])
    before = td_snapshot(td)
    with Saliency(("logits", 0)).prepare(model) as hooked:
        assert hooked(td, tensordict_out=out) is out
        assert_same(before, td_snapshot(td))
        assert keys_of(out) == {
            "logits", ("attr", "observation"), ("attr", "agents", "state", "speed")
        }  # fmt: skip
        seen = hooked.observe(td, tensordict_out=TensorDict({}, [5]))
        assert_same(before, td_snapshot(td))
    assert "logits" not in seen and bits(seen["attr", "observation"]) == bits(
        out["attr", "observation"]
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_lazy_stack_is_explained_as_the_dense_td_and_stays_lazy(method, dim):
    model, members = policy(), [inputs(5) for _ in range(4)]
    lazy, dense = lazy_stack(members, dim), torch.stack(members, dim)
    with METHODS[method](("logits", 1)).prepare(model) as hooked:
        assert hooked(lazy) is lazy
        hooked(dense)
    assert all(a is b for a, b in zip(members, lazy.tensordicts, strict=True))
    assert keys_of(lazy) == keys_of(dense)
    for key in keys_of(dense):
        torch.testing.assert_close(lazy.get(key), dense.get(key))
    assert members[2]["attr", "observation"].shape == (5, 3)


@pytest.mark.parametrize("method", METHODS)
def test_a_lazy_stack_inside_a_td_is_explained_as_the_dense_one(method):
    model = TensorDictModule(nn.Linear(3, 2), [("agents", "x")], [("agents", "logits")])
    agents = lazy_stack([TensorDict({"x": torch.randn(5, 3)}, [5]) for _ in range(4)], 1)
    lazy, dense = (
        TensorDict({"agents": agents}, [5]),
        TensorDict({"agents": agents.contiguous()}, [5]),
    )
    with METHODS[method]((("agents", "logits"), 2, 1)).prepare(model) as hooked:
        hooked(lazy)
        hooked(dense)
    assert lazy["agents"] is agents and lazy["attr", "agents"].batch_size == (5, 4)
    for key in (("attr", "agents", "x"), ("agents", "logits")):
        torch.testing.assert_close(lazy[key], dense[key])


@tensorclass
class Step:
    observation: Tensor
    logits: Tensor | None = None
    attr: Any = None


def test_a_tensorclass_is_explained_as_the_td_and_stays_one():
    model = TensorDictModule(nn.Linear(3, 2), ["observation"], ["logits"])
    td = TensorDict({"observation": torch.randn(5, 3)}, [5])
    step = Step(observation=td["observation"], batch_size=[5])
    with InputXGradient(("logits", 1)).prepare(model) as hooked:
        assert hooked(step) is step
        hooked(td)
    assert torch.equal(step.logits, td["logits"])
    assert torch.equal(step.attr["observation"], td["attr", "observation"])


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (2, 3, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_batch_dimensions_will_do(method, batch):
    model, td = policy(), inputs(*batch)
    with METHODS[method](("logits", 1)).prepare(model) as hooked:
        hooked(td)
        assert td["attr", "observation"].shape == (*batch, 3)
        assert td["attr", "agents", "state", "speed"].shape == (*batch, 4)
        for at in itertools.product(*map(range, batch)):
            alone = hooked(td.select(*model.in_keys)[at])["attr", "observation"]
            torch.testing.assert_close(alone, td["attr", "observation"][at])


# --- calls without a TensorDict ------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_tensors_are_dispatched_as_on_the_plain_module(method):
    model = TensorDictModule(Adds(), ["observation", ("agents", "speed")], ["logits"])
    td = TensorDict({"observation": torch.randn(5, 3), ("agents", "speed"): torch.randn(5, 4)}, [5])
    first, second = td["observation"], td["agents", "speed"]
    with METHODS[method](("logits", 1)).prepare(model) as hooked:
        hooked(td)
        by_place = hooked(first, second)
        by_name = hooked(observation=first, agents_speed=second)
        mixed = hooked(first, agents_speed=second)
    expected = [td[key] for key in hooked.out_keys]
    assert bits(expected[0]) == bits(model(first, second))
    for found in (by_place, by_name, mixed):
        assert [bits(value) for value in found] == [bits(value) for value in expected]


def test_the_hooked_module_declares_what_it_reads_and_writes():
    model, td = policy(), inputs(5)
    method = IntegratedGradients({"a": ("logits", 0), "b": ("logits", 1)})
    with method.prepare(model) as hooked:
        assert hooked.in_keys == model.in_keys
        before = keys_of(td)
        hooked(td)
        assert keys_of(td) - before == set(hooked.out_keys)


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
def test_only_declared_keys_are_written_and_nothing_requires_grad(method, drive):
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4), ["observation"], [("hidden", "first")]),
        TensorDictModule(nn.Linear(4, 2), [("hidden", "first")], ["logits"]),
    )
    td = TensorDict({"observation": torch.randn(5, 3), "other": torch.ones(5)}, [5])
    with METHODS[method](("logits", 0)).prepare(model) as hooked:
        (hooked if drive else hooked.observe)(td)
    expected = {"observation", "other", ("attr", "observation")}
    expected |= {("hidden", "first"), "logits"} if drive else set()
    expected |= {"attr_gap"} if method == "integrated gradients" else set()
    assert keys_of(td) == expected
    for value in td.values(True, True):
        assert not value.requires_grad and value.grad_fn is None


def test_create_graph_leaves_attributions_that_can_be_differentiated():
    model, td = policy(), inputs(5)
    x = td["observation"].requires_grad_()
    with Saliency(("logits", 1), abs=False, create_graph=True).prepare(model) as hooked:
        hooked(td)
    found = torch.autograd.grad(td["attr", "observation"].square().sum(), x, retain_graph=True)[0]
    y = x.detach().clone().requires_grad_()
    out = model.module(y, td["agents", "state", "speed"])[..., 1].sum()
    first = torch.autograd.grad(out, y, create_graph=True)[0]
    penalty = first.square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(penalty, y, retain_graph=True)[0])
    weights = list(model.parameters())[:2]
    found = torch.autograd.grad(td["attr", "observation"].square().sum(), weights)
    torch.testing.assert_close(found, torch.autograd.grad(penalty, weights))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
def test_an_in_key_that_the_model_ignores_gets_zeros(method, drive):
    model = policy(in_keys=["observation", ("agents", "state", "speed"), "weather"])
    td = inputs(5).set("weather", torch.randn(5, 6))
    with METHODS[method](("logits", 0)).prepare(model) as hooked:
        (hooked if drive else hooked.observe)(td)
    assert torch.equal(td["attr", "weather"], torch.zeros(5, 6))
    assert td["attr", "observation"].abs().min() > 0


OTHERS = {
    "integers": lambda td: td.set("other", torch.arange(5)),
    "truth values": lambda td: td.set("other", torch.arange(5) > 2),
    "complex numbers": lambda td: td.set("other", torch.ones(5, dtype=torch.complex64)),
    "strings": lambda td: td.set_non_tensor("other", "go north"),
}


class Obeys(Adds):
    """Doubles its output when it is told in words what to do; takes numbers of any kind."""

    def forward(self, first: Tensor, second: Tensor, other: Any = None) -> Tensor:
        told = {"go north": 2.0}[other] if isinstance(other, str) else other.real.unsqueeze(-1)
        return super().forward(first, second) * told


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", OTHERS)
def test_keys_that_have_no_gradient_pass_through(method, kind):
    reads = ["observation", ("agents", "state", "speed"), "other"]
    model, td = TensorDictModule(Obeys(), reads, ["y"]), OTHERS[kind](inputs(5))
    plain, before = model(td.copy()), td_snapshot(td, keys=["other"])
    with METHODS[method](("y", 0)).prepare(model) as hooked:
        seen = hooked.observe(td.copy())
        hooked(td)
    assert_same(before, td_snapshot(td, keys=["other"]))
    assert ("attr", "other") not in td.keys(True)
    assert bits(td["y"]) == bits(plain["y"])
    leaves = [td.get(key).clone().requires_grad_() for key in reads[:2]]
    expected = torch.autograd.grad(model.module(*leaves, td["other"])[:, 0].sum(), leaves)
    if method == "saliency":
        torch.testing.assert_close(td["attr", "observation"], expected[0])
        torch.testing.assert_close(seen["attr", "observation"], expected[0])


def test_keys_choose_what_is_attributed():
    model, td = policy(), inputs(5)
    speed = ("agents", "state", "speed")
    by_method = Saliency(("logits", 0), abs=False, keys=[speed]).prepare(model)
    by_prepare = Saliency(("logits", 0), abs=False).prepare(model, in_keys=[speed])
    for context in (by_method, by_prepare):
        with context as hooked:
            out = hooked(td.clone())
        assert keys_of(out["attr"]) == {speed}
        torch.testing.assert_close(out["attr"].get(speed), gradients(model, td, 0)[1])
