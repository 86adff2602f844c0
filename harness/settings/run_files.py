"""Files that a run takes besides its data: its decoder, and what its samples are evaluated with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError, shown
from harness.io.text import read_pairs, read_path, read_text
from harness.settings.plugin_flags import PluginFiles
from harness.settings.setting import setting

ENTRY_PARTS = ("decoder", "features")  # whose weight files --entry is about


@dataclass(frozen=True, kw_only=True)
class RunFiles(PluginFiles):
    """Settings that `harness run` and `harness plan` share."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if strange := [part for part in self.entry if part not in ENTRY_PARTS]:
            raise UserError(f"--entry {shown(strange[0])}: a run has the weight files {', '.join(ENTRY_PARTS)}")
