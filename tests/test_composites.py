"""The composites: which rule lands where, and the relevance that comes of it, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import LSTMModule

import reference_lrp as ref
from rule_samples import assert_close, explain, grid, made
from tdhook_like import LRP
from tdhook_like.attribution.lrp import EpsilonPlus, EpsilonRule, FlatRule, Rule, RuleMapper
from tdhook_like.attribution.lrp.mappers.choosing import Mapper
from tdhook_like.attribution.lrp.mappers.composites import (
    CPLRP,
    AttnLRP,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlusFlat,
)
from tdhook_like.attribution.lrp.mappers.patterns import NameMapper
from tdhook_like.attribution.lrp.mappers.policies import PolicyMapper
from tdhook_like.errors import RuleError
from torchrl_records import FAMILIES
from torchrl_records.nets import HIDDEN, OBS


def rules(mapper: Mapper, model: nn.Module) -> dict[str, str]:
    """Which rule every path gets, by name."""
    return {line.path: type(line.rule).__name__ for line in mapper.plan(model).lines}


class Block(nn.Module):
    """A residual block; the sum is a function."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 1, bias=not norm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.bn1(self.conv1(x))))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)),
    )


def vgg() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU()),
        *(nn.MaxPool2d(3, 1), nn.AvgPool2d(1), nn.Flatten()),
        *(nn.Linear(2, 3), nn.ReLU(), nn.Dropout(), nn.Linear(3, 2)),
    )


def resnet(norm: bool = True) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 2), nn.ReLU(), Block(2, norm)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)),
    )


# --- which rule lands where -----------------------------------------------------------------------

COMPOSITES: dict[str, tuple[Mapper, str, str]] = {
    "EpsilonPlus": (EpsilonPlus(), "ZPlusRule", ""),
    "EpsilonPlusFlat": (EpsilonPlusFlat(), "ZPlusRule", "FlatRule"),
    "EpsilonGammaBox": (EpsilonGammaBox(0.0, 1.0), "GammaRule", "ZBoxRule"),
    "EpsilonAlpha2Beta1": (EpsilonAlpha2Beta1(), "AlphaBetaRule", ""),
    "EpsilonAlpha2Beta1Flat": (EpsilonAlpha2Beta1Flat(), "AlphaBetaRule", "FlatRule"),
    "AttnLRP": (AttnLRP(), "EpsilonRule", ""),
    "CPLRP": (CPLRP(), "EpsilonRule", ""),
    "PolicyMapper": (PolicyMapper(), "ZPlusRule", ""),
}
"""Each with its rule on convolutions, and on the layer that reads the inputs if that is another."""

every_composite = pytest.mark.parametrize("name", COMPOSITES)


@every_composite
def test_dense_layers_have_epsilon_and_the_first_one_may_have_another(name: str):
    mapper, _, first = COMPOSITES[name]
    assert rules(mapper, mlp()) == {
        **{"0": first or "EpsilonRule", "1": "PassRule", "2": "EpsilonRule"},
        **{"3": "PassRule", "4": "EpsilonRule"},
    }


@every_composite
def test_convolutions_have_the_composites_rule_and_pooling_its_own(name: str):
    mapper, conv, first = COMPOSITES[name]
    assert rules(mapper, vgg()) == {
        **{"0": first or conv, "1": "PassRule", "2": conv, "3": "PassRule"},
        **{"4": "IgnoreRule", "5": "EpsilonRule", "6": "IgnoreRule"},
        **{"7": "EpsilonRule", "8": "PassRule", "9": "IgnoreRule", "10": "EpsilonRule"},
    }


@every_composite
def test_blocks_have_no_rule_but_what_is_inside_has(name: str):
    mapper, conv, first = COMPOSITES[name]
    assert rules(mapper, resnet()) == {
        **{"0": first or conv, "1": "PassRule"},
        **{"2.conv1": conv, "2.bn1": "BatchNormRule", "2.relu": "PassRule", "2.conv2": conv},
        **{"3": "EpsilonRule", "4": "IgnoreRule", "5": "EpsilonRule"},
    }


TORCHRL: dict[str, dict[str, str]] = {
    "Categorical": {
        **{"module.0.module.0": "first", "module.0.module.1": "PassRule"},
        **{"module.0.module.2": "EpsilonRule", "module.0.module.3": "PassRule"},
        **{"module.0.module.4": "EpsilonRule"},
    },
    "ActorValueOperator": {
        **{"module.0.module.0": "first", "module.0.module.1": "PassRule"},
        **{f"module.1.module.0.module.{i}": "EpsilonRule" for i in (0, 2, 4)},
        **{f"module.1.module.0.module.{i}": "PassRule" for i in (1, 3)},
        **{f"module.2.module.{i}": "EpsilonRule" for i in (0, 2, 4)},
        **{f"module.2.module.{i}": "PassRule" for i in (1, 3)},
    },
    "QValueActor": {
        "module.0.module.0": "first",
        **{f"module.0.module.{i}": "EpsilonRule" for i in (2, 4)},
        **{f"module.0.module.{i}": "PassRule" for i in (1, 3)},
    },
    "NoisyLinear": {
        "module.0.module.0": "first",
        **{f"module.0.module.{i}": "EpsilonRule" for i in (2, 4)},
        **{f"module.0.module.{i}": "PassRule" for i in (1, 3)},
    },
    "DuelingCnnDQNet": {
        **{"module.0.module.features.0": "first conv", "module.0.module.features.2": "conv"},
        **{f"module.0.module.features.{i}": "PassRule" for i in (1, 3)},
        **{f"module.0.module.{head}.0": "EpsilonRule" for head in ("advantage", "value")},
        **{f"module.0.module.{head}.1": "PassRule" for head in ("advantage", "value")},
        **{f"module.0.module.{head}.2": "EpsilonRule" for head in ("advantage", "value")},
    },
    "MultiAgentMLP, own weights": {
        **{"module._empty_net.0": "first", "module._empty_net.1": "PassRule"},
        **{"module._empty_net.2": "EpsilonRule"},
    },
    "MultiAgentConvNet, shared weights": {
        **{"module._empty_net.0": "first conv", "module._empty_net.1": "PassRule"},
    },
}


@every_composite
@pytest.mark.parametrize("family", TORCHRL)
def test_the_layers_of_torchrls_models_have_the_composites_rules(family: str, name: str):
    mapper, conv, first = COMPOSITES[name]
    words = {"first": first or "EpsilonRule", "first conv": first or conv, "conv": conv}
    expected = {path: words.get(rule, rule) for path, rule in TORCHRL[family].items()}
    found = rules(mapper, FAMILIES[family].build())
    assert {path: found[path] for path in expected} == expected
    # Beside these stand containers and reshapings alone.
    assert set(found.values()) <= {*expected.values(), "IgnoreRule"}


def test_recurrent_layers_have_a_rule_under_the_policies_mapper():
    for name in ("LSTMModule over time", "python LSTMModule over time"):
        found = rules(PolicyMapper(), FAMILIES[name].build())
        assert found == {"module.0.lstm": "SignalTakesAllRule", "module.1.module": "EpsilonRule"}
    found = rules(PolicyMapper(), FAMILIES["GRUModule, step by step"].build())
    assert found["module.0.gru"] == "SignalTakesAllRule"


def lstm_policy(backend: str) -> TensorDictSequential:
    torch.manual_seed(0)
    memory = LSTMModule(
        *(OBS, HIDDEN),
        in_keys=["observation", "h", "c"],
        out_keys=["embed", ("next", "h"), ("next", "c")],
    )
    memory.recurrent_backend = backend  # some need packages of their own to be made with
    head = TensorDictModule(nn.Linear(HIDDEN, 1), ["embed"], ["value"])
    return TensorDictSequential(memory, head).double()


def test_a_recurrent_module_that_may_not_call_its_inner_layer_has_the_rule_itself():
    mapper = PolicyMapper()
    assert rules(mapper, lstm_policy("pad"))["module.0.lstm"] == "SignalTakesAllRule"
    found = rules(mapper, lstm_policy("auto"))
    assert found == {"module.0": "SignalTakesAllRule", "module.1.module": "EpsilonRule"}
    td = TensorDict(
        {
            "observation": torch.randn(3, OBS).double(),
            "h": torch.randn(3, 1, HIDDEN).double(),
            "c": torch.randn(3, 1, HIDDEN).double(),
            "is_init": torch.zeros(3, 1, dtype=torch.bool),
        },
        [3],
    )
    results = []
    for backend in ("pad", "auto"):
        with LRP(mapper, "value").prepare(lstm_policy(backend)) as hooked:
            results.append(hooked(td.clone())["attr", "observation"])
    assert results[0].abs().max() > 0
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_model_of_torchrl_is_explained_under_the_policies_mapper(name: str):
    family = FAMILIES[name]
    torch.manual_seed(3)
    model, td = family.build(), family.td()
    method = LRP(PolicyMapper(), family.target, unhandled="ignore")
    with (
        method.prepare(model) as hooked,
        family.scope(),
        set_exploration_type(ExplorationType.RANDOM),
    ):
        td = hooked(td)
    found = [td[("attr", key) if isinstance(key, str) else ("attr", *key)] for key in family.keys]
    assert all(torch.isfinite(value).all() for value in found)
    assert all(value.any() for value in found)


def test_softmax_is_followed_by_attnlrp_and_constant_in_cplrp():
    net = nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1), nn.LayerNorm(2), nn.GELU())
    shared = {"0": "EpsilonRule", "2": "LayerNormRule", "3": "PassRule"}
    assert rules(AttnLRP(), net) == {**shared, "1": "SoftmaxEpsilonRule"}
    assert rules(CPLRP(), net) == {**shared, "1": "StopRule"}
    assert repr(AttnLRP().functions) == "FunctionRules(attention='gradient', gates='half')"
    assert repr(CPLRP().functions) == "FunctionRules(attention='constant', gates='signal')"
    assert EpsilonPlus().functions is PolicyMapper().functions is None


@every_composite
def test_a_mapper_of_ones_own_goes_before_the_first_layer_and_the_types(name: str):
    mapper = COMPOSITES[name][0]
    own = NameMapper({"0": EpsilonRule(0.5), "10": FlatRule()})
    options: dict[str, Any] = {"low": 0.0, "high": 1.0} if name == "EpsilonGammaBox" else {}
    found = rules(type(mapper)(**options, rule_mapper=own), vgg())
    assert found == {**rules(mapper, vgg()), "0": "EpsilonRule", "10": "FlatRule"}


def test_every_number_goes_to_the_rules_it_is_for():
    own = {"epsilon": 0.5, "stabilizer": 0.25}
    net = nn.Sequential(
        nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1), nn.Linear(1, 1), nn.Bilinear(1, 1, 1)
    )
    shown = {
        type(mapper).__name__: [repr(line.rule) for line in mapper.plan(net).lines]
        for mapper in (
            EpsilonPlusFlat(**own),
            EpsilonGammaBox(-2.0, 3.0, gamma=0.125, **own),
            EpsilonAlpha2Beta1Flat(**own),
            AttnLRP(**own),
        )
    }
    dense = ["EpsilonRule(epsilon=0.5)", "UniformEpsilonRule(epsilon=0.5)"]
    flat = "FlatRule(stabilizer=0.25)"
    assert shown == {
        "EpsilonPlusFlat": [flat, "ZPlusRule(stabilizer=0.25)", *dense],
        "EpsilonGammaBox": [
            "ZBoxRule(stabilizer=0.25, low=-2.0, high=3.0)",
            "GammaRule(stabilizer=0.25, gamma=0.125)",
            *dense,
        ],
        "EpsilonAlpha2Beta1Flat": [
            *(flat, "AlphaBetaRule(stabilizer=0.25, alpha=2.0, beta=1.0)", *dense),
        ],
        "AttnLRP": ["EpsilonRule(epsilon=0.5)"] * 3 + dense[1:],
    }


def test_composites_show_what_was_given_to_them():
    assert repr(EpsilonGammaBox(0.0, 1.0, first="0")) == (
        "EpsilonGammaBox(low=0.0, high=1.0, first='0')"
    )
    assert repr(EpsilonPlusFlat()) == "EpsilonPlusFlat()"


@pytest.mark.parametrize("given", [EpsilonPlusFlat, AttnLRP, PolicyMapper])
def test_a_class_in_place_of_a_composite_is_refused(given: Any):
    with pytest.raises(RuleError, match="An instance is needed where it is a class"):
        LRP(given, "y").prepare(nn.Linear(2, 1), ["x"], ["y"])


def test_wrong_numbers_are_refused_when_a_composite_is_made():
    for make in (
        lambda: EpsilonPlusFlat(epsilon=0),
        lambda: EpsilonGammaBox(1.0, 0.0),
        lambda: EpsilonGammaBox(0.0, 1.0, gamma=-1),
    ):
        with pytest.raises(RuleError):
            make()


def test_extending_a_composite_by_type_is_one_line():
    class Mine(EpsilonPlusFlat):
        def rules_by_type(self) -> dict[type[nn.Module], Rule]:
            return {**super().rules_by_type(), nn.Linear: FlatRule(self.stabilizer)}

    assert rules(Mine(), mlp()) == {
        **{f"{i}": "FlatRule" for i in (0, 2, 4)},
        **{f"{i}": "PassRule" for i in (1, 3)},
    }


# --- the relevance that comes of it ---------------------------------------------------------------

BOX = functools.partial(ref.zbox, low=-2.0, high=2.0)
NUMBERS: dict[str, tuple[RuleMapper, Any, Any, Any]] = {
    "EpsilonPlus": (EpsilonPlus(), ref.epsilon, ref.zplus, None),
    "EpsilonPlusFlat": (EpsilonPlusFlat(), ref.epsilon, ref.zplus, ref.flat),
    "EpsilonGammaBox": (EpsilonGammaBox(-2.0, 2.0), ref.epsilon, ref.gamma, BOX),
    "EpsilonAlpha2Beta1": (EpsilonAlpha2Beta1(), ref.epsilon, ref.alpha_beta, None),
    "EpsilonAlpha2Beta1Flat": (EpsilonAlpha2Beta1Flat(), ref.epsilon, ref.alpha_beta, ref.flat),
    "AttnLRP": (AttnLRP(), ref.epsilon, ref.epsilon, None),
    "CPLRP": (CPLRP(), ref.epsilon, ref.epsilon, None),
    "PolicyMapper": (PolicyMapper(), ref.epsilon, ref.zplus, None),
}
"""Each with its slow references: of dense layers, of convolutions, of the first layer."""

every_number = pytest.mark.parametrize("name", NUMBERS)


def start(net: nn.Module, x: Tensor, name: str) -> Tensor:
    """Relevance of the outputs, none where they are so near zero that only ε would be compared."""
    y = net(x).detach()
    return torch.where(y.abs() < 1e-3, 0.0, grid(y.shape, name))


@every_number
def test_relevance_in_an_mlp_is_that_of_the_papers_formulas_layer_by_layer(name: str):
    mapper, dense, _, first = NUMBERS[name]
    net = made("an mlp", mlp)
    x = grid((3, 4), "mlp x")
    R = start(net, x, "mlp R")
    want = ref.propagate(net, x, R, [first or dense, None, dense, None, dense])
    assert want.abs().max() > 0.01
    assert_close(explain(net, mapper, [x], R)[0][0], want, 1e-8)


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(18, 3), nn.ReLU(), nn.Linear(3, 2)),
    )


@every_number
def test_relevance_in_a_convolutional_net_is_that_of_the_papers_formulas(name: str):
    mapper, dense, conv, first = NUMBERS[name]
    net = made("a vgg", convolutional)
    x = grid((2, 1, 3, 3), "vgg x")
    R = start(net, x, "vgg R")
    want = ref.propagate(net, x, R, [first or conv, None, conv, None, None, dense, None, dense])
    assert want.abs().max() > 0.01
    assert_close(explain(net, mapper, [x], R)[0][0], want, 1e-8)


def shared_out(terms: Sequence[Tensor], R: Tensor) -> list[Tensor]:
    """What each term of a sum gets: in proportion; nothing comes to a sum of zero."""
    total = sum(terms, torch.zeros_like(R))
    return [torch.where(total == 0, 0.0, term * R / total) for term in terms]


@every_number
def test_relevance_in_a_residual_net_is_shared_at_its_functional_sum(name: str):
    mapper, dense, conv, first = NUMBERS[name]
    net = made("a resnet", lambda: resnet(norm=False))
    stem, block, head = net[0], net[2], net[5]
    x = grid((2, 1, 3, 3), "resnet x")
    R = start(net, x, "resnet R")
    with torch.no_grad():
        h = stem(x).clamp(min=0)
        branch = block.conv2(block.conv1(h).clamp(min=0))
        pooled = block(h).mean((2, 3))
    R_pooled = ref.relevance(head, pooled, R, dense)
    # The mean shares by contribution; what stabilises it is left out, and kept small below.
    terms = block(h).detach().flatten(2)
    totals = terms.sum(-1, keepdim=True)
    R_sum = torch.where(totals == 0, 0.0, terms * R_pooled[..., None] / totals).reshape(h.shape)
    to_skip, to_branch = shared_out([h, branch], R_sum)
    inner = [block.conv1, block.relu, block.conv2]
    R_h = to_skip + ref.propagate(inner, h, to_branch, [conv, None, conv])
    want = ref.propagate([stem, nn.ReLU()], x, R_h, [first or conv, None])
    assert want.abs().max() > 0.01
    assert_close(explain(net, mapper, [x], R)[0][0], want, 1e-5)


@pytest.mark.parametrize("mode", ["fold", "affine"])
def test_batch_norm_is_part_of_the_convolution_in_front_or_a_layer_of_its_own(mode: str):
    build = lambda: nn.Sequential(  # noqa: E731
        *(nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1))
    ).eval()
    net = made("normed", build)
    conv, norm = net[0], net[1]
    x = grid((2, 1, 3), "normed x") + 0.125
    R = start(net, x, "normed R")
    merged = nn.Conv1d(1, 2, 2).double()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    merged.weight.data = conv.weight.data * scale.data[:, None, None]
    merged.bias.data = (conv.bias - norm.running_mean).data * scale.data + norm.bias.data
    got = explain(net, EpsilonPlus(batch_norm=mode), [x], R)[0][0]
    if mode == "fold":
        layers = [merged, *list(net)[2:]]
        want = ref.propagate(layers, x, R, [ref.zplus, None, None, ref.epsilon])
    else:
        plain = functools.partial(ref.epsilon, eps=0.0)
        behind = norm(conv(x)).detach().clamp(min=0)
        R_norm = ref.propagate(list(net)[3:], behind, R, [None, ref.epsilon])
        to_conv = ref.relevance(norm, conv(x), R_norm, plain)
        want = ref.relevance(conv, x, to_conv, ref.zplus)
    assert_close(got, want, 1e-6)


class Attention(nn.Module):
    """One head over [B, T, E], its softmax a module or a function."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.softmax = nn.Softmax(-1) if module else None

    def weights(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT
        return F.softmax(scores, -1) if self.softmax is None else self.softmax(scores)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weights(x) @ self.value(x)).flatten(1)


def test_attention_weights_are_constant_in_cplrp_and_not_in_attnlrp():
    x = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(2)).double()  # no zero sums
    nets = [made("attention", lambda module=module: Attention(module)) for module in (True, False)]
    R = start(nets[0], x, "attention R")
    found = [
        [explain(net, m, [x], R)[0][0] for net in nets]
        for m in (CPLRP(1e-12), AttnLRP(1e-12, 1e-12))
    ]
    for as_module, as_function in found:
        torch.testing.assert_close(as_module, as_function)
    # Ali et al. 2022: y_s = Σ_t p_st V x_t, linear in x with p constant.
    p, V, y = nets[0].weights(x).detach(), nets[0].value.weight.detach(), nets[0](x).detach()
    per_y = torch.where(y == 0, 0.0, R / y).reshape(2, 2, 3)
    want = x * torch.einsum("bst,bsv,ve->bte", p, per_y, V)
    assert_close(found[0][0], want, 1e-8)
    assert not torch.allclose(found[1][0], want, rtol=0.05)
    # Achtibat et al. 2024: half of it goes by the values, the other half by the weights.
    by_values = want / 2
    q, k = (layer(x).detach() for layer in (nets[0].query, nets[0].key))
    v = nets[0].value(x).detach()
    R_p = p * torch.einsum("bsv,btv->bst", per_y, v) / 2
    scores = q @ k.mT
    R_scores = scores * (R_p - p * R_p.sum(-1, keepdim=True))
    ratio = torch.where(scores == 0, 0.0, R_scores / scores) / 2
    Q, K = nets[0].query.weight.detach(), nets[0].key.weight.detach()
    by_queries = x * torch.einsum("bst,bte,ei->bsi", ratio, k, Q)
    by_keys = x * torch.einsum("bst,bse,ei->bti", ratio, q, K)
    assert_close(found[1][0], by_values + by_queries + by_keys, 1e-8)
