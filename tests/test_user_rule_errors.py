"""Rules of a user's own that give what cannot be used, raise, or hand back what is not theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from pristine import assert_same, snapshot
from rule_samples import assert_close, explain, grid, only
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    AlphaBetaRule,
    EpsilonRule,
    Inputs,
    PassRule,
    Rule,
    ZPlusRule,
)
from tdhook_like.errors import RuleError


class Gives(Rule):
    """A rule whose relevance() returns what it was told to."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def relevance(self, module: Any, inputs: Any, output: Any, R_out: Any) -> Any:
        return self.what


class GivesSurrogate(Rule):
    """A rule whose surrogate() returns what it was told to."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def surrogate(self, module: Any, inputs: Any, output: Any) -> Any:
        return self.what


WRONG_RELEVANCE = [
    torch.ones(2, 3),
    torch.ones(4),
    (torch.ones(2, 4), torch.ones(2, 4)),
    (),
    None,
    (None,),
    0.0,
    {"x": torch.ones(2, 4)},
]
WRONG_SURROGATES = [
    torch.ones(2, 4),
    torch.ones(3),
    (torch.ones(2, 3),),
    {"y": torch.ones(2, 3)},
    1.0,
]


@pytest.mark.parametrize("what", WRONG_RELEVANCE, ids=lambda w: type(w).__name__)
def test_relevance_of_other_shapes_than_the_inputs_is_refused(what: Any):
    net = nn.Sequential(nn.Tanh(), nn.Linear(4, 3))
    with pytest.raises(RuleError, match="Gives"):
        explain(net, only(net[1], Gives(what)), [torch.randn(2, 4)], torch.ones(2, 3))


@pytest.mark.parametrize("what", WRONG_SURROGATES, ids=lambda w: type(w).__name__)
def test_a_surrogate_of_another_shape_than_the_output_is_refused_with_the_path(what: Any):
    net = nn.Sequential(nn.Tanh(), nn.Linear(4, 3))
    with pytest.raises(RuleError, match=r"At '1'.*GivesSurrogate"):
        explain(net, only(net[1], GivesSurrogate(what)), [torch.randn(2, 4)], torch.ones(2, 3))


def test_a_rule_with_neither_door_is_refused_with_both_named():
    layer = nn.Linear(4, 3)
    with pytest.raises(RuleError, match=r"surrogate\(.*relevance\("):
        explain(layer, only(layer, Rule()), [torch.randn(2, 4)], torch.ones(2, 3))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("door", ["surrogate", "relevance"])
def test_an_error_in_a_rule_comes_through_and_leaves_nothing_behind(error: Any, door: str):
    def fail(self: Any, *args: Any) -> Any:
        raise error("in the rule")

    rule = type("Fails", (Rule,), {door: fail})()
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    td = TensorDict({"x": torch.randn(5, 4)}, [5])
    before = snapshot(net)
    with LRP(only(net[0], rule), ("y", 0)).prepare(net, ["x"], ["y"]) as hooked:
        with pytest.raises(error, match="in the rule"):
            hooked(td)
        with pytest.raises(error, match="in the rule"):
            hooked.observe(td)
    assert_same(before, snapshot(net))
    assert set(td.keys()) == {"x"}


def test_a_rule_says_itself_where_it_cannot_sit():
    class OnlyDense(EpsilonRule):
        def check(self, module: nn.Module) -> str | None:
            return None if isinstance(module, nn.Linear) else "it is for dense layers."

    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(RuleError, match=r"OnlyDense.*'1' \(ReLU\): it is for dense layers"):
        LRP(only(net[1], OnlyDense()), ("y", 0)).prepare(net, ["x"], ["y"])
    with pytest.raises(RuleError, match="dense"):
        OnlyDense().register(net[1])
    LRP(only(net[0], OnlyDense()), ("y", 0)).prepare(net, ["x"], ["y"])


# --- what is not overwritten ----------------------------------------------------------------------


class ReturnsItsInput(EpsilonRule):
    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        return inputs[0]


class ReturnsAView(PassRule):
    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        return inputs[0].view(output.shape)


class ReturnsTheOutput(AlphaBetaRule):
    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        return output


class KeepsItsResult(ZPlusRule):
    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        return inputs[0].exp()  # exp keeps its result for the backward pass


@pytest.mark.parametrize("kind", [ReturnsItsInput, ReturnsAView, ReturnsTheOutput, KeepsItsResult])
def test_a_subclass_with_a_surrogate_of_its_own_overwrites_nothing(kind: type[Rule]):
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), 2.0).double())

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    net, x = nn.Sequential(nn.Identity(), Square()), grid((2, 3), "x") + 3
    kept, before = x.clone(), snapshot(net)
    R = (2 * x).clone()
    found = explain(net, only(net[1], kind()), [x], R)[0][0]
    assert x.equal(kept)
    assert_same(before, snapshot(net))
    slopes = {ReturnsTheOutput: torch.tensor(2.0), KeepsItsResult: x.exp()}
    assert_close(found, x * slopes.get(kind, torch.tensor(1.0)).double(), 1e-12)
