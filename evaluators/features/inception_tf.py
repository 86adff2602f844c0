"""The 2015-12-05 Inception-v3 as ADM's evaluator runs it: the original frozen graph in a TensorFlow session.

TensorFlow is imported when the extractor is loaded. The batch replaces the node `ExpandDims`, so the graph itself resizes
and normalises. Outputs are pool_3, the first 7 channels of mixed_6/conv, and, as logits, pool_3 times the second input of
softmax/logits/MatMul.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from evaluators.features.inception_graph import (
    GRAPH_NAME,
    InceptionWeights,
    extract_in_batches,
    missing_weights,
    read_weights,
)
from evaluators.features.inception_layers import POOLED, SPATIAL, SPATIAL_CHANNELS
from evaluators.features.spec import Features, FeatureSpec
from harness.errors import UserError


def _tensorflow() -> ModuleType:
    """The package tensorflow, imported now. Raises UserError if it is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no start-up messages on stderr, where progress bars are drawn
    try:
        import tensorflow
    except ImportError as error:
        raise UserError(
            f"features inception-2015-12-05-tf need TensorFlow ({error}): pip install tensorflow-cpu, or use"
            " inception-2015-12-05, which does not need it"
        ) from error
    return tensorflow


class InceptionGraphFeatures:
    """The extractor; see `evaluators.features.FeatureExtractor` for the contract. `close` releases its session.

    found, known: as in `InceptionWeights`.
    """

    def __init__(self, spec: FeatureSpec, weights: InceptionWeights, device: str = "cpu", batch_size: int = 64):
        tf = _tensorflow()
        self.name, self.dim, self.batch_size = spec.name, spec.dim, batch_size
        self.sha256, self.found, self.known = weights.sha256, weights.found, weights.known
        self.description = f"{spec.description}; TensorFlow {tf.__version__}; {weights.found}"
        on_gpu = device.partition(":")[0] not in ("cpu", "")
        if on_gpu and not tf.config.list_physical_devices("GPU"):
            raise UserError(f"TensorFlow {tf.__version__} sees no GPU here: give --device cpu, or install tensorflow")
        v1 = tf.compat.v1
        definition = v1.GraphDef()
        definition.ParseFromString(weights.path.read_bytes())
        self.graph = tf.Graph()
        with self.graph.as_default():
            self.batch = v1.placeholder(tf.float32, [None, None, None, 3])
            try:
                pool_3, spatial, matmul = tf.import_graph_def(
                    definition,
                    input_map={"ExpandDims:0": self.batch},
                    return_elements=["pool_3:0", "mixed_6/conv:0", "softmax/logits/MatMul"],
                    name="inception",
                )
            except ValueError as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"TensorFlow {tf.__version__} refuses the graph {weights.path}: {reason}") from error
            pooled = tf.reshape(pool_3, [-1, POOLED])
            self.outputs = (
                pooled,
                tf.reshape(spatial[..., :SPATIAL_CHANNELS], [-1, SPATIAL]),
                tf.matmul(pooled, matmul.inputs[1]),  # softmax/weights; the graph's own logits have a bias
            )
        config = v1.ConfigProto(device_count={} if on_gpu else {"GPU": 0})  # {}: all devices
        config.gpu_options.allow_growth = True
        # TensorFlow ignores OMP_NUM_THREADS, unlike the other libraries. 0 threads: TensorFlow's default
        threads = os.environ.get("OMP_NUM_THREADS", "")
        config.intra_op_parallelism_threads = config.inter_op_parallelism_threads = (
            int(threads) if threads.isdigit() else 0
        )
        self.session = v1.Session(graph=self.graph, config=config)

    def _feed(self, batch: np.ndarray) -> dict[Any, np.ndarray]:
        """The session's feed_dict for a batch uint8 (n, H, W, 1 or 3)."""
        # Grey is repeated; values are float32 and not scaled, as in ADM's evaluator
        return {self.batch: np.broadcast_to(batch, (*batch.shape[:3], 3)).astype(np.float32)}

    def stages(self, images: np.ndarray, *names: str) -> list[np.ndarray]:
        """Values of graph tensors, named as "Mul:0", for one batch of images uint8 (N, H, W, 1 or 3)."""
        tensors = [self.graph.get_tensor_by_name(f"inception/{name}") for name in names]
        return self.session.run(tensors, self._feed(images))

    def _forward(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pooled, spatial and logits of a batch uint8 (n, H, W, C)."""
        pooled, spatial, logits = self.session.run(self.outputs, self._feed(batch))
        return pooled, spatial, logits

    def __call__(self, images: np.ndarray) -> Features:
        return extract_in_batches(self.name, images, self.batch_size, self._forward)

    def close(self) -> None:
        """Release the session; the extractor cannot be used afterwards."""
        self.session.close()


def load(spec: FeatureSpec, device: str = "cpu", weights: Path | None = None) -> InceptionGraphFeatures:
    """The loader of the FeatureSpec. weights: the frozen graph; TensorFlow cannot run a torch port."""
    if weights is None:
        raise missing_weights(spec.name)
    graph = read_weights(weights)
    if not graph.is_graph:
        raise UserError(f"{weights} is a torch port: {spec.name} runs {GRAPH_NAME} itself; use inception-2015-12-05")
    return InceptionGraphFeatures(spec, graph, device)
