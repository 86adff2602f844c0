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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from harness.compute.custom import Blind, Declaration, declaration
from harness.compute.meta_torch import FusedAttention, build_on_meta, example_inputs, neutral_state
from harness.compute.operators_torch import COUNTED, FREE, MOVES, SUMS
from harness.errors import RunError, UserError, one_line
from harness.spec import BackboneSpec, Compute, ComputeRow

_PATCHING = threading.RLock()  # of `follow_functions`


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
