"""Pictures of samples, one PNG for each class, as in the paper's Figures 14-33; and how an image comes about, as a strip.

Image i of every picture is sample i of the sampling seed with the label of the picture. So it is the image at index i of a
sample set with the same settings, if that has the same label there (but for the last bits of float32 arithmetic, which the
batch size can change).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import registry
from harness.data.classes import display_name, read_classes
from harness.diffusion.plans import SamplerPlan
from harness.diffusion.processes import PROCESSES
from harness.diffusion.sampler_plan import AnyPlan
from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.engines.interfaces import Sampler
from harness.errors import UserError
from harness.io.progress import Bar
from harness.io.text import GridSize
from harness.protocols import Protocol
from harness.runs.pictures import is_complete, picture_path, write_sidecar
from harness.settings import SampleOptions
from harness.spec import BackboneSpec

DEFAULT_GRID = GridSize(rows=4, columns=8)
STRIP_IMAGES = 4  # of a strip: the first ones of the grid
STRIP_COLUMNS = 8  # of a strip, before the sample itself
STRIP = "-trajectory"  # in the names of strips

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PictureJob:
    """Pictures to draw, all of one sampler.

    identity: everything that decides the images but their class, as JSON reads it back. names: see
    `DatasetSpec.class_names`. plans: (name, sampler plan) of the networks, one after the other; None: a generator.
    caption: lines for below a picture. batch: batch size of one forward pass.
    """

    folder: Path
    identity: dict[str, Any]
    labels: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    grid: GridSize
    trajectory: bool
    plans: tuple[tuple[str, AnyPlan | None], ...]
    caption: tuple[str, ...]
    batch: int

    @property
    def count(self) -> int:
        """Images of one grid."""
        return self.grid.rows * self.grid.columns


def wants_pictures(options: SampleOptions) -> bool:
    """Whether pictures are asked for, and no sample set. Raises UserError for settings of the one beside the other."""
    given = options.given()
    if options.classes is None:
        for name in ("grid", "trajectory"):
            if name in given:
                raise UserError(f"--{name} belongs to --classes; give the classes of the pictures, as in --classes 0,1")
        return False
    for name, remedy in (("samples", "--grid ROWSxCOLUMNS gives the number"), ("labels", "it gives the labels")):
        if name in given:
            raise UserError(f"--{name} belongs to sample sets; with --classes {remedy}")
    return True


def labels_of_classes(
    options: SampleOptions,
    protocol: Protocol,
    networks: Sequence[tuple[BackboneSpec, Mapping[str, Any]]],  # the backbones, each with its full arguments
    source_paths: Mapping[str, str],  # of a run
    owner: str,  # named in messages
) -> tuple[tuple[int, ...], tuple[tuple[str, ...], ...]]:
    """(the labels of --classes, the names of all classes). Raises UserError for an unknown class, and where there are none."""
    assert options.classes is not None
    if protocol.num_classes <= 1 or not any(arguments.get("num_classes") for _, arguments in networks):
        raise UserError(
            f"--classes: {owner} is unconditional, so its images have no class; leave out --classes, and look at the grid.png "
            "of its sample set"
        )
    known = protocol.dataset in registry.datasets
    names = registry.datasets.get(protocol.dataset).class_names(source_paths) if known else ()
    return read_classes(options.classes, names, protocol.num_classes), names


def with_grid(identity: Mapping[str, Any], grid: GridSize) -> dict[str, Any]:
    """The identity of pictures from that of a sample set, whose label policy and number of images they do not have."""
    sampling = {name: value for name, value in identity["sampling"].items() if name != "label_policy"}
    kept = {name: value for name, value in identity.items() if name != "count"}
    return json.loads(json.dumps({**kept, "sampling": sampling, "grid": str(grid)}))  # tuples become lists


def draw_pictures(
    job: PictureJob,
    make_sampler: Callable[[], Sampler],
    description: Mapping[str, Any],
    device: Callable[[], str],
    group: ProcessGroup = SINGLE_PROCESS,
) -> list[Path]:
    """Draw the pictures that do not exist yet; returns the paths of all, in the order of the classes.

    make_sampler: builds the networks; called only if a picture is missing. description: further items of the sidecars.
    device: returns the display name of the devices. Each process of a group draws some of the classes. Raises `UserError`
    if another picture is there under the name of one, and for the trajectory of a generator.
    """
    strips = job.trajectory
    for name, plan in job.plans if strips else ():
        if plan is None:
            raise UserError(f"--trajectory needs a sampler with steps, and {name} is a generator; leave it out")
        if not isinstance(plan, SamplerPlan):
            raise UserError(
                f"--trajectory shows the same steps of all images, and with {plan.name} every image has its own; leave it out"
            )
    suffixes = ("", STRIP) if strips else ("",)
    paths = [picture_path(job.folder, label, suffix) for label in job.labels for suffix in suffixes]
    # The main process decides: another machine may see the folder differently.
    there = {path for path in paths if group.broadcast(int(group.is_main and is_complete(path, job.identity)))}
    if there:
        logger.info(
            "%d of %d pictures %s already in %s", len(there), len(paths), "is" if len(there) == 1 else "are", job.folder
        )
    wanted = [
        label
        for label in job.labels
        if any(picture_path(job.folder, label, suffix) not in there for suffix in suffixes)
    ]
    if wanted:
        sampler = make_sampler()
        local = group.local_part(range(len(wanted)))
        steps = sum(1 if plan is None else plan.advances for _, plan in job.plans)
        batches = -(-job.count // job.batch)
        with Bar("pictures", len(local) * batches * steps, "steps") as bar:
            for number in local:
                label = wanted[number]
                needed = [s for s in suffixes if picture_path(job.folder, label, s) not in there]
                _draw_class(job, sampler, label, needed, description, device, bar.advance)
    group.barrier("the pictures are written")
    return paths


def _draw_class(
    job: PictureJob,
    sampler: Sampler,
    label: int,
    needed: Sequence[str],  # suffixes of the pictures to write
    description: Mapping[str, Any],
    device: Callable[[], str],
    advance: Callable[[], None],
) -> None:
    """Draw the images of one class, and write its pictures."""
    from reports.grid import write_picture

    begin = time.monotonic()
    in_strip = min(STRIP_IMAGES, job.count) if STRIP in needed else 0
    columns = _columns(job.plans) if in_strip else []
    images: list[np.ndarray] = []
    predicted: list[list[np.ndarray]] = []  # of each batch, one array for each column
    # The batches are the same whatever is needed, because their size can change last bits.
    for start in range(0, job.count if "" in needed else in_strip, job.batch):
        index = np.arange(start, min(start + job.batch, job.count), dtype=np.int64)
        labels = np.full(len(index), label, np.int64)
        count = min(max(in_strip - start, 0), len(index))
        drawn, on_the_way = sampler.trajectory(
            index, labels, [row for row, _ in columns] if count else [], count, advance
        )
        images.append(drawn)
        if count:
            predicted.append(on_the_way)
    samples = np.concatenate(images)  # (N, H, W, C)
    facts = {
        "class": {"label": label, "names": list(job.names[label]) if label < len(job.names) else []},
        "note": "a picture to look at, no sample set; image i, counted row by row from 0, is sample i of the sampling seed "
        "with this label",
        **description,
        "drawn": {"device": device(), "seconds": time.monotonic() - begin},
    }
    caption = (f"Class label = {display_name(label, job.names)}", *job.caption)
    if "" in needed:
        path = picture_path(job.folder, label)
        write_picture(samples.reshape(job.grid.rows, job.grid.columns, *samples.shape[1:]), path, caption=caption)
        write_sidecar(path, job.identity, facts)
    if in_strip:
        path = picture_path(job.folder, label, STRIP)
        tiles = [_enlarged(np.concatenate(each), samples.shape[1]) for each in zip(*predicted, strict=True)]
        headings = [*(heading for _, heading in columns), "sample"]
        write_picture(
            np.stack([*tiles, samples[:in_strip]], axis=1),  # (R, K, H, W, C)
            path,
            headings=headings,
            caption=(caption[0], "Predicted images during sampling, and the samples.", *caption[1:]),
        )
        write_sidecar(path, job.identity, {**facts, "columns": headings, "rows": [row for row, _ in columns]})


def _columns(plans: Sequence[tuple[str, AnyPlan | None]]) -> list[tuple[int, str]]:
    """(row, heading) of at most STRIP_COLUMNS rows of the plans, counted through all of them, evenly chosen with both ends."""
    rows = []
    for name, plan in plans:
        assert isinstance(plan, SamplerPlan)  # `draw_pictures` has refused others
        process = PROCESSES.get(plan.schedule)
        symbol = "t" if process is None or process.is_bounded else "sigma"
        prefix = f"{name}: " if len(plans) > 1 else ""
        rows += [f"{prefix}{symbol} = {t:.3g}" for t in plan.table.times]
    chosen = np.unique(np.linspace(0, len(rows) - 1, STRIP_COLUMNS).round().astype(int))
    return [(int(row), rows[row]) for row in chosen]


def _enlarged(images: np.ndarray, side: int) -> np.ndarray:
    """Images uint8 (N, h, w, C) of a network before an upsampler at `side` pixels, by repeating pixels: (N, H, W, C)."""
    positions = np.arange(side) * images.shape[1] // side
    return images[:, positions][:, :, positions]
