"""Relevance through recurrent nets, carried backward unit by unit and step by step.

Written from Arras et al. 2017 and 2019: plain Python numbers, one sequence, no tensors, no
gradients. What arrives at a unit is R; nothing is divided by activations that the papers do not
divide by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Vector = list[float]
Share = Callable[[float, float, float, float], tuple[float, float]]
"""From gate, signal, the product's relevance and epsilon to the relevance of gate and signal."""


def stabilised(z: float, eps: float) -> float:
    return z + eps if z >= 0 else z - eps


def all_to_signal(gate: float, signal: float, R: float, eps: float) -> tuple[float, float]:
    return 0.0, R


def half_each(gate: float, signal: float, R: float, eps: float) -> tuple[float, float]:
    return R / 2, R / 2


def in_proportion(gate: float, signal: float, R: float, eps: float) -> tuple[float, float]:
    whole = stabilised(gate + signal, eps)
    return gate / whole * R, signal / whole * R


def in_proportion_of_sizes(gate: float, signal: float, R: float, eps: float) -> tuple[float, float]:
    whole = gate + abs(signal) + eps
    return gate / whole * R, abs(signal) / whole * R


def sigmoid(u: float) -> float:
    return 1 / (1 + math.exp(-u))


@dataclass
class Cell:
    """One layer in one direction: rows of weights, biases (zeros where there are none)."""

    kind: str
    w_x: list[Vector]
    w_h: list[Vector]
    b_x: Vector
    b_h: Vector
    w_r: list[Vector] | None
    share: Share
    eps: float

    @property
    def size(self) -> int:
        """The number of units."""
        return len(self.w_x) // {"LSTM": 4, "GRU": 3}.get(self.kind, 1)

    def forward(self, x: Vector, state: list[Vector]) -> tuple[list[Vector], dict[str, Any]]:
        """The next state, and all that backward needs."""
        from_x = [dot(row, x) + b for row, b in zip(self.w_x, self.b_x, strict=True)]
        from_h = [dot(row, state[0]) + b for row, b in zip(self.w_h, self.b_h, strict=True)]
        u = [a + b for a, b in zip(from_x, from_h, strict=True)]
        n, seen = self.size, {"x": x, "state": state, "u": u}
        if self.kind == "LSTM":
            i, f, o = ([sigmoid(u[k + n * j]) for k in range(n)] for j in (0, 1, 3))
            g = [math.tanh(u[k + 2 * n]) for k in range(n)]
            c = [f[k] * state[1][k] + i[k] * g[k] for k in range(n)]
            t = [math.tanh(value) for value in c]
            m = [o[k] * t[k] for k in range(n)]
            h = m if self.w_r is None else [dot(row, m) for row in self.w_r]
            return [h, c], {**seen, "i": i, "f": f, "g": g, "o": o, "c": c, "t": t, "m": m, "h": h}
        if self.kind == "GRU":
            r, z = ([sigmoid(u[k + n * j]) for k in range(n)] for j in (0, 1))
            q = from_h[2 * n :]
            u_n = [from_x[k + 2 * n] + r[k] * q[k] for k in range(n)]
            y = [math.tanh(value) for value in u_n]
            h = [(1 - z[k]) * y[k] + z[k] * state[0][k] for k in range(n)]
            return [h], {**seen, "r": r, "z": z, "q": q, "u_n": u_n, "n": y, "h": h}
        act = math.tanh if self.kind == "RNN_TANH" else lambda value: max(value, 0.0)
        return [[act(value) for value in u]], seen

    def backward(self, seen: dict[str, Any], R: list[Vector]) -> tuple[Vector, list[Vector]]:
        """From the relevance of the next state to that of the input and the state before."""
        if self.kind == "LSTM":
            return self._lstm(seen, *R)
        if self.kind == "GRU":
            return self._gru(seen, *R)
        return self._linear(seen, R[0])

    def _linear(self, seen: dict[str, Any], R_u: Vector) -> tuple[Vector, list[Vector]]:
        """``u = W x + V h + b`` shares what its units have got."""
        u = seen["u"]
        R_x = contributions(self.w_x, seen["x"], u, R_u, self.eps)
        return R_x, [contributions(self.w_h, seen["state"][0], u, R_u, self.eps)]

    def _lstm(self, seen: dict[str, Any], R_h: Vector, R_c: Vector) -> tuple[Vector, list[Vector]]:
        n, c_before = self.size, seen["state"][1]
        if self.w_r is not None:
            R_h = contributions(self.w_r, seen["m"], seen["h"], R_h, self.eps)
        R_u, R_before = [0.0] * (4 * n), [0.0] * n
        for k in range(n):
            R_o, R_t = self.share(seen["o"][k], seen["t"][k], R_h[k], self.eps)
            R = R_c[k] + R_t  # tanh passes on
            kept, new = seen["f"][k] * c_before[k], seen["i"][k] * seen["g"][k]
            R_kept, R_new = kept / seen["c"][k] * R, new / seen["c"][k] * R
            R_f, R_before[k] = self.share(seen["f"][k], c_before[k], R_kept, self.eps)
            R_i, R_g = self.share(seen["i"][k], seen["g"][k], R_new, self.eps)
            R_u[k], R_u[k + n], R_u[k + 2 * n], R_u[k + 3 * n] = R_i, R_f, R_g, R_o
        R_x, (R_h_before,) = self._linear(seen, R_u)
        return R_x, [R_h_before, R_before]

    def _gru(self, seen: dict[str, Any], R_h: Vector) -> tuple[Vector, list[Vector]]:
        n, h_before = self.size, seen["state"][0]
        R_u, R_x_n, R_q, R_before = [0.0] * (2 * n), [0.0] * n, [0.0] * n, [0.0] * n
        for k in range(n):
            z, r, q, y = (seen[name][k] for name in ("z", "r", "q", "n"))
            new, kept = (1 - z) * y, z * h_before[k]
            R_new, R_kept = new / seen["h"][k] * R_h[k], kept / seen["h"][k] * R_h[k]
            R_closed, R_n = self.share(1 - z, y, R_new, self.eps)
            R_open, R_before[k] = self.share(z, h_before[k], R_kept, self.eps)
            R_p = r * q / stabilised(seen["u_n"][k], self.eps) * R_n
            R_x_n[k] = R_n
            R_u[k], R_q[k] = self.share(r, q, R_p, self.eps)
            R_u[k + n] = R_closed + R_open
        eps, gates, u = self.eps, 2 * n, seen["u"][: 2 * n]
        R_x = added(
            contributions(self.w_x[:gates], seen["x"], u, R_u, eps),
            contributions(self.w_x[gates:], seen["x"], seen["u_n"], R_x_n, eps),
        )
        return R_x, [
            added(
                R_before,
                contributions(self.w_h[:gates], h_before, u, R_u, eps),
                contributions(self.w_h[gates:], h_before, seen["q"], R_q, eps),
            )
        ]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def added(*vectors: Vector) -> Vector:
    return [sum(values) for values in zip(*vectors, strict=True)]


def contributions(weights: Sequence[Vector], x: Vector, z: Vector, R: Vector, eps: float) -> Vector:
    """``R_i = Σ_j x_i w_ji R_j / st(z_j)``."""
    found = [0.0] * len(x)
    for row, z_j, R_j in zip(weights, z, R, strict=True):
        for i, w in enumerate(row):
            found[i] += x[i] * w / stabilised(z_j, eps) * R_j
    return found


def cell_of(module: Any, kind: str, share: Share, eps: float, suffix: str = "") -> Cell:
    """A layer of a torch module: names end in ``suffix``, such as "_l0_reverse"."""

    def read(name: str) -> Any:
        value = getattr(module, name + suffix, None)
        return None if value is None else value.double().tolist()

    w_x, w_h = read("weight_ih"), read("weight_hh")
    nothing = [0.0] * len(w_x)
    b_x, b_h = read("bias_ih") or nothing, read("bias_hh") or nothing
    return Cell(kind, w_x, w_h, b_x, b_h, read("weight_hr"), share, eps)


def relevance(
    module: Any,
    xs: list[Vector],
    states: list[list[Vector]],
    v_out: list[Vector],
    v_states: list[list[Vector]],
    share: Share,
    eps: float,
) -> tuple[list[Vector], list[list[Vector]]]:
    """Relevance of one sequence's inputs ``[T][F]`` and initial states ``[kinds][layers][H]``.

    What is explained is ``Σ v · output + Σ v · final states``, each output having ``v · output``.
    """
    suffixes = ["", "_reverse"] if module.bidirectional else [""]
    runs, data = [], xs
    for layer in range(module.num_layers):
        outputs: list[Vector] = [[] for _ in xs]
        for suffix in suffixes:
            cell = cell_of(module, module.mode, share, eps, f"_l{layer}{suffix}")
            state = [kind[len(runs)] for kind in states]
            order = list(range(len(xs)))[:: -1 if suffix else 1]
            trace, place = [], len(outputs[0])
            for t in order:
                state, seen = cell.forward(data[t], state)
                trace.append(seen)
                outputs[t] = outputs[t] + state[0]
            runs.append((cell, order, trace, state, place))
        data = outputs
    R_data = [[v * y for v, y in zip(*rows, strict=True)] for rows in zip(v_out, data, strict=True)]
    R_states: list[list[Vector]] = [[[] for _ in runs] for _ in states]
    for layer in reversed(range(module.num_layers)):
        below: list[Vector] = []
        for direction in range(len(suffixes)):
            number = layer * len(suffixes) + direction
            cell, order, trace, final, place = runs[number]
            R = [
                [v * y for v, y in zip(v_states[kind][number], final[kind], strict=True)]
                for kind in range(len(states))
            ]
            found: list[Vector] = [[] for _ in xs]
            for t, seen in zip(reversed(order), reversed(trace), strict=True):
                width = len(final[0])
                R[0] = added(R[0], R_data[t][place : place + width])
                found[t], R = cell.backward(seen, R)
            for kind in range(len(states)):
                R_states[kind][number] = R[kind]
            below = [added(*rows) for rows in zip(below, found, strict=True)] if below else found
        R_data = below
    return R_data, R_states
