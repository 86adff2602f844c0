"""The training objective in jax: `harness.engines.torch.loss`, function by function, in float32.

Nichol & Dhariwal 2021, sec. 3.1; constants as in openai/guided-diffusion gaussian_diffusion.py (training_losses).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from harness.diffusion.processes import Coefficients
from harness.diffusion.schedule import Schedule
from harness.diffusion.training import TrainingObjective
from harness.randomness import Purpose
from harness.randomness import threefry_jax as random
from harness.randomness.threefry_jax import Words

LN2 = math.log(2.0)
TANH_CDF = math.sqrt(2.0 / math.pi)  # Phi(x) ~ (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2 (Page 1977)


class LossTerms(NamedTuple):
    """Per-sample terms, float32 (N,) each. The loss of a batch is (mse + vb).mean()."""

    mse: Array  # mean over C, H, W of the squared error of the prediction
    vb: Array  # mean over C, H, W of the variational bound's term, in bits; zeros without a learned variance


class DenoisingLoss:
    """The forward process of a recipe, and the loss of a denoiser trained on it.

    t is int32 timesteps, or float32 times of a process in continuous time, (N,) either way; float32 (N, 2) with the ends of the
    steps for an objective of two times.
    """

    def __init__(self, training: TrainingObjective) -> None:
        self.training = training
        self._tables = LossTables(training.process) if isinstance(training.process, Schedule) else None

    def times(self, seed: int, positions: Words) -> Array:
        """t of the training examples at these positions (N,) of the stream."""
        t = self._first_times(seed, positions)
        if (two_times := self.training.objective.two_times) is None:
            return t
        draw = random.uniform(seed, Purpose.END_TIME, positions, 0)
        return jnp.stack([t, two_times.end_time(t, draw, jnp)], axis=1)

    def _first_times(self, seed: int, positions: Words) -> Array:
        """t (N,), without the ends of steps."""
        training, process = self.training, self.training.process
        if training.draws_normal:
            draw = random.normal(seed, Purpose.TIMESTEP, positions, 0, (1,))[:, 0]  # (N,)
        elif isinstance(process, Schedule):
            return random.integers(seed, Purpose.TIMESTEP, positions, 0, len(process))
        else:
            draw = random.uniform(seed, Purpose.TIMESTEP, positions, 0)
        t: Array = training.continuous_times(draw, jnp)
        if isinstance(process, Schedule):
            return jnp.minimum((t * len(process)).astype(jnp.int32), len(process) - 1)
        return t

    def noised(self, x0: Array, t: Array, noise: Array) -> Array:
        """x_t = a x_0 + s noise, float32 (N, C, H, W) as x0 and noise are."""
        at = self._coefficients(t)
        result: Array = at.a * x0 + at.s * noise
        return result

    def network_inputs(self, xt: Array, t: Array) -> tuple[Array, Array]:
        """x_t and t as the network sees them: scaled, (N, C, H, W); timesteps int32 or float32 (N,), or float32 (N, 2)."""
        if t.ndim == 1:
            given = self.training.network_time(t, lambda: self._coefficients(t), jnp)
        else:
            columns = [self.training.network_time(c, partial(self._coefficients, c), jnp) for c in (t[:, 0], t[:, 1])]
            given = jnp.stack(columns, axis=1)
        scale = self.training.objective.input_scale
        if isinstance(self.training.process, Schedule) or scale is None:
            return xt, given
        return scale(self._coefficients(t), jnp) * xt, given

    def step_target(
        self,
        net: Callable[[Array, Array], Array],  # of (x, t) as `network_inputs` gives them
        x0: Array,
        t: Array,
        noise: Array,
    ) -> Array | None:
        """What a network of two times is to predict, float32 (N, C, H, W); None for all others. It has no gradient."""
        if self.training.objective.two_times is None:
            return None

        def predict(x: Array, t: Array, r: Array) -> Array:
            return net(*self.network_inputs(x, jnp.stack([t.reshape(-1), r.reshape(-1)], axis=1))).astype(jnp.float32)

        columns = t[:, 0, None, None, None], t[:, 1, None, None, None]
        wanted = self.training.wanted_of_step(predict, x0, noise, columns, self._coefficients(t), jnp)
        return jax.lax.stop_gradient(wanted.astype(jnp.float32))

    def terms(self, output: Array, x0: Array, t: Array, noise: Array, step_target: Array | None = None) -> LossTerms:
        """The terms of the objective: `hybrid_loss` where the variance is learned, the squared error alone where not.

        output: (N, objective.out_channels(C), H, W), any float type: the network at (x_t, t). x0, noise: float32
        (N, C, H, W), noise what x_t was made with. step_target: of the method.
        """
        objective = self.training.objective
        assert output.shape[1] == objective.out_channels(x0.shape[1]), (output.shape, x0.shape)
        if objective.learned_variance:
            assert self._tables is not None  # `check_fit` refuses it in continuous time
            return hybrid_loss(self._tables, output, x0, t, noise)
        at = self._coefficients(t)
        wanted = self.training.wanted(x0, noise, at, jnp) if step_target is None else step_target
        first = t if t.ndim == 1 else t[:, 0]
        error = self.training.squared_error(output.astype(jnp.float32), wanted, first[:, None, None, None], at, jnp)
        mse = _mean(error)
        return LossTerms(mse, jnp.zeros_like(mse))

    def _coefficients(self, t: Array) -> Coefficients:
        """The process at t: float32 (N, 1, 1, 1) each, or floats."""
        process = self.training.process
        if isinstance(process, Schedule):
            assert self._tables is not None
            nan = float("nan")  # a table has no derivatives
            return Coefficients(_at(self._tables.sqrt_abar, t), _at(self._tables.sqrt_one_minus_abar, t), nan, nan)
        first = t if t.ndim == 1 else t[:, 0]
        return process.coefficients(first[:, None, None, None], jnp)


class LossTables:
    """The tables of a process over timesteps: float32 (T,), indexed by timestep; constants in a traced function.

    They are those of `schedule.respaced()`: the public code trains on a respaced schedule with all steps kept.
    """

    def __init__(self, schedule: Schedule) -> None:
        spaced = schedule.respaced()

        def table(values: np.ndarray) -> np.ndarray:
            return values.astype(np.float32)

        self.sqrt_abar = table(spaced.sqrt_abar)
        self.sqrt_one_minus_abar = table(spaced.sqrt_one_minus_abar)
        self.log_variance_low = table(spaced.posterior_log_variance_clipped)
        self.log_variance_high = table(spaced.log_betas)
        # Error of the reverse step's mean for an error of 1 in epsilon.
        self.mean_error_per_eps = table(spaced.posterior_mean_from_x0 * spaced.sqrt_recipm1_abar)


def hybrid_loss(
    tables: LossTables,
    output: Array,  # (N, 2 C, H, W): epsilon, then the variance channels v
    x0: Array,
    t: Array,
    noise: Array,
) -> LossTerms:
    """L_simple + L_vlb: the mean squared error of epsilon, plus the term of the variational bound in bits with weight 1.

    Both are means over C, H, W. This is DiT's loss (LossType.MSE with a learned variance in its code).
    L_vlb sees epsilon detached, so only the variance channels learn from it. `harness.engines.torch.loss` derives it.
    """
    eps, v = jnp.split(output.astype(jnp.float32), 2, axis=1)  # (N, C, H, W) each
    frac = (v + 1) / 2
    high, low = _at(tables.log_variance_high, t), _at(tables.log_variance_low, t)  # (N, 1, 1, 1)
    log_variance = frac * high + (1 - frac) * low  # (N, C, H, W)
    error = eps - noise
    mean_error = _at(tables.mean_error_per_eps, t) * jax.lax.stop_gradient(error)  # posterior mean - predicted mean
    kl = 0.5 * (-1.0 + log_variance - low + jnp.exp(low - log_variance) + mean_error**2 * jnp.exp(-log_variance))
    # At t = 0 the mean is x_0^ itself (its coefficients are 1 and 0), so mean_error is x_0 - x_0^.
    nll = -_discretised_gaussian_log_likelihood(x0, mean_error, 0.5 * log_variance)
    vb = jnp.where(t == 0, _mean(nll), _mean(kl)) / LN2  # (N,)
    return LossTerms(_mean(error**2), vb)


def _discretised_gaussian_log_likelihood(
    x0: Array,  # (N, C, H, W) in [-1, 1] for pixels
    centred: Array,  # x0 - mean
    log_std: Array,
) -> Array:
    """Log-probability in nats of the 8-bit bin of x0, elementwise. Bins are 2/255 wide; those beyond +-0.999 are open.

    Made for pixels (Ho et al. 2020, eq. 13); the public DiT code applies it to latents as well.
    """
    inverse_std = jnp.exp(-log_std)
    upper = _normal_cdf(inverse_std * (centred + 1.0 / 255.0))
    lower = _normal_cdf(inverse_std * (centred - 1.0 / 255.0))
    log_upper = _log(upper)
    log_above = _log(1.0 - lower)
    log_bin = _log(upper - lower)
    return jnp.where(x0 < -0.999, log_upper, jnp.where(x0 > 0.999, log_above, log_bin))


def _log(probability: Array) -> Array:
    """log(max(probability, 1e-12)); its gradient is zero below the floor, as that of torch's clamp."""
    return jnp.log(jnp.where(probability >= 1e-12, probability, 1e-12))


def _normal_cdf(x: Array) -> Array:
    """Phi(x) of the standard normal distribution, by the tanh approximation of TANH_CDF."""
    return 0.5 * (1.0 + jnp.tanh(TANH_CDF * (x + 0.044715 * x**3)))


def _at(table: np.ndarray, t: Array) -> Array:
    """The entries of table (T,) at timesteps t (N,), as (N, 1, 1, 1) for broadcasting."""
    return jnp.asarray(table)[t][:, None, None, None]


def _mean(x: Array) -> Array:
    """The mean over C, H and W: (N, C, H, W) -> (N,)."""
    return x.mean(axis=(1, 2, 3))
