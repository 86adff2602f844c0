"""What the checks need of a network, in numpy arrays: implemented for torch and for JAX."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from harness.spec import BackboneSpec

Inputs: TypeAlias = dict[str, np.ndarray]  # by name, in the order of the call

NOISE_OF_VECTORS = 0.1  # standard deviation of the noise that moves biases and scales
NOISE_OF_MATRICES = 0.5  # the same for matrices and kernels, of a product with standard normal inputs


class Failure(Exception):
    """A network does not do what a check expects. The message is one line: what was expected, what came, where to look."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one call of a network gave."""

    values: np.ndarray
    dtype: str  # of the network's own output, as "float32"
    written: tuple[str, ...]  # names of the inputs that the call changed


class Network(Protocol):
    """A network with its weights. Raises `Failure` where the call gives no array."""

    framework: str

    def call(self, inputs: Inputs, *, training: bool = False, precision: str = "float32") -> Output:
        """One call on inputs of `make_inputs`; the arrays stay as they are.

        What is random has another seed at every call in evaluation mode, and the same one in training mode.
        """

    def gradients(self, inputs: Inputs, images: slice) -> tuple[np.ndarray, dict[str, np.ndarray | None]]:
        """Of a random sum of the outputs of these images alone, in training mode.

        Returns the gradients with respect to x, float32 (N, C, H, W), and to each trained weight by name; None: there is
        none.
        """

    def frozen(self) -> list[str]:
        """Names of the parameters that are not trained."""

    def weights(self) -> dict[str, np.ndarray]:
        """All arrays that a checkpoint holds, by torch's names and in torch's shapes."""

    def trained(self) -> list[str]:
        """The names in `weights` of what training changes."""

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """The opposite of `weights`."""


def make_inputs(spec: BackboneSpec, arguments: Mapping[str, Any], images: int, seed: int = 0) -> Inputs:
    """Random inputs for a call of the network, by name and in order: see `harness.spec.KINDS`.

    x and low_res float32 (N, C, H, W) and z float32 (N, Z), standard normal; t int64 (N,) of 1000 timesteps, or
    float32 (N,) in the form that the spec states, (N, 2) of two times; y int64 (N,).
    """
    rng = np.random.default_rng(seed)
    t = rng.integers(1, 999, images)
    if spec.time != "timestep":
        t = (t / 1000 if spec.time == "unit" else t / 100 - 5).astype(np.float32)
    if spec.times == 2:
        # The end of a step is nearer to the image, which is at 0, or at the smallest logarithm.
        end = t - rng.uniform(0.1, 0.9, images) * (t + 5 if spec.time == "log-sigma" else t)
        t = np.stack([t, end], axis=1).astype(np.float32)
    # A network without classes (num_classes 0) is given label 0, which it does not read.
    y = rng.integers(0, max(arguments.get("num_classes", 0), 1), images)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((images, *shape), np.float32)

    if spec.kind == "generator":
        return {"z": normal(arguments.get("latent_size", 128)), "y": y}
    channels, size = arguments["in_channels"], arguments["input_size"]
    inputs = {"x": normal(channels, size, size), "t": t}
    if spec.kind != "classifier":
        inputs["y"] = y
    if spec.kind == "upsampler":
        low = arguments.get("low_res_size", size // 4)
        inputs["low_res"] = normal(channels, low, low)
    return inputs


def move_weights(network: Network) -> None:
    """Add noise to every trained weight: the same noise to weights of the same name, in every framework."""
    weights = network.weights()
    for name in network.trained():
        value = weights[name]
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        # Of a matrix (out, in) or kernel (out, in, ...), the noise is scaled so that a sum over its inputs stays of order 1.
        inputs = int(np.prod(value.shape[1:])) if value.ndim > 1 else 0
        scale = NOISE_OF_MATRICES / inputs**0.5 if inputs else NOISE_OF_VECTORS
        weights[name] = (value + scale * rng.standard_normal(value.shape)).astype(value.dtype)
    network.load(weights)
