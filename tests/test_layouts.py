"""Which way of stacking is chosen, with scores that are right or wrong by construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor

from tdhook_like import IntegratedGradients, LayoutError, TargetError
from tdhook_like.layout import LAYOUTS, Layout, verified

INPUTS = [torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])]
NAMES = list(LAYOUTS)


def chosen(wrong: dict[str, Callable[[Tensor], Tensor]], dtype: torch.dtype = torch.float32) -> str:
    """What is chosen where some layouts do something else to scores ``[k, 3, 1]`` than the last."""

    def score(layout: Layout, points: Sequence[Tensor]) -> Tensor:
        name = next(name for name in NAMES if LAYOUTS[name] is layout)
        right = points[0].sum(-1, keepdim=True)
        return wrong.get(name, lambda scores: scores)(right)

    inputs = [x.to(dtype) for x in INPUTS]
    return verified(score, inputs, [torch.zeros_like(x) for x in inputs], "The score")


def test_the_first_layout_that_is_right_is_chosen():
    assert chosen({}) == "leading"
    for n in range(1, 4):
        assert chosen(dict.fromkeys(NAMES[:n], lambda scores: scores + 1)) == NAMES[n]


@pytest.mark.parametrize(
    ("dtype", "near", "far"),
    [
        (torch.float64, 1e-10, 1e-6),
        (torch.float32, 1e-6, 1e-3),
        (torch.bfloat16, 5e-3, 2e-1),
    ],
)
def test_what_rounding_does_is_forgiven_and_no_more(dtype, near, far):
    assert chosen({"leading": lambda scores: scores * (1 + near)}, dtype) == "leading"
    assert chosen({"leading": lambda scores: scores * (1 + far)}, dtype) == "folded"


def test_a_layout_that_gives_scores_of_another_shape_is_wrong_whatever_they_are():
    def one_for_all(scores: Tensor) -> Tensor:  # equal, where it is spread over the batch
        return scores[:, :1]

    inputs = [torch.ones(3, 2)]

    def score(layout: Layout, points: Sequence[Tensor]) -> Tensor:
        scores = points[0].sum(-1, keepdim=True)
        return one_for_all(scores) if layout is LAYOUTS["leading"] else scores

    assert verified(score, inputs, [torch.zeros(3, 2)], "The score") == "folded"


def test_a_mixture_of_rows_is_seen_through():
    def centred(scores: Tensor) -> Tensor:
        return scores - scores.mean(0) + scores[1]  # right only where all rows are alike

    assert chosen({"leading": lambda scores: 2 * scores - scores[:1]}) == "folded"
    assert chosen({"leading": lambda scores: scores.flip(0)}) == "leading"  # the middle one stays
    assert chosen({"leading": centred, "folded": lambda scores: scores + scores[-1:]}) == "vmap"


def test_scores_that_never_repeat_are_refused_and_those_that_are_no_numbers():
    with pytest.raises(LayoutError, match="another score for the same input each time"):
        chosen(dict.fromkeys(NAMES, lambda scores: scores + torch.rand_like(scores)))
    with pytest.raises(TargetError, match="The score is NaN or Inf"):
        chosen({"one by one": lambda scores: scores / 0})


def test_what_the_model_says_of_points_on_the_way_is_said_word_for_word():
    def of_bits(x: Tensor) -> Tensor:
        if not bool(((x == 0) | (x == 1)).all()):
            raise ValueError("bits are zero or one")
        return x.sum(-1)

    model = TensorDictModule(of_bits, ["x"], ["y"])
    td = TensorDict({"x": torch.ones(2, 3)}, [2])
    with IntegratedGradients("y").prepare(model) as hooked, pytest.raises(ValueError) as raised:
        hooked(td)
    assert str(raised.value) == "bits are zero or one"


def test_one_by_one_evaluations_are_stacked_behind_what_the_model_puts_in_front():
    def members(td: TensorDictBase) -> TensorDictBase:
        x = td["x"]
        return TensorDict({"y": torch.stack([x, 10 * x])}, [2, 3])

    template = TensorDict({"x": INPUTS[0]}, [3])
    points = torch.stack([INPUTS[0], -INPUTS[0], INPUTS[0] + 1, INPUTS[0] + 2])
    found = LAYOUTS["one by one"](members, template, ["x"], [points])
    assert found.batch_size == (2, 4, 3)
    assert torch.equal(found["y"], torch.stack([points, 10 * points]))
