"""Settings of a run that training, and plans of it, share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import registry
from harness.io.text import read_count, read_pairs, read_path, read_seed, read_switch, read_text, read_texts
from harness.planning.reference import Reference, parse_budget, parse_reference
from harness.settings.plugin_flags import PluginFiles
from harness.settings.setting import REQUIRED, setting

DEFAULT_PROTOCOL = "digits"
PRECISIONS = ("float32", "tf32", "bfloat16")
FRAMEWORKS = ("torch", "jax")
EVALUATOR_BACKENDS = ("torch", "jax", "tensorflow")


@dataclass(frozen=True, kw_only=True)
class Backbone(PluginFiles):
    backbone: str = setting("A name from `harness list backbones`.", read_text, REQUIRED, metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class OptionalBackbone(PluginFiles):
    backbone: str | None = setting(
        "A name from `harness list backbones`; on the command line, --budget or --match without it gives a table of all "
        "backbones.", read_text,
        metavar="NAME",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(PluginFiles):
    """Settings of a run: the experiment, the training steps, and how this machine trains it."""

    protocol: str | None = setting(
        "The protocol: data set, evaluation, default recipe and sampling.", read_text, metavar="NAME|FILE.toml",
        default_text=f"{DEFAULT_PROTOCOL}; the paper's: imagenet-256",
    )  # fmt: skip
    steps: int | None = setting(
        "Training steps, as in 800 or 400k.", read_count, default_text="the protocol's", type_name="count",
        recorded="training.steps", footnote="training steps",
    )  # fmt: skip
    match: Reference | None = setting(
        "Instead of --steps: train for the compute of BACKBONE with STEPS steps of the same recipe, both counted at the "
        "protocol's input, as in dit-xl-2@400k.", parse_reference, metavar="BACKBONE@STEPS", type_name="reference",
    )  # fmt: skip
    budget: float | None = setting(
        "Instead of --steps: train for this compute (Gflops of the network x batch x steps x 3), as in 1e12.",
        parse_budget, metavar="GFLOPS", type_name="gflops",
    )  # fmt: skip
    seed: int = setting(
        "Seed of the training.", read_seed, 0, show_default=True, type_name="seed", recorded="training.seed",
        footnote="training seed",
    )  # fmt: skip
    data: Path | None = setting(
        "Path of the data set, if the protocol needs one.", read_path, metavar="PATH", study="data", type_name="path"
    )
    framework: str = setting(
        "Framework of the network and the training.", read_text, "torch", choices=FRAMEWORKS, show_default=True, study="framework",
        recorded="framework", footnote="framework",
    )  # fmt: skip
    set: dict[str, Any] = setting(
        "Override an item of the training recipe, as in --set learning_rate=3e-4 (repeatable; see `harness plan`).",
        read_pairs("NAME=VALUE", "learning_rate=1e-3"), {}, metavar="NAME=VALUE", repeat=True, type_name="name=value",
    )  # fmt: skip
    precision: str = setting(
        "Arithmetic of the network in training. auto: float32 or bfloat16, measured when the run is created; the faster one "
        "is used. tf32: NVIDIA GPUs.", read_text, "auto", choices=("auto", *PRECISIONS), show_default=True,
        study="precision", frozen_unless="auto", recorded="training.precision", footnote="training precision",
    )  # fmt: skip
    compile: str | None = setting(
        "torch.compile, for training and sampling. auto: compile if a measurement shows that a run of an hour or more ends "
        "sooner, including the compilation.", read_text, choices=("auto", "on", "off"), study="compile", frozen_unless="auto",
        default_text="off, or as the run was created",
    )  # fmt: skip
    micro_batch: int | None = setting(
        "Batch size of one forward pass in training.", read_count, default_text="as large as fits in free memory", type_name="count",
        study="micro_batch", frozen_unless="", recorded="training.micro_batch", footnote="micro-batch",
    )  # fmt: skip
    device: str | None = setting(
        "cpu, cuda, cuda:1, tpu.", read_text, metavar="NAME", default_text="an accelerator if there is one", study="device",
        frozen_unless="",
    )  # fmt: skip
    mesh: str | None = setting(
        "Device mesh DATAxMODEL: batch is sharded over DATA, weights over MODEL (FSDP). In torch the devices are processes "
        "started by torchrun.", read_text, metavar="DATAxMODEL", default_text="all x 1", study="mesh",
    )  # fmt: skip
    gradient_checkpointing: bool = setting(
        "Activation checkpointing: less memory, more compute.", read_switch, False, study="gradient_checkpointing",
        frozen_unless="",
    )  # fmt: skip
    deterministic: bool = setting(
        "Deterministic algorithms on a GPU, in training and sampling: slower, and the same bits on the same device (torch).",
        read_switch, False, study="deterministic", frozen_unless="",
    )  # fmt: skip
    out: Path | None = setting(
        "Folder of the run.", read_path, metavar="DIR", default_text="runs/NAME", type_name="path"
    )


LOGGER = {"metavar": "NAME", "repeat": True, "study": "logger"}
LOGGER_HELP = (
    "Also write the losses for this viewer, in the folder of the run (repeatable): tensorboard, wandb (each needs the extra of "
    "the same name), or a package's."
)


def read_loggers(value: Any) -> tuple[str, ...]:
    """The names of loggers, all of which are known."""
    names = read_texts(value)
    for name in names:
        registry.loggers.get(name)
    return names


def cache_setting() -> Any:
    """The setting of the folder of cached features, of the commands that evaluate."""
    return setting(
        "Folder of features that were computed before; several machines need one that they share.", read_path, metavar="DIR",
        default_text="$HARNESS_CACHE, or backbone-harness in $XDG_CACHE_HOME or ~/.cache", type_name="path",
    )  # fmt: skip
