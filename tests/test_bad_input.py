"""Wrong uses: each gives one error of the library that says what was wrong and what to do.

A record per wrong use. It is tried by driving and by observing, and model, TensorDict and RNG must
be afterwards as they were before.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torch.distributions import Categorical

from pristine import assert_same, snapshot, td_snapshot
from tdhook_like import (
    LRP,
    BaselineError,
    ContextError,
    Contrast,
    Each,
    EpsilonPlus,
    FromBuffer,
    FromKey,
    Greedy,
    InputError,
    InputXGradient,
    IntegratedGradients,
    KeyNotFoundError,
    LayoutError,
    LockedError,
    LogProb,
    ModelError,
    Output,
    PathError,
    RuleError,
    Saliency,
    Taken,
    TargetError,
    TdhookLikeError,
)
from tdhook_like.attribution.lrp import (
    AHQKVRule,
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    FunctionRules,
    GammaRule,
    LayerNormRule,
    ModifiedRule,
    ParamModifier,
    PassRule,
    PseudoIdentityRule,
    Rule,
    UniformRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)

NAN, INF = float("nan"), float("inf")


class Net(nn.Module):
    """Reads a float, a nested float and an integer key; writes three logits and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6))
        self.mission = nn.Embedding(5, 2)
        self.head = nn.Linear(10, 3)
        self.value = nn.Linear(10, 1)
        self.scale, self.idle = nn.Linear(1, 1), nn.Identity()

    def forward(self, observation, speed, mission):
        x = torch.cat([self.encoder(observation), speed, self.mission(mission)], -1)
        return self.head(x), self.value(x) * self.scale(x.new_ones(1))


@dataclass
class World:
    """What a wrong use meets; a record may make one thing of it wrong."""

    model: Any
    td: TensorDict
    observing: bool = False

    def explain(self, method: Any, model: nn.Module | None = None, **keys: Any) -> Any:
        with method.prepare(self.model if model is None else model, **keys) as hooked:
            return (hooked.observe if self.observing else hooked)(self.td)

    def opened(self, method: Any) -> Any:
        return method.prepare(self.model).__enter__()

    def left(self, method: Any) -> Any:
        with method.prepare(self.model) as hooked:
            return hooked

    def twice(self, method: Any) -> None:
        with method.prepare(self.model) as hooked:
            hooked._context.__enter__()


def world() -> World:
    model = TensorDictModule(
        Net(),
        in_keys=["observation", ("agents", "speed"), "mission"],
        out_keys=["logits", "state_value"],
    )
    td = TensorDict(
        {
            "observation": torch.randn(5, 4),
            ("agents", "speed"): torch.randn(5, 2),
            "mission": torch.randint(5, (5,)),
            "action": torch.randint(3, (5,)),
            "wide": torch.zeros(5, 7),
        },
        [5],
    )
    return World(model, td)


def heads() -> Any:
    """A policy with a composite distribution: two heads, hence no obvious target."""
    return ProbabilisticTensorDictSequential(
        made(Line, out_keys=[("params", "steer", "logits")]),
        made(Line, out_keys=[("params", "gas", "logits")]),
        ProbabilisticTensorDictModule(
            in_keys=["params"],
            out_keys=["steer", "gas"],
            distribution_class=CompositeDistribution,
            distribution_kwargs={"distribution_map": {"steer": Categorical, "gas": Categorical}},
        ),
    )


class Quotient(nn.Module):
    def forward(self, x):
        return torch.cat([x / x, x[:, :2]], -1)


class Line(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 1)


def made(module: Callable[[], nn.Module], read: str = "observation", out_keys: Any = ("y",)) -> Any:
    with torch.random.fork_rng():  # the RNG is watched
        return TensorDictModule(module(), in_keys=[read], out_keys=list(out_keys))


class Overwrites(nn.Module):
    def forward(self, x):
        return x.add_(1)


class Fickle(nn.Module):
    """Gives something else each time, and no seed can help it."""

    calls = itertools.count(1)

    def forward(self, x):
        return x * next(self.calls)


class Rows:
    """A buffer with one key; gives ``n`` rows where it must give as many as are asked for."""

    def __init__(self, key: str, n: int | None = None) -> None:
        self.key, self.n = key, n

    def sample(self, n: int) -> TensorDict:
        n = n if self.n is None else self.n
        return TensorDict({self.key: torch.zeros(n, 4)}, [n])


class Narrow(Rule):
    def surrogate(self, module, inputs, output):
        return output[:, :1]


class Shares(Rule):
    def relevance(self, module, inputs, output, R_out):
        return R_out


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        return torch.jit.script(Line())


@dataclass(frozen=True)
class Wrong:
    name: str
    do: Callable[[World], object]
    error: type[TdhookLikeError]
    says: tuple[str, ...]
    given: Callable[[World], object] = field(default=lambda w: None)


def method(made: Callable[[], Any], **keys: Any) -> Callable[[World], object]:
    """The wrong use of making a method and explaining with it."""
    return lambda w: w.explain(made(), **keys)


def target(made: Callable[[], Any]) -> Callable[[World], object]:
    return lambda w: w.explain(Saliency(made()))


def rule(made: Callable[[], Rule], path: str = "module.head") -> Callable[[World], object]:
    """The wrong use of putting a rule on one submodule."""

    def do(w: World) -> object:
        given = made()
        both = {"a": ("logits", 0), "b": VALUE}
        return w.explain(LRP(lambda name, module: given if name == path else None, both))

    return do


def baseline(made: Callable[[], Any], **keys: Any) -> Callable[[World], object]:
    return method(lambda: IntegratedGradients(VALUE, baselines=made(), gap_tolerance=None), **keys)


def plain(**keys: Any) -> Callable[[World], object]:
    """The wrong use of preparing a module that has no keys of its own."""
    return lambda w: w.explain(Saliency("y"), made(Line).module, **keys)


def put(key: Any, value: Callable[[], Any]) -> Callable[[World], object]:
    return lambda w: w.td.set(key, value())


def spoil(value: float) -> Callable[[World], object]:
    return lambda w: w.td["observation"][1, 2].fill_(value)


VALUE = "state_value"
value_of = partial(Saliency, VALUE)

KEYS = [
    Wrong("an unknown key in the method", method(lambda: value_of(keys=["obs"])), KeyNotFoundError,
        ("'obs'", "'observation'", "('agents', 'speed')")),
    Wrong("an unknown key in prepare", method(value_of, in_keys=["obs"]), KeyNotFoundError,
        ("'obs'", "in_keys", "'observation'")),
    Wrong("a nested key without its parent", method(value_of, in_keys=["speed"]), KeyNotFoundError,
        ("'speed'", "('agents', 'speed')")),
    Wrong("keys named twice", method(lambda: value_of(keys="observation"), in_keys=["observation"]),
        KeyNotFoundError, ("twice", "keys", "in_keys")),
    Wrong("no keys at all", method(value_of, in_keys=[]), KeyNotFoundError, ("at least one",)),
    Wrong("a key that is a number", method(lambda: value_of(keys=[3])), KeyNotFoundError,
        ("3 is not a key", "string")),
    Wrong("keys that are a number", method(lambda: value_of(keys=3)), KeyNotFoundError,
        ("3", "key")),
    Wrong("an empty tuple as a key", method(lambda: value_of(keys=[()])), KeyNotFoundError,
        ("() is not a key",)),
    Wrong("in_keys that are a number", method(value_of, in_keys=3), KeyNotFoundError, ("3", "key")),
    Wrong("out_keys for a TensorDictModule", method(value_of, out_keys=["value"]), KeyNotFoundError,
        ("out_keys", "plain modules")),
    Wrong("a plain module without keys", plain(), KeyNotFoundError,
        ("Line", "in_keys=", "out_keys=")),
    Wrong("a plain module without out_keys", plain(in_keys=["x"]), KeyNotFoundError,
        ("Line", "out_keys=")),
    Wrong("a plain module with no in_keys", plain(in_keys=[], out_keys=["y"]), KeyNotFoundError,
        ("at least one in_key",)),
    Wrong("a plain module with a number for a key", plain(in_keys=[1], out_keys=["y"]),
        KeyNotFoundError, ("1 is not a key",)),
    Wrong("a plain module with two keys for one output",
        lambda w: w.explain(Saliency("y"), made(Line, out_keys=["y", "z"])), KeyNotFoundError,
        ("out_keys", "'y'", "'z'", "Line")),
    Wrong("an integer key asked for", method(value_of, in_keys=["mission"]), InputError,
        ("'mission'", "int64", "floating-point", "at=")),
    Wrong("a complex key asked for", method(value_of, in_keys=["observation"]), InputError,
        ("'observation'", "complex64", "floating-point"),
        put("observation", lambda: torch.zeros(5, 4, dtype=torch.complex64))),
    Wrong("a non-tensor asked for", method(value_of, in_keys=["mission"]), InputError,
        ("'mission'", "NonTensorData", "floating-point"),
        lambda w: w.td.set_non_tensor("mission", "find the key")),
    Wrong("an asked key that the TensorDict lacks", method(value_of, in_keys=["observation"]),
        KeyNotFoundError, ("'observation'", "'mission'"), lambda w: w.td.pop("observation")),
    Wrong("one in_key that the TensorDict lacks", method(value_of), KeyNotFoundError,
        ("'observation'", "'mission'"), lambda w: w.td.pop("observation")),
    Wrong("an integer in_key that the TensorDict lacks", method(value_of), KeyNotFoundError,
        ("'mission'",), lambda w: w.td.pop("mission")),
    Wrong("all in_keys lacking", method(value_of), KeyNotFoundError, ("'observation'", "'action'"),
        lambda w: setattr(w, "td", w.td.select("action"))),
    Wrong("nothing but integers to attribute",
        lambda w: w.explain(Saliency(("y", 0)), made(lambda: nn.Embedding(5, 2), "mission")),
        InputError, ("'mission'", "floating-point", "at=")),
    Wrong("a root that is an in_key", method(lambda: value_of(root="observation")),
        KeyNotFoundError, ("'observation'", "root=")),
    Wrong("a root that is an out_key", method(lambda: value_of(activations_root="logits")),
        KeyNotFoundError, ("'logits'", "activations_root=")),
    Wrong("a root that holds an in_key", method(lambda: value_of(at_root="agents")),
        KeyNotFoundError, ("'agents'", "at_root=")),
    Wrong("a root that is the caller's own tensor", method(value_of), KeyNotFoundError,
        ("'attr'", "root="), put("attr", lambda: torch.ones(5))),
    Wrong("two equal roots", method(lambda: value_of(root="x", at_root="x")), TargetError,
        ("'x'", "different")),
    Wrong("a root that is no string", method(lambda: value_of(root=("a", "b"))), TargetError,
        ("('a', 'b')", "string")),
    Wrong("a locked TensorDict", method(value_of), LockedError, ("locked", "copy()", "unlock"),
        lambda w: w.td.lock_()),
]  # fmt: skip

PATHS = [
    Wrong("an unknown path", method(lambda: value_of(at="encoder.7")), PathError,
        ("'encoder.7'", "'module.encoder.0'")),
    Wrong("a glob that matches nothing", method(lambda: value_of(at=["*.conv*"])), PathError,
        ("'*.conv*'", "Paths here")),
    Wrong("a type that is not there", method(lambda: value_of(at=nn.Conv2d)), PathError,
        ("'Conv2d'",)),
    Wrong("one unknown path of two", method(lambda: value_of(at=["module.head", "tail"])),
        PathError, ("'tail'",)),
    Wrong("a number for a path", method(lambda: value_of(at=[3])), PathError,
        ("3", "path", "glob", "type")),
    Wrong("a number for paths", method(lambda: value_of(at=3)), PathError,
        ("3", "path", "glob", "type")),
    Wrong("a module for a path", lambda w: w.explain(value_of(at=[w.model.module.head])), PathError,
        ("Linear", "path")),
    Wrong("an unknown path for activations", method(lambda: value_of(activations="tail")),
        PathError, ("'tail'",)),
    Wrong("a submodule whose output has no batch", method(lambda: value_of(at="module.scale")),
        InputError, ("'module.scale'", "(1,)", "(5,)", "batch")),
    Wrong("activations that have no batch", method(lambda: value_of(activations="module.scale")),
        InputError, ("'module.scale'", "(1,)", "(5,)", "batch")),
    Wrong("a submodule that is never called", method(lambda: value_of(at="module.idle")), PathError,
        ("'module.idle'", "never called")),
]  # fmt: skip

TARGETS = [
    Wrong("an unknown output", target(lambda: "q"), TargetError,
        ("'q'", "'logits'", "'state_value'")),
    Wrong("an unknown output with an index", target(lambda: ("q", 1)), TargetError,
        ("'q'", "'logits'")),
    Wrong("an ambiguous output", target(lambda: "logits"), TargetError,
        ("ambiguous", "(3,)", "('logits', 2)", "Greedy('logits')", "Each('logits')")),
    Wrong("a slice of an output", target(lambda: ("logits", slice(2))), TargetError,
        ("ambiguous", "(2,)")),
    Wrong("an ambiguous function", target(lambda: lambda td: td["logits"]), TargetError,
        ("ambiguous", "<lambda>", "Each")),
    Wrong("no target and two outputs", target(lambda: None), TargetError,
        ("No target", "'logits'", "'state_value'")),
    Wrong("no target and two heads", lambda w: w.explain(Saliency(), heads()), TargetError,
        ("heads", "LogProb")),
    Wrong("LogProb and two heads", lambda w: w.explain(Saliency(LogProb()), heads()), TargetError,
        ("LogProb('steer')", "LogProb('gas')")),
    Wrong("LogProb of an unknown head", lambda w: w.explain(Saliency(LogProb("brake")), heads()),
        TargetError, ("'brake'", "'steer'")),
    Wrong("an index out of range", target(lambda: ("logits", 7)), TargetError,
        ("'logits'", "(7,)", "(3,)")),
    Wrong("a negative index out of range", target(lambda: ("logits", -4)), TargetError,
        ("(-4,)", "(3,)")),
    Wrong("an index too many", target(lambda: ("logits", 0, 0)), TargetError, ("(0, 0)", "(3,)")),
    Wrong("an index into a number",
        target(lambda: Contrast(Output("logits", 0), Output("logits", 1))[0]), TargetError,
        ("(0,)", "()")),
    Wrong("an index that is a float", target(lambda: ("logits", 0.5)), TargetError,
        ("0.5", "not a target")),
    Wrong("an index that is a truth value", target(lambda: ("logits", True)), TargetError,
        ("True", "not a target")),
    Wrong("a float index in an Output", target(lambda: Output("logits", 0.5)), TargetError,
        ("0.5", "index")),
    Wrong("a number for a target", target(lambda: 3), TargetError,
        ("3 is not a target", "state_value")),
    Wrong("a class for a target", target(lambda: Taken), TargetError, ("Taken", "not a target")),
    Wrong("an empty dict of targets", target(dict), TargetError, ("empty", "at least one")),
    Wrong("a target without a name", target(lambda: {"": VALUE}), TargetError, ("''", "named")),
    Wrong("a target named by a number", target(lambda: {1: VALUE}), TargetError, ("1", "string")),
    Wrong("targets inside targets", target(lambda: {"a": {"b": VALUE}}), TargetError,
        ("'b'", "not a target")),
    Wrong("one wrong target of two", target(lambda: {"a": VALUE, "b": "q"}), TargetError, ("'q'",)),
    Wrong("a function of a wrong shape", target(lambda: lambda td: td["logits"].sum()), TargetError,
        ("()", "(5,)", "one number per batch element")),
    Wrong("a function of another batch", target(lambda: lambda td: td[VALUE][:3]), TargetError,
        ("(3, 1)", "(5,)")),
    Wrong("a function that gives None", target(lambda: lambda td: None), TargetError,
        ("NoneType", "tensor")),
    Wrong("a function that gives a number", target(lambda: lambda td: 1.0), TargetError,
        ("float", "tensor")),
    Wrong("a function without a gradient", target(lambda: lambda td: td[VALUE].detach()),
        TargetError, ("differentiable", "detach")),
    Wrong("a function that gives integers", target(lambda: lambda td: td["logits"].argmax(-1)),
        TargetError, ("differentiable",)),
    Wrong("a function of other keys", target(lambda: lambda td: td["wide"].sum(-1)), TargetError,
        ("differentiable", "other keys")),
    Wrong("a function that is NaN", target(lambda: lambda td: td[VALUE] * NAN), TargetError,
        ("NaN", "5 of 5", "<lambda>")),
    Wrong("an action that is missing", target(lambda: Taken("logits", action="act")), TargetError,
        ("'act'", "Taken", "'action'")),
    Wrong("an action of a wrong shape", target(lambda: Taken("logits", action="wide")), TargetError,
        ("'wide'", "(5, 7)", "(5, 3)")),
    Wrong("an action that is a float", target(lambda: Taken("logits")), TargetError,
        ("'action'", "float32"), put("action", lambda: torch.zeros(5))),
    Wrong("an action out of range", target(lambda: Taken("logits")), TargetError,
        ("'action'", "9", "3"), put("action", lambda: torch.full((5,), 9))),
    Wrong("an action below zero", target(lambda: Taken("logits")), TargetError,
        ("'action'", "-1", "3"), put("action", lambda: torch.full((5,), -1))),
    Wrong("an action that is not one-hot", target(lambda: Taken("logits")), TargetError,
        ("'action'", "one-hot"), put("action", lambda: torch.zeros(5, 3, dtype=torch.bool))),
    Wrong("the greedy entry of nothing", target(lambda: Greedy("q")), TargetError,
        ("'q'", "'logits'")),
    Wrong("LogProb without a distribution", target(LogProb), TargetError,
        ("LogProb", "probabilistic", "('logits', 0)")),
    Wrong("a contrast with a number", target(lambda: Output("logits", 0) - 3), TargetError,
        ("3 is not a target",)),
    Wrong("a contrast against an unknown output", target(lambda: Output("logits", 0) - ("q", 1)),
        TargetError, ("'q'",)),
    Wrong("a whole output against the rest", target(lambda: Output("logits").against_rest()),
        TargetError, ("against_rest", "('logits', 0)")),
    Wrong("one entry against no rest", target(lambda: Output(VALUE, 0).against_rest()), TargetError,
        ("against_rest", "one entry")),
    Wrong("each of an unknown output", target(lambda: Each("q")), TargetError, ("'q'", "'logits'")),
]  # fmt: skip

INPUTS = [
    Wrong("NaN", method(value_of), InputError, ("'observation'", "NaN", "1 of 20"), spoil(NAN)),
    Wrong("infinity", method(value_of), InputError, ("'observation'", "Inf", "1 of 20"),
        spoil(-INF)),
    Wrong("a nested NaN", method(value_of), InputError, ("('agents', 'speed')", "NaN"),
        put(("agents", "speed"), lambda: torch.full((5, 2), NAN))),
    Wrong("an input on the meta device", method(value_of), InputError, ("'observation'", "meta"),
        put("observation", lambda: torch.zeros(5, 4, device="meta"))),
    Wrong("a tensor observed", lambda w: w.opened(value_of()).observe(w.td["observation"]),
        ContextError, ("TensorDict", "Tensor")),
    Wrong("a dict observed", lambda w: w.opened(value_of()).observe(w.td.to_dict()), ContextError,
        ("TensorDict", "dict")),
    Wrong("a second argument beside a TensorDict", lambda w: w.opened(value_of())(w.td, w.td),
        ContextError, ("1 more", "tensordict_out")),
    Wrong("a keyword argument beside a TensorDict",
        lambda w: w.opened(value_of())(w.td, strict=True), ContextError,
        ("'strict'", "tensordict_out")),
    Wrong("a model that overwrites its input",
        lambda w: w.explain(Saliency(("y", 0)), made(Overwrites)), InputError,
        ("in place", "'observation'", "copy")),
    Wrong("a model that gives something else each time",
        lambda w: w.explain(IntegratedGradients(("y", 0)), made(Fickle)), LayoutError,
        ("same input", "random")),
    Wrong("a target that is NaN along a path",
        method(lambda: IntegratedGradients(lambda td: td[VALUE] * NAN)), TargetError,
        ("NaN", "<lambda>")),
    Wrong("a target that is NaN at the baseline",
        method(lambda: IntegratedGradients(VALUE), in_keys=["observation"]), TargetError,
        ("NaN", "baseline"), lambda w: setattr(w.model.module, "encoder", Quotient())),
    Wrong("a model whose output is NaN", method(value_of), TargetError,
        ("NaN", "5 of 5", "'state_value'"), lambda w: w.model.module.value.weight.data.fill_(NAN)),
]  # fmt: skip

CONTEXTS = [
    Wrong("a call after the block", lambda w: w.left(value_of())(w.td), ContextError,
        ("left", "with")),
    Wrong("observing after the block", lambda w: w.left(value_of()).observe(w.td), ContextError,
        ("left", "with")),
    Wrong("a call after the block with tensors", lambda w: w.left(value_of())(*w.td.values()),
        ContextError, ("left", "with")),
    Wrong("a call ahead of the block", lambda w: value_of().prepare(w.model)(w.td), ContextError,
        ("with",)),
    Wrong("observing ahead of the block", lambda w: value_of().prepare(w.model).observe(w.td),
        ContextError, ("with",)),
    Wrong("entering twice", lambda w: w.twice(value_of()), ContextError,
        ("entered already", "prepare()")),
    Wrong("a function for a model", lambda w: w.explain(value_of(), lambda td: td), ModelError,
        ("function", "TensorDictModule")),
    Wrong("a class for a model", lambda w: w.explain(value_of(), nn.Linear), ModelError,
        ("nn.Module", "Linear", "instance")),
    Wrong("None for a model", lambda w: value_of().prepare(None), ModelError,
        ("nn.Module", "NoneType")),
    Wrong("a scripted module",
        lambda w: w.explain(Saliency("y"), made(scripted).module, in_keys=["x"], out_keys=["y"]),
        ModelError, ("TorchScript", "scripted from")),
    Wrong("a scripted submodule", lambda w: w.explain(Saliency("y"), made(scripted)), ModelError,
        ("TorchScript", "scripted from")),
    Wrong("function rules that are none", method(lambda: LRP(target=VALUE, functions={"tanh": None})),
        RuleError, ("functions", "FunctionRules", "tanh")),
    Wrong("a function's rule that is none",
        method(lambda: LRP(target=VALUE, functions=FunctionRules(rules={"tanh": "pass"}))), RuleError,
        ("tanh()", "FunctionRule", "'pass'")),
    Wrong("unknown gates", method(lambda: LRP(target=VALUE, functions=FunctionRules(gates="all"))),
        RuleError, ("gates", "'half'", "'signal'", "'all'")),
    Wrong("unknown attention",
        method(lambda: LRP(target=VALUE, functions=FunctionRules(attention="stop"))), RuleError,
        ("attention", "'gradient'", "'constant'", "'stop'")),
    Wrong("an unknown word for unhandled", method(lambda: LRP(target=VALUE, unhandled="no")),
        ContextError, ("'warn'", "'raise'", "'no'")),
    Wrong("a start for an unknown target",
        method(lambda: LRP(target={"value": VALUE}, start={"q": "one"})), RuleError,
        ("start", "'q'", "'value'")),
    Wrong("a negative tolerance of the ledger", method(lambda: LRP(target=VALUE, ledger=-1.0)),
        RuleError, ("ledger", "-1.0")),
    Wrong("a graph of integrated gradients",
        method(lambda: IntegratedGradients(VALUE, create_graph=True)), ContextError,
        ("IntegratedGradients", "graph")),
    Wrong("an unknown word for unreached", method(lambda: LRP(target=VALUE, unreached="warn")),
        ContextError, ("'warn'", "'ignore'")),
]  # fmt: skip

RULES = [
    Wrong("epsilon below zero", rule(lambda: EpsilonRule(-1)), RuleError,
        ("EpsilonRule", "epsilon", "-1", "above 0")),
    Wrong("epsilon zero", rule(lambda: EpsilonRule(0.0)), RuleError, ("epsilon", "0.0", "above 0")),
    Wrong("epsilon NaN", rule(lambda: EpsilonRule(NAN)), RuleError, ("epsilon", "nan", "finite")),
    Wrong("epsilon infinite", rule(lambda: EpsilonRule(INF)), RuleError,
        ("epsilon", "inf", "finite")),
    Wrong("epsilon a string", rule(lambda: EpsilonRule("1e-6")), RuleError,
        ("epsilon", "'1e-6'", "number")),
    Wrong("epsilon of a mapper", method(lambda: LRP(EpsilonPlus(epsilon=-1), VALUE)), RuleError,
        ("epsilon", "-1")),
    Wrong("a stabiliser of zero", rule(lambda: ZPlusRule(0)), RuleError,
        ("ZPlusRule", "stabilizer", "0")),
    Wrong("a negative stabiliser", rule(lambda: PseudoIdentityRule(-1e-6)), RuleError,
        ("stabilizer", "-1e-06")),
    Wrong("alpha minus beta not one", rule(lambda: AlphaBetaRule(2.0, 0.5)), RuleError,
        ("alpha - beta", "1", "2.0", "0.5")),
    Wrong("negative alpha and beta", rule(lambda: AlphaBetaRule(-1, -2)), RuleError,
        ("negative", "-1", "-2")),
    Wrong("alpha NaN", rule(lambda: AlphaBetaRule(NAN, 0)), RuleError, ("alpha", "nan")),
    Wrong("alpha a string", rule(lambda: AlphaBetaRule("2", 1)), RuleError,
        ("alpha", "'2'", "number")),
    Wrong("gamma below zero", rule(lambda: GammaRule(-0.25)), RuleError,
        ("gamma", "-0.25", "at least 0")),
    Wrong("gamma NaN", rule(lambda: GammaRule(NAN)), RuleError, ("gamma", "nan", "finite")),
    Wrong("low above high", rule(lambda: ZBoxRule(1.0, 0.0)), RuleError,
        ("low", "high", "1.0", "0.0")),
    Wrong("low a string", rule(lambda: ZBoxRule("0", 1.0)), RuleError, ("low", "'0'")),
    Wrong("low NaN", rule(lambda: ZBoxRule(NAN, 1.0)), RuleError, ("low", "nan")),
    Wrong("bounds of different shapes", rule(lambda: ZBoxRule(torch.zeros(2), torch.ones(3))),
        RuleError, ("low and high",)),
    Wrong("bounds that do not fit the input", rule(lambda: ZBoxRule(torch.zeros(3), 1.0)),
        RuleError, ("'module.head'", "bounds", "(5, 10)")),
    Wrong("a modifier that is no function", rule(lambda: ModifiedRule(ParamModifier("abs"))),
        RuleError, ("modify_fn", "'abs'")),
    Wrong("a modified rule without a modifier", rule(lambda: ModifiedRule(torch.abs)), RuleError,
        ("ParamModifier", "abs")),
    Wrong("a modifier that changes shapes",
        rule(lambda: ModifiedRule(ParamModifier(lambda n, p: p[:1]))), RuleError,
        ("'weight'", "(1, 10)", "(3, 10)", "same shape")),
    Wrong("a modifier that gives None",
        rule(lambda: ModifiedRule(ParamModifier(lambda n, p: None))), RuleError,
        ("'weight'", "NoneType", "same shape")),
    Wrong("z-plus on a container", rule(ZPlusRule, "module.encoder"), RuleError,
        ("'module.encoder'", "container of 3", "EpsilonRule")),
    Wrong("flat on an activation", rule(FlatRule, "module.encoder.1"), RuleError,
        ("'module.encoder.1'", "ReLU", "weights", "PassRule")),
    Wrong("w-square on the root", rule(WSquareRule, ""), RuleError, ("WSquareRule", "container")),
    Wrong("layer norm on a linear layer", rule(LayerNormRule), RuleError,
        ("'module.head'", "Linear", "normalized_shape")),
    Wrong("pass on a layer of another width", rule(PassRule), RuleError,
        ("'module.head'", "(5, 10)", "(5, 3)", "EpsilonRule")),
    Wrong("pass on several inputs", rule(PassRule, "module"), RuleError,
        ("'module'", "(5, 4)", "EpsilonRule")),
    Wrong("pseudo identity on a linear layer", rule(PseudoIdentityRule), RuleError,
        ("'module.head'", "shape")),
    Wrong("uniform on a linear layer", rule(UniformRule), RuleError,
        ("'module.head'", "(5, 10)", "FlatRule")),
    Wrong("query, key, value on a value", rule(AHQKVRule, "module.value"), RuleError,
        ("'module.value'", "three equal parts")),
    Wrong("a rule that says nothing", rule(Rule), RuleError, ("surrogate(", "relevance(")),
    Wrong("a surrogate of a wrong shape", rule(Narrow), RuleError,
        ("'module.head'", "Narrow", "(5, 1)", "(5, 3)")),
    Wrong("relevance of a wrong shape", rule(Shares), RuleError, ("Shares", "(5, 3)", "(5, 10)")),
    Wrong("a rule that is never reached", rule(EpsilonRule, "module.mission.unused"), RuleError,
        ("'module.mission.unused'", "never reached", "unreached='ignore'"),
        lambda w: w.model.module.mission.add_module("unused", nn.Linear(2, 2))),
    Wrong("a mapper that gives a string", method(lambda: LRP(lambda n, m: "epsilon", VALUE)),
        RuleError, ("'epsilon'", "''", "Rule instance or None")),
    Wrong("a mapper that gives a class", method(lambda: LRP(lambda n, m: EpsilonRule, VALUE)),
        RuleError, ("EpsilonRule", "instance")),
    Wrong("a mapper that is a class", method(lambda: LRP(EpsilonPlus, VALUE)), RuleError,
        ("EpsilonPlus", "instance is needed")),
    Wrong("a mapper that is a rule", method(lambda: LRP(EpsilonRule(), VALUE)), RuleError,
        ("EpsilonRule", "callable")),
    Wrong("a mapper that is a dict", method(lambda: LRP({"module.head": EpsilonRule()}, VALUE)),
        RuleError, ("module.head", "callable")),
    Wrong("a mapper inside that is a string",
        method(lambda: LRP(EpsilonPlus(rule_mapper="all"), VALUE)), RuleError,
        ("rule_mapper", "'all'")),
    Wrong("a mapper of one argument", method(lambda: LRP(lambda module: None, VALUE)), RuleError,
        ("mapper", "(name, module)")),
    Wrong("an unknown start", method(lambda: LRP(target=VALUE, start="two")), RuleError,
        ("start", "'two'", "'one'")),
    Wrong("a start of a wrong shape", method(lambda: LRP(target=VALUE, start=torch.ones(7))),
        RuleError, ("(7,)", "(5, 1)")),
    Wrong("a start that is NaN", method(lambda: LRP(target=VALUE, start=torch.tensor(NAN))),
        RuleError, ("start", "NaN")),
    Wrong("a rule registered on a path", lambda w: EpsilonRule().register("module.head"), RuleError,
        ("module", "str")),
    Wrong("a rule registered on a container", lambda w: FlatRule().register(w.model.module.encoder),
        RuleError, ("Sequential", "container of 3")),
]  # fmt: skip

BASELINES = [
    Wrong("a baseline that is NaN", baseline(lambda: NAN), BaselineError, ("nan", "finite")),
    Wrong("a baseline that is infinite", baseline(lambda: {"observation": INF}), BaselineError,
        ("inf", "finite")),
    Wrong("a baseline that holds NaN", baseline(lambda: torch.tensor([0.0, NAN, 0.0, 0.0])),
        BaselineError, ("NaN",)),
    Wrong("a baseline of a wrong shape", baseline(lambda: {"observation": torch.zeros(7)}),
        BaselineError, ("'observation'", "(7,)", "(5, 4)")),
    Wrong("a baseline of more dimensions", baseline(lambda: {"observation": torch.zeros(2, 5, 4)}),
        BaselineError, ("'observation'", "(2, 5, 4)")),
    Wrong("a baseline on another device",
        baseline(lambda: {"observation": torch.zeros(4, device="meta")}), BaselineError,
        ("'observation'", "meta", "cpu")),
    Wrong("a baseline that is complex",
        baseline(lambda: {"observation": torch.zeros(4, dtype=torch.complex64)}), BaselineError,
        ("'observation'", "complex64")),
    Wrong("a baseline of an unknown key", baseline(lambda: {"obs": 0.0}), BaselineError,
        ("'obs'", "'observation'")),
    Wrong("a baseline of a key that is not attributed",
        baseline(lambda: {"mission": 0.0}, in_keys=["observation"]), BaselineError,
        ("'mission'", "'observation'")),
    Wrong("a baseline under a number", baseline(lambda: {1: 0.0}), TdhookLikeError, ("1",)),
    Wrong("a baseline that is a string", baseline(lambda: "zero"), BaselineError,
        ("'zero'", "FromKey")),
    Wrong("a baseline that is a truth value", baseline(lambda: True), BaselineError,
        ("True", "number")),
    Wrong("a baseline that is a list", baseline(lambda: {"observation": [0.0] * 4}), BaselineError,
        ("[0.0", "tensor")),
    Wrong("a baseline from a missing key", baseline(lambda: {"observation": FromKey("rest")}),
        BaselineError, ("'observation'", "'rest'")),
    Wrong("a baseline from a key of a wrong shape",
        baseline(lambda: {"observation": FromKey("wide")}), BaselineError,
        ("'observation'", "(5, 7)")),
    Wrong("a baseline from a buffer without the key",
        baseline(lambda: {"observation": FromBuffer(Rows("speed"))}), BaselineError,
        ("buffer", "'observation'")),
    Wrong("a buffer that gives too few rows",
        baseline(lambda: {"observation": FromBuffer(Rows("observation", 3))}), BaselineError,
        ("'observation'", "3", "5")),
    Wrong("a buffer that cannot sample", baseline(lambda: {"observation": FromBuffer([])}),
        BaselineError, ("sample", "list")),
    Wrong("a function that gives no baseline", baseline(lambda: lambda x: None), BaselineError,
        ("'observation'", "NoneType", "tensor")),
    Wrong("a function that gives a wrong baseline",
        baseline(lambda: {"observation": lambda x: x[:, :2]}), BaselineError,
        ("'observation'", "(5, 2)", "(5, 4)")),
    Wrong("a function that gives NaN", baseline(lambda: lambda x: x * NAN), BaselineError,
        ("'observation'", "NaN")),
]  # fmt: skip

STEPS = [
    Wrong("no steps", method(lambda: IntegratedGradients(VALUE, n_steps=0)), InputError,
        ("n_steps", "at least 1", "0")),
    Wrong("fewer than no steps", method(lambda: IntegratedGradients(VALUE, n_steps=-5)), InputError,
        ("n_steps", "-5")),
    Wrong("half a step", method(lambda: IntegratedGradients(VALUE, n_steps=2.5)), InputError,
        ("n_steps", "2.5", "whole")),
    Wrong("a truth value for steps", method(lambda: IntegratedGradients(VALUE, n_steps=True)),
        InputError, ("n_steps", "True")),
    Wrong("one step of a trapezoid",
        method(lambda: IntegratedGradients(VALUE, n_steps=1, method="riemann_trapezoid")),
        InputError, ("n_steps", "at least 2")),
    Wrong("an unknown quadrature", method(lambda: IntegratedGradients(VALUE, method="simpson")),
        InputError, ("'simpson'", "gausslegendre")),
    Wrong("no rows at a time", method(lambda: IntegratedGradients(VALUE, internal_batch_size=0)),
        InputError, ("internal_batch_size", "0")),
    Wrong("a tolerance below zero", method(lambda: IntegratedGradients(VALUE, gap_tolerance=-0.1)),
        InputError, ("gap_tolerance", "-0.1")),
    Wrong("a tolerance that is NaN", method(lambda: IntegratedGradients(VALUE, gap_tolerance=NAN)),
        InputError, ("gap_tolerance", "nan")),
]  # fmt: skip

EVERY = [*KEYS, *PATHS, *TARGETS, *INPUTS, *CONTEXTS, *RULES, *BASELINES, *STEPS]


@pytest.mark.parametrize("observing", [False, True], ids=["driving", "observing"])
@pytest.mark.parametrize("wrong", EVERY, ids=lambda wrong: wrong.name)
def test_a_wrong_use_is_one_clear_error_and_leaves_no_trace(wrong: Wrong, observing: bool):
    met = world()
    met.observing = observing
    wrong.given(met)
    model, td = snapshot(met.model), td_snapshot(met.td)
    with pytest.raises(wrong.error) as raised:
        wrong.do(met)
    assert_same(model, snapshot(met.model))
    assert_same(td, td_snapshot(met.td))
    message = str(raised.value)
    assert [word for word in wrong.says if word not in message] == [], message
    assert type(raised.value) is not TdhookLikeError
    assert len(message) < 600, "a message is read by a person"


def test_the_wrong_uses_have_names_of_their_own():
    names = [wrong.name for wrong in EVERY]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.parametrize("observing", [False, True], ids=["driving", "observing"])
@pytest.mark.parametrize(
    "observation",
    [torch.zeros(5, 7), torch.zeros(5, 4, dtype=torch.float64), torch.zeros(5, 4).half()],
    ids=["shape", "float64", "float16"],
)
def test_what_the_model_itself_refuses_is_its_own_error_word_for_word(observation, observing):
    met = world()
    met.td["observation"], met.observing = observation, observing
    with pytest.raises(RuntimeError) as plainly:
        met.model(met.td.clone())
    model, td = snapshot(met.model), td_snapshot(met.td)
    with pytest.raises(type(plainly.value)) as raised:
        met.explain(value_of())
    assert str(raised.value) == str(plainly.value)
    assert_same(model, snapshot(met.model))
    assert_same(td, td_snapshot(met.td))


def test_every_error_is_also_the_builtin_one_that_fits():
    for error, builtin in [
        (KeyNotFoundError, LookupError), (PathError, LookupError), (TargetError, ValueError),
        (InputError, ValueError), (BaselineError, ValueError), (RuleError, ValueError),
        (ContextError, RuntimeError), (ModelError, TypeError), (LayoutError, RuntimeError),
        (LockedError, RuntimeError),
    ]:  # fmt: skip
        assert issubclass(error, TdhookLikeError) and issubclass(error, builtin)


def test_the_model_of_the_wrong_uses_can_be_used_rightly_of_the_same_world_raise_nothing():
    met = world()
    for right in (value_of(), InputXGradient(VALUE), IntegratedGradients(VALUE), LRP(target=VALUE)):
        met.explain(right)
    assert met.td["attr", "agents", "speed"].shape == (5, 2)
