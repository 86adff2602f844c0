"""Images per second of a DiT training step at 32x32x4, beside public code, in one process.

    python benchmarks/train_step.py [--backbones dit-s-8,dit-s-2] [--batch N] [--threads N] [--runs 5] [--out FILE.json]

Three comparisons, each the median of interleaved runs (machines are noisy; only the ratios mean something):

1. equal precision: forward, mean squared error, backward and one AdamW update of our network and of diffusers'
   DiTTransformer2DModel of the same size, in float32 and under bfloat16 autocast;
2. equal precision: the whole step of the trainer of the harness (fused AdamW, one-call EMA, hybrid loss, counter-based
   noise) against that of the public recipe (its own network too): float32, unfused AdamW, EMA in a loop over the
   parameters, the same loss;
3. everything on: the same, compiled where there is a compiler, with the precision that `auto` picks here (bfloat16 where
   it is faster), against the same recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # run as a file or imported by a path

import peers
from peers import CPU, INPUT, ceiling, compare, diffusers_dit, faster, noise_images, recipe_step, show

from harness import registry
from harness.compute import TRAINING_FACTOR
from harness.engines.torch.compiling import unavailable_reason
from harness.engines.torch.resolve import PRECISIONS, autocast
from harness.engines.torch.trainer import TorchEngine, build
from harness.protocols import Recipe
from harness.runs.run import Resolved

# Images a step, unless --batch says otherwise: enough that the step is arithmetic and not the optimiser's pass over the
# weights, which costs the same at any batch (the paper's batch is 256).
BATCH = {"dit-s-8": 64}
OTHER_BATCH = 16


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


def harness_step(spec, batch: int, precision: str, compile: str) -> Callable[[], None]:
    """One step of the trainer."""
    resolved = Resolved(
        device="cpu",
        device_name="",
        precision=precision,
        micro_batch=batch,
        threads=torch.get_num_threads(),
        compile=compile,
    )
    engine = TorchEngine(
        spec, build(spec, INPUT, 0), arguments=spec.arguments(**INPUT), recipe=Recipe(batch=batch), seed=0, resolved=resolved,
        data=noise_images(),
    )  # fmt: skip
    state = {"step": 0}

    def step() -> None:
        state["step"] += 1
        engine.step(state["step"], lambda: False)
        engine.pop_losses()

    return step


def twice(step: Callable[[], None]) -> Callable[[], None]:
    """What is timed: two steps."""

    def both() -> None:
        step()
        step()

    return both


def main() -> None:
    options = peers.options(__doc__, "this alone [default: both, and the faster for 3]")
    rows = []
    for name in options.backbones.split(","):
        spec = registry.backbones.get(name)
        arguments = spec.arguments(**INPUT)
        batch = options.batch or BATCH.get(name, OTHER_BATCH)
        wanted = [options.precision] if options.precision else list(PRECISIONS)
        for precision in wanted:
            torch.manual_seed(0)
            ours = plain_step(spec.build("torch", **INPUT).train(), precision, batch)
            theirs = plain_step(diffusers_dit(arguments), precision, batch)
            rows.append({"backbone": name, "batch": batch, "against": f"diffusers, both {precision}"})
            rows[-1] |= compare(twice(ours), twice(theirs), 2 * batch, options.runs)
            show(rows[-1])
            del ours, theirs
        if "float32" in wanted:  # the recipe's
            rows.append({"backbone": name, "batch": batch, "against": "the public recipe, both float32"})
            both = twice(harness_step(spec, batch, "float32", "off")), twice(recipe_step(spec, batch))
            rows[-1] |= compare(*both, 2 * batch, options.runs)
            show(rows[-1])
        auto = faster(spec, batch, options.precision)
        compiled = "off" if unavailable_reason(CPU) else "on"
        rows.append(
            {"backbone": name, "batch": batch, "against": f"the public recipe (ours: {auto}, compile {compiled})"}
        )
        both = twice(harness_step(spec, batch, auto, compiled)), twice(recipe_step(spec, batch))
        rows[-1] |= compare(*both, 2 * batch, options.runs)
        show(rows[-1])
        rows[-1] |= ceiling(rows[-1], 2 * TRAINING_FACTOR * spec.count(**INPUT).macs * 2 * batch)
    peers.keep(rows, options.out)


if __name__ == "__main__":
    main()
