"""The sampling stage: from a snapshot of a run to samples.npz with its sidecar.

Work is kept shard by shard, so a killed process repeats at most one shard, and the same command ends with the same
bytes. Image i depends on checkpoint, settings, seed and i alone; the batch it is drawn in is recorded because it can
move the last bits of float32 arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.engines.interfaces import Sampler
from harness.errors import UserError
from harness.io import files
from harness.io.progress import Bar
from harness.runs.samples import read_sidecar, sidecar_path, write_samples

SCHEMA = 1


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


def run_job(
    job: Job,
    make_sampler: Callable[[], Sampler],
    sidecar: dict[str, Any],
    device: Callable[[], str],
    group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Draw the sample set, or find it drawn; returns the path of its samples.npz.

    `sidecar` is what a later reader should know beside the identity: parameters, Gflops, environment. `device`: tells
    what a person calls what they were drawn on, once they are. Each process of a process group draws shards of its own; the leader puts them together.
    """
    target = job.folder / "samples.npz"
    if group.broadcast(int(group.is_main and _drawn(target, job))):  # a folder may look otherwise from another machine
        return target
    shards, count = job.folder / "shards", len(job.labels)
    with files.explained(job.folder):
        shards.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, job.batch)
    mine = group.local_part(starts)
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
    group.barrier("all shards are drawn")
    seconds = (
        time.monotonic() - begin if not group.all_max(int(len(missing) < len(mine))) else None
    )  # of a part: unknown
    if group.is_main:
        data = {"schema": SCHEMA, "identity": job.identity, "evaluations": sampler.evaluations, **sidecar}
        data["drawn"] = {"device": device(), "seconds": seconds}
        write_samples(target, _load(shards, starts), job.labels, data)
        files.remove(shards)
    group.barrier("the samples are written")
    return target


def _drawn(target: Path, job: Job) -> bool:
    """Whether the sample set is there; another in its place is refused."""
    if not (sidecar_path(target).exists() and target.exists()):
        return False
    kept = read_sidecar(target)
    if kept.get("identity") != job.identity or kept.get("sha256") != files.sha256_file(target):
        raise UserError(
            f"{job.folder} holds other samples than its name and sidecar say; move it away and sample again"
        )
    return True


def write_grid_beside(path: Path) -> None:
    """A picture of the first samples, beside their npz, if it is not there."""
    grid = path.with_name("grid.png")
    if not grid.exists():
        from harness.runs.samples import read_samples
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
