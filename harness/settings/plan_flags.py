"""The flags of `harness plan`, which are the keyword arguments of `harness.plan`."""

from __future__ import annotations

from dataclasses import dataclass

from harness.io.text import read_switch
from harness.settings.run_files import RunFiles
from harness.settings.sampling_flags import SamplingSettings
from harness.settings.setting import setting
from harness.settings.training_flags import OptionalBackbone, TrainingSettings


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RunFiles, SamplingSettings, TrainingSettings, OptionalBackbone):
    """Options of `harness plan`."""

    measure: bool = setting(
        "Also build the network and time a few training steps: speed, hours and memory here.", read_switch, False
    )
