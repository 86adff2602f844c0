"""The sampling stage: from a snapshot of a run to samples.npz with its sidecar.

Work is kept shard by shard, so a killed process repeats at most one shard, and the same command ends with the same
bytes. Image i depends on checkpoint, settings, seed and i alone; the batch it is drawn in is recorded because it can
move the last bits of float32 arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import registry
from harness.autoencoders.load import Decoder, load_autoencoder
from harness.diffusion.schedule import Schedule
from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.engines.backend import get_backend, join_processes
from harness.engines.interfaces import Sampler
from harness.errors import UserError
from harness.io import files
from harness.pipeline.devices import device_of
from harness.pipeline.sampling_loop import Job, run_job, write_grid_beside
from harness.pipeline.train import RunSession
from harness.planning.matching import matched
from harness.planning.request import Request, published_input_gflops, request_of_run
from harness.runs.provenance import environment
from harness.runs.run import RUNS_FOLDER, Run, open_run
from harness.runs.sample_set import SampleRequest, default_batch, labels_of, make_sample_request
from harness.settings import SampleOptions, keyword_options, only_one


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """The samples.npz files that were drawn, or found drawn."""

    samples: tuple[Path, ...]


@keyword_options(SampleOptions)
def sample(options: SampleOptions) -> SampleResult:
    """Draw sample sets: samples.npz in ADM's layout, a sidecar that says how it was made, and a grid to look at.

    Of a trained run (`run`), or of a system (`system`) with weights of its parts from anywhere. What is drawn is not
    repeated; a killed call continues shard by shard. UserError: settings that do not belong together, missing weights.
    """
    if (options.run is None) == (options.system is None):
        raise UserError("give either --run DIR or --system NAME (see `harness list systems`)")
    paths = _sample_run(options, options.run) if options.run is not None else _sample_system(options)
    return SampleResult(samples=tuple(paths))


def _sample_run(options: SampleOptions, folder: Path) -> list[Path]:
    for name in ("weights", "framework", "device", "out"):
        if getattr(options, name):
            raise UserError(f"--{name} belongs to --system; a run has its own")
    run = open_run(folder)
    if not (step := options.step or max(run.ema_checkpoint_steps(), default=0)):
        raise UserError(f"{folder} has no EMA checkpoint yet; train it to the end with `harness train` first")
    ways = {"--sampling-steps": options.sampling_steps, "--match-sampling": options.match_sampling}
    only_one(ways, "the sampling steps")
    overrides = {**options.overrides(), "steps": options.sampling_steps}
    request = request_of_run(run, sampling=overrides, samples=options.samples)
    if request.spec.kind != "denoiser":
        raise UserError(
            f"{folder} is a run of {request.spec.name}, a part of a system; give it as "
            f"--system NAME --weights {request.spec.kind}={folder}"
        )
    request = matched(request, sampling=options.match_sampling)
    group = join_processes(run.framework)
    step = group.broadcast(step)  # while the run is trained, other processes may find a newer one
    decoder = decoder_of(run, options.decoder)
    with group.locked(folder):
        return [
            sample_run(
                run, request, step, steps, precision=options.sampling_precision, batch=options.batch,
                compile=options.compile, decoder=decoder, group=group,
            )
            for steps in request.sampling.steps
        ]  # fmt: skip


FIXED_BY_SYSTEM = ("sampler", "eta", "cfg", "guidance_channels", "labels", "match_sampling")


def _sample_system(options: SampleOptions) -> list[Path]:
    from harness.pipeline.sample_system import sample_system
    from harness.systems.binding import load_parts, with_steps
    from harness.systems.read import get_system

    if options.decoder is not None:
        raise UserError("--decoder belongs to --run; a system has its own, whose weights are --weights decoder=PATH")
    if options.step is not None:
        raise UserError("--step belongs to --run; of a run given as weights the newest EMA checkpoint is taken")
    system = get_system(options.system or "")
    if given := [name for name in FIXED_BY_SYSTEM if getattr(options, name) is not None]:
        raise UserError(
            f"--{given[0].replace('_', '-')} is fixed by the system {system.name!r}; write a system of your own as a TOML "
            "file, and give that"
        )
    framework = options.framework or "torch"
    group = join_processes(framework)
    loaded = load_parts(system, {part: Path(path) for part, path in options.weights.items()})
    # All of them first, so that steps that do not fit are refused before anything is drawn.
    wanted = [with_steps(loaded, steps) for steps in options.sampling_steps] if options.sampling_steps else [loaded]
    return [
        sample_system(
            each,
            folder=options.out or RUNS_FOLDER / "systems",
            framework=framework,
            count=options.samples or system.task.samples,
            seed=options.sampling_seed or 0,
            precision=options.sampling_precision,
            compile=options.compile or "off",
            batch=options.batch,
            device=options.device,
            group=group,
        )
        for each in wanted
    ]


def sample_set(
    run: Run,
    wanted: SampleRequest,
    make_sampler: Callable[[], Sampler],
    sidecar: dict[str, Any],
    device: Callable[[], str],
    group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Draw the sample set of a run, or find it drawn; returns the path of its samples.npz."""
    task = run.protocol
    job = Job(
        folder=run.folder / "samples" / wanted.name(run),
        identity=wanted.identity(run),
        labels=labels_of(wanted.sampling.label_policy, wanted.sampling.seed, wanted.count, task.num_classes),
        image=(task.resolution, task.resolution, task.image_channels),
        batch=wanted.batch,
        steps=wanted.steps,
        title=f"sample {wanted.sampling.sampler}-{wanted.steps}",
    )
    return run_job(job, make_sampler, sidecar, device, group)


def decoder_of(run: Run | RunSession, name: str | None, device: str | None = None) -> Decoder | None:
    """What decodes the latents of a run, which need not exist yet: `name`, or the auto-encoder that made them, where it was
    then; None: pixels. device: of a run that does not exist yet, as --device has it.

    Refused: one that is gone or has other weights by now, and one that takes other latents or makes other images.
    """
    task = run.protocol
    if task.space != "latents":
        if name is not None:
            raise UserError(f"--decoder belongs to runs in latents, and {run.folder} is in pixels; leave it out")
        return None
    flag, made_by = "--decoder DIR", run.identity["latents"]
    if run.framework != "torch":  # decoders are torch's
        device = "cpu"
    elif run.resolved is not None:
        device = run.resolved.device
    else:
        device = get_backend("torch").resolve_device(device).platform
    place = run.places.get("vae", "")
    try:
        decoder = load_autoencoder(name or place, device=device, flag=flag)
    except UserError as error:
        if name is not None:
            raise
        text = f"the auto-encoder behind {run.folder} ({made_by['vae_sha256'][:12]}) is not to be had from {place}"
        raise UserError(f"{text}; name it, or another decoder, with {flag} ({error})") from error
    if name is None and decoder.sha256 != made_by["vae_sha256"]:
        raise UserError(
            f"{place} has other weights by now ({decoder.sha256[:12]}) than the auto-encoder behind {run.folder} "
            f"({made_by['vae_sha256'][:12]}); put the right ones back, or name a decoder with {flag}"
        )
    for what, found, wanted in (
        ("channels of latents", decoder.channels, task.in_channels),
        ("pixels a side", decoder.factor * task.input_size, task.resolution),
        ("channels of images", decoder.image_channels, task.image_channels),
        ("scale_factor", decoder.scale_factor, made_by["scale_factor"]),
        ("shift_factor", decoder.shift_factor, made_by["shift_factor"]),
    ):
        if found != wanted:
            raise UserError(
                f"decoder {decoder.name} has {what} {found}, and the run {run.folder} {wanted}; name another"
            )
    return decoder


def sample_run(
    run: Run,
    request: Request,
    step: int,
    steps: int,
    *,
    precision: str,
    batch: int | None,
    compile: str | None = None,  # "on" or "off"; None: as the run was created
    decoder: Decoder | None = None,  # of latents
    group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Draw one sample set of the snapshot of `step`, with a grid beside it; returns its samples.npz."""
    gflops = request.gflops_image(steps)
    wanted = make_sample_request(
        run, step, request.sampling, steps, request.samples, precision,
        batch or default_batch(gflops, run.resolved.device),
        compile=compile or run.resolved.compile,
        decoder=None if decoder is None else decoder.identity,
    )  # fmt: skip

    def make() -> Sampler:
        plan = registry.samplers.get(request.sampling.sampler).make(
            Schedule.named(run.recipe.schedule, run.recipe.diffusion_steps),
            steps,
            registry.objectives.get(run.recipe.objective),
            request.sampling.eta,
            request.sampling.clip_denoised,
        )
        snapshot = run.ema_checkpoint(step) / "ema.safetensors"
        return get_backend(run.framework).make_sampler(
            request,
            run,
            snapshot,
            plan,
            precision=precision,
            batch=wanted.batch,
            compile=wanted.compile,
            decoder=decoder,
        )

    sidecar = {
        "compute": {
            "params": request.compute.params,
            "gflops": request.compute.gflops,
            "gflops_published_input": published_input_gflops(request),
            **decoding_compute(decoder, request.protocol.resolution),
        },
        "trained": dataclasses.asdict(run.resolved),
        "environment": environment(run.resolved.device_name),
        "spent": files.read_json(run.ema_checkpoint(step) / "state.json", "snapshot").get("spent", {}),
    }
    path = sample_set(run, wanted, make, sidecar, lambda: device_of(run, group), group)
    if group.is_main:
        write_grid_beside(path)
    return path


def decoding_compute(decoder: Decoder | None, side: int) -> dict[str, float]:
    """What a sidecar says of decoding an image of `side` pixels."""
    return {} if decoder is None else {"decoder_gflops": decoder.compute(side).gflops}
