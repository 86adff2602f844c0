"""Counts the compute of a torch network by running it on the meta device: shapes only, no memory and no arithmetic.

Every operator that reaches the dispatcher is counted, known to be free, or an error, so that no unknown operator counts
as zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.compute.meta_torch import FusedAttention, build_on_meta, example_inputs, neutral_state
from harness.errors import RunError, UserError, one_line
from harness.spec import BackboneSpec, Compute, ComputeRow


def _matmul(a: Tensor, b: Tensor) -> int:
    """Multiply-adds of a (..., M, K) times b (..., K, N)."""
    return prod(a.shape) * b.shape[-1]


def _convolution(args: tuple[Any, ...], out: Tensor) -> int:
    """Multiply-adds of aten::convolution. args: (input, weight, bias, stride, padding, dilation, transposed, ...)."""
    x, weight, transposed = args[0], args[1], args[6]
    # An element of the output takes a kernel for every input channel of its group. If transposed, an element of the input
    # takes a kernel for every output channel of its group. Both are the elements of weight[0].
    return prod((x if transposed else out).shape) * prod(weight.shape[1:])


def _attention(args: tuple[Any, ...], out: object) -> int:
    """Multiply-adds of query x key and of scores x value, for inputs (N, heads, tokens, features)."""
    query, key, value = args[:3]
    n, heads, tokens, features = query.shape
    return n * heads * tokens * key.shape[-2] * (features + value.shape[-1])


# The arguments of addmm, addmv and baddbmm begin with the tensor that is added, such as a bias.
COUNTED: dict[str, tuple[str, Callable[[tuple[Any, ...], Any], int]]] = {
    "aten::mm": ("linear", lambda args, out: _matmul(args[0], args[1])),
    "aten::addmm": ("linear", lambda args, out: _matmul(args[1], args[2])),
    "aten::mv": ("linear", lambda args, out: prod(args[0].shape)),
    "aten::addmv": ("linear", lambda args, out: prod(args[1].shape)),
    "aten::dot": ("linear", lambda args, out: prod(args[0].shape)),
    # Batched products are products of two activations: unfused attention.
    "aten::bmm": ("attention", lambda args, out: _matmul(args[0], args[1])),
    "aten::baddbmm": ("attention", lambda args, out: _matmul(args[1], args[2])),
    "aten::convolution": ("conv", _convolution),
    "aten::_convolution": ("conv", _convolution),
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
    abs acos add addcdiv addcmul all alias amax amin any arange argmax as_strided asin atan atan2 bernoulli bitwise_and
    bitwise_not bitwise_or bitwise_xor cat ceil celu clamp clamp_max clamp_min clone constant_pad_nd contiguous copy
    copy_ cos cosh cumsum detach diagonal div dropout elu embedding empty empty_like empty_permuted empty_strided eq
    erf exp exp2 expand expm1 eye fill fill_ flatten flip floor floor_divide fmod full full_like gather ge gelu glu gt
    hardsigmoid hardswish hardtanh index index_put index_select isinf isnan isfinite le leaky_relu lerp lift
    lift_fresh lift_fresh_copy linspace log log10 log1p log2 log_sigmoid_forward _log_softmax logical_and logical_not
    logical_or logsumexp lt masked_fill maximum max mean min minimum mish movedim mul multiply native_dropout ne neg
    new_empty new_empty_strided new_full new_ones new_zeros normal normal_ one_hot ones ones_like permute pixel_shuffle
    pixel_unshuffle pow prod rand rand_like randn randn_like reciprocal reflection_pad1d reflection_pad2d relu
    remainder repeat repeat_interleave replication_pad2d reshape roll round rsqrt rsub scalar_tensor scatter select
    selu sigmoid sign silu sin sinh slice slice_scatter softplus _softmax _safe_softmax split split_with_sizes sqrt
    squeeze stack std sub sum t tan tanh tile _to_copy to transpose tril triu true_divide trunc unbind unfold unflatten
    _unsafe_view unsqueeze var var_mean view view_as_complex view_as_real where zero_ zeros zeros_like
    avg_pool1d avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d max_pool2d max_pool2d_with_indices im2col col2im
    upsample_nearest1d upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d
"""
FREE = frozenset(f"aten::{name}" for name in _FREE_NAMES.split())
"""Operators that are free in the convention: element-wise, reductions, shapes, look-ups, pooling, resampling."""


class OperatorCounter(TorchDispatchMode):
    """Mode that makes a row for every counted operator that runs in it, named by the innermost running module.

    backbone: name of the network, for messages. uncounted_norms: see `BackboneSpec`. RunError for an operator that is
    neither counted nor known to be free.
    """

    def __init__(self, backbone: str, uncounted_norms: tuple[str, ...]):
        super().__init__()
        self.backbone = backbone
        self.uncounted_norms = uncounted_norms
        self.modules: list[str] = []  # qualified names of the running modules, outermost first: see `follow_modules`
        self.rows: list[ComputeRow] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        module_path = self.modules[-1] if self.modules else ""
        if name in COUNTED:
            kind, count = COUNTED[name]
            if kind != "norm" or not any(fnmatchcase(module_path, pattern) for pattern in self.uncounted_norms):
                self.rows.append(ComputeRow(module_path, kind, count(args, out)))
        # An in-place operator is free if its out-of-place variant is.
        elif name not in FREE and not (name.endswith("_") and name[:-1] in FREE) and not name.startswith("prim::"):
            raise RunError(
                f"backbone {self.backbone!r}: operator {name} in module {module_path or 'at the top'!r} is neither"
                " counted nor known to be free; add it to COUNTED or to FREE in harness.compute.trace_torch, or give the"
                " backbone's spec a closed_form"
            )
        return out


def trace(spec: BackboneSpec, **overrides: object) -> Compute:
    """Compute of one forward pass of the torch network on one image, counted operator by operator.

    `overrides` are arguments of the builder. Rows are named by the qualified name of the innermost module. `params` counts
    the parameters that require a gradient. Raises RunError for an operator that is neither counted nor known to be free.
    """
    arguments = spec.arguments(**overrides)
    with neutral_state():
        net = build_on_meta(spec, overrides).eval()
        inputs = example_inputs(spec, arguments)
        counter = OperatorCounter(spec.name, spec.uncounted_norms)
        try:
            with follow_modules(net, counter.modules), counter, FusedAttention(), torch.no_grad():
                net(*inputs)
        except (UserError, RunError):
            raise
        except Exception as error:  # other people's code can raise anything
            raise UserError(f"backbone {spec.name!r}: its network failed on one image: {one_line(error)}") from error
    params = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return Compute(params=params, rows=tuple(counter.rows), source="traced")


@contextlib.contextmanager
def follow_modules(net: nn.Module, running: list[str]) -> Iterator[None]:
    """Context in which the list `running` is kept up to date: the qualified names of the modules whose forward is running,
    outermost first."""

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: object) -> None:
        running.pop()

    handles = []
    for name, module in net.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
