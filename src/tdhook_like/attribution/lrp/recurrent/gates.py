"""What one step of a recurrent cell is made of, each part as its surrogate.

A step is linear maps, activations, sums, and products of a *gate* (between 0 and 1) and a *signal*.
Every part gives the value that the cell computes and the gradient of its rule, so that the next step
starts from true values. Values alone are computed from constants: no graph is built to be dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdhook_like.attribution.lrp.rules.stabilizer import Stabilizer, Stabilizing
from tdhook_like.hooks.surrogate import attach, constant, nonzero, quotient, ratio

__all__ = ["STEPS", "Gates", "Shares", "Weights", "stable_ratio"]

Shares = tuple[Tensor | float, Tensor | float]
State = tuple[Tensor, ...]


class Gates:
    """The parts of a cell under one gate rule.

    Args:
        epsilon: Added to the size of a linear map's result where it is divided by; or a stabiliser.
        shares: From gate and signal, without graphs, to the shares of their product's relevance that
            each of them gets.

    >>> u, s = torch.tensor([0.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    >>> product = Gates(1e-6, lambda gate, signal: (0.0, 1.0)).product(u, s)
    >>> product, torch.autograd.grad(product, [u, s], allow_unused=True)
    (tensor([1.], grad_fn=<MulBackward0>), (None, tensor([0.5000])))
    """

    def __init__(self, epsilon: Stabilizing, shares: Callable[[Tensor, Tensor], Shares]) -> None:
        self.epsilon = epsilon
        self.shares = shares

    def linear(self, z: Tensor) -> Tensor:
        """The result of a linear map, whose relevance its terms share: ``z · G(z / st(z))``."""
        return attach(z, z * stable_ratio(z, z, self.epsilon), fresh=True)

    def activation(self, z: Tensor, y: Tensor) -> Tensor:
        """``y``, an activation of a linear map's result ``z`` that passes relevance on.

        ``z · G(y / st(z))``: the activation gives all it gets to z, and z shares it among its terms.
        """
        return attach(y, z * stable_ratio(y, z, self.epsilon), fresh=True)

    def passed(self, x: Tensor, y: Tensor) -> Tensor:
        """``y``, an activation of a sum ``x`` that passes relevance on: ``x · G(y / x)``."""
        return attach(y, x * quotient(nonzero(y), nonzero(x)), fresh=True)

    def product(self, u: Tensor, signal: Tensor) -> Tensor:
        """The gate ``σ(u)`` times ``signal``, with relevance shared between the two."""
        gate, fixed = constant(u).sigmoid(), constant(signal)
        to_gate, to_signal = self.shares(gate, fixed)
        if isinstance(to_gate, float) and to_gate == 0:
            return gate * signal
        shared = self.activation(u, gate) * (fixed * to_gate) + signal * (gate * to_signal)
        return attach(gate * fixed, shared, fresh=True)


def stable_ratio(y: Tensor, z: Tensor, epsilon: Stabilizing) -> Tensor:
    """``nonzero(y) / st(z)`` by a number or a stabiliser; no graph, same shape.

    >>> stable_ratio(torch.tensor([2.0]), torch.tensor([4.0]), 1e-6)
    tensor([0.5000])
    """
    if isinstance(epsilon, Stabilizer):
        return quotient(nonzero(y), epsilon(z))
    return ratio(y, z, epsilon)


class Weights(NamedTuple):
    """One layer's parameters, in one direction; biases and projection may be missing.

    Attributes:
        w_ih: ``[chunks · H, F]``, reads the input.
        w_hh: ``[chunks · H, H]``, reads the hidden state.
        b_ih: ``[chunks · H]``.
        b_hh: ``[chunks · H]``.
        w_hr: ``[P, H]``, projects an LSTM's hidden state.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


def lstm_step(gates: Gates, x: Tensor, state: State, weights: Weights) -> State:
    """One step of an LSTM, from ``x = W_ih x_t + b_ih`` ``[B, 4H]`` and ``(h, c)`` to the next."""
    h, c = state
    i, f, g, o = (x + F.linear(h, weights.w_hh, weights.b_hh)).chunk(4, -1)
    c = gates.product(f, c) + gates.product(i, gates.activation(g, constant(g).tanh()))
    h = gates.product(o, gates.passed(c, constant(c).tanh()))
    if weights.w_hr is not None:
        h = gates.linear(F.linear(h, weights.w_hr))
    return h, c


def gru_step(gates: Gates, x: Tensor, state: State, weights: Weights) -> State:
    """One step of a GRU, from ``x = W_ih x_t + b_ih`` ``[B, 3H]`` and ``(h,)`` to the next."""
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, weights.w_hh, weights.b_hh).chunk(3, -1)
    z = x_z + h_z
    n = x_n + gates.product(x_r + h_r, gates.linear(h_n))
    n = gates.activation(n, constant(n).tanh())
    return (gates.product(-z, n) + gates.product(z, h),)  # 1 - σ(z) = σ(-z)


def rnn_step(
    function: Callable[[Tensor], Tensor], gates: Gates, x: Tensor, state: State, weights: Weights
) -> State:
    """One step of a plain recurrent net, from ``x = W_ih x_t + b_ih`` ``[B, H]`` and ``(h,)``."""
    u = x + F.linear(state[0], weights.w_hh, weights.b_hh)
    return (gates.activation(u, function(constant(u))),)


STEPS: dict[str, Callable[[Gates, Tensor, State, Weights], State]] = {
    "LSTM": lstm_step,
    "GRU": gru_step,
    "RNN_TANH": partial(rnn_step, torch.tanh),
    "RNN_RELU": partial(rnn_step, torch.relu),
}
"""By what ``nn.RNNBase`` calls its mode."""
