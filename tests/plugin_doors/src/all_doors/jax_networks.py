"""Networks in Flax (NNX)."""

import jax.numpy as jnp
from flax import nnx


class Pixelwise(nnx.Module):
    """Two layers at each pixel, without a label."""

    def __init__(self, *, input_size, in_channels, num_classes, out_channels, rngs):
        self.into, self.time = nnx.Linear(in_channels, 16, rngs=rngs), nnx.Linear(1, 16, rngs=rngs)
        self.out = nnx.Linear(16, 2 * in_channels if out_channels is None else out_channels, rngs=rngs)

    def __call__(self, x, t, y):
        assert t.dtype == jnp.float32
        h = nnx.relu(self.into(jnp.moveaxis(x, 1, 3)) + self.time(t[:, None] / 10)[:, None, None])  # (N, H, W, D)
        return jnp.moveaxis(self.out(h), 3, 1)
