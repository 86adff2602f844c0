"""Where the losses of a training can be watched, beside RUN/log.jsonl, which is always written and alone decides anything.

A logger is a convenience: when it fails it is left out with one warning, and the training goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from harness.errors import UserError
from harness.runs.run import Run
from harness.spec import load_attribute

Say = Callable[[str], object]

LOGGERS = {
    # name: (library, which is the extra's name, too; "module:attribute" of (Run, steps done) -> Logger)
    "tensorboard": ("tensorboard", "harness.loggers.tensorboard:TensorBoard"),
    "wandb": ("wandb", "harness.loggers.weights_and_biases:WeightsAndBiases"),
}


class Logger(Protocol):
    """One place. Steps come in order; after a kill, again from the one behind the last checkpoint."""

    empty: bool  # whether it wants the steps that are done, too

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step, by name: "train/loss", "train/mse" and so on."""

    def flush(self) -> None:
        """What was written survives the death of this process from here on."""

    def close(self) -> None:
        """The end of this stretch of training."""


def check_installed(names: Sequence[str]) -> None:
    """Refuse a logger whose library is missing, before anything is trained."""
    for name in names:
        library, _ = LOGGERS[name]
        if importlib.util.find_spec(library) is None:
            raise UserError(f"--logger {name} needs {library}: pip install 'backbone-harness[{library}]'")


class Loggers:
    """Several loggers as one that cannot fail."""

    def __init__(self, names: Sequence[str], run: Run, done: int, weights: Mapping[str, float], say: Say):
        self._say, self._weights = say, weights
        self._open: dict[str, Logger] = {}
        for name in names:
            with self._guarded(name):
                logger = load_attribute(LOGGERS[name][1], f"logger {name!r}")(run, done)
                self._open[name] = logger
                if logger.empty:  # the steps before are in the log
                    for step, row in _logged(run, done):
                        logger.write(step, self._values(row))

    def _values(self, row: Mapping[str, float]) -> dict[str, float]:
        loss = sum(weight * row[name] for name, weight in self._weights.items())
        return {"train/loss": loss, **{f"train/{name}": row[name] for name in self._weights}}

    def write(self, step: int, row: Mapping[str, float], steps_per_second: float | None = None) -> None:
        """The terms of a step's loss; the speed where it was just measured."""
        speed = {} if steps_per_second is None else {"train/steps_per_second": steps_per_second}
        self._each(lambda logger: logger.write(step, {**self._values(row), **speed}))

    def flush(self) -> None:
        self._each(lambda logger: logger.flush())

    def close(self) -> None:
        self._each(lambda logger: logger.close())
        self._open.clear()

    def _each(self, do: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            with self._guarded(name):
                do(logger)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a library's, the disk's, the network's: none is worth a training
            self._open.pop(name, None)
            said = str(error).strip().splitlines() or [""]
            self._say(
                f"warning: {name} is left out from here on ({type(error).__name__}: {said[0]}); log.jsonl has everything"
            )


def _logged(run: Run, done: int) -> Iterator[tuple[int, dict[str, float]]]:
    """The first `done` steps of the run's log."""
    if not done:
        return
    with run.log.open(encoding="ascii") as file:
        for line in file:
            row = json.loads(line)
            if row["step"] > done:
                return
            yield row["step"], row
