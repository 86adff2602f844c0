"""The sampling stage: from a snapshot of a run to samples.npz with its sidecar.

Work is kept shard by shard, so a killed process repeats at most one shard, and the same command ends with the same
bytes. Image i depends on checkpoint, settings, seed and i alone; the batch it is drawn in is recorded because it can
move the last bits of float32 arithmetic.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from harness import checkpoints, files
from harness.engines.team import ALONE, Team
from harness.errors import Refusal
from harness.progress import Bar
from harness.protocols import Sampling
from harness.randomness import Purpose, integers
from harness.runs import Run
from harness.samples import read_sidecar, sidecar_path, write_samples

SCHEMA = 1
BATCH = 128
SHARD_GFLOPS = 500_000.0  # on a CPU a shard should be minutes, not hours, of work


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One sample set of a run: the snapshot of `step`, `sampling` with `steps` sampler steps, `count` images."""

    step: int
    sampling: Sampling
    steps: int
    count: int
    precision: str
    batch: int
    checkpoint_sha256: str
    decoder: dict[str, Any] | None = None  # identity of what decodes latents
    compile: str = "off"  # or "on", which can move the last bits as the batch can

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling settings as plain data, with the one number of steps; None for what has no effect."""
        settings = {**dataclasses.asdict(self.sampling), "steps": self.steps, "precision": self.precision}
        if self.sampling.sampler == "ddpm":
            settings["eta"] = None
        if self.sampling.guidance_scale == 1:
            settings["guidance_channels"] = None
        if self.compile != "off":
            settings["compile"] = self.compile
        return settings

    def identity(self, run: Run) -> dict[str, Any]:
        """Everything that decides the bytes of the images."""
        return {
            "run": run.identity,
            "training_steps": self.step,
            "checkpoint_sha256": self.checkpoint_sha256,
            "sampling": self.settings,
            **({} if self.decoder is None else {"decoder": self.decoder}),
            "count": self.count,
            "batch": self.batch,
        }

    def name(self, run: Run) -> str:
        """Folder name below RUN/samples: readable, and unique through a part of the identity's hash."""
        guidance = f"-cfg{self.sampling.guidance_scale:g}" if self.sampling.guidance_scale != 1 else ""
        short = files.sha256_json(self.identity(run))[:8]
        return f"step{self.step}-{self.sampling.sampler}{self.steps}{guidance}-n{self.count}-{short}"


class Sampler(Protocol):
    """What a framework provides."""

    evaluations: int  # true network evaluations an image

    def draw(self, index: np.ndarray, labels: np.ndarray, advance: Callable[[], None]) -> np.ndarray:
        """Images (N, H, W, C) uint8 of the indices; `advance` is called after each sampler step."""


def default_batch(gflops_per_image: float, device: str) -> int:
    """Images a forward pass while sampling."""
    if not device.startswith("cpu"):
        return BATCH
    return max(1, min(BATCH, int(SHARD_GFLOPS / max(gflops_per_image, 1e-9))))


def labels_of(policy: str, seed: int, count: int, num_classes: int) -> np.ndarray:
    """Labels of samples 0 ... count-1, int64: "random" draws each uniformly, "balanced" goes round the classes."""
    index = np.arange(count, dtype=np.int64)
    if policy == "balanced":
        return index % num_classes
    return integers(seed, Purpose.SAMPLE_LABEL, index, 0, num_classes)


def request(
    run: Run,
    step: int,
    sampling: Sampling,
    steps: int,
    count: int,
    precision: str,
    batch: int,
    compile: str = "off",
    decoder: dict[str, Any] | None = None,
) -> SampleRequest:
    """A request for the snapshot of `step`, whose hash it carries; a missing snapshot is refused."""
    snapshots = run.snapshots()
    if step not in snapshots:
        have = ", ".join(map(str, snapshots)) or "none yet"
        raise Refusal(f"{run.folder} has no snapshot of step {step} (it has: {have}); train to it with --steps {step}")
    snapshot = checkpoints.verify(run.snapshot(step))
    return SampleRequest(
        step=step, sampling=sampling, steps=steps, count=count, precision=precision, batch=batch,
        checkpoint_sha256=snapshot.sha256("ema"), compile=compile, decoder=decoder,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """A sample set to be drawn: where it goes, everything that decides its bytes, and the shape of the work."""

    folder: Path
    identity: dict[str, Any]
    labels: np.ndarray  # int64 (N,)
    image: tuple[int, int, int]  # (H, W, C)
    batch: int
    steps: int  # calls of `advance` for each batch
    title: str  # of the bar


def sample(
    run: Run,
    wanted: SampleRequest,
    make_sampler: Callable[[], Sampler],
    sidecar: dict[str, Any],
    device: Callable[[], str],
    team: Team = ALONE,
) -> Path:
    """Draw the sample set of a run, or find it drawn; returns the path of its samples.npz."""
    task = run.protocol
    job = Job(
        folder=run.folder / "samples" / wanted.name(run),
        identity=wanted.identity(run),
        labels=labels_of(wanted.sampling.label_policy, wanted.sampling.seed, wanted.count, task.num_classes),
        image=(task.resolution, task.resolution, task.image_channels),
        batch=wanted.batch,
        steps=wanted.steps,
        title=f"sample {wanted.sampling.sampler}-{wanted.steps}",
    )
    return draw(job, make_sampler, sidecar, device, team)


def draw(
    job: Job,
    make_sampler: Callable[[], Sampler],
    sidecar: dict[str, Any],
    device: Callable[[], str],
    team: Team = ALONE,
) -> Path:
    """Draw the sample set, or find it drawn; returns the path of its samples.npz.

    `sidecar` is what a later reader should know beside the identity: parameters, Gflops, environment. `device`: tells
    what a person calls what they were drawn on, once they are. Each process of a team draws shards of its own; the leader puts them together.
    """
    target = job.folder / "samples.npz"
    if team.leaders(int(team.leads and _drawn(target, job))):  # a folder may look otherwise from another machine
        return target
    shards, count = job.folder / "shards", len(job.labels)
    with files.explained(job.folder):
        shards.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, job.batch)
    mine = team.share(starts)
    missing = [
        start for start in mine if not _whole(_shard(shards, start), (min(job.batch, count - start), *job.image))
    ]
    sampler, begin = make_sampler(), time.monotonic()
    total, done = len(mine) * job.steps, (len(mine) - len(missing)) * job.steps
    with Bar(job.title, total, "steps", done) as bar:
        for start in missing:
            index = np.arange(start, min(start + job.batch, count), dtype=np.int64)
            note = f"image {start + len(index)} of {count}"
            images = sampler.draw(index, job.labels[index], lambda note=note: bar.advance(1, note))
            _save(_shard(shards, start), images)
    team.wait("all shards are drawn")
    seconds = time.monotonic() - begin if not team.most(int(len(missing) < len(mine))) else None  # of a part: unknown
    if team.leads:
        data = {"schema": SCHEMA, "identity": job.identity, "evaluations": sampler.evaluations, **sidecar}
        data["drawn"] = {"device": device(), "seconds": seconds}
        write_samples(target, _load(shards, starts), job.labels, data)
        files.remove(shards)
    team.wait("the samples are written")
    return target


def _drawn(target: Path, job: Job) -> bool:
    """Whether the sample set is there; another in its place is refused."""
    if not (sidecar_path(target).exists() and target.exists()):
        return False
    kept = read_sidecar(target)
    if kept.get("identity") != job.identity or kept.get("sha256") != files.sha256_file(target):
        raise Refusal(f"{job.folder} holds other samples than its name and sidecar say; move it away and sample again")
    return True


def write_grid_beside(path: Path) -> None:
    """A picture of the first samples, beside their npz, if it is not there."""
    grid = path.with_name("grid.png")
    if not grid.exists():
        from harness.samples import read_samples
        from reports.grid import write_grid

        samples = read_samples(path)
        write_grid(samples.images, samples.labels, grid)


def _shard(folder: Path, start: int) -> Path:
    return folder / f"shard-{start:08d}.npy"


def _save(path: Path, images: np.ndarray) -> None:
    partial = path.with_name(path.name + files.PARTIAL)
    with files.explained(path):
        with partial.open("wb") as file:
            np.save(file, images, allow_pickle=False)
        files.sync_file(partial)
        partial.replace(path)


def _whole(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether the shard is there and complete; a damaged one is drawn again."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # EOFError: an empty file
        return False
    return images.shape == shape and images.dtype == np.uint8


def _load(folder: Path, starts: range) -> Iterator[np.ndarray]:
    for start in starts:
        yield np.load(_shard(folder, start), allow_pickle=False)
