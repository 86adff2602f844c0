"""Loggers: services that show the losses of a training, beside RUN/log.jsonl, which is always written.

Nothing is ever read back from a logger. One that fails is left out with a warning, and the training goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from harness import registry
from harness.errors import UserError
from harness.runs.run import Run
from harness.spec import load_attribute

logger = logging.getLogger(__name__)


class Logger(Protocol):
    """One service. Steps come in order. After a kill, those since the last checkpoint are written again."""

    needs_past_steps: bool  # whether the steps that are already done should be written first

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step, by name: "train/loss", "train/mse" and so on."""

    def flush(self) -> None:
        """Make sure that all values written so far survive the death of this process."""

    def close(self) -> None:
        """End the session: this process writes no more steps."""


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError for a logger whose library is missing, before anything is trained."""
    for name in names:
        library = registry.loggers.get(name).requires
        if library and importlib.util.find_spec(library) is None:
            own = registry.loggers.owner(name) == registry.OWN_DISTRIBUTION  # whose extra has the library's name
            package = f"'{registry.OWN_DISTRIBUTION}[{library}]'" if own else library
            raise UserError(f"--logger {name} needs {library}: pip install {package}")


class Loggers:
    """All loggers of a run. An error of a logger becomes a warning, and that logger gets no more calls.

    names: of `harness list loggers`. done: steps trained so far. loss_terms: name -> weight in the loss, from the engine.
    """

    def __init__(self, names: Sequence[str], run: Run, done: int, loss_terms: Mapping[str, float]):
        self._loss_terms = loss_terms
        self._open: dict[str, Logger] = {}
        for name in names:
            with self._guarded(name):
                opened: Logger = load_attribute(registry.loggers.get(name).call, f"logger {name!r}")(run, done)
                self._open[name] = opened
                if opened.needs_past_steps:
                    for step, row in _past_rows(run, done):
                        opened.write(step, self._values(row))

    def _values(self, row: Mapping[str, float]) -> dict[str, float]:
        """The values of a step, by the names that services show: "train/loss", the weighted sum, and each loss term."""
        loss = sum(weight * row[name] for name, weight in self._loss_terms.items())
        return {"train/loss": loss, **{f"train/{name}": row[name] for name in self._loss_terms}}

    def write(self, step: int, row: Mapping[str, float], steps_per_second: float | None = None) -> None:
        """Write the loss terms of a step, by name, and the speed if it was just measured."""
        speed = {} if steps_per_second is None else {"train/steps_per_second": steps_per_second}
        self._call_all(lambda opened: opened.write(step, {**self._values(row), **speed}))

    def flush(self) -> None:
        self._call_all(lambda opened: opened.flush())

    def close(self) -> None:
        self._call_all(lambda opened: opened.close())
        self._open.clear()

    def _call_all(self, do: Callable[[Logger], None]) -> None:
        """Call `do` with every logger that has not failed."""
        for name, opened in list(self._open.items()):  # a copy, because `_guarded` removes a logger that fails
            with self._guarded(name):
                do(opened)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Context in which any error drops logger `name` with a warning."""
        try:
            yield
        except Exception as error:  # of the library, the disk or the network: none should stop the training
            self._open.pop(name, None)
            lines = str(error).strip().splitlines() or [""]
            logger.warning(
                f"{name} is left out from here on ({type(error).__name__}: {lines[0]}); log.jsonl has everything"
            )


def _past_rows(run: Run, done: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields (step, row) for the first `done` steps in the run's log. A row has the loss terms by name."""
    if not done:
        return
    with run.log.open(encoding="ascii") as file:
        for line in file:
            row = json.loads(line)
            if row["step"] > done:
                return
            yield row["step"], row
