"""Each of torch's functions stands in one table, or is known to be nobody's."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, get_overridable_functions

from tdhook_like.attribution.lrp import FunctionRules, names
from tdhook_like.attribution.lrp.functions.operations import Opened, Unhandled
from tdhook_like.attribution.lrp.functions.tables import table
from tdhook_like.attribution.lrp.names import TRANSPARENT, spoken

#: Non-linear, and rarely part of a model: followed by their gradient and reported.
UNHANDLED = {
    "functions of several arguments": """
        atan2 polar polygamma zeta igamma igammac gammainc gammaincc xlog1py ldexp nextafter
        chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w
        hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p
        shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u
        shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w corrcoef vander apply map map2
    """,
    "steps, and remainders of division": """
        round floor ceil trunc frac fmod mod remainder frexp sign sgn heaviside angle
    """,
    "decompositions and solutions": """
        cholesky cholesky_ex cholesky_inverse cholesky_solve cond eig eigh eigvals geqrf
        householder_product inv_ex ldl_factor ldl_factor_ex ldl_solve logdet lstsq lu lu_factor
        lu_factor_ex lu_solve lu_unpack matrix_exp orgqr ormqr qr slogdet solve solve_ex
        solve_triangular svd tensorinv tensorsolve triangular_solve
    """,
    "losses": """
        binary_cross_entropy_with_logits cosine_embedding_loss ctc_loss hinge_embedding_loss kl_div
        margin_ranking_loss poisson_nll_loss triplet_margin_loss
    """,
    "recurrent layers without a module": """
        gru gru_cell lstm lstm_cell rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell
    """,
    "parts that torch calls itself": """
        batch_norm_elemt native_batch_norm native_group_norm native_layer_norm autocast
        miopen_batch_norm miopen_convolution miopen_convolution_add_relu miopen_convolution_relu
        miopen_convolution_transpose miopen_depthwise_convolution miopen_rnn
    """,
    "quantised numbers": """
        dequantize fake_quantize_per_channel_affine fake_quantize_per_tensor_affine
        fused_moving_avg_obs_fake_quant fbgemm_linear_fp16_weight
        fbgemm_linear_fp16_weight_fp32_activation fbgemm_linear_int8_weight
        fbgemm_linear_int8_weight_fp32_activation quantize_per_channel quantize_per_tensor
        quantize_per_tensor_dynamic quantized_batch_norm quantized_gru_cell quantized_lstm_cell
        quantized_max_pool1d quantized_max_pool2d quantized_max_pool3d quantized_rnn_relu_cell
        quantized_rnn_tanh_cell
    """,
}

FUNCTIONS = [f for functions in get_overridable_functions().values() for f in functions]


def test_every_function_of_torch_has_a_rule_or_is_known_to_have_none():
    rules, known = FunctionRules(), {name for text in UNHANDLED.values() for name in text.split()}
    lacking = {spoken(f) for f in FUNCTIONS if isinstance(rules.find(f)[1], Unhandled)}
    assert sorted(lacking - known) == []
    # Other versions of torch may lack a name; none of them has a rule.
    assert sorted(known & set(table(False, False))) == []
    assert sorted(known & TRANSPARENT) == []


def test_no_name_stands_in_two_tables():
    kinds = ("FOLLOWED", "CARRYING", "ENTRYWISE", "SUMS", "PASSED", "PRODUCTS", "TANGENTS")
    groups = [getattr(names, kind) for kind in (*kinds, "TRANSPARENT", "CONVOLUTIONS")]
    for one, other in combinations(groups, 2):
        assert sorted(one & other) == []
    assert names.GATES <= names.PASSED | names.FOLLOWED
    assert sorted(set(table(False, False)) & TRANSPARENT) == []


def test_what_is_seen_through_calls_functions_that_have_rules():
    rules = FunctionRules()
    opened = {spoken(f) for f in FUNCTIONS if isinstance(rules.find(f)[1], Opened)}
    assert {
        "multi_head_attention_forward",
        "normalize",
        "gumbel_softmax",
        "cross_entropy",
    } <= opened


class Listening(TorchFunctionMode):
    """Takes down what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.heard.append(spoken(func))
        return func(*args, **(kwargs or {}))


x, indices = torch.rand(2, 4, 8, 8) + 0.5, torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: F.max_pool2d(x, 2), "max_pool2d"),
        (lambda: F.max_pool2d(x, 2, return_indices=True), "max_pool2d_with_indices"),
        (lambda: F.adaptive_max_pool2d(x, 2), "adaptive_max_pool2d"),
        (lambda: F.hardswish(x), "hardswish"),
        (lambda: F.logsigmoid(x), "log_sigmoid"),
        (lambda: 2**x, "rpow"),
        (lambda: 1 / x, "rdiv"),
        (lambda: 1 - x, "rsub"),
        (lambda: 2 * x, "mul"),
        (lambda: x.clone().__imul__(2), "mul"),
        (lambda: x.clone().__itruediv__(2), "div"),
        (lambda: x.clone().__ipow__(2), "pow"),
        (lambda: x @ x.mT, "matmul"),
        (lambda: torch.zeros(8, 8) @ x, "matmul"),
        (lambda: torch.linalg.matmul(x, x), "matmul"),
        (lambda: torch.special.expit(x), "sigmoid"),
        (lambda: torch.special.logsumexp(x, 1), "logsumexp"),
        (lambda: torch.linalg.vector_norm(x), "vector_norm"),
        (lambda: torch.fft.rfft(x), "rfft"),
        (lambda: torch.true_divide(x, x), "div"),
        (lambda: torch.concat([x, x]), "cat"),
        (lambda: torch.ops.aten.mul(x, x), "mul"),
        (lambda: torch.ops.aten.mul.Tensor(x, x), "mul"),
        (lambda: torch.baddbmm(x[0], x[0], x[0]), "baddbmm"),
        (lambda: x[0].clone().baddbmm_(x[0], x[0]), "baddbmm"),
        (lambda: torch.sparse.mm(x[0, 0].to_sparse(), x[0, 0]), "mm"),
        (lambda: x.clone().index_put_((indices,), x), "index_put"),
        (lambda: x.clone().__setitem__(0, 1.0), "setitem"),
    ],
)
def test_a_function_is_known_by_the_name_that_its_calls_have(call, name):
    with Listening() as listening:
        call()
    assert name in listening.heard
    assert name in table(False, False)
