"""Event files for TensorBoard, in RUN/tensorboard: `tensorboard --logdir runs` shows every run.

Each stretch of training writes a file. A file after the first begins with a session start, on which TensorBoard drops the
same steps of earlier files (tensorboard/backend/event_processing/event_accumulator.py, `_CheckForRestartAndMaybePurge`).
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the registry names this module
    from harness.runs.run import Run

# With a module of this name, tensorboard does not import TensorFlow.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: E402
from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: E402


class TensorBoard:
    """Implements `harness.loggers.Logger`."""

    def __init__(self, run: Run, done: int):
        folder = run.folder / "tensorboard"
        # earlier stretches of training have written their own files, unless this is the first with --logger tensorboard
        self.needs_past_steps = not any(folder.glob("events.out.tfevents.*"))
        self._writer = EventFileWriter(str(folder))
        if not self.needs_past_steps:
            # TensorBoard then drops the steps from done + 1 on in earlier files.
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=done + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
