"""Where relevance starts: every target and every start on TorchRL's policies and critics, by autograd.

With ε next to nothing, LRP-ε through linear layers and ReLUs is input × gradient (Shrikumar et al. 2016,
section 3.2; Ancona et al. 2018, proposition 1). So relevance that starts with r at a score s of the
outputs is r/s · x · ∂s/∂x, which plain autograd of the plain network tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_like import LRP, RuleError
from tdhook_like.attribution.lrp import EpsilonRule
from tdhook_like.targets import Contrast, Each, Greedy, LogProb, Output, Taken

pytest.importorskip("torchrl")

from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
from torchrl.data import OneHot
from torchrl.modules import (
    ActorValueOperator,
    OneHotCategorical,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)

F64 = torch.float64
B, OBS, ACTIONS = 4, 6, 3
EPSILON = 1e-14


def mapper(path: str, module: nn.Module) -> EpsilonRule | None:
    """Epsilon on dense layers, next to no ε; everything else keeps its gradient."""
    return EpsilonRule(EPSILON) if isinstance(module, nn.Linear) else None


def mlp(outputs: int, inputs: int = OBS) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs)).double()


def discrete(one_hot: bool = True) -> tuple[Any, Callable[[Tensor], dict[str, Tensor]]]:
    """A policy of logits, and what it writes by hand."""
    net = mlp(ACTIONS)
    kind = OneHotCategorical if one_hot else torch.distributions.Categorical
    module: Any = TensorDictModule(net, ["observation"], ["logits"])
    policy = ProbabilisticActor(
        module,
        in_keys=["logits"],
        out_keys=["action"],
        distribution_class=kind,
        return_log_prob=True,
    )
    return policy, lambda x: {"logits": net(x)}


def continuous() -> tuple[Any, Callable[[Tensor], dict[str, Tensor]]]:
    """A squashed Gaussian policy, whose scale does not depend on the observation."""
    net = nn.Sequential(*mlp(ACTIONS), AddStateIndependentNormalScale(ACTIONS).double())
    module: Any = TensorDictModule(net, ["observation"], ["loc", "scale"])
    policy = ProbabilisticActor(
        module,
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    return policy, lambda x: dict(zip(("loc", "scale"), net(x), strict=True))


def q_values() -> tuple[Any, Callable[[Tensor], dict[str, Tensor]]]:
    net = mlp(ACTIONS)
    actor = QValueActor(net, in_keys=["observation"], spec=OneHot(ACTIONS))
    return actor, lambda x: {"action_value": net(x)}


def both() -> tuple[Any, Callable[[Tensor], dict[str, Tensor]]]:
    """A policy and a critic on a shared trunk."""
    trunk, head, value = nn.Linear(OBS, 8).double(), mlp(ACTIONS, 8), mlp(1, 8)
    module: Any = TensorDictModule(nn.Sequential(trunk, nn.ReLU()), ["observation"], ["hidden"])
    of_logits: Any = TensorDictModule(head, ["hidden"], ["logits"])
    policy = ProbabilisticActor(
        of_logits,
        in_keys=["logits"],
        out_keys=["action"],
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )
    model = ActorValueOperator(module, policy, ValueOperator(value, in_keys=["hidden"]))

    def plain(x: Tensor) -> dict[str, Tensor]:
        hidden = trunk(x).relu()
        return {"logits": head(hidden), "state_value": value(hidden)}

    return model, plain


Score = Callable[[dict[str, Tensor], TensorDictBase], Tensor]
"""From what the plain network gives, and the TensorDict with the action, to a number per element."""


def taken(values: Tensor, td: TensorDictBase) -> Tensor:
    action = td["action"]
    if action.ndim == 1:
        return torch.stack([values[b, int(a)] for b, a in enumerate(action)])
    return (values * action).sum(-1)


def rest(values: Tensor, td: TensorDictBase) -> Tensor:
    return (values.sum(-1) - taken(values, td)) / (values.shape[-1] - 1)


def squashed(out: dict[str, Tensor], td: TensorDictBase) -> Tensor:
    """Log-density of tanh(u) for u ~ N(loc, scale): the density of u over the slope of tanh."""
    action = td["action"].detach()
    u = torch.atanh(action)
    normal = torch.distributions.Normal(out["loc"], out["scale"])
    return (normal.log_prob(u) - torch.log1p(-action.square())).sum(-1)


CASES: dict[str, tuple[Callable[[], Any], Any, Score]] = {
    "the taken action's logit": (
        discrete,
        Taken("logits"),
        lambda out, td: taken(out["logits"], td),
    ),
    "the taken action's logit, by index": (
        lambda: discrete(one_hot=False),
        Taken("logits"),
        lambda out, td: taken(out["logits"], td),
    ),
    "one action's logit": (discrete, ("logits", 1), lambda out, td: out["logits"][:, 1]),
    "two actions": (
        discrete,
        Contrast(Output("logits", 2), Output("logits", 0)),
        lambda out, td: out["logits"][:, 2] - out["logits"][:, 0],
    ),
    "the taken action against another": (
        discrete,
        Taken("logits") - ("logits", 0),
        lambda out, td: taken(out["logits"], td) - out["logits"][:, 0],
    ),
    "the taken action against the rest": (
        discrete,
        Taken("logits").against_rest(),
        lambda out, td: taken(out["logits"], td) - rest(out["logits"], td),
    ),
    "one action against the rest": (
        discrete,
        Output("logits", 0).against_rest(),
        lambda out, td: out["logits"][:, 0] - out["logits"][:, 1:].mean(-1),
    ),
    "log-probability": (
        discrete,
        LogProb(),
        lambda out, td: taken(out["logits"].log_softmax(-1), td),
    ),
    "log-density": (continuous, LogProb(), squashed),
    "a mean": (continuous, ("loc", 1), lambda out, td: out["loc"][:, 1]),
    "greedy Q": (q_values, Greedy("action_value"), lambda out, td: out["action_value"].amax(-1)),
    "greedy Q against the rest": (
        q_values,
        Greedy("action_value").against_rest(),
        lambda out, td: (
            out["action_value"].amax(-1)
            - ((out["action_value"].sum(-1) - out["action_value"].amax(-1)) / (ACTIONS - 1))
        ),
    ),
    "the chosen action's value": (
        q_values,
        "chosen_action_value",
        lambda out, td: out["action_value"].amax(-1),
    ),
    "value": (both, "state_value", lambda out, td: out["state_value"][:, 0]),
    "the taken action beside a value": (
        both,
        Taken("logits"),
        lambda out, td: taken(out["logits"], td),
    ),
    "a function of several outputs": (
        both,
        lambda td: td["state_value"].squeeze(-1) + td["logits"].amax(-1),
        lambda out, td: out["state_value"][:, 0] + out["logits"].amax(-1),
    ),
}
every_case = pytest.mark.parametrize("name", CASES)
STARTS: dict[str, Any] = {
    "value": "value",
    "one": "one",
    "a number for all": torch.tensor(-2.5, dtype=F64),
    "one per element": torch.linspace(-1.0, 2.0, B, dtype=F64),
    "one per element and target": torch.linspace(0.5, 3.0, B, dtype=F64).unsqueeze(-1),
}
every_start = pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)


def wanted(
    plain: Callable[[Tensor], dict[str, Tensor]], score: Score, td: TensorDictBase, start: Any
) -> Tensor:
    """Relevance by plain autograd."""
    x = td["observation"].clone().requires_grad_()
    s = score(plain(x), td)
    (gradient,) = torch.autograd.grad(s.sum(), x)
    r = s.detach()
    if isinstance(start, Tensor):
        r = start.expand(B) if start.ndim < 2 else start[:, 0]
    elif start == "one":
        r = torch.ones_like(r)
    # An action against itself is nothing, wherever it starts.
    return (x.detach() * gradient * (r / s.detach()).unsqueeze(-1)).nan_to_num()


def same(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-9)


def observations() -> TensorDict:
    return TensorDict({"observation": torch.randn(B, OBS, dtype=F64)}, [B])


@every_start
@every_case
def test_a_start_at_a_target_gives_what_autograd_of_the_plain_network_says(name: str, start: Any):
    build, target, score = CASES[name]
    model, plain = build()
    with LRP(mapper, target, start=start, unhandled="ignore").prepare(model) as hooked:
        td = hooked(observations())
    same(td["attr", "observation"], wanted(plain, score, td, start))


@every_case
def test_observing_explains_what_is_recorded(name: str):
    build, target, score = CASES[name]
    model, plain = build()
    td = model(observations()).detach()
    with LRP(mapper, target, start="one", unhandled="ignore").prepare(model) as hooked:
        hooked.observe(td)
    same(td["attr", "observation"], wanted(plain, score, td, "one"))


@pytest.mark.parametrize("drive", [True, False])
def test_several_starts_at_several_targets_take_one_forward_and_are_what_they_are_apart(
    drive: bool,
):
    model, plain = both()
    of: dict[str, Any] = {
        "taken": (Taken("logits"), lambda out, td: taken(out["logits"], td), "one"),
        "why not": (
            Taken("logits").against_rest(),
            lambda out, td: taken(out["logits"], td) - rest(out["logits"], td),
            torch.linspace(1.0, 2.0, B, dtype=F64),
        ),
        "value": ("state_value", lambda out, td: out["state_value"][:, 0], "value"),
        "log": (LogProb(), lambda out, td: taken(out["logits"].log_softmax(-1), td), None),
    }
    targets = {name: target for name, (target, _, _) in of.items()}
    starts = {name: start for name, (_, _, start) in of.items() if start is not None}
    calls: list[int] = []
    trunk = next(module for module in model.modules() if isinstance(module, nn.Linear))
    with LRP(mapper, targets, start=starts, unhandled="ignore").prepare(model) as hooked:
        td = model(observations()).detach()
        run = hooked if drive else hooked.observe
        run(td.clone())  # whether one run serves for both is tried out at the first call
        counted = trunk.register_forward_hook(lambda *_: calls.append(1))
        run(td)
        counted.remove()
    assert len(calls) == 1
    for name, (_, score, start) in of.items():
        start = "value" if start is None else start
        same(td["attr", name, "observation"], wanted(plain, score, td, start))


def test_every_action_may_have_a_start_of_its_own():
    model, plain = q_values()
    start = torch.randn(B, ACTIONS, dtype=F64)
    with LRP(mapper, Each("action_value"), start=start).prepare(model) as hooked:
        td = hooked(observations())
    assert td["attr", "observation"].shape == (B, ACTIONS, OBS)
    for a in range(ACTIONS):
        score = lambda out, td, a=a: out["action_value"][:, a]  # noqa: E731
        same(td["attr", "observation"][:, a], wanted(plain, score, td, start[:, a]))


def test_a_start_by_name_may_be_one_per_number_of_its_target():
    model, plain = both()
    start = torch.randn(B, ACTIONS, dtype=F64)
    method = LRP(mapper, {"each": Each("logits"), "value": "state_value"}, start={"each": start})
    with method.prepare(model) as hooked:
        td = hooked(observations())
    for a in range(ACTIONS):
        score = lambda out, td, a=a: out["logits"][:, a]  # noqa: E731
        same(td["attr", "each", "observation"][:, a], wanted(plain, score, td, start[:, a]))
    value = lambda out, td: out["state_value"][:, 0]  # noqa: E731
    same(td["attr", "value", "observation"], wanted(plain, value, td, "value"))


def test_a_start_of_nothing_gives_nothing_and_a_negative_one_turns_all_signs():
    model, _ = q_values()
    x, found = observations(), {}
    for start in (0.0, 1.0, -1.0):
        method = LRP(mapper, ("action_value", 0), start=torch.tensor(start, dtype=F64))
        with method.prepare(model) as hooked:
            found[start] = hooked(x.clone())["attr", "observation"]
    assert not found[0.0].any() and found[1.0].any()
    assert torch.equal(found[1.0], -found[-1.0])


def test_a_start_at_a_score_of_zero_is_shared_by_what_makes_it_up():
    # y = a·x₀ − a·x₁ at x₀ = x₁: nothing is left of the value, and one is shared out all the same
    # by the parts of what the stabiliser leaves: ±a·x over st(0) = ε.
    net = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, -3.0]]))
    found = []
    for start in ("one", "value"):
        method = LRP(lambda path, module: EpsilonRule(0.5), "y", start=start)
        with method.prepare(net, ["x"], ["y"]) as hooked:
            found.append(hooked(TensorDict({"x": torch.ones(1, 2, dtype=F64)}, [1]))["attr", "x"])
    same(found[0], torch.tensor([[6.0, -6.0]], dtype=F64))
    assert found[1].abs().max() < 1e-15


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("two", "start must be 'value', 'one' or a tensor"),
        (3.0, "start must be 'value', 'one' or a tensor"),
        (torch.tensor(float("nan")), "NaN or Inf"),
        ({"other": "one"}, "start names 'other', but the targets are not named"),
    ],
)
def test_what_is_no_start_is_refused(start: Any, words: str):
    with pytest.raises(RuleError, match=words):
        LRP(mapper, "state_value", start=start)


def test_a_start_of_a_wrong_shape_is_refused_with_both_shapes():
    model, _ = q_values()
    method = LRP(mapper, ("action_value", 0), start=torch.ones(B + 1, dtype=F64))
    with method.prepare(model) as hooked, pytest.raises(RuleError, match=r"\(5,\).*\(4, 1\)"):
        hooked(observations())
