"""Check that a frozen graph of unknown origin computes the Inception-v3 of `inception_layers`, operation by operation.

Constants of the right names and shapes are not enough: another pool, epsilon or resize gives other features with the
same weights. The graph is walked from its outputs to its input and compared with the table of layers. A graph that
differs is not refused for it, but run on a picture (`inception_self_test`): what decides are its features.

What is checked, and the public evidence that classify_image_graph_def.pb passes:

| check | evidence |
|---|---|
| operations, no others between input and outputs | [S] lists all operations of the file by type |
| one Concat for each block, of 3, 4 or 6 branches, or a join of joins | [S] 11 Concat; [T] no concat_dim but JOIN/concat_dim |
| names of convolutions, their constants and their shapes | [P] maps all 94; [T]; [S] 23,885,411 parameters, as here |
| order of the branches, kernels, strides, paddings | [P] a network of these gives the graph's FID to 1e-6 |
| maximum or average of each pool; sizes of pools | [S] 5 MaxPool, 9 AvgPool; [J] names the five; [P] as above |
| Conv2D, normalisation, CheckNumerics, Identity, Relu; two of them change nothing | [T] the first 50 nodes; [S] 94, 99 |
| inputs of the normalisation: t, m, v, beta, gamma | TensorFlow's definition of BatchNormWithGlobalNormalization |
| epsilon 0.001 | [P] |
| ExpandDims -> ResizeBilinear -> Sub -> Mul, their second inputs 299, 128, 1/128 | [T] names and order; [I] values |
| resize without aligned corners or half-pixel centres | [P] (bit-exact resize); the second attribute is of 2018 |
| pool_3, mixed_6/conv and softmax/logits/MatMul, whose second input is softmax/weights | [A]; [T], [P] the names |
| axis 3 of a Concat | none; it follows from the widths in [P] |
| data_format NHWC or not given, no dilations | none: both attributes are newer than the file |

[S] TensorFlow, tools/graph_transforms/README.md: output of summarize_graph. [T] Tensorflex, README, get_graph_ops and
pull request 5. [P] torch-fidelity, util_convert_inception_weights.py and feature_extractor_inceptionv3.py (from
pytorch-fid). [J] jzuern's script for float16 lists the pools without an attribute T. [I] openai/improved-gan issue 28.
[A] openai/guided-diffusion, evaluations/evaluator.py.
"""

from collections.abc import Sequence

import numpy as np

from evaluators.features.graphdef import Malformed, Node
from evaluators.features.inception_layers import BLOCKS, EPSILON, POOL_3, SIDE, STEM, Conv, Join, Layer, Pool

_POOL = {True: "AvgPool", False: "MaxPool"}  # operation by `Pool.average`
_PASS_THROUGH = ("Identity", "CheckNumerics")  # operations that return their input unchanged


def check_structure(nodes: dict[str, Node]) -> None:
    """Raise Malformed unless the graph computes exactly this network from ExpandDims, its input, to pool_3 and the logits."""
    _Structure(nodes).check()


class _Structure:
    """A walk through the graph, from its outputs to its input, that raises Malformed where the table of layers differs."""

    def __init__(self, nodes: dict[str, Node]):
        self.nodes = nodes
        self.outputs: dict[str, str] = {}  # name of the last node of each convolution, by scope

    def check(self) -> None:
        """Walk the whole graph. Raises Malformed."""
        image = self._check_image()
        node = self._resolve("pool_3")
        node = self._check_pool(node, POOL_3)
        layers: tuple[Layer, ...] = (*STEM, *BLOCKS.values())
        for layer in reversed(layers):
            node = self._check_layer(node, layer)
        if node.name != image:
            raise Malformed(f"the input of its first convolution is {node.name}, not the normalised image")
        matmul = self._resolve("softmax/logits/MatMul")
        if matmul.op != "MatMul" or self._input(matmul, 1).name != "softmax/weights":
            raise Malformed("its classifier does not multiply by softmax/weights")
        # the spatial features are read from the node of this name
        if self._resolve("mixed_6/conv").name != self.outputs["mixed_6/conv"]:
            raise Malformed("mixed_6/conv is not the first branch of its block")

    def _node(self, name: str) -> Node:
        if name not in self.nodes:
            raise Malformed(f"node {name} is missing")
        return self.nodes[name]

    def _resolve(self, name: str) -> Node:
        """The node of that name or, if it only passes its input through, the first one before it that does not."""
        for _ in range(16):  # a limit, because a damaged graph may have a cycle
            node = self._node(name)
            if node.op not in _PASS_THROUGH:
                return node
            name = self._input_name(node, 0)
        raise Malformed(f"{name} passes through too many identities")

    def _input_name(self, node: Node, index: int) -> str:
        """Name of the node that gives input number `index`, not counting control inputs."""
        names = [name for name in node.inputs if not name.startswith("^")]
        if index >= len(names):
            raise Malformed(f"{node.name} has no input {index}")
        return names[index].removesuffix(":0")

    def _input(self, node: Node, index: int) -> Node:
        """The node that computes input number `index`, as `_resolve` returns it."""
        return self._resolve(self._input_name(node, index))

    def _expect_op(self, node: Node, *ops: str) -> None:
        """Check that the node's operation is one of `ops`."""
        if node.op not in ops:
            raise Malformed(f"{node.name} is {node.op}, expected {ops[0]}")

    def _check_image(self) -> str:
        """Check resize and normalisation; returns the name of the node of normalised images."""
        scaled = self._resolve("Mul")
        shifted = self._input(scaled, 0)
        resized = self._input(shifted, 0)
        for node, op in ((scaled, "Mul"), (shifted, "Sub"), (resized, "ResizeBilinear")):
            self._expect_op(node, op)
        if resized.flag("align_corners") or resized.flag("half_pixel_centers"):
            raise Malformed(
                "it does not resize as TensorFlow 1 does (bilinear, no aligned corners or half-pixel centers)"
            )
        numbers = [self._input(node, 1).array().ravel().tolist() for node in (resized, shifted, scaled)]
        if numbers != [[SIDE, SIDE], [128.0], [1 / 128]]:
            raise Malformed(f"it resizes and normalises by {numbers}")
        if self._input_name(resized, 0) != "ExpandDims":
            raise Malformed("it does not resize ExpandDims")
        return scaled.name

    def _check_layer(self, node: Node, layer: Layer) -> Node:
        """Check the layer whose output is `node`, by its kind; each check returns the node of the layer's input."""
        if isinstance(layer, Pool):
            return self._check_pool(node, layer)
        if isinstance(layer, Conv):
            return self._check_conv(node, layer)
        return self._check_join(node, layer)

    def _check_window(self, node: Node, key: str, expected: Sequence[int]) -> None:
        """Check an attribute (1, height, width, 1), such as strides. expected: (height, width)."""
        if node.text("data_format") not in ("", "NHWC") or node.integers(key) != [1, *expected, 1]:
            raise Malformed(f"{node.name} has {key} {node.integers(key)}, expected {[1, *expected, 1]}")

    def _check_padding(self, node: Node, same: bool, any_padding: bool = False) -> None:
        """Check that the padding is SAME (same) or VALID. any_padding: accept both, which agree for a 1x1 kernel."""
        expected = "SAME" if same else "VALID"
        if node.text("padding") != expected and not any_padding:
            raise Malformed(f"{node.name} has padding {node.text('padding')}, expected {expected}")

    def _check_pool(self, node: Node, pool: Pool) -> Node:
        self._expect_op(node, _POOL[pool.average])
        self._check_window(node, "ksize", (pool.kernel,) * 2)
        if pool is not POOL_3:  # the window of POOL_3 covers its whole input, so its stride has no effect
            self._check_window(node, "strides", (pool.stride,) * 2)
        self._check_padding(node, pool.same)
        return self._input(node, 0)

    def _check_conv(self, node: Node, conv: Conv) -> Node:
        self._expect_op(node, "Relu")
        norm = self._input(node, 0)
        self._expect_op(norm, "BatchNormWithGlobalNormalization")
        names = [self._input(norm, i).name for i in range(1, 5)]
        expected = [f"{conv.scope}/batchnorm/{name}" for name in ("moving_mean", "moving_variance", "beta", "gamma")]
        if names != expected:
            raise Malformed(f"{norm.name} has inputs {names}, expected {expected}")
        if norm.real("variance_epsilon") != float(np.float32(EPSILON)):
            raise Malformed(f"{norm.name} has an epsilon of {norm.real('variance_epsilon')}, expected {EPSILON}")
        product = self._input(norm, 0)
        self._expect_op(product, "Conv2D")
        if self._input(product, 1).name != f"{conv.scope}/conv2d_params":
            raise Malformed(f"{product.name} does not use {conv.scope}/conv2d_params")
        self._check_window(product, "strides", (conv.stride,) * 2)
        if set(product.integers("dilations")) - {1}:
            raise Malformed(f"{product.name} is dilated")
        self._check_padding(product, conv.same, any_padding=conv.kernel == (1, 1))
        self.outputs[conv.scope] = node.name
        return self._input(product, 0)

    def _check_join(self, node: Node, join: Join) -> Node:
        ends = self._joined(node)
        if len(ends) != _branches(join):
            raise Malformed(f"{node.name} joins {len(ends)} branches, not {_branches(join)}")
        return self._check_branches(node.name, ends, join)

    def _joined(self, node: Node, depth: int = 2) -> list[Node]:
        """The last nodes of the branches that `node` joins along the channels; a join of joins counts as one."""
        self._expect_op(node, "Concat", "ConcatV2")
        count = sum(not name.startswith("^") for name in node.inputs) - 1
        # the axis is the first input of Concat and the last of ConcatV2
        first_branch, axis_input = (1, 0) if node.op == "Concat" else (0, count)
        axis = self._input(node, axis_input).array().ravel().tolist()
        if axis not in ([3], [-1]):
            raise Malformed(f"{node.name} joins on axis {axis}, not on 3")
        ends: list[Node] = []
        for index in range(count):
            end = self._input(node, first_branch + index)
            ends += self._joined(end, depth - 1) if depth and end.op in ("Concat", "ConcatV2") else [end]
        return ends

    def _check_branches(self, name: str, ends: list[Node], join: Join) -> Node:
        """Check the branches of the join `name`; takes their last nodes from the front of `ends`."""
        sources: set[str] = set()  # names of the nodes where the branches start: one, if they have the same input
        for branch in join.branches:
            *layers, last = branch
            if isinstance(last, Join):
                source = self._check_branches(name, ends, last)
            else:
                source = self._check_layer(ends.pop(0), last)
            for layer in reversed(layers):
                source = self._check_layer(source, layer)
            sources.add(source.name)
        if len(sources) != 1:
            raise Malformed(f"branches of {name} start from {sorted(sources)}")
        return self._resolve(sources.pop())


def _branches(join: Join) -> int:
    """The number of branches, counting those of a join at the end of a branch."""
    return sum(_branches(branch[-1]) if isinstance(branch[-1], Join) else 1 for branch in join.branches)
