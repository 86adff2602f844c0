"""A frozen graph of the whole 2015-12-05 Inception-v3 with random weights, in the form of the public one.

Written apart from `evaluators.features.inception_layers`, so that a mistake there shows: the architecture is spelled out
here once more, after Szegedy et al. (arXiv:1512.00567) and the public ports. Names, operations, their number and their
order are those of public listings of classify_image_graph_def.pb:

- its operations by type, its parameters and its control inputs: `SUMMARY`, from the documentation of TensorFlow's
  summarize_graph (tensorflow/tools/graph_transforms/README.md);
- its first 50 nodes in order: `FIRST_NODES`, from the documentation of Tensorflex (`get_graph_ops`);
- its constants in order: Tensorflex's README and pull request 5. No concat_dim lies between those of mixed_9/join and
  mixed_10/join, and there is one Concat for each of the 11 blocks: the last two blocks join six branches at once;
- its pools: the script of jzuern lists the five that have no attribute T, the maximum pools.

The normalisation statistics are those of a few images, so that activations keep unit scale through all 94 convolutions,
as trained ones do. The graph is written by a protocol-buffer writer of a few lines; TensorFlow accepts it, which the
slow tests show.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

FLOAT, INT32, UINT8, STRING = 1, 3, 4, 7  # of types.proto
EPSILON = 0.001
SUMMARY = {
    "Const": 489, "CheckNumerics": 99, "Identity": 99, "BatchNormWithGlobalNormalization": 94, "Conv2D": 94, "Relu": 94,
    "Concat": 11, "AvgPool": 9, "MaxPool": 5, "Sub": 1, "Softmax": 1, "ResizeBilinear": 1, "Reshape": 1, "Mul": 1,
    "MatMul": 1, "ExpandDims": 1, "DecodeJpeg": 1, "Cast": 1, "BiasAdd": 1,
}  # fmt: skip
PARAMETERS, CONTROL_INPUTS = 23_885_411, 99
_LAYER = ("conv2d_params", "Conv2D", "batchnorm/beta", "batchnorm/gamma", "batchnorm/moving_mean",
          "batchnorm/moving_variance", "batchnorm", "CheckNumerics", "control_dependency")  # fmt: skip
FIRST_NODES = (
    "DecodeJpeg/contents", "DecodeJpeg", "Cast", "ExpandDims/dim", "ExpandDims", "ResizeBilinear/size", "ResizeBilinear",
    "Sub/y", "Sub", "Mul/y", "Mul",
    *(name for scope in ("conv", "conv_1", "conv_2") for name in (*(f"{scope}/{each}" for each in _LAYER), scope)),
    "pool/CheckNumerics", "pool/control_dependency", "pool", *(f"conv_3/{each}" for each in _LAYER[:6]),
)  # fmt: skip


# Protocol buffers -----------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def field(number: int, value: bytes | str | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def kind(number: int) -> bytes:
    return field(6, number)


def integers(values) -> bytes:
    return field(1, field(3, b"".join(varint(value) for value in values)))


def word(value: str) -> bytes:
    return field(2, value)


def flag(value: bool) -> bytes:
    return field(5, int(value))


def real(value: float) -> bytes:
    return varint(4 << 3 | 5) + np.float32(value).tobytes()


def node(name: str, op: str, inputs=(), **attributes: bytes) -> bytes:
    entries = (field(5, field(1, key) + field(2, value)) for key, value in attributes.items())
    return field(1, field(1, name) + field(2, op) + b"".join(field(3, each) for each in inputs) + b"".join(entries))


def constant(name: str, array: np.ndarray, typed: bool = False) -> bytes:
    """typed: store the values as a repeated field, the other form that graphs use."""
    number, typed_field = {"float32": (FLOAT, 5), "int32": (INT32, 7)}[array.dtype.name]
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    if not typed:
        values = field(4, array.tobytes())
    elif number == FLOAT:
        values = field(typed_field, array.tobytes())
    else:
        values = field(typed_field, b"".join(varint(int(each)) for each in array.ravel()))
    tensor = field(1, number) + field(2, shape) + values
    return node(name, "Const", dtype=kind(number), value=field(8, tensor))


# The architecture -----------------------------------------------------------------------------------------------------


def block_a(ops, x, scope, port, pool_width):
    one = ops.conv(x, f"{scope}/conv", f"{port}.branch1x1", 64, (1, 1))
    five = ops.conv(x, f"{scope}/tower/conv", f"{port}.branch5x5_1", 48, (1, 1))
    five = ops.conv(five, f"{scope}/tower/conv_1", f"{port}.branch5x5_2", 64, (5, 5))
    three = ops.conv(x, f"{scope}/tower_1/conv", f"{port}.branch3x3dbl_1", 64, (1, 1))
    three = ops.conv(three, f"{scope}/tower_1/conv_1", f"{port}.branch3x3dbl_2", 96, (3, 3))
    three = ops.conv(three, f"{scope}/tower_1/conv_2", f"{port}.branch3x3dbl_3", 96, (3, 3))
    pool = ops.average(x, f"{scope}/tower_2/pool")
    pool = ops.conv(pool, f"{scope}/tower_2/conv", f"{port}.branch_pool", pool_width, (1, 1))
    return ops.join([one, five, three, pool], f"{scope}/join")


def block_b(ops, x, scope, port):
    three = ops.conv(x, f"{scope}/conv", f"{port}.branch3x3", 384, (3, 3), 2, "VALID")
    double = ops.conv(x, f"{scope}/tower/conv", f"{port}.branch3x3dbl_1", 64, (1, 1))
    double = ops.conv(double, f"{scope}/tower/conv_1", f"{port}.branch3x3dbl_2", 96, (3, 3))
    double = ops.conv(double, f"{scope}/tower/conv_2", f"{port}.branch3x3dbl_3", 96, (3, 3), 2, "VALID")
    return ops.join([three, double, ops.maximum(x, f"{scope}/pool")], f"{scope}/join")


def block_c(ops, x, scope, port, width):
    one = ops.conv(x, f"{scope}/conv", f"{port}.branch1x1", 192, (1, 1))
    seven = ops.conv(x, f"{scope}/tower/conv", f"{port}.branch7x7_1", width, (1, 1))
    seven = ops.conv(seven, f"{scope}/tower/conv_1", f"{port}.branch7x7_2", width, (1, 7))
    seven = ops.conv(seven, f"{scope}/tower/conv_2", f"{port}.branch7x7_3", 192, (7, 1))
    double = ops.conv(x, f"{scope}/tower_1/conv", f"{port}.branch7x7dbl_1", width, (1, 1))
    for i, kernel in ((1, (7, 1)), (2, (1, 7)), (3, (7, 1))):
        double = ops.conv(double, f"{scope}/tower_1/conv_{i}", f"{port}.branch7x7dbl_{i + 1}", width, kernel)
    double = ops.conv(double, f"{scope}/tower_1/conv_4", f"{port}.branch7x7dbl_5", 192, (1, 7))
    pool = ops.average(x, f"{scope}/tower_2/pool")
    pool = ops.conv(pool, f"{scope}/tower_2/conv", f"{port}.branch_pool", 192, (1, 1))
    return ops.join([one, seven, double, pool], f"{scope}/join")


def block_d(ops, x, scope, port):
    three = ops.conv(x, f"{scope}/tower/conv", f"{port}.branch3x3_1", 192, (1, 1))
    three = ops.conv(three, f"{scope}/tower/conv_1", f"{port}.branch3x3_2", 320, (3, 3), 2, "VALID")
    seven = ops.conv(x, f"{scope}/tower_1/conv", f"{port}.branch7x7x3_1", 192, (1, 1))
    seven = ops.conv(seven, f"{scope}/tower_1/conv_1", f"{port}.branch7x7x3_2", 192, (1, 7))
    seven = ops.conv(seven, f"{scope}/tower_1/conv_2", f"{port}.branch7x7x3_3", 192, (7, 1))
    seven = ops.conv(seven, f"{scope}/tower_1/conv_3", f"{port}.branch7x7x3_4", 192, (3, 3), 2, "VALID")
    return ops.join([three, seven, ops.maximum(x, f"{scope}/pool")], f"{scope}/join")


def block_e(ops, x, scope, port, pooled):
    def fork(y, tower, name):
        wide = ops.conv(y, f"{tower}/mixed/conv", f"{port}.{name}a", 384, (1, 3))
        high = ops.conv(y, f"{tower}/mixed/conv_1", f"{port}.{name}b", 384, (3, 1))
        return [wide, high]

    one = ops.conv(x, f"{scope}/conv", f"{port}.branch1x1", 320, (1, 1))
    three = ops.conv(x, f"{scope}/tower/conv", f"{port}.branch3x3_1", 384, (1, 1))
    three = fork(three, f"{scope}/tower", "branch3x3_2")
    double = ops.conv(x, f"{scope}/tower_1/conv", f"{port}.branch3x3dbl_1", 448, (1, 1))
    double = ops.conv(double, f"{scope}/tower_1/conv_1", f"{port}.branch3x3dbl_2", 384, (3, 3))
    double = fork(double, f"{scope}/tower_1", "branch3x3dbl_3")
    pool = pooled(x, f"{scope}/tower_2/pool")
    pool = ops.conv(pool, f"{scope}/tower_2/conv", f"{port}.branch_pool", 192, (1, 1))
    return ops.join([one, *three, *double, pool], f"{scope}/join")


def nested(scope: str) -> bytes:
    """Nodes that join the branches of mixed_9 or mixed_10 in two steps, as some conversions of the graph do."""
    forks = {f"{scope}/{tower}/mixed/join": f"{scope}/{tower}/mixed" for tower in ("tower", "tower_1")}
    axis = f"{scope}/join/concat_dim"
    inner = (node(name, "Concat", [axis, f"{fork}/conv", f"{fork}/conv_1"]) for name, fork in forks.items())
    return b"".join((*inner, node(f"{scope}/join", "Concat", [axis, f"{scope}/conv", *forks, f"{scope}/tower_2/conv"])))


def architecture(ops, x):
    """From the normalised image to the last block's output; `ops` makes or runs the operations."""
    x = ops.conv(x, "conv", "Conv2d_1a_3x3", 32, (3, 3), 2, "VALID")
    x = ops.conv(x, "conv_1", "Conv2d_2a_3x3", 32, (3, 3), 1, "VALID")
    x = ops.conv(x, "conv_2", "Conv2d_2b_3x3", 64, (3, 3))
    x = ops.maximum(x, "pool")
    x = ops.conv(x, "conv_3", "Conv2d_3b_1x1", 80, (1, 1), 1, "VALID")
    x = ops.conv(x, "conv_4", "Conv2d_4a_3x3", 192, (3, 3), 1, "VALID")
    x = ops.maximum(x, "pool_1")
    for scope, port, width in (("mixed", "Mixed_5b", 32), ("mixed_1", "Mixed_5c", 64), ("mixed_2", "Mixed_5d", 64)):
        x = block_a(ops, x, scope, port, width)
    x = block_b(ops, x, "mixed_3", "Mixed_6a")
    for scope, port, width in (
        ("mixed_4", "Mixed_6b", 128),
        ("mixed_5", "Mixed_6c", 160),
        ("mixed_6", "Mixed_6d", 160),
        ("mixed_7", "Mixed_6e", 192),
    ):
        x = block_c(ops, x, scope, port, width)
    x = block_d(ops, x, "mixed_8", "Mixed_7a")
    x = block_e(ops, x, "mixed_9", "Mixed_7b", ops.average)
    return block_e(ops, x, "mixed_10", "Mixed_7c", lambda x, name: ops.maximum(x, name, 1, "SAME"))


class Runner:
    """Runs the architecture with given weights, normalisation unfolded. A value is (name, float tensor NCHW)."""

    def __init__(self, weights: dict[str, np.ndarray], dtype=torch.float32):
        self.weights, self.dtype, self.outputs = weights, dtype, {}

    def value(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.weights[name]).to(self.dtype)

    def convolve(self, x, kernel, stride, padding):
        pads = [size // 2 if padding == "SAME" else 0 for size in kernel.shape[:2]]
        return functional.conv2d(x, kernel.permute(3, 2, 0, 1), stride=stride, padding=pads)

    def conv(self, x, scope, port, width, size, stride=1, padding="SAME"):
        y = self.convolve(x[1], self.value(f"{scope}/conv2d_params"), stride, padding)
        return self.normalise(y, scope)

    def normalise(self, y, scope):
        mean, variance, beta, gamma = (
            self.value(f"{scope}/batchnorm/{name}") for name in ("moving_mean", "moving_variance", "beta", "gamma")
        )
        y = functional.relu(functional.batch_norm(y, mean, variance, gamma, beta, eps=EPSILON))
        self.outputs[scope] = y
        return scope, y

    def average(self, x, name):
        ones = functional.avg_pool2d(torch.ones_like(x[1][:1, :1]), 3, 1, 1)  # share of the window inside the image
        return name, functional.avg_pool2d(x[1], 3, 1, 1) / ones

    def maximum(self, x, name, stride=2, padding="VALID"):
        return name, functional.max_pool2d(x[1], 3, stride, 1 if padding == "SAME" else 0)

    def join(self, parts, name):
        return name, torch.cat([part[1] for part in parts], 1)

    def features(self, image: torch.Tensor) -> dict[str, np.ndarray]:
        """Of a normalised image (N, 3, 299, 299): pooled, spatial and logits, with loops where a reshape might err."""
        _, last = architecture(self, ("Mul", image.to(self.dtype)))
        pooled = last.double().mean(dim=(2, 3))
        tapped = self.outputs["mixed_6/conv"].numpy()
        spatial = np.empty((len(tapped), 2023), tapped.dtype)
        for y in range(17):
            for x in range(17):
                for channel in range(7):
                    spatial[:, (y * 17 + x) * 7 + channel] = tapped[:, channel, y, x]
        logits = pooled @ torch.from_numpy(self.weights["softmax/weights"]).double()
        return {"pooled": pooled.numpy(), "spatial": spatial, "logits": logits.numpy()}


class Writer(Runner):
    """Draws the weights, calibrates the normalisations on what runs through, and writes the nodes down."""

    def __init__(self, seed: int, typed: bool = False):
        super().__init__({})
        self.random, self.typed, self.nodes, self.ports = np.random.default_rng(seed), typed, [], {}

    def constant(self, name: str, array) -> str:
        array = np.array(array, order="C")  # scalars stay scalars
        self.nodes.append(constant(name, array, self.typed))
        self.weights[name] = array
        return name

    def op(self, name, op, inputs, **attributes):
        self.nodes.append(node(name, op, inputs, T=kind(FLOAT), **attributes))

    def checked(self, value, scope):
        self.op(f"{scope}/CheckNumerics", "CheckNumerics", [value], message=word("finite"))
        self.op(f"{scope}/control_dependency", "Identity", [value, f"^{scope}/CheckNumerics"])
        return f"{scope}/control_dependency"

    def conv(self, x, scope, port, width, size, stride=1, padding="SAME"):
        width_in = x[1].shape[1]
        kernel = self.random.standard_normal((*size, width_in, width), np.float32)
        kernel *= np.float32(np.sqrt(2 / (size[0] * size[1] * width_in)))
        self.constant(f"{scope}/conv2d_params", kernel)
        self.ports[port] = scope
        y = self.convolve(x[1], torch.from_numpy(kernel), stride, padding)
        variance, mean = torch.var_mean(y, dim=(0, 2, 3))
        window = integers((1, stride, stride, 1))
        self.op(
            f"{scope}/Conv2D",
            "Conv2D",
            [x[0], f"{scope}/conv2d_params"],
            strides=window,
            padding=word(padding),
            use_cudnn_on_gpu=flag(True),
        )
        self.constant(f"{scope}/batchnorm/beta", self.random.normal(0.1, 0.2, width).astype(np.float32))
        self.constant(f"{scope}/batchnorm/gamma", self.random.uniform(0.8, 1.2, width).astype(np.float32))
        self.constant(f"{scope}/batchnorm/moving_mean", mean.numpy())
        self.constant(f"{scope}/batchnorm/moving_variance", variance.numpy())
        norm = f"{scope}/batchnorm"
        self.op(
            norm,
            "BatchNormWithGlobalNormalization",
            [f"{scope}/Conv2D", *(f"{norm}/{each}" for each in ("moving_mean", "moving_variance", "beta", "gamma"))],
            variance_epsilon=real(EPSILON),
            scale_after_normalization=flag(True),
        )
        self.op(scope, "Relu", [self.checked(norm, scope)])
        return self.normalise(y, scope)

    def pool(self, op, x, name, size, stride, padding):
        ksize, strides = integers((1, size, size, 1)), integers((1, stride, stride, 1))
        attributes = {"ksize": ksize, "strides": strides, "padding": word(padding)}
        if op == "MaxPool":
            # of that time: float, and no attribute T
            self.nodes.append(node(name, op, [self.checked(x[0], name)], **attributes))
        else:
            self.op(name, op, [x[0]], **attributes)

    def average(self, x, name):
        self.pool("AvgPool", x, name, 3, 1, "SAME")
        return super().average(x, name)

    def maximum(self, x, name, stride=2, padding="VALID"):
        self.pool("MaxPool", x, name, 3, stride, padding)
        return super().maximum(x, name, stride, padding)

    def join(self, parts, name):
        axis = self.constant(f"{name}/concat_dim", np.array(3, np.int32))
        self.op(name, "Concat", [axis, *(part[0] for part in parts)], N=field(3, len(parts)))
        return super().join(parts, name)

    def write(self, image: torch.Tensor, path: Path) -> None:
        """The graph, calibrated on normalised images (N, 3, 299, 299)."""
        empty = field(8, field(1, STRING) + field(2, b"") + field(8, b""))
        self.nodes.append(node("DecodeJpeg/contents", "Const", dtype=kind(STRING), value=empty))
        self.nodes.append(node("DecodeJpeg", "DecodeJpeg", ["DecodeJpeg/contents"], channels=field(3, 3)))
        self.nodes.append(node("Cast", "Cast", ["DecodeJpeg"], SrcT=kind(UINT8), DstT=kind(FLOAT)))
        self.constant("ExpandDims/dim", np.array(0, np.int32))
        self.op("ExpandDims", "ExpandDims", ["Cast", "ExpandDims/dim"])
        self.constant("ResizeBilinear/size", np.array([299, 299], np.int32))
        self.op("ResizeBilinear", "ResizeBilinear", ["ExpandDims", "ResizeBilinear/size"])
        self.constant("Sub/y", np.array(128, np.float32))
        self.op("Sub", "Sub", ["ResizeBilinear", "Sub/y"])
        self.constant("Mul/y", np.array(0.0078125, np.float32))
        self.op("Mul", "Mul", ["Sub", "Mul/y"])
        with torch.inference_mode():
            last = architecture(self, ("Mul", image))
        self.pool("AvgPool", last, "pool_3", 8, 1, "VALID")
        self.constant("pool_3/_reshape/shape", np.array([-1, 2048], np.int32))
        self.op("pool_3/_reshape", "Reshape", ["pool_3", "pool_3/_reshape/shape"])
        self.constant("softmax/weights", self.random.standard_normal((2048, 1008), np.float32) * np.float32(0.05))
        self.constant("softmax/biases", self.random.standard_normal(1008, np.float32))
        self.op("softmax/logits/MatMul", "MatMul", ["pool_3/_reshape", "softmax/weights"])
        self.op("softmax/logits", "BiasAdd", ["softmax/logits/MatMul", "softmax/biases"])
        self.op("softmax", "Softmax", ["softmax/logits"])
        versions = field(4, field(1, 8))  # the producer: its batch normalisation was withdrawn at 9
        path.write_bytes(b"".join((*self.nodes, versions)))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The same weights under the names and in the layout of the torch ports."""
        names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
        state = {"fc.weight": self.value("softmax/weights").T.contiguous(), "fc.bias": self.value("softmax/biases")}
        for port, scope in self.ports.items():
            state[f"{port}.conv.weight"] = self.value(f"{scope}/conv2d_params").permute(3, 2, 0, 1).contiguous()
            state |= {f"{port}.bn.{mine}": self.value(f"{scope}/batchnorm/{their}") for mine, their in names.items()}
        return state


def pictures(count: int, size: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, size, size, 3): smooth colour with texture, brighter and darker ones."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.normal(0, 60, (count, 3, 6, 6)).astype(np.float32))
    smooth = functional.interpolate(coarse, size=(size, size), mode="bicubic").permute(0, 2, 3, 1).numpy()
    noise = random.normal(0, 15, smooth.shape) + random.normal(128, 25, (count, 1, 1, 3))
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)
