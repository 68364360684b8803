"""What torch's functions are called, and of what kind they are: linear, elementwise, products."""

from __future__ import annotations

from typing import Any

__all__ = ["FOLLOWED", "PASSED", "PRODUCTS", "TRANSPARENT", "spoken"]


def spoken(function: Any) -> str:
    """A function's name without the underscores of its spelling.

    >>> import torch
    >>> spoken(torch.Tensor.tanh_), spoken(torch.Tensor.__rsub__), spoken(torch.nn.functional.gelu)
    ('tanh', 'rsub', 'gelu')
    """
    name = getattr(function, "__name__", type(function).__name__).strip("_")
    if name.startswith("i") and name[1:] in _IN_PLACE and name not in ("isub", ""):
        return name[1:]
    return _ALIASES.get(name, name)


_IN_PLACE = frozenset({"add", "sub", "mul", "div", "truediv", "pow", "matmul"})
_ALIASES = {
    **{"isub": "sub", "rmul": "mul", "multiply": "mul", "rmatmul": "matmul", "rpow": "exp2"},
    **{"special_expit": "sigmoid", "expit": "sigmoid", "special_softmax": "softmax"},
    **{"absolute": "abs", "clip": "clamp", "clip_min": "clamp_min", "clip_max": "clamp_max"},
    **{"arctan": "atan", "arcsin": "asin", "arccos": "acos", "arctanh": "atanh"},
    **{"arcsinh": "asinh", "arccosh": "acosh", "negative": "neg", "true_divide": "div"},
    **{"logsigmoid": "log_sigmoid", "hard_tanh": "hardtanh", "swish": "silu"},
    **{"native_layer_norm": "layer_norm", "native_group_norm": "group_norm"},
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Asked for shapes, types and flags, or giving tensors without a graph: nothing flows there.
TRANSPARENT = _words(
    """
    size dim ndim numel nelement stride storage_offset element_size shape is_floating_point
    is_complex is_contiguous is_same_size get set len bool int float_value item tolist numpy repr
    format hash contains iter reversed dir array array_wrap index backward register_hook
    requires_grad retain_grad retains_grad detach data_ptr untyped_storage storage is_shared
    share_memory is_inference is_nonzero is_set_to has_names rename_ deepcopy reduce_ex reduce
    set_grad_enabled is_grad_enabled
    eq ne lt le gt ge equal allclose isclose isnan isinf isfinite isposinf isneginf isreal isin
    logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor
    and or xor invert not rand ror any all argmax argmin argsort argwhere nonzero count_nonzero
    searchsorted bucketize bincount histc unique unique_consecutive multinomial bernoulli
    zeros zeros_like ones ones_like empty empty_like full full_like rand_like randn_like randint
    randint_like randn randperm normal uniform arange linspace logspace eye tensor as_tensor
    new_zeros new_ones new_empty new_full new_tensor new one_hot tril_indices triu_indices
    finfo iinfo result_type can_cast promote_types broadcast_shapes is_tensor numel
    """
)

#: Linear in what depends on the inputs, or picking entries of it: the gradient is the rule.
FOLLOWED = _words(
    """
    add radd sub rsub subtract neg positive clone contiguous alias view view_as reshape reshape_as
    flatten unflatten ravel squeeze unsqueeze transpose t T mT H permute movedim moveaxis swapaxes
    swapdims adjoint expand expand_as broadcast_to broadcast_tensors repeat repeat_interleave tile
    cat concat concatenate stack hstack vstack dstack column_stack row_stack atleast_1d atleast_2d
    atleast_3d chunk split split_with_sizes tensor_split hsplit vsplit dsplit unsafe_chunk
    unsafe_split unbind narrow narrow_copy select slice index_select getitem setitem delitem gather
    take take_along_dim index masked_select as_strided meshgrid block_diag
    scatter scatter_add scatter_reduce select_scatter slice_scatter diagonal_scatter index_add
    index_copy index_put index_fill masked_fill masked_scatter where fill zero copy put
    sum mean nansum nanmean sum_to_size cumsum trace diag diagonal diag_embed diagflat tril triu
    roll flip fliplr flipud rot90 pad constant_pad_nd unfold fold pixel_shuffle pixel_unshuffle
    native_channel_shuffle channel_shuffle interpolate upsample upsample_nearest upsample_bilinear
    grid_sample affine_grid avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d lp_pool1d lp_pool2d lp_pool3d diff
    dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout
    native_dropout to type type_as float double half bfloat16 cpu cuda real imag view_as_real
    view_as_complex conj resolve_conj resolve_neg conj_physical fft_fft fft_ifft fft_rfft fft_irfft
    rfft irfft fft ifft fftshift ifftshift stft istft embedding embedding_bag
    sort topk max min amax amin aminmax maximum minimum fmax fmin median nanmedian mode kthvalue
    quantile nanquantile msort cummax cummin nan_to_num
    relu leaky_relu prelu rrelu abs norm vector_norm matrix_norm linalg_vector_norm
    linalg_matrix_norm linalg_norm renorm std dist frobenius_norm nuclear_norm
    max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
    max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices
    adaptive_max_pool3d_with_indices fractional_max_pool2d fractional_max_pool3d
    fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices
    max_unpool1d max_unpool2d max_unpool3d log_softmax
    pack_padded_sequence pad_packed_sequence
    checkpoint cholesky_solve lu_solve solve_triangular
    """
)

#: Elementwise and non-linear: relevance passes through.
PASSED = _words(
    """
    gelu silu mish tanh sigmoid elu celu selu softplus softsign log_sigmoid tanhshrink softshrink
    hardshrink hardtanh hardsigmoid hardswish relu6 threshold clamp clamp_min clamp_max exp expm1
    exp2 log log1p log2 log10 logit sqrt square sin cos tan asin acos atan sinh cosh asinh acosh
    atanh erf erfc erfinv lgamma digamma sinc i0
    """
)

#: Linear in each operand: what depends on the inputs shares relevance evenly.
PRODUCTS = _words(
    """
    mul matmul mm bmm mv dot vdot vecdot inner outer ger einsum tensordot kron cross chain_matmul
    multi_dot linalg_multi_dot linalg_vecdot linalg_cross
    """
)
