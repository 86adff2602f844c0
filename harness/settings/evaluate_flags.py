"""The flags of `harness evaluate`, which are the keyword arguments of `harness.evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.io.text import read_path, read_text, read_texts
from harness.settings.plugin_flags import plugin_setting
from harness.settings.setting import REQUIRED, Options, setting
from harness.settings.training_flags import DEFAULT_PROTOCOL, EVALUATOR_BACKENDS, cache_setting


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """Options of `harness evaluate`."""

    samples: Path = setting(
        "An .npz in the layout of ADM's evaluator, a folder with samples.npz, an .npy, a folder of PNG files, shards (.npz, "
        ".tar), or a pattern of these.", read_path, REQUIRED, argument=True, type_name="path",
    )  # fmt: skip
    plugin: tuple[Path, ...] = plugin_setting()
    protocol: str | None = setting(
        "The protocol of the samples.", read_text, metavar="NAME|FILE.toml",
        default_text=f"that of the run or sidecar, else none with --reference, else {DEFAULT_PROTOCOL}",
    )  # fmt: skip
    data: Path | None = setting(
        "Path of the protocol's data set, if it needs one; with --reference, of the training images.",
        read_path,
        metavar="PATH",
        type_name="path",
    )
    suite: str | None = setting(
        "A name from `harness list suites`, or features with metrics, as in dinov2-vit-b-14:fd,kid (see `harness list "
        "features` and `harness list metrics`).", read_text, metavar="NAME|FEATURES:METRIC,..", default_text="the protocol's",
    )  # fmt: skip
    reference: Path | None = setting(
        "Reference images; mu and sigma are used if the file has them and the suite allows it.", read_path, metavar="PATH",
        type_name="path",
    )  # fmt: skip
    features_weights: Path | None = setting(
        "Weights of the suite's network; for suite adm: classify_image_graph_def.pb, or its torch port.", read_path,
        metavar="FILE", flags=("--features-weights", "--inception"), type_name="path",
    )  # fmt: skip
    entry: str | None = setting(
        "Entry of these weights, where several fit, such as model or ema.shadow.", read_text, metavar="NAME",
        default_text="a moving average before raw weights",
    )  # fmt: skip
    backend: str = setting(
        "Framework of ADM's Inception network.", read_text, "torch", choices=EVALUATOR_BACKENDS, show_default=True
    )
    device: str = setting(
        "cpu, cuda, cuda:1; with --backend jax also tpu.", read_text, "cpu", metavar="NAME", show_default=True
    )
    name: str | None = setting("Row name for samples without a sidecar.", read_text, metavar="TEXT")
    out: Path | None = setting(
        "Record file.", read_path, metavar="FILE", default_text="the run's; records.jsonl next to a file of samples, of a folder in the working folder",
        type_name="path",
    )  # fmt: skip
    cache: Path | None = cache_setting()
    neighbours: Path | None = setting(
        "Write a picture of the samples nearest to training images.", read_path, metavar="FILE.png", type_name="path"
    )
    allow: tuple[str, ...] = setting(
        "Only warn if this guard fails (repeatable).", read_texts, (), metavar="GUARD", repeat=True
    )
