"""A non-linear function without a rule is never followed in silence, and never reported in vain."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from pristine import assert_same, snapshot, td_snapshot
from tdhook_like import LRP, ContextError, HookContext, RuleError, UnhandledOperationWarning
from tdhook_like.attribution.lrp import EpsilonRule, FunctionRule, FunctionRules
from tdhook_like.targets import Each

F64 = torch.float64
B = 3

Step = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """A layer, a function that is called on what it gives, and a layer."""

    def __init__(self, *steps: Step, out: int = 2) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, out)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for step in self.steps:
            x = step(x)
        return self.last(x)


def angle(x: Tensor) -> Tensor:
    """From each number and its mirror image, the angle between them."""
    return torch.atan2(x, x.flip(-1))


WITHOUT_RULE: dict[str, Step] = {
    "atan2": angle,
    "remainder": lambda x: x.remainder(2 + x.flip(-1).abs()),
    "pow": lambda x: x.abs() ** x.flip(-1),
    "polygamma": lambda x: torch.polygamma(1, x.abs() + 1),
}
"""Functions that have no rule, by the name that they are reported by."""
every_function = pytest.mark.parametrize("name", WITHOUT_RULE)


def prepared(
    net: nn.Module, target: Any = ("y", 0), mapper: Any = None, **options: Any
) -> HookContext:
    return LRP(mapper, target, **options).prepare(net.double(), ["x"], ["y"])


def inputs() -> TensorDict:
    return TensorDict({"x": torch.randn(B, 4, dtype=F64)}, [B])


def reports(context: HookContext, calls: int = 1) -> list[str]:
    """What is said of functions without a rule while a context is called."""
    with warnings.catch_warnings(record=True) as caught, context as hooked:
        warnings.simplefilter("always")
        for _ in range(calls):
            hooked(inputs())
    return [str(w.message) for w in caught if w.category is UnhandledOperationWarning]


# --- what is said ---------------------------------------------------------------------------------


@every_function
def test_a_function_without_a_rule_is_named_in_a_warning(name: str):
    with (
        prepared(Net(WITHOUT_RULE[name])) as hooked,
        pytest.warns(UnhandledOperationWarning, match=rf"\b{name}\(\) is not linear") as caught,
    ):
        hooked(inputs())
    assert caught[0].filename == __file__  # where the caller stands
    assert f"rules={{'{name}'" in str(caught[0].message)  # and what to do


def test_it_is_said_once_in_a_context_and_again_in_the_next():
    context = prepared(Net(angle))
    assert len(reports(context, calls=3)) == 1
    assert reports(context) == []
    assert len(reports(prepared(Net(angle)))) == 1


def test_several_functions_are_named_together():
    (message,) = reports(prepared(Net(*WITHOUT_RULE.values())))
    assert all(f"{name}()" in message for name in WITHOUT_RULE)


def test_a_function_that_is_met_later_is_reported_when_it_is_met():
    class Sometimes(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(angle(x) if bool((x.sum() > 1e3).item()) else x)

    big = TensorDict({"x": torch.full((B, 4), 1e4, dtype=F64)}, [B])
    net = Sometimes()
    nn.init.ones_(net.first.weight)
    with prepared(net) as hooked:
        hooked(inputs())
        with pytest.warns(UnhandledOperationWarning, match="atan2"):
            hooked(big)


@every_function
def test_relevance_follows_its_gradient(name: str):
    net, td = Net(WITHOUT_RULE[name]).double(), inputs()
    with prepared(net, mapper=lambda *_: None, unhandled="ignore") as hooked:
        td = hooked(td)
    leaf = td["x"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(leaf)[:, 0].sum(), leaf)
    torch.testing.assert_close(td["attr", "x"], td["x"] * slope)


def test_without_a_warning_it_is_still_followed_and_told_on_request():
    context = prepared(Net(angle), unhandled="ignore")
    assert reports(context) == []
    assert "no rule      atan2() × 1" in str(context)


def test_another_word_for_what_shall_happen_is_refused():
    with pytest.raises(ContextError, match="'warn', 'raise' or 'ignore', got 'log'"):
        LRP(target="y", unhandled="log")


# --- where nothing is said ------------------------------------------------------------------------


class Branches(nn.Module):
    """Two outputs side by side; one of them is made by a function without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.other = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain(x), self.other(angle(x))


class Joined(Branches):
    """The same, in one tensor."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat(super().forward(x), -1)


def test_a_function_in_a_branch_that_does_not_reach_the_target_is_not_reported():
    for target, said in (("y", 0), ("z", 1)):
        context = LRP(target=target).prepare(Branches().double(), ["x"], ["y", "z"])
        assert len(reports(context)) == said
        assert ("atan2" in str(context)) == bool(said)


def test_neither_is_one_whose_numbers_the_target_leaves_out():
    for index, said in ((0, 0), (1, 1)):
        context = prepared(Joined(), ("y", index))
        assert len(reports(context)) == said
        assert ("atan2" in str(context)) == bool(said)


def test_nor_one_that_reads_nothing_but_what_is_not_explained():
    class Two(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x * angle(scale)

    td = TensorDict({"x": torch.randn(B, 4), "scale": torch.rand(B, 4)}, [B])
    for keys, said in ((["x"], False), (["x", "scale"], True)):
        context = LRP(target=("y", 2), keys=keys, unhandled="ignore").prepare(
            Two(), ["x", "scale"], ["y"]
        )
        with context as hooked:
            hooked(td.copy())
        assert ("atan2" in str(context)) == said


def test_nor_one_of_parameters():
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x)) * angle(self.last.bias)

    assert reports(prepared(Own())) == []


def test_nor_one_inside_of_a_module_that_has_a_rule():
    net = nn.Sequential(Net(angle, out=4), nn.Linear(4, 2)).double()
    mapper = lambda name, module: EpsilonRule() if name in ("0", "1") else None  # noqa: E731
    assert reports(prepared(net, mapper=mapper, unreached="ignore")) == []
    assert len(reports(prepared(net))) == 1


class Halved(FunctionRule):
    def surrogate(self, flow: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return output / 2


def test_nor_one_that_was_given_a_rule_or_its_gradient():
    net = Net(angle)
    found = {}
    for name, rule in (("halved", Halved()), ("gradient", None)):
        context = prepared(net, functions=FunctionRules(rules={"atan2": rule}))
        torch.manual_seed(0)
        with context as hooked:
            found[name] = hooked(inputs())["attr", "x"]
        assert not context.unhandled
    torch.testing.assert_close(2 * found["halved"], found["gradient"])


# --- errors in the place of warnings --------------------------------------------------------------


@pytest.mark.parametrize("way", ["driven", "observed"])
def test_as_an_error_it_leaves_model_inputs_and_random_numbers_as_they_were(way: str):
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, training=self.training))

    net = nn.Sequential(Noisy(angle, out=4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net = net.double().train()
    td = inputs()
    with prepared(net, unhandled="raise") as hooked:
        before, data = snapshot(net), td_snapshot(td)
        with pytest.raises(RuleError, match=r"atan2\(\) is not linear and without a rule"):
            (hooked if way == "driven" else hooked.observe)(td)
        assert_same(before, snapshot(net))
        assert_same(data, td_snapshot(td))


def test_as_an_error_it_is_raised_at_every_call():
    with prepared(Net(angle), unhandled="raise") as hooked:
        for _ in range(2):
            with pytest.raises(RuleError, match="atan2"):
                hooked(inputs())


# --- what is printed ------------------------------------------------------------------------------


def test_a_context_prints_functions_with_and_without_a_rule_once_it_has_run():
    net = Net(torch.tanh, lambda x: x * x.sigmoid(), angle)
    context = prepared(net, unhandled="ignore")
    assert "functions" not in str(context)
    assert "no rule" not in str(context)
    with context as hooked:
        for _ in range(2):
            hooked(inputs())
            assert "functions    mul() × 1, sigmoid() × 1, tanh() × 1" in str(context)
            assert "no rule      atan2() × 1" in str(context)
    assert "first  Linear" in str(context)


def test_a_function_is_counted_once_however_many_targets_its_relevance_is_for():
    net = Net(angle, angle, out=5)
    for target in (Each("y"), {"a": ("y", 0), "b": ("y", 1), "c": ("y", 2)}):
        context = prepared(net, target, unhandled="ignore")
        with context as hooked:
            hooked(inputs())
        assert context.unhandled == {"atan2": 2}
