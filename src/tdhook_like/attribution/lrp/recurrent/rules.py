"""Rules for recurrent modules: who gets the relevance of a product of a gate and a signal.

Arras et al. 2017 and 2019 treat the LSTM; a GRU and a plain recurrent net are made of the same
parts, so the same three statements cover them:

* a linear map ``u = W x + V h + b`` shares by contribution, with the epsilon rule,
* an activation passes relevance on, a sum shares in proportion to its terms,
* a product of a gate and a signal is shared as the rule says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import is_tensor_collection
from torch import Tensor, nn

from tdhook_like.attribution.lrp.recurrent.gates import Gates, Shares, stable_ratio
from tdhook_like.attribution.lrp.recurrent.unrolled import cell, cell_kind, sequence
from tdhook_like.attribution.lrp.rules.rule import Inputs, Rule, is_float
from tdhook_like.attribution.lrp.rules.stabilizer import Stabilizing, checked
from tdhook_like.errors import RuleError, listed
from tdhook_like.hooks.structure import leaves
from tdhook_like.hooks.surrogate import attach

__all__ = [
    "HalfRule",
    "ProportionalRule",
    "RecurrentRule",
    "SignalTakesAllRule",
    "recurrent_part",
]


class RecurrentRule(Rule):
    """Relevance through ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells, step by step.

    The module is written out from its parameters; every step's states and inputs get relevance,
    initial states too. Layers, directions, projections, packed sequences and torchrl's cells written
    in Python are known. On torchrl's ``LSTMModule`` and ``GRUModule`` it works with every back end;
    on the module inside them, only with those that call it (not ``"scan"``).

    With the gates' and the candidate's linear maps ``u``, ``st(u) = u + ε·sign(u)``:

    * LSTM: ``c′ = σ(u_f)·c + σ(u_i)·tanh(u_g)``, ``h′ = σ(u_o)·tanh(c′)`` (then its projection),
    * GRU: ``u_n = W x + b + σ(u_r)·(V h + d)``, ``h′ = σ(−u_z)·tanh(u_n) + σ(u_z)·h``,
    * RNN: ``h′ = tanh(u)`` or ``relu(u)``.

    A term ``t`` of ``u`` gets ``t · R_u / st(u)``, a term of a sum ``c′``, ``h′`` gets
    ``t · R / c′``; tanh and σ pass relevance on; a product ``p = gate · signal`` gives
    :meth:`shares` of ``R_p`` to its operands. Conserves what biases and ε do not absorb.

    Source: Arras et al. 2017, "weighted connections" and "multiplicative interactions"; Arras et al.
    2019, which compares rules for the latter.

    Args:
        epsilon: Added to the size of every denominator, in units of a linear map's result; or a
            :class:`Stabilizer`.

    Raises:
        RuleError: If epsilon is neither a finite number above zero nor a stabiliser.
    """

    feeds_zeros = False
    fresh = False
    absorbs = "biases and stabiliser"

    def __init__(self, epsilon: Stabilizing = 1e-6) -> None:
        self.epsilon = checked("epsilon", epsilon, type(self).__name__)

    def shares(self, gate: Tensor, signal: Tensor) -> Shares:
        """Which shares of the product's relevance its operands get: (gate's, signal's).

        Args:
            gate: Between 0 and 1; without a graph.
            signal: Of the gate's shape; without a graph.
        """
        raise RuleError(f"{type(self).__name__} must override shares(gate, signal).")

    def check(self, module: nn.Module) -> str | None:
        if cell_kind(module) is not None or recurrent_part(module) is not None:
            return None
        return (
            "it reads the gates of nn.LSTM, nn.GRU, nn.RNN, their cells, or torchrl's LSTMModule and "
            "GRUModule, and this is none of them. Use EpsilonRule, or put it on the modules inside."
        )

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        reason = self.check(module)
        if reason:
            raise RuleError(f"{self!r} cannot sit on {type(module).__name__}: {reason}")
        gates = Gates(self.epsilon, self.shares)
        x = inputs[0] if inputs else inputs.kwargs.get("input")
        hx = inputs[1] if len(inputs) > 1 else inputs.kwargs.get("hx")
        mask = inputs[2] if len(inputs) > 2 else inputs.kwargs.get("mask")
        if isinstance(module, nn.RNNCellBase):
            found = cell(gates, module, x, hx)  # pyright: ignore[reportArgumentType]
        else:
            assert isinstance(module, nn.RNNBase)
            self._check_dropout(module)
            found = sequence(gates, module, x, hx, mask)
        if type(module).__module__ != nn.LSTM.__module__:
            self._check_values(module, found, output)
        return found

    def apply(
        self,
        module: nn.Module,
        inputs: Inputs,
        output: Any,
        watch: Callable[[Any], None] | None = None,
    ) -> Any:
        inside = recurrent_part(module)
        if inside is None or not is_tensor_collection(output):
            return super().apply(module, inputs, output, watch)
        read, written = (list(getattr(module, name)) for name in ("in_keys", "out_keys"))
        both = [key for key in read if key in written]
        if both or not inputs or not is_tensor_collection(inputs[0]):
            raise RuleError(
                f"{self!r} on {type(module).__name__} reads in_keys once the module has run: "
                + (f"{listed(both)} is overwritten by then. " if both else "it was given none. ")
                + f"Give other out_keys, or put the rule on {inside!r} inside and use "
                "recurrent_backend='pad'."
            )
        twin: Any = _twin(module, inside, self)
        found = twin.forward(inputs[0].select(*read, strict=False))
        values, held = ([td.get(key) for key in written] for td in (output, found))
        self._check_values(module, held, values)
        for key, value, surrogate in zip(written, values, held, strict=True):
            output.set(key, attach(value, surrogate))
        return output

    def _check_dropout(self, module: nn.RNNBase) -> None:
        if module.training and module.dropout > 0 and module.num_layers > 1:
            raise RuleError(
                f"{self!r} writes {type(module).__name__} out step by step and cannot know what its "
                f"dropout of {module.dropout} between layers dropped. Put the model into evaluation "
                "mode with eval(), or use hooked.observe(td), which does."
            )

    def _check_values(self, module: nn.Module, found: Any, output: Any) -> None:
        """Raises where a class that is not torch's own computes something else than torch's does."""
        values, others = ([v for v in leaves(of) if is_float(v)] for of in (output, found))
        if [v.shape for v in values] != [v.shape for v in others]:
            return  # what puts them together says so
        for value, other in zip(values, others, strict=True):
            if not _readable(value):
                return
            tolerance = 10 * torch.finfo(value.dtype).eps ** 0.5
            other = other.detach().to(value.dtype)
            if not torch.allclose(value.detach(), other, tolerance, tolerance):
                raise RuleError(
                    f"{self!r}: {type(module).__name__} does not compute what torch's own module with "
                    "these parameters does. Put rules on the modules inside, or write one for it."
                )


class SignalTakesAllRule(RecurrentRule):
    """A product's relevance goes to the signal; gates are constants.

    ``R_gate = 0``, ``R_signal = R_p``. The one to begin with: it came out best in the comparison of
    Arras et al. 2019.

    Source: Arras et al. 2017, "multiplicative interactions"; Arras et al. 2019, "LRP-all".

    Args:
        epsilon: Added to the size of every denominator, in units of a linear map's result; or a
            :class:`Stabilizer`.

    >>> lstm = nn.LSTM(3, 4, batch_first=True)
    >>> with SignalTakesAllRule().register(lstm):
    ...     pass  # explain a model that holds it
    """

    def shares(self, gate: Tensor, signal: Tensor) -> Shares:
        return 0.0, 1.0


class HalfRule(RecurrentRule):
    """A product's relevance is halved between gate and signal.

    ``R_gate = R_signal = R_p / 2``.

    Source: Arras et al. 2019, "LRP-half".

    Args:
        epsilon: Added to the size of every denominator, in units of a linear map's result; or a
            :class:`Stabilizer`.

    >>> HalfRule().shares(torch.tensor(0.2), torch.tensor(-1.0))
    (0.5, 0.5)
    """

    def shares(self, gate: Tensor, signal: Tensor) -> Shares:
        return 0.5, 0.5


class ProportionalRule(RecurrentRule):
    """A product's relevance is shared in proportion to the values of gate and signal.

    ``R_gate = g · R_p / st(g + s)``, ``R_signal = s · R_p / st(g + s)`` for ``p = g · s``. Where g
    and s all but cancel, both are large and of opposite sign; with ``absolute``, ``|g|`` and ``|s|``
    stand in place of g and s, and both are between 0 and R_p.

    Source: Arras et al. 2019, "LRP-prop" and "LRP-abs".

    Args:
        epsilon: Added to the size of every denominator, in units of a linear map's result; or a
            :class:`Stabilizer`.
        absolute: Whether sizes count, not signed values.

    >>> ProportionalRule().shares(torch.tensor(0.5), torch.tensor(1.5))
    (tensor(0.2500), tensor(0.7500))
    """

    def __init__(self, epsilon: Stabilizing = 1e-6, absolute: bool = False) -> None:
        super().__init__(epsilon)
        self.absolute = bool(absolute)

    def shares(self, gate: Tensor, signal: Tensor) -> Shares:
        if self.absolute:
            signal = signal.abs()
        whole, epsilon = gate + signal, self.epsilon
        return stable_ratio(gate, whole, epsilon), stable_ratio(signal, whole, epsilon)


def _readable(value: Tensor) -> bool:
    """Whether a tensor's entries can be asked for: not under function transforms, not compiled."""
    if torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(value)  # pyright: ignore[reportAttributeAccessIssue]


def recurrent_part(module: nn.Module) -> str | None:
    """Under which name a module that reads and writes keys holds its recurrent net; else None.

    torchrl's ``LSTMModule`` and ``GRUModule`` do. A rule on such a module answers for what it holds,
    which some back ends never call.

    >>> recurrent_part(nn.LSTM(2, 2)) is None
    True
    """
    if not all(hasattr(module, name) for name in ("in_keys", "out_keys", "recurrent_backend")):
        return None
    held = (name for name in ("lstm", "gru") if isinstance(module._modules.get(name), nn.RNNBase))
    return next(held, None)


def _twin(module: nn.Module, inside: str, rule: RecurrentRule) -> nn.Module:
    """The module with its recurrent part written out, and the back end that calls that part.

    So cutting at resets, states of single steps and the placing of final states are the module's own.
    """
    twin = object.__new__(type(module))
    modules = {**module._modules, inside: _WrittenOut(rule, module._modules[inside])}
    twin.__dict__ = {**vars(module), "_modules": modules, "recurrent_backend": "pad"}
    return twin


class _WrittenOut(nn.Module):
    """Gives a rule's surrogate where a recurrent module would give its output."""

    def __init__(self, rule: RecurrentRule, module: Any) -> None:
        super().__init__()
        for name in ("num_layers", "hidden_size", "proj_size", "bidirectional", "batch_first"):
            setattr(self, name, getattr(module, name))
        self._call = lambda *args, **kwargs: rule.surrogate(module, Inputs(args, kwargs), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)
