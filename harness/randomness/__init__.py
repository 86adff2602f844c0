"""Randomness as a pure function of (seed, purpose, index, step): the numpy reference, re-exported.

No generator state exists anywhere, so a resumed run needs none, and image `index` does not know its batch.
`threefry_torch` has the same functions for torch tensors; shared golden vectors hold every engine to this one.
"""

from harness.randomness.threefry_numpy import Purpose, bits, integers, normal, permutation, threefry2x32, uniform

__all__ = ["Purpose", "bits", "integers", "normal", "permutation", "threefry2x32", "uniform"]
