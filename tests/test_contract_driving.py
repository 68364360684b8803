"""The contract about driving and observing: the plain call exactly once, or nothing at all."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
    set_interaction_type,
)
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from pristine import assert_same, bits, snapshot, td_snapshot
from tdhook_like import (
    LRP,
    ContextError,
    EpsilonPlus,
    InputXGradient,
    IntegratedGradients,
    Saliency,
)

METHODS: dict[str, Callable[..., Any]] = {
    "saliency": lambda target: Saliency(target, abs=False),
    "input x gradient": InputXGradient,
    "integrated gradients": lambda t: IntegratedGradients(t, n_steps=4, gap_tolerance=None),
    "lrp": lambda target: LRP(EpsilonPlus(), target),
}


class Gaussian(Independent):
    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(Normal(loc, scale), 1)


def trunk() -> nn.Module:
    """Whatever a call can move: statistics, a counter of batches, the stream of random numbers."""
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(8, 4)
    )


def deterministic() -> Any:
    return TensorDictModule(trunk(), ["observation"], ["logits"])


def sampling(continuous: bool) -> Any:
    net: Any = nn.Sequential(trunk(), NormalParamExtractor()) if continuous else trunk()
    keys = ["loc", "scale"] if continuous else ["logits"]
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, ["observation"], keys),
        ProbabilisticTensorDictModule(
            keys,
            ["action"],
            distribution_class=Gaussian if continuous else Categorical,
            return_log_prob=True,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


POLICIES: dict[str, tuple[Callable[[], Any], Any]] = {
    "a network": (deterministic, ("logits", 0)),
    "a discrete policy": (lambda: sampling(False), None),
    "a continuous policy": (lambda: sampling(True), None),
    "a sequence": (
        lambda: TensorDictSequential(
            deterministic(), TensorDictModule(nn.Dropout(), ["logits"], ["y"])
        ),
        ("y", 1),
    ),
}


def inputs(n: int = 6) -> TensorDict:
    return TensorDict({"observation": torch.randn(n, 4)}, [n])


def moved(policy: nn.Module) -> dict[str, bytes | None]:
    return {name: bits(value) for name, value in policy.state_dict().items()}


@pytest.mark.parametrize("grads", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", POLICIES)
def test_driving_is_the_plain_call_once_bit_for_bit(kind, method, training, grads):
    make, target = POLICIES[kind]
    policy = make().train(training)
    twin = copy.deepcopy(policy)
    batches = [inputs() for _ in range(3)]
    with torch.set_grad_enabled(grads):
        state = torch.get_rng_state()
        plain = [twin(td.clone()) for td in batches]
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        with METHODS[method](target).prepare(policy) as hooked:
            driven = [hooked(td.clone()) for td in batches]
        assert torch.equal(torch.get_rng_state(), after)
    assert moved(policy) == moved(twin)
    for one, other in zip(driven, plain, strict=True):
        for key in other.keys(True, True):
            assert bits(one.get(key)) == bits(other.get(key)), key
        assert one["attr", "observation"].isfinite().all()


@pytest.mark.parametrize("grads", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", POLICIES)
def test_observing_changes_nothing_at_all(kind, method, training, grads):
    make, target = POLICIES[kind]
    policy = make().train(training)
    with torch.random.fork_rng():
        td = make().eval()(inputs()).detach()
    with torch.set_grad_enabled(grads), METHODS[method](target).prepare(policy) as hooked:
        before, read = snapshot(policy), td_snapshot(td, keys=list(td.keys()))
        keys = set(td.keys())
        hooked.observe(td)
        assert_same(before, snapshot(policy))
        assert_same(read, td_snapshot(td, keys=list(keys)))
    assert set(td.keys()) - keys <= {"attr", "attr_gap"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_observing_explains_the_model_in_evaluation_mode(method, training):
    policy, td = deterministic(), inputs()
    policy.train()(inputs(50))  # statistics that are not those of a fresh layer
    with METHODS[method](("logits", 0)).prepare(policy.eval()) as hooked:
        expected = hooked(td.clone())["attr", "observation"]
    with METHODS[method](("logits", 0)).prepare(policy.train(training)) as hooked:
        found = hooked.observe(td.clone())["attr", "observation"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["saliency", "input x gradient", "lrp"])
def test_driving_a_training_model_explains_the_very_run_that_it_made(method):
    policy, td = deterministic().train(), inputs()
    twin = copy.deepcopy(policy)
    state = torch.get_rng_state()
    with METHODS["saliency"](("logits", 0)).prepare(policy) as hooked:
        found = hooked(td)["attr", "observation"]
    torch.set_rng_state(state)
    x = td["observation"].clone().requires_grad_()
    expected = torch.autograd.grad(twin.module(x)[:, 0].sum(), x)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_observing_between_driven_calls_changes_neither(method):
    policy = sampling(False).train()
    twin = copy.deepcopy(policy)
    batches = [inputs() for _ in range(4)]
    state = torch.get_rng_state()
    plain = [twin(td.clone())["action"] for td in batches]
    torch.set_rng_state(state)
    driven = []
    with METHODS[method](None).prepare(policy) as hooked:
        for td in batches:
            driven.append(hooked(td.clone())["action"])
            hooked.observe(td.update({"action": driven[-1]}))
    assert [bits(a) for a in driven] == [bits(a) for a in plain]
    assert moved(policy) == moved(twin)


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("method", METHODS)
def test_a_call_repeats_itself_under_one_seed(method, drive):
    policy = sampling(True)
    td = policy(inputs()).detach()
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        with METHODS[method](None).prepare(policy.eval()) as hooked:
            out = (hooked if drive else hooked.observe)(td.clone())
            found.append(bits(out["attr", "observation"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [InteractionType.MODE, InteractionType.RANDOM])
def test_the_interaction_type_of_the_caller_holds_in_the_driven_call(kind):
    policy, td = sampling(True).eval(), inputs()
    with set_interaction_type(kind):
        state = torch.get_rng_state()
        plain = policy(td.clone())["action"]
        torch.set_rng_state(state)
        with Saliency().prepare(policy) as hooked:
            assert bits(hooked(td.clone())["action"]) == bits(plain)


def test_the_hooked_module_stands_where_the_model_stood():
    policy = deterministic().train()
    head = TensorDictModule(nn.Linear(4, 1), ["logits"], ["value"])
    td = inputs()
    with Saliency(("logits", 0)).prepare(policy) as hooked:
        assert hooked.training and list(hooked.parameters()) == list(policy.parameters())
        chain = TensorDictSequential(hooked, head)
        chain(td)
        assert {"logits", "value", "attr"} <= set(td.keys())
        hooked.eval()
        assert not policy.training and not policy.module[1].training
        hooked.train()
        assert policy.training and policy.module[1].training
        seen: list[Any] = []
        handle = hooked.register_forward_hook(lambda module, args, out: seen.append(out))
        hooked(td)
        handle.remove()
        assert seen == [td] or seen[0] is td


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_the_users_own_are_part_of_the_model_and_stay_on_it(method):
    policy, td = deterministic().eval(), inputs()
    handle = policy.module[0].register_forward_hook(lambda module, args, out: out * 2)
    before = snapshot(policy)
    with METHODS[method](("logits", 0)).prepare(policy) as hooked:
        hooked(td)
        assert_same(before, snapshot(policy))
    handle.remove()
    with torch.no_grad():
        policy.module[0].weight.mul_(2)
        policy.module[0].bias.mul_(2)
    with METHODS[method](("logits", 0)).prepare(policy) as hooked:
        expected = hooked(td.clone())
    torch.testing.assert_close(td["logits"], expected["logits"])
    torch.testing.assert_close(td["attr", "observation"], expected["attr", "observation"])


class Stateful(nn.Module):
    """Keeps what modules keep beside parameters and buffers, and moves one thing of it per call."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 2)
        self.count, self.list, self.dict = 0, [0], {"n": 0}
        self.deque = collections.deque([0], maxlen=50)
        self.ordered, self.default = collections.OrderedDict(), collections.defaultdict(list)
        self.tensor, self.td = torch.zeros(()), TensorDict({"n": torch.zeros(())})
        self.nested = {"past": [torch.zeros(())]}
        self.generator = torch.Generator().manual_seed(0)

    def moves(self) -> dict[str, Callable[[], Any]]:
        return {
            "count": lambda: setattr(self, "count", self.count + 1),
            "list": lambda: self.list.append(1),
            "dict": lambda: self.dict.update(n=self.dict["n"] + 1),
            "deque": lambda: self.deque.append(1),
            "ordered": lambda: self.ordered.update({len(self.ordered): 1}),
            "default": lambda: self.default["new"].append(1),
            "tensor": lambda: self.tensor.add_(1),
            "nested": lambda: self.nested["past"][0].add_(1),
            "td": lambda: self.td["n"].add_(1),
            "generator": lambda: torch.rand(1, generator=self.generator),
            "random": random.random,
        }

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.moves()[self.kind]()
        return self.layer(x)

    def state(self) -> list[Any]:
        """A copy of everything that can move, also of what the interpreter holds."""
        plain = [self.count, [*self.list], {**self.dict}, [*self.deque], {**self.ordered}]
        tensors = [self.tensor, self.nested["past"][0], self.td["n"], self.generator.get_state()]
        return [*plain, copy.deepcopy(dict(self.default)), *map(bits, tensors), random.getstate()]


STATES = list(Stateful("").moves())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", STATES)
def test_state_in_attributes_is_left_alone_by_observing(kind, method):
    net, td = Stateful(kind), inputs()
    before = net.state()
    with METHODS[method](("y", 0)).prepare(net, ["observation"], ["y"]) as hooked:
        hooked.observe(td)
    assert net.state() == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", STATES)
def test_state_in_attributes_is_moved_by_driving_as_by_the_plain_call(kind, method):
    net, td = Stateful(kind), inputs()
    twin, seed = Stateful(kind), random.getstate()
    twin(td["observation"])
    expected = twin.state()
    random.setstate(seed)
    with METHODS[method](("y", 0)).prepare(net, ["observation"], ["y"]) as hooked:
        hooked(td)
    assert net.state() == expected


class Normaliser(nn.Module):
    """Writes its statistics in evaluation mode too, as running normalisers of observations do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += len(x)
            self.mean = self.mean + (x.mean(0) - self.mean) * len(x) / self.seen  # another tensor
        return self.layer(x - self.mean)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("method", METHODS)
def test_a_driven_call_that_fails_leaves_every_buffer_as_it_was(method, training):
    net, td = Normaliser().train(training), inputs()
    net(td["observation"])

    def broken(out: Any) -> Tensor:
        raise RuntimeError("no target today")

    before = snapshot(net)
    with METHODS[method](broken).prepare(net, ["observation"], ["y"]) as hooked:
        with pytest.raises(RuntimeError, match="no target today"):
            hooked(td)
        assert_same(before, snapshot(net))


def test_a_context_can_be_entered_again_and_what_it_gave_before_stays_closed():
    policy, td = deterministic(), inputs()
    context = Saliency(("logits", 0)).prepare(policy)
    with context as first:
        expected = bits(first.observe(td)["attr", "observation"])
    with context as second:
        assert second is not first
        assert bits(second.observe(td)["attr", "observation"]) == expected
        with pytest.raises(ContextError, match="left"):
            first(td)


def test_select_out_keys_of_the_model_holds():
    policy = TensorDictSequential(
        TensorDictModule(nn.Linear(4, 4), ["observation"], ["hidden"]),
        TensorDictModule(nn.Linear(4, 2), ["hidden"], ["logits"]),
    ).select_out_keys("logits")
    td, twin = inputs(), inputs()
    plain = set(policy(twin).keys())
    with Saliency(("logits", 0)).prepare(policy) as hooked:
        hooked(td)
    assert set(td.keys()) == plain | {"attr"}


# --- environments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_rollout_of_the_hooked_policy_is_that_of_the_policy(method):
    pytest.importorskip("torchrl")
    from torchrl.envs import EnvBase  # noqa: F401 (the mock needs the package)
    from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv

    env = ContinuousActionVecMockEnv()
    shape = env.observation_spec["observation"].shape[-1]
    size = env.action_spec.shape[-1]
    net = nn.Sequential(
        nn.Linear(shape, 8), nn.Tanh(), nn.Linear(8, 2 * size), NormalParamExtractor()
    )
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["action"], distribution_class=Gaussian,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )  # fmt: skip

    def rollout(actor: Any) -> TensorDict:
        torch.manual_seed(1)
        env.set_seed(1)
        return env.rollout(5, policy=actor)

    plain = rollout(policy)
    with METHODS[method](None).prepare(policy) as hooked:
        driven = rollout(hooked)
    for key in plain.keys(True, True):
        assert bits(driven.get(key)) == bits(plain.get(key)), key
    assert driven["attr", "observation"].shape == driven["observation"].shape
