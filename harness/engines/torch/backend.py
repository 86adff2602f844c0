"""The torch backend. This module implements `harness.engines.interfaces.Backend`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from harness.autoencoders.decoder import Decoder
from harness.compute.activations import activation_bytes_by_precision
from harness.data.examples import Examples
from harness.data.load import source_images
from harness.diffusion.auxiliary import read_auxiliary
from harness.diffusion.sampler_plan import AnyPlan
from harness.engines.ema import parts
from harness.engines.memory import Measured, check_room
from harness.engines.torch import parallel, resolve
from harness.engines.torch.sampling import TorchSampler, load_weights
from harness.engines.torch.systems import faster_precision, make_chain, resolve_device
from harness.engines.torch.trainer import TorchEngine, build
from harness.planning.request import Request
from harness.runs.run import Run

__all__ = ["faster_precision", "resolve_device", "make_chain", "make_engine", "make_sampler", "measure"]

logger = logging.getLogger(__name__)


def measure(
    request: Request,
    *,
    device: str | None,
    precision: str,
    micro_batch: int | None,
    mesh: str | None,
    compile: str,
    deterministic: bool = False,
) -> tuple[torch.nn.Module, Measured]:
    """Build the network of a new run and measure its speed and memory. Returns the network at its initialisation."""
    shape = parallel.mesh_of(mesh)  # of a new run: without --mesh all processes are along DATA
    target = resolve.pick_device(device)
    resolve.set_deterministic(target, deterministic)
    averages = len(parts(request.recipe))
    check_room(
        request.spec.name, request.compute.params // shape.model, str(target), resolve.free_bytes(target), averages
    )
    logger.info("measuring the speed of a training step ...")
    net = parallel.shard(build(request.spec, request.arguments, request.seed), shape, target).to(target)
    measured = resolve.resolve(
        request.spec,
        net,
        request.spec.arguments(**request.arguments),
        batch=request.recipe.batch,
        device=target,
        mesh=shape,
        precision=precision,
        micro_batch=micro_batch,
        activation_bytes=activation_bytes_by_precision(request.spec, **request.arguments),
        gradient_checkpointing=bool(request.arguments.get("gradient_checkpointing", False)),
        averages=averages,
        compile=compile,
        deterministic=deterministic,
        steps=request.recipe.steps,
    )
    return net, measured


def make_engine(
    request: Request, run: Run, data: Examples, net: torch.nn.Module | None, mesh: str | None = None
) -> TorchEngine:
    """The training state of `run` before step 1.

    net: the network at its initialisation, which the engine trains in place; None builds it. mesh: "DATAxMODEL" for the
    processes at work now; None keeps MODEL of the mesh that the run was created with.
    """
    images: Examples = data
    if run.recipe.auxiliary and request.protocol.space == "latents" and read_auxiliary(run.recipe.auxiliary).encoder:
        remedy = "put them back, because the encoder of the auxiliary loss needs them, or train without it"
        images = source_images(
            data.source_paths, data.identity["dataset_sha256"], f"the latents of {run.folder}", remedy
        )
        images.check(request.protocol)
    return TorchEngine(
        request.spec,
        build(request.spec, request.arguments, request.seed) if net is None else net,
        arguments=request.spec.arguments(**request.arguments),
        recipe=run.recipe,
        seed=run.seed,
        resolved=parallel.adapt_to_processes(run.resolved, mesh, run.recipe.batch),
        data=data,
        images=images,
    )


def make_sampler(
    request: Request,
    run: Run,
    weights: Path,  # a safetensors file
    plan: AnyPlan,
    *,
    precision: str,
    batch: int,
    compile: str = "off",
    decoder: Decoder | None = None,  # of latents
) -> TorchSampler:
    """The sampler of a run's network with these weights, under the request's guidance.

    Batches may have any size. If compile is "on", smaller ones are filled up to `batch` images.
    """
    device = resolve.apply_resolved(run.resolved)
    net = load_weights(request.spec.build("torch", **request.arguments), weights)
    return TorchSampler(
        request.spec, net, plan, request.sampling, arguments=request.arguments, precision=precision, device=device,
        compile=compile, batch=batch, decode=None if decoder is None else decoder.decode,
    )  # fmt: skip
