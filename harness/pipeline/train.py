"""The stages of a run on this machine: create or open it, train, sample, evaluate. What is done is not repeated."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data.examples import Examples
from harness.data.load import check_labels
from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.engines.backend import get_backend
from harness.errors import UserError
from harness.io import files
from harness.pipeline.devices import device_of
from harness.pipeline.training_loop import train
from harness.planning.request import CHECKPOINT_BYTES, Request
from harness.protocols import Protocol
from harness.runs import checkpoints
from harness.runs.provenance import environment
from harness.runs.run import Resolved, Run, RunSpec, create_run, find_run, identity_difference, open_run

if TYPE_CHECKING:
    from harness.engines.memory import Measured

Say = Callable[[str], None]


def run_spec(request: Request, data: Examples) -> RunSpec:
    """The identity of the run that `request` asks for."""
    return RunSpec(
        backbone=request.spec.name,
        protocol=request.protocol,
        recipe=request.recipe,
        seed=request.seed,
        framework=request.framework,
        **data.identity,
    )


class RunSession:
    """A run and the network it needs, made once and only when a stage needs them."""

    def __init__(
        self,
        request: Request,
        data: Examples,
        folder: Path,
        say: Say,
        group: ProcessGroup = SINGLE_PROCESS,
        loggers: Sequence[str] = (),
        mesh: str | None = None,
    ):
        self.request, self.data, self.folder, self.group = request, data, folder, group
        self.loggers, self.mesh = loggers, mesh
        self.say = group.says(say)
        self.spec = run_spec(request, data)
        data.check(request.protocol)
        check_labels(data, request.protocol.num_classes)
        self.run: Run | None = find_run(folder, self.spec)
        if group.broadcast(int(self.run is not None)) != (
            self.run is not None
        ):  # before the leader goes on to create one
            raise UserError(
                f"process {group.index} and the leader do not see the same in {folder}; they share a file system"
            )
        if self.run is not None and "gradient_checkpointing" in request.arguments:  # frozen, for it decides memory
            frozen = {"gradient_checkpointing": self.run.resolved.gradient_checkpointing}
            self.request = dataclasses.replace(request, arguments=request.arguments | frozen)
        self._net: Any = None  # at its initialisation; handed over once, for an engine changes it

    @property
    def protocol(self) -> Protocol:
        return self.request.protocol

    @property
    def framework(self) -> str:
        return self.request.framework

    @property
    def identity(self) -> dict[str, Any]:
        """Of the run, whether it is there or not."""
        return self.spec.identity

    @property
    def places(self) -> dict[str, str]:
        """As the run was created, or would be."""
        return self.data.places if self.run is None else self.run.places

    @property
    def resolved(self) -> Resolved | None:
        """What the run has frozen; None: it is not there yet."""
        return None if self.run is None else self.run.resolved

    def measure(
        self, *, device: str | None, precision: str, micro_batch: int | None, compile: str = "auto"
    ) -> Measured:
        """What `create` would freeze. Builds the network."""
        self._net, existing_records = get_backend(self.request.framework).measure(
            self.request,
            device=device,
            precision=precision,
            micro_batch=micro_batch,
            mesh=self.mesh,
            compile=compile,
            say=self.say,
        )
        return existing_records

    def create(self, resolved: Resolved) -> Run:
        """Make the run's folder, with `resolved` frozen in it."""
        if self.group.is_main:
            create_run(self.folder, self.spec, resolved, environment(resolved.device_name), self.data.places)
        self.group.barrier("the run is created")
        self.run = find_run(self.folder, self.spec)
        if self.run is None:
            raise UserError(
                f"process {self.group.index} does not see {self.folder}; a run's processes share a file system"
            )
        return self.run

    def fork(self, source: Path, resolved: Resolved) -> Run:
        """Make the run from the newest checkpoint of the run in `source`, whose log it takes over."""
        parent = open_run(source)
        checkpoint = checkpoints.newest(parent.checkpoints, self.say)
        if checkpoint is None:
            raise UserError(f"--fork {source} has no checkpoint yet")
        if parent.identity != self.spec.identity:
            raise UserError(
                f"--fork {source} is another experiment: {identity_difference(parent.identity, self.spec.identity)}"
            )
        target = self.folder / "checkpoints" / checkpoint.folder.name
        if self.group.is_main:
            with files.explained(self.folder):
                files.remove(target)  # of a fork that was killed
                shutil.copytree(checkpoint.folder, target)
                lines = parent.log.read_bytes().splitlines(keepends=True)[: checkpoint.step]
                files.write_bytes(self.folder / "log.jsonl", b"".join(lines))
        self.say(f"forked from step {checkpoint.step} of {source}")
        return self.create(resolved)

    def train(self, until: int) -> None:
        """Train to `until` steps, or do nothing if their snapshot is there."""
        assert self.run is not None
        if self.group.broadcast(
            int(until in self.run.ema_checkpoint_steps())
        ):  # a folder may look otherwise from another machine
            return
        request, run = self.request, self.run
        net, self._net = self._net, None
        engine = get_backend(run.framework).make_engine(request, run, self.data, net, self.mesh)
        train(
            run,
            engine,
            until,
            gflops_step=request.gflops_step,
            state_bytes=CHECKPOINT_BYTES * request.compute.params,
            device=device_of(run, self.group),
            say=self.say,
            group=self.group,
            loggers=self.loggers,
        )
