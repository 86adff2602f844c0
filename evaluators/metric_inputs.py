"""The inputs of metrics. A metric's `compute` is a function MetricInputs -> {key: Estimate}."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evaluators.features.spec import Features

if TYPE_CHECKING:
    from evaluators.reference import Reference


@dataclass(frozen=True, kw_only=True)
class MetricInputs:
    """A sample set, its features, and the reference that it is compared with.

    images: uint8 (N, H, W, C), the samples. features: of the samples, N rows.
    training: uint8 (T, H, W, C), images that the generator may have memorised.
    block: int64 (N,), the jackknife block of every sample (evaluators/intervals.py).
    labels: int64 (N,), classes that were drawn in equal numbers, by which `block` is stratified; None: not known to be.
    copies: int64 (N,), equal for copies of one image, which have one block; None: there are none.
    """

    images: np.ndarray
    features: Features
    reference: "Reference"
    training: np.ndarray
    block: np.ndarray
    labels: np.ndarray | None = None
    copies: np.ndarray | None = None
