"""The training objective in torch: forward diffusion and the hybrid loss of improved DDPM, in float32.

Nichol & Dhariwal 2021, sec. 3.1; constants as in openai/guided-diffusion gaussian_diffusion.py (training_losses).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from harness.diffusion.objectives import Objective
from harness.diffusion.schedule import Schedule

LN2 = math.log(2.0)
TANH_CDF = math.sqrt(2.0 / math.pi)  # Phi(x) ~ (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2 (Page 1977)


class LossTerms(NamedTuple):
    """Per-sample terms, float32 (N,) each. The loss of a batch is (mse + vb).mean()."""

    mse: torch.Tensor  # mean over C, H, W of the squared error of epsilon
    vb: torch.Tensor  # mean over C, H, W of the variational bound's term, in bits; zeros without a learned variance


class LossTables:
    """The tables that training needs: float32 (T,) on one device, indexed by timestep.

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

    def q_sample(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, eq. 4).

        x0, noise: float32 (N, C, H, W). t: int64 (N,) in 0 ... T - 1. Returns float32 (N, C, H, W).
        """
        return _at(self.sqrt_abar, t) * x0 + _at(self.sqrt_one_minus_abar, t) * noise


def training_losses(
    objective: Objective,
    tables: LossTables,
    output: torch.Tensor,  # (N, objective.out_channels(C), H, W), any float type: the network at (x_t, t)
    x0: torch.Tensor,  # float32 (N, C, H, W)
    t: torch.Tensor,  # int64 (N,)
    noise: torch.Tensor,  # float32 (N, C, H, W): what x_t was made with
) -> LossTerms:
    """The terms of `objective`: `hybrid_loss` where the variance is learned, the mean squared error alone where not."""
    assert output.shape[1] == objective.out_channels(x0.shape[1]), (output.shape, x0.shape)
    if objective.learned_variance:
        return hybrid_loss(tables, output, x0, t, noise)
    mse = _mean((output.float() - noise) ** 2)
    return LossTerms(mse, torch.zeros_like(mse))


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
