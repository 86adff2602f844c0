"""The sampling loop: makes one samples.npz, with its sidecar, from shards of one batch each.

A killed process loses at most one shard, and the same command ends with the same bytes. Image i depends only on the
checkpoint, the settings, the seed and i. The batch size is recorded too, because it can change the last bits of float32
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

from harness.diffusion.adaptive import mean_and_largest
from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.engines.interfaces import Sampler
from harness.errors import UserError
from harness.io import files
from harness.io.progress import Bar
from harness.pipeline.sidecar import SCHEMA, RecordFields
from harness.runs.samples import read_sidecar, sidecar_path, write_samples


@dataclass(frozen=True, kw_only=True)
class Job:
    """A sample set to make: its folder, its identity, the fields of its records, and the shape of the work."""

    folder: Path
    identity: dict[str, Any]  # everything that decides the bytes, as JSON reads it back
    record: RecordFields  # without the hash of the samples
    labels: np.ndarray  # int64 (N,)
    image: tuple[int, int, int]  # (H, W, C)
    batch: int
    steps: int  # calls of `advance` for each batch; of an adaptive sampler, the units of its progress
    title: str  # of the progress bar


def run_job(
    job: Job,
    make_sampler: Callable[[], Sampler],
    description: Mapping[str, Any],
    device: Callable[[], str],
    group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Make the sample set unless it is complete; returns the path of its samples.npz.

    make_sampler: builds the network; called only if the sample set is not complete. description: further items of the
    sidecar, such as the environment. device: a function that returns the display name of the devices; it is called after
    sampling. Each process of a group makes some of the shards, and the main process joins them. Raises `UserError` if the
    folder holds other samples.
    """
    target = job.folder / "samples.npz"
    complete = group.is_main and _is_complete(target, job)
    if group.broadcast(int(complete)):  # the main process decides: another machine may see the folder differently
        return target
    shards_folder, count = job.folder / "shards", len(job.labels)
    with files.explained(job.folder):
        shards_folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, job.batch)
    local_starts = group.local_part(starts)
    missing = [
        start
        for start in local_starts
        if not _is_intact(_shard_path(shards_folder, start), (min(job.batch, count - start), *job.image))
    ]
    sampler = make_sampler()
    begin = time.monotonic()  # the time for building the network is not counted
    assert sampler.evaluations == job.record.sampling.evaluations  # two counts: the sampler's own, and the plan's
    # of the progress bar, in sampler steps of this process
    total, done = len(local_starts) * job.steps, (len(local_starts) - len(missing)) * job.steps
    with Bar(job.title, total, "steps", done) as bar:
        for start in missing:
            index = np.arange(start, min(start + job.batch, count), dtype=np.int64)
            advance = functools.partial(bar.advance, 1, f"image {start + len(index)} of {count}")
            images = sampler.draw(index, job.labels[index], advance)
            if sampler.evaluations is None:  # first, so that a shard that is there has its counts
                _save_array(_counts_path(shards_folder, start), sampler.counts)
            _save_array(_shard_path(shards_folder, start), images)
    group.barrier("all shards are sampled")
    resumed = group.all_max(int(len(missing) < len(local_starts)))
    seconds = None if resumed else time.monotonic() - begin  # None: the time for the earlier shards is not known
    if group.is_main:
        for start in starts:
            group.await_file(_shard_path(shards_folder, start))
        record = job.record
        evaluations: dict[str, float | None] = {"evaluations": sampler.evaluations}
        if sampler.evaluations is None:
            counts = [np.load(_counts_path(shards_folder, start), allow_pickle=False) for start in starts]
            mean, largest = mean_and_largest(np.concatenate(counts))
            record = record.with_evaluations(mean, largest)
            evaluations = {"evaluations_mean": mean, "evaluations_max": largest}
        data = {
            "schema": SCHEMA,
            "identity": job.identity,
            "record": record.as_dict(),
            **evaluations,
            **description,
            "drawn": {"device": device(), "seconds": seconds},
        }
        write_samples(target, _load_shards(shards_folder, starts), job.labels, data)
        files.remove(shards_folder)
    group.barrier("the samples are written")
    return target


def _is_complete(target: Path, job: Job) -> bool:
    """Whether the sample set exists with its sidecar, which is written last. Raises `UserError` if another one is there."""
    if not (sidecar_path(target).exists() and target.exists()):
        return False
    sidecar = read_sidecar(target)
    if sidecar.get("identity") != job.identity or sidecar.get("sha256") != files.sha256_file(target):
        raise UserError(
            f"{job.folder} holds other samples than its name and sidecar say; move it away and sample again"
        )
    return True


def write_grid_beside(path: Path) -> None:
    """Write grid.png, a picture of the first samples, beside their npz, unless it exists."""
    grid = path.with_name("grid.png")
    if not grid.exists():
        from harness.runs.samples import read_samples
        from reports.grid import write_grid

        samples = read_samples(path)
        assert samples.labels is not None  # of a sample set that the harness made
        write_grid(samples.images, samples.labels, grid)


def _shard_path(folder: Path, start: int) -> Path:
    return folder / f"shard-{start:08d}.npy"


def _counts_path(folder: Path, start: int) -> Path:
    """The network evaluations of each image of a shard, int64 (n,), where every image has its own number."""
    return folder / f"evaluations-{start:08d}.npy"


def _save_array(path: Path, array: np.ndarray) -> None:
    """Write a shard, or its counts, atomically: under another name first, which is renamed when it is complete."""
    partial = path.with_name(path.name + files.PARTIAL)
    with files.explained(path):
        with partial.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        files.sync_file(partial)
        partial.replace(path)


def _is_intact(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether the shard exists as uint8 of that shape; otherwise it is sampled again."""
    try:
        images = np.lib.format.open_memmap(path, mode="r")  # np.load would also open a zip, which is no array
    except (OSError, ValueError):
        return False
    return images.shape == shape and images.dtype == np.uint8


def _load_shards(folder: Path, starts: range) -> Iterator[np.ndarray]:
    for start in starts:
        yield np.load(_shard_path(folder, start), allow_pickle=False)
