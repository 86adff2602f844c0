"""The third stage: evaluate sample sets and write records.

The sidecar of a sample set states how it was made. Without a sidecar, the user gives a name.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.data.cache_dir import features
from harness.data.images import ImageSet
from harness.data.load import load_data, open_image_set, source_images
from harness.engines.backend import join_processes
from harness.errors import RunError, UserError
from harness.images.open import open_images
from harness.images.source import ImageSource
from harness.io import files
from harness.pipeline.evaluation_config import make_config, open_reference, reference_images
from harness.pipeline.measure import evaluate_and_record, open_samples
from harness.pipeline.sidecar import name_of
from harness.pipeline.training_images import needs_training_images, training_sha256, with_training_images
from harness.protocols import NO_PROTOCOL, Protocol, get_protocol, protocol_of_files
from harness.runs.run import Run, open_run
from harness.runs.samples import find_sidecar
from harness.settings import DEFAULT_PROTOCOL, EvaluateOptions, keyword_options
from reports.neighbours import is_neighbours_picture
from results.records import Record
from results.store import RECORDS_FILE, check_record_file

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Records of a sample set, their file, the name of the suite, and its note on the numbers ("": no note).

    notes: on the samples and the reference images, such as files that were left out.
    """

    records: tuple[Record, ...]
    records_file: Path
    suite: str
    note: str
    notes: tuple[str, ...] = ()


MAX_CLASSES = 1_000_000  # that labels in files may stand for


class RecordsNotWritten(RunError):
    """The record file cannot be written. result: what was measured."""

    def __init__(self, message: str, result: EvaluateResult):
        super().__init__(message)
        self.result = result


@keyword_options(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> EvaluateResult:
    """Evaluate a sample set and write its records; if they exist, return them.

    If `features_weights`, statistics from `reference`, or `neighbours` are given, the samples are always measured again.
    Without `protocol`, the protocol is that of the samples' run or sidecar. If there is none either, sizes and classes
    are those of the samples and of `reference`; without a reference, the protocol is digits. UserError: too few samples,
    shapes or labels that are not the protocol's, or samples that a guard refuses. If there are several processes, the
    main one returns the records; the others may return none.
    """
    from evaluators.suites import get_suite

    group = join_processes("torch")
    samples = options.samples
    path = samples / "samples.npz" if (samples / "samples.npz").is_file() else samples
    if not path.exists() and not any(wildcard in str(path) for wildcard in "*?["):
        raise UserError(f"no sample set at {path}; `harness sample` makes one")
    run_folder = path.resolve().parent.parent.parent  # RUN/samples/NAME/samples.npz
    run = open_run(run_folder) if (run_folder / "run.json").exists() else None
    protocol_name = options.protocol
    if protocol_name is None and run is None:
        identity = (find_sidecar(path) or {}).get("identity")
        named = identity.get("protocol") if isinstance(identity, dict) else None
        protocol_name = named if isinstance(named, str) else None
    records = options.out or (run.records if run else default_records(path))
    files.check_output(records, "--out")
    check_record_file(records)
    if options.neighbours is not None:
        check_picture(options.neighbours)
    source = None if options.reference is None else open_reference(options.reference)
    if not protocol_name and run is not None:
        protocol = run.protocol
    elif not protocol_name and options.reference is not None:
        protocol = _protocol_of_files(path, source, options.reference)
    else:
        protocol = get_protocol(protocol_name or DEFAULT_PROTOCOL)
    if options.reference is not None:
        images = reference_images(source, options.reference)
    elif options.data is None and run is not None and run.source_paths:  # in latents: the images that they were made of
        images = source_images(run.source_paths, run.identity["dataset_sha256"], str(run.folder))
    else:
        images = load_data(protocol, options.data)
    whole = images
    if options.reference is None:
        images = whole.reference(protocol.reference_images)
    suite = get_suite(options.suite or protocol.suite)
    config = make_config(
        suite, options.features_weights, options.backend, options.reference, options.device, options.entry
    )
    config = dataclasses.replace(config, reference=source, allow=options.allow, picture=options.neighbours)
    expected = run.identity["dataset_sha256"] if run is not None else training_sha256(path)
    # Samples of unknown training are compared with the protocol's data set, unless another reference is given.
    # Of a data set of which the reference is a part, the whole is looked at first.
    if needs_training_images(config) and not (expected is None and images is whole and options.reference is None):
        own = [lambda: whole] if options.reference is None else []
        config = with_training_images(config, images, expected, [*own, *_candidates(options, run, protocol, expected)])
    samples_source = open_samples(path, protocol)
    sources = [samples_source] if source is None else [samples_source, source]
    log_notes(sources)  # before what may refuse them

    def result_of(measured: list[Record]) -> EvaluateResult:
        return EvaluateResult(
            records=tuple(measured), records_file=records, suite=config.suite.name, note=config.suite.note,
            notes=log_notes(sources),
        )  # fmt: skip

    measured: list[Record] = []
    try:
        with group.collective_scope():
            evaluate_and_record(
                path, protocol, images, records, cache=features(options.cache), name=options.name, config=config,
                group=group, source=samples_source, measured=measured,
            )  # fmt: skip
    except RunError as error:
        if not measured:
            raise
        raise RecordsNotWritten(str(error), result_of(measured)) from error
    return result_of(measured)


def default_records(path: Path) -> Path:
    """The record file of samples that belong to no run: beside their file; of a folder or a pattern, whose neighbours may
    be classes, in the working folder.
    """
    return path.with_name(RECORDS_FILE) if path.is_file() else Path(RECORDS_FILE)


def check_picture(path: Path) -> None:
    """UserError where the picture of --neighbours cannot be written."""
    files.check_output(path, "--neighbours")
    if path.suffix.lower() != ".png":
        raise UserError(f"--neighbours {path}: the picture is a PNG; give it the ending .png")
    if path.exists() and not is_neighbours_picture(path):
        raise UserError(f"--neighbours {path} exists and is no picture of neighbours; name another file")


def log_notes(sources: Iterable[ImageSource]) -> tuple[str, ...]:
    """The notes of the sources, each with the name of its source; a source's notes are logged once."""
    notes = []
    for source in sources:
        for text in source.notes:
            notes.append(f"{source.name}: {text}")
            if source.first_time(text):
                logger.info(f"note: {notes[-1]}")
    return tuple(notes)


def _protocol_of_files(path: Path, reference: ImageSource | None, name: Path) -> Protocol:
    """What ADM's evaluator takes from its two files. reference: the images of `name`; None: it has statistics alone."""
    samples = open_images(path, any_arr_1=True)
    labels = [each.labels for each in (samples, reference) if each is not None and each.labels is not None]
    known = bool(labels) and all(int(each.min()) >= 0 for each in labels)  # -1 is a usual label of unlabelled images
    classes = 1 + max(int(each.max()) for each in labels) if known else 1
    if classes > MAX_CLASSES:
        raise UserError(
            f"{path} and {name}: label {classes - 1} is no number of a class; give the protocol of these images, or files "
            "without labels"
        )
    return protocol_of_files(name_of(name.resolve()), samples.shape, classes, get_protocol(DEFAULT_PROTOCOL).suite)


def _candidates(
    options: EvaluateOptions, run: Run | None, protocol: Protocol, expected: str | None
) -> list[Callable[[], ImageSet]]:
    """Functions that load images which may be the training images. expected: their hash; None: not known.

    Raises UserError if --data names them beside a --reference, and holds others.
    """
    if options.data is not None and options.reference is not None:
        # without a protocol, the data set has no name of which the folder could be
        without = protocol.name == NO_PROTOCOL
        data = open_image_set(str(options.data)).images if without else load_data(protocol, options.data)
        if expected not in (None, data.sha256):
            raise UserError(
                f"--data {options.data} holds other images ({data.sha256[:12]}) than the samples' network was trained on "
                f"({expected[:12]}), and beside --reference it names these; give the folder that the run was trained on"
            )
        return [lambda: data]
    if expected is None:
        return []
    known = [] if run is None else [lambda: source_images(run.source_paths, expected, str(run.folder))]
    return [*known, lambda: load_data(protocol, None)]
