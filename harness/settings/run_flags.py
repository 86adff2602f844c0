"""The flags of `harness run`, which are the keyword arguments of `harness.run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.io.text import read_count, read_counts, read_pairs, read_path, read_switch, read_text
from harness.settings.sampling_flags import SamplingSettings
from harness.settings.setting import setting
from harness.settings.train_flags import TrainOptions
from harness.settings.training_flags import cache_setting


@dataclass(frozen=True, kw_only=True)
class RunOptions(SamplingSettings, TrainOptions):
    """Options of `harness run`."""

    decoder: str | None = setting(
        "Autoencoder that decodes the samples of a run in latents: a folder, or ft-ema, ft-mse.", read_text, metavar="DIR|NAME",
        default_text="the one that made the latents", study="decoder", recorded="sampling.decoder", footnote="decoder",
    )  # fmt: skip
    reference: Path | None = setting(
        "Reference images, as in `harness evaluate`.", read_path, metavar="PATH", default_text="the data set",
        study="reference", type_name="path",
    )  # fmt: skip
    features_weights: Path | None = setting(
        "Weights of the suite's network, if it needs them.", read_path, metavar="FILE", study="features_weights",
        flags=("--features-weights", "--inception"), type_name="path",
    )  # fmt: skip
    entry: dict[str, str] = setting(
        "Entry of the weight file of the decoder or the features, where several fit (repeatable).",
        read_pairs("PART=NAME", "features=ema"), {}, metavar="PART=NAME", repeat=True, study="entry",
        default_text="a moving average before raw weights", type_name="part=name",
    )  # fmt: skip
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
