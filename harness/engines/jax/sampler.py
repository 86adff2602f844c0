"""A sampler plan applied in jax, and guidance: `harness.engines.torch.sampler` as one loop on the device.

The loop is compiled once for a plan and a batch size. Each call runs a stretch of steps, long enough to keep the device
busy and short enough for a progress bar and Ctrl-C. The lengths of the stretches do not change the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from harness.diffusion.plans import SamplerPlan
from harness.diffusion.solvers import BASE, D, X
from harness.engines.guidance import check_channels, check_classifier_scale, check_guidance, guided_channels

Predict = Callable[[Array, Array, Array], Array]  # (x (N, C, H, W), t (N,), plan row) -> (N, C or 2 C, H, W)
Guide = Callable[[Array, Array], Array]  # (x (N, C, H, W), t (N,)) -> (N, C, H, W)


class Carry(NamedTuple):
    """The state between two rows of a plan."""

    x: Array  # float32 (N, C, H, W)
    base: Array | None  # the same; zeros until a row makes one; None in a plan that keeps none
    images: tuple[Array, ...]  # predicted by the last rows, newest first, as many as the plan uses: (N, C, H, W) each


def first_carry(plan: SamplerPlan, noise: Array) -> Carry:
    """The state before row 0, from standard normal noise float32 (N, C, H, W)."""
    table = plan.table
    x = noise if table.initial_noise == 1.0 else np.float32(table.initial_noise) * noise
    base = jnp.zeros_like(x) if table.base_from.any() else None
    return Carry(x, base, (jnp.zeros_like(x),) * (table.x_from.shape[1] - D - 1))


def sample_steps(
    predict: Predict,
    plan: SamplerPlan,
    carry: Carry,  # as of `first_carry` before row 0
    first: Array | int,  # the first plan row to run
    end: Array | int,  # the row after the last one to run
    noise: Callable[[Array], Array],  # plan row k -> float32 (N, C, H, W)
    guide: Guide | None = None,  # returns the scaled gradient of a log likelihood with respect to x
) -> Carry:
    """The state after rows first ... end - 1 of `plan`. May be traced.

    A guide shifts the mean of a DDPM step and epsilon of other samplers (Dhariwal and Nichol 2021, algorithms 1 and 2),
    as in torch's `sample_loop`, which explains each step. Everything but the network is float32. Raises UserError where
    the network's channels do not fit the plan.
    """
    table = plan.table
    channels = carry.x.shape[1]
    rows = _float32
    x_from, base_from = rows(table.x_from), rows(table.base_from)
    noise_to_x, noise_to_base = rows(table.noise_to_x), rows(table.noise_to_base)
    predicted = _prediction(predict, plan, carry.x.shape, guide)
    log_variances = None if table.log_variances is None else tuple(map(rows, table.log_variances))
    adds_noise = jnp.asarray(plan.adds_noise)

    def combined(table_rows: np.ndarray, values: Array, k: Array, states: Sequence[Array | None]) -> Array:
        """The sum of row k's coefficients times the states: the image D first, then x, then those that the table uses."""
        x, image = states[X], states[D]
        assert x is not None and image is not None
        result: Array = values[k, D] * image + values[k, X] * x
        for column in (BASE, *range(D + 1, len(states))):
            if table_rows[:, column].any():
                state = states[column]
                assert state is not None
                result = result + values[k, column] * state
        return result

    def step(k: Array, carry: Carry) -> Carry:
        x = carry.x
        x0, out, gradient = predicted(k, x)
        images = (x0, *carry.images)
        states = [x, carry.base, *images]
        mean = combined(table.x_from, x_from, k, states)
        base = combined(table.base_from, base_from, k, states) if table.base_from.any() else carry.base
        if log_variances is not None:
            frac = (out[:, channels:] + 1) / 2  # (N, C, H, W)
            log_variance = frac * log_variances[1][k] + (1 - frac) * log_variances[0][k]
            std = jnp.exp(0.5 * log_variance)  # (N, C, H, W)
        else:
            std = noise_to_x[k]
        if gradient is not None and table.shifts_mean:
            mean = mean + std**2 * gradient
        if not plan.adds_noise.any():  # an ODE draws nothing
            return Carry(mean, base, images[:-1])
        n = noise(k)
        if table.noise_to_base.any():
            assert base is not None
            base = base + noise_to_base[k] * n
        return Carry(jnp.where(adds_noise[k], mean + std * n, mean), base, images[:-1])

    return jax.lax.fori_loop(first, end, step, carry)


def predicted_image(
    predict: Predict,
    plan: SamplerPlan,
    x: Array,  # float32 (N, C, H, W): the state before row k
    k: Array,
    guide: Guide | None = None,
) -> Array:
    """The image D (N, C, H, W) that row k of `plan` predicts from x. May be traced. Errors as of `sample_steps`."""
    return _prediction(predict, plan, x.shape, guide)(k, x)[0]


def _float32(values: np.ndarray) -> Array:
    return jnp.asarray(values.astype(np.float32))


def _prediction(
    predict: Predict, plan: SamplerPlan, shape: tuple[int, ...], guide: Guide | None
) -> Callable[[Array, Array], tuple[Array, Array, Array | None]]:
    """The function (row k, x) -> (D, the network's output, the guide's gradient) for x of `shape` (N, C, H, W)."""
    samples, channels = shape[:2]
    x0_from_x, x0_from_output, x0_from_gradient = map(
        _float32, (plan.x0_from_x, plan.x0_from_output, plan.x0_from_gradient)
    )
    input_scale = None if plan.input_scale is None else _float32(plan.input_scale)
    integer = plan.network_times.dtype == np.int64
    times = jnp.asarray(plan.network_times.astype(np.int32 if integer else np.float32))

    def predicted(k: Array, x: Array) -> tuple[Array, Array, Array | None]:
        t = jnp.full((samples,), times[k])  # (N,)
        seen = x if input_scale is None else input_scale[k] * x
        out = predict(seen, t, k).astype(jnp.float32)  # (N, C or 2 C, H, W)
        check_channels(plan, out.shape[1], channels)  # at tracing time
        x0 = x0_from_x[k] * x - x0_from_output[k] * out[:, :channels]
        if plan.clip_denoised:
            x0 = x0.clip(-1.0, 1.0)
        gradient = None if guide is None else guide(x, t)  # (N, C, H, W)
        if gradient is not None and not plan.table.shifts_mean:
            x0 = x0 + x0_from_gradient[k] * gradient
        return x0, out, gradient

    return predicted


def guided(
    net: Callable[[Array, Array, Array], Array],  # (x, t, y) -> (N, C or 2 C, H, W)
    y: Array,  # int32 (N,): labels
    scale: float,  # 1 is no guidance: one evaluation, no doubled batch
    channels: str,  # a key of `harness.engines.guidance.GUIDED_CHANNELS`
    null_label: int | None,  # label index of "no class"; None: the network was trained without label dropout
    rows: np.ndarray | None = None,  # bool (E,): the plan rows with guidance; None: all
) -> Predict:
    """A `predict` with classifier-free guidance: eps = eps_uncond + scale (eps_cond - eps_uncond).

    A row with guidance calls the network once, on the doubled batch [conditional; unconditional]; other rows call it on
    the conditional half alone, in a branch that runs by itself. Errors as in torch's.
    """
    check_guidance(scale, channels, null_label)
    if scale == 1.0:
        return lambda x, t, row: net(x, t, y)
    assert null_label is not None  # or check_guidance had raised
    labels = jnp.concatenate([y, jnp.full_like(y, null_label)])  # (2 N,)

    def doubled(x: Array, t: Array) -> Array:
        out = net(jnp.concatenate([x, x]), jnp.concatenate([t, t]), labels)  # (2 N, C or 2 C, H, W)
        conditional, unconditional = jnp.split(out.astype(jnp.float32), 2)  # (N, C or 2 C, H, W) each
        count = guided_channels(channels, x.shape[1])
        eps = unconditional[:, :count] + scale * (conditional[:, :count] - unconditional[:, :count])
        return jnp.concatenate([eps, conditional[:, count:]], axis=1)

    if rows is None or rows.all():  # no branch: the compiled loop is as it was before there were intervals
        return lambda x, t, row: doubled(x, t)
    is_guided = jnp.asarray(rows)

    def predict(x: Array, t: Array, row: Array) -> Array:
        return jax.lax.cond(is_guided[row], doubled, lambda x, t: net(x, t, y).astype(jnp.float32), x, t)

    return predict


def classifier_guide(
    classifier: Callable[[Array, Array], Array],  # (x, t) -> logits (N, num_classes)
    y: Array,  # int32 (N,)
    scale: float,
) -> Guide:
    """A guide for `sample_steps`: scale x the gradient of log p(y | x, t) with respect to x.

    Dhariwal and Nichol 2021, sec. 4.
    """
    check_classifier_scale(scale)

    def log_likelihood(x: Array, t: Array) -> Array:
        # The sum over the batch: images are independent, so each gets its own gradient.
        logits = classifier(x, t).astype(jnp.float32)  # (N, num_classes)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).sum()

    return lambda x, t: jax.grad(log_likelihood)(x, t).astype(jnp.float32) * scale
