"""Which module gets which rule: mappers by type, and what a composite gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import NoisyLinear

import reference_lrp as ref
from mapped_nets import mlp, net_of
from rule_samples import Sample, assert_close, explain, grid
from tdhook_like import LRP
from tdhook_like.attribution.lrp import (
    BaseRuleMapper,
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    IgnoreRule,
    LayerNormRule,
    PassRule,
    Rule,
    SoftmaxEpsilonRule,
    StopRule,
    UniformEpsilonRule,
    WSquareRule,
    ZPlusRule,
)
from tdhook_like.attribution.lrp.batchnorm import BatchNormRule
from tdhook_like.errors import RuleError
from tdhook_like.targets import Each

# --- by type --------------------------------------------------------------------------------------

WITHOUT_WEIGHTS = [
    *((kind(), PassRule) for kind in (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU)),
    *((kind(), PassRule) for kind in (nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh, nn.Mish)),
    *((kind(2), BatchNormRule) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
    *((kind(2), LayerNormRule) for kind in (nn.LayerNorm, nn.RMSNorm)),
    *((kind(), IgnoreRule) for kind in (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d)),
    *((kind(2), IgnoreRule) for kind in (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool2d)),
    *((kind(2), EpsilonRule) for kind in (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)),
    (nn.Softmax(-1), SoftmaxEpsilonRule),
]
WITH_WEIGHTS = [
    (nn.Linear(2, 2), EpsilonRule),
    (NoisyLinear(2, 2), EpsilonRule),
    (nn.Bilinear(2, 2, 2), UniformEpsilonRule),
    *((kind(1, 1, 1), ZPlusRule) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    *((kind(1, 1, 1), ZPlusRule) for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d)),
]
OTHERS = [nn.Sequential(), nn.LSTM(2, 2), nn.Embedding(2, 2), nn.MultiheadAttention(2, 1)]


@pytest.mark.parametrize(
    ("module", "kind"), WITHOUT_WEIGHTS, ids=[type(m).__name__ for m, _ in WITHOUT_WEIGHTS]
)
def test_both_mappers_treat_a_module_without_weights_alike(module: nn.Module, kind: type[Rule]):
    for mapper in (BaseRuleMapper(), EpsilonPlus()):
        assert type(mapper("any", module)) is kind


@pytest.mark.parametrize(
    ("module", "kind"), WITH_WEIGHTS, ids=[type(m).__name__ for m, _ in WITH_WEIGHTS]
)
def test_layers_with_weights_are_epsilon_plus_alone(module: nn.Module, kind: type[Rule]):
    assert BaseRuleMapper()("any", module) is None
    assert type(EpsilonPlus()("any", module)) is kind


@pytest.mark.parametrize("module", OTHERS, ids=lambda m: type(m).__name__)
def test_containers_and_what_is_not_known_keep_their_own_gradient(module: nn.Module):
    assert BaseRuleMapper()("any", module) is EpsilonPlus()("any", module) is None


def test_a_subclass_of_a_layer_gets_the_layers_rule():
    class Mine(nn.Conv2d):
        pass

    assert isinstance(EpsilonPlus()("x", Mine(1, 1, 1)), ZPlusRule)


def test_epsilon_is_for_dense_layers_and_the_stabiliser_for_all_others():
    mapper = EpsilonPlus(0.5, 0.25)
    assert repr(mapper("", nn.Linear(1, 1))) == "EpsilonRule(epsilon=0.5)"
    assert repr(mapper("", nn.Conv1d(1, 1, 1))) == "ZPlusRule(stabilizer=0.25)"
    assert repr(mapper("", nn.AvgPool1d(2))) == "EpsilonRule(epsilon=0.25)"
    assert repr(mapper("", nn.Softmax(-1))) == "SoftmaxEpsilonRule(epsilon=0.25)"
    assert repr(BaseRuleMapper(0.125)("", nn.AvgPool1d(2))) == "EpsilonRule(epsilon=0.125)"


@pytest.mark.parametrize("kind", [BaseRuleMapper, EpsilonPlus])
def test_batch_norm_is_folded_affine_or_passed_as_asked_for(kind: Any):
    norm = nn.BatchNorm2d(2)
    rules = [kind(batch_norm=mode)("", norm) for mode in ("fold", "affine", "pass")]
    assert [repr(rule) for rule in rules] == [
        *("BatchNormRule(fold=True)", "BatchNormRule(fold=False)", "PassRule()"),
    ]
    with pytest.raises(RuleError, match="'fold', 'affine' or 'pass', got 'merge'"):
        kind(batch_norm="merge")


def test_one_rule_object_serves_all_modules_of_a_kind():
    mapper = EpsilonPlus()
    assert mapper("a", nn.Linear(1, 1)) is mapper("b", nn.Linear(2, 2))


@pytest.mark.parametrize("kind", [BaseRuleMapper, EpsilonPlus])
def test_the_given_mapper_is_asked_first_and_its_none_means_the_types_rule(kind: Any):
    asked: list[tuple[str, nn.Module]] = []
    layer, other, flat = nn.ReLU(), nn.Tanh(), FlatRule()

    def first(name: str, module: nn.Module) -> Rule | None:
        asked.append((name, module))
        return flat if name == "mine" else None

    mapper = kind(rule_mapper=first)
    assert mapper("mine", layer) is flat
    assert isinstance(mapper("other", other), PassRule)
    assert asked == [("mine", layer), ("other", other)]


def test_mappers_nest_and_the_innermost_is_asked_first():
    stop, flat = StopRule(), FlatRule()
    inner = EpsilonPlus(rule_mapper=lambda name, m: stop if name == "a" else None)
    outer = BaseRuleMapper(rule_mapper=inner)
    assert outer("a", nn.Linear(1, 1)) is stop
    assert isinstance(outer("b", nn.Linear(1, 1)), EpsilonRule)
    outermost = EpsilonPlus(rule_mapper=BaseRuleMapper(rule_mapper=lambda name, m: flat))
    assert outermost("a", nn.ReLU()) is flat


def test_a_mapper_by_inheritance_extends_the_types():
    class Squares(EpsilonPlus):
        def by_type(self, module: nn.Module) -> Rule | None:
            return WSquareRule() if isinstance(module, nn.Linear) else super().by_type(module)

    assert isinstance(Squares()("", nn.Linear(1, 1)), WSquareRule)
    assert isinstance(Squares()("", nn.Conv1d(1, 1, 1)), ZPlusRule)


@pytest.mark.parametrize("given", [3, "epsilon", nn.Linear, EpsilonRule()])
def test_what_is_no_mapper_is_refused(given: Any):
    with pytest.raises(RuleError, match="mapper"):
        LRP(given, "y").prepare(nn.Linear(2, 1), ["x"], ["y"])
    with pytest.raises(RuleError, match="EpsilonPlus: rule_mapper must be callable"):
        EpsilonPlus(rule_mapper=given)


@pytest.mark.parametrize(
    ("mapper", "words"),
    [
        (EpsilonPlus, "instance"),
        (lambda module: None, "two arguments"),
        (lambda name, module: EpsilonRule, "EpsilonRule"),
        (lambda name, module: "epsilon", "'epsilon' for module ''"),
    ],
    ids=["a class", "one argument", "rules' class", "a string"],
)
def test_a_mapper_of_another_kind_is_refused_when_it_is_bound(mapper: Any, words: str):
    with pytest.raises(RuleError, match=words):
        LRP(mapper, "y").prepare(nn.Linear(2, 1), ["x"], ["y"])


# --- what a composite gives -----------------------------------------------------------------------


def test_epsilon_plus_is_epsilon_on_dense_layers_and_z_plus_on_convolutions():
    net = net_of(
        *(lambda: nn.Conv2d(1, 2, 2), nn.ReLU, lambda: nn.Conv2d(2, 2, 2), nn.ReLU),
        *(nn.Flatten, lambda: nn.Linear(8, 4), nn.ReLU, lambda: nn.Linear(4, 2)),
    )
    x, R = grid((2, 1, 4, 4), "x"), grid((2, 2), "R")
    rules = [ref.zplus, None, ref.zplus, None, None, ref.epsilon, None, ref.epsilon]
    assert_close(explain(net, EpsilonPlus(), [x], R)[0][0], ref.propagate(net, x, R, rules), 1e-9)


def test_epsilon_plus_is_the_default():
    net, x, R = mlp(), grid((2, 4), "x"), grid((2, 2), "R")
    td = TensorDict({"x": x}, [2])
    found = []
    for method in (LRP(target=("y", 0)), LRP(EpsilonPlus(), ("y", 0))):
        with method.prepare(net, ["x"], ["y"]) as hooked:
            found.append(hooked(td.clone())["attr", "x"])
    assert found[0].equal(found[1]) and R.any()


@pytest.mark.parametrize(
    "behind",
    [nn.Sigmoid, nn.Softplus, lambda: nn.BatchNorm1d(5).eval(), nn.Tanh, nn.Dropout, nn.ELU],
    ids=["sigmoid", "softplus", "batch norm", "tanh", "dropout", "elu"],
)
def test_activations_in_a_row_conserve_relevance_also_at_dead_units(behind):
    net = net_of(
        *(lambda: nn.Linear(4, 5, bias=False), nn.ReLU, behind),
        lambda: nn.Linear(5, 2, bias=False),
    ).eval()
    x = torch.randn(6, 4).double()
    assert (net[:2](x) == 0).any()
    y = net(x).detach()
    td = TensorDict({"x": x}, [6])
    # From the outputs' own values, and from others.
    for start in ("value", torch.where(y.abs() < 1e-3, 0.0, grid((6, 2), "R"))):
        # Folded into the layer in front, a batch norm's bias would absorb what is not asked for here.
        mapper = EpsilonPlus(1e-12, 1e-12, batch_norm="pass")
        method = LRP(mapper, Each("y"), start=start)
        with method.prepare(net, ["x"], ["y"]) as hooked:
            found = hooked(td.clone())["attr", "x"]
        total = y if isinstance(start, str) else start
        torch.testing.assert_close(found.sum(-1), total, atol=1e-8, rtol=1e-8)


def test_a_product_of_two_attributed_inputs_is_shared_not_doubled():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Bilinear(3, 4, 2, bias=False)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.both(a, b)

    net = Sample("bilinear", Net, ()).module()
    R = grid((2, 2), "R")
    to_a, to_b = explain(net, EpsilonPlus(1e-12), [grid((2, 3), "a"), grid((2, 4), "b")], R)[0]
    torch.testing.assert_close(to_a.sum(1), R.sum(1) / 2)
    torch.testing.assert_close(to_b.sum(1), R.sum(1) / 2)
