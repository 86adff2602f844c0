"""The jax backend. This module implements `harness.engines.interfaces.Backend`."""

from __future__ import annotations

import logging
from pathlib import Path

from flax import nnx

from harness.autoencoders.decoder import Decoder
from harness.data.examples import Examples
from harness.diffusion.sampler_plan import AnyPlan
from harness.engines.ema import parts
from harness.engines.jax import mesh as devices
from harness.engines.jax import resolve
from harness.engines.jax.sampling import JaxChain, Network, load_weights, make_run_sampler
from harness.engines.jax.systems import faster_precision, make_chain, resolve_device
from harness.engines.jax.trainer import JaxEngine, build
from harness.engines.memory import Measured, check_room
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
) -> tuple[nnx.Module, Measured]:
    """Build the network of a new run and measure its speed and memory. Returns the network at its initialisation."""
    resolve.refuse_torch_options(precision, compile, deterministic)
    device_mesh = devices.make_mesh(devices.pick_devices(device), mesh)
    device = device or devices.platform_name(device_mesh)
    averages = len(parts(request.recipe))
    check_room(request.spec.name, request.compute.params, device, devices.free_bytes(device_mesh), averages)
    logger.info("compiling and measuring the speed of a training step ...")
    net = build(request.spec, request.arguments, request.seed)
    measured = resolve.resolve(
        request.spec,
        net,
        request.spec.arguments(**request.arguments),
        batch=request.recipe.batch,
        device=device,
        mesh=device_mesh,
        precision=precision,
        micro_batch=micro_batch,
        activation_bytes=_activation_bytes(request),
        gradient_checkpointing=bool(request.arguments.get("gradient_checkpointing", False)),
        averages=averages,
    )
    return net, measured


def _activation_bytes(request: Request) -> int:
    """Activation bytes of one image in float32, counted on the backbone's torch network.

    0 if it has no torch network: memory for activations is then not taken into account.
    """
    if "torch" not in request.spec.builders:
        return 0
    from harness.compute.activations import activation_bytes

    return activation_bytes(request.spec, **request.arguments)


def make_engine(
    request: Request, run: Run, data: Examples, net: nnx.Module | None, mesh: str | None = None
) -> JaxEngine:
    """The training state of `run` before step 1.

    net: the network at its initialisation, which the engine takes over; None builds it. mesh: ignored, because a run in
    jax keeps its mesh.
    """
    return JaxEngine(
        request.spec,
        build(request.spec, request.arguments, request.seed) if net is None else net,
        arguments=request.spec.arguments(**request.arguments),
        recipe=run.recipe,
        seed=run.seed,
        resolved=run.resolved,
        data=data,
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
) -> JaxChain:
    """The sampler of a run's network with these weights, under the request's guidance.

    Every batch is filled up to `batch` images. Of several processes, each samples on its own devices.
    """
    resolve.refuse_torch_options(precision, compile)
    mesh = devices.local_mesh(devices.apply_resolved(run.resolved))
    arguments = request.spec.arguments(**request.arguments)
    net = Network.load(request.spec, arguments, load_weights(weights), precision, mesh)
    return make_run_sampler(
        request.spec, net, plan, request.sampling, arguments=arguments, precision=precision, mesh=mesh, batch=batch,
        decode=None if decoder is None else lambda latents: decoder.decode(latents).numpy(),
    )  # fmt: skip
