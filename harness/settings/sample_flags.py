"""The flags of `harness sample`, which are the keyword arguments of `harness.sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.io.text import GridSize, read_count, read_grid, read_names, read_pairs, read_path, read_switch, read_text
from harness.settings.plugin_flags import PluginFiles
from harness.settings.sampling_flags import SamplingSettings
from harness.settings.setting import setting
from harness.settings.training_flags import FRAMEWORKS


@dataclass(frozen=True, kw_only=True)
class _SampleSource(PluginFiles):
    run: Path | None = setting("Folder of a trained run.", read_path, metavar="DIR", type_name="path")
    step: int | None = setting(
        "The training step whose checkpoint is sampled.", read_count, default_text="the last one", type_name="count"
    )
    system: str | None = setting(
        "Instead of --run: a name from `harness list systems`.", read_text, metavar="NAME|FILE.toml"
    )
    weights: dict[str, Path] = setting(
        "Weights of a part of the system (base, classifier, upsampler, upsampler-2, decoder): a checkpoint or a run "
        "(repeatable).", read_pairs("PART=PATH", "base=FILE"), {}, metavar="PART=PATH", repeat=True, type_name="part=path",
    )  # fmt: skip

    entry: dict[str, str] = setting(
        "Entry of a part's checkpoint, or of --decoder's (decoder=NAME), where several fit (repeatable).",
        read_pairs("PART=NAME", "base=ema"), {}, metavar="PART=NAME", repeat=True, default_text="a moving average before raw weights", type_name="part=name",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SampleOptions(SamplingSettings, _SampleSource):
    """Options of `harness sample`, for a trained run or for a system with its weights."""

    decoder: str | None = setting(
        "Autoencoder that decodes the samples of a run in latents: a folder, or ft-ema, ft-mse.", read_text, metavar="DIR|NAME",
        default_text="the one that made the latents",
    )  # fmt: skip
    batch: int | None = setting("Batch size of one forward pass.", read_count, type_name="count")
    compile: str | None = setting(
        "torch.compile, recorded with the samples.", read_text, choices=("on", "off"),
        default_text="as the run was created; off for a system",
    )  # fmt: skip
    framework: str | None = setting("Framework of a system.", read_text, choices=FRAMEWORKS, default_text="torch")
    device: str | None = setting(
        "Device for a system: cpu, cuda.", read_text, metavar="NAME", default_text="an accelerator if there is one"
    )
    out: Path | None = setting(
        "Folder of a system's sample sets.", read_path, metavar="DIR", default_text="runs/systems", type_name="path"
    )
    classes: tuple[str, ...] | None = setting(
        "Instead of a sample set: a picture of each of these classes, to look at. Classes are numbers, or names that the data "
        "set has for them.", read_names, metavar="CLASS,CLASS,...", type_name="names",
    )  # fmt: skip
    grid: GridSize | None = setting(
        "Rows and columns of a picture; its images are the samples 0, 1, 2, ... of the sampling seed.", read_grid,
        metavar="ROWSxCOLUMNS", default_text="4x8", type_name="grid",
    )  # fmt: skip
    trajectory: bool = setting(
        "Also a picture of the images that the first samples were predicted to be during sampling.", read_switch, False
    )
