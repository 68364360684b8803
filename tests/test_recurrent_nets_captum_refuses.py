"""Recurrent nets, at which captum's DeepLift and LRP fail, against the equations of their cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

import reference_recurrent as recurrent
from tdhook_like import (
    LRP,
    DeepLift,
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    Saliency,
)
from tdhook_like.attribution.lrp import EpsilonRule, SignalTakesAllRule, TypeMapper

N, T, F_IN, H, STEPS, EPSILON, DOUBLE = 3, 4, 2, 3, 40, 0.25, torch.float64


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1e-3, "there is nothing to compare"
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class Recurrent(nn.Module):
    """A recurrent net, whose output is a tuple, and a head on its last step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(F_IN, H, batch_first=True)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        out, _ = self.rnn(x)
        return self.head(out[:, -1]), out

    def by_hand(self, x: Tensor) -> Tensor:
        """The head's outputs for one sequence ``[T, F]``, from the equations of its cell."""
        p = dict(self.rnn.named_parameters())
        h = c = x.new_zeros(H)
        for row in x:
            a = (p["weight_ih_l0"] @ row + p["bias_ih_l0"]).unflatten(0, (-1, H))
            b = (p["weight_hh_l0"] @ h + p["bias_hh_l0"]).unflatten(0, (-1, H))
            if isinstance(self.rnn, nn.LSTM):
                i, f, o = (1 / (1 + (-(a[k] + b[k])).exp()) for k in (0, 1, 3))
                c = f * c + i * (a[2] + b[2]).tanh()
                h = o * c.tanh()
            else:
                r, z = (1 / (1 + (-(a[k] + b[k])).exp()) for k in (0, 1))
                h = (1 - z) * (a[2] + r * b[2]).tanh() + z * h
        return self.head.weight @ h + self.head.bias


class Sequences:
    """A recurrent net, sequences, and slopes by autograd of the equations."""

    def __init__(self, kind: str) -> None:
        self.net = Recurrent(kind).double()
        self.x, self.base = (torch.randn(N, T, F_IN, dtype=DOUBLE) for _ in range(2))

    def explained(self, method: Any) -> TensorDictBase:
        with method.prepare(self.net, ["x"], ["y", "out"]) as hooked:
            return hooked(TensorDict({"x": self.x.clone()}, [N]))

    def slope(self, x: Tensor, output: int = 1) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.net.by_hand(x)[output], x)[0]

    def change(self, output: int = 1) -> Tensor:
        with torch.no_grad():
            ends = zip(self.x, self.base, strict=True)
            return torch.stack(
                [(self.net.by_hand(x) - self.net.by_hand(b))[output] for x, b in ends]
            )


every_cell = pytest.mark.parametrize("kind", ["LSTM", "GRU"])


@every_cell
def test_recurrent_nets_have_the_gradients_of_their_equations(kind):
    case = Sequences(kind)
    slopes = torch.stack([case.slope(x) for x in case.x])
    close(case.explained(Saliency(("y", 1)))["attr", "x"], slopes.abs())
    close(case.explained(InputXGradient(("y", 1)))["attr", "x"], case.x * slopes)
    method = IntegratedGradients(
        ("y", 1), baselines=case.base, method="riemann_middle", n_steps=STEPS, gap_tolerance=None
    )
    places = [(k + 0.5) / STEPS for k in range(STEPS)]
    expected = [
        (x - b) * torch.stack([case.slope(b + p * (x - b)) for p in places]).mean(0)
        for x, b in zip(case.x, case.base, strict=True)
    ]
    close(case.explained(method)["attr", "x"], torch.stack(expected))


@every_cell
def test_steps_of_a_recurrent_net_are_ablated_one_by_one(kind):
    case = Sequences(kind)
    method = FeatureAblation(
        ("y", 1), baselines=case.base, masks={"x": torch.arange(T).unsqueeze(1)}, divide=False
    )
    found, expected = case.explained(method)["attr", "x"], torch.zeros(N, T, F_IN, dtype=DOUBLE)
    for n in range(N):
        for t in range(T):
            changed = case.x[n].clone()
            changed[t] = case.base[n, t]
            with torch.no_grad():
                lost = case.net.by_hand(case.x[n]) - case.net.by_hand(changed)
            expected[n, t] = lost[1]
    close(found, expected)


@every_cell
def test_deeplift_of_a_recurrent_net_makes_the_whole_change_which_slopes_do_not(kind):
    case = Sequences(kind)
    td = case.explained(DeepLift(("y", 1), baselines=case.base))
    assert (td["attr", "x"].sum((1, 2)) - case.change()).abs().max() < 1e-10
    assert td["attr_gap"].abs().max() < 1e-10
    slopes = torch.stack([case.slope(x) for x in case.x])
    assert (((case.x - case.base) * slopes).sum((1, 2)) - case.change()).abs().max() > 1e-2


@every_cell
def test_relevance_of_a_recurrent_net_is_that_of_its_cells_equations(kind):
    case = Sequences(kind)
    mapper = TypeMapper(
        {getattr(nn, kind): SignalTakesAllRule(EPSILON), nn.Linear: EpsilonRule(EPSILON)}
    )
    found = case.explained(LRP(mapper, ("y", 1)))
    for n in range(N):
        y, h = found["y"][n, 1].item(), found["out"][n, -1].tolist()
        share = y / (y + EPSILON * (1 if y >= 0 else -1))
        v_out = [[0.0] * H] * (T - 1) + [[w * share for w in case.net.head.weight[1].tolist()]]
        assert len(h) == H
        kinds = 2 if kind == "LSTM" else 1
        nothing = [[[0.0] * H] for _ in range(kinds)]
        expected, _ = recurrent.relevance(
            *(case.net.rnn, case.x[n].tolist(), nothing, v_out, nothing),
            *(recurrent.all_to_signal, EPSILON),
        )
        close(found["attr", "x"][n], torch.tensor(expected, dtype=DOUBLE))
