"""Features, two metrics of opposite directions, and a suite of them."""

import hashlib

import numpy as np

from evaluators.features import Features, FeatureSpec
from evaluators.intervals import Estimate
from evaluators.metrics import METRICS, Metric
from evaluators.suites import Suite

FEATURES = FeatureSpec(
    name="doors-corner", dim=4, classes=None, input_size=8, loader="all_doors.judging:Corner", description="four pixels"
)


class Corner:
    def __init__(self, spec, device):
        self.name, self.dim, self.description = spec.name, spec.dim, spec.description
        self.sha256 = hashlib.sha256(b"1").hexdigest()

    def __call__(self, images):
        return Features(pooled=images[:, 2:4, 2:4, 0].reshape(len(images), 4).astype(np.float32))


def compute(inputs):
    """How far the brightness of samples is from that of the reference (lower), and 1 minus that (higher)."""
    bright, real = inputs.images.mean(axis=(1, 2, 3)) / 255, inputs.reference.images.mean() / 255
    kept = [bright, *(bright[inputs.block != block] for block in np.unique(inputs.block))]
    gap = np.array([abs(each.mean() - real) for each in kept])
    return {
        "doors_gap": Estimate(value=gap[0], left_out=gap[1:]),
        "doors_likeness": Estimate(value=1 - gap[0], left_out=1 - gap[1:]),
    }


MINE = tuple(
    Metric(
        key=f"doors_{key}", title=title, direction=direction, minimum=20, paper="this package", bounds=(0.0, 1.0),
        compute="all_doors.judging:compute",
    )
    for key, title, direction in (("gap", "Gap (share)", "lower"), ("likeness", "Likeness (share)", "higher"))
)  # fmt: skip
SUITE = Suite(name="doors-suite", version=1, features=FEATURES, metrics=(*MINE, METRICS["fd"]))
