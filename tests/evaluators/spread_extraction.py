"""The functions that the processes of test_independence.py run, in a module that a spawned process can import."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from evaluators.features import FeatureExtractor, Features, FeatureSpec
from evaluators.reference import extract

POOLED, SPATIAL, LOGITS = 64, 40, 17


class Sketch:
    """A network whose features of an image are the same bits in any batch: whole numbers, then correctly rounded roots.

    Roots of whole numbers fill float32's mantissa, so sums of features do round.
    """

    name, sha256, dim, description = "sketch", "0" * 64, POOLED, "for tests"

    def __call__(self, images: np.ndarray) -> Features:
        flat = images.reshape(len(images), -1).astype(np.int64)
        weights = np.random.RandomState(0).randint(-3, 4, (flat.shape[1], POOLED + SPATIAL + LOGITS))
        seen = np.sqrt(np.abs(flat @ weights).astype(np.float32)) / np.float32(8)
        pooled, spatial, logits = np.split(seen, [POOLED, POOLED + SPATIAL], axis=1)
        return Features(pooled=pooled, spatial=spatial, logits=logits)


def sketch() -> Sketch:
    return Sketch()


@dataclass(frozen=True)
class Network:
    """A picklable loader of a real network, from its spec and weight file."""

    spec: FeatureSpec
    weights: Path | None = None

    def __call__(self) -> FeatureExtractor:
        return _loaded(self)


@lru_cache(maxsize=1)
def _loaded(network: Network) -> FeatureExtractor:
    import torch

    torch.set_num_threads(1)  # with two threads, sums are split differently
    return network.spec.load(weights=network.weights)


def see(task: tuple) -> Features:
    """Features of one process's share: task is (callable that gives the network, images)."""
    load, images = task
    return extract(images, load(), "share")
