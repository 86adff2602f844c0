"""Weights & Biases, in RUN/wandb: offline (`wandb sync RUN/wandb/offline-run-*` uploads it), or online with
WANDB_MODE=online. Other variables of wandb, such as WANDB_PROJECT, are obeyed.

wandb writes its file in blocks, which are lost when the process dies, and accepts a step only once. So every stretch of
training writes all steps again, from the log: offline into a new file that replaces the old one, and online only the steps
that the server does not have.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import wandb

from harness.io import files

if TYPE_CHECKING:  # the registry names this module
    from harness.runs.run import Run


class WeightsAndBiases:
    """Implements `harness.loggers.Logger`."""

    needs_past_steps = True

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
            mode=None if "WANDB_MODE" in os.environ else "offline",  # None: as the variable says
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
        # Online, earlier steps are on the server already.
        self._next_step = self._run.step if mode == "online" else 0
        if mode == "offline":
            # the old file of this run, unless `wandb sync` has uploaded it: then a file *.synced is beside it
            own_folder = Path(self._run.dir).parent
            for old in folder.glob("wandb/offline-run-*"):
                if old != own_folder and not any(old.glob("*.synced")):
                    files.remove(old)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._next_step:
            self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Nothing: steps that a kill loses are written again."""

    def close(self) -> None:
        self._run.finish()
