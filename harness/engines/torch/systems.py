"""Sampling a system in torch: its networks built, filled with weights and chained."""

from __future__ import annotations

from typing import Any

import torch

from harness.autoencoders.decoder import Decoder
from harness.diffusion.adaptive import AdaptivePlan
from harness.engines.interfaces import DeviceInfo
from harness.engines.torch import resolve
from harness.engines.torch.sampling import TorchChain, TorchGenerator, TorchOdeStage, TorchStage, WeakGuide
from harness.systems.binding import LoadedSystem, read_network
from harness.systems.spec import Component


def resolve_device(device: str | None) -> DeviceInfo:
    """The device of that name; None: an accelerator if there is one. Raises UserError where it is not available."""
    target = resolve.pick_device(device)
    threads = f", {torch.get_num_threads()} threads" if target.type == "cpu" else ""
    return DeviceInfo(target, str(target), resolve.device_name(target) + threads)


def faster_precision(device: DeviceInfo) -> str:
    """See `harness.engines.interfaces.Backend`. Measured on a GPU, where the two are far apart; a CPU takes float32."""
    target: torch.device = device.target
    if target.type != "cuda":
        return "float32"
    return "bfloat16" if resolve.product_slowdown(target, "bfloat16") < 1 else "float32"


def make_chain(
    loaded: LoadedSystem,
    decoder: Decoder | None,
    device: DeviceInfo,
    *,
    seed: int,
    precision: str,
    batch: int,  # batches are filled up to this size if compiled, and may have any size otherwise
    compile: str,
) -> TorchChain:
    """The sampler of a system: its networks one after the other, then the decoder, if there is one."""
    system = loaded.system
    target: torch.device = device.target
    classifier = None
    if system.classifier is not None:
        classifier = read_network(system.classifier, loaded.sources["classifier"]).to(target)

    weak = None
    if system.weak is not None:
        net = read_network(system.weak, loaded.sources["weak"])
        weak = WeakGuide(net, system.weak_plan(), system.weak.compute().macs)

    def stage_of(number: int, stage: Component, net: torch.nn.Module) -> TorchStage | TorchOdeStage | TorchGenerator:
        """The sampler of component `number` of the system, with `net`, its network."""
        arguments = stage.spec.arguments(**stage.build_arguments())
        if stage.spec.kind == "generator":
            return TorchGenerator(
                net,
                latent_size=arguments["latent_size"],
                truncation=stage.truncation,
                precision=precision,
                device=target,
            )
        plan = stage.plan()
        settings: dict[str, Any] = {
            "arguments": arguments, "precision": precision, "device": target, "compile": compile,
            "guidance": system.guidance if number == 0 else stage.guidance, "guidance_channels": stage.guidance_channels,
        }  # fmt: skip
        if isinstance(plan, AdaptivePlan):
            return TorchOdeStage(stage.spec, net, plan, **settings)
        return TorchStage(
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

    stages = [
        stage_of(number, stage, read_network(stage, source).to(target))
        for number, (stage, source) in enumerate(loaded.components)
    ]
    decode = None if decoder is None else decoder.decode
    return TorchChain(
        stages, decode, seed=seed, uint8_rule=system.uint8_rule, device=target,
        fill=batch if compile == "on" else None,
    )  # fmt: skip
