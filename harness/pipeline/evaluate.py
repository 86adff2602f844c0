"""The evaluation stage: from samples.npz to records.

A sample set that carries its sidecar says itself what it is; one from elsewhere is measured under the name it is given.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.data.images import ImageSet
from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.errors import UserError
from harness.images.open import open_images
from harness.images.source import ImageSource, from_batches
from harness.images.spool import spooled
from harness.io import files
from harness.io.progress import Stages
from harness.pipeline.sidecar_records import fields_from_sidecar, samples_sha256
from harness.protocols import Protocol, get_protocol
from harness.runs.provenance import environment, timing_of
from results.records import Environment, Evaluation, Record, Sampling
from results.store import append, load

if TYPE_CHECKING:
    from evaluators.sharded_extraction import ShardedExtraction
    from evaluators.suites import Suite


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Who measures: a suite, the weights of its features where the user brings them, and where the reference's file
    may hold statistics. device: where the features are computed, in the words of their framework. reference: that file
    as a source, for the guards (statistics in it, stored with loss). allow: guards that the user waives. say: takes
    warnings."""

    suite: Suite
    weights: Path | None = None
    statistics: Path | None = None
    device: str = "cpu"
    reference: ImageSource | None = None
    allow: tuple[str, ...] = ()
    division: ShardedExtraction | None = None  # of extraction among processes; all but the first return no records
    picture: Path | None = None  # where the samples nearest to training images are drawn
    say: Callable[[str], object] = lambda text: sys.stderr.write(f"{text}\n")

    @classmethod
    def of(cls, protocol: Protocol) -> EvaluationConfig:
        """The protocol's suite, with nothing brought."""
        from evaluators.suites import get_suite

        return cls(suite=get_suite(protocol.suite))


def evaluate_samples_file(
    path: Path,
    protocol: Protocol,
    data: ImageSet,
    *,
    cache: Path,
    judge: EvaluationConfig,
    name: str | None = None,
) -> list[Record]:
    """Measure the sample set at `path` with the suite of `judge` against the images of `data`.

    `name` is the row's name for samples without a sidecar. Refused: too few samples, other shapes, other labels.
    """
    source = open_images(path, classes=protocol.num_classes)
    _check_fit(source, protocol, judge)
    with spooled(source, cache) as images:
        about = fields_from_sidecar(path, files.sha256_file(path) if path.is_file() else images.sha256(), name)
        return _measure(images, about, protocol, data, cache=cache, judge=judge, timing=timing_of(path))


def evaluate_images(
    images: Iterable[np.ndarray],
    protocol: Protocol | str,
    data: ImageSet | None = None,
    *,
    name: str,
    count: int | None = None,
    labels: np.ndarray | None = None,
    cache: Path | None = None,
    judge: EvaluationConfig | None = None,
) -> list[Record]:
    """Measure images that a program makes: what `harness evaluate` says of the same images in a file.

    images: uint8 (n, H, W, C) arrays with values 0 to 255, any n, from a list, a generator or any other iterable; each is
    taken once and copied, so a buffer may be used again. Above 512 MiB they are kept in a nameless file in `cache`.
    protocol: or its name. data: the images to judge by; None: the protocol's data set. name: of the row. count: how many
    images are taken, so that an endless generator is fine; None: all that come. labels: int64, one an image. cache: where
    features of the reference are kept; None: nowhere. judge: None: the protocol's suite.

        records = evaluate_images(my_sampler(batch=100), "digits", name="mine", count=1000)

    Refused as in a file: too few images, another shape or type, what the guards refuse.
    """
    from harness.data.load import load_data  # which imports this module

    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    judge = judge or EvaluationConfig.of(protocol)
    data = load_data(protocol, None) if data is None else data
    source = from_batches(images, count, labels=labels, name=name)
    _check_fit(source, protocol, judge)
    with spooled(source, cache) as kept:
        about = {"system": name, "sampling": Sampling(samples_sha256=kept.sha256())}
        return _measure(kept, about, protocol, data, cache=cache, judge=judge)


def _check_fit(source: ImageSource, protocol: Protocol, judge: EvaluationConfig) -> None:
    """Before anything is read: the shape, and the number where it is known."""
    shape = (protocol.resolution, protocol.resolution, protocol.image_channels)
    if source.shape != shape:
        text = f"{source.name}: images are {source.shape}, but protocol {protocol.name!r} has {shape} (H, W, C)"
        raise UserError(f"{text}; sample at that size, or name the protocol of these (resolution)")
    if source.count is not None:
        judge.suite.check_count(source.count)


def _measure(
    source: ImageSource,
    about: dict[str, Any],
    protocol: Protocol,
    data: ImageSet,
    *,
    cache: Path | None,
    judge: EvaluationConfig,
    timing: Mapping[str, Any] | None = None,
) -> list[Record]:
    """Records of images that are held, by what is known `about` them, and of the time that they took."""
    suite = judge.suite
    suite.check_count(source.count)
    if judge.division is not None and judge.division.index:
        _contribute(source, data, cache, judge)
        return []
    guard(source, data, protocol, judge, about)
    samples = source.array()
    from evaluators.reference import build_reference, with_statistics
    from evaluators.reference_file import check_network
    from evaluators.suites import evaluate_samples

    with Stages({"metrics": "metrics"}) as progress:
        extractor = suite.features.load(judge.device, weights=judge.weights)
        if judge.statistics is not None:
            check_network(judge.statistics, extractor)
        reference = build_reference(data.images, extractor, cache=cache, progress=progress, sharding=judge.division)
        if judge.statistics is not None:
            reference = with_statistics(reference, judge.statistics)
        measurements = evaluate_samples(
            samples, reference, suite, progress=progress, picture=judge.picture, sharding=judge.division
        )
    for each in measurements:
        if each.warning:
            judge.say(f"warning ({each.metric}): {each.warning}")
    judged = Evaluation(
        suite=suite.name,
        suite_version=str(suite.version),
        features=suite.features.name,
        features_sha256=reference.extractor.sha256,
        reference_sha256=reference.sha256,
        mode=suite.mode,
    )
    return [
        Record(
            provenance="measured",
            metric=each.metric,
            value=each.value,
            low=each.low,
            high=each.high,
            interval=each.interval,
            n=each.n,
            protocol=protocol.name,
            protocol_version=str(protocol.version),
            resolution=protocol.resolution,
            dataset=protocol.dataset,
            evaluation=judged,
            environment=Environment(**environment(judge.device), **(timing or {})),
            **about,
        )
        for each in measurements
    ]


def _contribute(source: ImageSource, data: ImageSet, cache: Path | None, judge: EvaluationConfig) -> None:
    """The part of extraction that another process collects."""
    from evaluators.reference import cached_features, compute_shard, images_sha256

    assert judge.division is not None
    extractor = judge.suite.features.load(judge.device, weights=judge.weights)
    if cached_features(data.images, images_sha256(data.images), extractor, cache) is None:
        compute_shard(data.images, extractor, judge.division)
    compute_shard(source.array(), extractor, judge.division)


def guard(
    source: ImageSource, data: ImageSet, protocol: Protocol, judge: EvaluationConfig, about: dict[str, Any]
) -> None:
    """Say what is doubtful about samples and reference, and refuse what makes no sense."""
    from evaluators.guards import GuardContext, check, collect_image_stats, enforce

    context = GuardContext(
        minimum={metric.key: metric.minimum for metric in judge.suite.metrics},
        names=(judge.suite.name, about["system"]),
        classes=protocol.num_classes,
        label_policy=about["sampling"].label_policy,
        reference_statistics=judge.suite.reference_statistics == "expected" and judge.statistics is not None,
        allow=judge.allow,
    )
    if judge.reference is not None:
        reference = collect_image_stats(judge.reference)
        if reference.has_statistics and judge.statistics is None:
            text = f"{reference.name} brings mu and sigma, which suite {judge.suite.name} does not use"
            judge.say(f"warning (reference-statistics): {text}: the distance is to its {reference.count} images")
    else:
        reference = collect_image_stats(data.images, name=f"data set {data.name}", labels=data.labels)
    enforce(check(collect_image_stats(source), reference, context))


PARTS = "parts"  # below the cache: features that one process of a process group leaves for another


CACHE = "cache"  # below the folder that holds the runs: features of reference images, by content


def evaluate_and_record(
    path: Path,
    protocol: Protocol,
    data: ImageSet,
    records: Path,
    *,
    cache: Path,
    name: str | None = None,
    by: EvaluationConfig | None = None,  # None: the protocol's suite
    group: ProcessGroup = SINGLE_PROCESS,  # among which extraction is divided; the leader has the records, the others none
) -> list[Record]:
    """Measure a sample set and append its records, or find them measured."""
    from evaluators.reference import images_sha256
    from evaluators.sharded_extraction import ShardedExtraction

    by = by or EvaluationConfig.of(protocol)
    about = fields_from_sidecar(path, samples_sha256(path), name)
    brought = (
        by.weights is not None or by.statistics is not None or by.picture is not None
    )  # then it is known only when it is read, or has more to do
    found = None if brought else existing_records(records, about, protocol, by.suite, images_sha256(data.images))
    if group.broadcast(int(found is not None)):
        return found or []
    if group.size > 1:
        by = dataclasses.replace(
            by, division=ShardedExtraction(index=group.index, size=group.size, folder=cache / PARTS)
        )
    made = evaluate_samples_file(path, protocol, data, cache=cache, judge=by, name=name)
    if group.is_main:
        append(records, made)
    group.barrier("all is measured")
    if group.is_main and group.size > 1:
        files.remove(cache / PARTS)  # of an evaluation that was killed
    return made


def existing_records(
    records: Path, about: dict[str, Any], protocol: Protocol, suite: Suite, reference_sha256: str | None
) -> list[Record] | None:
    """The records of the samples that `about` describes (`evaluation.describe`), or None while a metric is missing.

    reference_sha256: of the images that they are to be judged by; None where that is known to be the run's data set.
    """
    task = (protocol.name, str(protocol.version), protocol.dataset)
    evaluate_and_record = (suite.name, str(suite.version), suite.features.name)
    found = [
        each
        for each in (load([records]).records if records.exists() else ())
        if (each.protocol, each.protocol_version, each.dataset) == task
        and all(getattr(each, field) == value for field, value in about.items())
        and (by := each.evaluation) is not None
        and (by.suite, by.suite_version, by.features) == evaluate_and_record
        and reference_sha256 in (None, by.reference_sha256)
    ]
    return found if {each.metric for each in found} >= {metric.key for metric in suite.metrics} else None
