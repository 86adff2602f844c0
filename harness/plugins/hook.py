"""Functions that packages bring by name: loggers, launchers of studies and figures of reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hook:
    """A function by name: the object of `harness.loggers`, `harness.launchers` and `harness.figures` entry points.

    call: "module:attribute" of the function, which is imported when it is used. requires: library without which it cannot
    be used; "": none.

    A logger's function takes (`harness.runs.run.Run`, steps that are done) and returns a `harness.loggers.Logger`. A
    launcher's takes (`harness.studies.expand.Expansion`, list of `harness.studies.state.Progress`), starts the `pending`
    commands of each run, and returns when they are done or handed over. A figure's takes a list of measured
    `results.records.Record` and returns a `reports.charts.Figure` of the hook's name, or None where it has nothing to show.
    """

    name: str
    call: str
    summary: str = ""
    requires: str = ""


LOGGERS = (
    Hook(
        name="tensorboard", summary="TensorBoard", call="harness.loggers.tensorboard:TensorBoard", requires="tensorboard"
    ),
    Hook(
        name="wandb", summary="Weights & Biases", call="harness.loggers.weights_and_biases:WeightsAndBiases", requires="wandb"
    ),
)  # fmt: skip
LAUNCHERS = (  # `harness study` calls these itself, with settings of their own
    Hook(name="local", summary="processes on this machine", call=""),
    Hook(name="slurm", summary="one job for each run on a SLURM cluster", call=""),
)
