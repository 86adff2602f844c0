"""Random numbers as a pure function of (seed, purpose, index, step): the numpy reference, re-exported.

There is no generator state. So a resumed run needs none, and image `index` does not depend on its batch. `threefry_torch`
and `threefry_jax` have the same functions for torch and JAX; shared golden vectors test that all of them agree.
"""

from harness.randomness.threefry_numpy import Purpose, bits, integers, normal, permutation, threefry2x32, uniform

__all__ = ["Purpose", "bits", "integers", "normal", "permutation", "threefry2x32", "uniform"]
