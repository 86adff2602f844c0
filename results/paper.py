"""The numbers printed in the DiT paper (arXiv:2212.09748): Tables 1-6 and section 5.2, from `published/*.csv`."""

import csv
import dataclasses
import functools
from importlib import resources
from typing import Any, TypeVar

from harness.compute import TRAINING_FACTOR
from results.records import Evaluation, Record, Sampling, Source, Training

FILES = (*(f"table-{number}.csv" for number in range(1, 7)), "section-5.2.csv")
DATASET = "imagenet"
SUITE = "adm"  # "all values reported in this paper are obtained ... using ADM's TensorFlow evaluation suite" (sec. 4)
EMA_DECAY = 0.9999  # sec. 4
Number = TypeVar("Number", int, float)
_INTEGERS = ("resolution", "n", "training_steps", "batch", "sampling_steps")
_FLOATS = ("learning_rate", "guidance_scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedValue:
    """One cell of a table. "" and None: the paper does not state it."""

    table: str  # "Table 2", "Section 5.2"
    row: str
    column: str
    value: str  # as printed; "" for a dash or a blank
    unit: str
    metric: str  # the metric's key in records, "" where the cell is no metric
    system: str
    backbone: str
    block: str  # conditioning block of a DiT
    resolution: int | None  # side of an image in pixels
    n: int | None  # number of images evaluated
    training_steps: int | None
    batch: int | None
    learning_rate: float | None
    sampler: str
    sampling_steps: int | None
    guidance_scale: float | None
    decoder: str


@functools.cache
def values() -> tuple[PublishedValue, ...]:
    """Every cell, in the paper's order."""
    folder = resources.files("results").joinpath("published")
    cells = []
    for name in FILES:
        lines = folder.joinpath(name).read_text(encoding="utf-8").splitlines(keepends=True)
        for line in csv.DictReader(lines):
            fields: dict[str, Any] = dict(line)
            fields |= {key: int(line[key]) if line[key] else None for key in _INTEGERS}
            fields |= {key: float(line[key]) if line[key] else None for key in _FLOATS}
            cells.append(PublishedValue(**fields))
    return tuple(cells)


@functools.cache
def records() -> tuple[Record, ...]:
    """The cells that are metrics, as published records, in the paper's order."""
    return tuple(_record(cell) for cell in values() if cell.metric and cell.value)


@functools.cache
def printed() -> dict[Source, str]:
    """The place of a cell in the paper -> its text as printed, trailing zeros included; "" for a dash or a blank."""
    return {Source(table=cell.table, row=cell.row, column=cell.column): cell.value for cell in values()}


@functools.cache
def gflops() -> dict[tuple[str, int | None], float]:
    """(backbone, resolution) -> Gflops per forward pass, from Tables 4 and 6; for a cascade, the sum over its networks."""
    columns = ("Flops (G)", "Total Flops (G)")
    return {(cell.backbone, cell.resolution): float(cell.value) for cell in values() if cell.column in columns}


@functools.cache
def params() -> dict[tuple[str, int | None], int]:
    """(backbone, resolution) -> parameters, from Table 4, which prints whole millions."""
    cells = (cell for cell in values() if cell.column == "Params (M)")
    return {(cell.backbone, cell.resolution): int(cell.value) * 1_000_000 for cell in cells}


def _stated(value: Number | None, cell: PublishedValue) -> Number:
    """`value`, a number that the published tables must state for this cell. Raises ValueError for None."""
    if value is None:
        raise ValueError(f"{cell.table}, {cell.row}, {cell.column}: a number is missing in results/published")
    return value


def _record(cell: PublishedValue) -> Record:
    """The published record of a cell that is a metric."""
    # Table 6 counts diffusion models alone, so the guidance classifier is left out of the key.
    networks = "+".join(part for part in cell.backbone.split("+") if "-classifier-" not in part)
    forward_gflops = gflops().get((networks, cell.resolution))
    is_dit = cell.backbone.startswith("dit-")
    return Record(
        provenance="published",
        metric=cell.metric,
        value=float(cell.value),
        n=_stated(cell.n, cell),
        protocol=f"{DATASET}-{cell.resolution}",
        resolution=_stated(cell.resolution, cell),
        dataset=DATASET,
        system=cell.system,
        backbone=cell.backbone,
        kind="generator" if cell.backbone.startswith(("biggan", "stylegan")) else "denoiser",
        framework="jax" if is_dit else None,
        params=params().get((cell.backbone, cell.resolution)),
        gflops=forward_gflops,
        training=_training(cell, forward_gflops) if is_dit else None,
        sampling=_sampling(cell, forward_gflops),
        evaluation=Evaluation(suite=SUITE, features="inception"),
        source=Source(table=cell.table, row=cell.row, column=cell.column),
    )


def _training(cell: PublishedValue, forward_gflops: float | None) -> Training:
    """The training of a DiT: steps and batch as printed, images and Gflops computed from them."""
    images = _stated(cell.training_steps, cell) * _stated(cell.batch, cell)
    return Training(
        steps=cell.training_steps,
        images=images,
        gflops=_stated(forward_gflops, cell) * images * TRAINING_FACTOR,
        batch=cell.batch,
        learning_rate=cell.learning_rate,
        ema_decay=EMA_DECAY,
    )


def _sampling(cell: PublishedValue, forward_gflops: float | None) -> Sampling | None:
    """The sampling that the cell states; None if it states neither steps nor guidance."""
    if cell.sampling_steps is None:
        return None if cell.guidance_scale is None else Sampling(guidance_scale=cell.guidance_scale)
    guided = cell.guidance_scale is not None
    evaluations = cell.sampling_steps * (2 if guided else 1)  # one with and one without the label
    return Sampling(
        sampler=cell.sampler,
        steps=cell.sampling_steps,
        evaluations=evaluations,
        guidance_scale=cell.guidance_scale,
        guidance_channels="first-3" if guided else None,
        gflops_per_image=_stated(forward_gflops, cell) * evaluations,
        decoder=cell.decoder,
    )
