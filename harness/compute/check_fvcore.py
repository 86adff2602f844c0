"""An independent count of a torch network's compute by fvcore, in the convention of `harness.compute`.

By default, fvcore does not count fused attention, and counts 4 to 5 flops per element of a normalisation and 1 to 4 per
element of resampling and adaptive pooling (facebookresearch/fvcore v0.1.5, nn/flop_count.py and nn/jit_handles.py).
Handlers here replace these rules by those of the convention.
"""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch

from harness.compute.meta_torch import build_on_meta, example_inputs, neutral_state
from harness.compute.trace_torch import FREE as FREE_IN_TRACE
from harness.errors import RunError, UserError, one_line
from harness.spec import BackboneSpec

NORMS = ("aten::layer_norm", "aten::group_norm", "aten::batch_norm", "aten::rms_norm")
# What a torch.jit graph calls differently than the dispatcher, beside in-place variants.
_FURTHER_NAMES = "chunk dropout flatten instance_norm log_softmax pad softmax unflatten"
FREE = (
    FREE_IN_TRACE
    | {f"{name}_" for name in FREE_IN_TRACE}
    | {f"aten::{name}" for name in _FURTHER_NAMES.split()}
    | {"prim::PythonOp._SigmoidGelu"}  # GELU on CPUs
)


def count_fvcore(spec: BackboneSpec, **overrides: Any) -> int:
    """Flops of one forward pass on one image by fvcore. overrides: arguments of the builder.

    Raises UserError if fvcore is not installed, RunError for an operator that fvcore does not count.
    """
    with neutral_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which fvcore is built on
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # shapes become constants, as intended
        try:
            from fvcore.nn import FlopCountAnalysis
        except ImportError as error:
            raise UserError("--check fvcore needs fvcore; run: pip install 'backbone-harness[fvcore]'") from error
        # fvcore's tracer does not accept meta tensors, so the network runs, with uninitialised weights.
        net = build_on_meta(spec, overrides).to_empty(device="cpu").eval().requires_grad_(False)
        inputs = tuple(torch.zeros_like(x, device="cpu") for x in example_inputs(spec, spec.arguments(**overrides)))
        analysis = FlopCountAnalysis(net, inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention)
        analysis.set_op_handle("aten::_convolution_mode", _convolution_mode)
        for name in NORMS:
            analysis.set_op_handle(name, _input_elements)
        for name in FREE:
            analysis.set_op_handle(name, _zero_flops)  # a handler of None would keep fvcore's handler
        try:
            by_module = analysis.by_module_and_operator()
        except Exception as error:  # fvcore and torch.jit can raise anything
            raise RunError(f"backbone {spec.name!r}: fvcore cannot trace it: {one_line(error)}") from error
        if unknown := sorted(analysis.unsupported_ops()):
            raise RunError(
                f"backbone {spec.name!r}: fvcore does not count {unknown[0]}, so there is no second count of this network"
            )
    norms = {"layer_norm", "group_norm", "batch_norm"}  # as fvcore names them
    uncounted = sum(
        flops
        for path, operators in by_module.items()
        if any(fnmatchcase(path, pattern) for pattern in spec.uncounted_norms)
        for operator, flops in operators.items()
        if operator in norms
    )
    return int(sum(by_module[""].values()) - uncounted)  # "" is the whole network


# Handlers of fvcore: functions from an operator's inputs and outputs, values of the torch.jit graph, to its flops.


def _shape(value: Any) -> list[int]:
    """The shape of a tensor in the torch.jit graph."""
    return value.type().sizes()


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """The multiply-adds of query x key and of scores x value, for inputs (N, heads, tokens, features)."""
    query, key, value = (_shape(tensor) for tensor in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _convolution_mode(inputs: list[Any], outputs: list[Any]) -> int:
    """The multiply-adds of a convolution with padding="same" or "valid": a kernel's for each element of the output."""
    return prod(_shape(outputs[0])) * prod(_shape(inputs[1])[1:])


def _zero_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """The rule for operators that are free."""
    return 0


def _input_elements(inputs: list[Any], outputs: list[Any]) -> int:
    """One flop for each element of the input: the rule for normalisations."""
    return prod(_shape(inputs[0]))
