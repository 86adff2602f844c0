"""The operators of torch, by name: which count in the convention and which are free. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from harness.compute.fourier import COMPLEX_PRODUCT, fft_flops

if TYPE_CHECKING:
    from torch import Tensor


def _matmul(a: Tensor, b: Tensor) -> int:
    """Multiply-adds of a (..., M, K) times b (..., K, N)."""
    return COMPLEX_PRODUCT ** a.is_complex() * prod(a.shape) * b.shape[-1]


def _convolution(args: tuple[Any, ...], out: Tensor) -> int:
    """Multiply-adds of aten::convolution. args: (input, weight, bias, stride, padding, dilation, transposed, ...)."""
    x, weight, transposed = args[0], args[1], args[6]
    # An element of the output takes a kernel for every input channel of its group. If transposed, an element of the input
    # takes a kernel for every output channel of its group. Both are the elements of weight[0].
    return prod((x if transposed else out).shape) * prod(weight.shape[1:])


def _fft(args: tuple[Any, ...], out: Tensor) -> int:
    """Multiply-adds of aten::_fft_r2c, _fft_c2r and _fft_c2c. args: (input, dim, ...)."""
    x, dim = args[:2]
    real = not (x.is_complex() and out.is_complex())
    values = out if x.is_complex() else x  # the side that is real has all values, the other one half of the frequencies
    return fft_flops(prod(values.shape), [values.shape[i] for i in dim], real)


def _attention(args: tuple[Any, ...], out: object) -> int:
    """Multiply-adds of query x key and of scores x value, for inputs (N, heads, tokens, features)."""
    query, key, value = args[:3]
    n, heads, tokens, features = query.shape
    return n * heads * tokens * key.shape[-2] * (features + value.shape[-1])


# The arguments of addmm, addmv and baddbmm begin with the tensor that is added, such as a bias.
COUNTED: dict[str, tuple[str, Callable[[tuple[Any, ...], Any], int]]] = {
    "aten::mm": ("linear", lambda args, out: _matmul(args[0], args[1])),
    "aten::addmm": ("linear", lambda args, out: _matmul(args[1], args[2])),
    "aten::mv": ("linear", lambda args, out: _matmul(args[0], args[1][:, None])),
    "aten::addmv": ("linear", lambda args, out: _matmul(args[1], args[2][:, None])),
    "aten::dot": ("linear", lambda args, out: _matmul(args[0][None], args[1][:, None])),
    # Batched products are products of two activations: unfused attention.
    "aten::bmm": ("attention", lambda args, out: _matmul(args[0], args[1])),
    "aten::baddbmm": ("attention", lambda args, out: _matmul(args[1], args[2])),
    "aten::convolution": ("conv", _convolution),
    "aten::_convolution": ("conv", _convolution),
    **{f"aten::_fft_{kind}": ("fft", _fft) for kind in ("r2c", "c2r", "c2c")},
    **{
        f"aten::{name}": ("attention", _attention)
        for name in (
            "scaled_dot_product_attention",
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        )
    },
    **{
        f"aten::{name}": ("norm", lambda args, out: prod(args[0].shape))
        for name in (
            "native_layer_norm",
            "native_group_norm",
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_impl_index",
            "_batch_norm_with_update",
            "_batch_norm_no_update",
            "cudnn_batch_norm",
            "_fused_rms_norm",
            "rms_norm",
        )
    },
}
"""Operators that the convention counts: kind of row, and function from (arguments, result) to flops."""

_FREE_NAMES = """
    abs acos add addcdiv addcmul addr alias all amax amin angle any arange argmax argsort as_strided asin atan atan2
    bernoulli bitwise_and bitwise_not bitwise_or bitwise_xor bucketize cat ceil celu channel_shuffle clamp clamp_max
    clamp_min clone complex _conj _conj_physical conj_physical constant_pad_nd contiguous copy_ copy cos cosh cummax
    cummin cumprod cumsum deg2rad detach diagonal div dropout elu embedding empty empty_like empty_permuted
    empty_strided eq erf erfc erfinv exp exp2 expand expm1 exponential eye fft_fftfreq fft_rfftfreq fill_ fill
    flatten flip floor floor_divide fmod frac full full_like gather ge gelu glu gt hardshrink hardsigmoid hardswish
    hardtanh heaviside hypot index index_add index_copy index_fill index_put index_select isfinite isinf isnan le
    leaky_relu lerp lgamma lift lift_fresh lift_fresh_copy linalg_cross linalg_vector_norm linspace _local_scalar_dense
    log log10 log1p log2 log_normal log_sigmoid_forward _log_softmax logaddexp logaddexp2 logcumsumexp logical_and logical_not
    logical_or logit logsumexp lt masked_fill max maximum mean min minimum mish movedim mul multiply nan_to_num
    native_dropout ne neg _neg_view new_empty new_empty_strided new_full new_ones new_zeros normal normal_ one_hot
    ones ones_like permute pixel_shuffle pixel_unshuffle polar pow _prelu_kernel prod rad2deg rand rand_like randint
    randn randn_like randperm reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu remainder repeat
    repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape roll rot90 round
    rrelu_with_noise rsqrt rsub _safe_softmax scalar_tensor scatter scatter_add scatter_reduce searchsorted select
    selu sgn sigmoid sign signbit silu sin sinc sinh slice slice_scatter _softmax softplus softshrink sort split
    split_with_sizes sqrt squeeze stack std std_mean sub sum t tan tanh threshold tile to _to_copy topk transpose
    tril triu true_divide trunc unbind unflatten unfold uniform _unsafe_view unsqueeze var var_mean view
    view_as_complex view_as_real _weight_norm_interface where xlogy zero_ zeros zeros_like
    avg_pool1d avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d max_pool2d max_pool2d_with_indices im2col col2im
    upsample_nearest1d upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa adaptive_max_pool2d avg_pool3d grid_sampler_2d grid_sampler_3d
    max_pool3d_with_indices max_unpool2d upsample_linear1d upsample_trilinear3d
"""
FREE = frozenset(f"aten::{name}" for name in _FREE_NAMES.split())
"""Operators that are free in the convention: element-wise, reductions, sorting, shapes, look-ups, pooling, resampling,
random numbers."""


_MOVES = """
    alias as_strided cat clone constant_pad_nd contiguous copy copy_ detach empty empty_like empty_permuted empty_strided
    expand eye fill fill_ flatten full full_like lift lift_fresh lift_fresh_copy _local_scalar_dense movedim new_empty
    new_empty_strided new_full new_ones new_zeros ones ones_like permute repeat reshape select slice split split_with_sizes squeeze stack t _to_copy to
    transpose unbind unflatten _unsafe_view unsqueeze view zero_ zeros zeros_like
"""
MOVES = frozenset(f"aten::{name}" for name in _MOVES.split())
"""Operators that compute nothing: what a branch for the meta device consists of."""

SUMS = frozenset({"aten::sum", "aten::mean", "aten::cumsum"})
"""Operators that sum: an element-wise product behind which one stands may be a product that counts."""
