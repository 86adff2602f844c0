"""`harness sample`: the second stage of run, or a system with weights from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli.options import (
    FOLDER,
    Count,
    Setting,
    decoder_option,
    match_sampling_option,
    only_one,
    sampling_options,
)
from harness.engines.backend import join_processes
from harness.errors import UserError
from harness.pipeline.sample import decoder_of, sample_run
from harness.planning.matching import matched
from harness.planning.request import request_of_run
from harness.protocols import get_protocol
from harness.runs.run import RUNS, open_run

OF_A_RUN = (  # what a system fixes by being one
    "sampler", "eta", "guidance_scale", "guidance_channels", "label_policy", "match_sampling",
)  # fmt: skip


@click.command("sample")
@click.option("--run", "folder", type=FOLDER, metavar="DIR", help="A trained run.")
@click.option("--step", type=Count(), help="Which snapshot of the run. [default: the last one]")
@click.option("--system", metavar="NAME|FILE.toml", help="Instead of --run: a name of `harness list systems`.")
@click.option(
    "--weights", type=Setting("PART=PATH", "base=FILE"), multiple=True, metavar="PART=PATH",
    help="Weights of a part of the system (base, classifier, upsampler, upsampler-2, decoder): a checkpoint or a run. Repeatable.",
)  # fmt: skip
@sampling_options
@match_sampling_option
@decoder_option
@click.option("--batch", type=click.IntRange(1), help="Images a forward pass.")
@click.option(
    "--compile",
    type=click.Choice(["on", "off"]),
    help="torch.compile, recorded with the samples. [default: as the run was created; off for a system]",
)
@click.option("--framework", type=click.Choice(["torch", "jax"]), help="Of a system. [default: torch]")
@click.option("--device", metavar="NAME", help="Of a system: cpu, cuda. [default: an accelerator if there is one]")
@click.option("--out", type=FOLDER, metavar="DIR", help="Of a system. [default: runs/systems]")
def command(folder: Path | None, system: str | None, weights: tuple[tuple[str, str], ...], **options: Any) -> None:
    """Draw samples: samples.npz in ADM's layout, a sidecar that says how, and a grid to look at. Examples:

    \b
        harness sample --run runs/digits-dit-xs-2-seed0 --samples 10k
        harness sample --system adm-g-256 --weights base=256x256_diffusion.pt \\
                       --weights classifier=256x256_classifier.pt
    """
    if (folder is None) == (system is None):
        raise UserError("give either --run DIR or --system NAME (see `harness list systems`)")
    if folder is not None:
        _sample_run(folder, weights, options)
    else:
        _sample_system(system or "", weights, options)


def _sample_run(folder: Path, weights: tuple[tuple[str, str], ...], options: dict[str, Any]) -> None:
    for name, given in (("weights", weights), *((each, options[each]) for each in ("framework", "device", "out"))):
        if given:
            raise UserError(f"--{name} belongs to --system; a run has its own")
    run = open_run(folder)
    if not (step := options["step"] or max(run.ema_checkpoint_steps(), default=0)):
        raise UserError(f"{folder} has no snapshot yet; train it to the end with `harness train` first")
    only_one(
        {"--sampling-steps": options["sampling_steps"], "--match-sampling": options["match_sampling"]},
        "the sampling steps",
    )
    drawing = {
        **{name: options[name] for name in ("sampler", "eta", "guidance_scale", "guidance_channels", "label_policy")},
        "steps": options["sampling_steps"],
        "seed": options["sampling_seed"],
    }
    request = request_of_run(run, sampling=drawing, samples=options["samples"])
    if request.spec.kind != "denoiser":
        raise UserError(
            f"{folder} is a run of {request.spec.name}, a part of a system; give it as "
            f"--system NAME --weights {request.spec.kind}={folder}"
        )
    request = matched(request, sampling=options["match_sampling"])
    group = join_processes(run.framework)
    step = group.broadcast(step)  # while the run is trained, others may find a newer one
    decoder = decoder_of(run, options["decoder"])
    with group.locked(folder):
        for steps in request.sampling.steps:
            path = sample_run(
                run, request, step, steps, precision=options["sampling_precision"], batch=options["batch"],
                compile=options["compile"], decoder=decoder, group=group,
            )  # fmt: skip
            click.echo(path)


def _sample_system(name: str, weights: tuple[tuple[str, str], ...], options: dict[str, Any]) -> None:
    from harness.pipeline.sample_system import sample_system
    from harness.systems.binding import load_parts, with_steps
    from harness.systems.read import get_system

    if options["decoder"] is not None:
        raise UserError("--decoder belongs to --run; a system has its own, whose weights are --weights decoder=PATH")
    if options["step"] is not None:
        raise UserError("--step belongs to --run; of a run given as weights the newest snapshot is taken")
    system = get_system(name)
    if given := [each for each in OF_A_RUN if options[each] is not None]:
        flag = {"guidance_scale": "cfg", "label_policy": "labels"}.get(given[0], given[0]).replace("_", "-")
        raise UserError(
            f"--{flag} is fixed by the system {system.name!r}; write a system of your own as a TOML file, and give that"
        )
    if len(dict(weights)) != len(weights):
        raise UserError("--weights names the same part twice; give each once")
    group = join_processes(options["framework"] or "torch")
    loaded = load_parts(system, {part: Path(path) for part, path in weights})
    # All of them first, so that steps that do not fit are refused before anything is drawn.
    sampling_steps = options["sampling_steps"]
    wanted = [with_steps(loaded, steps) for steps in sampling_steps] if sampling_steps else [loaded]
    for each in wanted:
        path = sample_system(
            each,
            folder=options["out"] or RUNS / "systems",
            framework=options["framework"] or "torch",
            count=options["samples"] or get_protocol(system.protocol).samples,
            seed=options["sampling_seed"] or 0,
            precision=options["sampling_precision"],
            compile=options["compile"] or "off",
            batch=options["batch"],
            device=options["device"],
            group=group,
        )
        click.echo(path)
