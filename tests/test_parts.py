"""Sums per channel, head and token, against sums by loops, on relevance found at submodules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_like import LRP, Each, EpsilonPlus, InputError
from tdhook_like.metrics.parts import per_channel, per_head, per_token

F64 = torch.float64


def by_hand(relevance: Tensor, kept: list[int]) -> Tensor:
    """Every number added to where the kept dimensions' indices say."""
    total = torch.zeros([relevance.shape[d] for d in kept], dtype=relevance.dtype)
    for at in itertools.product(*(range(size) for size in relevance.shape)):
        total[tuple(at[d] for d in kept)] += relevance[at]
    return total


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    ("shape", "options", "kept"),
    [
        ((2, 3, 4, 5), {}, [0, 1]),
        ((2, 3), {}, [0, 1]),
        ((2, 3, 4, 5), {"dim": -1}, [0, 3]),
        ((2, 3, 4, 5), {"dim": 2, "batch_dims": 2}, [0, 1, 2]),
        ((3, 4), {"dim": 0, "batch_dims": 0}, [0]),
        ((2, 3, 4), {"dim": -1, "batch_dims": 2}, [0, 1, 2]),
    ],
)
def test_a_channel_gets_the_sum_of_its_positions(
    shape: tuple[int, ...], options: dict[str, int], kept: list[int], dtype: torch.dtype
):
    relevance = torch.randn(*shape, dtype=dtype)
    torch.testing.assert_close(per_channel(relevance, **options), by_hand(relevance, kept))


@pytest.mark.parametrize(
    ("shape", "options", "kept"),
    [
        ((2, 5, 4), {}, [0, 1]),
        ((2, 3, 5, 4), {"batch_dims": 2}, [0, 1, 2]),
        ((2, 4, 5), {"dim": -1}, [0, 2]),
        ((5, 4), {"batch_dims": 0}, [0]),
    ],
)
def test_a_token_gets_the_sum_of_its_features(
    shape: tuple[int, ...], options: dict[str, int], kept: list[int]
):
    relevance = torch.randn(*shape, dtype=F64)
    torch.testing.assert_close(per_token(relevance, **options), by_hand(relevance, kept))


@pytest.mark.parametrize("dim", [-1, 2, 1])
@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_a_head_gets_the_sum_of_its_part_of_the_dimension(heads: int, dim: int):
    relevance = torch.randn(2, 6, 6, dtype=F64)
    want = torch.stack([p.sum(dim) for p in relevance.chunk(heads, dim)], dim)
    torch.testing.assert_close(per_head(relevance, heads, dim), want)


@pytest.mark.parametrize(
    ("sum_of", "words"),
    [
        (lambda R: per_channel(R, dim=0), r"dim=0 .* channels of relevance \(2, 3, 4\)"),
        (lambda R: per_channel(R, dim=3), "dim=3"),
        (lambda R: per_channel(R, dim=-4), "dim=-4"),
        (lambda R: per_token(R, dim=1, batch_dims=2), "dim=1 .* tokens"),
        (lambda R: per_token(R, dim=1, batch_dims=-1), "behind its -1 batch dimensions"),
        (lambda R: per_head(R, heads=3), r"holds 4 numbers, which 3 heads cannot share"),
        (lambda R: per_head(R, heads=0), "0 heads"),
        (lambda R: per_head(R, heads=2, dim=5), "dim=5 .* heads"),
    ],
)
def test_dimensions_that_are_not_there_are_refused(sum_of: Callable[[Tensor], Tensor], words: str):
    with pytest.raises(InputError, match=words):
        sum_of(torch.ones(2, 3, 4))


class Small(nn.Module):
    """A convolution and an attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.qkv, self.mix, self.head = nn.Linear(4, 12), nn.Identity(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).relu().flatten(2).mT
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.mix(mixed.transpose(1, 2).flatten(2)).mean(1))


@pytest.mark.parametrize("target", [("y", 1), Each("y")], ids=["one target", "several"])
def test_relevance_at_submodules_is_told_per_channel_head_and_token_and_conserved(target: Any):
    net, x = Small().double(), torch.randn(2, 2, 5, 5, dtype=F64)
    with LRP(EpsilonPlus(), target, at=["conv", "mix"]).prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, [2]))
    at_conv, at_mix = (td["attr_at", path] for path in ("conv", "mix"))
    several = at_conv.ndim - 4  # a target dimension behind the batch
    channels = per_channel(at_conv, 1 + several, 1 + several)
    assert channels.shape == ((2, 3, 4) if several else (2, 4))
    tokens = per_token(at_mix, batch_dims=1 + several)
    assert tokens.shape == ((2, 3, 9) if several else (2, 9))
    heads = per_head(at_mix, 2).sum(-2)
    assert heads.shape == ((2, 3, 2) if several else (2, 2))
    whole = at_mix.flatten(1 + several).sum(-1)
    torch.testing.assert_close(tokens.sum(-1), whole)
    torch.testing.assert_close(heads.sum(-1), whole)
    torch.testing.assert_close(channels.sum(-1), at_conv.flatten(1 + several).sum(-1))
