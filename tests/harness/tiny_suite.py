"""A suite whose network is a fixed projection of the pixels' means: nothing to load, rows that depend on nothing but
their image, and a count of what it has seen."""

import os
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from evaluators.features import Features, FeatureSpec
from evaluators.suites import METRICS, Suite
from harness import registry

DIM, SPATIAL = 6, 4


class Projection:
    """pooled (N, 6) and spatial (N, 4) from the image alone; `seen` counts images. Slow on demand."""

    seen = 0

    def __init__(self, spec, device):
        self.name, self.dim, self.description = spec.name, DIM, spec.description
        self.sha256 = f"hash of {spec.name}"

    def __call__(self, images):
        Projection.seen += len(images)
        if log := os.environ.get("TINY_SUITE_LOG"):  # of a process that is going to be killed
            with Path(log).open("a") as file:
                file.write(f"{len(images)}\n")
            time.sleep(0.02)
        rows = np.float64([image.mean(axis=2).ravel()[: DIM + SPATIAL] for image in images])
        mixed = np.stack([np.roll(rows, k, axis=1) * (k + 1) for k in range(3)]).sum(axis=0)
        return Features(pooled=np.float32(mixed[:, :DIM]), spatial=np.float32(mixed[:, DIM:] / 3))


def load(spec, device):
    return Projection(spec, device)


def made(name, metrics=("fd", "precision")):
    features = FeatureSpec(
        name=name, dim=DIM, classes=None, input_size=8, loader=f"{__name__}:load", description="a projection"
    )
    return Suite(name=name, version=1, features=features, metrics=tuple(METRICS[key] for key in metrics))


@contextmanager
def registered():
    """The suites `tiny` and `tiny-other`, known by name meanwhile."""
    names = ("tiny", "tiny-other")
    for name in names:
        registry.suites.register(made(name), "the tests")
    try:
        yield
    finally:
        for name in names:
            del registry.suites._items[name], registry.suites._owners[name]
