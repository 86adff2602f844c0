"""`harness run`: the main job, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli import plan as plan_command
from harness.cli.options import (
    DEFAULT_PROTOCOL,
    FOLDER,
    Counts,
    decoder_option,
    match_sampling_option,
    run_options,
    sampling_options,
)
from harness.data.images import ImageSet
from harness.data.load import source_images, training_data
from harness.engines.backend import join_processes
from harness.errors import UserError
from harness.loggers import check_installed
from harness.pipeline.evaluate import CACHE, evaluate_and_record
from harness.pipeline.judges import make_evaluator
from harness.pipeline.sample import decoder_of, sample_run
from harness.pipeline.train import RunSession, run_spec
from harness.planning.plan import evaluate_command, make_plan
from harness.planning.request import Request
from harness.runs.run import RUNS, Run


@click.command("run")
@run_options
@sampling_options
@match_sampling_option
@decoder_option
@click.option(
    "--reference",
    type=FOLDER,
    metavar="PATH",
    help="Images to judge by, as of `harness evaluate`. [default: the data's]",
)
@click.option(
    "--inception",
    "--features-weights",
    "weights",
    type=FOLDER,
    metavar="FILE",
    help="Weights of the suite's network, if it needs them.",
)
@click.option("--evaluate-at", type=Counts(), metavar="N,N,...", help="Also sample and evaluate after so many steps.")
@click.option("--fork", type=click.Path(path_type=Path), metavar="RUN", help="Begin from that run's newest checkpoint.")
@click.option("--sampling-batch", type=click.IntRange(1), help="Images a forward pass while sampling.")
@click.option("--report/--no-report", "reports", default=True, help="Write the report at the end. [default: yes]")
def command(evaluate_at: tuple[int, ...] | None, sampling_batch: int | None, reports: bool, **options: Any) -> None:
    """Train a backbone, sample it, evaluate the samples and write the report.

    Killed at any instant, the same command continues; with more --steps it goes on from where it was. Example:

        harness run --backbone dit-xl-2 --steps 400k
    """
    request = plan_command.request_of(options)
    if request.spec.kind != "denoiser":
        raise UserError(
            f"backbone {request.spec.name!r} is one part of a system and makes no images by itself: train it with "
            "`harness train`, then sample the whole with `harness sample --system`"
        )
    judge = make_evaluator(request.protocol, options["reference"], options["weights"])
    workshop = prepare(request, options)
    marks = sorted({*(evaluate_at or ()), request.recipe.steps})
    if marks[-1] > request.recipe.steps:
        raise UserError(f"--evaluate-at {marks[-1]} lies beyond the last step, {request.recipe.steps}; raise --steps")
    group, drawn = workshop.group, []
    with group.locked(workshop.folder):
        # First what may be missing, then what is measured.
        decoder = decoder_of(workshop, options["decoder"], options["device"])
        by, images = judge or (None, None)
        if by is not None and images is None:
            images = images_to_judge_by(workshop)
        run = begin(workshop, options)
        for step in marks:
            workshop.train(step)
            for steps in request.sampling.steps:
                precision = options["sampling_precision"]
                drawn.append(
                    sample_run(
                        run,
                        request,
                        step,
                        steps,
                        precision=precision,
                        batch=sampling_batch,
                        decoder=decoder,
                        group=group,
                    )
                )
            while drawn and by is not None:
                cache = run.folder.parent / CACHE
                evaluate_and_record(
                    drawn.pop(0), request.protocol, images, run.records, cache=cache, by=by, group=group
                )
    for path in drawn if group.is_main and by is None else ():
        click.echo(f"samples: {path}; measure them with: {evaluate_command(request.protocol, path.parent)}")
    if group.is_main and reports and by is not None:
        finish(run, request)


def images_to_judge_by(workshop: RunSession) -> ImageSet:
    """Those that are trained on, or those behind the latents that are."""
    if isinstance(workshop.data, ImageSet):
        return workshop.data
    return source_images(workshop.places, workshop.identity["dataset_sha256"], str(workshop.folder))


def prepare(request: Request, options: dict[str, Any]) -> RunSession:
    """Print the plan; refuse with what is missing; read the data and open the run's folder."""
    check_installed(options["loggers"])
    group = join_processes(request.framework)
    costs = make_plan(request)
    click.echo(plan_command.headline(request, options["protocol"] is None))
    click.echo(plan_command.arithmetic(costs))
    for lack in costs["lacking_judge"] if "weights" in options and options["weights"] is None else ():
        click.echo(f"note     {lack}; without them a run ends with samples", err=True)
    if costs["missing"]:
        for lack in costs["missing"]:
            click.echo(f"missing  {lack}", err=True)
        text = f"protocol {request.protocol.name!r} cannot run here, for want of what is listed above"
        if (
            request.protocol.name != DEFAULT_PROTOCOL and request.spec.family == "dit"
        ):  # whose every size fits the digits
            steps = request.recipe.steps
            text += f"; this works now: harness run --backbone {request.spec.name} --protocol digits --steps {steps}"
        raise UserError(text)
    data = training_data(request.protocol, request.data)
    folder = options["out"] or RUNS / run_spec(request, data).name
    say = lambda text: click.echo(text, err=True)  # noqa: E731
    return RunSession(request, data, folder, say, group, options["loggers"], options["mesh"])


def begin(workshop: RunSession, options: dict[str, Any]) -> Run:
    """The run, created if it is not there; what it has frozen is held against what was asked for."""
    if workshop.run is None:
        measured = workshop.measure(
            device=options["device"],
            precision=options["precision"],
            micro_batch=options["micro_batch"],
            compile=options["compile"] or "off",
        )
        if fork := options.get("fork"):
            workshop.fork(fork, measured.resolved)
        else:
            workshop.create(measured.resolved)
        click.echo(plan_command.speeds(plan_command.describe(workshop.request, measured)))
    run = workshop.run
    assert run is not None
    frozen = run.resolved
    asked = {
        "precision": None if options["precision"] == "auto" else options["precision"],
        "micro_batch": options["micro_batch"],
        "device": options["device"],
        "mesh": options["mesh"] if run.framework == "jax" else None,  # torch's may change with the number of processes
        "compile": None if options["compile"] == "auto" else options["compile"],
        "gradient_checkpointing": True if options["gradient_checkpointing"] else None,
    }
    for name, value in asked.items():
        if value is not None and value != getattr(frozen, name):
            raise UserError(
                f"{run.folder} was created with {name} {getattr(frozen, name)}, which is frozen because it decides bits; "
                f"leave out --{name.replace('_', '-')}, or make another run of it with --fork {run.folder} --out NEW"
            )
    click.echo(
        f"  run         {run.folder}  ({frozen.precision}, micro-batches of {frozen.micro_batch}, {frozen.device})"
    )
    return run


def finish(run: Run, request: Request) -> None:
    """Write the report of this run's neighbours and show the run's own rows."""
    from harness.cli.report import show

    out = run.folder.parent / "report" if run.folder.parent == RUNS else run.folder / "report"
    paths = [run.folder.parent] if run.folder.parent == RUNS else [run.folder]
    show(paths, out, protocol=request.protocol.name, only=run.folder)
