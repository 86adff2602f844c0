"""The flags of `harness run`, which are the keyword arguments of `harness.run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.io.text import read_count, read_counts, read_switch
from harness.settings.run_files import RunFiles
from harness.settings.sampling_flags import SamplingSettings
from harness.settings.setting import setting
from harness.settings.train_flags import TrainOptions
from harness.settings.training_flags import cache_setting


@dataclass(frozen=True, kw_only=True)
class RunOptions(RunFiles, SamplingSettings, TrainOptions):
    """Options of `harness run`."""

    cache: Path | None = cache_setting()
    evaluate_at: tuple[int, ...] | None = setting(
        "Also sample and evaluate after these training steps.", read_counts, metavar="N,N,...", type_name="counts"
    )
    sampling_batch: int | None = setting(
        "Batch size of one forward pass in sampling.", read_count, default_text="by device and compute",
        study="sampling.batch", type_name="count", recorded="sampling.batch", footnote="sampling batch",
    )  # fmt: skip
    report: bool = setting(
        "Write the report at the end.", read_switch, True, flags=("--report/--no-report",), default_text="yes"
    )
