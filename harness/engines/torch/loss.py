"""The training objective in torch: forward diffusion and the hybrid loss of improved DDPM, in float32.

Nichol & Dhariwal 2021, sec. 3.1; constants as in openai/guided-diffusion gaussian_diffusion.py (training_losses).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from harness.diffusion.processes import Coefficients
from harness.diffusion.schedule import Schedule
from harness.diffusion.training import TrainingObjective
from harness.randomness import Purpose
from harness.randomness import threefry_torch as random

LN2 = math.log(2.0)
TANH_CDF = math.sqrt(2.0 / math.pi)  # Phi(x) ~ (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2 (Page 1977)


class LossTerms(NamedTuple):
    """Per-sample terms, float32 (N,) each. The loss of a batch is (mse + vb).mean()."""

    mse: torch.Tensor  # mean over C, H, W of the squared error of the prediction
    vb: torch.Tensor  # mean over C, H, W of the variational bound's term, in bits; zeros without a learned variance


class DenoisingLoss:
    """The forward process of a recipe, and the loss of a denoiser trained on it, on one device.

    t is int64 timesteps, or float32 times of a process in continuous time, (N,) either way; float32 (N, 2) with the ends of the
    steps for an objective of two times.
    """

    def __init__(self, training: TrainingObjective, device: torch.device | str = "cpu") -> None:
        self.training = training
        self._tables = LossTables(training.process, device) if isinstance(training.process, Schedule) else None

    def times(self, seed: int, positions: torch.Tensor) -> torch.Tensor:
        """t of the training examples at these positions int64 (N,) of the stream."""
        t = self._first_times(seed, positions)
        if (two_times := self.training.objective.two_times) is None:
            return t
        draw = random.uniform(seed, Purpose.END_TIME, positions, 0)
        return torch.stack([t, two_times.end_time(t, draw, torch)], dim=1)

    def _first_times(self, seed: int, positions: torch.Tensor) -> torch.Tensor:
        """t (N,), without the ends of steps."""
        training, process = self.training, self.training.process
        if training.draws_normal:
            draw = random.normal(seed, Purpose.TIMESTEP, positions, 0, (1,))[:, 0]  # (N,)
        elif isinstance(process, Schedule):
            return random.integers(seed, Purpose.TIMESTEP, positions, 0, len(process))
        else:
            draw = random.uniform(seed, Purpose.TIMESTEP, positions, 0)
        t = training.continuous_times(draw, torch)
        if isinstance(process, Schedule):
            return (t * len(process)).long().clamp(max=len(process) - 1)
        return t

    def noised(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t = a x_0 + s noise, float32 (N, C, H, W) as x0 and noise are."""
        at = self._coefficients(t)
        return at.a * x0 + at.s * noise

    def network_inputs(self, xt: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t and t as the network sees them: scaled, (N, C, H, W); timesteps int64 or float32 (N,), or float32 (N, 2)."""
        if t.dim() == 1:
            given = self.training.network_time(t, lambda: self._coefficients(t), torch)
        else:
            columns = [self.training.network_time(c, partial(self._coefficients, c), torch) for c in t.unbind(1)]
            given = torch.stack(columns, dim=1)
        scale = self.training.objective.input_scale
        if isinstance(self.training.process, Schedule) or scale is None:
            return xt, given
        return scale(self._coefficients(t), torch) * xt, given

    def step_target(
        self,
        net: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],  # of (x, t) as `network_inputs` gives them
        x0: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor | None:
        """What a network of two times is to predict, float32 (N, C, H, W); None for all others. It has no gradient."""
        if self.training.objective.two_times is None:
            return None

        def predict(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
            return net(*self.network_inputs(x, torch.stack([t.flatten(), r.flatten()], dim=1))).float()

        columns = t[:, :, None, None, None].unbind(1)
        with torch.no_grad():
            wanted = self.training.wanted_of_step(
                predict, x0, noise, (columns[0], columns[1]), self._coefficients(t), torch
            )
        return wanted.float()

    def terms(
        self,
        output: torch.Tensor,
        x0: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        step_target: torch.Tensor | None = None,
    ) -> LossTerms:
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
        wanted = self.training.wanted(x0, noise, at, torch) if step_target is None else step_target
        first = t if t.dim() == 1 else t[:, 0]
        mse = _mean(self.training.squared_error(output.float(), wanted, first[:, None, None, None], at, torch))
        return LossTerms(mse, torch.zeros_like(mse))

    def _coefficients(self, t: torch.Tensor) -> Coefficients:
        """The process at t: float32 (N, 1, 1, 1) each, or floats."""
        process = self.training.process
        if isinstance(process, Schedule):
            assert self._tables is not None
            nan = float("nan")  # a table has no derivatives
            return Coefficients(_at(self._tables.sqrt_abar, t), _at(self._tables.sqrt_one_minus_abar, t), nan, nan)
        first = t if t.dim() == 1 else t[:, 0]
        return process.coefficients(first[:, None, None, None], torch)


class LossTables:
    """The tables of a process over timesteps: float32 (T,) on one device, indexed by timestep.

    They are those of `schedule.respaced()`: the public code trains on a respaced schedule with all steps kept.
    """

    def __init__(self, schedule: Schedule, device: torch.device | str = "cpu") -> None:
        spaced = schedule.respaced()

        def table(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values.astype(np.float32)).to(device)

        self.sqrt_abar = table(spaced.sqrt_abar)
        self.sqrt_one_minus_abar = table(spaced.sqrt_one_minus_abar)
        self.log_variance_low = table(spaced.posterior_log_variance_clipped)
        self.log_variance_high = table(spaced.log_betas)
        # Error of the reverse step's mean for an error of 1 in epsilon.
        self.mean_error_per_eps = table(spaced.posterior_mean_from_x0 * spaced.sqrt_recipm1_abar)


def hybrid_loss(
    tables: LossTables,
    output: torch.Tensor,  # (N, 2 C, H, W): epsilon, then the variance channels v
    x0: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
) -> LossTerms:
    """L_simple + L_vlb: the mean squared error of epsilon, plus the term of the variational bound in bits with weight 1.

    Both are means over C, H, W. This is DiT's loss (LossType.MSE with a learned variance in its code).
    L_vlb sees epsilon detached, so only the variance channels learn from it. It is the KL divergence of the reverse
    step from the true posterior, and at t = 0 the likelihood of x_0 under a discretised Gaussian.
    """
    channels = x0.shape[1]
    eps, v = output.float().split(channels, dim=1)  # (N, C, H, W) each
    frac = (v + 1) / 2
    high, low = _at(tables.log_variance_high, t), _at(tables.log_variance_low, t)  # (N, 1, 1, 1)
    log_variance = frac * high + (1 - frac) * low  # (N, C, H, W)
    error = eps - noise
    # The means of posterior and reverse step differ only in x_0, and x_0 - x_0^ = sqrt(1/abar - 1) (eps^ - eps). Computed so,
    # their difference avoids the cancellation of two numbers of size sqrt(1/abar) (157 at t = 999).
    mean_error = _at(tables.mean_error_per_eps, t) * error.detach()  # posterior mean - predicted mean
    kl = 0.5 * (-1.0 + log_variance - low + torch.exp(low - log_variance) + mean_error**2 * torch.exp(-log_variance))
    # At t = 0 the mean is x_0^ itself (its coefficients are 1 and 0), so mean_error is x_0 - x_0^.
    nll = -_discretised_gaussian_log_likelihood(x0, mean_error, 0.5 * log_variance)
    vb = torch.where(t == 0, _mean(nll), _mean(kl)) / LN2  # (N,)
    return LossTerms(_mean(error**2), vb)


def _discretised_gaussian_log_likelihood(
    x0: torch.Tensor,  # (N, C, H, W) in [-1, 1] for pixels
    centred: torch.Tensor,  # x0 - mean
    log_std: torch.Tensor,
) -> torch.Tensor:
    """Log-probability in nats of the 8-bit bin of x0, elementwise. Bins are 2/255 wide; those beyond +-0.999 are open.

    Made for pixels (Ho et al. 2020, eq. 13); the public DiT code applies it to latents as well.
    """
    inverse_std = torch.exp(-log_std)
    upper = _normal_cdf(inverse_std * (centred + 1.0 / 255.0))
    lower = _normal_cdf(inverse_std * (centred - 1.0 / 255.0))
    log_upper = upper.clamp(min=1e-12).log()
    log_above = (1.0 - lower).clamp(min=1e-12).log()
    log_bin = (upper - lower).clamp(min=1e-12).log()
    return torch.where(x0 < -0.999, log_upper, torch.where(x0 > 0.999, log_above, log_bin))


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """Phi(x) of the standard normal distribution, by the tanh approximation of TANH_CDF."""
    return 0.5 * (1.0 + torch.tanh(TANH_CDF * (x + 0.044715 * x**3)))


def _at(table: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The entries of table (T,) at timesteps t (N,), as (N, 1, 1, 1) for broadcasting."""
    return table[t][:, None, None, None]


def _mean(x: torch.Tensor) -> torch.Tensor:
    """The mean over C, H and W: (N, C, H, W) -> (N,)."""
    return x.mean(dim=(1, 2, 3))
