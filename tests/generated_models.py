"""Small random policies: TensorDictModules that read one to three keys, for property tests.

A `Plan` says in plain words what to build and `build` builds it, always the same and without
touching torch's random state. `random_plan` makes one up and `cases` draws them. A failing case
prints its plan, so that

    case = build(Plan(seed=3, ...))

repeats it outside of hypothesis.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Target = tuple[NestedKey, int]

KEYS: tuple[NestedKey, ...] = ("observation", ("agents", "obs"), ("agents", "state", "goal"))
OUT_KEYS: tuple[NestedKey, ...] = ("out", ("agents", "value"))
SHAPES = {"vector": (4,), "sequence": (2, 5), "image": (1, 4, 4)}
WIDTH = 4  # of every hidden vector
CHANNELS = 2  # of every hidden sequence and image


@dataclass(frozen=True)
class Case:
    """A model, what to feed it, and what to explain.

    Attributes:
        module: reads and writes keys of a TensorDict, as policies do.
        td: its input; no entry requires grad.
        target: out key and index in its last dimension: one number per batch element.
        description: the plan that builds this case.
        float_keys: the in_keys that an attribution is due for.
        out_keys: what the module is asked for, intermediate keys left out.
    """

    module: TensorDictModuleBase
    td: TensorDict
    target: Target
    description: str
    float_keys: tuple[NestedKey, ...]
    out_keys: tuple[NestedKey, ...]

    def __repr__(self) -> str:
        return f"build({self.description})"

    def number(self, td: TensorDict) -> Tensor:
        """What is explained, [*B], read from the model's outputs."""
        key, index = self.target
        return td.get(key)[..., index]


@dataclass(frozen=True)
class Plan:
    """What to build, in words.

    Attributes:
        seed: of parameters and inputs.
        batch: batch size of the TensorDict.
        dtype: float32 or float64, of parameters and inputs.
        training: the mode the model is in.
        inputs: key and kind (see `SHAPES`) of what the model reads.
        extras: further entries (see `EXTRAS`).
        encoder: blocks between a key and the place where keys meet.
        trunk: blocks behind it.
        layout: one module, a sequence of modules, or a sequence of sequences.
        heads: number of outputs of each head.
        target: head and output that is explained.
    """

    seed: int
    batch: tuple[int, ...] = (3,)
    dtype: str = "float32"
    training: bool = False
    inputs: tuple[tuple[NestedKey, str], ...] = (("observation", "vector"),)
    extras: tuple[str, ...] = ()
    encoder: tuple[str, ...] = ()
    trunk: tuple[str, ...] = ("relu",)
    layout: str = "one"
    heads: tuple[int, ...] = (2,)
    target: tuple[int, int] = (0, 0)


# --- blocks that keep the width -------------------------------------------------------------------


class Residual(nn.Module):
    """``x + f(x)``, the sum done by a function, not a module."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Twice(nn.Module):
    """One layer called two times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


def _tied(layer: Callable[[], nn.Module]) -> nn.Module:
    """Two layers with one weight between them."""
    first, second = layer(), layer()
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "leaky relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "dropout": nn.Dropout,
}
# Built around the affine layer of their room. An in-place ReLU follows an affine layer, because
# behind anything else it could overwrite the caller's own tensor or what a backward needs.
AFFINE: dict[str, Callable[[Callable[[], nn.Module]], nn.Module]] = {
    "affine": lambda layer: layer(),
    "relu_": lambda layer: nn.Sequential(layer(), nn.ReLU(inplace=True)),
    "residual": lambda layer: Residual(nn.Sequential(layer(), nn.ReLU(), layer())),
    "twice": lambda layer: Twice(layer()),
    "tied": _tied,
    "weight norm": lambda layer: weight_norm(layer()),
}
NORMS = ("layer norm", "batch norm", "group norm")
EXTRAS = ("unread int", "ignored int", "embedded int", "unread float", "ignored float")


def _block(name: str, kind: str) -> nn.Module:
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]()
    if name in AFFINE:
        return AFFINE[name](lambda: _affine(kind))
    if name == "layer norm":
        return nn.LayerNorm(WIDTH) if kind == "vector" else nn.LayerNorm(SHAPES[kind][1:])
    features = WIDTH if kind == "vector" else CHANNELS
    if name == "group norm":
        return nn.GroupNorm(2, WIDTH) if kind == "vector" else nn.GroupNorm(1, CHANNELS)
    assert name == "batch norm", f"no block is called {name!r}"
    return nn.BatchNorm2d(features) if kind == "image" else nn.BatchNorm1d(features)


def _affine(kind: str) -> nn.Module:
    if kind == "vector":
        return nn.Linear(WIDTH, WIDTH)
    conv = nn.Conv1d if kind == "sequence" else nn.Conv2d
    return conv(CHANNELS, CHANNELS, 3, padding=1)


def _encoder(kind: str, blocks: tuple[str, ...]) -> nn.Sequential:
    shape = SHAPES[kind]
    middle = [_block(name, kind) for name in blocks]
    if kind == "vector":
        return nn.Sequential(nn.Linear(shape[0], WIDTH), *middle)
    conv = nn.Conv1d if kind == "sequence" else nn.Conv2d
    flat = CHANNELS * torch.Size(shape[1:]).numel()
    return nn.Sequential(
        conv(shape[0], CHANNELS, 3, padding=1),
        *middle,
        nn.Flatten(-len(shape)),
        nn.Linear(flat, WIDTH),
    )


# --- whole models ---------------------------------------------------------------------------------


class Merge(nn.Module):
    """Concatenates the first tensors that it is given and ignores the rest."""

    def __init__(self, reads: int, trunk: nn.Module) -> None:
        super().__init__()
        self.reads, self.trunk = reads, trunk

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.trunk(torch.cat(tensors[: self.reads], dim=-1))


class Policy(nn.Module):
    """The whole model as one positional module with one output, or a tuple of them."""

    def __init__(self, encoders: list[nn.Module], merge: Merge, heads: list[nn.Module]) -> None:
        super().__init__()
        self.encoders, self.merge = nn.ModuleList(encoders), merge
        self.heads = nn.ModuleList(heads)

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        hidden = self.merge(*(f(x) for f, x in zip(self.encoders, tensors, strict=False)))
        outputs = tuple(head(hidden) for head in self.heads)
        return outputs[0] if len(outputs) == 1 else outputs


def build(plan: Plan) -> Case:
    """Builds the model and its input; torch's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        module = _model(plan).to(getattr(torch, plan.dtype)).train(plan.training)
        td = _input(plan)
    head, unit = plan.target
    read = tuple(key for key, _ in plan.inputs)
    ignored = ("ignored",) if "ignored float" in plan.extras else ()
    return Case(
        module=module,
        td=td,
        target=(OUT_KEYS[head], unit),
        description=repr(plan),
        float_keys=read + ignored,
        out_keys=OUT_KEYS[: len(plan.heads)],
    )


def _model(plan: Plan) -> TensorDictModuleBase:
    in_keys: list[NestedKey] = [key for key, _ in plan.inputs]
    encoders: list[nn.Module] = [_encoder(kind, plan.encoder) for _, kind in plan.inputs]
    if "embedded int" in plan.extras:
        in_keys.append("embedded_index")
        encoders.append(nn.Embedding(5, WIDTH))
    ignored: list[NestedKey] = [
        key
        for key, extra in (("index", "ignored int"), ("ignored", "ignored float"))
        if extra in plan.extras
    ]
    meet = nn.Linear(WIDTH * len(encoders), WIDTH)
    trunk = nn.Sequential(meet, *(_block(name, "vector") for name in plan.trunk))
    merge = Merge(len(encoders), trunk)
    heads: list[nn.Module] = [nn.Linear(WIDTH, size) for size in plan.heads]
    out_keys = list(OUT_KEYS[: len(heads)])
    if plan.layout == "one":
        policy = Policy(encoders, merge, heads)
        return TensorDictModule(policy, in_keys=in_keys + ignored, out_keys=out_keys)
    hidden: list[NestedKey] = [("hidden", str(number)) for number in range(len(encoders))]
    first: list[Any] = [
        TensorDictModule(module, in_keys=[key], out_keys=[to])
        for module, key, to in zip(encoders, in_keys, hidden, strict=True)
    ]
    middle: Any = TensorDictModule(merge, in_keys=hidden + ignored, out_keys=["features"])
    last: list[Any] = [
        TensorDictModule(head, in_keys=["features"], out_keys=[key])
        for head, key in zip(heads, out_keys, strict=True)
    ]
    if plan.layout == "sequence":
        return TensorDictSequential(*first, middle, *last)
    assert plan.layout == "nested", f"no layout is called {plan.layout!r}"
    halves: list[Any] = [TensorDictSequential(*first), TensorDictSequential(middle, *last)]
    return TensorDictSequential(*halves)


def _input(plan: Plan) -> TensorDict:
    td = TensorDict(batch_size=plan.batch)
    dtype = getattr(torch, plan.dtype)
    for key, kind in plan.inputs:
        x = torch.randn(*plan.batch, *SHAPES[kind], dtype=dtype)
        # Exact zeros, as in one-hot inputs, are where rules differ.
        td[key] = torch.where(torch.rand_like(x) < 0.2, 0.0, x)
    for extra, key in (("unread float", "step"), ("ignored float", "ignored")):
        if extra in plan.extras:
            td[key] = torch.randn(*plan.batch, 2, dtype=dtype)
    for extra, key in (
        ("unread int", "count"),
        ("ignored int", "index"),
        ("embedded int", "embedded_index"),
    ):
        if extra in plan.extras:
            td[key] = torch.randint(5, plan.batch)
    return td


# --- what hypothesis draws ------------------------------------------------------------------------


# A plan is chosen by `random` from one drawn seed: hypothesis, choosing each part, repeats itself
# so much that rare combinations (batch norm in training) hardly occur. Plans are small unshrunk.
SEEDS = st.integers(0, 2**32 - 1)


def random_plan(seed: int, training: bool | None = None) -> Plan:
    """A plan, in either mode unless one is asked for."""
    rng = random.Random(seed)
    batch = rng.choice([(3,), (2,), (), (2, 3)])
    # Convolutions take no more than one batch dimension; batch and group norms need exactly one.
    kinds = ["vector"] if len(batch) > 1 else list(SHAPES)
    norms = NORMS if len(batch) == 1 else NORMS[:1]
    families = (list(ACTIVATIONS), list(AFFINE), list(norms))

    def blocks(least: int, most: int) -> tuple[str, ...]:
        # Each family has the same share: the few norms are not drowned by many activations.
        size = rng.randint(least, most)
        return tuple(rng.choice(rng.choice(families)) for _ in range(size))

    heads = rng.choice([(2,), (1,), (3, 2)])
    head = rng.randrange(len(heads))
    return Plan(
        seed=seed,
        batch=batch,
        dtype=rng.choice(["float32", "float64"]),
        training=rng.random() < 0.5 if training is None else training,
        inputs=tuple((key, rng.choice(kinds)) for key in rng.sample(KEYS, rng.randint(1, 3))),
        extras=tuple(rng.sample(EXTRAS, rng.randint(0, 2))),
        encoder=blocks(0, 2),
        trunk=blocks(1, 3),
        layout=rng.choice(["one", "sequence", "nested"]),
        heads=heads,
        target=(head, rng.randrange(heads[head])),
    )


@st.composite
def cases(draw: st.DrawFn, training: bool | None = None) -> Case:
    """Draws models of every kind, in either mode unless one is asked for."""
    return build(random_plan(draw(SEEDS), training))


def random_rectifier_plan(seed: int) -> Plan:
    """A plan for one key, affine layers and ReLUs, one after another."""
    rng = random.Random(seed)
    words = ["affine", "relu", "relu_"]
    return Plan(
        seed=seed,
        batch=rng.choice([(2,), (1,)]),
        dtype="float64",
        inputs=(("observation", rng.choice(list(SHAPES))),),
        encoder=tuple(rng.choices(words, k=rng.randint(0, 3))),
        trunk=tuple(rng.choices(words, k=rng.randint(0, 3))),
        target=(0, rng.randrange(2)),
    )


@st.composite
def rectifier_cases(draw: st.DrawFn) -> Case:
    """Draws networks for which `layers` lists all that happens."""
    return build(random_rectifier_plan(draw(SEEDS)))


def layers(case: Case) -> list[nn.Module]:
    """The layers of a rectifier network, in the order of the forward pass."""
    policy = case.module.module
    assert isinstance(policy, Policy) and len(policy.encoders) == 1
    found = [*policy.encoders[0].modules(), *policy.merge.modules(), *policy.heads.modules()]
    containers = (nn.Sequential, nn.ModuleList, Merge)
    return [module for module in found if not isinstance(module, containers)]
