"""The argmax rule: the largest contribution takes everything, ties go to the first, memory is bounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rule_references as want_of
from rule_samples import AFFINE, Sample, assert_close, explain, made, only
from tdhook_like.attribution.lrp import Inputs
from tdhook_like.attribution.lrp.rules import picking
from tdhook_like.attribution.lrp.rules.picking import ArgmaxRule
from tdhook_like.errors import RuleError

F64 = torch.float64


def relevance(module: nn.Module, x: Tensor, R: Tensor) -> Tensor:
    return explain(module, only(module, ArgmaxRule()), [x], R)[0][0]


def test_the_winner_is_the_number_worked_out_by_hand():
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, -2.0, 3.0], [-2.0, -1.0, -3.0]])
    layer.bias.data = torch.tensor([100.0, -100.0])  # takes no part
    # Contributions [1, 2, 3] and [-2, 1, -3]: with their signs, whatever comes out.
    found = relevance(layer, torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[5.0, -7.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, -7.0, 5.0]]))
    # All negative, [-1, -2, -3]: the least negative one wins.
    layer.weight.data = torch.tensor([[-1.0, -2.0, -3.0]] * 2)
    found = relevance(layer, torch.ones(1, 3), torch.tensor([[5.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[6.0, 0.0, 0.0]]))


def test_a_winner_whose_contribution_is_zero_gets_its_relevance():
    layer = nn.Linear(3, 1)
    layer.weight.data = torch.tensor([[-1.0, 2.0, 0.0]])
    for x in ([1.0, 0.0, -1.0], [1.0, -1.0, 5.0]):
        found = relevance(layer, torch.tensor([x]), torch.tensor([[3.0]]))
        assert found[0].tolist() == [0.0, 3.0 * (x[1] == 0), 3.0 * (x[1] != 0)]


def ones(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.data = torch.ones_like(parameter)
    return module


def test_the_first_of_equals_wins_by_channel_and_then_by_position():
    dense = relevance(ones(nn.Linear(4, 1)), torch.ones(1, 4), torch.ones(1, 1))
    assert dense[0].tolist() == [1, 0, 0, 0]
    x = torch.tensor([[[1.0, 2.0, 1.0], [2.0, 2.0, 0.0]]])
    found = relevance(ones(nn.Conv1d(2, 1, 3)), x, torch.ones(1, 1, 1))
    assert found[0].tolist() == [[0, 1, 0], [0, 0, 0]]
    images = torch.ones(1, 2, 3, 3)
    found = relevance(ones(nn.Conv2d(2, 1, 2)), images, torch.ones(1, 1, 2, 2))
    assert found[0, 0].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]] and not found[0, 1].any()
    # Transposed, each output reads the inputs on which the kernel was put: the first of those.
    spread = relevance(ones(nn.ConvTranspose1d(1, 1, 2)), torch.ones(1, 1, 2), torch.ones(1, 1, 3))
    assert spread[0, 0].tolist() == [2, 1]


@pytest.mark.parametrize(
    "module", [nn.Linear(6, 3), nn.Conv1d(6, 3, 2), nn.ConvTranspose1d(6, 3, 2)]
)
def test_under_vmap_ties_go_the_same_way(module: Any):
    x = torch.randint(-1, 2, (5, 4, 6) if isinstance(module, nn.Linear) else (5, 6, 3)).float()
    module = ones(module)

    def ruled(sample: Tensor) -> Tensor:
        return ArgmaxRule().apply(module, Inputs((sample,)), module(sample)).sum()

    together = torch.func.vmap(torch.func.grad(ruled))(x)
    assert together.equal(torch.func.grad(ruled)(x))


def test_outputs_that_read_nothing_but_padding_pass_nothing():
    conv = made("padded", lambda: nn.Conv1d(1, 1, 2, padding=3))
    R = torch.ones(1, 1, 7)
    found = relevance(conv, torch.ones(1, 1, 2, dtype=F64), R)
    # Outputs 2, 3 and 4 read inputs, the others zeros.
    torch.testing.assert_close(found.sum(), torch.tensor(3.0, dtype=F64))


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize("sample", AFFINE, ids=lambda sample: sample.name)
def test_chunks_change_nothing(sample: Sample, size: int, monkeypatch):
    module, (x,) = sample.module(), sample.inputs("mixed")
    R = torch.randn(module(x).shape, dtype=F64)
    monkeypatch.setattr(picking, "_CHUNK", size)
    assert_close(relevance(module, x, R), want_of.to_the_largest(module, [x], R)[0], 1e-10)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.size = max(self.size, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_no_more_contributions_are_held_than_a_chunk_of_them(monkeypatch):
    monkeypatch.setattr(picking, "_CHUNK", 2**14)
    for module, shape in (
        (nn.Linear(256, 64), (16, 256)),  # 2^18 contributions
        (nn.Conv2d(32, 16, 3, padding=1), (2, 32, 8, 8)),  # 2^19 and more
    ):
        x = torch.randn(shape, requires_grad=True)
        y = module(x)
        with Largest() as largest:
            ArgmaxRule().apply(module, Inputs((x,)), y)
        assert largest.size <= 2**14


def test_a_transposed_layer_that_is_told_its_output_size_is_read_with_it():
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = made("sized", lambda: nn.ConvTranspose1d(2, 2, 2, stride=3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, output_size=(7,))

    net, x, R = Sized(), torch.randn(2, 2, 2, dtype=F64), torch.randn(2, 2, 7, dtype=F64)
    padded = nn.ConvTranspose1d(2, 2, 2, stride=3, output_padding=2).double()
    padded.load_state_dict(net.layer.state_dict())
    R[..., [2, 5, 6]] = 0  # between the kernels there is nothing to read
    found = explain(net, only(net.layer, ArgmaxRule()), [x], R)[0][0]
    assert_close(found, want_of.to_the_largest(padded, [x], R)[0], 1e-10)


def test_layers_of_other_kinds_are_refused():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    for module in (Own(), nn.Bilinear(2, 2, 2), nn.ReLU()):
        with pytest.raises(RuleError, match="dense layers and"):
            ArgmaxRule().register(module)
