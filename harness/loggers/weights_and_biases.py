"""Weights & Biases, in RUN/wandb: without a network (`wandb sync RUN/wandb/offline-run-*` sends it), or, with
WANDB_MODE=online, as it happens. Its own variables hold, such as WANDB_PROJECT.

Its file is written in blocks that die with the process, and a step can be given once. So every stretch of training gives
all steps again, from the log: without a network into a file that takes the place of the one before, with one only those
that the server has not had.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import wandb

from harness.io import files
from harness.runs.run import Run


class WeightsAndBiases:
    """Implements `harness.loggers.Logger`."""

    empty = True

    def __init__(self, run: Run, done: int):
        mode = os.environ.get("WANDB_MODE", "offline")
        folder = run.folder.absolute()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "backbone-harness"),
            name=os.environ.get("WANDB_NAME", run.folder.name),
            id=files.sha256_json([run.identity, str(folder)])[:16],
            group=run.protocol.name,
            tags=[run.backbone],
            config=run.identity,
            dir=folder,
            mode=mode,
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
            ),
        )
        self._next = self._run.step if mode == "online" else 0
        if mode == "offline":
            own = Path(self._run.dir).parent
            for old in folder.glob("wandb/offline-run-*"):
                if old != own and not any(old.glob("*.synced")):
                    files.remove(old)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._next:
            self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Nothing: what a kill loses is given again."""

    def close(self) -> None:
        self._run.finish()
