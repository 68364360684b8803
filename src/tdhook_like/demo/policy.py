"""The actor and the critic of the CartPole demo, and their shipped weights."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor, ValueOperator

from tdhook_like.demo.cartpole import KEYS

WEIGHTS = "cartpole.pt"
"""Name of the shipped file of weights, in this package."""


class KeyedMLP(nn.Module):
    """A ReLU network that reads several tensors, concatenated along their last dimension.

    Args:
        n_in: features of all inputs together.
        n_out: features of the output.
        width: units in each of the two hidden layers.
    """

    def __init__(self, n_in: int, n_out: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_in, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, n_out),
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Maps tensors of shape [*B, n_i] to one of shape [*B, n_out]."""
        return self.layers(torch.cat(inputs, dim=-1))


def make_actor() -> ProbabilisticActor:
    """An untrained actor: `cart`, `pole`, `noise`, `echo` -> `logits`, `action`, its log-prob."""
    module = TensorDictModule(KeyedMLP(2 * len(KEYS), 2), in_keys=list(KEYS), out_keys=["logits"])
    return ProbabilisticActor(
        module, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True
    )


def make_critic() -> ValueOperator:
    """An untrained critic: `cart`, `pole`, `noise`, `echo` -> `state_value`."""
    return ValueOperator(KeyedMLP(2 * len(KEYS), 1), in_keys=list(KEYS))


def _weights() -> dict[str, dict[str, Any]]:
    with as_file(files("tdhook_like.demo") / WEIGHTS) as path:
        return torch.load(path, weights_only=True)


def load_policy() -> ProbabilisticActor:
    """The trained actor: balances the pole for all 500 steps when it acts greedily.

    Example:
        >>> actor = load_policy()
        >>> actor.in_keys
        ['cart', 'pole', 'noise', 'echo']
    """
    actor = make_actor()
    actor.load_state_dict(_weights()["actor"])
    return actor.eval()


def load_critic() -> ValueOperator:
    """The critic that was trained with the actor of `load_policy`.

    Example:
        >>> load_critic().out_keys
        ['state_value']
    """
    critic = make_critic()
    critic.load_state_dict(_weights()["critic"])
    return critic.eval()
