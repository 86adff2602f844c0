"""What the stages of a run ask of jax: see `harness.engines`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flax import nnx

from harness.autoencoders.load import Decoder
from harness.data.examples import Examples
from harness.diffusion.plans import SamplerPlan
from harness.engines.backend import check_torch_only
from harness.engines.jax import mesh as devices
from harness.engines.jax import resolve
from harness.engines.jax.sampling import JaxChain, Network, load_weights, make_run_sampler
from harness.engines.jax.systems import make_chain, resolve_device
from harness.engines.jax.trainer import JaxEngine, build
from harness.engines.memory import Measured, check_room
from harness.planning.request import Request
from harness.runs.run import Run

__all__ = ["resolve_device", "make_chain", "make_engine", "make_sampler", "measure"]


def measure(
    request: Request,
    *,
    device: str | None,
    precision: str,
    micro_batch: int | None,
    mesh: str | None,
    compile: str,
    say: Callable[[str], None],
) -> tuple[nnx.Module, Measured]:
    """The network at its initialisation, and what was measured with it on this machine."""
    check_torch_only(precision, compile)
    over = devices.make_mesh(devices.pick_devices(device), mesh)
    device = device or devices.platform_name(over)
    check_room(request.spec.name, request.compute.params, device, devices.free_bytes(over))
    say("compiling and measuring the speed of a training step ...")
    net = build(request.spec, request.arguments, request.seed)
    measured = resolve.resolve(
        request.spec,
        net,
        request.spec.arguments(**request.arguments),
        batch=request.recipe.batch,
        device=device,
        mesh=over,
        precision=precision,
        micro_batch=micro_batch,
        activation_bytes=_activation_bytes(request),
        gradient_checkpointing=bool(request.arguments.get("gradient_checkpointing", False)),
    )
    return net, measured


def _activation_bytes(request: Request) -> int:
    """Of one image in float32: torch's count of the same network, where there is one; else 0, which fits anything."""
    if "torch" not in request.spec.builders:
        return 0
    from harness.compute.activations import activation_bytes

    return activation_bytes(request.spec, **request.arguments)


def make_engine(
    request: Request, run: Run, data: Examples, net: nnx.Module | None, mesh: str | None = None
) -> JaxEngine:
    """The training state of `run` before step 1. `net`: at its initialisation, None builds it; the engine takes it.

    mesh: the run's own, which is frozen.
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
    snapshot: Path,
    plan: SamplerPlan,
    *,
    precision: str,
    batch: int,
    compile: str = "off",
    decoder: Decoder | None = None,  # of latents
) -> JaxChain:
    """What draws images with the weights in `snapshot`, a safetensors file."""
    check_torch_only(precision, compile)
    mesh = devices.own(devices.apply_resolved(run.resolved))
    arguments = request.spec.arguments(**request.arguments)
    net = Network.load(request.spec, arguments, load_weights(snapshot), precision, mesh)
    return make_run_sampler(
        request.spec, net, plan, request.sampling, arguments=arguments, precision=precision, mesh=mesh, batch=batch,
        decode=None if decoder is None else lambda latents: decoder.decode(latents).numpy(),
    )  # fmt: skip
