"""Objectives: what a denoiser predicts, and the loss that it is trained with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Prediction of the noise epsilon, with or without the variance of the reverse step."""

    name: str
    learned_variance: bool  # True: hybrid loss mse + vb (Nichol & Dhariwal 2021, eq. 16); False: mse alone

    def out_channels(self, in_channels: int) -> int:
        """Output channels of a network for inputs of `in_channels`: epsilon first, then the variance if learned."""
        return 2 * in_channels if self.learned_variance else in_channels

    @property
    def variance(self) -> str:
        """The argument `variance` of `harness.diffusion.plans.ddpm_plan` for networks trained with this objective."""
        return "learned-range" if self.learned_variance else "fixed-small"


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective(name="epsilon-learned-range", learned_variance=True),  # ADM and DiT
        Objective(name="epsilon-fixed", learned_variance=False),  # DDPM's L_simple (Ho et al. 2020, eq. 14)
    )
}
