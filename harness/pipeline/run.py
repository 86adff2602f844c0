"""The main job: train, sample, evaluate and report, from one set of options."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.data.cache_dir import features
from harness.data.images import ImageSet
from harness.data.load import source_images
from harness.errors import RunError, UserError
from harness.pipeline.evaluate import log_notes
from harness.pipeline.evaluation_config import make_evaluator
from harness.pipeline.measure import evaluate_and_record
from harness.pipeline.report import report
from harness.pipeline.sample import decoder_of, sample_run, torch_device
from harness.pipeline.train import RunSession, open_session
from harness.pipeline.training_images import compared_with, needs_training_images, with_training_images
from harness.planning.matching import request_from
from harness.planning.plan import evaluate_command
from harness.runs.run import RUNS_FOLDER, Run
from harness.runs.samples import sidecar_path
from harness.settings import RunOptions, keyword_options
from results.records import Record

if TYPE_CHECKING:
    from reports.report import ReportSummary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The results of a run.

    folder: of the run. samples: the samples.npz files of this call. records: of these sample sets. report: the report
    that was written; None: no report. evaluate_commands: if the suite needs files that were not given, the commands that
    evaluate the samples later. If there are several processes, only the main one has the report and the commands, and
    the others may have no records.
    """

    folder: Path
    records: tuple[Record, ...]
    samples: tuple[Path, ...]
    report: ReportSummary | None
    evaluate_commands: tuple[str, ...] = ()


@keyword_options(RunOptions)
def run(options: RunOptions) -> RunResult:
    """Train a backbone, sample it, evaluate the samples and write the report: the main job.

        result = harness.run(backbone="dit-xs-2", steps=800)
        result.records[0].value, result.folder

    The same call continues a run that was killed; with more steps it continues a finished run. Work that is done is not
    repeated. UserError: the request cannot be carried out; RunError: it failed while it ran (a loss that is not finite,
    a full disk). During training, Ctrl-C and SIGTERM write a checkpoint and raise KeyboardInterrupt (in the main thread).
    """
    request = request_from(options)
    if request.spec.kind != "denoiser":
        raise UserError(
            f"backbone {request.spec.name!r} is one part of a system and cannot generate images alone: train it with "
            "`harness train`, then sample the whole with `harness sample --system`"
        )
    entry = options.entry.get("features")
    evaluator = make_evaluator(request.protocol, options.reference, options.features_weights, entry)
    if evaluator is not None and evaluator.config.reference is not None:
        log_notes([evaluator.config.reference])
    session = open_session(request, options)
    milestones = sorted({*(options.evaluate_at or ()), request.recipe.steps})
    if milestones[-1] > request.recipe.steps:
        raise UserError(
            f"--evaluate-at {milestones[-1]} is beyond the last step, {request.recipe.steps}; raise --steps"
        )
    group, samples = session.group, []
    records: list[Record] = []
    with group.locked(session.folder):
        # Before the training, which takes long: these files may be missing.
        decoder = decoder_of(session, options.decoder, options.device, options.entry.get("decoder"))
        images = config = None
        if evaluator is not None:
            config = dataclasses.replace(evaluator.config, device=torch_device(session, options.device))
            if evaluator.images is None:
                images, config = compared_with(request.protocol, training_images(session), config)
            else:
                images = evaluator.images
            if evaluator.images is not None and needs_training_images(config):
                expected = session.identity["dataset_sha256"]
                config = with_training_images(config, images, expected, [lambda: training_images(session)])
        run = session.begin(options)
        for step in milestones:
            session.train(step)
            paths = [
                sample_run(
                    run, request, step, steps, precision=options.sampling_precision, batch=options.sampling_batch,
                    decoder=decoder, group=group,
                )
                for steps in request.sampling.steps
            ]  # fmt: skip
            samples += paths
            if config is None:
                continue
            assert images is not None
            for path in paths:
                group.await_file(sidecar_path(path))  # which is written last
                measured: list[Record] = []
                try:
                    evaluate_and_record(
                        path, request.protocol, images, run.records, cache=features(options.cache),
                        config=config, group=group, measured=measured,
                    )  # fmt: skip
                except RunError:  # the records cannot be written: a full disk
                    for record in measured:
                        logger.info(f"measured and not kept: {path}: {record.metric} {record.value:.6g}")
                    raise
                records += measured
    commands: list[str] = []
    run_report = None
    if group.is_main and evaluator is None:
        commands = [evaluate_command(request.protocol, path.parent) for path in samples]
    if group.is_main and evaluator is not None and options.report:
        run_report = write_run_report(run, request.protocol.name)
    return RunResult(
        folder=run.folder,
        records=tuple(records),
        samples=tuple(samples),
        report=run_report,
        evaluate_commands=tuple(commands),
    )


def training_images(session: RunSession) -> ImageSet:
    """The training images; for a run in latents, the images that the latents were made of."""
    if isinstance(session.data, ImageSet):
        return session.data
    return source_images(session.source_paths, session.identity["dataset_sha256"], str(session.folder))


def write_run_report(run: Run, protocol: str) -> ReportSummary:
    """Write the report: of all runs in runs/ if the run is there, else of this run only."""
    folder = RUNS_FOLDER if run.folder.parent == RUNS_FOLDER else run.folder
    return report(results=(folder,), out=folder / "report", protocol=protocol)
