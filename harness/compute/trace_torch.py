"""Counts the compute of a torch network by running it on the meta device: shapes only, no memory and no arithmetic.

Every operator that reaches the dispatcher is counted, known to be free, or an error, so that no unknown operator counts
as zero.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from harness.compute.custom import Blind, Declaration, declaration
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
    abs acos add addcdiv addcmul all alias amax amin any arange argmax argsort as_strided asin atan atan2 bernoulli bitwise_and
    bitwise_not bitwise_or bitwise_xor cat ceil celu clamp clamp_max clamp_min clone constant_pad_nd contiguous copy
    copy_ cos cosh cumsum detach diagonal div dropout elu embedding empty empty_like empty_permuted empty_strided eq
    erf exp exp2 expand expm1 eye fill fill_ flatten flip floor floor_divide fmod full full_like gather ge gelu glu gt
    hardsigmoid hardswish hardtanh index index_put index_select isinf isnan isfinite le leaky_relu lerp lift
    lift_fresh lift_fresh_copy linspace log log10 log1p log2 log_sigmoid_forward _log_softmax logical_and logical_not
    logical_or logsumexp lt masked_fill maximum max mean min minimum mish movedim mul multiply native_dropout ne neg
    new_empty new_empty_strided new_full new_ones new_zeros normal normal_ one_hot ones ones_like permute pixel_shuffle
    pixel_unshuffle pow prod rand rand_like randint randn randn_like randperm reciprocal reflection_pad1d reflection_pad2d relu
    remainder repeat repeat_interleave replication_pad2d reshape roll round rsqrt rsub scalar_tensor scatter scatter_add select
    selu sigmoid sign silu sin sinh slice slice_scatter softplus _softmax _safe_softmax sort split split_with_sizes sqrt
    squeeze stack std sub sum t tan tanh tile _to_copy to topk transpose tril triu true_divide trunc unbind unfold unflatten
    _unsafe_view unsqueeze var var_mean view view_as_complex view_as_real where zero_ zeros zeros_like
    avg_pool1d avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d max_pool2d max_pool2d_with_indices im2col col2im
    upsample_nearest1d upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa linalg_vector_norm
"""
FREE = frozenset(f"aten::{name}" for name in _FREE_NAMES.split())
"""Operators that are free in the convention: element-wise, reductions, shapes, look-ups, pooling, resampling."""


_MOVES = """
    alias as_strided cat clone constant_pad_nd contiguous copy copy_ detach empty empty_like empty_permuted empty_strided
    expand eye fill fill_ flatten full full_like lift lift_fresh lift_fresh_copy movedim new_empty new_empty_strided new_full
    new_ones new_zeros ones ones_like permute repeat reshape select slice split split_with_sizes squeeze stack t _to_copy to
    transpose unbind unflatten _unsafe_view unsqueeze view zero_ zeros zeros_like
"""
MOVES = frozenset(f"aten::{name}" for name in _MOVES.split())
"""Operators that compute nothing: what a branch for the meta device consists of."""

_PATCHING = threading.RLock()  # of `follow_functions`
SUMS = frozenset({"aten::sum", "aten::mean", "aten::cumsum"})


class OperatorCounter(TorchDispatchMode):
    """Mode that makes a row for every counted operator that runs in it, named by the innermost running module.

    backbone: name of the network, for messages. uncounted_norms: see `BackboneSpec`. RunError for an operator that is
    neither counted, nor declared (`harness.compute.custom`), nor known to be free.
    """

    def __init__(self, backbone: str, uncounted_norms: tuple[str, ...]):
        super().__init__()
        self.backbone = backbone
        self.uncounted_norms = uncounted_norms
        self.modules: list[str] = []  # qualified names of the running modules, outermost first: see `follow_modules`
        self.rows: list[ComputeRow] = []
        self.blind = Blind()
        self.arithmetic = 0  # operators that were seen and are not in MOVES
        self.suspended = False  # within a declared function
        # Results of element-wise products, by address. The storages are kept, so that no other one gets their address.
        self._products: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        # Within another mode, as for a composed version, operators come that are made of others, such as matmul.
        if (
            not self.suspended
            and name not in COUNTED
            and name not in FREE
            and func is not torch.ops.prim.device.default
        ):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if self.suspended:
            return out
        self.arithmetic += name not in MOVES
        self._watch(name, args, out)
        module_path = self.modules[-1] if self.modules else ""
        if name in COUNTED:
            kind, count = COUNTED[name]
            if kind != "norm" or not any(fnmatchcase(module_path, pattern) for pattern in self.uncounted_norms):
                self.rows.append(ComputeRow(module_path, kind, count(args, out)))
        elif (declared := declaration(name)) is not None:
            self.count_declared(declared, args, kwargs, out)
        # An in-place operator is free if its out-of-place variant is.
        elif name in FREE or (name.endswith("_") and name[:-1] in FREE) or name.startswith("prim::"):
            pass
        elif func._overloadpacket in flop_registry:  # torch's own door, which counts a multiply-add as two
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) // 2
            self.rows.append(ComputeRow(module_path, "custom", flops))
        else:
            raise RunError(
                f"backbone {self.backbone!r}: operator {name} in module {module_path or 'at the top'!r} is neither counted nor"
                " known to be free; declare its compute with harness.compute.register_flops, or give the backbone's spec a"
                " closed_form"
            )
        return out

    def count_declared(self, declared: Declaration, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Make the row of a call of a declared operation that gave `out`."""
        composed, difference = None, 0.0
        if declared.composed is not None:
            composed, difference = self._composed(declared, args, kwargs, out)
        flops = composed if declared.count is None else declared.flops(*args, **kwargs)
        assert flops is not None
        if composed is not None:
            self.blind.declared.append((declared.name, flops, composed, difference))
        self.rows.append(ComputeRow(self.modules[-1] if self.modules else "", "custom", flops))

    def _composed(
        self, declared: Declaration, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> tuple[int, float]:
        """(flops of the composed version, the largest difference of its result from `out`; 0 on the meta device)."""
        assert declared.composed is not None
        counter, suspended = OperatorCounter(self.backbone, ()), self.suspended
        self.suspended = True  # this mode sees the operators of the inner one, too
        try:
            with counter, FusedAttention(), torch.no_grad():
                expected = declared.composed(*args, **kwargs)
            difference = max(map(_difference, _tensors(out), _tensors(expected)), default=0.0)
        except (UserError, RunError):
            raise
        except Exception as error:  # other people's code can raise anything
            raise UserError(f"register_flops: composed of {declared.name} failed: {one_line(error)}") from error
        finally:
            self.suspended = suspended
        return sum(row.flops for row in counter.rows), difference

    def _watch(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        """Note element-wise products of two tensors, and sums of such products."""
        if name == "aten::mul" and len(args) == 2 and all(isinstance(each, Tensor) for each in args):
            # A square is that of a norm, and a factor that is one number is no product of a sum.
            if args[0] is not args[1] and min(args[0].numel(), args[1].numel()) > 1:
                storage = out.untyped_storage()
                self._products[storage._cdata] = storage
        elif name in SUMS and args[0].untyped_storage()._cdata in self._products:
            module_path = self.modules[-1] if self.modules else ""
            self.blind.summed[module_path] = self.blind.summed.get(module_path, 0) + args[0].numel()


def _tensors(out: Any) -> list[Tensor]:
    return [each for each in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(each, Tensor)]


def _difference(out: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the standard deviation; infinity for another shape, 0 on the meta device."""
    if out.shape != expected.shape:
        return math.inf
    if out.is_meta or not out.numel():
        return 0.0
    scale = float(expected.double().std(correction=0)) or 1.0
    return float((out.double() - expected.double()).abs().max()) / scale


def trace(spec: BackboneSpec, *, training: bool = False, **overrides: object) -> Compute:
    """Compute of one forward pass of the torch network on one image, counted operator by operator.

    training: in training mode, else in evaluation mode.

    `overrides` are arguments of the builder. Rows are named by the qualified name of the innermost module. `params` counts
    the parameters that require a gradient. Raises RunError for an operator that is neither counted, nor declared
    (`harness.compute.register_flops`), nor known to be free.
    """
    return trace_and_doubt(spec, training=training, **overrides)[0]


def trace_and_doubt(spec: BackboneSpec, *, training: bool = False, **overrides: object) -> tuple[Compute, Blind]:
    """As `trace`, with what the count may have missed."""
    arguments = spec.arguments(**overrides)
    with neutral_state():
        net = build_on_meta(spec, overrides).train(training)
        inputs = example_inputs(spec, arguments)
        counter = OperatorCounter(spec.name, spec.uncounted_norms)
        try:
            with (
                follow_modules(net, counter.modules),
                follow_functions(counter),
                counter,
                FusedAttention(),
                torch.no_grad(),
            ):
                net(*inputs)
        except (UserError, RunError):
            raise
        except Exception as error:  # other people's code can raise anything
            raise UserError(f"backbone {spec.name!r}: its network failed on one image: {one_line(error)}") from error
    params = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return Compute(params=params, rows=tuple(counter.rows), source="traced"), counter.blind


def count_call(spec: BackboneSpec, net: nn.Module, inputs: Sequence[Tensor]) -> tuple[int, Blind]:
    """(flops of one call of a network on its device, as counted by the convention; what the count may have missed)."""
    counter = OperatorCounter(spec.name, spec.uncounted_norms)
    with follow_modules(net, counter.modules), follow_functions(counter), counter, torch.no_grad():
        net(*inputs)
    return sum(row.flops for row in counter.rows), counter.blind


@contextlib.contextmanager
def follow_functions(counter: OperatorCounter) -> Iterator[None]:
    """Context in which the subclasses of torch.autograd.Function that are not torch's count as declared; one that is not
    declared, and in which no arithmetic is seen, is noted in `counter.blind`.
    """

    def followed(kind: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        with_context = kind.setup_context is torch.autograd.Function.setup_context  # forward(ctx, *inputs)

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            declared = declaration(kind)
            before, suspended = counter.arithmetic, counter.suspended
            counter.suspended = suspended or declared is not None
            try:
                out = forward(*args, **kwargs)
            finally:
                counter.suspended = suspended
            if declared is not None and not suspended:
                counter.count_declared(declared, args[1:] if with_context else args, kwargs, out)
            elif counter.arithmetic == before and not suspended:
                counter.blind.silent.append(kind.__name__)
            return out

        return call

    # Not `apply`, which code may have bound to a name of its own. Classes are shared by all threads.
    with _PATCHING:
        yield from _patched(followed)


def _patched(followed: Callable[[Any, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace `forward` of the functions that are not torch's by what `followed` makes of it, until the next step."""
    kinds = [kind for kind in _subclasses(torch.autograd.Function) if not kind.__module__.startswith("torch.")]
    before = {kind: (vars(kind).get("forward"), kind.forward) for kind in kinds}
    for kind, (_, forward) in before.items():
        kind.forward = staticmethod(followed(kind, forward))
    try:
        yield
    finally:
        for kind, (own, _) in before.items():
            if own is None:
                del kind.forward
            else:
                kind.forward = own


def _subclasses(kind: Any) -> list[Any]:
    """All classes below `kind`, each once."""
    found: dict[Any, None] = {}
    for each in kind.__subclasses__():
        found |= dict.fromkeys([each, *_subclasses(each)])
    return list(found)


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
