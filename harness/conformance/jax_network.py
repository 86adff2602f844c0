"""A Flax network, called with numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from backbones.flax_layers import dropout_rngs, set_compute_dtype
from backbones.flax_weights import state_from_torch, state_to_torch, torch_names
from harness.conformance.network import Failure, Inputs, Output
from harness.engines.jax.trainer import COMPUTE_DTYPES, build, matmul_context, split, without_rngs
from harness.spec import BackboneSpec


class JaxNetwork:
    """A network on JAX's default device. Implements `harness.conformance.network.Network`."""

    framework = "jax"

    def __init__(self, spec: BackboneSpec, arguments: dict[str, Any], seed: int = 0):
        self.net = build(spec, arguments, seed)
        if not isinstance(self.net, nnx.Module):
            raise Failure(
                f"expected a flax.nnx.Module from the builder {spec.builders['jax']}, came {type(self.net).__name__}"
            )
        self._compiled: dict[tuple[bool, str], Any] = {}  # by mode and precision

    def call(self, inputs: Inputs, *, training: bool = False, precision: str = "float32") -> Output:
        set_compute_dtype(self.net, COMPUTE_DTYPES[precision])
        graph, params, rest = split(self.net)
        set_compute_dtype(self.net, None)
        if (training, precision) not in self._compiled:
            self._compiled[training, precision] = jax.jit(partial(_forward, graph, training))
        with matmul_context(precision):
            out = self._compiled[training, precision](params, rest, *_arrays(inputs))
        return Output(values=np.asarray(out.astype(jnp.float32)), dtype=str(out.dtype), written=())

    def gradients(self, inputs: Inputs, images: slice) -> tuple[np.ndarray, dict[str, np.ndarray | None]]:
        graph, params, rest = split(self.net)

        def total(params: nnx.State, first: Array, *others: Array) -> Array:
            out = _forward(graph, True, params, rest, first, *others)
            probe = np.random.default_rng(1).standard_normal(out.shape[1:], np.float32)
            return (out[images].astype(jnp.float32) * probe).sum()

        with matmul_context("float32"):
            of_weights, of_input = jax.jit(jax.grad(total, argnums=(0, 1)))(params, *_arrays(inputs))
        return np.asarray(of_input), {**state_to_torch(of_weights)}

    def frozen(self) -> list[str]:
        return []  # what is no nnx.Param is no parameter

    def trained(self) -> list[str]:
        return list(torch_names(nnx.state(self.net, nnx.Param)))

    def weights(self) -> dict[str, np.ndarray]:
        return state_to_torch(without_rngs(nnx.state(self.net)))

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        state = state_from_torch(without_rngs(nnx.state(self.net)), weights)
        nnx.update(self.net, jax.tree.map(jnp.asarray, state))


def _forward(graph: nnx.GraphDef, training: bool, params: nnx.State, rest: nnx.State, *inputs: Array) -> Array:
    """The network's output; in training with a generator for dropout, as the trainer calls it."""
    net: Any = nnx.merge(graph, params, rest)
    out = net(*inputs, **(dropout_rngs(net, jnp.zeros(2, jnp.uint32)) if training else {}))
    if not isinstance(out, jax.Array):
        raise Failure(f"expected one array from __call__, came a {type(out).__name__}: return the array alone")
    return out


def _arrays(inputs: Inputs) -> tuple[Array, ...]:
    """Integers as int32, as the engine passes them."""
    return tuple(
        jnp.asarray(array.astype(np.int32) if np.issubdtype(array.dtype, np.integer) else array)
        for array in inputs.values()
    )
