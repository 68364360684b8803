"""Modules over time: recurrent ones, and the decision transformer's wrapper."""

from __future__ import annotations

from torchrl.modules import (
    GRUModule,
    LSTMModule,
    set_recurrent_mode,
)

from tdhook_like import AtStep
from torchrl_records.family import SEVERAL, Family
from torchrl_records.nets import (
    B,
    T,
    episodes,
    recurrent,
    steps,
    transformer,
)
from torchrl_records.scores import (
    entry,
)

SEQUENCES: dict[str, Family] = {
    "LSTMModule, step by step": Family(
        lambda: recurrent(LSTMModule, ["h", "c"]),
        lambda: steps(B),
        SEVERAL,
        entry("logits", 0),
        target=("logits", 0),
        keys=["observation", "h", "c"],
        relu=False,
    ),
    "LSTMModule, step by step, states absent": Family(
        lambda: recurrent(LSTMModule, ["h", "c"]),
        lambda: steps(B, states=()),
        SEVERAL,
        entry("logits", 0),
        target=("logits", 0),
        relu=False,
    ),
    "LSTMModule over time": Family(
        lambda: recurrent(LSTMModule, ["h", "c"]),
        lambda: steps(B, T),
        SEVERAL,
        entry("logits", -1, 0),
        target=AtStep(("logits", 0)),
        keys=["observation", "h", "c"],
        relu=False,
        scope=set_recurrent_mode,
    ),
    "LSTMModule over time with resets": Family(
        lambda: recurrent(LSTMModule, ["h", "c"]),
        lambda: steps(B, T, resets=True),
        SEVERAL,
        entry("logits", -1, 0),
        target=AtStep(("logits", 0)),
        keys=["observation", "h", "c"],
        relu=False,
        scope=set_recurrent_mode,
    ),
    "LSTMModule over time, states absent": Family(
        lambda: recurrent(LSTMModule, ["h", "c"]),
        lambda: steps(B, T, states=(), resets=True),
        SEVERAL,
        entry("logits", -1, 0),
        target=AtStep(("logits", 0)),
        relu=False,
        scope=set_recurrent_mode,
    ),
    "python LSTMModule over time": Family(
        lambda: recurrent(LSTMModule, ["h", "c"], python_based=True),
        lambda: steps(B, T, resets=True),
        SEVERAL,
        entry("logits", -1, 0),
        target=AtStep(("logits", 0)),
        keys=["observation", "h", "c"],
        relu=False,
        scope=set_recurrent_mode,
    ),
    "GRUModule, step by step": Family(
        lambda: recurrent(GRUModule, ["h"]),
        lambda: steps(B, states=["h"]),
        SEVERAL,
        entry("logits", 0),
        target=("logits", 0),
        keys=["observation", "h"],
        relu=False,
    ),
    "GRUModule over time with resets": Family(
        lambda: recurrent(GRUModule, ["h"]),
        lambda: steps(B, T, states=["h"], resets=True),
        SEVERAL,
        entry("logits", -1, 0),
        target=AtStep(("logits", 0)),
        keys=["observation", "h"],
        relu=False,
        scope=set_recurrent_mode,
    ),
    "GRUModule over time, states absent": Family(
        lambda: recurrent(GRUModule, ["h"]),
        lambda: steps(B, T, states=(), resets=True),
        SEVERAL,
        entry("logits", -1, 0),
        target=AtStep(("logits", 0)),
        relu=False,
        scope=set_recurrent_mode,
    ),
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
