"""Sampling a run: from an EMA checkpoint to a sample set, its sidecar and a grid to look at."""

from __future__ import annotations

from pathlib import Path

from harness.autoencoders.load import Decoder, load_autoencoder
from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.engines.backend import get_backend
from harness.errors import UserError
from harness.pipeline.devices import device_of
from harness.pipeline.sampling_loop import Job, Sampler, run_job, write_grid_beside
from harness.pipeline.sidecar import fields_of_run
from harness.pipeline.train import RunSession
from harness.planning.request import Request, plan_of, published_input_gflops
from harness.runs import checkpoints
from harness.runs.provenance import environment
from harness.runs.run import Run
from harness.runs.sample_set import labels_of, sample_request


def decoder_of(run: Run | RunSession, name: str | None, device: str | None = None) -> Decoder | None:
    """The decoder of a run's samples; None: the run is in pixels.

    run: may be one that does not exist yet, for which device is what --device says. name: of the decoder; None: the
    autoencoder that made the latents, loaded from where it was then. Raises `UserError` where that is gone or has
    other weights by now, and for a decoder that takes other latents or makes other images.
    """
    protocol = run.protocol
    if protocol.space != "latents":
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
        text = f"the autoencoder behind {run.folder} ({made_by['vae_sha256'][:12]}) is not available from {place}"
        raise UserError(f"{text}; name it, or another decoder, with {flag} ({error})") from error
    if name is None:
        for what, now, before in (
            ("weights", decoder.sha256, made_by["vae_sha256"]),
            ("settings", decoder.identity["config_sha256"], made_by["vae_config_sha256"]),
        ):
            if now != before:
                raise UserError(
                    f"{place} has other {what} by now ({now[:12]}) than the autoencoder behind {run.folder} "
                    f"({before[:12]}); put the right ones back, or name a decoder with {flag}"
                )
    for what, found, wanted in (
        ("channels of latents", decoder.channels, protocol.in_channels),
        ("pixels a side", decoder.factor * protocol.input_size, protocol.resolution),
        ("channels of images", decoder.image_channels, protocol.image_channels),
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
    """Make one sample set of a run, with a grid beside it, or find it; returns the path of its samples.npz.

    step: of training, whose EMA checkpoint is sampled. steps: of the sampler. batch: None: by the cost of an image.
    Raises `UserError` where the checkpoint is missing or damaged.
    """
    assert (decoder is None) == (run.protocol.space != "latents")
    wanted = sample_request(
        run, step, request.sampling, steps, request.samples, gflops_image=request.gflops_image(steps),
        precision=precision, batch=batch, compile=compile, decoder=None if decoder is None else decoder.identity,
    )  # fmt: skip
    checkpoint = checkpoints.verify(run.ema_checkpoint(step))
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
            evaluations=request.evaluations(steps),
            decoder_gflops=None if decoder is None else decoder.compute(protocol.resolution).gflops,
        ),
        labels=labels_of(wanted.sampling.label_policy, wanted.sampling.seed, wanted.count, protocol.num_classes),
        image=(protocol.resolution, protocol.resolution, protocol.image_channels),
        batch=wanted.batch,
        steps=steps,
        title=f"sample {wanted.sampling.sampler}-{steps}",
    )

    def make() -> Sampler:
        return get_backend(run.framework).make_sampler(
            request,
            run,
            checkpoint.part("ema"),
            plan_of(run.recipe, request.sampling, steps),
            precision=precision,
            batch=wanted.batch,
            compile=wanted.compile,
            decoder=decoder,
        )

    description = {
        "environment": environment(run.resolved.device_name),
        "spent": checkpoint.state.get("spent", {}),
    }
    path = run_job(job, make, description, lambda: device_of(run, group), group)
    if group.is_main:
        write_grid_beside(path)
    return path
