"""The stages of a run on this machine: create or open it, train, sample, evaluate. What is done is not repeated."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import checkpoints, decoding, evaluation, files, registry, runs, sampling, training
from harness.data import latents
from harness.data.examples import Examples
from harness.data.images import ImageSet
from harness.decoding import Decoder
from harness.diffusion.schedule import Schedule
from harness.engines import workbench
from harness.engines.team import ALONE, Team
from harness.environment import device_of, environment
from harness.errors import Refusal
from harness.planning import CHECKPOINT_BYTES, Request, published_input_gflops
from harness.protocols import Protocol
from harness.runs import Resolved, Run, RunSpec
from results.records import Record
from results.store import append, load

PARTS = "parts"  # below the cache: features that one process of a team leaves for another
CACHE = "cache"  # below the folder that holds the runs: features of reference images, by content

if TYPE_CHECKING:
    from evaluators.suites import Suite
    from harness.engines.memory import Measured

Say = Callable[[str], None]


def training_data(protocol: Protocol, data: Path | None) -> Examples:
    """What is trained on: the images of the protocol's data set, or the cache of their latents that `data` is."""
    if protocol.space == "latents":
        if (lack := latents.missing(data, protocol)) is not None:
            raise Refusal(f"data set {protocol.dataset!r} in latents: {lack}")
        assert data is not None
        return latents.load(data)
    return load_data(protocol, data)


def load_data(protocol: Protocol, data: Path | None) -> ImageSet:
    """The images of the protocol's data set, averaged down to its resolution where they are a multiple of it. `data` may
    be a cache of their latents."""
    if data is not None and latents.is_cache(data):
        meta = latents.read_meta(data)
        return images_behind(meta.places, meta.images["sha256"], str(data))
    return registry.datasets.get(protocol.dataset).load(data).shrunk(protocol.resolution)


def images_behind(places: dict[str, str], sha256: str, whose: str) -> ImageSet:
    """The images that latents were made of, where they were then; refused if they are gone, or others by now."""
    from harness.data.encode import open_images

    place = places.get("images", "")
    remedy = "name images to judge by with --reference PATH"
    try:
        images = open_images(place).data
    except Refusal as error:
        raise Refusal(f"the images behind {whose} are not where they were ({place}); {remedy}") from error
    if images.sha256 != sha256:
        raise Refusal(f"{place} holds other images ({images.sha256[:12]}) than {whose} is of ({sha256[:12]}); {remedy}")
    return images


def decoder_of(run: Run | Workshop, name: str | None, device: str | None = None) -> Decoder | None:
    """What decodes the latents of a run, which need not exist yet: `name`, or the auto-encoder that made them, where it was
    then; None: pixels. device: of a run that does not exist yet, as --device has it.

    Refused: one that is gone or has other weights by now, and one that takes other latents or makes other images.
    """
    task = run.protocol
    if task.space != "latents":
        if name is not None:
            raise Refusal(f"--decoder belongs to runs in latents, and {run.folder} is in pixels; leave it out")
        return None
    flag, made_by = "--decoder DIR", run.identity["latents"]
    if run.framework != "torch":  # decoders are torch's
        device = "cpu"
    elif run.resolved is not None:
        device = run.resolved.device
    else:
        device = workbench("torch").find_place(device).platform
    place = run.places.get("vae", "")
    try:
        decoder = decoding.load(name or place, device=device, flag=flag)
    except Refusal as error:
        if name is not None:
            raise
        text = f"the auto-encoder behind {run.folder} ({made_by['vae_sha256'][:12]}) is not to be had from {place}"
        raise Refusal(f"{text}; name it, or another decoder, with {flag} ({error})") from error
    if name is None and decoder.sha256 != made_by["vae_sha256"]:
        raise Refusal(
            f"{place} has other weights by now ({decoder.sha256[:12]}) than the auto-encoder behind {run.folder} "
            f"({made_by['vae_sha256'][:12]}); put the right ones back, or name a decoder with {flag}"
        )
    for what, found, wanted in (
        ("channels of latents", decoder.channels, task.in_channels),
        ("pixels a side", decoder.factor * task.input_size, task.resolution),
        ("channels of images", decoder.image_channels, task.image_channels),
        ("scale_factor", decoder.scale_factor, made_by["scale_factor"]),
        ("shift_factor", decoder.shift_factor, made_by["shift_factor"]),
    ):
        if found != wanted:
            raise Refusal(f"decoder {decoder.name} has {what} {found}, and the run {run.folder} {wanted}; name another")
    return decoder


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


def check_labels(data: Examples, num_classes: int) -> None:
    """A label outside the classes is refused before anything is trained on it."""
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= num_classes:
        bad = low if low < 0 else high
        raise Refusal(f"data set {data.name!r} has label {bad}, but the protocol has classes 0 to {num_classes - 1}")


class Workshop:
    """A run and the network it needs, made once and only when a stage needs them."""

    def __init__(
        self,
        request: Request,
        data: Examples,
        folder: Path,
        say: Say,
        team: Team = ALONE,
        loggers: Sequence[str] = (),
        mesh: str | None = None,
    ):
        self.request, self.data, self.folder, self.team = request, data, folder, team
        self.loggers, self.mesh = loggers, mesh
        self.say = team.says(say)
        self.spec = run_spec(request, data)
        data.check(request.protocol)
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
        self._net, measured = workbench(self.request.framework).measure(
            self.request,
            device=device,
            precision=precision,
            micro_batch=micro_batch,
            mesh=self.mesh,
            compile=compile,
            say=self.say,
        )
        return measured

    def create(self, resolved: Resolved) -> Run:
        """Make the run's folder, with `resolved` frozen in it."""
        if self.team.leads:
            runs.create(self.folder, self.spec, resolved, environment(resolved.device_name), self.data.places)
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
        if self.team.leaders(int(until in self.run.snapshots())):  # a folder may look otherwise from another machine
            return
        request, run = self.request, self.run
        net, self._net = self._net, None
        engine = workbench(run.framework).make_engine(request, run, self.data, net, self.mesh)
        training.train(
            run,
            engine,
            until,
            gflops_step=request.gflops_step,
            state_bytes=CHECKPOINT_BYTES * request.compute.params,
            device=device_of(run, self.team),
            say=self.say,
            team=self.team,
            loggers=self.loggers,
        )


def draw(
    run: Run,
    request: Request,
    step: int,
    steps: int,
    *,
    precision: str,
    batch: int | None,
    compile: str | None = None,  # "on" or "off"; None: as the run was created
    decoder: Decoder | None = None,  # of latents
    team: Team = ALONE,
) -> Path:
    """Draw one sample set of the snapshot of `step`, with a grid beside it; returns its samples.npz."""
    gflops = request.gflops_image(steps)
    wanted = sampling.request(
        run, step, request.sampling, steps, request.samples, precision,
        batch or sampling.default_batch(gflops, run.resolved.device),
        compile=compile or run.resolved.compile,
        decoder=None if decoder is None else decoder.identity,
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
            request,
            run,
            snapshot,
            plan,
            precision=precision,
            batch=wanted.batch,
            compile=wanted.compile,
            decoder=decoder,
        )

    sidecar = {
        "compute": {
            "params": request.compute.params,
            "gflops": request.compute.gflops,
            "gflops_published_input": published_input_gflops(request),
            **decoding_compute(decoder, request.protocol.resolution),
        },
        "trained": dataclasses.asdict(run.resolved),
        "environment": environment(run.resolved.device_name),
        "spent": files.read_json(run.snapshot(step) / "state.json", "snapshot").get("spent", {}),
    }
    path = sampling.sample(run, wanted, make, sidecar, lambda: device_of(run, team), team)
    if team.leads:
        sampling.write_grid_beside(path)
    return path


def decoding_compute(decoder: Decoder | None, side: int) -> dict[str, float]:
    """What a sidecar says of decoding an image of `side` pixels."""
    return {} if decoder is None else {"decoder_gflops": decoder.compute(side).gflops}


def judge(
    path: Path,
    protocol: Protocol,
    data: ImageSet,
    records: Path,
    *,
    cache: Path,
    name: str | None = None,
    by: evaluation.Judge | None = None,  # None: the protocol's suite
    team: Team = ALONE,  # among which extraction is divided; the leader has the records, the others none
) -> list[Record]:
    """Measure a sample set and append its records, or find them measured."""
    from evaluators.division import Division
    from evaluators.reference import images_sha256

    by = by or evaluation.Judge.of(protocol)
    about = evaluation.describe(path, evaluation.samples_sha256(path), name)
    brought = (
        by.weights is not None or by.statistics is not None or by.picture is not None
    )  # then it is known only when it is read, or has more to do
    found = None if brought else measured(records, about, protocol, by.suite, images_sha256(data.images))
    if team.leaders(int(found is not None)):
        return found or []
    if team.size > 1:
        by = dataclasses.replace(by, division=Division(index=team.index, size=team.size, folder=cache / PARTS))
    made = evaluation.evaluate(path, protocol, data, cache=cache, judge=by, name=name)
    if team.leads:
        append(records, made)
    team.wait("all is measured")
    if team.leads and team.size > 1:
        files.remove(cache / PARTS)  # of an evaluation that was killed
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
