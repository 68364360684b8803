"""A model with several heads and methods for it; what they give, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_like import LRP, InputXGradient, IntegratedGradients, Saliency

METHODS = {
    "saliency": lambda target: Saliency(target, abs=False),
    "input x gradient": InputXGradient,
    "integrated gradients": lambda target: IntegratedGradients(target, n_steps=8),
    "lrp": lambda target: LRP(target=target),
}


class Calls:
    """Rows seen, call by call. Not a list: a copied model shall count here too."""

    def __init__(self) -> None:
        self.rows: list[int] = []


class Heads(nn.Module):
    """Three logits, a value, and a table of 2 × 3 numbers; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.logits, self.value, self.table = nn.Linear(8, 3), nn.Linear(8, 1), nn.Linear(8, 6)
        self.calls = Calls()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.calls.rows.append(x.numel() // 4)
        h = self.trunk(x)
        value = self.value(h)
        return self.logits(h), value, value.squeeze(-1) ** 2, self.table(h).unflatten(-1, (2, 3))


def model() -> Any:
    out_keys = ["logits", "state_value", "square", ("agents", "table")]
    return TensorDictModule(Heads(), ["observation"], out_keys)


def inputs(*batch: int) -> TensorDict:
    action = torch.randint(3, batch)
    td = {"observation": torch.randn(*batch, 4), "action": action, "index": action.unsqueeze(-1)}
    one_hot = nn.functional.one_hot(action, 3)
    td |= {"one_hot": one_hot, "mask": one_hot.bool(), "float": one_hot.float()}
    return TensorDict(td, batch)


def reference(policy: Any, td: TensorDictBase, number: Callable[[Any], Tensor]) -> Tensor:
    """The gradient of ``number(outputs)``, by hand."""
    x = td["observation"].detach().clone().requires_grad_()
    out = policy(td.copy().set("observation", x))
    return torch.autograd.grad(number(out).sum(), x)[0]


def taken(td: Any) -> Tensor:
    return (td["logits"] * td["float"]).sum(-1)


def rest(td: Any, index: int) -> Tensor:
    return (td["logits"].sum(-1) - td["logits"][..., index]) / 2
