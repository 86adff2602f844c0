"""Images per second of a DiT training step at 32x32x4, beside public code, in one process.

    python benchmarks/train_step.py [--backbones dit-s-8,dit-s-2] [--batch N] [--runs 5] [--out FILE.json]

Two comparisons, each the median of interleaved runs (machines are noisy; only the ratios mean something):

1. equal precision: forward, mean squared error, backward and one AdamW update of our network and of diffusers'
   DiTTransformer2DModel of the same size, in float32 and under bfloat16 autocast;
2. whole step: the trainer of the harness with the precision that `auto` picks here (bfloat16 where it is faster, fused
   AdamW, one-call EMA, hybrid loss, counter-based noise) against the public recipe on the same network: float32,
   unfused AdamW, EMA in a loop over the parameters, the same loss.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from harness import registry
from harness.data.images import ImageSet
from harness.diffusion.schedule import Schedule
from harness.engines.torch.loss import LossTables, training_losses
from harness.engines.torch.resolve import PRECISIONS, autocast, device_name, measure
from harness.engines.torch.trainer import TorchEngine, build
from harness.protocols import Recipe
from harness.runs import Resolved

# Images a step, unless --batch says otherwise: enough that the step is arithmetic and not the optimiser's pass over the
# weights, which costs the same at any batch (the paper's batch is 256).
BATCH = {"dit-s-8": 64}
OTHER_BATCH = 16
INPUT = {"input_size": 32, "in_channels": 4, "num_classes": 1000, "out_channels": 8}
CPU = torch.device("cpu")


def diffusers_dit(arguments: dict) -> torch.nn.Module:
    """diffusers' DiT of the same depth, width, heads and patch, called as (x, t, y)."""
    from harness.torchvision_torch import make_importable

    make_importable()
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=arguments["heads"],
        attention_head_dim=arguments["width"] // arguments["heads"],
        num_layers=arguments["depth"],
        patch_size=arguments["patch"],
        sample_size=32,
        in_channels=4,
        out_channels=8,
    )

    class Adapter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.net(x, timestep=t, class_labels=y).sample

    return Adapter().train()


def plain_step(net: torch.nn.Module, precision: str, batch: int) -> Callable[[], None]:
    """Forward, mean squared error, backward, AdamW: the same for both networks."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, 32, 32, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    y = torch.randint(0, 1000, (batch,), generator=generator)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0)

    def step() -> None:
        with autocast(CPU, precision):
            output = net(x, t, y)
        (output.float()[:, :4] - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def images(count: int = 512) -> ImageSet:
    """Latent-shaped stand-ins: the speed of a step does not depend on what is on them."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 32, 32, 4), dtype=np.uint8)
    return ImageSet(name="noise", images=pixels, labels=rng.integers(0, 1000, count))


def harness_step(spec, batch: int, precision: str) -> Callable[[], None]:
    """One step of the trainer."""
    resolved = Resolved(
        device="cpu", device_name="", precision=precision, micro_batch=batch, threads=torch.get_num_threads()
    )
    engine = TorchEngine(
        spec, build(spec, INPUT, 0), arguments=spec.arguments(**INPUT), recipe=Recipe(batch=batch), seed=0, resolved=resolved,
        data=images(),
    )  # fmt: skip
    state = {"step": 0}

    def step() -> None:
        state["step"] += 1
        engine.step(state["step"], lambda: False)
        engine.drain()

    return step


def recipe_step(spec, batch: int) -> Callable[[], None]:
    """The public recipe (facebookresearch/DiT train.py): float32, AdamW as torch makes it, EMA tensor by tensor."""
    net = build(spec, INPUT, 0).train()
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0)
    tables = LossTables(Schedule.named("linear", 1000))
    objective = registry.objectives.get("epsilon-learned-range")
    data = images()
    pixels = torch.from_numpy(data.images).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.labels)

    def step() -> None:
        rows = torch.randint(0, len(labels), (batch,))
        x = pixels[rows].float() / 127.5 - 1
        t = torch.randint(0, 1000, (batch,))
        noise = torch.randn_like(x)
        y = torch.where(torch.rand(batch) < 0.1, 1000, labels[rows])
        mse, vb = training_losses(objective, tables, net(tables.q_sample(x, t, noise), t, y), x, t, noise)
        (mse + vb).mean().item()
        optimizer.zero_grad()
        (mse + vb).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), net.parameters(), strict=True):
                average.mul_(0.9999).add_(weight, alpha=1 - 0.9999)

    return step


def compare(ours: Callable[[], None], theirs: Callable[[], None], batch: int, runs: int) -> dict[str, float]:
    """Medians of interleaved runs, images/s, and the median of the runs' ratios."""
    ours()
    theirs()
    speeds = []
    for _ in range(runs):
        pair = []
        for step in (ours, theirs):
            begin = time.perf_counter()
            step()
            step()
            pair.append(2 * batch / (time.perf_counter() - begin))
        speeds.append(pair)
    ratios = sorted(a / b for a, b in speeds)
    return {
        "ours_images_per_second": statistics.median(a for a, _ in speeds),
        "theirs_images_per_second": statistics.median(b for _, b in speeds),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default="dit-s-8,dit-s-2")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="diffusers")
    print(f"{device_name(CPU)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    rows = []
    for name in options.backbones.split(","):
        spec = registry.backbones.get(name)
        arguments = spec.arguments(**INPUT)
        batch = options.batch or BATCH.get(name, OTHER_BATCH)
        for precision in PRECISIONS:
            torch.manual_seed(0)
            ours = plain_step(spec.build("torch", **INPUT).train(), precision, batch)
            theirs = plain_step(diffusers_dit(arguments), precision, batch)
            rows.append({"backbone": name, "batch": batch, "against": f"diffusers, both {precision}"})
            rows[-1] |= compare(ours, theirs, batch, options.runs)
            show(rows[-1])
            del ours, theirs
        probe = spec.build("torch", **INPUT).train()
        speed = {each: measure(probe, min(batch, 16), INPUT, CPU, each) for each in PRECISIONS}
        auto = min(speed, key=lambda each: speed[each])
        del probe
        rows.append({"backbone": name, "batch": batch, "against": f"the public recipe (ours: auto = {auto})"})
        rows[-1] |= compare(harness_step(spec, batch, auto), recipe_step(spec, batch), batch, options.runs)
        show(rows[-1])
    if options.out:
        options.out.write_text(
            json.dumps({"device": device_name(CPU), "torch": torch.__version__, "rows": rows}, indent=2)
        )


def show(row: dict) -> None:
    print(
        f"{row['backbone']:<8} batch {row['batch']:<3} against {row['against']:<40} {row['ours_images_per_second']:8.2f} : "
        f"{row['theirs_images_per_second']:8.2f} images/s   ratio {row['ratio']:.2f} "
        f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
        flush=True,
    )


if __name__ == "__main__":
    main()
