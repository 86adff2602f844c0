"""Sampling a run: from an EMA checkpoint to a sample set, its sidecar and a grid to look at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from harness.autoencoders.decoder import Decoder
from harness.autoencoders.load import load_autoencoder
from harness.diffusion.sampler_plan import AnyPlan
from harness.diffusion.samplers import is_adaptive
from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.engines.backend import get_backend, join_processes
from harness.engines.interfaces import Sampler
from harness.errors import UserError, shown
from harness.io import files
from harness.pipeline.devices import device_of
from harness.pipeline.pictures import (
    DEFAULT_GRID,
    PictureJob,
    draw_pictures,
    labels_of_classes,
    wants_pictures,
    with_grid,
)
from harness.pipeline.sampling_loop import Job, run_job, write_grid_beside
from harness.pipeline.sidecar import fields_of_run
from harness.pipeline.train import RunSession
from harness.planning.matching import matched
from harness.planning.request import (
    Request,
    check_guidance_interval,
    plan_of,
    published_input_gflops,
    request_of_run,
    training_passes,
)
from harness.protocols import get_protocol
from harness.runs import checkpoints
from harness.runs.posthoc_ema import plan_reconstruction, write_reconstruction
from harness.runs.provenance import environment
from harness.runs.run import RUNS_FOLDER, Run, open_run
from harness.runs.sample_set import SampleRequest, labels_of, sample_request
from harness.settings import SampleOptions, keyword_options, only_one


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """The samples.npz files, or the pictures of classes (PNG), whether this call made them or they existed."""

    samples: tuple[Path, ...]
    pictures: tuple[Path, ...] = ()


@keyword_options(SampleOptions)
def sample(options: SampleOptions) -> SampleResult:
    """Make sample sets: samples.npz in ADM's layout, a sidecar that says how it was made, and a grid of images.

    Give `run`, a trained run, or `system` with `weights` (checkpoints or runs). Existing sample sets are returned; a
    killed call continues shard by shard. With `classes`, pictures to look at are drawn instead: one PNG for each class, and
    one more with `trajectory`. UserError: settings that do not fit together, missing weights, an unknown class.
    """
    if (options.run is None) == (options.system is None):
        raise UserError("give either --run DIR or --system NAME (see `harness list systems`)")
    pictures = wants_pictures(options)
    paths = _sample_run(options, options.run) if options.run is not None else _sample_system(options)
    return SampleResult(samples=() if pictures else tuple(paths), pictures=tuple(paths) if pictures else ())


def _sample_run(options: SampleOptions, folder: Path) -> list[Path]:
    """Sample the run in `folder`; one samples.npz for each number of sampler steps, or the pictures of --classes."""
    for name in ("weights", "framework", "device", "out"):
        if getattr(options, name):
            raise UserError(f"--{name} belongs to --system; a run has its own")
    if others := [part for part in options.entry if part != "decoder"]:
        raise UserError(
            f"--entry {shown(others[0])}: the weights of a run are its own; --entry decoder=NAME is of --decoder"
        )
    run = open_run(folder)
    step = options.step or max(run.ema_checkpoint_steps(), default=0)  # 0: there is none
    if not step:
        raise UserError(f"{folder} has no EMA checkpoint yet; train it to the end with `harness train` first")
    flags = {"--sampling-steps": options.sampling_steps, "--match-sampling": options.match_sampling}
    only_one(flags, "the sampling steps")
    overrides = {**options.overrides(), "steps": options.sampling_steps}
    request = request_of_run(run, sampling=overrides, samples=options.samples)
    if request.spec.kind != "denoiser":
        raise UserError(
            f"{folder} is a run of {request.spec.name}, a part of a system; give it as "
            f"--system NAME --weights {request.spec.kind}={folder}"
        )
    request = matched(request, sampling=options.match_sampling)
    check_guidance_interval(request)
    group = join_processes(run.framework)
    step = group.broadcast(step)  # while the run is trained, other processes may find a newer one
    decoder = decoder_of(run, options.decoder, entry=options.entry.get("decoder"))
    if options.classes is not None:
        with group.locked(folder):
            return [
                path
                for steps in request.sampling.steps
                for path in _pictures_of_run(options, run, request, step, steps, decoder, group)
            ]
    with group.locked(folder):
        return [
            sample_run(
                run, request, step, steps, precision=options.sampling_precision, batch=options.batch,
                compile=options.compile, decoder=decoder, group=group,
            )
            for steps in request.sampling.steps
        ]  # fmt: skip


# settings that a system fixes
FIXED_BY_SYSTEM = ("sampler", "eta", "cfg", "guidance_channels", "labels", "match_sampling", "spacing", "ema_width")


def _sample_system(options: SampleOptions) -> list[Path]:
    """Sample a system; one samples.npz for each number of sampler steps (default: the system's own steps), or pictures."""
    from harness.pipeline.sample_system import pictures_of_system, sample_system
    from harness.systems.binding import load_parts, with_steps
    from harness.systems.read import get_system

    if options.decoder is not None:
        raise UserError("--decoder belongs to --run; a system has its own, whose weights are --weights decoder=PATH")
    if options.step is not None:
        raise UserError("--step belongs to --run; of a run given as weights the newest EMA checkpoint is taken")
    assert options.system is not None  # `sample` checks it
    system = get_system(options.system)
    if given := [name for name in FIXED_BY_SYSTEM if getattr(options, name) is not None]:
        raise UserError(
            f"--{given[0].replace('_', '-')} is fixed by the system {system.name!r}; write a system of your own as a TOML "
            "file, and give that"
        )
    framework = options.framework or "torch"
    group = join_processes(framework)
    weights = {}
    for part, path in options.weights.items():  # --weights gives the paths as text
        if not isinstance(path, str | Path):
            raise UserError(f"--weights {part}={shown(path)} is no path")
        weights[part] = Path(path)
    loaded = load_parts(system, weights, options.entry)
    # All are made before the first is sampled, so that invalid steps are refused at once.
    loaded_systems = (
        [with_steps(loaded, steps) for steps in options.sampling_steps] if options.sampling_steps else [loaded]
    )
    if options.classes is not None:
        return [
            path
            for each in loaded_systems
            for path in pictures_of_system(each, options, folder=options.out or RUNS_FOLDER / "systems", group=group)
        ]
    return [
        sample_system(
            each,
            folder=options.out or RUNS_FOLDER / "systems",
            framework=framework,
            count=options.samples or get_protocol(system.protocol).samples,
            seed=options.sampling_seed or 0,
            precision=options.sampling_precision,
            compile=options.compile or "off",
            batch=options.batch,
            device=options.device,
            group=group,
        )
        for each in loaded_systems
    ]


def _pictures_of_run(
    options: SampleOptions,
    run: Run,
    request: Request,
    step: int,
    steps: int,
    decoder: Decoder | None,
    group: ProcessGroup,
) -> list[Path]:
    """The pictures of --classes; arguments as of `sample_run`."""
    protocol, grid = run.protocol, options.grid or DEFAULT_GRID
    arguments = request.spec.arguments(**request.arguments)
    labels, names = labels_of_classes(
        options, protocol, [(request.spec, arguments)], run.source_paths, f"the run {run.folder}"
    )
    count = grid.rows * grid.columns
    group.await_file(run.ema_checkpoint(step) / "state.json")
    wanted = sample_request(
        run, step, request.sampling, steps, count, gflops_image=request.estimated_gflops_image(steps),
        precision=options.sampling_precision, batch=options.batch, compile=options.compile,
        decoder=None if decoder is None else decoder.identity,
    )  # fmt: skip
    wanted = dataclasses.replace(wanted, batch=min(wanted.batch, count))
    checkpoint = checkpoints.verify(run.ema_checkpoint(step), hashes=group.is_main)
    identity = with_grid(wanted.identity(run), grid)
    plan = plan_of(run.recipe, request.sampling, steps, request.spec.time)
    name = f"step{step}-{wanted.short_settings}-{grid}-{files.sha256_json(identity)[:8]}"
    width = wanted.sampling.ema_width
    average = f", EMA width {width:g}" if width else ""
    job = PictureJob(
        folder=run.folder / "pictures" / name,
        identity=identity,
        labels=labels,
        names=names,
        grid=grid,
        trajectory=options.trajectory,
        plans=((run.backbone, plan),),
        caption=(
            f"Uncurated {protocol.resolution}x{protocol.resolution} samples of {run.backbone} after {step:,} training steps{average}.",
            f"Classifier-free guidance scale = {wanted.sampling.guidance.short}. Sampler: {wanted.sampling.sampler}"
            + ("." if is_adaptive(wanted.sampling.sampler) else f", {steps} steps."),
        ),
        batch=wanted.batch,
    )

    def make() -> Sampler:
        return _sampler_of_average(run, request, wanted, checkpoint, plan, decoder, job.folder, group)

    description = {"environment": environment(run.resolved.device_name)}
    return draw_pictures(job, make, description, device=lambda: device_of(run, group), group=group)


def torch_device(run: Run | RunSession, device: str | None = None) -> str:
    """The device of torch's networks beside that of a run: its decoder and the feature network of its evaluation.

    run: a `RunSession` if the run may not exist yet. device: the value of --device, used only if the run does not exist yet.
    """
    if run.framework != "torch":  # this torch may not see jax's accelerator
        return "cpu"
    if run.resolved is not None:  # the run exists
        return run.resolved.device
    return get_backend("torch").resolve_device(device).platform


def decoder_of(
    run: Run | RunSession, name: str | None, device: str | None = None, entry: str | None = None
) -> Decoder | None:
    """The decoder of a run's samples; None if the run is in pixels.

    run: a `RunSession` if the run may not exist yet. name: of the decoder; None: the autoencoder that made the latents,
    loaded from the path that it had then. device: the value of --device, used only if the run does not exist yet. entry: of
    the weight file of the decoder `name`, where several fit. Raises `UserError` if that autoencoder is gone or its weights have
    changed, and for a decoder that takes other latents or makes other images.
    """
    protocol = run.protocol
    if entry is not None and name is None:
        raise UserError(f"--entry decoder={shown(entry)} is of --decoder: name its folder or file")
    if protocol.space != "latents":
        if name is not None:
            raise UserError(f"--decoder belongs to runs in latents, and {run.folder} is in pixels; leave it out")
        return None
    flag, latents = "--decoder DIR", run.identity["latents"]
    vae_path = run.source_paths.get("vae", "")
    try:
        own_entry = latents.get("vae_entry") if name is None else entry
        decoder = load_autoencoder(name or vae_path, device=torch_device(run, device), flag=flag, entry=own_entry)
    except UserError as error:
        if name is not None:
            raise
        text = f"the autoencoder behind {run.folder} ({latents['vae_sha256'][:12]}) is not available from {vae_path}"
        raise UserError(f"{text}; name it, or another decoder, with {flag} ({error})") from error
    if name is None:
        for what, now, before in (
            ("weights", decoder.sha256, latents["vae_sha256"]),
            ("settings", decoder.identity["config_sha256"], latents["vae_config_sha256"]),
        ):
            if now != before:
                raise UserError(
                    f"{vae_path} has other {what} by now ({now[:12]}) than the autoencoder behind {run.folder} "
                    f"({before[:12]}); put the right ones back, or name a decoder with {flag}"
                )
    for what, found, wanted in (
        ("channels of latents", decoder.channels, protocol.in_channels),
        ("pixels a side", decoder.factor * protocol.input_size, protocol.resolution),
        ("channels of images", decoder.image_channels, protocol.image_channels),
        ("scale_factor", decoder.scale_factor, latents["scale_factor"]),
        ("shift_factor", decoder.shift_factor, latents["shift_factor"]),
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
    """Make one sample set of a run with its grid, unless it exists; returns the path of its samples.npz.

    step: the training step whose EMA checkpoint is sampled. steps: of the sampler. batch: batch size; None: chosen by the
    cost of an image. Raises `UserError` if the checkpoint is missing or damaged.
    """
    assert (decoder is None) == (run.protocol.space != "latents")
    group.await_file(run.ema_checkpoint(step) / "state.json")
    wanted = sample_request(
        run, step, request.sampling, steps, request.samples, gflops_image=request.estimated_gflops_image(steps),
        precision=precision, batch=batch, compile=compile, decoder=None if decoder is None else decoder.identity,
    )  # fmt: skip
    checkpoint = checkpoints.verify(run.ema_checkpoint(step), hashes=group.is_main)
    protocol = run.protocol
    job = Job(
        folder=run.folder / "samples" / wanted.name(run),
        identity=wanted.identity(run),
        record=fields_of_run(
            wanted,
            backbone=run.backbone,
            framework=run.framework,
            seed=run.seed,
            recipe=run.recipe,
            resolved=run.resolved,
            params=request.compute.params,
            gflops=request.compute.gflops,
            gflops_published_input=published_input_gflops(request),
            gflops_source="traced" if request.compute.source == "traced" else None,
            passes=training_passes(request.spec, run.recipe),
            auxiliary=request.auxiliary,
            forward_gflops=None if request.compute.training is None else request.compute.training.gflops,
            evaluations=request.evaluations(steps),
            decoder_gflops=None if decoder is None else decoder.compute(protocol.resolution).gflops,
            origin={**run.training_data, **run.fork},
        ),
        labels=labels_of(wanted.sampling.label_policy, wanted.sampling.seed, wanted.count, protocol.num_classes),
        image=(protocol.resolution, protocol.resolution, protocol.image_channels),
        batch=wanted.batch,
        steps=plan_of(run.recipe, request.sampling, steps, request.spec.time).advances,
        title=f"sample {wanted.sampling.sampler}" + ("" if is_adaptive(wanted.sampling.sampler) else f"-{steps}"),
    )

    def make() -> Sampler:
        plan = plan_of(run.recipe, request.sampling, steps, request.spec.time)
        return _sampler_of_average(run, request, wanted, checkpoint, plan, decoder, job.folder, group)

    description = {
        "environment": environment(run.resolved.device_name),
        # seconds of training by device, and versions that trained; older checkpoints do not have them
        "spent": checkpoint.state.get("spent", {}),
        "trained_with": checkpoint.state.get("trained_with", []),
    }
    path = run_job(job, make, description, device=lambda: device_of(run, group), group=group)
    if group.is_main:
        write_grid_beside(path)
    return path


def _sampler_of(
    run: Run,
    request: Request,
    wanted: SampleRequest,
    weights: Path,  # a safetensors file
    plan: AnyPlan,
    decoder: Decoder | None,
) -> Sampler:
    """The sampler of a run's network."""
    return get_backend(run.framework).make_sampler(
        request,
        run,
        weights,
        plan,
        precision=wanted.precision,
        batch=wanted.batch,
        compile=wanted.compile,
        decoder=decoder,
    )


def _sampler_of_average(
    run: Run,
    request: Request,
    wanted: SampleRequest,
    checkpoint: checkpoints.Checkpoint,
    plan: AnyPlan,
    decoder: Decoder | None,
    folder: Path,  # of what is sampled
    group: ProcessGroup,
) -> Sampler:
    """The sampler of a run's network with the average of its weights that is wanted, reconstructed for an `ema_width`."""
    width, base = wanted.sampling.ema_width, checkpoint.part("ema")
    if not width:
        return _sampler_of(run, request, wanted, base, plan, decoder)
    # Written for the samplers of all processes to read, and not kept: the saved averages give it again.
    weights = folder / f"weights{files.PARTIAL}"
    if group.is_main:
        with files.explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_reconstruction(plan_reconstruction(run, wanted.step, width, checkpoint.sha256("ema")), base, weights)
    group.barrier("the EMA weights are reconstructed")
    group.await_file(weights)
    try:
        sampler = _sampler_of(run, request, wanted, weights, plan, decoder)
        group.barrier("the EMA weights are read")
    finally:
        if group.is_main:
            weights.unlink(missing_ok=True)
    return sampler
