"""Detection of earlier JPEG compression from pixels.

After JPEG, the 8 x 8 DCT coefficients of an image lie near multiples of the quantisation steps (a comb). The usual
test, edges along the 8 x 8 grid, also fires on networks that work in patches of 8 pixels, as autoencoders do; only
quantisation leaves a comb. For each of 36 frequencies and each step, coefficients beyond half a step are mapped to a
circle whose circumference is the step: after JPEG they gather at angle 0, otherwise they spread (Rayleigh test of
directions). A set counts as JPEG when most frequencies show a comb.

Measured on digits, Fashion-MNIST and photographs: Pillow's quality 75 to 97 is always detected. At 98 and above the
comb is too fine, and at 50 and below small sets have too few coefficients. The JPEG grid must start at the image's
corner: images that were cropped or resized after compression are not detected.
"""

from __future__ import annotations

import functools

import numpy as np

# Without frequencies 0 and 4, whose cosines have one magnitude: there, flat or two-level images show combs without JPEG.
AXIS_FREQUENCIES = (1, 2, 3, 5, 6, 7)
FREQUENCIES = len(AXIS_FREQUENCIES) ** 2
STEPS = np.arange(3, 129)  # quantisation steps that are tested
BINS_PER_UNIT, MAX_COEFFICIENT = 16, 256  # of the histogram of the coefficients' magnitudes
MIN_COEFFICIENTS = 20  # for a decision about a frequency and a step
MIN_Z, MIN_MEAN_COSINE = 6.0, 0.3  # lower bounds of a comb's mean cosine: in standard errors, and of the cosine itself
# Of 36 frequencies. Measured: at most 16 in lossless images (two-valued digits), at least 23 in images after JPEG 75 to 97.
MIN_COMBS = 20
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in JFIF


def _basis() -> np.ndarray:
    """(6, 8): the used rows of the orthonormal 8-point DCT-II."""
    k, j = np.array(AXIS_FREQUENCIES)[:, None], np.arange(8)[None]
    return (np.cos((2 * j + 1) * k * np.pi / 16) / 2).astype(np.float32)


@functools.cache
def _table() -> np.ndarray:
    """float64 (bins, steps, 2), for a coefficient in each bin and each step.

    [..., 0]: cosine of its angle on the circle of the step, or 0 if it does not count. [..., 1]: 1.0 if it counts,
    which means that it is larger than half the step, else 0.0.
    """
    value = (np.arange(BINS_PER_UNIT * MAX_COEFFICIENT) + 0.5) / BINS_PER_UNIT
    counts = value[:, None] > STEPS / 2
    return np.stack([np.cos(2 * np.pi * value[:, None] / STEPS) * counts, counts], axis=-1)


class JpegTraces:
    """Histogram of DCT coefficients over batches of images, of constant size.

    Each image should be added once: a few coefficients, repeated, look like a comb.
    """

    def __init__(self) -> None:
        self._basis = _basis()
        self._counts = np.zeros(FREQUENCIES * BINS_PER_UNIT * MAX_COEFFICIENT, np.int64)

    def add(self, images: np.ndarray) -> None:
        """Count the complete 8 x 8 blocks of uint8 (n, H, W, C), from the upper left corner; smaller images have none."""
        n, height, width, channels = images.shape
        rows, columns = height // 8, width // 8
        if not n * rows * columns:
            return
        cut = images[:, : rows * 8, : columns * 8].astype(np.float32)  # (n, 8r, 8c, C)
        grey = cut[..., 0] if channels == 1 else cut @ LUMA  # (n, 8r, 8c)
        blocks = grey.reshape(n, rows, 8, columns, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8)  # (b, 8, 8)
        coefficients = np.abs(self._basis @ blocks @ self._basis.T).reshape(len(blocks), FREQUENCIES)  # (b, 36)
        bins = np.minimum((coefficients * BINS_PER_UNIT).astype(np.int64), BINS_PER_UNIT * MAX_COEFFICIENT - 1)
        bins += np.arange(FREQUENCIES) * (BINS_PER_UNIT * MAX_COEFFICIENT)
        self._counts += np.bincount(bins.ravel(), minlength=len(self._counts))

    def combs(self) -> int:
        """Number of the 36 frequencies that show a comb."""
        counts = self._counts.reshape(FREQUENCIES, -1).astype(np.float64)
        counts[:, -1] = 0  # the last bin also holds all larger magnitudes
        cosine_sum, coefficients = np.einsum("fb,bsx->xfs", counts, _table(), optimize=True)  # (36, steps) each
        n = np.where(coefficients >= MIN_COEFFICIENTS, coefficients, np.nan)  # comparisons with nan are False
        mean_cosine = cosine_sum / n
        # Cosines of uniform angles have variance 1/2, so the standard error of their mean is 1 / sqrt(2 n).
        is_comb = (mean_cosine > MIN_MEAN_COSINE) & (mean_cosine * np.sqrt(2 * n) > MIN_Z)
        return int(is_comb.any(axis=1).sum())

    @property
    def jpeg(self) -> bool:
        """Whether these images, as a set, were once stored as JPEG."""
        return self.combs() >= MIN_COMBS
