"""The flags of `harness plan`, which are the keyword arguments of `harness.plan`."""

from __future__ import annotations

from dataclasses import dataclass

from harness.settings.sampling_flags import SamplingSettings
from harness.settings.training_flags import OptionalBackbone, TrainingSettings


@dataclass(frozen=True, kw_only=True)
class PlanOptions(SamplingSettings, TrainingSettings, OptionalBackbone):
    """Options of `harness plan`."""
