"""The principle: a value that flows forward bit for bit, and another expression's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pristine import bits
from tdhook_like.hooks.surrogate import attach, nonzero, scale_gradient, stabilised, tiny, unit

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAN, INF = float("nan"), float("inf")


def awkward(dtype: torch.dtype) -> Tensor:
    """Zeros of both signs, infinities, NaN, the ends of the range, and ordinary numbers."""
    info = torch.finfo(dtype)
    ends = [info.max, info.min, info.tiny, info.smallest_normal / 2, info.eps, 1 + info.eps]
    return torch.tensor([0.0, -0.0, INF, -INF, NAN, 1.0, -2.5, *ends], dtype=dtype)


class Slow(torch.autograd.Function):
    """The same by definition: forward gives the output, backward goes to the surrogate alone."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, surrogate: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fresh", [False, True])
def test_the_value_is_the_outputs_bit_for_bit(dtype, fresh):
    output = awkward(dtype)
    before = bits(output)
    for start in (output, output.flip(0), torch.ones_like(output)):
        x = start.clone().requires_grad_()
        y = attach(output, x * 2, fresh=fresh)
        assert bits(y) == bits(output) == before
        assert y.dtype == dtype and y.data_ptr() != output.data_ptr()
        assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0], torch.full_like(x, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaled_gradient_keeps_the_value_bit_for_bit(dtype):
    output, factor = awkward(dtype), torch.full((13,), 0.5, dtype=dtype)
    x = torch.ones(13, dtype=dtype).requires_grad_()
    y = scale_gradient(x * 3, factor, output)
    assert bits(y) == bits(output)
    assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0], torch.full_like(x, 1.5))


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([(3,), (2, 3), (1, 4, 2), (0, 2), ()]), st.booleans()
)
def test_the_gradient_is_the_surrogates_and_nothing_of_the_output(seed, shape, fresh):
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    w = torch.randn(shape, dtype=torch.float64)

    def both(attached: Callable[[Tensor, Tensor], Tensor]) -> tuple[bytes | None, ...]:
        y = attached(x.exp() * 7, x.sin() * w)
        grad = torch.autograd.grad((y * w).sum(), x)[0]
        return bits(y), bits(grad)

    assert both(lambda output, surrogate: attach(output, surrogate, fresh=fresh)) == both(
        Slow.apply
    )


def test_a_surrogate_that_is_used_elsewhere_is_not_overwritten():
    x = torch.randn(4).requires_grad_()
    surrogate = x * 2
    kept = surrogate.detach().clone()
    attach(x.exp(), surrogate)
    assert torch.equal(surrogate.detach(), kept) and surrogate._version == 0
    leaf = torch.randn(4)  # no graph: there is nothing to spare a copy for
    kept = leaf.clone()
    assert torch.equal(attach(x.exp(), leaf, fresh=True).detach(), x.exp().detach())
    assert torch.equal(leaf, kept)


def test_a_surrogate_of_another_precision_carries_its_gradient_over():
    x = torch.randn(4).requires_grad_()
    output = torch.randn(4, dtype=torch.bfloat16)
    y = attach(output, x * 2, fresh=True)
    assert y.dtype == torch.bfloat16 and bits(y) == bits(output)
    assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0], torch.full((4,), 2.0))


STRIDED = {
    "expanded": lambda: torch.randn(4).expand(3, 4),
    "every other row": lambda: torch.randn(6, 4)[::2],
    "transposed": lambda: torch.randn(4, 3).t(),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_outputs_of_any_strides_are_attached(kind):
    output = STRIDED[kind]()
    x = torch.randn(output.shape).requires_grad_()
    y = attach(output, x * 2, fresh=True)
    assert bits(y) == bits(output)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 2))


# --- exact zeros ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonzero_replaces_zeros_of_both_signs_and_what_is_below_the_stand_in(dtype):
    t, least = awkward(dtype).requires_grad_(), tiny(dtype)
    found = nonzero(t)
    assert not found.requires_grad and found.dtype == dtype
    for before, after in zip(t.detach(), found, strict=True):
        if abs(before) < least:
            assert after == least
        else:
            assert bits(after) == bits(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stand_in_for_zero_is_a_power_of_two_that_the_dtype_holds(dtype):
    value = torch.tensor(tiny(dtype), dtype=dtype)
    assert value.item() == tiny(dtype) and math.frexp(tiny(dtype))[0] == 0.5
    assert torch.isfinite(1 / value) and value >= torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("dtype", DTYPES)
def test_relevance_of_a_zero_input_comes_back_to_the_last_bit(dtype):
    x = torch.zeros(200, dtype=dtype).requires_grad_()
    relevance = torch.randn(200, dtype=torch.float64).to(dtype)
    g = torch.autograd.grad((unit(x) * relevance).sum(), x)[0]
    assert torch.equal(nonzero(x) * g, relevance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_is_one_everywhere_and_its_gradient_is_one_over_the_input(dtype):
    x = torch.tensor([0.0, -0.0, 2.0, -0.5, 4.0], dtype=dtype).requires_grad_()
    ones = unit(x)
    assert torch.equal(ones.detach(), torch.ones_like(x))
    found = torch.autograd.grad(ones.sum(), x)[0]
    expected = torch.tensor([1 / tiny(dtype)] * 2 + [0.5, -2.0, 0.25], dtype=dtype)
    assert torch.equal(found, expected)


@given(st.floats(-(2.0**90), 2.0**90, width=32), st.floats(-(2.0**20), 2.0**20, width=32))
def test_unit_is_exactly_one_for_every_number_and_relevance_is_within_rounding(value, relevance):
    x = torch.tensor([value], dtype=torch.float32).requires_grad_()
    ones = unit(x)
    assert ones.item() == 1.0
    # Between the two divisions lies relevance per unit; below 2⁻¹²⁶ it loses bits.
    if value == 0 or (abs(value) > 1e-20 and abs(relevance / value) > 2.0**-126):
        g = torch.autograd.grad(ones * relevance, x)[0]
        assert (nonzero(x) * g).item() == pytest.approx(relevance, rel=3e-7, abs=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stabilised_moves_away_from_zero_and_zero_counts_as_positive(dtype):
    z = torch.tensor([0.0, -0.0, 1.0, -1.0, INF, -INF], dtype=dtype).requires_grad_()
    found = stabilised(z, 0.5)
    assert found.tolist() == [0.5, 0.5, 1.5, -1.5, INF, -INF] and not found.requires_grad
    assert bool(stabilised(torch.tensor(NAN), 0.5).isnan())


# --- transforms -----------------------------------------------------------------------------------


def ruled(x: Tensor, w: Tensor) -> Tensor:
    """The epsilon rule of a matrix, then a flat one: all words of the language in one function."""
    y = torch.relu(x @ w)
    y = scale_gradient(x @ w, nonzero(y) / stabilised(x @ w, 1e-3), y)
    return attach(y.tanh(), unit(y) * nonzero(y.tanh()), fresh=True).sum(-1)


def jacobian_by_rows(x: Tensor, w: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    out = ruled(leaf, w)
    return torch.stack([torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in out])


@pytest.fixture
def operands() -> tuple[Tensor, Tensor]:
    x, w = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    x[0] = 0.0  # nothing but exact zeros in one row
    x[1, 1] = 0.0
    return x, w


def test_jacrev_and_batched_gradients_give_the_rows_one_by_one(operands):
    x, w = operands
    expected = jacobian_by_rows(x, w)
    torch.testing.assert_close(torch.func.jacrev(ruled)(x, w), expected, rtol=1e-12, atol=0)
    leaf = x.clone().requires_grad_()
    batched = torch.autograd.grad(
        ruled(leaf, w), leaf, torch.eye(5, dtype=x.dtype), is_grads_batched=True
    )[0]
    torch.testing.assert_close(batched, expected, rtol=1e-12, atol=0)


def test_vjp_gives_value_and_gradient_of_the_eager_call(operands):
    x, w = operands
    out, pull = torch.func.vjp(lambda t: ruled(t, w), x)
    assert bits(out) == bits(ruled(x, w))
    torch.testing.assert_close(pull(torch.ones(5, dtype=x.dtype))[0], jacobian_by_rows(x, w).sum(0))


def test_vmap_over_samples_and_over_stacked_parameters_is_a_loop(operands):
    x, w = operands
    torch.testing.assert_close(torch.func.vmap(ruled, (0, None))(x, w), ruled(x, w))
    stacked = torch.stack([w, -w, w * 2])

    def gradient(parameters: Tensor) -> Tensor:
        return torch.func.grad(lambda t: ruled(t, parameters).sum())(x)

    found = torch.func.vmap(gradient)(stacked)
    expected = torch.stack([jacobian_by_rows(x, p).sum(0) for p in stacked])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    leaf = x.clone().requires_grad_()  # autograd outside, vmap inside: as vmapped agents run
    out = torch.func.vmap(ruled, (None, 0))(leaf, stacked)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), leaf)[0], expected.sum(0), rtol=1e-12, atol=0
    )


def test_the_surrogate_can_be_differentiated_twice():
    x = torch.tensor([0.5, -2.0], dtype=torch.float64).requires_grad_()
    first = torch.autograd.grad(attach(x.exp(), x**3).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(first, 3 * x**2)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], 6 * x.detach())


def test_a_compiled_surrogate_is_the_eager_one(operands):
    x, w = operands
    leaf = x.clone().requires_grad_()
    out = torch.compile(ruled, backend="eager", fullgraph=True)(leaf, w)
    assert bits(out) == bits(ruled(x, w))
    found = torch.autograd.grad(out.sum(), leaf)[0]
    torch.testing.assert_close(found, jacobian_by_rows(x, w).sum(0))


def test_nothing_is_kept_where_gradients_are_off():
    with torch.no_grad():
        y = attach(torch.tensor([1.0, -0.0]), torch.tensor([3.0, 3.0]), fresh=True)
    assert bits(y) == bits(torch.tensor([1.0, -0.0])) and y.grad_fn is None
