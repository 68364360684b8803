"""LRP on torchrl's networks: what a slow derivation gives, nothing unaccounted for or unhandled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    MLP,
    ActorValueOperator,
    DecisionTransformerInferenceWrapper,
    DistributionalQValueActor,
    NoisyLinear,
    OneHotCategorical,
    OnlineDTActor,
    ProbabilisticActor,
    QValueActor,
    TanhDelta,
    ValueOperator,
)
from torchrl.modules.models import DTActor

import reference_policies as slow
from rule_records import RECORDS, Record
from rule_samples import on_dense
from tdhook_like import LRP, EpsilonPlus, HookContext
from tdhook_like.attribution.lrp import CPLRP, AttnLRP, PolicyMapper
from torchrl_records import FAMILIES, Family
from torchrl_records.nets import HIDDEN, actor, dueling_cnn, dueling_mlp, mlp, trunk

F64 = torch.float64
B, OBS, ACTIONS = 3, 4, 3

ON_DENSE = [r for r in RECORDS if "linear" in {s.name for s in r.samples}]
either = pytest.mark.parametrize
mappers = either("mapper", [EpsilonPlus(), PolicyMapper()], ids=lambda m: type(m).__name__)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# --- every family ---------------------------------------------------------------------------------


def run(family: Family, method: LRP) -> tuple[HookContext, TensorDict, Any]:
    """One call in float64, as collectors call policies: the context, the outputs, the ledger."""
    torch.manual_seed(3)
    model, td = family.build().double(), family.td()
    td = td.apply(lambda t: t.double() if t.is_floating_point() else t)
    context = method.prepare(model)
    with context as hooked, family.scope(), set_exploration_type(ExplorationType.RANDOM):
        td = hooked(td)
        ledger = hooked.ledger
    return context, td, ledger


@either("name", FAMILIES)
def test_the_mapper_for_policies_leaves_no_function_of_any_family_without_a_rule(name: str):
    context, _, _ = run(FAMILIES[name], LRP(PolicyMapper(), FAMILIES[name].target))
    assert not context.unhandled


@either("name", FAMILIES)
def test_the_default_leaves_nothing_but_recurrent_layers_without_a_rule(name: str):
    method = LRP(target=FAMILIES[name].target, unhandled="ignore")
    context, _, _ = run(FAMILIES[name], method)
    assert set(context.unhandled) <= {"lstm", "gru"}


@either("name", ["LSTMModule, step by step", "LSTMModule over time with resets"])
def test_recurrent_layers_are_what_the_mapper_for_images_reports(name: str):
    method = LRP(EpsilonPlus(), FAMILIES[name].target, unhandled="ignore")
    context, _, _ = run(FAMILIES[name], method)
    assert set(context.unhandled) == {"lstm"}


AN_OUTPUT = [
    name
    for name, family in FAMILIES.items()
    if isinstance(family.target, str | tuple)
    or (family.target is None and family.default.startswith("Output"))
]
ONE_BY_ONE = [name for name in AN_OUTPUT if "over time" not in name]


@either("name", ONE_BY_ONE)
def test_relevance_of_an_output_arrives_at_the_inputs_or_is_absorbed_by_a_rule(name: str):
    family = FAMILIES[name]
    _, td, ledger = run(family, LRP(PolicyMapper(), family.target, ledger=1e-6))
    arrived = torch.zeros(ledger.start.shape[:-1], dtype=F64)
    for key in family.keys:
        found = td[("attr", key) if isinstance(key, str) else ("attr", *key)]
        arrived = arrived + found.reshape(*arrived.shape, -1).sum(-1)
    close(arrived, (ledger.start - ledger.absorbed())[..., 0])


OVER_TIME = [name for name in FAMILIES if "over time" in name]


@either("name", OVER_TIME)
def test_over_time_relevance_goes_to_other_steps_and_none_of_it_is_lost_on_the_way(name: str):
    family = FAMILIES[name]
    _, _, ledger = run(family, LRP(PolicyMapper(), family.target, ledger=True))
    close(ledger.gap.sum(), torch.zeros((), dtype=F64), 1e-6)


@either("name", ["OneHotCategorical", "Categorical"])
def test_what_a_log_probability_absorbs_as_a_target_is_the_policys_entropy(name: str):
    # log p_a is a logit against the log of a sum, which the target itself computes: from it,
    # logit_a - Σ p_i logit_i reaches the logits, and Σ p_i log p_i is what is left of the start.
    _, td, ledger = run(FAMILIES[name], LRP(PolicyMapper(), ledger=True))
    log_p = td["logits"].log_softmax(-1)
    close(ledger.absorbed("target")[..., 0], (log_p.exp() * log_p).sum(-1), 1e-6)
    close(ledger.gap, torch.zeros_like(ledger.gap), 1e-6)


# --- noisy layers, dueling heads, distributions over atoms ----------------------------------------


@either("mode", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC], ids=["noisy", "without"])
@either("record", ON_DENSE, ids=lambda r: r.name)
def test_every_rule_reads_a_noisy_layer_as_a_plain_one_with_the_weights_of_the_call(
    record: Record, mode: ExplorationType
):
    net = MLP(
        *(OBS, ACTIONS),
        depth=1,
        num_cells=HIDDEN,
        layer_class=NoisyLinear,
        activation_class=nn.ReLU,
    ).double()
    policy = QValueActor(net, in_keys=["observation"], action_space="one_hot")
    x, method = torch.randn(B, OBS, dtype=F64), LRP(on_dense(record.rule()), ("action_value", 1))
    with method.prepare(policy) as hooked, set_exploration_type(mode):
        layers = slow.plain_layers(net)
        td = hooked(TensorDict({"observation": x}, [B]))
    y = slow.output(layers, x)
    close(td["action_value"], y)
    expected = slow.relevance(layers, x, slow.at_entry(y, 1), dense=record.reference)
    close(td["attr", "observation"], expected)


DUELING = {
    "dense": (lambda: dueling_mlp(OBS), (OBS,)),
    "of pixels": (lambda: dueling_cnn(3), (2, 7, 7)),
}


@either("kind", DUELING)
@mappers
def test_a_dueling_head_shares_by_what_value_and_advantages_add_to_the_q_value(
    mapper: Any, kind: str
):
    build, shape = DUELING[kind]
    net: Any = build().double()
    x = torch.randn(B, *shape, dtype=F64)
    policy = QValueActor(net, in_keys=["observation"], action_space="categorical")
    with LRP(mapper, ledger=1e-6).prepare(policy) as hooked:
        td = hooked(TensorDict({"observation": x}, [B]))
    features, advantage, value = map(slow.plain_layers, (net.features, net.advantage, net.value))
    expected = slow.dueling(features, advantage, value, x, td["action_value"].argmax(-1))
    close(td["attr", "observation"], expected)


@mappers
def test_over_atoms_a_logit_counts_by_how_far_its_atom_lies_from_the_expected_value(mapper: Any):
    # Bellemare et al. 2017: Q = Σ p_k z_k.
    support = torch.linspace(-2.0, 3.0, 5, dtype=F64)
    shape: Any = (5, ACTIONS)
    net = MLP(OBS, shape, depth=1, num_cells=HIDDEN, activation_class=nn.ReLU).double()
    policy = DistributionalQValueActor(
        net, in_keys=["observation"], support=support, action_space="one_hot"
    )
    x = torch.randn(B, OBS, dtype=F64)
    with LRP(mapper).prepare(policy) as hooked:
        td = hooked(TensorDict({"observation": x}, [B]))
        assert not hooked.context.unhandled
    layers = [layer for layer in slow.plain_layers(net) if not isinstance(layer, nn.Unflatten)]
    expected = slow.distributional(layers, x, support, td["action"].long().argmax(-1))
    close(td["attr", "observation"], expected)


@mappers
def test_policy_and_value_on_one_trunk_are_each_explained_by_trunk_and_own_head(mapper: Any):
    head, value = mlp(HIDDEN, ACTIONS), mlp(HIDDEN, 1)
    body: Any = trunk()
    model = ActorValueOperator(
        body,
        actor(
            TensorDictModule(head, in_keys=["hidden"], out_keys=["logits"]),
            OneHotCategorical,
            "logits",
        ),
        ValueOperator(value, in_keys=["hidden"]),
    ).double()
    x = torch.randn(B, 6, dtype=F64)
    targets = {"value": "state_value", "logit": ("logits", 2)}
    with LRP(mapper, targets, ledger=1e-6).prepare(model) as hooked:
        td = hooked(TensorDict({"observation": x}, [B]))
    for name, net, entry in (("value", value, 0), ("logit", head, 2)):
        layers = slow.plain_layers(nn.Sequential(body.module, net))
        R = slow.at_entry(slow.output(layers, x), entry)
        close(td["attr", name, "observation"], slow.relevance(layers, x, R))


# --- the decision transformer ---------------------------------------------------------------------

STEPS, CONFIG = 3, {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12, "n_positions": 16}
KEYS: Any = ["observation", "action", "return_to_go"]


def transformer(kind: Any = DTActor, attention: str = "sdpa") -> Any:
    config = {**CONFIG, "activation": "relu", "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    net = kind(state_dim=OBS, action_dim=2, transformer_config=config).double().eval()
    inner: Any = net.transformer.transformer
    inner.config._attn_implementation = attention
    for name, parameter in net.named_parameters():  # as trained: biases and scales of all sizes
        parameter.data += 0.2 * torch.randn_like(parameter)
        assert parameter.dtype == F64, name
    return net


def episodes() -> TensorDict:
    return TensorDict(
        {
            "observation": torch.randn(2, STEPS, OBS),
            "action": torch.rand(2, STEPS, 2),
            "return_to_go": torch.randn(2, STEPS, 1),
        },
        [2],
    ).double()


@either("attention", ["sdpa", "eager"])
@either("fixed", [False, True], ids=["AttnLRP", "CP-LRP"])
def test_in_a_decision_transformer_relevance_is_what_the_papers_rules_give_step_by_step(
    fixed: bool, attention: str
):
    net, td = transformer(attention=attention), episodes()
    module = TensorDictModule(net, in_keys=KEYS, out_keys=["param"])
    mapper = CPLRP() if fixed else AttnLRP()
    with LRP(mapper, ("param", 1, 0)).prepare(module) as hooked:
        td = hooked(td)
        assert not hooked.context.unhandled
    inputs = tuple(td[key] for key in KEYS)
    expected = slow.decision_transformer(net, inputs, 1, 0, fixed=fixed)
    for key, want in zip(KEYS, expected, strict=True):
        assert want.any()
        close(td["attr", key], want, 1e-4)
        assert not td["attr", key][:, 2:].any()  # what comes later has no part
    assert td["attr", "action"][:, 0].any()
    assert not td["attr", "action"][:, 1].any()  # of its own step, neither has the action


@either("mapper", [AttnLRP(), CPLRP(), PolicyMapper()], ids=lambda m: type(m).__name__)
@either("kind", [DTActor, OnlineDTActor], ids=lambda k: k.__name__)
def test_a_decision_transformer_has_no_function_without_a_rule_and_its_ledger_closes(
    kind: Any, mapper: Any
):
    net, td = transformer(kind), episodes()
    outs: Any = ["param"] if kind is DTActor else ["loc", "scale"]
    module = TensorDictModule(net, in_keys=KEYS, out_keys=outs)
    targets: dict[str, tuple[NestedKey, int, int]] = {key: (key, 2, 1) for key in outs}
    context = LRP(mapper, targets, ledger=True).prepare(module)
    with warnings.catch_warnings(), context as hooked:
        warnings.simplefilter("error")
        td = hooked(td)
        ledger = hooked.ledger
    assert not context.unhandled
    assert ledger is not None
    assert_sums_up(ledger.gap, ledger.start)


def assert_sums_up(gap: Tensor, start: Tensor) -> None:
    """Over all samples: those stand in another order inside of a transformer."""
    close(gap.sum(0), torch.zeros_like(gap.sum(0)), 1e-6 * float(start.abs().max()))


def test_the_wrapper_that_acts_with_a_decision_transformer_is_explained_through_it():
    net = transformer()
    policy: Callable[..., Any] = ProbabilisticActor(
        TensorDictModule(net, in_keys=KEYS, out_keys=["param"]),
        in_keys=["param"],
        distribution_class=TanhDelta,
        distribution_kwargs={"low": -1.0},
    )
    wrapper = DecisionTransformerInferenceWrapper(policy, inference_context=2).eval()
    td = episodes()
    given = tuple(td[key].clone() for key in KEYS)
    with LRP(AttnLRP(), ("param", -1, 0)).prepare(wrapper) as hooked:
        td = hooked(td)
    # It hides from the net what lies further back than its context, and moves actions up by a step.
    observation, action, to_go = (tensor.clone() for tensor in given)
    for tensor, hidden in ((observation, 1), (action, 2), (to_go, 1)):
        tensor[:, :hidden] = 0
    moved = torch.cat([action[:, 1:], torch.zeros_like(action[:, :1])], 1)
    expected = slow.decision_transformer(net, (observation, moved, to_go), 2, 0, fixed=False)
    expected[1] = torch.cat([torch.zeros_like(action[:, :1]), expected[1][:, :-1]], 1)
    for key, want in zip(KEYS, expected, strict=True):
        assert want[:, -1].any()
        close(td["attr", key], want, 1e-4)
