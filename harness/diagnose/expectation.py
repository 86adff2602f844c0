"""What is expected of a run and its samples, and from where that is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from harness.diagnose.subject import Distance, Subject, find_samples, read_losses
from harness.diffusion.processes import PROCESSES
from harness.diffusion.samplers import needs_timesteps
from harness.errors import UserError
from harness.pipeline.sidecar import read_fields, samples_sha256
from harness.planning.request import IN_CONTINUOUS_TIME
from harness.runs.run import Run, recipe_identity
from results.experiments import sampling_text, student_t
from results.records import Evaluation, Record, Sampling
from results.reference_points import Quantity, ReferencePoint, find
from results.store import find_record_files, load

N, SUITE = 2, 3  # where `results.records.comparable_key` has them
SURE = 0.9975  # quantile of a new seed's distance: two-sided, one healthy seed of 200 lies outside


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """source: in words, where it comes from. None in any field: not known, so nothing is held against it.

    recipe: as in the identity of a run. sampling_steps: the numbers of sampler steps that are as expected. losses: of
    another run, at each step. distance: with its noise; of a reference point, the spread of its seeds.
    """

    source: str
    recipe: Mapping[str, Any] | None = None
    dataset_sha256: str | None = None
    losses: tuple[float, ...] = ()
    point: ReferencePoint | None = None
    sampling: Sampling | None = None
    sampling_steps: tuple[int, ...] = ()
    evaluation: Evaluation | None = None
    n: int | None = None
    distance: Distance | None = None


def expectation(subject: Subject, against: Path | None) -> Expectation:
    """What is expected: of `against`, a run, a sample set, a record file or a reference point; else of the protocol."""
    if against is None:
        return _of_protocol(subject)
    if (point := find(against)) is not None:
        return _of_point(subject, point)
    if (against / "run.json").is_file() or against.suffix == ".npz" or (against / "samples.npz").is_file():
        samples, run = find_samples(against)
        folder = samples.parent if run is None else run.folder
        records = load(find_record_files([folder])).records
        whole = run is not None and run.folder.resolve() == against.resolve()  # of its sample sets the nearest
        if whole and (wanted := _of_the_metric(subject, records)):
            return _of_records(subject, [_nearest(subject, wanted)], str(against), run, None)
        fields = read_fields(samples, samples_sha256(samples))
        sha256 = fields.sampling.samples_sha256
        mine = [each for each in records if each.sampling and each.sampling.samples_sha256 == sha256]
        return _of_records(subject, _of_the_metric(subject, mine), str(against), run, fields.sampling)
    wanted = _of_the_metric(subject, load(find_record_files([against])).records)
    if not wanted:
        raise UserError(
            f"--against {against} has no record of {subject.metric.key}; name a run, a record file or a reference point"
        )
    return _of_records(subject, [_nearest(subject, wanted)], str(against), None, None)


def _of_protocol(subject: Subject) -> Expectation:
    protocol = subject.protocol
    sampling = protocol.sampling
    sampler = sampling.sampler
    if subject.run is not None and subject.run.recipe.schedule in PROCESSES and needs_timesteps(sampler):
        sampler = IN_CONTINUOUS_TIME  # as where no sampler is named
    return Expectation(
        source=f"protocol {protocol.name}",
        recipe=recipe_identity(protocol.recipe),
        sampling=Sampling(
            sampler=sampler, steps=max(sampling.steps), eta=sampling.eta, guidance_scale=sampling.guidance_scale,
            uint8_rule=sampling.uint8_rule, clip_denoised=sampling.clip_denoised, precision="float32",
            spacing=sampling.spacing or None,
        ),
        sampling_steps=sampling.steps,
        n=protocol.samples,
    )  # fmt: skip


def _of_point(subject: Subject, point: ReferencePoint) -> Expectation:
    """Of a reference point; its sampling settings are those of the subject, where it has a distance at them."""
    run = subject.run
    if run is not None and (point.backbone, point.protocol) != (run.backbone, run.protocol.name):
        raise UserError(
            f"{point.name} is a reference point of {point.backbone} on {point.protocol}, and the run is of {run.backbone} on "
            f"{run.protocol.name}"
        )
    distance = None
    record = subject.record
    if record is not None:
        key = (subject.step, subject.metric.key, sampling_text(record), subject.config.suite.name)
        for quantity, values in point.values.items():
            if quantity.key and (quantity.step, quantity.name, quantity.sampling, quantity.key[SUITE]) == key:
                distance = _of_seeds(values)
    of_protocol = _of_protocol(subject)
    return Expectation(
        source=f"reference point {point.name} ({len(point.seeds)} seeds)", recipe=point.recipe,
        dataset_sha256=point.dataset_sha256, point=point, sampling=of_protocol.sampling,
        sampling_steps=of_protocol.sampling_steps, n=_n_of(point), distance=distance,
    )  # fmt: skip


def _of_seeds(values: tuple[float, ...]) -> Distance:
    """The mean over seeds, with the half-width of the prediction interval in which a new seed lies."""
    count = len(values)
    half = student_t(count - 1, SURE) * stdev(values) * math.sqrt(1 + 1 / count)
    return Distance(value=fmean(values), half=half)


def _n_of(point: ReferencePoint) -> int | None:
    keys: list[Quantity] = [quantity for quantity in point.values if quantity.key]
    return int(keys[0].key[N]) if keys else None


def _of_records(
    subject: Subject, records: list[Record], where: str, run: Run | None, sampling: Sampling | None
) -> Expectation:
    record = next(iter(records), None)
    distance = None
    if record is not None and (
        record.training is None or record.training.steps == subject.step or subject.step is None
    ):
        half = 0.0 if record.low is None or record.high is None else (record.high - record.low) / 2
        distance = Distance(value=record.value, half=half)
    sampling = record.sampling if record is not None and record.sampling is not None else sampling
    training = record.training if record is not None else None
    return Expectation(
        source=where,
        recipe=None if run is None else run.identity["recipe"],
        dataset_sha256=run.identity["dataset_sha256"]
        if run is not None
        else training.dataset_sha256
        if training
        else None,
        losses=() if run is None else tuple(read_losses(run)),
        sampling=sampling,
        sampling_steps=() if sampling is None or sampling.steps is None else (sampling.steps,),
        evaluation=None if record is None else record.evaluation,
        n=None if record is None else record.n,
        distance=distance,
    )


def _of_the_metric(subject: Subject, records: Iterable[Record]) -> list[Record]:
    """The records of the subject's distance, by its suite; where there are none by it, by any: the evaluator then differs."""
    found = [each for each in records if each.metric == subject.metric.key]
    suite = subject.config.suite.name
    return [each for each in found if each.evaluation and each.evaluation.suite == suite] or found


def _nearest(subject: Subject, records: list[Record]) -> Record:
    """The record whose training and sampling are nearest to the subject's."""

    def apart(record: Record) -> tuple[bool, bool, float, bool, str]:
        training, sampling, own = record.training, record.sampling, subject.fields.sampling
        steps = (sampling.steps if sampling else None) or 0
        return (
            (record.backbone or record.system) != (subject.fields.backbone or subject.fields.system),
            (training.steps if training else None) != subject.step,
            abs(steps - (own.steps or 0)),
            sampling is None or sampling.seed != own.seed,
            record.id,
        )

    return min(records, key=apart)
