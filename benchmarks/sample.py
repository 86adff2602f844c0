"""Images per second of sampling a DiT at 32x32x4 with guidance, beside public code, in one process.

    python benchmarks/sample.py [--backbones dit-s-8,dit-s-2] [--batch N] [--steps N] [--threads N] [--runs 5] [--out FILE.json]

Three comparisons, each the median of interleaved runs (machines are noisy; only the ratios mean something), from noise
to latents, with guidance 4 of a doubled batch:

1. equal precision: the sampler of the harness against diffusers' DiTPipeline (its DDIM, its network of the same size, and
   no VAE), both in float32;
2. equal precision: the same against the public recipe (facebookresearch/DiT sample.py: p_sample_loop);
3. everything on: the precision that is faster here, compiled where there is a compiler, against the public recipe in
   float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))  # run as a file or imported by a path

import peers
from peers import CPU, INPUT, PublicDiffusion, PublicNetwork, ceiling, compare, diffusers_pipeline, faster, show

from harness import registry
from harness.diffusion.sampler_plan import sampler_plan
from harness.engines.torch.compiling import unavailable_reason
from harness.engines.torch.sampling import TorchSampler
from harness.engines.torch.trainer import build
from harness.protocols import Sampling

BATCH = {"dit-s-8": 64}  # images, unless --batch says otherwise: half of what the network sees at once
OTHER_BATCH = 8
GUIDANCE = 4.0


def network(spec) -> torch.nn.Module:
    """The network with weights that make it do something: at its initialisation it answers 0."""
    net = build(spec, INPUT, 0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in net.named_parameters():
        if "adaLN" in name or "final" in name:
            weight.normal_(std=0.02, generator=generator)
    return net


def harness_draw(
    spec, sampler: str, batch: int, steps: int, precision: str, compile: str = "off"
) -> Callable[[], np.ndarray]:
    """One batch of the sampler that `harness sample` uses."""
    plan = sampler_plan(sampler, steps, schedule="linear", diffusion_steps=1000, objective="epsilon-learned-range")
    channels = "first-3" if sampler == "ddpm" else "all"  # as the peer of each has it
    sampling = Sampling(sampler=sampler, guidance_scale=GUIDANCE, guidance_channels=channels)
    drawn = TorchSampler(
        spec, network(spec), plan, sampling, arguments=spec.arguments(**INPUT), precision=precision, device=CPU,
        compile=compile, batch=batch,
    )  # fmt: skip
    index = np.arange(batch)
    return lambda: drawn.draw(index, index)


def recipe_draw(spec, batch: int, steps: int) -> Callable[[], torch.Tensor]:
    """One batch of the public recipe."""
    net, diffusion = PublicNetwork(network(spec)), PublicDiffusion(steps)
    x = torch.randn(batch, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    return lambda: diffusion.loop(net, x, torch.arange(batch), GUIDANCE, 1000)


def main() -> None:
    steps = {"type": int, "default": 4, "help": "of the sampler"}
    options = peers.options(__doc__, "for 3 [default: the faster]", steps=steps)
    rows = []
    for name in options.backbones.split(","):
        spec = registry.backbones.get(name)
        batch, steps = options.batch or BATCH.get(name, OTHER_BATCH), options.steps

        def against(what: str, ours: Callable, theirs: Callable, name: str = name, batch: int = batch) -> None:
            rows.append({"backbone": name, "batch": batch, "steps": options.steps, "against": what})
            rows[-1] |= compare(ours, theirs, batch, options.runs)
            show(rows[-1])

        labels = list(range(batch))
        against(
            "diffusers, DDIM, both float32",
            harness_draw(spec, "ddim", batch, steps, "float32"),
            diffusers_pipeline(spec.arguments(**INPUT), labels, steps, GUIDANCE),
        )
        recipe = recipe_draw(spec, batch, steps)
        against("the public recipe, both float32", harness_draw(spec, "ddpm", batch, steps, "float32"), recipe)
        fastest = faster(spec, batch, options.precision)
        compiled = "off" if unavailable_reason(CPU) else "on"
        ours = harness_draw(spec, "ddpm", batch, steps, fastest, compiled)
        against(f"the public recipe (ours: {fastest}, compile {compiled})", ours, recipe)
        rows[-1] |= ceiling(rows[-1], 2 * spec.count(**INPUT).macs * 2 * batch * steps)
    peers.keep(rows, options.out)


if __name__ == "__main__":
    main()
