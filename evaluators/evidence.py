"""What a metric is given to look at. A metric's `compute` is a function Evidence -> {key: Estimate}."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evaluators.features import Features

if TYPE_CHECKING:
    from evaluators.reference import Reference


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Samples beside the reference they are judged by.

    images: uint8 (N, H, W, C). features: of those images, N rows.
    training: uint8 (T, H, W, C), the images that the generator may have learnt by heart.
    block: int64 (N,), the jackknife block of every sample (evaluators/intervals.py).
    """

    images: np.ndarray
    features: Features
    reference: "Reference"
    training: np.ndarray
    block: np.ndarray
