"""Modules over time: recurrent ones, and the decision transformer's wrapper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

from tdhook_like import AtStep
from torchrl_records.family import SEVERAL, Family
from torchrl_records.nets import B, T, episodes, recurrent, steps, transformer
from torchrl_records.scores import entry

LSTM, GRU = ["h", "c"], ["h"]


def _step_by_step(kind: Any, states: list[str], given: Sequence[str]) -> Family:
    """One step of each element, with the states that are ``given``."""
    return Family(
        lambda: recurrent(kind, states),
        lambda: steps(B, states=given),
        SEVERAL,
        entry("logits", 0),
        target=("logits", 0),
        keys=["observation", *given],
        relu=False,
    )


def _over_time(
    kind: Any, states: list[str], given: Sequence[str], *, resets: bool = True, **options: Any
) -> Family:
    """Whole sequences at once; explained is the last step."""
    return Family(
        lambda: recurrent(kind, states, **options),
        lambda: steps(B, T, states=given, resets=resets),
        SEVERAL,
        entry("logits", -1, 0),
        target=AtStep(("logits", 0)),
        keys=["observation", *given],
        relu=False,
        scope=set_recurrent_mode,
    )


SEQUENCES: dict[str, Family] = {
    "LSTMModule, step by step": _step_by_step(LSTMModule, LSTM, LSTM),
    "LSTMModule, step by step, states absent": _step_by_step(LSTMModule, LSTM, []),
    "LSTMModule over time": _over_time(LSTMModule, LSTM, LSTM, resets=False),
    "LSTMModule over time with resets": _over_time(LSTMModule, LSTM, LSTM),
    "LSTMModule over time, states absent": _over_time(LSTMModule, LSTM, []),
    "python LSTMModule over time": _over_time(LSTMModule, LSTM, LSTM, python_based=True),
    "GRUModule, step by step": _step_by_step(GRUModule, GRU, GRU),
    "GRUModule over time with resets": _over_time(GRUModule, GRU, GRU),
    "GRUModule over time, states absent": _over_time(GRUModule, GRU, []),
    "DecisionTransformerInferenceWrapper": Family(
        transformer,
        episodes,
        SEVERAL,
        entry("param", -1, 0),
        target=("param", -1, 0),
        keys=["observation", "action", "return_to_go"],
        relu=False,
        again=False,  # one action is written where a sequence was read
    ),
}
