"""Sampling a system: from weights of its parts to a sample set, its sidecar and a grid to look at."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from harness.autoencoders.decoder import Decoder
from harness.autoencoders.load import load_autoencoder
from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.engines.backend import get_backend
from harness.engines.interfaces import DeviceInfo
from harness.errors import UserError
from harness.io import files
from harness.pipeline.devices import device_names
from harness.pipeline.pictures import DEFAULT_GRID, PictureJob, draw_pictures, labels_of_classes, with_grid
from harness.pipeline.sampling_loop import Job, run_job, write_grid_beside
from harness.pipeline.sidecar import fields_of_system
from harness.protocols import get_protocol
from harness.runs.provenance import environment
from harness.runs.sample_set import default_batch, labels_of
from harness.settings import SampleOptions
from harness.systems.binding import LoadedSystem
from harness.systems.spec import Component, System

logger = logging.getLogger(__name__)


def sample_system(
    loaded: LoadedSystem,
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
    """Make one sample set in a folder below `folder`, with its grid, unless it exists; returns its samples.npz.

    precision: "auto" takes the backend's `faster_precision`. batch: batch size; None: chosen by the cost of an image.
    device: None: an accelerator if there is one. Raises `UserError` for a backbone without a network in the framework, and for a decoder that takes other latents or makes
    other images.
    """
    engine = get_backend(framework)
    system = loaded.system
    protocol = get_protocol(system.protocol)
    device_info = _device_of(loaded, framework, device)
    batch = batch or default_batch(system.estimated_gflops_image(), device_info.platform)
    precision = engine.faster_precision(device_info) if precision == "auto" else precision
    decoder = _decoder_of(loaded, framework, device_info)
    identity = _identity(
        loaded, decoder, framework=framework, count=count, seed=seed, precision=precision, compile=compile, batch=batch
    )
    folder_name = Path(system.name).name  # a name may contain slashes
    job = Job(
        folder=folder / f"{folder_name}-n{count}-{files.sha256_json(identity)[:8]}",
        identity=identity,
        record=fields_of_system(
            system,
            loaded.sources,
            framework=framework,
            seed=seed,
            precision=precision,
            batch=batch,
            params=system.params(),
            gflops=system.gflops_forward(),
            gflops_image=system.gflops_image(),
            evaluations=system.evaluations,
            decoder=None if decoder is None else decoder.identity,
            decoder_gflops=None if decoder is None else decoder.compute(protocol.resolution).gflops,
        ),
        labels=labels_of(system.label_policy, seed, count, protocol.num_classes),
        image=(protocol.resolution, protocol.resolution, protocol.image_channels),
        batch=batch,
        steps=sum(part.advances for part in system.components),
        title=f"sample {system.name}",
    )
    description = _description(loaded, device_info)
    with group.locked(job.folder):
        path = run_job(
            job,
            lambda: engine.make_chain(
                loaded, decoder, device_info, seed=seed, precision=precision, batch=batch, compile=compile
            ),
            description,
            device=lambda: device_names(device_info, group),
            group=group,
        )
        if group.is_main:
            write_grid_beside(path)
    return path


def pictures_of_system(
    loaded: LoadedSystem, options: SampleOptions, *, folder: Path, group: ProcessGroup = SINGLE_PROCESS
) -> list[Path]:
    """The pictures of the classes of `options`, in a folder below `folder`/pictures. Errors as of `sample_system`."""
    system, framework = loaded.system, options.framework or "torch"
    protocol, grid = get_protocol(system.protocol), options.grid or DEFAULT_GRID
    networks = [(part.spec, part.spec.arguments(**part.build_arguments())) for part in system.components]
    labels, names = labels_of_classes(options, protocol, networks, {}, f"the system {system.name!r}")
    engine = get_backend(framework)
    device_info = _device_of(loaded, framework, options.device)
    count = grid.rows * grid.columns
    batch = min(options.batch or default_batch(system.estimated_gflops_image(), device_info.platform), count)
    decoder = _decoder_of(loaded, framework, device_info)
    precision = options.sampling_precision
    settings: dict[str, Any] = {
        "seed": options.sampling_seed or 0,
        "precision": engine.faster_precision(device_info) if precision == "auto" else precision,
        "compile": options.compile or "off",
        "batch": batch,
    }
    identity = with_grid(_identity(loaded, decoder, framework=framework, count=count, **settings), grid)
    samplers = ", ".join(
        part.sampler if part.is_adaptive else f"{part.sampler}, {part.steps} steps"
        for part in system.components
        if _has_plan(part)
    )
    base = system.base
    assert base is not None  # `load_parts` has refused a system without one
    job = PictureJob(
        folder=folder / "pictures" / f"{Path(system.name).name}-{grid}-{files.sha256_json(identity)[:8]}",
        identity=identity,
        labels=labels,
        names=names,
        grid=grid,
        trajectory=options.trajectory,
        plans=tuple((name, part.plan() if _has_plan(part) else None) for name, part in system.named_components.items()),
        caption=(
            f"Uncurated {protocol.resolution}x{protocol.resolution} samples of {system.name}.",
            f"{'Classifier-free guidance' if system.weak is None else 'Autoguidance'} scale = {system.guidance.short}. "
            f"Sampler: {samplers}."
            if samplers
            else f"Truncation = {base.truncation:g}.",
        ),
        batch=batch,
    )
    with group.locked(job.folder):
        return draw_pictures(
            job,
            lambda: engine.make_chain(loaded, decoder, device_info, **settings),
            _description(loaded, device_info),
            device=lambda: device_names(device_info, group),
            group=group,
        )


def _has_plan(part: Component) -> bool:
    return part.spec.kind != "generator"


def _device_of(loaded: LoadedSystem, framework: str, device: str | None) -> DeviceInfo:
    """The device to sample on, once it is known that all parts have a network in the framework; logs the system's notes."""
    system = loaded.system
    for note in loaded.notes:
        logger.info("%s", note)
    for part in system.parts.values():
        if framework not in part.spec.builders:
            raise UserError(f"system {system.name!r}: {part.backbone} has no {framework} network")
    return get_backend(framework).resolve_device(device)


def _decoder_of(loaded: LoadedSystem, framework: str, device_info: DeviceInfo) -> Decoder | None:
    """The decoder of the system's latents; None: it is in pixels."""
    system = loaded.system
    if not system.decoder:
        return None
    logger.info("reading decoder %s ...", system.decoder)
    decoder = load_autoencoder(
        system.decoder, weights=loaded.decoder, device=_decoder_device(framework, device_info), entry=loaded.decoder_entry
    )  # fmt: skip
    _check_decoder(system, decoder)
    return decoder


def _identity(
    loaded: LoadedSystem,
    decoder: Decoder | None,
    *,
    framework: str,
    count: int,
    seed: int,
    precision: str,
    compile: str,
    batch: int,
) -> dict[str, Any]:
    """Everything that decides the bytes of a sample set, as JSON reads it back."""
    system = loaded.system
    # The framework and compile are left out at their defaults, as in the identities from before these settings existed.
    settings = {
        "seed": seed, "precision": precision, "uint8_rule": system.uint8_rule, "label_policy": system.label_policy,
        **({} if framework == "torch" else {"framework": framework}),
        **({} if compile == "off" else {"compile": compile}),
    }  # fmt: skip
    identity = {
        **loaded.identity,
        "protocol": get_protocol(system.protocol).name,
        "decoder": None if decoder is None else decoder.identity,
        "sampling": settings,
        "count": count,
        "batch": batch,
    }
    return json.loads(json.dumps(identity))  # tuples become lists, as when the sidecar is read back


def _description(loaded: LoadedSystem, device_info: DeviceInfo) -> dict[str, Any]:
    """Items of a sidecar that decide nothing."""
    entries = {name: source.entry for name, source in loaded.sources.items() if source.entry}
    entries |= {"decoder": loaded.decoder_entry} if loaded.decoder_entry else {}
    return {
        "weights": {name: str(source.path) for name, source in loaded.sources.items()},
        **({"entries": entries} if entries else {}),
        "environment": environment(device_info.name),
        **({"trained_with": trained_with} if (trained_with := loaded.sources["base"].trained_with) else {}),
    }


def _decoder_device(framework: str, device_info: DeviceInfo) -> str:
    """The decoder's device. Decoders are torch modules, and torch may not see the accelerator of jax."""
    return device_info.platform if framework == "torch" else "cpu"


def _check_decoder(system: System, decoder: Decoder) -> None:
    """Raise `UserError` if the decoder does not take the base's latents or does not make the protocol's images."""
    assert system.base is not None
    protocol = get_protocol(system.protocol)
    latent = system.base.spec.arguments(**system.base.arguments)
    made = (latent["in_channels"], latent["input_size"] * decoder.factor)  # channels of latents, side of images
    wanted = (decoder.channels, protocol.resolution)
    if made != wanted or protocol.image_channels != decoder.image_channels:
        raise UserError(
            f"system {system.name!r}: {system.base.backbone} makes {made[0]} channels that decode to {made[1]} pixels; "
            f"decoder {decoder.name} takes {wanted[0]} and protocol {protocol.name!r} has {wanted[1]}"
        )
