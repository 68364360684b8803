"""Each rule against its slow reference, alone and in stacks, through the public road."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

import reference_lrp as ref
from generated_models import Case, layers, rectifier_cases
from pristine import bits
from rule_records import (
    AFFINE_RULES,
    BUT_BIAS,
    NOTHING,
    RECORDS,
    SITE_IDS,
    SITES,
    WRONG_IDS,
    WRONG_SITES,
    Record,
)
from rule_samples import MatMul, Product, Sample, Sum, assert_close, explain, grid, made, only
from tdhook_like import LRP, TdhookLikeError
from tdhook_like.attribution import lrp
from tdhook_like.attribution.lrp import (
    AlphaBetaRule,
    BaseRuleMapper,
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    GammaRule,
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
from tdhook_like.attribution.lrp.rules import masks, picking, pooling, rectifiers, stabilizer
from tdhook_like.errors import RuleError
from tdhook_like.targets import Each

F64, F32 = torch.float64, torch.float32
TOLERANCE = {F64: 1e-10, F32: 1e-5}
IDS = [record.name for record in RECORDS]
CONSERVING = [site for site in SITES if site[0].conserves != NOTHING]
CONSERVING_IDS = [f"{record.name}-{sample.name}" for record, sample in CONSERVING]

# --- one rule, one module -------------------------------------------------------------------------


@pytest.mark.parametrize("signs", ["mixed", "non-negative"])
@pytest.mark.parametrize(("record", "sample"), SITES, ids=SITE_IDS)
def test_a_rule_gives_what_its_slow_reference_gives(record: Record, sample: Sample, signs):
    inputs, module = sample.inputs(signs), sample.module()
    R = record.start(module(*inputs).detach(), sample.name)
    expected = record.reference(module, inputs, R)
    for dtype, tolerance in TOLERANCE.items():
        module = sample.module(dtype)
        xs = [x.to(dtype) for x in inputs]
        with torch.no_grad():
            plain = module(*xs)
        found, y = explain(module, only(module, record.rule()), xs, R)
        assert bits(y) == bits(plain)
        for got, want in zip(found, expected, strict=True):
            assert got.dtype == dtype
            assert_close(got, want, tolerance)


@pytest.mark.parametrize("record", RECORDS, ids=IDS)
def test_each_output_apart_gets_its_start_and_the_parts_add_up(record: Record):
    sample = record.samples[0]
    module, inputs = sample.module(), sample.inputs("mixed")
    y = module(*inputs).detach()
    R = record.start(y, sample.name)
    keys = [f"x{i}" for i in range(len(inputs))]
    td = TensorDict(dict(zip(keys, inputs, strict=True)), [len(y)])
    method = LRP(only(module, record.rule()), target=Each("y"), start=R)
    with method.prepare(module, keys, ["y"]) as hooked:
        td = hooked(td)
    expected = record.reference(module, inputs, R)
    for key, x, want in zip(keys, inputs, expected, strict=True):
        parts = td["attr", key]
        assert parts.shape == (len(y), y[0].numel(), *x.shape[1:])
        assert_close(parts.sum(1), want, 1e-10)
    alone = torch.zeros_like(R)
    alone[:, -1] = R[:, -1]
    for key, want in zip(keys, record.reference(module, inputs, alone), strict=True):
        assert_close(td["attr", key][:, -1], want, 1e-10)


def test_starting_from_one_divides_by_the_outputs_value():
    x, layer = grid((3, 4), "x"), Sample("layer", lambda: nn.Linear(4, 1), ()).module()
    td = TensorDict({"x": x}, [3])
    for start, R in (("value", layer(x)), ("one", torch.ones(3, 1)), (torch.tensor(2.5), None)):
        with LRP(only(layer, ZPlusRule()), "y", start=start).prepare(layer, ["x"], ["y"]) as hooked:
            found = hooked(td.clone())["attr", "x"]
        R = torch.full((3, 1), 2.5, dtype=F64) if R is None else R
        assert_close(found, ref.relevance(layer, x, R, ref.zplus), 1e-10)


def test_a_fixed_read_out_module_behind_the_layer_starts_it_as_well():
    layer = Sample("conv", lambda: nn.Conv1d(1, 2, 3), ()).module()
    read_out = Sample("read", lambda: nn.Linear(8, 1, bias=False), ()).module()
    net, x = nn.Sequential(layer, nn.Flatten(), read_out), grid((2, 1, 6), "x")
    td = TensorDict({"x": x}, [2])
    with LRP(only(layer, ZPlusRule()), "y").prepare(net, ["x"], ["y"]) as hooked:
        found = hooked(td)["attr", "x"]
    R = layer(x).detach() * read_out.weight.detach().reshape(2, 4)
    assert_close(found, ref.relevance(layer, x, R, ref.zplus), 1e-10)


@pytest.mark.parametrize("record", RECORDS, ids=IDS)
def test_zero_inputs_get_relevance_from_the_rules_that_say_so_and_no_others(record: Record):
    sample = record.samples[0]
    module, inputs = sample.module(), [torch.zeros_like(x) for x in sample.inputs("mixed")]
    y = module(*inputs).detach()
    R = record.start(y, sample.name)
    found = explain(module, only(module, record.rule()), inputs, R)[0]
    for got, want in zip(found, record.reference(module, inputs, R), strict=True):
        assert_close(got, want, 1e-10)
        assert bool((got.abs() > 1e-6).any()) == record.feeds_zeros


@pytest.mark.parametrize(("record", "sample"), CONSERVING, ids=CONSERVING_IDS)
def test_a_rule_conserves_what_its_record_says(record: Record, sample: Sample):
    module, inputs = sample.module(), sample.inputs("mixed")
    if record.conserves == BUT_BIAS and getattr(module, "bias", None) is not None:
        module.bias.data.zero_()
    y = module(*inputs).detach()
    R = record.start(y, sample.name)
    if record.shares is not None:
        R = torch.where(record.reached(module, inputs[0]).reshape(y.shape), R, 0.0)
    assert R.any()
    found = explain(module, only(module, record.rule(1e-13)), inputs, R)[0]
    total = torch.stack([x.flatten(1).sum(1) for x in found]).sum(0)
    torch.testing.assert_close(total, R.flatten(1).sum(1), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "sample",
    [
        Sample("layer norm", lambda: nn.LayerNorm(3, elementwise_affine=False), ((3,),)),
        Sample("rms norm", lambda: nn.RMSNorm(3, elementwise_affine=False), ((3,),)),
        Sample("difference to the mean", lambda: nn.Linear(3, 3, bias=False), ((3,),)),
    ],
    ids=lambda sample: sample.name,
)
def test_an_output_that_cancels_to_zero_amplifies_no_more_than_the_stabiliser_allows(sample):
    net = nn.Sequential(sample.module(), nn.Linear(3, 2, dtype=F64))
    if isinstance(net[0], nn.Linear):
        net[0].weight.data = torch.eye(3, dtype=F64) - 1 / 3
    x = torch.tensor([[-1.0, 0.0, 1.0]], dtype=F64)
    rules = {"0": lrp.EpsilonRule() if isinstance(net[0], nn.Linear) else lrp.LayerNormRule()}
    rules["1"] = FlatRule()
    for precision in (F64, F32):
        net, x = net.to(precision), x.to(precision)
        found = explain(net, lambda name, m: rules.get(name), [x], torch.ones(1, 2))[0][0]
        assert found.isfinite().all() and found.abs().max() < 10 / ref.EPSILON


# --- modules in stacks ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", AFFINE_RULES)
@pytest.mark.parametrize("case", ["image", "sequence", "vector"])
def test_a_stack_of_ruled_layers_is_what_its_layers_are_one_after_another(name, case):
    rule, reference = AFFINE_RULES[name]
    sample = Sample(
        f"stack {case}",
        {
            "image": lambda: nn.Sequential(
                *(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 2, stride=2), nn.ReLU()),
                *(nn.Flatten(), nn.Linear(2, 3)),
            ),
            "sequence": lambda: nn.Sequential(
                *(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten()),
                *(nn.Linear(12, 4, bias=False), nn.Dropout(), nn.ReLU(), nn.Linear(4, 2)),
            ).eval(),
            "vector": lambda: nn.Sequential(
                *(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)),
            ),
        }[case],
        ({"image": (1, 4, 4), "sequence": (2, 4), "vector": (4,)}[case],),
    )
    net, (x,) = sample.module(), sample.inputs("mixed")
    R = grid(net(x).shape, "R") + 0.125
    mapper = BaseRuleMapper(
        rule_mapper=lambda name, module: rule if hasattr(module, "weight") else None
    )
    rules = [reference if hasattr(layer, "weight") else None for layer in net]
    expected = ref.propagate(list(net), x, R, rules)
    assert_close(explain(net, mapper, [x], R)[0][0], expected, 1e-9)
    net, x = net.float(), x.float()
    assert_close(explain(net, mapper, [x], R)[0][0], expected, 1e-4)


@pytest.mark.parametrize(
    ("first", "reference", "options"),
    [
        (ZBoxRule(-1.5, 1.5), ref.zbox, {"low": -1.5, "high": 1.5}),
        (FlatRule(), ref.flat, {}),
        (WSquareRule(), ref.wsquare, {}),
    ],
    ids=["z-box", "flat", "w-square"],
)
def test_a_rule_for_the_input_layer_goes_with_other_rules_behind_it(first, reference, options):
    net = made(
        "mixed",
        lambda: nn.Sequential(nn.Conv1d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)),
    )
    x, R = grid((2, 1, 5), "x"), grid((2, 2), "R")
    mapper = EpsilonPlus(rule_mapper=lambda name, m: first if name == "0" else None)
    hidden = net[0](x).detach()
    behind = ref.propagate(list(net)[1:], hidden, R, [None, None, ref.epsilon])
    want = ref.relevance(net[0], x, behind.reshape(hidden.shape), reference, **options)
    assert_close(explain(net, mapper, [x], R)[0][0], want, 1e-9)


@settings(max_examples=30)
@given(rectifier_cases(), st.sampled_from(sorted(AFFINE_RULES)))
def test_any_rectifier_network_is_propagated_layer_by_layer(case: Case, name: str):
    rule, reference = AFFINE_RULES[name]
    mapper = BaseRuleMapper(rule_mapper=lambda _, m: rule if hasattr(m, "weight") else None)
    x = case.td["observation"]
    with LRP(mapper, (case.target[0], case.target[1])).prepare(case.module) as hooked:
        td = hooked(case.td.clone())
    stack = layers(case)
    R = torch.zeros_like(td[case.target[0]])
    R[..., case.target[1]] = case.number(td)
    rules = [reference if hasattr(layer, "weight") else None for layer in stack]
    assert_close(td["attr", "observation"], ref.propagate(stack, x, R, rules), 1e-7)


# --- what a rule is made with ---------------------------------------------------------------------

SIGNATURES = {
    "ParamModifier": "(modify_fn=None, select_fn=None)",
    "RemovableRuleHandle": "(rule, module)",
    "EpsilonRule": "(epsilon=1e-06)",
    "UniformEpsilonRule": "(epsilon=1e-06)",
    "PassRule": "()",
    "IgnoreRule": "()",
    "WSquareRule": "(stabilizer=1e-06)",
    "FlatRule": "(stabilizer=1e-06)",
    "UniformRule": "()",
    "StopRule": "()",
    "AlphaBetaRule": "(alpha=2.0, beta=1.0, stabilizer=1e-06)",
    "SoftmaxEpsilonRule": "(epsilon=1e-06)",
    "LayerNormRule": "()",
    "PseudoIdentityRule": "(stabilizer=1e-06)",
    "AHQKVRule": "()",
    "ZPlusRule": "(stabilizer=1e-06)",
    "BaseRuleMapper": "(stabilizer=1e-06, rule_mapper=None)",
    "EpsilonPlus": "(epsilon=1e-06, stabilizer=1e-06, rule_mapper=None)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_constructors_take_the_arguments_that_users_of_the_peers_know(name):
    kind = getattr(lrp, name)
    found = inspect.signature(kind)
    # What goes by keyword alone came later: it has a default, and takes no one's place.
    later = [p for p in found.parameters.values() if p.kind == p.KEYWORD_ONLY]
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values() if p not in later]
    assert all(p.default is not p.empty for p in later)
    assert str(inspect.Signature(bare)) == SIGNATURES[name]
    assert name in lrp.__all__


@pytest.mark.parametrize("record", RECORDS, ids=IDS)
def test_a_rule_prints_as_the_call_that_makes_it(record: Record):
    rule = record.rule()
    shown = repr(rule)
    assert shown.startswith(record.shown)
    if record.name == "modified":
        assert " at 0x" not in shown
        return
    parts = (lrp, masks, picking, pooling, rectifiers, stabilizer)
    known = {name: value for part in parts for name, value in vars(part).items()}
    known |= {"tensor": torch.tensor, "torch": torch}
    again = eval(shown, known)
    assert repr(again) == shown and type(again) is type(rule)


@pytest.mark.parametrize(
    "make",
    [
        *(EpsilonRule, lrp.UniformEpsilonRule, lrp.SoftmaxEpsilonRule, PseudoIdentityRule),
        *(WSquareRule, FlatRule, ZPlusRule),
        *(lambda s: AlphaBetaRule(stabilizer=s), lambda s: GammaRule(stabilizer=s)),
        *(lambda s: ZBoxRule(stabilizer=s), lambda s: ModifiedRule(ParamModifier(), s)),
        *(EpsilonPlus, lambda s: EpsilonPlus(stabilizer=s), BaseRuleMapper),
    ],
)
@pytest.mark.parametrize("value", [0.0, -1e-6, float("nan"), float("inf"), "small", None, True])
def test_a_stabiliser_that_is_no_positive_number_is_refused(make, value):
    with pytest.raises(RuleError, match="finite number above 0"):
        make(value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AlphaBetaRule(2.0, 0.5), "alpha - beta must be 1"),
        (lambda: AlphaBetaRule(0.5, -0.5), "not be negative"),
        (lambda: AlphaBetaRule(float("nan"), 1.0), "must be 1"),
        (lambda: AlphaBetaRule("2", 1.0), "numbers"),  # pyright: ignore
        (lambda: GammaRule(-0.1), "at least 0"),
        (lambda: GammaRule(float("nan")), "at least 0"),
        (lambda: GammaRule("much"), "at least 0"),  # pyright: ignore
        (lambda: ZBoxRule(1.0, 0.0), "not be above high"),
        (lambda: ZBoxRule(torch.zeros(2), torch.tensor([1.0, -1.0])), "not be above high"),
        (lambda: ZBoxRule(torch.zeros(2), torch.ones(3)), "do not go together"),
        (lambda: ZBoxRule("black", "white"), "do not go together"),  # pyright: ignore
        (lambda: ZBoxRule(float("nan"), 1.0), "low"),
        (lambda: ModifiedRule(lambda name, p: p), "ParamModifier"),  # pyright: ignore
    ],
)
def test_other_arguments_that_make_no_rule_are_refused(make, words):
    with pytest.raises(RuleError, match=words):
        make()


def test_bounds_that_do_not_fit_the_input_are_refused_with_their_shapes():
    layer = nn.Linear(4, 2)
    rule = ZBoxRule(torch.zeros(3), torch.ones(3))
    with pytest.raises(RuleError, match=r"broadcast to an input of shape \(2, 4\)"):
        explain(layer, only(layer, rule), [torch.randn(2, 4)], torch.ones(2, 2))


@pytest.mark.parametrize(("record", "sample"), WRONG_SITES, ids=WRONG_IDS)
def test_a_rule_on_a_module_that_it_cannot_treat_is_refused_with_the_path(record, sample):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = sample.module()

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.part(*inputs)

    net = Net()
    inputs = sample.inputs("mixed")
    y = net(*inputs)
    with pytest.raises(RuleError, match="part") as caught:
        explain(net, only(net.part, record.rule()), inputs, torch.ones_like(y))
    assert isinstance(caught.value, TdhookLikeError)
    assert type(record.rule()).__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "sample"),
    [
        (rule, sample)
        for rule in (PassRule(), PseudoIdentityRule(), ZPlusRule(), FlatRule())
        for sample in (
            Sample("sum", Sum, ((3,), (3,))),
            Sample("matrix product", MatMul, ((2, 3), (3, 2))),
        )
    ],
    ids=str,
)
def test_a_rule_for_one_input_is_refused_where_there_are_two(rule: Rule, sample: Sample):
    net, inputs = sample.module(), sample.inputs("mixed")
    with pytest.raises(RuleError, match=type(rule).__name__):
        explain(net, only(net, rule), inputs, torch.ones_like(net(*inputs)))


def test_an_operand_that_is_not_attributed_gets_no_share():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.product, self.gate = Product(), nn.Parameter(grid((3,), "gate"))

        def forward(self, x: Tensor) -> Tensor:
            return self.product(x, self.gate.detach())

    net, x = Gated(), grid((2, 3), "x")
    R = grid((2, 3), "R")
    for rule in (UniformRule(), lrp.UniformEpsilonRule(1e-13)):
        got = explain(net, only(net.product, rule), [x], torch.where(net(x) == 0, 0.0, R))[0][0]
        torch.testing.assert_close(got, torch.where(net(x) == 0, 0.0, R))
