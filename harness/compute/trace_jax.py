"""Counts the compute of a Flax network from its jaxpr: traced abstractly, no memory and no arithmetic.

As in `trace_torch`, every primitive is counted, known to be free, or an error. A normalisation is many primitives in a
jaxpr. So during tracing, every call of a normalisation layer (flax.nnx's and their subclasses) marks its input. A
normalisation that is written out as arithmetic, without a layer, is free in both.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from backbones.flax_layers import dropout_rngs
from harness.compute.custom import Blind, Declaration, declaration
from harness.compute.fourier import COMPLEX_PRODUCT, fft_flops
from harness.errors import RunError, UserError, one_line
from harness.spec import BackboneSpec, Compute, ComputeRow

NORMS = (nnx.LayerNorm, nnx.GroupNorm, nnx.BatchNorm, nnx.InstanceNorm, nnx.RMSNorm)
MARK = "harness.normalisation"  # the name of a checkpoint_name equation on the input of a counted layer

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "call_jaxpr",
}
"""Primitives that run one jaxpr once, and the name of the parameter with that jaxpr."""

_FREE_NAMES = """
    abs acos acosh add add_any and argmax argmin asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    bitcast_convert_type broadcast_in_dim cbrt ceil clamp complex concatenate conj convert_element_type copy cos
    cosh cumlogsumexp cummax cummin cumprod cumsum device_put digamma div dynamic_slice dynamic_update_slice eq erf
    erf_inv erfc exp exp2 expm1 floor gather ge gt imag integer_pow iota is_finite le lgamma log log1p logistic lt
    max min mul name ne neg nextafter not optimization_barrier or pad pow random_bits random_fold_in random_seed
    random_split random_unwrap random_wrap real reduce_and reduce_max reduce_min reduce_or reduce_precision
    reduce_prod reduce_sum reduce_window_max reduce_window_min reduce_window_sum rem reshape rev round rsqrt scatter
    scatter-add scatter-max scatter-min scatter-mul select_n shift_left shift_right_arithmetic shift_right_logical
    sign sin sinh slice sort split sqrt square squeeze stack stop_gradient sub tan tanh threefry2x32 tile top_k
    transpose unstack xor
"""
FREE = frozenset(_FREE_NAMES.split())
"""Primitives that are free in the convention: element-wise, reductions, sorting, shapes, look-ups, pooling, random bits."""

SUMS = frozenset({"reduce_sum", "cumsum"})
PASSED_ON = frozenset({"reshape", "transpose", "squeeze", "convert_element_type", "broadcast_in_dim", "copy"})
"""Primitives that leave element-wise products what they are."""

_PATCHING = threading.Lock()  # of `_marking_calls`: the classes that it patches are shared by all threads


def _is_complex(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.complexfloating)


def _dot(eqn: Any) -> tuple[str, int]:
    """The kind of row and the multiply-adds of a dot_general equation."""
    (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    # Batched products are products of two activations, as in attention. (The operator @ drops a batch of 1, so such a
    # product is called linear; its cost is the same.)
    macs = prod(eqn.outvars[0].aval.shape) * prod(left[i] for i in contracted)
    return "attention" if batched else "linear", COMPLEX_PRODUCT ** _is_complex(eqn.invars[0]) * macs


def _convolution(eqn: Any) -> tuple[str, int]:
    """The kind of row and the multiply-adds of a conv_general_dilated equation, transposed or not."""
    left, kernel, out = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    # rhs_spec holds the kernel's axes of output channels, of input channels of one group, and of space.
    out_axis, in_axis, *_ = eqn.params["dimension_numbers"].rhs_spec
    assert eqn.params["batch_group_count"] == 1, "only a gradient has batch groups"
    if max(eqn.params["lhs_dilation"], default=1) > 1:
        # Transposed: each element of the input is multiplied by one kernel for every output channel of its group.
        kernels = prod(kernel) // kernel[in_axis] // eqn.params["feature_group_count"]
        return "conv", prod(left) * kernels
    return "conv", prod(out) * (prod(kernel) // kernel[out_axis])


def _fft(eqn: Any) -> tuple[str, int]:
    """The kind of row and the multiply-adds of a fast Fourier transform."""
    x, out = eqn.invars[0], eqn.outvars[0]
    real = not (_is_complex(x) and _is_complex(out))
    values = out if _is_complex(x) else x  # the side that is real has all values, the other one half of the frequencies
    return "fft", fft_flops(prod(values.aval.shape), eqn.params["fft_lengths"], real)


COUNTED = {"dot_general": _dot, "conv_general_dilated": _convolution, "fft": _fft}
"""Primitives that the convention counts, and the functions from an equation to (kind of row, flops)."""


class _Counter:
    """Makes a row for every counted primitive, named by the innermost module in which it was traced."""

    def __init__(self, backbone: str, uncounted_norms: tuple[str, ...], convolutions: frozenset[str]):
        self.backbone = backbone
        self.uncounted_norms = uncounted_norms
        self.convolutions = convolutions  # paths of nnx.Conv layers, some of which compute a matrix product
        self.blind = Blind()
        self._times = 1  # how often the jaxpr runs that is being counted

    def rows(self, jaxpr: Any, scope: str = "", products: frozenset[int] = frozenset()) -> list[ComputeRow]:
        """Rows of a jaxpr and of the jaxprs that it calls. scope: name stack of the call that runs it. products: which of
        its arguments are element-wise products."""
        rows: list[ComputeRow] = []
        summands = {jaxpr.invars[index] for index in products}  # variables that hold element-wise products
        for eqn in jaxpr.eqns:
            stack = f"{scope}/{eqn.source_info.name_stack}"
            # The innermost of the scopes "module<PATH>" that `_marking_calls` sets.
            module_path = (re.findall(r"module<([^>]*)>", stack) or [""])[-1]
            name = eqn.primitive.name
            self._watch(eqn, name, module_path, summands)
            if name == "name" and eqn.params["name"] == MARK:
                if not any(fnmatchcase(module_path, pattern) for pattern in self.uncounted_norms):
                    rows.append(ComputeRow(module_path, "norm", prod(eqn.invars[0].aval.shape)))
            elif name in COUNTED:
                kind, flops = COUNTED[name](eqn)
                rows.append(ComputeRow(module_path, "conv" if module_path in self.convolutions else kind, flops))
            elif name in CALLS:
                inner = _inner_jaxpr(eqn.params[CALLS[name]])
                given = {i for i, var in enumerate(eqn.invars) if not hasattr(var, "val") and var in summands}
                fits = len(inner.invars) == len(eqn.invars)
                rows += self.rows(inner, stack, frozenset(given) if fits else frozenset())
            elif (declared := declaration(("jax", name))) is not None:
                rows.append(ComputeRow(module_path, "custom", self._declared_flops(declared, eqn)))
            elif name == "scan":
                self._times *= eqn.params["length"]
                body = self.rows(_inner_jaxpr(eqn.params["jaxpr"]), stack)
                self._times //= max(eqn.params["length"], 1)
                rows += [row._replace(flops=row.flops * eqn.params["length"]) for row in body]
            elif name == "cond":
                branches = [self.rows(_inner_jaxpr(branch), stack) for branch in eqn.params["branches"]]
                if any(branch != branches[0] for branch in branches):
                    raise self.error("a lax.cond whose branches have different costs", module_path)
                rows += branches[0]
            elif name == "while":
                if self.rows(_inner_jaxpr(eqn.params["body_jaxpr"]), stack):
                    raise self.error("a lax.while_loop, whose number of iterations is unknown,", module_path)
            elif name not in FREE:
                raise self.error(f"primitive {name}", module_path)
        return rows

    def _declared_flops(self, declared: Declaration, eqn: Any) -> int:
        """The flops of an equation whose primitive is declared."""
        inputs = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.invars]
        composed = None
        if declared.composed is not None:
            try:
                inner = jax.make_jaxpr(functools.partial(declared.composed, **eqn.params))(*inputs)
            except Exception as error:  # other people's code can raise anything
                raise UserError(f"register_flops: composed of {declared.name} failed: {one_line(error)}") from error
            composed = sum(row.flops for row in _Counter(self.backbone, (), frozenset()).rows(inner.jaxpr))
        flops = composed if declared.count is None else declared.flops(*inputs, **eqn.params)
        assert flops is not None
        if composed is not None:
            self.blind.declared.append((declared.name, flops, composed, 0.0))
        return flops

    def _watch(self, eqn: Any, name: str, module_path: str, summands: set[Any]) -> None:
        """Note element-wise products of two arrays, and sums of such products."""
        inputs = [var for var in eqn.invars if not hasattr(var, "val")]  # a literal has a value, and no hash
        if name == "mul" and len(inputs) == 2:
            # A square is that of a norm, and a factor that is one number is no product of a sum.
            if inputs[0] is not inputs[1] and min(prod(var.aval.shape) for var in inputs) > 1:
                summands.add(eqn.outvars[0])
        elif name in PASSED_ON and inputs and inputs[0] in summands:
            summands.add(eqn.outvars[0])
        elif name in SUMS and inputs and inputs[0] in summands:
            flops = prod(inputs[0].aval.shape) * self._times
            self.blind.summed[module_path] = self.blind.summed.get(module_path, 0) + flops

    def error(self, what: str, module_path: str) -> RunError:
        """The error for a primitive whose cost is unknown. what: the primitive, as the message names it."""
        return RunError(
            f"backbone {self.backbone!r}: {what} in module {module_path or 'at the top'!r} is neither counted nor known"
            " to be free; declare its compute with harness.compute.register_flops, or give the backbone's spec a closed_form"
        )


def _name(path: Iterable[Any]) -> str:
    """The dotted name of a path of flax.nnx: ("blocks", 0) -> "blocks.0"."""
    return ".".join(map(str, path))


def _inner_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr inside a closed jaxpr; an open one is returned as it is."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def trace(spec: BackboneSpec, *, training: bool = False, **overrides: Any) -> Compute:
    """Compute of one forward pass of the Flax network on one image, counted primitive by primitive.

    training: as the trainer calls it, with `rngs` if the network takes them. `overrides` are arguments of the builder. Rows are named by the path of the innermost module, which is its torch name.
    `params` counts the `nnx.Param`s. Raises RunError for a primitive that is neither counted, nor declared
    (`harness.compute.register_flops`), nor known to be free.
    """
    return trace_and_doubt(spec, training=training, **overrides)[0]


def trace_and_doubt(spec: BackboneSpec, *, training: bool = False, **overrides: Any) -> tuple[Compute, Blind]:
    """As `trace`, with what the count may have missed."""
    jaxpr, net, _ = abstract_forward(spec, training=training, **overrides)
    params = sum(prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(net, nnx.Param)))
    convolutions = frozenset(_name(path) for path, module in nnx.iter_modules(net) if isinstance(module, nnx.Conv))
    counter = _Counter(spec.name, spec.uncounted_norms, convolutions)
    rows = counter.rows(jaxpr.jaxpr)
    return Compute(params=params, rows=tuple(rows), source="traced"), counter.blind


def abstract_forward(
    spec: BackboneSpec, *, training: bool = False, **overrides: Any
) -> tuple[Any, nnx.Module, jax.ShapeDtypeStruct]:
    """The closed jaxpr of one forward pass on one image, the abstract network, and the shape of its output."""
    arguments = spec.arguments(**overrides)
    if "gradient_checkpointing" in arguments:  # no cost in the forward pass, but it would hide the module names
        overrides = {**overrides, "gradient_checkpointing": False}
    net = nnx.eval_shape(lambda: spec.build("jax", **overrides))
    graph, state = nnx.split(net)

    def forward(state: nnx.State, *inputs: jax.Array) -> jax.Array:
        network = nnx.merge(graph, state)
        rngs = dropout_rngs(network, jnp.zeros(2, jnp.uint32)) if training else {}
        with _marking_calls(network):
            return network(*inputs, **rngs)

    inputs = example_inputs(spec, arguments)
    try:
        jaxpr, out = jax.make_jaxpr(forward, return_shape=True)(state, *inputs)
    except (UserError, RunError):
        raise
    except Exception as error:  # other people's code can raise anything
        raise UserError(f"backbone {spec.name!r}: its network failed on one image: {one_line(error)}") from error
    return jaxpr, net, out


def example_inputs(spec: BackboneSpec, arguments: dict[str, Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes for one image: as `harness.compute.meta_torch.example_inputs`, but with int32 integers."""

    def need(name: str) -> int:
        if name not in arguments:
            raise UserError(
                f"backbone {spec.name!r} ({spec.kind}) has no argument {name!r}, which gives the shape of its inputs;"
                " add it to the spec's defaults"
            )
        return arguments[name]

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    integer = jax.ShapeDtypeStruct((1,), jnp.int32)  # for t and for y
    t = integer if spec.time == "timestep" else floats()
    if spec.times == 2:
        t = floats(2)
    if spec.kind == "generator":
        return floats(arguments.get("latent_size", 128)), integer
    channels, size = need("in_channels"), need("input_size")
    x = floats(channels, size, size)
    if spec.kind == "classifier":
        return x, integer
    if spec.kind == "upsampler":
        low_size = arguments.get("low_res_size", size // 4)
        return x, t, integer, floats(channels, low_size, low_size)
    return x, t, integer


@contextlib.contextmanager
def _marking_calls(net: nnx.Module) -> Iterator[None]:
    """Context that patches `__call__` of the classes of the modules in `net`.

    Each call is traced in the named scope "module<PATH>", and a normalisation layer marks its input with MARK.
    """
    paths = {id(module): _name(path) for path, module in nnx.iter_modules(net)}
    running: list[int] = []  # ids of the modules whose call is being traced, outermost first

    def in_scope(original: Any) -> Any:
        @functools.wraps(original)
        def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in paths or running[-1:] == [id(self)]:  # a module of another network, or a call of super()
                return original(self, *args, **kwargs)
            running.append(id(self))
            try:
                with jax.named_scope(f"module<{paths[id(self)]}>"):
                    if isinstance(self, NORMS) and args:
                        args = (checkpoint_name(args[0], MARK), *args[1:])
                    return original(self, *args, **kwargs)
            finally:
                running.pop()

        return call

    classes = {kind for _, module in nnx.iter_modules(net) for kind in type(module).__mro__ if "__call__" in vars(kind)}
    with _PATCHING:
        originals = {kind: vars(kind)["__call__"] for kind in classes}
        try:
            for kind, original in originals.items():
                setattr(kind, "__call__", in_scope(original))  # noqa: B010 -- mypy refuses an assignment
            yield
        finally:
            for kind, original in originals.items():
                setattr(kind, "__call__", original)  # noqa: B010
