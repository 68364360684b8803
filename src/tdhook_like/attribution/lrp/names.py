"""What torch's functions are called, and of what kind they are: linear, elementwise, products.

Every name stands in one of these sets, among the rules of ``functions.py``, or nowhere: then the
function is non-linear, nobody handles it, and a run says so.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CARRYING",
    "CONVOLUTIONS",
    "ENTRYWISE",
    "FOLLOWED",
    "GATES",
    "PASSED",
    "PRODUCTS",
    "SUMS",
    "TANGENTS",
    "TRANSPARENT",
    "spoken",
]


def spoken(function: Any) -> str:
    """A function's name in all its spellings: without underscores, namespaces and overloads.

    Args:
        function: The function, or one of its names.

    >>> import torch
    >>> spoken(torch.Tensor.tanh_), spoken(torch.special.erf), spoken(torch.nn.functional.gelu)
    ('tanh', 'erf', 'gelu')
    >>> spoken(torch.Tensor.__rsub__), spoken("__imul__"), spoken(torch.ops.aten.mul.Tensor)
    ('rsub', 'mul', 'mul')
    """
    given = function
    if not isinstance(given, str):
        given = getattr(function, "__name__", type(function).__name__)
    given = given.partition(".")[0]
    name = given.strip("_")
    for space in ("special_", "linalg_", "fft_"):
        name = name.removeprefix(space) or name
    if given.startswith("__i") and name[1:] in _IN_PLACE:
        name = name[1:]
    return _ALIASES.get(name, name)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_IN_PLACE = _words("add sub mul div truediv floordiv mod pow matmul and or xor lshift rshift")
_ALIASES = {
    **{"radd": "add", "rmul": "mul", "multiply": "mul", "rmatmul": "matmul", "subtract": "sub"},
    **{"divide": "div", "true_divide": "div", "truediv": "div", "rtruediv": "rdiv"},
    **{"expit": "sigmoid", "psi": "digamma", "gammaln": "lgamma", "multigammaln": "mvlgamma"},
    **{"absolute": "abs", "clip": "clamp", "clip_min": "clamp_min", "clip_max": "clamp_max"},
    **{"arctan": "atan", "arcsin": "asin", "arccos": "acos", "arctanh": "atanh", "negative": "neg"},
    **{"arcsinh": "asinh", "arccosh": "acosh", "arctan2": "atan2", "logsigmoid": "log_sigmoid"},
    **{"concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose"},
    **{"moveaxis": "movedim", "inv": "inverse", "greater": "gt", "greater_equal": "ge"},
    **{"less": "lt", "less_equal": "le", "not_equal": "ne", "ger": "outer", "fix": "trunc"},
    **{"sparse_mm": "mm", "trapz": "trapezoid", "row_stack": "vstack", "nll_loss_nd": "nll_loss"},
}

#: Asked for shapes, types and flags, or giving tensors without a graph: nothing flows there.
TRANSPARENT = _words(
    """
    size dim ndim ndimension dimI dimV dense_dim sparse_dim dim_order numel nelement nnz stride
    storage_offset element_size shape get_device is_floating_point is_complex is_conj is_neg
    is_signed is_contiguous is_same_size is_coalesced is_distributed is_pinned is_view
    nested_tensor_size nested_tensor_strides nested_tensor_storage_offsets
    get set len bool int float_value item tolist numpy repr
    format hash contains iter reversed dir array array_wrap index backward register_hook
    register_post_accumulate_grad_hook clear_non_serializable_cached_data module_load
    requires_grad retain_grad retains_grad detach detach_copy data_ptr const_data_ptr
    untyped_storage storage storage_type is_shared share_memory is_inference is_nonzero is_set_to
    has_names rename_ deepcopy reduce_ex reduce setstate dlpack dlpack_device record_stream
    pin_memory hash_tensor set_grad_enabled is_grad_enabled coalesced
    eq ne lt le gt ge equal allclose isclose isnan isinf isfinite isposinf isneginf isreal isin
    signbit logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not
    bitwise_xor bitwise_left_shift bitwise_right_shift lshift rshift rlshift rrshift
    and or xor invert not rand ror rxor any all argmax argmin argsort argwhere nonzero
    nonzero_static count_nonzero searchsorted bucketize bincount histc histogram histogramdd
    unique unique_consecutive multinomial bernoulli binomial poisson unravel_index gcd lcm
    matrix_rank floor_divide floordiv rfloordiv byte char short long
    zeros zeros_like ones ones_like empty empty_like full full_like rand_like randn_like randint
    randint_like randn randperm normal uniform random cauchy exponential geometric log_normal
    arange linspace logspace eye tensor as_tensor
    new_zeros new_ones new_empty new_full new_tensor new one_hot tril_indices triu_indices
    finfo iinfo result_type can_cast promote_types broadcast_shapes is_tensor
    sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum
    resize resize_as resize_as_sparse sparse_resize sparse_resize_and_clear
    qscheme q_scale q_zero_point q_per_channel_axis q_per_channel_scales
    q_per_channel_zero_points int_repr indices indices_copy ccol_indices ccol_indices_copy
    col_indices col_indices_copy crow_indices crow_indices_copy row_indices row_indices_copy
    batch_norm_stats batch_norm_gather_stats batch_norm_gather_stats_with_counts
    batch_norm_update_stats batch_norm_backward_elemt batch_norm_backward_reduce
    choose_qparams_optimized fbgemm_linear_quantize_weight fbgemm_pack_gemm_matrix_fp16
    fbgemm_pack_quantized_matrix slice_inverse sparse_mask_projection
    """
)

#: Sums, in which constants may take part: what they give is still a function of each entry alone.
SUMS = _words("add sub rsub")

#: Linear entry by entry, and alone.
ENTRYWISE = _words(
    """
    neg positive clone contiguous alias to type type_as float double half bfloat16 deg2rad rad2deg
    """
)

#: Moving entries about, each staying itself: what is known of the tensor holds of the result.
CARRYING = _words(
    """
    view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze transpose t T mT H
    permute movedim adjoint expand expand_as broadcast_to repeat repeat_interleave tile
    atleast_1d atleast_2d atleast_3d chunk split split_with_sizes tensor_split hsplit vsplit dsplit
    unsafe_chunk unsafe_split unsafe_split_with_sizes unbind narrow narrow_copy select slice
    index_select getitem gather take take_along_dim masked_select roll flip fliplr flipud rot90
    as_strided unfold diagonal broadcast_tensors meshgrid real imag view_as_real view_as_complex conj
    resolve_conj resolve_neg conj_physical
    dropout dropout1d dropout2d dropout3d feature_dropout native_dropout
    rename refine_names align_to align_as
    """
)

#: Linear in what depends on the inputs, homogeneous of degree one, or picking entries of it: its
#: own gradient is the rule.
FOLLOWED = _words(
    """
    cat stack hstack vstack dstack column_stack block_diag cartesian_prod combinations
    setitem delitem masked_fill
    scatter_add select_scatter slice_scatter diagonal_scatter as_strided_scatter
    index_add index_copy index_put index_fill masked_scatter where fill fill_diagonal zero copy put
    sum mean nansum nanmean sum_to_size cumsum trace diag diag_embed diagflat tril triu
    diff gradient
    pad constant_pad_nd fold pixel_shuffle pixel_unshuffle
    native_channel_shuffle channel_shuffle interpolate upsample upsample_nearest
    upsample_bilinear affine_grid affine_grid_generator avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    alpha_dropout feature_alpha_dropout cpu cuda xpu ipu mtia cfloat cdouble chalf
    autocast_to_full_precision autocast_to_reduced_precision
    complex
    fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn hfft ihfft hfft2 ihfft2
    hfftn ihfftn fftshift ifftshift embedding embedding_bag nll_loss nll_loss2d
    alias_copy as_strided_copy diagonal_copy expand_copy permute_copy select_copy slice_copy
    split_copy split_with_sizes_copy squeeze_copy t_copy transpose_copy unbind_copy unfold_copy
    unsqueeze_copy view_copy view_as_complex_copy view_as_real_copy values values_copy
    to_dense to_sparse to_mkldnn coalesce sparse_mask sparse_sum
    sort topk max min amax amin aminmax maximum minimum fmax fmin median nanmedian mode kthvalue
    quantile nanquantile msort cummax cummin nan_to_num
    relu leaky_relu rrelu abs copysign hypot norm native_norm vector_norm matrix_norm
    norm_except_dim std std_mean dist cdist pdist pairwise_distance frobenius_norm nuclear_norm
    svdvals eigvalsh
    max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
    max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices
    adaptive_max_pool3d_with_indices fractional_max_pool2d fractional_max_pool3d
    fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices
    max_unpool1d max_unpool2d max_unpool3d lp_pool1d lp_pool2d lp_pool3d checkpoint
    pack_padded_sequence pad_packed_sequence
    """
)

#: Elementwise and non-linear: relevance passes through.
PASSED = _words(
    """
    gelu silu mish tanh sigmoid elu celu selu softplus softsign log_sigmoid tanhshrink softshrink
    hardshrink hardtanh hardsigmoid hardswish relu6 threshold exp expm1 exp2 rpow log log1p log2
    log10 logit sqrt square sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erfcx
    erfinv lgamma digamma mvlgamma sinc entr ndtr ndtri log_ndtr i0 i0e i1 i1e airy_ai bessel_j0
    bessel_j1 bessel_y0 bessel_y1 modified_bessel_i0 modified_bessel_i1 modified_bessel_k0
    modified_bessel_k1 scaled_modified_bessel_k0 scaled_modified_bessel_k1 spherical_bessel_j0
    renorm
    """
)

#: Activations whose result, beside a signal, is a gate.
GATES = _words(
    """
    sigmoid hardsigmoid tanh hardtanh silu gelu relu relu6 leaky_relu mish softplus elu selu celu
    hardswish log_sigmoid softsign
    """
)

#: Linear in each operand: what depends on the inputs shares relevance evenly. (``mul``: see
#: ``functions.py``.)
PRODUCTS = _words(
    """
    matmul mm bmm mv dot vdot vecdot inner outer einsum tensordot kron cross chain_matmul multi_dot
    grouped_mm hspmm hsmm dsmm smm
    """
)

#: Softmax's relatives, whose first-order expansion at the point is the rule.
TANGENTS = _words("log_softmax logsumexp logcumsumexp logaddexp logaddexp2 cross_entropy_loss")

CONVOLUTIONS = _words(
    """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution conv_tbc
    """
)
