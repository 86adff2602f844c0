"""What is diagnosed: a sample set, and everything on disk that says how it was made and measured."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.data.cache_dir import features
from harness.data.images import ImageSet
from harness.data.load import load_data, source_images
from harness.errors import UserError
from harness.images.open import open_images
from harness.pipeline.evaluation_config import EvaluationConfig, make_config, open_reference, reference_images
from harness.pipeline.sidecar import RecordFields, read_fields, samples_sha256
from harness.protocols import Protocol, get_protocol
from harness.runs.run import Run, open_run
from harness.runs.samples import find_sidecar
from harness.settings import DEFAULT_PROTOCOL
from results.records import Record
from results.store import find_record_files, load

if TYPE_CHECKING:
    from evaluators.features.spec import FeatureExtractor
    from evaluators.metrics import Metric
    from evaluators.reference import Reference

MAX_IMAGES = 10_000  # of a data set that are looked at, evenly spaced


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A distance with the half-width of its 95 % interval over the draw of the samples."""

    value: float
    half: float


@dataclass(kw_only=True)
class Subject:
    """A sample set and what belongs to it.

    path: of the samples. images: uint8 (N, H, W, C). labels: int64 (N,) or None. records: measured of these samples.
    training: the images that the network was trained on, of which the hash is checked; None: not at hand. reference: the
    images that samples should be compared with. config: the suite.
    """

    path: Path
    images: np.ndarray
    labels: np.ndarray | None
    protocol: Protocol
    run: Run | None
    sidecar: dict[str, Any] | None
    fields: RecordFields
    records: tuple[Record, ...]
    training: ImageSet | None
    reference: ImageSet
    config: EvaluationConfig
    cache: Path | None

    @property
    def step(self) -> int | None:
        """Training steps of the sampled checkpoint."""
        return self.fields.training.steps if self.fields.training else None

    @property
    def metric(self) -> Metric:
        """The distance by which the stages are weighed: FID or FD, else the suite's first metric where lower is better."""
        metrics = self.config.suite.metrics
        found = [each for each in metrics if each.key in ("fid", "fd")] or [
            e for e in metrics if not e.higher_is_better
        ]
        if not found:
            raise UserError(
                f"suite {self.config.suite.name} has no distance; give a --suite with one, such as embedded"
            )
        return found[0]

    @property
    def record(self) -> Record | None:
        """The newest record of the distance of these samples by the suite; None: they were not evaluated."""
        suite = self.config.suite.name
        found = [each for each in self.records if each.metric == self.metric.key and each.evaluation]
        found = [each for each in found if each.evaluation and each.evaluation.suite == suite]
        return max(found, key=lambda each: ((each.environment and each.environment.time) or "", each.id), default=None)

    @functools.cached_property
    def extractor(self) -> FeatureExtractor:
        """The suite's feature network."""
        config = self.config
        return config.suite.features.load(config.device, weights=config.weights, entry=config.entry)

    @property
    def losses(self) -> list[float]:
        """The first term of the training loss at each step; empty without a run."""
        return [] if self.run is None else read_losses(self.run)

    @functools.cached_property
    def built_reference(self) -> Reference:
        """The reference's features."""
        from evaluators.reference import build_reference

        return build_reference(self.reference.images, self.extractor, cache=self.cache)

    def distance(self, images: np.ndarray) -> Distance:
        """The distance of images uint8 (N, H, W, C) to the reference."""
        from evaluators.suites import evaluate_samples

        suite = dataclasses.replace(self.config.suite, metrics=(self.metric,))
        (found,) = evaluate_samples(images, self.built_reference, suite)
        half = 0.0 if found.low is None or found.high is None else (found.high - found.low) / 2
        return Distance(value=found.value, half=half)

    @functools.cached_property
    def own_distance(self) -> Distance:
        """The distance of the samples."""
        return self.distance(self.images)

    def can_count(self, count: int) -> bool:
        """Whether the distance takes so few images."""
        return count >= self.metric.minimum


def read_losses(run: Run) -> list[float]:
    """The first term of the loss (mse) at each step from 1; steps of a log that was cut in the middle are not read."""
    losses: list[float] = []
    if not run.log.exists():
        return losses
    for line in run.log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            term = next(value for name, value in entry.items() if name != "step")
            if entry["step"] != len(losses) + 1:
                break
        except (ValueError, KeyError, StopIteration):
            break
        losses.append(float(term))
    return losses


def find_samples(path: Path) -> tuple[Path, Run | None]:
    """(samples, their run or None). Of a run: those of the longest training, then of the most sampler steps and images."""
    if (path / "run.json").is_file():
        run = open_run(path)
        sets = [each for each in (path / "samples").glob("*/samples.npz") if find_sidecar(each) is not None]
        if not sets:
            raise UserError(f"{path} has no sample set yet; `harness sample --run {path}` makes one")
        return max(sets, key=_size), run
    samples = path / "samples.npz" if (path / "samples.npz").is_file() else path
    if not samples.exists():
        raise UserError(f"{path} is neither a run nor a sample set; name a run's folder or a samples.npz")
    folder = samples.resolve().parent.parent.parent
    return samples, open_run(folder) if (folder / "run.json").is_file() else None


def _size(samples: Path) -> tuple[int, int, int, str]:
    identity = (find_sidecar(samples) or {}).get("identity", {})
    steps = identity.get("sampling", {}).get("steps") or 0
    return identity.get("training_steps", 0), steps, identity.get("count", 0), str(samples)


def open_subject(
    path: Path,
    *,
    protocol: str | None = None,
    data: Path | None = None,
    reference: Path | None = None,
    suite: str | None = None,
    weights: Path | None = None,
    entry: str | None = None,
    cache: Path | None = None,
) -> Subject:
    """The subject at `path`, a run or a sample set. Options as of `harness evaluate`.

    UserError where something cannot be read, or where `data` are not the images that the run was trained on.
    """
    from evaluators.suites import get_suite

    samples, run = find_samples(path)
    if run is not None and protocol is None:
        loaded = run.protocol
    else:
        named = ((find_sidecar(samples) or {}).get("identity") or {}).get("protocol")
        loaded = get_protocol(protocol or (named if isinstance(named, str) else DEFAULT_PROTOCOL))
    source = open_images(samples, classes=loaded.num_classes or None)
    fields = read_fields(samples, samples_sha256(samples))
    training = _training_images(run, loaded, data)
    if reference is not None:
        references = reference_images(open_reference(reference), reference)
        if not len(references):
            raise UserError(f"--reference {reference} holds statistics and no images, which diagnose needs")
    else:
        whole = load_data(loaded, data) if training is None else training
        references = whole.reference(loaded.reference_images)  # as `harness evaluate` compares with
    config = make_config(get_suite(suite or loaded.suite), weights, "torch", None, entry=entry)
    return Subject(
        path=samples, images=source.array(), labels=source.labels, protocol=loaded, run=run,
        sidecar=find_sidecar(samples), fields=fields, records=_records_of(samples, run, fields), training=training,
        reference=references, config=config, cache=features(cache),
    )  # fmt: skip


def _training_images(run: Run | None, protocol: Protocol, data: Path | None) -> ImageSet | None:
    """The images that the run was trained on; None without a run, or where they are not at hand."""
    if run is None:
        return None
    expected = run.identity["dataset_sha256"]
    if data is not None:
        images = load_data(protocol, data)
        if images.sha256 != expected:
            raise UserError(
                f"--data {data} holds other images ({images.sha256[:12]}) than {run.folder} was trained on ({expected[:12]})"
            )
        return images
    try:
        images = (
            source_images(run.source_paths, expected, str(run.folder))
            if run.source_paths
            else load_data(protocol, None)
        )
    except UserError:
        return None
    return images if images.sha256 == expected else None


def _records_of(samples: Path, run: Run | None, fields: RecordFields) -> tuple[Record, ...]:
    """The records of these samples, beside them or in their run."""
    places = [samples.with_name("records.jsonl"), *([] if run is None else [run.records])]
    found = load(find_record_files([place for place in places if place.is_file()])).records
    sha256 = fields.sampling.samples_sha256
    return tuple(record for record in found if record.sampling and record.sampling.samples_sha256 == sha256)


def spread(images: np.ndarray, limit: int = MAX_IMAGES) -> np.ndarray:
    """At most `limit` of the images, evenly spaced, so that no order of classes matters."""
    return images if len(images) <= limit else images[np.linspace(0, len(images) - 1, limit).astype(np.int64)]
