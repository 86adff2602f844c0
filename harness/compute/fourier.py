"""Compute of complex arithmetic and of Fourier transforms, the same for all frameworks."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2, prod

COMPLEX_PRODUCT = 4
"""Multiply-adds of a complex multiply-add."""


def fft_flops(values: int, lengths: Sequence[int], real: bool) -> int:
    """Multiply-adds of a fast Fourier transform, whichever algorithm computes it.

    values: numbers that are transformed, over all axes. lengths: of the axes that are transformed. real: of real numbers,
    or back to real numbers, which are then the `values`. FFTW's benchmarks (fftw.org/speed/method.html) count 5 n log2 n
    operations of a complex transform of n numbers and half of that of a real one; a multiply-add is two of them.
    """
    return round((1.25 if real else 2.5) * values * log2(max(prod(lengths), 1)))
