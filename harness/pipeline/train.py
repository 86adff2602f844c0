"""The first stage: create or open a run, and train it to an EMA checkpoint. Work that is done is not repeated."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import registry
from harness.data.examples import Examples
from harness.data.load import check_labels, training_data
from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.engines.backend import get_backend, join_processes
from harness.engines.ema import snapshot_steps
from harness.engines.memory import Measured
from harness.errors import UserError
from harness.io import files
from harness.loggers import check_installed
from harness.pipeline.devices import device_of
from harness.pipeline.plan import measured_cost
from harness.pipeline.training_loop import newest_checkpoint
from harness.pipeline.training_loop import train as train_loop
from harness.planning.matching import request_from
from harness.planning.plan import make_plan
from harness.planning.plan_text import costs_text, headline, measured_text
from harness.planning.request import Request
from harness.protocols import Protocol
from harness.runs.checkpoints import Checkpoint
from harness.runs.provenance import environment
from harness.runs.run import (
    RUNS_FOLDER,
    Resolved,
    Run,
    create_run,
    find_run,
    identity_difference,
    open_run,
    without_plugins,
)
from harness.settings import DEFAULT_PROTOCOL, RunOptions, TrainOptions, frozen_settings, keyword_options

logger = logging.getLogger(__name__)

QUICKLY_CHECKED = 50_000_000  # parameters, at most, of a network that is checked before it is trained


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A trained run: its folder, its last step, the kind of its backbone, and the file of the EMA weights."""

    folder: Path
    step: int
    kind: str
    weights: Path


@keyword_options(TrainOptions)
def train(options: TrainOptions) -> TrainResult:
    """Train a backbone and write the EMA weights of the last step. The same call continues a run that was killed.

    The backbone is a denoiser, an upsampler (trained on pairs of resolutions) or a classifier of noised images.
    UserError: the request cannot be carried out; RunError: a loss or a weight is not finite, or the disk is full.
    During training, Ctrl-C and SIGTERM write a checkpoint and raise KeyboardInterrupt (in the main thread).
    """
    request = request_from(options)
    session = open_session(request, options)
    with session.group.locked(session.folder):
        run = session.begin(options)
        session.train(request.recipe.steps)
    weights = run.ema_checkpoint(request.recipe.steps) / "ema.safetensors"
    return TrainResult(folder=run.folder, step=request.recipe.steps, kind=request.spec.kind, weights=weights)


def open_session(request: Request, options: TrainOptions) -> RunSession:
    """Log the plan, read the data and open the run's folder. Raises `UserError` if something is missing."""
    check_installed(options.logger)
    group = join_processes(request.framework)
    plan = make_plan(request)
    logger.info(headline(request, by_default=options.protocol is None))
    logger.info(costs_text(plan))
    if isinstance(options, RunOptions) and options.features_weights is None:
        for sentence in plan.missing_evaluator_files:
            logger.info(f"note     {sentence}; without them a run ends with samples")
    if plan.missing:
        for sentence in plan.missing:
            logger.info(f"missing  {sentence}")
        text = f"protocol {request.protocol.name!r} cannot run here; see the lines above for what is missing"
        # Every DiT fits the default protocol, the digits, which needs no files.
        if request.protocol.name != DEFAULT_PROTOCOL and request.spec.family == "dit":
            steps = request.recipe.steps
            text += f"; this works now: harness run --backbone {request.spec.name} --protocol digits --steps {steps}"
        raise UserError(text)
    data = training_data(request.protocol, request.data)
    folder = options.out or RUNS_FOLDER / request.run_spec(data).name
    grace = math.inf if options.grace is None else options.grace
    return RunSession(request, data, folder, group, options.logger, options.mesh, grace)


class RunSession:
    """A run that is being created or continued, with its data and its process group.

    run: None until the run exists on disk. loggers: names of `harness list loggers`. mesh: as --mesh gives it; None:
    not given. grace: as in `training_loop.train`. Raises `UserError` if the data do not fit the protocol, or if the folder
    holds another run or other files.
    """

    def __init__(
        self,
        request: Request,
        data: Examples,
        folder: Path,
        group: ProcessGroup = SINGLE_PROCESS,
        loggers: Sequence[str] = (),
        mesh: str | None = None,
        grace: float = math.inf,
    ):
        self.request, self.data, self.folder, self.group = request, data, folder, group
        self.loggers, self.mesh, self.grace = loggers, mesh, grace
        self.spec = request.run_spec(data)  # of the run; the backbone's is request.spec
        data.check(request.protocol)
        check_labels(data, request.protocol.num_classes)
        self.run: Run | None = find_run(folder, self.spec)
        exists = self.run is not None
        # Checked by all processes before the main one creates the run.
        if (expected := bool(group.broadcast(int(exists)))) and not exists:
            group.await_file(folder / "run.json")
            self.run = find_run(folder, self.spec)
        elif exists and not expected:
            raise UserError(
                f"process {group.index} and the main process see different contents of {folder}; they need a shared file system"
            )
        # The run keeps its frozen value, whether or not --gradient-checkpointing is given again. Only if it is given, the
        # argument is there; `begin` raises if the run was created without it.
        if self.run is not None:
            frozen = self.run.resolved.gradient_checkpointing
            if frozen or "gradient_checkpointing" in request.arguments:
                arguments = request.arguments | {"gradient_checkpointing": frozen}
                self.request = dataclasses.replace(request, arguments=arguments)
        self._net: Any = None  # the network that `measure` built; for one engine only, because training changes it

    @property
    def protocol(self) -> Protocol:
        return self.request.protocol

    @property
    def framework(self) -> str:
        return self.request.framework

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the run, which may not exist yet."""
        return self.spec.identity

    @property
    def source_paths(self) -> dict[str, str]:
        """Paths of files that the run needs later: recorded at its creation, or those of the data (see `Examples`)."""
        return self.data.source_paths if self.run is None else self.run.source_paths

    @property
    def resolved(self) -> Resolved | None:
        """The frozen settings of the run; None if it does not exist yet."""
        return None if self.run is None else self.run.resolved

    def begin(self, options: TrainOptions) -> Run:
        """Return the run; create it if it does not exist, from another run if --fork is given.

        Raises `UserError` if `options` give a frozen setting another value than the run has.
        """
        if self.run is None:
            self._check_network()
            measured = self.measure(
                device=options.device,
                precision=options.precision,
                micro_batch=options.micro_batch,
                compile=options.compile or "off",
                deterministic=options.deterministic,
            )
            if options.fork:
                self.fork(options.fork, measured.resolved)
            else:
                self.create(measured.resolved)
            logger.info(measured_text(measured_cost(self.request, measured)))
        run = self.run
        assert run is not None
        requested = frozen_settings(options)
        if run.framework == "jax":  # torch's mesh may change with the number of processes
            requested["mesh"] = options.mesh
        for name, value in requested.items():
            frozen = getattr(run.resolved, name)
            if value is not None and value != frozen:
                raise UserError(
                    f"{run.folder} was created with {name} {frozen}, which is frozen because it decides bits; leave out "
                    f"--{name.replace('_', '-')}, or make another run of it with --fork {run.folder} --out NEW"
                )
        for role, code in self.spec.plugins.items():
            if role not in run.identity.get("plugins", {}):
                logger.info(f"note     {run.folder} does not state the code of its {role}; it goes on with {code}")
        resolved = run.resolved
        logger.info(
            f"  run         {run.folder}  ({resolved.precision}, micro-batches of {resolved.micro_batch}, {resolved.device})"
        )
        return run

    def _check_network(self) -> None:
        """Raise `UserError` if a network that is not built in fails one of the quick checks of `harness check`.

        Of networks of more than QUICKLY_CHECKED parameters, which would be built once more, only the closed form is checked.
        """
        request, spec = self.request, self.request.spec
        if registry.backbones.owner(spec.name) == registry.OWN_DISTRIBUTION:
            return
        if spec.null_label is None and request.recipe.label_dropout and spec.kind in ("denoiser", "upsampler"):
            logger.info(f"note     {spec.name} has no null label, so labels are not dropped in training")
        from harness.conformance.suite import check_closed_form, check_quickly

        if request.compute.params <= QUICKLY_CHECKED:
            check_quickly(spec, request.framework, request.arguments)
        else:
            check_closed_form(spec, request.framework, request.arguments)  # needs no memory

    def measure(
        self,
        *,
        device: str | None,
        precision: str,
        micro_batch: int | None,
        compile: str = "auto",
        deterministic: bool = False,
    ) -> Measured:
        """Measure speed and memory, and choose the settings that `create` freezes. Builds the network and keeps it.

        Neither includes the heads and the encoder of an auxiliary loss.
        """
        if self.request.recipe.auxiliary and compile == "on":
            raise UserError("an auxiliary loss taps into the network, which --compile on does not allow; leave it out")
        mode = "off" if self.request.recipe.auxiliary else compile
        self._net, measured = get_backend(self.request.framework).measure(
            self.request,
            device=device,
            precision=precision,
            micro_batch=micro_batch,
            mesh=self.mesh,
            compile=mode,
            deterministic=deterministic,
        )
        return measured

    def create(self, resolved: Resolved, fork: Mapping[str, Any] | None = None) -> Run:
        """Create the run's folder, with `resolved` frozen in it. fork: see `Run.fork`."""
        if self.group.is_main:
            environment_now = environment(resolved.device_name)
            create_run(self.folder, self.spec, resolved, environment_now, self.data.source_paths, fork)
        self.group.barrier("the run is created")
        self.group.await_file(self.folder / "run.json")
        self.run = find_run(self.folder, self.spec)
        assert self.run is not None
        return self.run

    def fork(self, source: Path, resolved: Resolved) -> Run:
        """Create the run from the newest checkpoint of the run in `source`, with its log up to that step."""
        parent = open_run(source)
        checkpoint = newest_checkpoint(parent.checkpoints, self.group)
        if checkpoint is None:
            raise UserError(f"--fork {source} has no checkpoint yet")
        # A fork may go on with changed code of a plug-in.
        then, now = map(without_plugins, (parent.identity, self.spec.identity))
        if then != now:
            raise UserError(f"--fork {source} is another experiment: {identity_difference(then, now)}")
        target = self.folder / "checkpoints" / checkpoint.folder.name
        if self.group.is_main:
            with files.explained(self.folder):
                files.remove(target)  # a copy left by a fork that was killed
                shutil.copytree(checkpoint.folder, target)
                for step in parent.posthoc_steps():
                    if step <= checkpoint.step:
                        name = f"posthoc/{parent.posthoc_checkpoint(step).name}"
                        shutil.copytree(parent.folder / name, self.folder / name, dirs_exist_ok=True)
                lines = parent.log.read_bytes().splitlines(keepends=True)[: checkpoint.step]  # one line per step
                files.write_bytes(self.folder / "log.jsonl", b"".join(lines))
        logger.info(f"forked from step {checkpoint.step} of {source}")
        return self.create(resolved, _origin(parent, checkpoint, resolved))

    def train(self, until: int) -> None:
        """Train to `until` steps, or do nothing if the EMA weights of that step exist."""
        assert self.run is not None
        done = until in self.run.ema_checkpoint_steps()
        if self.group.broadcast(int(done)):  # the main process decides: another machine may not see the file yet
            return
        request, run = self.request, self.run
        net, self._net = self._net, None  # None, if `measure` was not called: the engine builds the network
        engine = get_backend(run.framework).make_engine(request, run, self.data, net, self.mesh)
        train_loop(
            run,
            engine,
            until=until,
            gflops_step=request.gflops_step,
            state_bytes=request.checkpoint_bytes,
            device=device_of(run, self.group),
            group=self.group,
            loggers=self.loggers,
            snapshot_steps=snapshot_steps(request.recipe, request.recipe.steps),
            grace=self.grace,
        )


def _origin(parent: Run, checkpoint: Checkpoint, resolved: Resolved) -> dict[str, Any]:
    """`Run.fork` of a fork with the settings `resolved` from a checkpoint of `parent`, which may be a fork too."""
    before = [parent.fork["earlier_precision"]] if "earlier_precision" in parent.fork else []
    if parent.resolved.precision != resolved.precision:
        before.append(f"{parent.resolved.precision} to step {checkpoint.step}")
    earlier = {"earlier_precision": ", ".join(before)} if before else {}
    return {"forked_at": checkpoint.step, "parent_sha256": checkpoint.sha256("ema"), **earlier}
