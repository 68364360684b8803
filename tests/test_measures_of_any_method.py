"""Measures ask a method as it asks to be asked: once, at the inputs; and score without its rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_interaction_type,
)
from torch import Tensor, nn
from torch.distributions import Categorical

from method_references import DOUBLE, Joined
from pristine import assert_same, snapshot
from tdhook_like import (
    LRP,
    ContextError,
    DeepLift,
    Each,
    EpsilonPlus,
    GradCAM,
    GuidedGradCAM,
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
    Taken,
    TdhookLikeError,
    Unit,
)
from tdhook_like.attribution.lrp import EpsilonRule, FunctionRule, FunctionRules, GammaRule
from tdhook_like.attribution.method import Attribution, GradientMethod
from tdhook_like.metrics import (
    Completeness,
    Deletion,
    Given,
    Infidelity,
    Insertion,
    MaxSensitivity,
)
from tdhook_like.score import Evaluation

MEASURES = [Infidelity, Completeness, Deletion, Insertion]
every_measure = pytest.mark.parametrize("kind", MEASURES)


def images() -> tuple[nn.Module, TensorDict]:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    )
    return net.double(), TensorDict({"x": torch.randn(3, 2, 4, 4, dtype=DOUBLE)}, [3])


def asked(method: Any, net: Any, td: TensorDict, *, drive: bool = False) -> Any:
    plain = () if isinstance(net, TensorDictModule) else (["x"], ["y"])
    with method.prepare(net, *plain) as hooked:
        return (hooked if drive else hooked.observe)(td.copy())


# --- methods of one run -----------------------------------------------------------------------------

AT_A_LAYER = {
    "GradCAM": GradCAM(("y", 1), at=("2",)),
    "GradCAM of every output": GradCAM(Each("y"), at=("0",), relu=False),
    "GuidedGradCAM": GuidedGradCAM(("y", 1), at=("2",)),
    "DeepLift": DeepLift(("y", 1), at=("0", "2"), gap_tolerance=None),
}


@every_measure
@pytest.mark.parametrize("drive", [False, True])
@pytest.mark.parametrize("name", AT_A_LAYER)
def test_maps_of_a_layer_are_measured_and_written_as_by_the_method(name, drive, kind):
    method, (net, td) = AT_A_LAYER[name], images()
    before = snapshot(net)
    own, found = asked(method, net, td), asked(kind(method), net, td, drive=drive)
    assert_same(before, snapshot(net))
    torch.testing.assert_close(found["attr", "x"], own["attr", "x"], rtol=0, atol=1e-12)
    for path in ("0", "2"):
        if path in own["attr_at"].keys():  # noqa: SIM118 (a TensorDict is not a dict)
            torch.testing.assert_close(found["attr_at", path], own["attr_at", path])
    td["theirs"] = own["attr"]
    given = asked(kind(Given("theirs", method.target)), net, td)
    place = kind(method).gap_root
    torch.testing.assert_close(found[place], given[place], rtol=0, atol=1e-12)
    assert ("y" in found.keys()) is drive  # noqa: SIM118


def test_the_curve_of_a_map_is_that_of_its_order():
    net, td = images()
    method = GradCAM(("y", 0), at=("2",))
    curve = asked(Deletion(method, n_steps=100), net, td)["deletion"]
    relevance = asked(method, net, td)["attr", "x"].flatten(1)
    order = relevance.argsort(dim=-1, descending=True, stable=True)
    for row, (x, places) in enumerate(zip(td["x"], order, strict=True)):
        point, expected = x.flatten().clone(), []
        for place in (None, *places.tolist()):
            if place is not None:
                point[place] = 0.0
            expected.append(net(point.reshape(1, 2, 4, 4))[0, 0].item())
        torch.testing.assert_close(curve[row], torch.tensor(expected, dtype=DOUBLE))


@dataclass(frozen=True)
class LooksAtTheRun(GradientMethod):
    """A user's method that reads more of the run than inputs and gradients."""

    def combine(self, value: Tensor, gradient: Tensor) -> Tensor:
        raise AssertionError("not what this method does")

    def attribute(self, evaluation: Evaluation) -> Attribution:
        columns = evaluation.parts[0].unbind(-1)
        return Attribution(
            [[x * c.detach().unsqueeze(-1) for c in columns] for x in evaluation.leaves]
        )


@every_measure
def test_a_method_with_an_attribute_of_its_own_is_asked_for_that(kind):
    net, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=DOUBLE)
    found = asked(kind(LooksAtTheRun(("y", 1))), net, TensorDict({"x": x}, [4]))
    torch.testing.assert_close(found["attr", "x"], x * net(x)[:, 1:].detach())


def test_asked_at_other_inputs_such_methods_are_refused():
    for make in (MaxSensitivity, NoiseTunnel):
        for method in (GradCAM("y", at=("0",)), GuidedGradCAM("y", at=("0",)), LooksAtTheRun("y")):
            with pytest.raises(ContextError, match=type(method).__name__):
                make(method)
    nested = NoiseTunnel(Deletion(LooksAtTheRun("y")), n_samples=2)
    with pytest.raises(ContextError, match="one run"):
        asked(nested, nn.Linear(3, 1), TensorDict({"x": torch.ones(4, 3)}, [4]))


@every_measure
def test_maps_that_are_written_at_the_layer_alone_are_refused(kind):
    with pytest.raises(ContextError, match="of keys"):
        kind(GradCAM("y", at=("0",), interpolate=None))


@every_measure
def test_submodules_of_methods_that_do_not_need_them_are_refused_as_before(kind):
    with pytest.raises(ContextError, match="in_keys"):
        kind(InputXGradient("y", at=("0",)))


def test_a_drawn_action_is_the_one_that_is_measured():
    net = nn.Sequential(
        nn.Unflatten(-1, (1, 9)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(16, 4)
    )
    parts: Any = (
        TensorDictModule(net.double(), ["x"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical),
    )
    actor = ProbabilisticTensorDictSequential(*parts)
    td = TensorDict({"x": torch.randn(64, 9, dtype=DOUBLE)}, [64])
    method = GradCAM(Taken("logits"), at=("module.0.module.1",), interpolate="nearest")
    with set_interaction_type(InteractionType.RANDOM), Deletion(method).prepare(actor) as hooked:
        found = hooked(td.copy())
    taken = found["logits"].gather(-1, found["action"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found["deletion"][:, 0], taken)
    again = asked(method, actor, found.select("x", "action", "logits"))
    torch.testing.assert_close(found["attr", "x"], again["attr", "x"])


# --- scores without rules ---------------------------------------------------------------------------


class Counted(EpsilonRule):
    """Counts how often its surrogate is asked for, with gradients or without."""

    fresh, feeds_zeros = True, False
    calls = 0

    def surrogate(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        type(self).calls += 1
        return super().surrogate(module, inputs, output)


class CountedFunction(FunctionRule):
    calls = 0

    def surrogate(self, flow: Any, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        type(self).calls += 1
        return output / 2


@every_measure
def test_rules_run_where_the_method_is_asked_and_nowhere_else(kind):
    net, x = Joined([6], 1).double(), torch.randn(4, 6, dtype=DOUBLE)
    rule, function = Counted(), CountedFunction()
    mapper = lambda name, module: rule if isinstance(module, nn.Linear) else None  # noqa: E731
    method = LRP(mapper, "y", functions=FunctionRules(rules={"tanh": function}))
    counts = []
    for one in (method, kind(method, internal_batch_size=4)):
        Counted.calls = CountedFunction.calls = 0
        asked(one, net, TensorDict({"x": x}, [4]))
        counts.append((Counted.calls, CountedFunction.calls))
    alone, measured = counts
    assert alone == (2, 1)
    # Beside the one run of the method, targets are bound in one of their own.
    assert all(n <= 2 * m for n, m in zip(measured, alone, strict=True))


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("target", [("y", 1), Each("y"), Unit("first", 2)], ids=repr)
@pytest.mark.parametrize("kind", [Deletion, Insertion])
def test_curves_under_rules_are_those_of_the_plain_model_bit_for_bit(kind, target, dtype):
    net, x = Joined([6], 3).to(dtype), torch.randn(4, 6, dtype=dtype)
    td = TensorDict({"x": x}, [4])
    method = LRP(EpsilonPlus(), target, unreached="ignore")
    found = asked(kind(method), net, td)
    own = asked(method, net, td)
    assert torch.equal(found["attr", "x"], own["attr", "x"])
    td["theirs"] = own["attr"]
    place = kind(method).gap_root
    assert torch.equal(found[place], asked(kind(Given("theirs", target)), net, td)[place])


def test_a_rule_that_is_never_reached_is_an_error_as_for_the_method():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    method = LRP(lambda name, module: EpsilonRule() if name == "unused" else None, "y")
    for one in (method, Deletion(method)):
        with pytest.raises(TdhookLikeError, match="unused"):
            asked(one, Unused(), TensorDict({"x": torch.ones(4, 3)}, [4]))


@every_measure
def test_methods_along_paths_keep_their_rules(kind):
    net, x = Joined([6], 1).double(), torch.randn(4, 6, dtype=DOUBLE)
    td = TensorDict({"x": x}, [4])
    method = IntegratedGradients("y", rules=EpsilonPlus(), gap_tolerance=None, n_steps=5)
    own, found = asked(method, net, td), asked(kind(method), net, td)
    torch.testing.assert_close(found["attr", "x"], own["attr", "x"], rtol=0, atol=1e-12)
    plain = asked(method.replaced(rules=None), net, td)
    assert not torch.allclose(own["attr", "x"], plain["attr", "x"])


def test_sensitivity_is_that_of_relevance_under_rules():
    net, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).double(), torch.ones(4, 3)
    td = TensorDict({"x": x.double()}, [4])
    rules = lambda name, module: GammaRule(1.0) if isinstance(module, nn.Linear) else None  # noqa: E731
    under, plain = (
        asked(MaxSensitivity(one, radius=0.5), net, td)["sensitivity"]
        for one in (LRP(rules, "y"), InputXGradient("y"))
    )
    assert (under > 0).all() and not torch.isclose(under, plain, rtol=1e-3).any()
