"""Attributions and activations at submodules, against autograd and relevance by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from pristine import assert_same, bits, snapshot
from tdhook_like import (
    LRP,
    Each,
    EpsilonPlus,
    InputXGradient,
    IntegratedGradients,
    PathError,
    Saliency,
)
from tdhook_like.attribution.lrp import EpsilonRule, PassRule

GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "saliency": (lambda t, **o: Saliency(t, **o), lambda value, g: g.abs()),
    "signed saliency": (lambda t, **o: Saliency(t, abs=False, **o), lambda value, g: g),
    "input x gradient": (InputXGradient, lambda value, g: value * g),
}


class Policy(nn.Module):
    """A trunk of three layers, one layer that is used twice, a head, and one that is idle."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace), nn.Linear(6, 6))
        self.again = nn.Linear(6, 6)
        self.pair = nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, 2)
        self.idle = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.again(torch.tanh(self.again(self.trunk(x))))
        sequence, last = self.pair(h.unsqueeze(1))
        return self.head(sequence.squeeze(1) + last.mean(0))


def model(**options: Any) -> Any:
    return TensorDictModule(Policy(**options).double(), ["x"], ["y"])


def inputs(*batch: int) -> TensorDict:
    return TensorDict({"x": torch.randn(*batch, 3, dtype=torch.float64)}, batch)


def by_hand(policy: Any, path: str, x: Tensor, number: Callable[[Tensor], Tensor]) -> Any:
    """The outputs of a submodule, call by call, and the gradient of ``number`` there."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        values = output if isinstance(output, tuple) else (output,)
        fresh = tuple(value * 1 for value in values)  # a successor in place takes the copy
        kept.extend(values)
        return fresh if isinstance(output, tuple) else fresh[0]

    handle = policy.get_submodule(path).register_forward_hook(keep)
    try:
        out = number(policy.module(x.clone().requires_grad_()))
        return [v.detach() for v in kept], torch.autograd.grad(out.sum(), kept)
    finally:
        handle.remove()


PATHS = ["module.trunk.0", "module.trunk.1", "module.trunk.2", "module.head", "module.trunk"]


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in-place successor"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", GRADIENTS)
def test_attributions_at_a_submodule_are_those_by_hand(method, path, inplace, drive):
    make, combine = GRADIENTS[method]
    policy, td = model(inplace=inplace), inputs(5)
    before = snapshot(policy)
    with make(("y", 1), at=path, activations=path).prepare(policy) as hooked:
        (hooked if drive else hooked.observe)(td)
    assert_same(before, snapshot(policy))
    (value,), (gradient,) = by_hand(policy, path, td["x"], lambda y: y[:, 1])
    torch.testing.assert_close(td["attr_at", path], combine(value, gradient))
    assert bits(td["activations", path]) == bits(value)


@pytest.mark.parametrize("batch", [(5,), (1,)], ids=str)
def test_a_module_that_is_called_twice_has_an_attribution_for_each_call(batch):
    policy, td = model(), inputs(*batch)
    with InputXGradient(("y", 0), at="module.again").prepare(policy) as hooked:
        hooked(td)
    values, gradients = by_hand(policy, "module.again", td["x"], lambda y: y[:, 0])
    assert len(values) == 2
    for i in range(2):
        torch.testing.assert_close(td["attr_at", "module.again", str(i)], values[i] * gradients[i])


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split = Split()

    def forward(self, x: Tensor) -> Tensor:
        parts = self.split(x)
        return parts["rest"][1] * parts["first"] + parts["rest"][0]


class Split(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"first": x[..., :1].exp(), "rest": (x[..., 1:2].sin(), x[..., 2:] ** 2), "n": 3}


def test_every_tensor_of_an_output_is_attributed():
    td = inputs(5)
    method = Saliency("y", abs=False, at="split", activations="split")
    with method.prepare(Tuples(), ["x"], ["y"]) as hooked:
        hooked(td)
    first, sine, square = td["x"][:, :1].exp(), td["x"][:, 1:2].sin(), td["x"][:, 2:] ** 2
    expected = [square, torch.ones(5, 1), first]
    for i, (value, gradient) in enumerate(zip((first, sine, square), expected, strict=True)):
        torch.testing.assert_close(td["activations", "split", str(i)], value)
        torch.testing.assert_close(td["attr_at", "split", str(i)], gradient.double())


def test_paths_globs_and_types_choose_submodules():
    policy, td = model(), inputs(5)
    for asked, expected in [
        ("module.trunk.*", {"module.trunk.0", "module.trunk.1", "module.trunk.2"}),
        (nn.ReLU, {"module.trunk.1"}),
        (["module.head", nn.ReLU], {"module.trunk.1", "module.head"}),
        ("module.trunk.[02]", {"module.trunk.0", "module.trunk.2"}),
    ]:
        with Saliency(("y", 0), at=asked).prepare(policy) as hooked:
            hooked(td)
        assert set(td["attr_at"].keys()) == expected
        del td["attr_at"]


def test_a_submodule_that_is_never_called_is_an_error_and_one_of_a_glob_is_not():
    policy, td = model(), inputs(5)
    for option in ("at", "activations"):
        method = Saliency(("y", 0), **{option: "module.idle"})
        for drive in (True, False):
            with method.prepare(policy) as hooked, pytest.raises(PathError, match=r"module\.idle"):
                (hooked if drive else hooked.observe)(td)
        with Saliency(("y", 0), **{option: "module.*d*"}).prepare(policy) as hooked:
            hooked(td)


def test_named_targets_lie_between_the_root_and_the_path():
    policy, td = model(), inputs(5)
    targets = {"first": ("y", 0), "each": Each("y")}
    with Saliency(targets, abs=False, at="module.trunk.2").prepare(policy) as hooked:
        hooked(td)
    gradients = [
        by_hand(policy, "module.trunk.2", td["x"], lambda y, i=i: y[:, i])[1][0] for i in range(2)
    ]
    torch.testing.assert_close(td["attr_at", "first", "module.trunk.2"], gradients[0])
    torch.testing.assert_close(td["attr_at", "each", "module.trunk.2"], torch.stack(gradients, 1))


def test_what_a_model_embeds_its_integers_to_can_be_attributed():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    td = TensorDict({"mission": torch.randint(5, (4,))}, [4])
    with Saliency(("y", 1), abs=False, at="0").prepare(net, ["mission"], ["y"]) as hooked:
        hooked(td)
    torch.testing.assert_close(td["attr_at", "0"], net[1].weight[1].detach().expand(4, 3))
    assert "attr" not in td.keys(True)


def test_paths_go_through_sequences_of_td_modules():
    policy = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4), ["x"], [("hidden", "h")]),
        TensorDictModule(nn.Sequential(nn.Tanh(), nn.Linear(4, 2)), [("hidden", "h")], ["y"]),
    )
    td = TensorDict({"x": torch.randn(2, 5, 3)}, [2, 5])
    method = Saliency(("y", 0), abs=False, at="module.0.module", activations="module.1.module.0")
    with method.prepare(policy) as hooked:
        hooked(td)
    hidden = policy[0].module(td["x"]).detach().requires_grad_()
    expected = torch.autograd.grad(policy[1].module(hidden)[..., 0].sum(), hidden)[0]
    torch.testing.assert_close(td["attr_at", "module.0.module"], expected)
    assert bits(td["activations", "module.1.module.0"]) == bits(hidden.tanh())


# --- relevance ------------------------------------------------------------------------------------


def epsilon_by_hand(net: nn.Sequential, x: Tensor, index: int, epsilon: float) -> list[Tensor]:
    """Relevance at the input and at every layer's output, neuron by neuron."""
    values = [x]
    for layer in net:
        values.append(layer(values[-1]))
    relevance = torch.zeros_like(values[-1])
    relevance[:, index] = values[-1][:, index]
    found = [relevance]
    for layer, before, after in reversed(list(zip(net, values, values[1:], strict=False))):
        if isinstance(layer, nn.Linear):
            size = after + epsilon * torch.where(after < 0, -1.0, 1.0)
            below = torch.zeros_like(before)
            for b in range(len(x)):
                for i in range(layer.in_features):
                    for j in range(layer.out_features):
                        share = before[b, i] * layer.weight[j, i] / size[b, j]
                        below[b, i] += share * found[0][b, j]
        else:
            below = found[0]
        found.insert(0, below.detach())
    return found


def chain(bias: bool) -> nn.Sequential:
    layers = [
        nn.Linear(3, 5, bias),
        nn.ReLU(),
        nn.Linear(5, 4, bias),
        nn.ReLU(),
        nn.Linear(4, 2, bias),
    ]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("epsilon", [1e-6, 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_relevance_at_every_layer_is_that_by_hand(bias, epsilon):
    net, td = chain(bias), inputs(4)
    rules = EpsilonPlus(epsilon=epsilon)
    with LRP(rules, ("y", 1), at="?").prepare(net, ["x"], ["y"]) as hooked:
        hooked(td)
    expected = epsilon_by_hand(net, td["x"], 1, epsilon)
    torch.testing.assert_close(td["attr", "x"], expected[0], rtol=1e-9, atol=1e-12)
    for i in range(5):
        torch.testing.assert_close(td["attr_at", str(i)], expected[i + 1], rtol=1e-9, atol=1e-12)


def test_relevance_is_conserved_from_layer_to_layer_where_there_is_no_bias():
    net, td = chain(bias=False), inputs(50)
    with LRP(EpsilonPlus(epsilon=1e-12), ("y", 0), at="?").prepare(net, ["x"], ["y"]) as hooked:
        hooked(td)
    score = td["y"][:, 0]
    for value in (td["attr", "x"], *td["attr_at"].values()):
        torch.testing.assert_close(value.sum(-1), score, rtol=1e-8, atol=1e-10)


def test_the_rule_of_a_submodule_acts_behind_its_output_not_on_it():
    net, td = chain(bias=True), inputs(4)
    rule = EpsilonRule(0.5)
    with LRP(lambda n, m: rule if n == "4" else None, ("y", 0), at=["4", "3"]).prepare(
        net, ["x"], ["y"]
    ) as hooked:
        hooked(td)
    y = td["y"][:, 0]
    torch.testing.assert_close(td["attr_at", "4"][:, 0], y)  # what arrives at the top is all there
    hidden = net[:4](td["x"]).detach()
    expected = hidden * net[4].weight[0] * (y / (y + 0.5 * y.sign()))[:, None]
    torch.testing.assert_close(td["attr_at", "3"], expected.detach())


def test_a_rule_before_an_in_place_successor_sees_what_the_layer_gave():
    plain, inplace = chain(bias=True), chain(bias=True)
    inplace.load_state_dict(plain.state_dict())
    inplace[1].inplace = inplace[3].inplace = True
    td = inputs(6)
    found = []
    for net in (plain, inplace):
        rules = EpsilonPlus(rule_mapper=lambda n, m: PassRule() if isinstance(m, nn.ReLU) else None)
        with LRP(rules, ("y", 0), at="?", activations="?").prepare(net, ["x"], ["y"]) as hooked:
            found.append(hooked(td.clone()))
    for key in found[0].keys(True, True):
        torch.testing.assert_close(found[0].get(key), found[1].get(key), rtol=1e-12, atol=0)


def test_a_module_under_two_names_has_the_rule_of_the_first_one_that_has_one():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    net.add_module("again", net[0])
    td, rules = inputs(4), {"0": EpsilonRule(0.5), "again": EpsilonRule(5.0)}

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net[2](self.net[1](self.net[0](x)))

    def explained(names: list[str]) -> Tensor:
        mapper = {f"net.{name}": rules[name] for name in names}.get
        method = LRP(lambda path, module: mapper(path), ("y", 0))
        context = method.prepare(Twice(), ["x"], ["y"])
        assert [line.path for line in context.plan.lines] == [f"net.{names[0]}"]
        with context as hooked:
            return hooked(td.clone())["attr", "x"]

    assert torch.equal(explained(["0", "again"]), explained(["0"]))
    assert not torch.allclose(explained(["again"]), explained(["0"]))


# --- places where modules hide --------------------------------------------------------------------


class Keeps(nn.Module):
    """Runs a network that is kept in a plain attribute, and so is no registered child."""

    def __init__(self, kept: Any, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.kept, self.run = kept, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.kept, x)


HIDDEN: dict[str, Callable[[nn.Module], Any]] = {
    "a list": lambda net: Keeps([net], lambda kept, x: kept[0](x)),
    "a tuple": lambda net: Keeps((net, 1), lambda kept, x: kept[0](x)),
    "a dict": lambda net: Keeps({"net": net}, lambda kept, x: kept["net"](x)),
    "a partial function": lambda net: partial(lambda net, x: net(x), net),
    "a closure": lambda net: lambda x: net(x),
    "a bound method": lambda net: net.forward,
}


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("place", HIDDEN)
def test_a_module_that_is_kept_where_torch_does_not_look_has_rules_and_is_left_alone(place, drive):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    net(torch.randn(20, 3, dtype=torch.float64))
    net.train(not drive)
    td, before = inputs(5), snapshot(net)
    found = []
    for run in (net, HIDDEN[place](net)):
        model = TensorDictModule(run, ["x"], ["y"])
        with LRP(EpsilonPlus(), ("y", 0)).prepare(model) as hooked:
            found.append((hooked if drive else hooked.observe)(td.clone())["attr", "x"])
        assert_same(before, snapshot(net))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


# --- stacked agents -------------------------------------------------------------------------------


class Agents(nn.Module):
    """One network per agent, run by vmap over stacked parameters; the network is not registered."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.nets = [
            nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double() for _ in range(n)
        ]
        stacked, _ = torch.func.stack_module_state(self.nets)
        self.stacked = nn.ParameterDict({k.replace(".", "_"): v for k, v in stacked.items()})
        self.__dict__["net"] = self.nets[0]

    def forward(self, x: Tensor) -> Tensor:
        params = {k.replace("_", "."): v for k, v in self.stacked.items()}

        def one(own: dict[str, Tensor], seen: Tensor) -> Tensor:
            return torch.func.functional_call(self.net, own, (seen,))

        return torch.func.vmap(one, in_dims=(0, -2), out_dims=-2)(params, x)


@pytest.mark.parametrize("path", ["module.net.0", "module.net.1", "module.net.2", "module.net"])
def test_inner_modules_of_vmapped_agents_are_attributed_agent_by_agent(path):
    agents = Agents()
    policy = TensorDictModule(agents, ["x"], ["y"])
    td = TensorDict({"x": torch.randn(5, 4, 3, dtype=torch.float64)}, [5])
    before = snapshot(policy)
    method = LRP(EpsilonPlus(epsilon=1e-3), ("y", 1, 0), at=path, activations=path)
    with method.prepare(policy) as hooked:
        hooked(td)
    assert_same(before, snapshot(policy))
    inner = path.removeprefix("module.net").removeprefix(".") or "2"
    row = {"x": td["x"][:, 1]}
    with LRP(EpsilonPlus(epsilon=1e-3), ("y", 0), at=inner, activations=inner).prepare(
        agents.nets[1], ["x"], ["y"]
    ) as hooked:
        alone = hooked(TensorDict(row, [5]))
    for root in ("attr_at", "activations"):
        torch.testing.assert_close(td[root, path][:, 1], alone[root, inner])
    torch.testing.assert_close(td["attr", "x"][:, 1], alone["attr", "x"])
    assert not td["attr_at", path][:, [0, 2, 3]].any()


def test_activations_go_with_methods_along_a_path_too():
    policy, td = model(), inputs(5)
    method = IntegratedGradients(("y", 0), activations="module.trunk.1", gap_tolerance=None)
    with method.prepare(policy) as hooked:
        hooked(td)
    assert bits(td["activations", "module.trunk.1"]) == bits(policy.module.trunk[:2](td["x"]))
