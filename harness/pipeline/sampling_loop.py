"""The loop of sampling: shard by shard into one samples.npz with its sidecar.

A killed process repeats at most one shard, and the same command ends with the same bytes. Image i depends on checkpoint,
settings, seed and i alone; the batch that it is sampled in is recorded because it can move the last bits of float32
arithmetic.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.engines.interfaces import Sampler
from harness.errors import UserError
from harness.io import files
from harness.io.progress import Bar
from harness.pipeline.sidecar import SCHEMA, RecordFields
from harness.runs.samples import read_sidecar, sidecar_path, write_samples


@dataclass(frozen=True, kw_only=True)
class Job:
    """A sample set to make: its folder, what decides its bytes, what records say of it, and the shape of the work."""

    folder: Path
    identity: dict[str, Any]  # everything that decides the bytes, as JSON reads it back
    record: RecordFields  # all but the hash of the samples
    labels: np.ndarray  # int64 (N,)
    image: tuple[int, int, int]  # (H, W, C)
    batch: int
    steps: int  # calls of `advance` for each batch
    title: str  # of the progress bar


def run_job(
    job: Job,
    make_sampler: Callable[[], Sampler],
    description: Mapping[str, Any],
    device: Callable[[], str],
    group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Make the sample set, or find it complete; returns the path of its samples.npz.

    description: what the sidecar says beside identity and record, such as the environment. device: gives the display
    name of the devices, once they are in use. Every process of a group makes shards of its own, and the main one joins
    them. Raises `UserError` where the folder holds other samples.
    """
    target = job.folder / "samples.npz"
    if group.broadcast(int(group.is_main and _complete(target, job))):  # another machine may see the folder differently
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
    assert sampler.evaluations == job.record.sampling.evaluations  # the sampler's count and the plan's
    total, done = len(mine) * job.steps, (len(mine) - len(missing)) * job.steps
    with Bar(job.title, total, "steps", done) as bar:
        for start in missing:
            index = np.arange(start, min(start + job.batch, count), dtype=np.int64)
            advance = functools.partial(bar.advance, 1, f"image {start + len(index)} of {count}")
            _save(_shard(shards, start), sampler.draw(index, job.labels[index], advance))
    group.barrier("all shards are sampled")
    in_part = group.all_max(int(len(missing) < len(mine)))
    seconds = None if in_part else time.monotonic() - begin  # of a part of the images it would say nothing
    if group.is_main:
        data = {
            "schema": SCHEMA,
            "identity": job.identity,
            "record": job.record.as_dict(),
            "evaluations": sampler.evaluations,
            **description,
            "drawn": {"device": device(), "seconds": seconds},
        }
        write_samples(target, _load(shards, starts), job.labels, data)
        files.remove(shards)
    group.barrier("the samples are written")
    return target


def _complete(target: Path, job: Job) -> bool:
    """Whether the sample set is there; another one in its place is refused."""
    if not (sidecar_path(target).exists() and target.exists()):
        return False
    found = read_sidecar(target)
    if found.get("identity") != job.identity or found.get("sha256") != files.sha256_file(target):
        raise UserError(
            f"{job.folder} holds other samples than its name and sidecar say; move it away and sample again"
        )
    return True


def write_grid_beside(path: Path) -> None:
    """Draw a picture of the first samples beside their npz, if it is not there."""
    grid = path.with_name("grid.png")
    if not grid.exists():
        from harness.runs.samples import read_samples
        from reports.grid import write_grid

        samples = read_samples(path)
        assert samples.labels is not None  # of a sample set that the harness made
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
    """Whether the shard is there and intact; a damaged one is sampled again."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # EOFError: an empty file
        return False
    return images.shape == shape and images.dtype == np.uint8


def _load(folder: Path, starts: range) -> Iterator[np.ndarray]:
    for start in starts:
        yield np.load(_shard(folder, start), allow_pickle=False)
