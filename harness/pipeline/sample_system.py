"""Sampling a system: its weights, its identity, and the sample set that comes of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from harness.autoencoders.load import Decoder, load_autoencoder
from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.engines.backend import get_backend
from harness.engines.interfaces import DeviceInfo
from harness.errors import UserError
from harness.io import files
from harness.pipeline.devices import device_names
from harness.pipeline.sampling_loop import Job, run_job, write_grid_beside
from harness.runs.provenance import environment
from harness.runs.sample_set import default_batch, labels_of
from harness.systems.binding import LoadedSystem
from harness.systems.spec import System

logger = logging.getLogger(__name__)


def sample_system(
    bound: LoadedSystem,
    *,
    folder: Path,
    framework: str = "torch",
    count: int,
    seed: int,
    precision: str,
    compile: str = "off",
    batch: int | None,
    device: str | None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Draw one sample set below `folder`, with a grid beside it; returns its samples.npz."""
    engine = get_backend(framework)
    system, task = bound.system, bound.system.task
    for note in bound.notes:
        logger.info(note)
    for part in system.parts.values():
        if framework not in part.spec.builders:
            raise UserError(f"system {system.name!r}: {part.backbone} has no {framework} network")
    place = engine.resolve_device(device)
    gflops = system.gflops_image()
    batch = batch or default_batch(gflops, place.platform)
    decoder = None
    if system.decoder:
        logger.info(f"reading decoder {system.decoder} ...")
        decoder = load_autoencoder(system.decoder, weights=bound.decoder, device=_decoder_device(framework, place))
        _check_decoder(system, decoder)
    settings = {
        "seed": seed, "precision": precision, "uint8_rule": system.uint8_rule, "label_policy": system.label_policy,
        **({} if framework == "torch" else {"framework": framework}),
        **({} if compile == "off" else {"compile": compile}),
    }  # fmt: skip
    identity = {
        **bound.identity,
        "protocol": task.name,
        "decoder": None if decoder is None else decoder.identity,
        "sampling": settings,
        "count": count,
        "batch": batch,
    }
    identity = json.loads(json.dumps(identity))  # as the sidecar gives it back: without tuples
    job = Job(
        folder=folder / f"{Path(system.name).name}-n{count}-{files.sha256_json(identity)[:8]}",
        identity=identity,
        labels=labels_of(system.label_policy, seed, count, task.num_classes),
        image=(task.resolution, task.resolution, task.image_channels),
        batch=batch,
        steps=sum(stage.steps if stage.spec.kind != "generator" else 1 for stage in system.stages),
        title=f"sample {system.name}",
    )
    sidecar = {
        "compute": {
            "params": system.params(),
            "gflops": system.gflops_forward(),
            "gflops_per_image": gflops,
            "decoder_gflops": None if decoder is None else decoder.compute(task.resolution).gflops,
        },
        "weights": {name: str(source.path) for name, source in bound.sources.items()},
        "environment": environment(place.name),
    }
    with group.locked(job.folder):
        path = run_job(
            job,
            lambda: engine.make_chain(
                bound, decoder, place, seed=seed, precision=precision, batch=batch, compile=compile
            ),
            sidecar,
            lambda: device_names(place, group),
            group,
        )
        if group.is_main:
            write_grid_beside(path)
    return path


def _decoder_device(framework: str, place: DeviceInfo) -> str:
    """Decoders are torch's, also of a system that is sampled in jax, whose accelerator torch may not see."""
    return place.platform if framework == "torch" else "cpu"


def _check_decoder(system: System, decoder: Decoder) -> None:
    """The latents that the base makes must be those that the decoder takes, and its images the protocol's."""
    assert system.base is not None
    latent = system.base.spec.arguments(**system.base.arguments)
    made = (latent["in_channels"], latent["input_size"] * decoder.factor)
    wanted = (decoder.channels, system.task.resolution)
    if made != wanted or system.task.image_channels != 3:
        raise UserError(
            f"system {system.name!r}: {system.base.backbone} makes {made[0]} channels that decode to {made[1]} pixels; "
            f"decoder {decoder.name} takes {wanted[0]} and protocol {system.task.name!r} has {wanted[1]}"
        )
