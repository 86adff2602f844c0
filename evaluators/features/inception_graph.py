"""The weights of the 2015-12-05 Inception-v3, from the frozen graph that ADM's evaluator runs or from its torch port.

TensorFlow is not needed to read them. The two public files hold the same numbers; their names, sizes and hashes are
below. Another file is accepted only if it holds the same network, layer by layer or, with a warning, if its features of
a built-in picture are equal; it is then described as unknown weights.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluators.features.graphdef import Malformed, Node, map_file, read_graph
from evaluators.features.inception_layers import CLASSES, EPSILON, POOLED, SPATIAL, Conv, convolutions
from evaluators.features.inception_structure import check_structure
from evaluators.features.spec import Features
from evaluators.reference import check_images
from harness.errors import RunError, UserError, shown

GRAPH_NAME, GRAPH_SIZE, GRAPH_MD5 = "classify_image_graph_def.pb", 95_673_916, "e6bb154e85f5d4331c22abcddb5dcf31"
GRAPH_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH_NAME}"
PORT_NAME, PORT_SIZE = "pt_inception-2015-12-05-6726825d.pth", 95_628_359
PORT_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# Preprocessing and precision, which are part of the hash of the feature network.
RECIPE = "TF1 bilinear resize to 299x299; (x - 128) / 128; float32; logits without bias"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution and its batch normalisation. kernel: float32 (height, width, in, out); the others: float32 (out,)."""

    kernel: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    def folded(self) -> tuple[np.ndarray, np.ndarray]:
        """Kernel and bias of one equivalent convolution: kernel * s (height, width, in, out), beta - mean * s (out,).

        s = gamma / sqrt(variance + eps). Computed in float64 and rounded to float32 once.
        """
        scale = self.gamma.astype(np.float64) / np.sqrt(self.variance.astype(np.float64) + float(np.float32(EPSILON)))
        return (self.kernel * scale).astype(np.float32), (self.beta - self.mean * scale).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class InceptionWeights:
    """The weights of the network, as views of the mapped file where possible.

    layers: by scope, in the order of `convolutions()`. classifier: float32 (2048, 1008), without its bias.
    sha256: of the weights and the preprocessing; it does not depend on file format and backend, and equal hashes mean
    equal features. found: one line that describes the file. known: whether it is one of the two public files. is_graph:
    whether TensorFlow can run it.
    """

    path: Path
    layers: dict[str, Layer]
    classifier: np.ndarray
    sha256: str
    found: str
    known: bool
    is_graph: bool


def missing_weights(name: str) -> UserError:
    """The error for an Inception extractor without a weight file."""
    return UserError(
        f"features {name} need their weights: give --inception FILE, where FILE is {GRAPH_NAME}"
        f" ({GRAPH_SIZE:,} bytes, md5 {GRAPH_MD5}; {GRAPH_URL}) or, for torch, {PORT_NAME} of pytorch-fid"
    )


def read_weights(path: Path, entry: str | None = None) -> InceptionWeights:
    """The weights in a frozen graph or a torch port of it. Raises UserError for a file without this network.

    entry: of a port in a checkpoint where several fit (`harness.weights.files.open_weights`).
    """
    path = Path(path)
    try:
        data = map_file(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--inception {path}: {getattr(error, 'strerror', None) or error}; {_remedy()}") from error
    head = bytes(data[:2])
    if head == b"\x1f\x8b":  # gzip
        raise UserError(f"{path} is a compressed archive: unpack it (tar -xzf) and name the {GRAPH_NAME} in it")
    if not head or head[:1] == b"<":
        raise UserError(f"{path} is {'a web page' if head else 'empty'}; {_remedy()}")
    if head == b"PK" or head[:1] == b"\x80":  # a zip or a pickle, as torch saves them
        return _from_port(path, data, entry)
    if entry is not None:
        raise UserError(f"{path}: a frozen graph has no entries: leave out --entry {shown(entry)}")
    return _from_graph(path, data)


def _remedy() -> str:
    """How to get the public file, for the end of error messages."""
    return f"fetch {GRAPH_NAME} ({GRAPH_SIZE:,} bytes, md5 {GRAPH_MD5}) from {GRAPH_URL}"


def _describe(path: Path, size: int, hash_name: str, digest: str, known: bool, name: str) -> str:
    """One line that describes a weight file. name: that of the public file."""
    if known:
        return f"{name} ({size:,} bytes, {hash_name} {digest})"
    return (
        f"unknown weights of the right structure: {path.name}, {size:,} bytes, {hash_name} {digest}; "
        f"not {name}, so its numbers compare with no published ones"
    )


def _sha256(layers: dict[str, Layer], classifier: np.ndarray) -> str:
    """Hash of the preprocessing and of all weights, independent of the file's format."""
    digest = hashlib.sha256(f"inception-2015-12-05\n{RECIPE}\n".encode())
    for scope, layer in layers.items():
        digest.update(f"{scope} {layer.kernel.shape}\n".encode())
        for array in (layer.kernel, layer.gamma, layer.beta, layer.mean, layer.variance):
            digest.update(np.ascontiguousarray(array, "<f4").data)
    digest.update(np.ascontiguousarray(classifier, "<f4").data)
    return digest.hexdigest()


def _checked(path: Path, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array itself. Raises UserError unless it is finite and float32 of `shape`. name: of the tensor, for messages."""
    if array.dtype != np.float32 or array.shape != shape:
        raise UserError(
            f"{path} holds another network: {name} is {array.dtype} {array.shape}, not float32 {shape}; {_remedy()}"
        )
    if not np.isfinite(array).all():
        raise UserError(f"{path} is damaged: {name} is not finite everywhere; {_remedy()}")
    return array


# The frozen graph ---------------------------------------------------------------------------------------------------


def _from_graph(path: Path, data: memoryview) -> InceptionWeights:
    """The weights in a frozen graph. data: the bytes of the file."""
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    known = len(data) == GRAPH_SIZE and md5 == GRAPH_MD5
    try:
        nodes = read_graph(data)
        layers = {}
        for conv in convolutions():
            layers[conv.scope] = _graph_layer(path, nodes, conv)
        classifier = _checked(path, "softmax/weights", _constant(nodes, "softmax/weights"), (POOLED, CLASSES))
        if not known:  # the public file needs no check
            _check_network(path, nodes, layers, classifier)
    except Malformed as error:
        size = "" if len(data) == GRAPH_SIZE else f" It has {len(data):,} bytes, the public file {GRAPH_SIZE:,}."
        raise UserError(
            f"{path} is not the frozen graph of Inception-v3: {error}.{size} Instead, {_remedy()}"
        ) from error
    return InceptionWeights(
        path=path,
        layers=layers,
        classifier=classifier,
        sha256=_sha256(layers, classifier),
        found=_describe(path, len(data), "md5", md5, known, GRAPH_NAME),
        known=known,
        is_graph=True,
    )


def _check_network(path: Path, nodes: dict[str, Node], layers: dict[str, Layer], classifier: np.ndarray) -> None:
    """Raise Malformed for a graph that computes other features than this network with the weights that were read.

    A graph whose structure is not the published one is run on a picture: equal features are accepted with a warning.
    """
    try:
        check_structure(nodes)
    except Malformed as error:
        from evaluators.features.inception_self_test import TOLERANCE, largest_difference  # needs torch

        difference = largest_difference(nodes, layers, classifier)
        if difference > TOLERANCE:
            raise Malformed(
                f"{error}, and its features of a test picture differ by {difference:.1e} of their root mean square"
            ) from error
        logger.warning(
            f"{path}: its structure is not that of {GRAPH_NAME} ({error}); its features of a test picture are equal"
        )


def _node(nodes: dict[str, Node], name: str) -> Node:
    if name not in nodes:
        raise Malformed(f"node {name} is missing")
    return nodes[name]


def _constant(nodes: dict[str, Node], name: str) -> np.ndarray:
    return _node(nodes, name).array()


def _graph_layer(path: Path, nodes: dict[str, Node], conv: Conv) -> Layer:
    """The weights of one convolution and its batch normalisation."""

    def vector(name: str) -> np.ndarray:
        full = f"{conv.scope}/batchnorm/{name}"
        return _checked(path, full, _constant(nodes, full), (conv.width,))

    kernel = f"{conv.scope}/conv2d_params"
    norm = nodes.get(f"{conv.scope}/batchnorm")
    # with scale_after_normalization=False the operation does not multiply by gamma
    unscaled = norm is not None and norm.flag("scale_after_normalization") is False
    return Layer(
        kernel=_checked(path, kernel, _constant(nodes, kernel), (*conv.kernel, conv.width_in, conv.width)),
        gamma=np.ones(conv.width, np.float32) if unscaled else vector("gamma"),
        beta=vector("beta"),
        mean=vector("moving_mean"),
        variance=vector("moving_variance"),
    )


# The torch port -----------------------------------------------------------------------------------------------------


def _from_port(path: Path, data: memoryview, entry: str | None) -> InceptionWeights:
    """The weights in a torch port of the graph. data: the bytes of the file."""
    from harness.weights.files import open_weights

    sha256 = hashlib.sha256(data).hexdigest()
    known = sha256 == PORT_SHA256
    marks = [f"{conv.port}.conv.weight" for conv in convolutions()]
    tensors = open_weights(path, entry=entry, markings=[marks]).tensors

    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{path} is not a torch port of this Inception-v3: {name} is missing; {_remedy()}")
        return tensors[name].read()

    def vector(conv: Conv, name: str) -> np.ndarray:
        return _checked(path, f"{conv.port}.bn.{name}", read(f"{conv.port}.bn.{name}"), (conv.width,))

    layers = {}
    for conv in convolutions():
        name = f"{conv.port}.conv.weight"
        layers[conv.scope] = Layer(
            kernel=_checked(path, name, read(name), (conv.width, conv.width_in, *conv.kernel)).transpose(2, 3, 1, 0),
            gamma=vector(conv, "weight"),
            beta=vector(conv, "bias"),
            mean=vector(conv, "running_mean"),
            variance=vector(conv, "running_var"),
        )
    classifier = _checked(path, "fc.weight", read("fc.weight"), (CLASSES, POOLED)).T
    return InceptionWeights(
        path=path,
        layers=layers,
        classifier=classifier,
        sha256=_sha256(layers, classifier),
        found=_describe(path, len(data), "sha256", sha256, known, PORT_NAME),
        known=known,
        is_graph=False,
    )


# All backends -------------------------------------------------------------------------------------------------------


def extract_in_batches(
    name: str,
    images: np.ndarray,
    size: int,
    forward: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> Features:
    """Features of images uint8 (N, H, W, 1 or 3), computed in batches.

    size: batch size. forward: from a contiguous batch uint8 (n, H, W, C), n <= size, to float32 arrays pooled, spatial and
    logits of n rows.
    Raises UserError for other arrays, RunError with the image's index for features that are not finite.
    """
    check_images(images, "the images for feature extraction")
    pooled, spatial, logits = (np.empty((len(images), width), np.float32) for width in (POOLED, SPATIAL, CLASSES))
    for start in range(0, len(images), size):
        rows = slice(start, start + size)
        # a copy: torch warns of a read-only memory map; order C makes it contiguous
        pooled[rows], spatial[rows], logits[rows] = forward(np.array(images[rows], order="C"))
    for array in (pooled, spatial, logits):
        finite = np.isfinite(array).all(axis=1)
        if not finite.all():
            raise RunError(
                f"features {name} of image {int(np.argmin(finite))} are not finite: the weights or this device are broken"
            )
    return Features(pooled=pooled, logits=logits, spatial=spatial)
