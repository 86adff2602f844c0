"""Sampling a system in jax, by the same functions as in `harness.engines.torch.systems`.

Weight files have the shapes of the torch networks and are read into those first. Decoders run in torch, on the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from harness.autoencoders.decoder import Decoder
from harness.diffusion.adaptive import AdaptivePlan
from harness.engines.interfaces import DeviceInfo
from harness.engines.jax import mesh as devices
from harness.engines.jax.network import Network
from harness.engines.jax.ode import JaxOdeStage
from harness.engines.jax.resolve import refuse_torch_options
from harness.engines.jax.sampling import JaxChain, JaxStage, WeakGuide
from harness.systems.binding import LoadedSystem, Source, read_network
from harness.systems.spec import Component, GuidanceClassifier, WeakNetwork


def resolve_device(device: str | None) -> DeviceInfo:
    """The devices that samples are drawn on: this process's devices of a platform ("cpu", "cuda"), or one ("cuda:1").

    Batches are divided over them. None: jax's default platform. Raises UserError if they are not available.
    """
    mesh = devices.local_mesh(devices.make_mesh(devices.pick_devices(device), None))
    platform = device or devices.platform_name(mesh)
    threads = f", {devices.threads()} threads" if platform.startswith("cpu") else ""
    return DeviceInfo(mesh, platform, devices.device_name(mesh) + threads)


def faster_precision(device: DeviceInfo) -> str:
    """See `harness.engines.interfaces.Backend`. Always float32: the precisions are not measured here."""
    return "float32"


def make_chain(
    loaded: LoadedSystem,
    decoder: Decoder | None,
    device: DeviceInfo,
    *,
    seed: int,
    precision: str,
    batch: int,  # every batch is filled up to this size
    compile: str,
) -> JaxChain:
    """The sampler of a system: its networks one after the other, then the decoder, if there is one."""
    refuse_torch_options(precision, compile)
    system = loaded.system
    mesh: Mesh = device.target

    def network(part: Component | GuidanceClassifier | WeakNetwork, source: Source) -> Network:
        """The network of a part, with the weights of `source`."""
        # Built and filled in torch first: `read_network` knows the layouts of weight files.
        state = {name: tensor.numpy() for name, tensor in read_network(part, source).state_dict().items()}
        return Network.load(part.spec, part.spec.arguments(**part.build_arguments()), state, precision, mesh)

    classifier = None
    if system.classifier is not None:
        classifier = network(system.classifier, loaded.sources["classifier"])
    weak = None
    if system.weak is not None:
        weak = WeakGuide(network(system.weak, loaded.sources["weak"]), system.weak_plan())

    def stage_of(number: int, stage: Component, source: Source) -> JaxStage | JaxOdeStage:
        """The sampler of component `number` of the system, with the weights of `source`."""
        net, plan = network(stage, source), stage.plan()
        settings: dict[str, Any] = {
            "arguments": stage.spec.arguments(**stage.build_arguments()), "precision": precision, "mesh": mesh,
            "guidance": system.guidance if number == 0 else stage.guidance, "guidance_channels": stage.guidance_channels,
        }  # fmt: skip
        if isinstance(plan, AdaptivePlan):
            return JaxOdeStage(stage.spec, net, plan, **settings)
        return JaxStage(
            stage.spec,
            net,
            plan,
            **settings,
            weak=weak if number == 0 else None,
            classifier=classifier if number == 0 else None,  # it guides the base alone
            classifier_scale=system.classifier.scale if system.classifier is not None else 0.0,
            conditioning_noise=stage.conditioning_noise,
            number=number,
        )

    stages = [stage_of(number, stage, source) for number, (stage, source) in enumerate(loaded.components)]

    def decode(latents: np.ndarray) -> np.ndarray:  # latents (N, C, h, w) -> images (N, 3, H, W)
        assert decoder is not None
        return decoder.decode(latents).numpy()

    return JaxChain(
        stages, None if decoder is None else decode, seed=seed, uint8_rule=system.uint8_rule, mesh=mesh, batch=batch
    )
