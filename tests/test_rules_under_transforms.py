"""What torch does with any expression it can do with a rule: half precision, vmap, twice backward.

These tests apply rules to a module's output directly, without the library's way of calling models.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rule_records import RECORDS, SITE_IDS, SITES, Record
from rule_samples import Sample, assert_close, explain, only
from tdhook_like.attribution.lrp import Inputs, Rule
from tdhook_like.hooks.surrogate import Twice

F64 = torch.float64
# A few of each rule's modules are enough where only torch's machinery is at stake.
FEW = [(record, sample) for record in RECORDS for sample in record.samples[::7][:3]]
FEW_IDS = [f"{record.name}-{sample.name}" for record, sample in FEW]


def ruled(module: nn.Module, rule: Rule, xs: Sequence[Tensor]) -> Tensor:
    """The module's output with the rule's gradient."""
    y = module(*xs)
    applied = rule.apply(module, Inputs(tuple(xs)), y)
    return y if applied is None else applied


def gradients(module: nn.Module, rule: Rule, xs: Sequence[Tensor], seed: Tensor) -> list[Tensor]:
    """Relevance per unit of activation at the inputs, ``seed`` at the outputs."""
    leaves = [x.detach().requires_grad_() for x in xs]
    y = ruled(module, rule, leaves)
    if not y.requires_grad:
        return [torch.zeros_like(x) for x in xs]
    found = torch.autograd.grad(y, leaves, seed, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(xs, found, strict=True)]


def smooth(sample: Sample, batch: int = 2) -> tuple[nn.Module, list[Tensor]]:
    """The sample's module and inputs, at points where nothing is zero or equal to anything else."""
    module = sample.module()
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    return module, [torch.randn(batch, *shape, dtype=F64) for shape in sample.shapes]


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("record", "sample"), SITES, ids=SITE_IDS)
def test_in_bfloat16_a_rule_is_right_to_the_two_digits_that_it_holds(
    record: Record, sample: Sample
):
    inputs, module = sample.inputs("non-negative"), sample.module()
    # Of one sign: where large shares cancel, an error is no longer small beside what is left.
    R = record.start(module(*inputs).detach(), sample.name).abs()
    expected = record.reference(module, inputs, R)
    module, xs = sample.module(torch.bfloat16), [x.bfloat16() for x in inputs]
    found, _ = explain(module, only(module, record.rule()), xs, R)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert_close(got, want, 0.02)


# --- vmap -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("record", "sample"), SITES, ids=SITE_IDS)
def test_under_vmap_each_sample_gets_what_it_gets_alone(record: Record, sample: Sample):
    module, inputs = sample.module(), sample.inputs("mixed", batch=3)
    rule = record.rule()

    def alone(*given: Tensor) -> tuple[Tensor, ...]:
        *xs, seed = (value.unsqueeze(0) for value in given)
        y, pull = torch.func.vjp(lambda *leaves: ruled(module, rule, leaves), *xs)
        return tuple(g.squeeze(0) for g in pull(seed.to(y)))

    # A sum of signed copies of the outputs, so that gradients of both signs arrive.
    seed = torch.randn_like(module(*inputs).detach())
    together = torch.func.vmap(alone)(*inputs, seed)
    for i, given in enumerate(zip(*inputs, seed, strict=True)):
        for got, want in zip(together, alone(*given), strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-12)
    for got, want in zip(together, gradients(module, rule, inputs, seed), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("record", "sample"), FEW, ids=FEW_IDS)
def test_many_starts_at_once_are_one_start_after_another(record: Record, sample: Sample):
    module, inputs = sample.module(), sample.inputs("mixed")
    xs = [x.requires_grad_() for x in inputs]
    y = ruled(module, record.rule(), xs)
    if not y.requires_grad:
        assert record.name == "stop"
        return
    seeds = torch.randn(4, *y.shape, dtype=F64)
    together = torch.autograd.grad(y, xs, seeds, is_grads_batched=True, retain_graph=True)
    for i, seed in enumerate(seeds):
        one = torch.autograd.grad(y, xs, seed, retain_graph=True)
        for got, want in zip(together, one, strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-12)


# --- relevance that is differentiated again -------------------------------------------------------


@pytest.mark.parametrize(("record", "sample"), FEW, ids=FEW_IDS)
def test_relevance_has_the_slope_that_finite_differences_find(record: Record, sample: Sample):
    module, xs = smooth(sample)
    rule, y = record.rule(), module(*xs).detach()
    seed, weights = torch.randn_like(y), [torch.randn_like(x) for x in xs]

    def total(found: Sequence[Tensor], at: Sequence[Tensor]) -> Tensor:
        """A number made of all relevance."""
        parts = zip(weights, at, found, strict=True)
        return torch.stack([(w * x * g).sum() for w, x, g in parts]).sum()

    leaves = [x.clone().requires_grad_() for x in xs]
    with Twice() as twice:
        output = ruled(module, rule, leaves)
    twice.relevance = True
    found = torch.autograd.grad(output, leaves, seed, create_graph=True, materialize_grads=True)
    twice.relevance = False
    for got, want in zip(found, gradients(module, rule, xs, seed), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    points = [*leaves, *module.parameters()]
    score = total(found, leaves)
    slopes = torch.autograd.grad(score, points, materialize_grads=True, allow_unused=True)
    places = [*xs, *(parameter.data for parameter in module.parameters())]
    for slope, place in zip(slopes, places, strict=True):
        flat, step = place.view(-1), 1e-6
        for i in range(0, len(flat), 1 + len(flat) // 12):
            kept, ends = flat[i].item(), []
            for value in (kept + step, kept - step):
                flat[i] = value
                ends.append(total(gradients(module, rule, xs, seed), xs))
            flat[i] = kept
            numeric = (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close(slope.reshape(-1)[i], numeric, rtol=1e-5, atol=1e-6)
