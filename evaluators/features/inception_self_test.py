"""Runs a frozen graph on a built-in picture and compares its features with those of the network of `inception_layers`.

For a graph whose structure is not the published one: what counts are the features. Both run in torch in float64, the
graph operation by operation, as it is stored. The operations are those of the public graph between its input ExpandDims
and its outputs (`inception_structure`); a graph with another one cannot be compared and raises `Malformed`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from evaluators.features import inception_layers as table
from evaluators.features.graphdef import Malformed, Node
from evaluators.features.tf1_resize import resize_numpy

if TYPE_CHECKING:
    from evaluators.features.inception_graph import Layer

# Largest difference relative to the root mean square of each kind of feature. In float64 the same network differs by
# 1e-12; another epsilon in one of the 94 layers gives 1e-3 and more.
TOLERANCE = 1e-6


def picture() -> np.ndarray:
    """The built-in picture, uint8 (1, 83, 61, 3): waves and a texture; its sides differ and are resized."""
    y, x = np.mgrid[:83, :61]
    waves = [128 + 80 * np.sin(x / (5 + 3 * c) + c) * np.cos(y / (11 - 2 * c)) for c in range(3)]
    texture = (x[..., None] * 37 + y[..., None] * 59 + x[..., None] * y[..., None] * np.array([1, 3, 7])) % 41
    return np.clip(np.stack(waves, axis=-1) + texture - 20, 0, 255).astype(np.uint8)[None]


def largest_difference(nodes: Mapping[str, Node], layers: "Mapping[str, Layer]", classifier: np.ndarray) -> float:
    """The largest difference of any feature of the picture between graph and network, relative as in TOLERANCE.

    layers, classifier: the weights that were read from the graph, as in `InceptionWeights`. Raises Malformed for a graph
    that cannot be run, such as one without pool_3. Infinite for features of other shapes, or not finite.
    """
    image = (resize_numpy(picture()).astype(np.float64) - 128) / 128
    with torch.inference_mode():
        graph = _Graph(nodes, {"ExpandDims": torch.from_numpy(picture()).double()})
        pooled = graph.value("pool_3").flatten(1)
        spatial = graph.value("mixed_6/conv")[..., : table.SPATIAL_CHANNELS].flatten(1)
        weights = graph.value(graph.inputs(graph.node("softmax/logits/MatMul"))[1])
        theirs = [pooled, spatial]
        if pooled.shape[1:] == weights.shape[:1]:
            theirs.append(pooled @ weights)
        ours = _features(torch.from_numpy(image).permute(0, 3, 1, 2), layers, classifier)
        if [each.shape for each in theirs] != [each.shape for each in ours]:
            return float("inf")
        pairs = zip(theirs, ours, strict=True)
        found = max(float((a - b).abs().max() / b.square().mean().sqrt()) for a, b in pairs)
    return found if np.isfinite(found) else float("inf")


# The network of the table ---------------------------------------------------------------------------------------------


def _features(x: Tensor, layers: "Mapping[str, Layer]", classifier: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled (N, 2048), spatial (N, 2023) and logits (N, 1008) of normalised images (N, 3, 299, 299)."""
    x = _apply(table.STEM, x, layers)
    spatial = x
    for scope, join in table.BLOCKS.items():
        x = _apply((join,), x, layers)
        if scope == "mixed_6":
            spatial = x[:, : table.SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
    pooled = x.mean(dim=(2, 3))
    return pooled, spatial, pooled @ torch.from_numpy(classifier.astype(np.float64))


def _apply(sequence: Sequence[table.Layer], x: Tensor, layers: "Mapping[str, Layer]") -> Tensor:
    """The layers of `sequence`, one after the other, on x (N, C, H, W)."""
    for layer in sequence:
        if isinstance(layer, table.Conv):
            weights = layers[layer.scope]
            kernel, gamma, beta, mean, variance = (
                torch.from_numpy(each.astype(np.float64))
                for each in (weights.kernel, weights.gamma, weights.beta, weights.mean, weights.variance)
            )
            padding = [size // 2 if layer.same else 0 for size in layer.kernel]
            x = functional.conv2d(x, kernel.permute(3, 2, 0, 1), None, layer.stride, padding)
            x = functional.batch_norm(x, mean, variance, gamma, beta, eps=float(np.float32(table.EPSILON))).relu()
        elif isinstance(layer, table.Join):
            x = torch.cat([_apply(branch, x, layers) for branch in layer.branches], dim=1)
        else:
            window = (layer.kernel, layer.stride, layer.kernel // 2 if layer.same else 0)
            if layer.average:
                x = functional.avg_pool2d(x, *window, count_include_pad=False)
            else:
                x = functional.max_pool2d(x, *window)
    return x


# The graph ------------------------------------------------------------------------------------------------------------


class _Graph:
    """Values of a graph's nodes, computed when they are asked for. Images and features are (N, H, W, C), as there."""

    def __init__(self, nodes: Mapping[str, Node], values: dict[str, Tensor]):
        self._nodes, self._values = nodes, values

    def node(self, name: str) -> Node:
        if name not in self._nodes:
            raise Malformed(f"node {name} is missing")
        return self._nodes[name]

    def inputs(self, node: Node) -> list[str]:
        """Names of the nodes that give the inputs, without control inputs."""
        return [name.removesuffix(":0") for name in node.inputs if not name.startswith("^")]

    def value(self, name: str) -> Tensor:
        """Without recursion, because the graph is some 500 operations deep."""
        waiting = [name]
        while waiting:
            if len(waiting) > len(self._nodes):
                raise Malformed(f"{name} depends on itself")
            node = self.node(waiting[-1])
            missing = [each for each in self.inputs(node) if each not in self._values]
            if waiting[-1] in self._values or not missing:
                done = waiting.pop()
                if done not in self._values:
                    self._values[done] = self._run(node)
            else:
                waiting.append(missing[0])
        return self._values[name]

    def _run(self, node: Node) -> Tensor:
        """The output of a node whose inputs are known."""
        if node.op == "Const":
            array = np.array(node.array())
            return torch.from_numpy(array.astype(np.float64) if array.dtype.kind == "f" else array)
        inputs = [self._values[each] for each in self.inputs(node)]
        operation = _OPERATIONS.get(node.op)
        if operation is None:
            raise Malformed(f"{node.name} is {node.op}, which is no operation of this network")
        try:
            return operation(node, *inputs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # shapes or inputs that do not fit
            if isinstance(error, Malformed):
                raise
            raise Malformed(f"{node.name} ({node.op}) cannot be computed: {str(error).splitlines()[0]}") from error


def _windows(node: Node, x: Tensor, size: Sequence[int], fill: float) -> tuple[Tensor, tuple[int, int]]:
    """x (N, H, W, C) as (N, C, H, W), padded with `fill` as the node says; and the strides.

    SAME pads so that ceil(side / stride) windows fit, with the larger half at the end.
    """
    if node.text("data_format") not in ("", "NHWC") or set(node.integers("dilations")) - {1}:
        raise Malformed(f"{node.name} has channels first, or dilations")
    _, *strides, _ = node.integers("strides")
    padding: list[int] = []
    for side, kernel, stride in zip(x.shape[1:3], size, strides, strict=True):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0) if node.text("padding") == "SAME" else 0
        padding = [total // 2, total - total // 2, *padding]  # the last axis comes first
    return functional.pad(x.permute(0, 3, 1, 2), padding, value=fill), (strides[0], strides[1])


def _convolve(node: Node, x: Tensor, kernel: Tensor) -> Tensor:
    padded, strides = _windows(node, x, kernel.shape[:2], 0.0)
    return functional.conv2d(padded, kernel.permute(3, 2, 0, 1), stride=strides).permute(0, 2, 3, 1)


def _pool(node: Node, x: Tensor) -> Tensor:
    _, height, width, _ = node.integers("ksize")
    if node.op == "MaxPool":
        padded, strides = _windows(node, x, (height, width), -torch.inf)
        return functional.max_pool2d(padded, (height, width), strides).permute(0, 2, 3, 1)
    padded, strides = _windows(node, x, (height, width), 0.0)
    inside, _ = _windows(node, torch.ones_like(x), (height, width), 0.0)  # the padding does not count
    sums, counts = (functional.avg_pool2d(each, (height, width), strides) for each in (padded, inside))
    return (sums / counts).permute(0, 2, 3, 1)


def _normalise(node: Node, x: Tensor, mean: Tensor, variance: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    scale = (variance + (node.real("variance_epsilon") or 0.0)).rsqrt()
    if node.flag("scale_after_normalization") is not False:
        scale = scale * gamma
    return (x - mean) * scale + beta


def _resize(node: Node, x: Tensor, size: Tensor) -> Tensor:
    height, width = (int(side) for side in size)
    if node.flag("align_corners") or node.flag("half_pixel_centers"):
        corners = bool(node.flag("align_corners"))
        resized = functional.interpolate(x.permute(0, 3, 1, 2), (height, width), mode="bilinear", align_corners=corners)
        return resized.permute(0, 2, 3, 1)
    if (height, width) != (table.SIDE, table.SIDE):
        raise Malformed(f"{node.name} resizes to {height} x {width}")
    return torch.from_numpy(resize_numpy(x.numpy().astype(np.float32))).double()


def _concatenate(node: Node, *inputs: Tensor) -> Tensor:
    axis, parts = (inputs[0], inputs[1:]) if node.op == "Concat" else (inputs[-1], inputs[:-1])
    return torch.cat(parts, dim=int(axis))


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "Identity": lambda node, x: x,
    "CheckNumerics": lambda node, x: x,
    "Sub": lambda node, x, y: x - y,
    "Mul": lambda node, x, y: x * y,
    "Relu": lambda node, x: x.relu(),
    "Reshape": lambda node, x, shape: x.reshape(shape.tolist()),
    "ResizeBilinear": _resize,
    "Conv2D": _convolve,
    "BatchNormWithGlobalNormalization": _normalise,
    "MaxPool": _pool,
    "AvgPool": _pool,
    "Concat": _concatenate,
    "ConcatV2": _concatenate,
}
