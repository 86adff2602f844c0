"""A network in jax as sampling takes it: its structure and its weights on the devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from backbones.flax_layers import set_compute_dtype
from backbones.flax_weights import from_torch
from harness.engines.jax import mesh as devices
from harness.engines.jax.errors import errors_in_one_line
from harness.engines.jax.trainer import COMPUTE_DTYPES
from harness.spec import BackboneSpec

CALL_SECONDS = 0.5  # of one call of the device, about: it runs as many steps as fit
LESS_MEMORY = "take smaller batches: --batch N of `harness sample`, --sampling-batch N of `harness run`"


class Network(NamedTuple):
    """A network in two parts: its structure, and its weights on the devices."""

    graph: nnx.GraphDef
    state: nnx.State

    @classmethod
    def load(
        cls,
        spec: BackboneSpec,
        arguments: Mapping[str, Any],
        weights: Mapping[str, np.ndarray],
        precision: str,
        mesh: Mesh,
    ) -> Network:
        """The network of `spec` with `weights`, arrays by torch's names.

        The network is built without weights, so that memory holds them only once.
        """
        net = nnx.eval_shape(lambda: spec.build("jax", **arguments))
        set_compute_dtype(net, COMPUTE_DTYPES[precision])
        state = from_torch(net, weights)
        graph, _ = nnx.split(net)
        with errors_in_one_line(f"loading the weights of {spec.name}", "take a smaller backbone, or another --device"):
            return cls(graph, devices.to_device(state, devices.weight_shardings(mesh, state)))
