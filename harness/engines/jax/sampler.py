"""A sampler plan applied in jax, and guidance: `harness.engines.torch.sampler` as one loop on the device.

The loop is compiled once for a plan and a batch size. Each call runs a stretch of steps, long enough to keep the device
busy and short enough for a progress bar and Ctrl-C. The lengths of the stretches do not change the numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from harness.diffusion.plans import SamplerPlan
from harness.engines.guidance import check_channels, check_classifier_scale, check_guidance, guided_channels

Predict = Callable[[Array, Array], Array]  # (x (N, C, H, W), t (N,)) -> (N, C or 2 C, H, W)
Guide = Callable[[Array, Array], Array]  # (x (N, C, H, W), t (N,)) -> (N, C, H, W)


def sample_steps(
    predict: Predict,
    plan: SamplerPlan,
    x: Array,  # float32 (N, C, H, W)
    first: Array | int,  # the first plan step to run; for step 0, x is the initial noise
    end: Array | int,  # the plan step after the last one to run
    noise: Callable[[Array], Array],  # plan step k -> float32 (N, C, H, W)
    guide: Guide | None = None,  # returns the scaled gradient of a log likelihood with respect to x
) -> Array:
    """x after steps first ... end - 1 of `plan`, float32 (N, C, H, W). May be traced.

    A guide shifts the mean of a DDPM step and epsilon of a DDIM step (Dhariwal and Nichol 2021, algorithms 1 and 2),
    as in torch's `sample_loop`, which explains each step. Everything but the network is float32. Raises UserError where
    the network's channels do not fit the plan.
    """
    samples, channels = x.shape[:2]
    table = {
        name: jnp.asarray(getattr(plan, name).astype(np.float32))
        for name in ("x0_from_x", "x0_from_eps", "mean_from_x0", "mean_from_x", "log_variance_low", "log_variance_high", "noise_std")
    }  # fmt: skip
    # x0 + (this) x gradient is the x0 of the shifted epsilon: torch's `sample_loop` derives it.
    x0_from_gradient = jnp.asarray((plan.x0_from_eps**2 / plan.x0_from_x).astype(np.float32))
    timesteps, adds_noise = jnp.asarray(plan.timesteps.astype(np.int32)), jnp.asarray(plan.adds_noise)

    def step(k: Array, x: Array) -> Array:
        coefficient = {name: values[k] for name, values in table.items()}  # of this step
        t = jnp.full((samples,), timesteps[k])  # (N,)
        out = predict(x, t).astype(jnp.float32)  # (N, C or 2 C, H, W)
        check_channels(plan, out.shape[1], channels)  # at tracing time
        x0 = coefficient["x0_from_x"] * x - coefficient["x0_from_eps"] * out[:, :channels]
        if plan.clip_denoised:
            x0 = x0.clip(-1.0, 1.0)
        gradient = None if guide is None else guide(x, t)  # (N, C, H, W)
        if gradient is not None and plan.eta is not None:  # DDIM; eta is None for DDPM
            x0 = x0 + x0_from_gradient[k] * gradient
        mean = coefficient["mean_from_x0"] * x0 + coefficient["mean_from_x"] * x
        if plan.learned_variance:
            frac = (out[:, channels:] + 1) / 2  # (N, C, H, W)
            log_variance = frac * coefficient["log_variance_high"] + (1 - frac) * coefficient["log_variance_low"]
            std = jnp.exp(0.5 * log_variance)  # (N, C, H, W)
        else:
            std = coefficient["noise_std"]
        if gradient is not None and plan.eta is None:
            mean = mean + std**2 * gradient
        if not plan.adds_noise.any():  # DDIM with eta 0 draws nothing
            return mean
        return jnp.where(adds_noise[k], mean + std * noise(k), mean)

    return jax.lax.fori_loop(first, end, step, x)


def guided(
    net: Callable[[Array, Array, Array], Array],  # (x, t, y) -> (N, C or 2 C, H, W)
    y: Array,  # int32 (N,): labels
    scale: float,  # 1 is no guidance: one evaluation, no doubled batch
    channels: str,  # a key of `harness.engines.guidance.GUIDED_CHANNELS`
    null_label: int | None,  # label index of "no class"; None: the network was trained without label dropout
) -> Predict:
    """A `predict` with classifier-free guidance: eps = eps_uncond + scale (eps_cond - eps_uncond).

    Each step calls the network once, on the doubled batch [conditional; unconditional]. Errors as in torch's.
    """
    check_guidance(scale, channels, null_label)
    if scale == 1.0:
        return lambda x, t: net(x, t, y)
    assert null_label is not None  # or check_guidance had raised
    labels = jnp.concatenate([y, jnp.full_like(y, null_label)])  # (2 N,)

    def predict(x: Array, t: Array) -> Array:
        out = net(jnp.concatenate([x, x]), jnp.concatenate([t, t]), labels)  # (2 N, C or 2 C, H, W)
        conditional, unconditional = jnp.split(out.astype(jnp.float32), 2)  # (N, C or 2 C, H, W) each
        count = guided_channels(channels, x.shape[1])
        eps = unconditional[:, :count] + scale * (conditional[:, :count] - unconditional[:, :count])
        return jnp.concatenate([eps, conditional[:, count:]], axis=1)

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
