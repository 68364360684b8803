"""Inputs and outputs that are made of several tensors: TensorDicts, and tuples inside of tuples."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, assert_close
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_like import DeepLift, InputError, IntegratedGradients, Saliency


class TwoHeads(nn.Module):
    """Gives ``(x, (2 x, x²))``."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return x * 1, (x * 2, x * x)


def pair() -> TensorDict:
    return TensorDict({"x": torch.tensor([[1.0, 3.0], [2.0, 5.0]])}, [2])


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Saliency, [[2.0, 0.0], [4.0, 0.0]]),
        (IntegratedGradients, [[1.0, 0.0], [4.0, 0.0]]),
        (DeepLift, [[1.0, 0.0], [4.0, 0.0]]),
    ],
)
def test_a_tuple_inside_of_the_outputs_is_explained_and_written_as_by_the_plain_call(
    method, expected
):
    plain = TensorDictModule(TwoHeads(), ["x"], ["y", "z"])(pair())
    with method(lambda td: td["z", "1"][..., 0]).prepare(TwoHeads(), ["x"], ["y", "z"]) as hooked:
        td = hooked(pair())
    torch.testing.assert_close(td["attr", "x"], torch.tensor(expected))
    assert_close(td.select("x", "y", "z"), plain)
    assert not td["z", "1"].requires_grad


class OfADict(nn.Module):
    def forward(self, obs: TensorDict) -> Tensor:
        return obs["near"].sum(-1, keepdim=True) + obs["far", "away"].sum(-1, keepdim=True)


def test_a_tensordict_as_an_input_is_refused_with_the_names_of_what_is_in_it():
    inside = TensorDict({"near": torch.ones(2, 3), "far": {"away": torch.ones(2, 2)}}, [2])
    with (
        Saliency("y").prepare(OfADict(), ["obs"], ["y"]) as hooked,
        pytest.raises(InputError, match=r"\('obs', 'near'\), \('obs', 'far', 'away'\)"),
    ):
        hooked(TensorDict({"obs": inside}, [2]))
