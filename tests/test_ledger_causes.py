"""What the ledger says was absorbed, and by which cause: by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ledger_models import F64, MODELS, B, Calling, by_path, made, run
from tdhook_like import EpsilonPlus
from tdhook_like.attribution.lrp import EpsilonRule, SoftmaxEpsilonRule, StopRule, ZPlusRule
from tdhook_like.attribution.lrp.ledger.accounts import CAUSES
from tdhook_like.errors import ConservationError


def st(z: Tensor, epsilon: float) -> Tensor:
    """``z + ε·sign(z)`` with ``sign(0) = +1``."""
    return z + epsilon * torch.where(z < 0, -1.0, 1.0)


def test_epsilons_share_of_bias_and_stabiliser_is_what_the_formula_says():
    # Bach et al. 2015, eq. 58: R_i = Σ_j x_i w_ij R_j / st(y_j); so b_j R_j / st(y_j) goes to the bias
    # and ε·sign(y_j) R_j / st(y_j) to the stabiliser.
    epsilon, x = 0.3, torch.randn(B, 4, dtype=F64)
    net: Any = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    _, ledger = run(net, EpsilonPlus(epsilon=epsilon), x, ledger=True)
    y1 = x @ net[0].weight.T + net[0].bias
    h = y1.clamp(min=0)
    y2 = h @ net[2].weight[0] + net[2].bias[0]
    R2 = y2
    bias2, lost2 = net[2].bias[0] * R2 / st(y2, epsilon), R2 * (1 - y2 / st(y2, epsilon))
    R1 = h * net[2].weight[0] * (R2 / st(y2, epsilon)).unsqueeze(-1)
    R1 = torch.where(y1 > 0, R1, 0)
    bias1 = (net[0].bias * R1 / st(y1, epsilon)).sum(-1)
    lost1 = (R1 * (1 - y1 / st(y1, epsilon))).sum(-1)
    for path, bias, lost in (("0", bias1, lost1), ("2", bias2, lost2)):
        (row,) = ledger.at(path)
        torch.testing.assert_close(row.absorbed["bias"][:, 0], bias)
        torch.testing.assert_close(row.absorbed["stabiliser"][:, 0], lost)
    torch.testing.assert_close(ledger.at("2")[0].into[:, 0], R1.sum(-1))


def test_z_pluss_share_of_bias_and_stabiliser_is_what_the_formula_says():
    # z⁺: only positive parts of contributions and bias take part, p_j = Σ_i (x_i w_ij)⁺ + b_j⁺.
    epsilon, x = 0.2, torch.randn(B, 4, dtype=F64)
    layer = nn.Linear(4, 3).double()
    _, ledger = run(layer, lambda path, module: ZPlusRule(epsilon), x, ("y", 2), ledger=True)
    p = (x * layer.weight[2]).clamp(min=0).sum(-1) + layer.bias[2].clamp(min=0)
    y = x @ layer.weight[2] + layer.bias[2]
    (row,) = ledger.rows
    bias = layer.bias[2].clamp(min=0) * y / (p + epsilon)
    torch.testing.assert_close(row.absorbed.get("bias", torch.zeros(B, 1, dtype=F64))[:, 0], bias)
    torch.testing.assert_close(row.absorbed["stabiliser"][:, 0], y * epsilon / (p + epsilon))


def test_a_softmax_absorbs_what_its_jacobian_says():
    # AttnLRP, eq. 13: R_i = x_i (R_i − s_i Σ_j R_j) for R in units of the outputs' relevance.
    x = torch.randn(B, 4, dtype=F64)
    want = torch.zeros(B, dtype=F64)
    for b in range(B):
        s = x[b].softmax(-1)
        jacobian = torch.diag(s) - torch.outer(s, s)
        want[b] = s[1] - (x[b] * jacobian[1]).sum()
    net = nn.Softmax(-1)
    for model, mapper in (
        (net, lambda path, module: SoftmaxEpsilonRule(1e-12)),
        (net, lambda path, module: None),
        (nn.Sequential(), None),
    ):
        if mapper is None:
            model, mapper = Calling(lambda x: x.softmax(-1)), EpsilonPlus()
        _, ledger = run(model, mapper, x, ("y", 1), ledger=True)
        torch.testing.assert_close(ledger.absorbed("softmax")[:, 0], want, rtol=1e-8, atol=1e-8)


def test_a_constant_summand_a_mask_and_a_functional_bias_absorb_their_parts():
    w, b, pos = (torch.randn(*shape, dtype=F64) for shape in ((3, 4), (3,), (3,)))
    x = torch.randn(B, 4, dtype=F64)

    def plain(x: Tensor) -> Tensor:
        h = F.linear(x, w, b) + pos
        return torch.where(torch.tensor([True, False, True]), h, 7.0).sum(-1, keepdim=True)

    _, ledger = run(Calling(plain), EpsilonPlus(), x, "y", ledger=True)
    want = {"linear": (b[0] + b[2]), "add": pos[0] + pos[2], "where": torch.tensor(7.0, dtype=F64)}
    for name, value in want.items():
        (row,) = ledger.at(name)
        (absorbed,) = row.absorbed.values()
        torch.testing.assert_close(absorbed[:, 0], value.expand(B))
    assert ledger.causes == ("bias", "constant")


def test_what_arrives_at_a_stop_is_absorbed_there_and_layers_behind_it_absorb_their_own_part():
    epsilon, x = 0.5, torch.randn(B, 4, dtype=F64)
    net: Any = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    mapper = by_path(**{"1": StopRule(), "2": EpsilonRule(epsilon)})
    td, ledger = run(net, mapper, x, ledger=True)
    y = td["y"][:, 0]
    h = torch.tanh(net[0](x))
    arrives = (h * net[2].weight[0] * (y / st(y, epsilon)).unsqueeze(-1)).sum(-1)
    torch.testing.assert_close(ledger.absorbed("stop")[:, 0], arrives)
    torch.testing.assert_close(ledger.absorbed("bias")[:, 0], net[2].bias[0] * y / st(y, epsilon))
    assert not td["attr", "x"].any() and not ledger.arrived.any()


def test_rules_of_ones_own_are_told_by_the_name_they_give_or_as_the_rules_doing():
    _, ledger = run(*made("rules of one's own"), ledger=True)
    (halved,), (thirds,) = ledger.at("1"), ledger.at("3")
    torch.testing.assert_close(halved.absorbed["rule"], halved.out / 2)
    torch.testing.assert_close(thirds.absorbed["two thirds"], thirds.out * 2 / 3)


def test_an_operation_without_a_rule_is_in_the_ledger_and_what_it_loses_is_refused():
    x = torch.rand(B, 3, dtype=F64) + 0.5
    net = Calling(lambda x: torch.atan2(x, torch.ones_like(x)).sum(-1, keepdim=True))
    _, ledger = run(net, EpsilonPlus(), x, "y", ledger=True)
    # By the gradient, x / (1 + x²) of each arctan(x) is given on.
    lost = (torch.atan(x) - x / (1 + x**2)).sum(-1)
    torch.testing.assert_close(ledger.absorbed("no rule")[:, 0], lost)
    assert ledger.gap.abs().max() < 1e-12
    with pytest.raises(ConservationError, match=r"no rule .*allow= more causes"):
        ledger.check(1e-6)
    ledger.check(1e-6, allow=["no rule"])
    with pytest.raises(ConservationError, match="no rule"):
        run(net, EpsilonPlus(), x, "y", ledger=1e-6)


def test_a_target_that_is_no_sum_of_outputs_absorbs_what_it_does_to_them():
    # log p_a = z_a − log Σ exp z: by its gradient, z_a − Σ p_i z_i arrives at the logits.
    x, net = torch.randn(B, 4, dtype=F64), nn.Linear(4, 3, bias=False).double()
    td, ledger = run(
        net, EpsilonPlus(epsilon=1e-12), x, lambda td: td["y"].log_softmax(-1)[..., 0], ledger=True
    )
    z = td["y"]
    want = z.log_softmax(-1)[:, 0] - (z[:, 0] - (z.softmax(-1) * z).sum(-1))
    torch.testing.assert_close(ledger.absorbed("target")[:, 0], want, rtol=1e-8, atol=1e-8)
    assert ledger.rows[-1].where == "(target)"


def test_rows_of_a_container_tell_only_what_its_inside_does_not():
    net, mapper, x = made("nested")
    _, ledger = run(net, mapper, x, ledger=True)
    (block,) = ledger.at("block")
    # By the container's ε alone; what biases inside absorb is told inside.
    assert set(block.absorbed) == {"stabiliser"}
    assert "bias" in ledger.at("block.0")[0].absorbed and "bias" in ledger.at("block.2")[0].absorbed
    assert len(ledger.at("again")) == 2
    bare = lambda path, module: EpsilonRule(0.1) if path == "block" else None  # noqa: E731
    _, ledger = run(net, bare, x, ledger=True)
    assert set(ledger.at("block")[0].absorbed) == {"stabiliser", "no rule"}


def test_a_merged_normalisation_shares_one_row_with_its_layer():
    conv: Any = nn.Conv1d(1, 2, 2).double()
    bn: Any = nn.BatchNorm1d(2).double()
    net: Any = nn.Sequential(conv, bn, nn.Flatten(), nn.Linear(6, 1, bias=False).double()).eval()
    with torch.no_grad():
        for p in (*bn.parameters(), bn.running_mean, bn.running_var):
            p.copy_(torch.rand_like(p) + 0.5)
    x, epsilon = torch.randn(B, 1, 4, dtype=F64), 0.1
    mapper = by_path(**{"0": EpsilonRule(epsilon), "3": EpsilonRule(1e-14)})
    td, ledger = run(net, mapper, x, "y", ledger=True)
    (row,) = ledger.at("0 + 1")
    assert row.kind == "Conv1d + BatchNorm1d" and not ledger.at("0") and not ledger.at("1")
    y, y_bn = td["y"][:, 0], bn(conv(x))
    R = y_bn.flatten(1) * net[3].weight[0] * (y / st(y, 1e-14)).unsqueeze(-1)
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    b = (conv.bias - bn.running_mean) * scale + bn.bias
    share = R.reshape(y_bn.shape) / st(y_bn, epsilon)
    torch.testing.assert_close(row.absorbed["bias"][:, 0], (b[:, None] * share).sum((1, 2)))
    lost = (epsilon * y_bn.sign() * share).sum((1, 2))
    torch.testing.assert_close(row.absorbed["stabiliser"][:, 0], lost)


def test_every_cause_that_the_library_names_is_explained():
    named: set[str] = set()
    for name in MODELS:
        _, ledger = run(*made(name), ledger=True)
        named |= set(ledger.causes)
    assert named - {"two thirds", "biases and stabiliser"} <= set(CAUSES)
    assert {"bias", "stabiliser", "constant", "softmax", "stop", "rule", "no rule"} <= named
