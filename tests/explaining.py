"""What most tests of methods do first: prepare a method for a network and explain one batch."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor

BATCHES = [(), (3,), (3, 2), (2, 3, 2)]


def _prepared(method: Any, net: Any, keys: list[str]) -> Any:
    model = net if isinstance(net, TensorDictModule) else TensorDictModule(net, keys, ["y"])
    return method.prepare(model)


def explained(method: Any, net: Any, batch: tuple[int, ...], **inputs: Tensor) -> TensorDict:
    """What observing writes. A plain network reads ``inputs`` in their order and writes ``"y"``."""
    with _prepared(method, net, list(inputs)) as hooked:
        return hooked.observe(TensorDict(inputs, batch))


def driven(method: Any, net: Any, batch: tuple[int, ...], **inputs: Tensor) -> TensorDict:
    """What the call writes that stands in for the plain one, of the same as ``explained``."""
    with _prepared(method, net, list(inputs)) as hooked:
        return hooked(TensorDict(inputs, batch))
