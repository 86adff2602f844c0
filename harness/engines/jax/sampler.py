"""A sampler plan applied in jax, and guidance: `harness.engines.torch.sampler` as one loop on the device.

The loop is compiled once for a form of plan (`plan_arrays`) and a batch size. Each call runs a stretch of steps, long enough to keep the device
busy and short enough for a progress bar and Ctrl-C. The lengths of the stretches do not change the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from harness.diffusion.guidance import extrapolated
from harness.diffusion.solvers import D, X
from harness.engines.guidance import (
    check_channels,
    check_classifier_scale,
    check_guidance,
    check_guided_image,
    guided_channels,
)
from harness.engines.jax.plan_arrays import PlanArrays, PlanForm

Predict = Callable[[Array, Array, Array], Array]  # (x (N, C, H, W), t (N,), plan row) -> (N, C or 2 C, H, W)
Guide = Callable[[Array, Array], Array]  # (x (N, C, H, W), t (N,)) -> (N, C, H, W)
# (D, x, plan row) -> the guided D, each (N, C, H, W) and not yet clamped
ImageGuidance = Callable[[Array, Array, Array], Array]
# (conditional, unconditional, scale, sigma, jax.numpy) -> guided, as in `harness.diffusion.guidance_rules.GuidanceRule`
Combine = Callable[[Array, Array | None, float, Array, ModuleType], Array]


class Carry(NamedTuple):
    """The state between two rows of a plan."""

    x: Array  # float32 (N, C, H, W)
    base: Array | None  # the same; zeros until a row makes one; None in a plan that keeps none
    images: tuple[Array, ...]  # predicted by the last rows, newest first, as many as the plan uses: (N, C, H, W) each


def first_carry(form: PlanForm, noise: Array) -> Carry:
    """The state before row 0, from standard normal noise float32 (N, C, H, W)."""
    x = noise if form.initial_noise == 1.0 else np.float32(form.initial_noise) * noise
    return Carry(x, None if form.base_columns is None else jnp.zeros_like(x), (jnp.zeros_like(x),) * (form.images - 1))


def sample_steps(
    predict: Predict,
    form: PlanForm,
    arrays: PlanArrays,  # of the same plan
    carry: Carry,  # as of `first_carry` before row 0
    first: Array | int,  # the first plan row to run
    end: Array | int,  # the row after the last one to run
    noise: Callable[[Array], Array],  # plan row k -> float32 (N, C, H, W)
    guide: Guide | None = None,  # returns the scaled gradient of a log likelihood with respect to x
    image_guidance: ImageGuidance | None = None,  # applied to D before it is clamped
) -> Carry:
    """The state after rows first ... end - 1 of the plan. May be traced.

    A guide shifts the mean of a DDPM step and epsilon of other samplers (Dhariwal and Nichol 2021, algorithms 1 and 2),
    as in torch's `sample_loop`, which explains each step. Everything but the network is float32. Raises UserError where
    the network's channels do not fit the plan.
    """
    channels = carry.x.shape[1]
    arrays = PlanArrays(*map(jnp.asarray, arrays))  # numpy's cannot be indexed by a traced row

    def combined(columns: tuple[int, ...], coefficients: Array, states: Sequence[Array | None]) -> Array:
        """The sum of the coefficients (2 + H,) times the states: D first, then x, then the others of `columns`."""
        x, image = states[X], states[D]
        assert x is not None and image is not None
        result: Array = coefficients[D] * image + coefficients[X] * x
        for column in columns:
            if column not in (X, D):
                state = states[column]
                assert state is not None
                result = result + coefficients[column] * state
        return result

    def step(k: Array, carry: Carry) -> Carry:
        x0, out, gradient = _predicted(predict, form, arrays, carry.x, k, guide, image_guidance)
        images = (x0, *carry.images)
        states = [carry.x, carry.base, *images]
        mean = combined(form.x_columns, arrays.x_from[k], states)
        base = carry.base if form.base_columns is None else combined(form.base_columns, arrays.base_from[k], states)
        std: Array
        if form.learned_variance:
            frac = (out[:, channels:] + 1) / 2  # (N, C, H, W)
            log_variance = frac * arrays.log_variance_high[k] + (1 - frac) * arrays.log_variance_low[k]
            std = jnp.exp(0.5 * log_variance)  # (N, C, H, W)
        else:
            std = arrays.noise_to_x[k]
        if gradient is not None and form.shifts_mean:
            mean = mean + std**2 * gradient
        if not form.adds_noise:  # an ODE draws nothing
            return Carry(mean, base, images[:-1])
        n = noise(k)
        if form.noise_to_base:
            assert base is not None
            base = base + arrays.noise_to_base[k] * n
        return Carry(jnp.where(arrays.adds_noise[k], mean + std * n, mean), base, images[:-1])

    return jax.lax.fori_loop(first, end, step, carry)


def predicted_image(
    predict: Predict,
    form: PlanForm,
    arrays: PlanArrays,
    x: Array,  # float32 (N, C, H, W): the state before row k
    k: Array,
    guide: Guide | None = None,
    image_guidance: ImageGuidance | None = None,
) -> Array:
    """The image D (N, C, H, W) that row k of the plan predicts from x. May be traced. Errors as of `sample_steps`."""
    return _predicted(predict, form, PlanArrays(*map(jnp.asarray, arrays)), x, k, guide, image_guidance)[0]


def _predicted(
    predict: Predict,
    form: PlanForm,
    arrays: PlanArrays,
    x: Array,
    k: Array,
    guide: Guide | None,
    image_guidance: ImageGuidance | None,
) -> tuple[Array, Array, Array | None]:
    """(D, the network's output, the guide's gradient) at row k for x (N, C, H, W)."""
    x0, out, t = _evaluated(predict, form, arrays, x, k)
    if image_guidance is not None:
        x0 = image_guidance(x0, x, k)
    if form.clip_denoised:
        x0 = x0.clip(-1.0, 1.0)
    gradient = None if guide is None else guide(x, t)  # (N, C, H, W)
    if gradient is not None and not form.shifts_mean:
        x0 = x0 + arrays.x0_from_gradient[k] * gradient
    return x0, out, gradient


def _evaluated(predict: Predict, form: PlanForm, arrays: PlanArrays, x: Array, k: Array) -> tuple[Array, Array, Array]:
    """(D (N, C, H, W) not yet clamped, the network's output (N, C or 2 C, H, W), its time (N,) or (N, 2)) at row k."""
    samples, channels = x.shape[:2]
    times = arrays.times[k]
    t = jnp.full((samples,), times) if times.ndim == 0 else jnp.broadcast_to(times, (samples, 2))
    seen = arrays.input_scale[k] * x if form.scales_input else x
    out = predict(seen, t, k).astype(jnp.float32)
    check_channels(form, out.shape[1], channels)  # at tracing time
    return arrays.x0_from_x[k] * x - arrays.x0_from_output[k] * out[:, :channels], out, t


def guided(
    net: Callable[[Array, Array, Array], Array],  # (x, t, y) -> (N, C or 2 C, H, W)
    y: Array,  # int32 (N,): labels
    scale: float,  # 1 is no guidance: one evaluation, no doubled batch
    channels: str,  # a key of `harness.engines.guidance.GUIDED_CHANNELS`
    null_label: int | None,  # label index of "no class"; None: the network was trained without label dropout
    is_guided: Array | np.ndarray | None = None,  # bool (rows,): the plan rows with guidance; None: all
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
        eps = extrapolated(conditional[:, :count], unconditional[:, :count], scale)
        return jnp.concatenate([eps, conditional[:, count:]], axis=1)

    if is_guided is None:  # no branch: the compiled loop is as it was before there were intervals
        return lambda x, t, row: doubled(x, t)
    rows = jnp.asarray(is_guided)

    def predict(x: Array, t: Array, row: Array) -> Array:
        return jax.lax.cond(rows[row], doubled, lambda x, t: net(x, t, y).astype(jnp.float32), x, t)

    return predict


def guided_image(
    reference: Callable[[Array, Array], Array] | None,  # (x, t) -> (N, C or 2 C, H, W)
    form: PlanForm,  # of the reference's kind of prediction, with the rows of the loop's
    arrays: PlanArrays,
    scale: float,
    combine: Combine,
    channels: str = "all",  # a key of `harness.engines.guidance.GUIDED_CHANNELS`; others keep the D of the network
) -> ImageGuidance:
    """An image guidance for `sample_steps`, as torch's `guided_image`, which explains it. `arrays` name the guided rows.

    Unguided rows do not evaluate the reference: the branch that does runs by itself.
    """
    arrays = PlanArrays(*map(jnp.asarray, arrays))

    def combined(x0: Array, x: Array, k: Array) -> Array:
        count = guided_channels(channels, x.shape[1])
        other = None
        if reference is not None:
            other = _evaluated(lambda x, t, row: reference(x, t), form, arrays, x, k)[0][:, :count]
        result = combine(x0[:, :count], other, scale, arrays.sigma[k], jnp).astype(jnp.float32)
        check_guided_image(result.shape, x0[:, :count].shape)
        return jnp.concatenate([result, x0[:, count:]], axis=1)

    def guide(x0: Array, x: Array, k: Array) -> Array:
        if not form.mixes_guidance:  # all rows are guided
            return combined(x0, x, k)
        return jax.lax.cond(arrays.is_guided[k], combined, lambda x0, x, k: x0, x0, x, k)

    return guide


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
