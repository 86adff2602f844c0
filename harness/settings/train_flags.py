"""The flags of `harness train`, which are the keyword arguments of `harness.train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.io.text import read_path, read_seconds
from harness.settings.setting import setting
from harness.settings.training_flags import LOGGER, LOGGER_HELP, Backbone, TrainingSettings, read_loggers


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainingSettings, Backbone):
    """Options of `harness train`."""

    logger: tuple[str, ...] = setting(LOGGER_HELP, read_loggers, (), **LOGGER)
    fork: Path | None = setting(
        "Create the run from the newest checkpoint of this other run.", read_path, metavar="RUN", type_name="path"
    )
    grace: float | None = setting(
        "Time between SIGTERM and SIGKILL: a checkpoint that is not written by then is given up, and the one before it is kept.",
        read_seconds, metavar="SECONDS", default_text="no limit", type_name="seconds",
    )  # fmt: skip
