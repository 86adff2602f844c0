"""The stages of a run on this machine: create or open it, train, sample, evaluate. What is done is not repeated."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import checkpoints, evaluation, files, registry, runs, sampling, training
from harness.data.images import ImageSet
from harness.diffusion.schedule import Schedule
from harness.engines import workbench
from harness.engines.team import ALONE, Team
from harness.errors import Refusal
from harness.planning import CHECKPOINT_BYTES, Request, published_input_gflops
from harness.protocols import Protocol
from harness.runs import Resolved, Run, RunSpec
from results.records import Record
from results.store import append, load

CACHE = "cache"  # below the folder that holds the runs: features of reference images, by content

if TYPE_CHECKING:
    from evaluators.suites import Suite
    from harness.engines.memory import Measured

Say = Callable[[str], None]


def load_data(protocol: Protocol, data: Path | None) -> ImageSet:
    """The images of the protocol's data set, averaged down to its resolution where they are a multiple of it."""
    return registry.datasets.get(protocol.dataset).load(data).shrunk(protocol.resolution)


def run_spec(request: Request, data: ImageSet) -> RunSpec:
    """The identity of the run that `request` asks for."""
    return RunSpec(
        backbone=request.spec.name,
        protocol=request.protocol,
        recipe=request.recipe,
        seed=request.seed,
        framework=request.framework,
        dataset_sha256=data.sha256,
    )


def check_labels(data: ImageSet, num_classes: int) -> None:
    """A label outside the classes is refused before anything is trained on it."""
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= num_classes:
        bad = low if low < 0 else high
        raise Refusal(f"data set {data.name!r} has label {bad}, but the protocol has classes 0 to {num_classes - 1}")


def check_images(data: ImageSet, request: Request) -> None:
    """Images of another size than the protocol's are refused."""
    task = request.protocol
    shape = (task.resolution, task.resolution, task.image_channels)
    if data.images.shape[1:] != shape:
        raise Refusal(
            f"data set {data.name!r} has images {data.images.shape[1:]}, protocol {task.name!r} wants {shape} (H, W, C)"
            + ("; prepare it at that resolution" if data.known_sha256 else "")
        )


class Workshop:
    """A run and the network it needs, made once and only when a stage needs them."""

    def __init__(
        self,
        request: Request,
        data: ImageSet,
        folder: Path,
        say: Say,
        team: Team = ALONE,
        loggers: Sequence[str] = (),
    ):
        self.request, self.data, self.folder, self.team, self.loggers = request, data, folder, team, loggers
        self.say = team.says(say)
        self.spec = run_spec(request, data)
        check_images(data, request)
        check_labels(data, request.protocol.num_classes)
        self.run: Run | None = runs.find(folder, self.spec)
        if team.leaders(int(self.run is not None)) != (self.run is not None):  # before the leader goes on to create one
            raise Refusal(
                f"process {team.index} and the leader do not see the same in {folder}; they share a file system"
            )
        if self.run is not None and "gradient_checkpointing" in request.arguments:  # frozen, for it decides memory
            frozen = {"gradient_checkpointing": self.run.resolved.gradient_checkpointing}
            self.request = dataclasses.replace(request, arguments=request.arguments | frozen)
        self._net: Any = None  # at its initialisation; handed over once, for an engine changes it

    def measure(
        self, *, device: str | None, precision: str, micro_batch: int | None, mesh: str | None = None
    ) -> Measured:
        """What `create` would freeze. Builds the network."""
        self._net, measured = workbench(self.request.framework).measure(
            self.request, device=device, precision=precision, micro_batch=micro_batch, mesh=mesh, say=self.say
        )
        return measured

    def create(self, resolved: Resolved) -> Run:
        """Make the run's folder, with `resolved` frozen in it."""
        if self.team.leads:
            runs.create(self.folder, self.spec, resolved, evaluation.environment(resolved.device_name))
        self.team.wait("the run is created")
        self.run = runs.find(self.folder, self.spec)
        if self.run is None:
            raise Refusal(
                f"process {self.team.index} does not see {self.folder}; a run's processes share a file system"
            )
        return self.run

    def fork(self, source: Path, resolved: Resolved) -> Run:
        """Make the run from the newest checkpoint of the run in `source`, whose log it takes over."""
        parent = runs.open_run(source)
        checkpoint = checkpoints.newest(parent.checkpoints, self.say)
        if checkpoint is None:
            raise Refusal(f"--fork {source} has no checkpoint yet")
        if parent.identity != self.spec.identity:
            raise Refusal(
                f"--fork {source} is another experiment: {runs.difference(parent.identity, self.spec.identity)}"
            )
        target = self.folder / "checkpoints" / checkpoint.folder.name
        if self.team.leads:
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
        if until in self.run.snapshots():
            return
        request, run = self.request, self.run
        net, self._net = self._net, None
        engine = workbench(run.framework).make_engine(request, run, self.data, net)
        training.train(
            run,
            engine,
            until,
            gflops_step=request.gflops_step,
            state_bytes=CHECKPOINT_BYTES * request.compute.params,
            say=self.say,
            team=self.team,
            loggers=self.loggers,
        )


def draw(
    run: Run, request: Request, step: int, steps: int, *, precision: str, batch: int | None, team: Team = ALONE
) -> Path:
    """Draw one sample set of the snapshot of `step`, with a grid beside it; returns its samples.npz."""
    gflops = request.gflops_image(steps)
    wanted = sampling.request(
        run, step, request.sampling, steps, request.samples, precision,
        batch or sampling.default_batch(gflops, run.resolved.device),
    )  # fmt: skip

    def make() -> sampling.Sampler:
        plan = registry.samplers.get(request.sampling.sampler).make(
            Schedule.named(run.recipe.schedule, run.recipe.diffusion_steps),
            steps,
            registry.objectives.get(run.recipe.objective),
            request.sampling.eta,
            request.sampling.clip_denoised,
        )
        snapshot = run.snapshot(step) / "ema.safetensors"
        return workbench(run.framework).make_sampler(
            request, run, snapshot, plan, precision=precision, batch=wanted.batch
        )

    sidecar = {
        "compute": {
            "params": request.compute.params,
            "gflops": request.compute.gflops,
            "gflops_published_input": published_input_gflops(request),
        },
        "trained": dataclasses.asdict(run.resolved),
        "environment": evaluation.environment(run.resolved.device_name),
    }
    path = sampling.sample(run, wanted, make, sidecar, team)
    if team.leads:
        sampling.write_grid_beside(path)
    return path


def judge(
    path: Path,
    protocol: Protocol,
    data: ImageSet,
    records: Path,
    *,
    cache: Path,
    name: str | None = None,
    by: evaluation.Judge | None = None,  # None: the protocol's suite
) -> list[Record]:
    """Measure a sample set and append its records, or find them measured."""
    from evaluators.reference import images_sha256

    by = by or evaluation.Judge.of(protocol)
    about = evaluation.describe(path, evaluation.samples_sha256(path), name)
    brought = (
        by.weights is not None or by.statistics is not None or by.picture is not None
    )  # then it is known only when it is read, or has more to do
    if not brought and (found := measured(records, about, protocol, by.suite, images_sha256(data.images))):
        return found
    made = evaluation.evaluate(path, protocol, data, cache=cache, judge=by, name=name)
    append(records, made)
    return made


def measured(
    records: Path, about: dict[str, Any], protocol: Protocol, suite: Suite, reference_sha256: str | None
) -> list[Record] | None:
    """The records of the samples that `about` describes (`evaluation.describe`), or None while a metric is missing.

    reference_sha256: of the images that they are to be judged by; None where that is known to be the run's data set.
    """
    task = (protocol.name, str(protocol.version), protocol.dataset)
    judge = (suite.name, str(suite.version), suite.features.name)
    found = [
        each
        for each in (load([records]).records if records.exists() else ())
        if (each.protocol, each.protocol_version, each.dataset) == task
        and all(getattr(each, field) == value for field, value in about.items())
        and (by := each.evaluation) is not None
        and (by.suite, by.suite_version, by.features) == judge
        and reference_sha256 in (None, by.reference_sha256)
    ]
    return found if {each.metric for each in found} >= {metric.key for metric in suite.metrics} else None
