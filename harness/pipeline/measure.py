"""Measure sample sets: guards, features, metrics and their records; of a file, or of images of a program."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.data.images import ImageSet
from harness.data.load import load_data
from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.errors import UserError, shown
from harness.images.open import open_images
from harness.images.source import ImageSource, from_batches
from harness.images.spool import spooled
from harness.io import files
from harness.io.progress import Stages
from harness.pipeline.evaluation_config import EvaluationConfig
from harness.pipeline.sidecar import RecordFields, read_fields, samples_sha256
from harness.pipeline.training_images import compared_with, needs_training_images, with_training_images
from harness.protocols import NO_PROTOCOL, Protocol, get_protocol
from harness.runs.provenance import Timing, environment, timing_of
from results.records import Environment, Evaluation, Record, Sampling
from results.store import append, load

if TYPE_CHECKING:
    from evaluators.guards import ImageStats
    from evaluators.suites import Suite

logger = logging.getLogger(__name__)


def open_samples(path: Path, protocol: Protocol) -> ImageSource:
    """The samples at `path`; their labels must be classes of the protocol, if it has classes."""
    of_files = protocol.name == NO_PROTOCOL
    return open_images(path, classes=None if of_files else protocol.num_classes or None, any_arr_1=of_files)


def evaluate_samples_file(
    path: Path,
    protocol: Protocol,
    data: ImageSet,
    *,
    cache: Path,
    config: EvaluationConfig,
    name: str | None = None,
    source: ImageSource | None = None,
) -> list[Record]:
    """Records of the sample set at `path`, evaluated with the suite of `config` against the images of `data`.

    source: the samples, if they are open already. `name` is the row name of samples without a sidecar. Raises
    `UserError` for too few samples, and for shapes or labels that are not the protocol's.
    """
    source = source or open_samples(path, protocol)
    _check_fit(source, protocol, config)
    with spooled(source, cache) as images:
        # the hash that `samples_sha256` gives, without reading a folder a second time
        sha256 = files.sha256_file(path) if path.is_file() else images.sha256()
        about = read_fields(path, sha256, name)
        return _measure(images, about, protocol, data, cache=cache, config=config, timing=timing_of(path))


def evaluate_images(
    images: Iterable[np.ndarray],
    protocol: Protocol | str,
    data: ImageSet | None = None,
    *,
    name: str,
    count: int | None = None,
    labels: np.ndarray | None = None,
    cache: Path | None = None,
    config: EvaluationConfig | None = None,
) -> list[Record]:
    """Records of images that a program makes. Nothing is written to a record file.

    The numbers are those of `harness evaluate` for these images in a file. The ids of the records differ, because
    `samples_sha256` is here the hash of the pixels, not of a file.

    images: uint8 arrays (n, H, W, C) with values 0 to 255, any n, from a list, a generator or any other iterable; a
    generator may reuse its buffer. Images of more than 512 MiB in total are stored in a temporary file, in `cache` or
    in the system's folder. protocol: a protocol or its name. data: the reference images; None: the protocol's data set.
    Copies are sought in `config.training`, else in the protocol's data set; where neither is at hand, a warning names the
    metrics that are left out. name: of the row. count: number of images to take, for
    example from an endless generator; None: all. labels: integers, one for each image. cache: folder for features of the
    reference; None: they are not stored. config: None: the protocol's suite.

        records = evaluate_images(my_sampler(batch=100), "digits", name="mine", count=1000)

    Raises `UserError` as for a file: too few images, another shape or dtype, or images that a guard refuses.
    """
    protocol = protocol if isinstance(protocol, Protocol) else get_protocol(protocol)
    config = EvaluationConfig.of(protocol) if config is None else config
    for value, kind, what in ((name, str, "name"), (data, ImageSet, "data"), (config, EvaluationConfig, "config")):
        if not isinstance(value, kind) and (what == "name" or value is not None):
            raise UserError(f"{what} = {shown(value)} is no {kind.__name__}")
    source = from_batches(images, count, labels=labels, name=name)
    _check_fit(source, protocol, config)
    if data is None:
        data, config = compared_with(protocol, load_data(protocol, None), config)
    elif config.training is None and needs_training_images(config):
        told = with_training_images(config, data, None, [lambda: load_data(protocol, None)])
        config = config if told.training is not None and told.training.sha256 == data.sha256 else told
    with spooled(source, cache) as spool:
        about = RecordFields(system=name, sampling=Sampling(samples_sha256=spool.sha256()))
        return _measure(spool, about, protocol, data, cache=cache, config=config)


def _check_fit(source: ImageSource, protocol: Protocol, config: EvaluationConfig) -> None:
    """Raise `UserError` for a wrong shape, or for too few images if their number is known. Reads no image."""
    shape = (protocol.resolution, protocol.resolution, protocol.image_channels)
    if source.shape != shape and protocol.name != NO_PROTOCOL:
        text = f"{source.name}: images are {source.shape}, but protocol {protocol.name!r} has {shape} (H, W, C)"
        raise UserError(f"{text}; sample at that size, or give the protocol of these images (resolution)")
    if source.count is not None:
        config.suite.check_count(source.count)


def _measure(
    source: ImageSource,
    about: RecordFields,
    protocol: Protocol,
    data: ImageSet,
    *,
    cache: Path | None,
    config: EvaluationConfig,
    timing: Timing | None = None,
) -> list[Record]:
    """Records of spooled images; `about` and `timing` say how they were made. Empty in all but the main process."""
    suite = config.suite
    assert source.count is not None, source  # known for spooled images
    suite.check_count(source.count)
    if config.sharding is not None and config.sharding.index > 0:  # not the main process
        _compute_shard(source, data, cache, config)
        return []
    stats = guard(source, data, protocol, config, about)
    # Blocks of the error bars follow how the samples were drawn. Where that is not recorded, class counts that differ by
    # at most 1 tell it: random labels have them by chance once in many thousand sets of ten classes.
    labels = stats.labels if about.sampling.label_policy in (None, "balanced") else None
    copies = stats.hashes if stats.distinct < stats.count else None
    samples = source.array()
    from evaluators.products import products_on
    from evaluators.reference import build_reference, statistics_alone, with_statistics
    from evaluators.reference_file import check_network
    from evaluators.suites import evaluate_samples

    with Stages({"metrics": "metrics"}) as progress, ExitStack() as products:
        extractor = suite.features.load(config.device, weights=config.weights, entry=config.entry)
        products.enter_context(products_on(config.device))  # after the extractor, which loads the framework
        if config.statistics is not None:
            check_network(config.statistics, extractor)
        if len(data):
            reference = build_reference(
                data.images, extractor, cache=cache, progress=progress, sharding=config.sharding
            )
            if config.statistics is not None:
                reference = with_statistics(reference, config.statistics)
        else:
            assert config.statistics is not None
            reference = statistics_alone(config.statistics, extractor)
        measurements = evaluate_samples(
            samples,
            reference,
            suite,
            training=None if config.training is None else config.training.images,
            labels=labels,
            copies=copies,
            progress=progress,
            picture=config.picture,
            sharding=config.sharding,
        )
    for measurement in measurements:
        if measurement.warning:
            logger.warning(f"{measurement.metric}: {measurement.warning}")
    evaluation = Evaluation(
        suite=suite.name,
        suite_version=str(suite.version),
        features=suite.features.name,
        features_sha256=reference.extractor.sha256,
        reference_sha256=reference.sha256,
        mode=suite.mode,
    )
    searching = {metric.key for metric in suite.metrics if metric.needs_training}
    plugins = {metric.key: suite.plugins_sha256(metric) for metric in suite.metrics}
    about_here = environment(config.device)
    codes = [code for metric in suite.metrics for code in suite.plugins(metric).values()]
    about_here["versions"] |= {code.name: code.version or code.sha256[:12] for code in codes}
    of_training = dataclasses.replace(evaluation, training_sha256=config.training_sha256)
    return [
        Record(
            provenance="measured",
            metric=measurement.metric,
            value=measurement.value,
            higher_is_better=measurement.higher_is_better,
            low=measurement.low,
            high=measurement.high,
            interval=measurement.interval,
            n=measurement.n,
            protocol=protocol.name,
            protocol_version=_version(protocol),
            resolution=protocol.resolution,
            dataset=protocol.dataset,
            evaluation=dataclasses.replace(
                of_training if measurement.metric in searching else evaluation,
                code_sha256=plugins.get(measurement.metric),
            ),
            environment=Environment(**about_here, **(timing or {})),
            **about.arguments(),
        )
        for measurement in measurements
    ]


def _version(protocol: Protocol) -> str | None:
    """The version of the protocol, as records state it; None without a protocol."""
    return None if protocol.name == NO_PROTOCOL else str(protocol.version)


def _compute_shard(source: ImageSource, data: ImageSet, cache: Path | None, config: EvaluationConfig) -> None:
    """Compute this process's part of the features and store it in the cache, where the main process collects it."""
    from evaluators.reference import cached_features, compute_shard, images_sha256

    assert config.sharding is not None
    extractor = config.suite.features.load(config.device, weights=config.weights, entry=config.entry)
    if len(data) and cached_features(data.images, images_sha256(data.images), extractor, cache) is None:
        compute_shard(data.images, extractor, config.sharding)
    compute_shard(source.array(), extractor, config.sharding)


def guard(
    source: ImageSource, data: ImageSet, protocol: Protocol, config: EvaluationConfig, about: RecordFields
) -> ImageStats:
    """Run the guards (`evaluators.guards`): log their warnings, and raise `UserError` if one refuses the evaluation.

    Returns the statistics of the samples' pixels.
    """
    from evaluators.guards import GuardContext, check, collect_image_stats, enforce

    context = GuardContext(
        minimum={metric.key: metric.minimum for metric in config.suite.metrics},
        names=(config.suite.name, about.system),
        classes=protocol.num_classes if protocol.num_classes > 1 or protocol.name != NO_PROTOCOL else None,
        label_policy=about.sampling.label_policy,
        reference_statistics=config.suite.reference_statistics == "expected" and config.statistics is not None,
        reference_is_file=config.reference is not None,
        allow=config.allow,
    )
    reference = None  # statistics alone
    if config.reference is not None:
        reference = collect_image_stats(config.reference)
        if reference.has_statistics and config.statistics is None:
            text = f"{reference.name} has mu and sigma, which suite {config.suite.name} does not use"
            logger.warning(f"reference-statistics: {text}: the distance is to its {reference.count} images")
    elif len(data):
        reference = collect_image_stats(data.images, name=f"data set {data.name}", labels=data.labels)
    samples = collect_image_stats(source)
    enforce(check(samples, reference, context))
    return samples


def evaluate_and_record(
    path: Path,
    protocol: Protocol,
    data: ImageSet,
    records: Path,
    *,
    cache: Path,
    name: str | None = None,
    config: EvaluationConfig | None = None,  # None: the protocol's suite
    group: ProcessGroup = SINGLE_PROCESS,  # its processes share the extraction; the others may return no records
    source: ImageSource | None = None,  # the samples, if they are open already
    measured: list[Record] | None = None,  # gets the records, also where they cannot be written
) -> list[Record]:
    """The records of a sample set: those in the file `records`, or else new ones, which are appended to it."""
    measured = [] if measured is None else measured
    from evaluators.reference import images_sha256
    from evaluators.sharded_extraction import ShardedExtraction

    config = EvaluationConfig.of(protocol) if config is None else config
    sha256 = samples_sha256(path) if source is None or path.is_file() else source.sha256()
    about = read_fields(path, sha256, name)
    # Which weights or statistics a file of the user holds is known only after reading it; a picture is always drawn.
    of_files = (config.weights, config.entry, config.statistics, config.picture)
    must_measure = any(each is not None for each in of_files)
    existing = None
    if not must_measure:
        reference = images_sha256(data.images)
        existing = existing_records(records, about, protocol, config.suite, reference, config.training_sha256)
    if group.broadcast(int(existing is not None)):
        measured += existing or []
        if existing:
            logger.info(f"already measured: {path} by suite {config.suite.name}; nothing is computed")
        return measured
    shards = records.with_name(f".{records.name}.parts")  # features that the other processes compute for the main one
    if group.size > 1:
        sharding = ShardedExtraction(index=group.index, size=group.size, folder=shards)
        config = dataclasses.replace(config, sharding=sharding)
    measured += evaluate_samples_file(path, protocol, data, cache=cache, config=config, name=name, source=source)
    if group.is_main:
        append(records, measured)
    group.barrier("all is measured")
    if group.is_main and group.size > 1:
        files.remove(shards)  # it may hold parts of an evaluation that was killed
    return measured


def existing_records(
    records: Path,
    about: RecordFields,
    protocol: Protocol,
    suite: Suite,
    reference_sha256: str | None,
    training_sha256: str | None = None,
) -> list[Record] | None:
    """The records in the file `records` of the samples described by `about`; None if a metric of the suite is missing.

    about: from `read_fields`. reference_sha256: of the reference images; None: records of any reference match, and metrics
    that need the training images may be missing. training_sha256: as in `results.records.Evaluation`.
    """
    order = [metric.key for metric in suite.metrics]
    searching = {metric.key for metric in suite.metrics if metric.needs_training}
    needed = set(order) - (searching if reference_sha256 is None else set())
    plugins = {metric.key: suite.plugins_sha256(metric) for metric in suite.metrics}  # edited code measures anew
    measured_on = (protocol.name, _version(protocol), protocol.dataset)
    measured_by = (suite.name, str(suite.version), suite.features.name)
    matching = [
        record
        for record in (load([records]).records if records.exists() else ())
        if (record.protocol, record.protocol_version, record.dataset) == measured_on
        and all(getattr(record, field) == value for field, value in about.arguments().items())
        and (evaluation := record.evaluation) is not None
        and (evaluation.suite, evaluation.suite_version, evaluation.features) == measured_by
        and evaluation.code_sha256 == plugins.get(record.metric)
        and reference_sha256 in (None, evaluation.reference_sha256)
        and (
            reference_sha256 is None
            or evaluation.training_sha256 == (training_sha256 if record.metric in searching else None)
        )
    ]
    if not {record.metric for record in matching} >= needed:
        return None
    # As a new evaluation gives them: in the suite's order, without metrics of other suites on the same features.
    return sorted((each for each in matching if each.metric in order), key=lambda record: order.index(record.metric))
