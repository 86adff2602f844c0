"""Networks in Flax (NNX)."""

import jax
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


class Steps(nnx.Module):
    """A perceptron over all pixels, told the time and the end of a step."""

    def __init__(self, *, input_size, in_channels, num_classes, out_channels, rngs):
        width, self.side = 256, input_size
        channels = 2 * in_channels if out_channels is None else out_channels
        self.into = nnx.Linear(in_channels * input_size**2, width, rngs=rngs)
        self.time, self.label = nnx.Linear(16, width, rngs=rngs), nnx.Embed(num_classes + 1, width, rngs=rngs)
        self.first, self.second = nnx.Linear(width, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, channels * input_size**2, rngs=rngs)

    def __call__(self, x, t, y):
        angle = t[:, :, None] * jnp.array([1.0, 2.0, 4.0, 8.0])  # (N, 2, 4): of the time, of the end
        times = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], 2).reshape(len(x), -1)
        c = self.time(times) + self.label(y)  # (N, D)
        h = nnx.relu(self.into(x.reshape(len(x), -1)) + c)
        h = h + nnx.relu(self.first(h) + c)
        h = h + nnx.relu(self.second(h) + c)
        return self.out(h).reshape(len(x), -1, self.side, self.side)


class Masked(nnx.Module):
    """Each pixel a token; in training, which is where `rngs` are given, half of each image's tokens, chosen at random."""

    def __init__(self, *, input_size, in_channels, num_classes, out_channels, rngs):
        width = 16
        channels = 2 * in_channels if out_channels is None else out_channels
        self.into, self.time = nnx.Linear(in_channels, width, rngs=rngs), nnx.Linear(2, width, rngs=rngs)
        self.label, self.inner = nnx.Embed(num_classes + 1, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, channels, rngs=rngs)

    def __call__(self, x, t, y, rngs=None):
        angle = t / 100
        c = self.time(jnp.stack([jnp.sin(angle), jnp.cos(angle)], 1)) + self.label(y)  # (N, D)
        tokens = self.into(jnp.moveaxis(x, 1, 3).reshape(len(x), -1, x.shape[1])) + c[:, None]  # (N, T, D)
        if rngs is None:
            tokens = tokens + nnx.relu(self.inner(tokens))
        else:
            order = jnp.argsort(jax.random.uniform(rngs.dropout(), tokens.shape[:2]), axis=1)  # (N, T)
            rows = order[:, : order.shape[1] // 2, None]
            seen = nnx.relu(self.inner(jnp.take_along_axis(tokens, rows, 1)))
            images = jnp.arange(len(x))[:, None]
            tokens = tokens.at[images, rows[..., 0]].add(seen)
        return jnp.moveaxis(self.out(tokens).reshape(len(x), *x.shape[2:], -1), 3, 1)
