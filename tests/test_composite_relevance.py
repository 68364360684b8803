"""The relevance that comes of composites, against the papers' formulas layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference_lrp as ref
from composite_nets import mlp, resnet
from rule_samples import assert_close, explain, grid, made
from tdhook_like.attribution.lrp import EpsilonPlus, RuleMapper
from tdhook_like.attribution.lrp.mappers.composites import (
    CPLRP,
    AttnLRP,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlusFlat,
)
from tdhook_like.attribution.lrp.mappers.policies import PolicyMapper

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
