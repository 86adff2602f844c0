"""The map between the parameters of a Flax network and those of the torch network, which are in the public files.

Both networks have the same attribute names, so the map is a rule instead of a table:

    path        joined by dots; the leaves `kernel`, `scale` and `embedding` are called `weight` in torch, others the same
    kernel      in torch with the output and input axes first: (in, out) <-> (out, in), WIO <-> OIW, HWIO <-> OIHW
    the rest    the same shape: biases, scales, tables, positions

The readers and writers of public files (`harness.weights`) use torch's names and shapes, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from harness.errors import UserError

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

Path = tuple[Any, ...]  # attribute names and indices


def torch_name(path: Path) -> str:
    """The torch name of a parameter: blocks, 0, attn, qkv, kernel -> blocks.0.attn.qkv.weight."""
    *parents, leaf = path
    return ".".join([*map(str, parents), LEAVES.get(str(leaf), str(leaf))])


def _axes(path: Path, dimensions: int, *, to_torch: bool) -> tuple[int, ...]:
    """The axes argument of `transpose` between the two layouts of the parameter at `path`: to torch's, or from it."""
    if path[-1] != "kernel":
        return tuple(range(dimensions))
    spatial = range(dimensions - 2)
    if to_torch:  # from (*spatial, in, out)
        return (dimensions - 1, dimensions - 2, *spatial)
    return (*(axis + 2 for axis in spatial), 1, 0)  # from (out, in, *spatial)


def variables(net: nnx.Module) -> nnx.State:
    """All variables of the network that a weight file holds, trained or not: all but the states of random generators.

    `net` may be abstract.
    """
    return nnx.state(net, nnx.Not(nnx.RngState))


def torch_names(state: nnx.State) -> dict[str, tuple[Path, nnx.Variable]]:
    """Torch name -> (path, variable), for all variables in a state."""
    return {torch_name(path): (path, variable) for path, variable in nnx.to_flat_state(state)}


def torch_shapes(net: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the torch network's state dict. `net` may be abstract."""
    return {name: _torch_shape(path, variable) for name, (path, variable) in torch_names(variables(net)).items()}


def from_torch(net: nnx.Module, weights: Mapping[str, Any]) -> nnx.State:
    """The state for `nnx.update(net, state)` from a state dict of the torch network, as float32 numpy arrays.

    weights: arrays under torch's names, in torch's shapes; the result has views of them where possible. `net` may be
    abstract. Raises UserError for tensors that are missing, unknown or of another shape.
    """
    return state_from_torch(variables(net), weights)


def state_from_torch(state: nnx.State, weights: Mapping[str, Any]) -> nnx.State:
    """As `from_torch`, for a whole or partial state, of which only paths and shapes are read, not the values."""
    names = torch_names(state)
    if unknown := sorted(set(weights) - set(names)):
        raise UserError(f"weights have {unknown[0]!r}, which is not in this network ({len(unknown)} such tensors)")
    if missing := sorted(set(names) - set(weights)):
        raise UserError(f"weights: {missing[0]!r} is missing ({len(missing)} such tensors); is it the same network?")
    flat = []
    for name, (path, variable) in names.items():
        value, shape = np.asarray(weights[name]), _torch_shape(path, variable)
        if value.shape != shape:
            raise UserError(f"weights: {name!r} has shape {value.shape}, but this network's has {shape}")
        value = value.astype(np.float32, copy=False).transpose(_axes(path, value.ndim, to_torch=False))
        flat.append((path, variable.replace(value)))
    return nnx.from_flat_state(flat)


def to_torch(net: nnx.Module) -> dict[str, np.ndarray]:
    """The state dict of the torch network, as float32 numpy arrays on the host, C-contiguous."""
    return state_to_torch(variables(net))


def state_to_torch(state: nnx.State, read: Callable[[Any], np.ndarray] = np.asarray) -> dict[str, np.ndarray]:
    """As `to_torch`, for a whole or partial state; `read` copies a JAX array to the host."""
    weights = {}
    for name, (path, variable) in torch_names(state).items():
        value = read(variable.get_value()).astype(np.float32, copy=False)
        weights[name] = np.ascontiguousarray(value.transpose(_axes(path, value.ndim, to_torch=True)))
    return weights


def _torch_shape(path: Path, variable: nnx.Variable) -> tuple[int, ...]:
    """Shape of the torch parameter that the variable at `path` corresponds to."""
    shape = variable.get_value().shape
    return tuple(shape[axis] for axis in _axes(path, len(shape), to_torch=True))
