"""What tables and objectives cost: the harness's loops beside hand-written ones, and training as SiT beside DiT, in one process.

    python benchmarks/cost.py [--backbone dit-xs-2] [--batch 8] [--steps 50] [--runs 31] [--threads N] [--out FILE.json]

In torch and in JAX, float32, on digits' 8x8 images:

1. sampling: the loop over a sampler's table (`harness.engines`) against DDPM and DDIM written by hand with the same
   arithmetic, the same network and the same noise. Both give the same images, which is checked first;
2. training: a step of `objective=sit` against one of `objective=dit`, by the trainer of the harness.

A ratio above 1 says that the harness's loop, or SiT's step, is the faster one. Both sides take turns, and which one begins
alternates. Printed are the median of the ratios of N pairs and its distribution-free 95 % interval (order statistics), in
wall time and in processor time, which other programs on the machine hardly move.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from backbones.flax_weights import from_torch
from harness import registry
from harness.data.images import ImageSet
from harness.diffusion.respacing import space_timesteps
from harness.diffusion.sampler_plan import sampler_plan
from harness.diffusion.schedule import Schedule
from harness.engines.jax import mesh as devices
from harness.engines.jax.plan_arrays import split_plan
from harness.engines.jax.sampler import first_carry, sample_steps
from harness.engines.jax.trainer import JaxEngine
from harness.engines.torch.resolve import device_name
from harness.engines.torch.sampler import sample_loop
from harness.engines.torch.trainer import TorchEngine, build
from harness.protocols import Recipe, override
from harness.runs.run import Resolved

SIDE, CHANNELS, CLASSES = 8, 1, 10  # of digits
DIGITS = {"input_size": SIDE, "in_channels": CHANNELS, "num_classes": CLASSES}
CONFIDENCE = 0.95
Arrays = dict[str, np.ndarray]


class Networks:
    """One network with the same weights in both frameworks, and the noise of all steps."""

    def __init__(self, name: str, batch: int, steps: int):
        self.spec, self.batch, self.steps = registry.backbones.get(name), batch, steps
        self.arguments = self.spec.arguments(**DIGITS, out_channels=2 * CHANNELS)
        self.torch_net = build(self.spec, self.arguments, 0).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for name, weight in self.torch_net.named_parameters():
            if "adaLN" in name or "final" in name:  # at its initialisation the network answers 0
                weight.normal_(std=0.02, generator=generator)
        weights = {key: value.numpy().copy() for key, value in self.torch_net.state_dict().items()}
        net = nnx.eval_shape(lambda: self.spec.build("jax", **self.arguments))
        self.graph, _ = nnx.split(net)
        self.state = jax.tree.map(jnp.asarray, from_torch(net, weights))
        shape = (batch, CHANNELS, SIDE, SIDE)
        self.x = torch.randn(shape, generator=generator)
        self.noise = torch.randn((steps, *shape), generator=generator)
        self.labels = torch.arange(batch) % CLASSES


def arithmetic(sampler: str, steps: int) -> tuple[np.ndarray, Arrays]:
    """(timesteps, coefficients by name), in the order of sampling: Ho et al. 2020 with the learned variance, or Song et al.
    2021 with eta 0."""
    schedule = Schedule.named("linear", 1000)
    spaced = schedule.respaced(space_timesteps(len(schedule), steps))
    of = {"recip": spaced.sqrt_recip_abar, "recipm1": spaced.sqrt_recipm1_abar}
    if sampler == "ddpm":
        of |= {
            "from_x": spaced.posterior_mean_from_xt,
            "from_x0": spaced.posterior_mean_from_x0,
            "low": spaced.posterior_log_variance_clipped,
            "high": spaced.log_betas,
        }
    else:
        direction = np.sqrt(1 - spaced.abar_prev) / spaced.sqrt_recipm1_abar
        of |= {"from_x": direction * spaced.sqrt_recip_abar, "from_x0": np.sqrt(spaced.abar_prev) - direction}
    return spaced.timesteps[::-1].copy(), {name: values[::-1].copy() for name, values in of.items()}


def torch_pair(nets: Networks, sampler: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the loop over the table, the loop by hand) in torch; each returns x_0."""
    timesteps, of = arithmetic(sampler, nets.steps)
    plan = plan_of(sampler, nets.steps)
    net, noise, labels = nets.torch_net, nets.noise, nets.labels

    @torch.inference_mode()
    def by_hand() -> torch.Tensor:
        x = nets.x
        for k, t in enumerate(timesteps):
            out = net(x, torch.full((len(x),), int(t)), labels)
            x0 = float(of["recip"][k]) * x - float(of["recipm1"][k]) * out[:, :CHANNELS]
            x_next = float(of["from_x0"][k]) * x0 + float(of["from_x"][k]) * x
            if sampler == "ddpm" and k < len(timesteps) - 1:
                share = (out[:, CHANNELS:] + 1) / 2
                log_variance = share * float(of["high"][k]) + (1 - share) * float(of["low"][k])
                x_next = x_next + torch.exp(0.5 * log_variance) * noise[k]
            x = x_next
        return x

    return (
        lambda: sample_loop(lambda x, t, row: net(x, t, labels), plan, nets.x, lambda k: noise[k]),
        by_hand,
    )


def jax_pair(nets: Networks, sampler: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the loop over the table, the loop by hand) in JAX, each one compiled function; each returns x_0."""
    timesteps, of = arithmetic(sampler, nets.steps)
    form, plan_arrays = split_plan(plan_of(sampler, nets.steps))
    x, noise = jnp.asarray(nets.x.numpy()), jnp.asarray(nets.noise.numpy())
    labels = jnp.asarray(nets.labels.numpy().astype(np.int32))
    times = jnp.asarray(timesteps.astype(np.int32))
    constants = {name: jnp.asarray(values.astype(np.float32)) for name, values in of.items()}
    last = nets.steps - 1

    @jax.jit
    def by_table(state: nnx.State, arrays: Any, x: jax.Array, noise: jax.Array, rows: jax.Array) -> jax.Array:
        net = nnx.merge(nets.graph, state)
        predict = lambda x, t, row: net(x, t, labels)  # noqa: E731
        return sample_steps(predict, form, arrays, first_carry(form, x), 0, rows, lambda k: noise[k]).x

    @jax.jit
    def by_hand(state: nnx.State, of: Any, x: jax.Array, noise: jax.Array) -> jax.Array:
        net = nnx.merge(nets.graph, state)

        def step(k: jax.Array, x: jax.Array) -> jax.Array:
            out = net(x, jnp.full((len(x),), times[k]), labels)
            x0 = of["recip"][k] * x - of["recipm1"][k] * out[:, :CHANNELS]
            x_next = of["from_x0"][k] * x0 + of["from_x"][k] * x
            if sampler == "ddim":
                return x_next
            share = (out[:, CHANNELS:] + 1) / 2
            log_variance = share * of["high"][k] + (1 - share) * of["low"][k]
            return jnp.where(k < last, x_next + jnp.exp(0.5 * log_variance) * noise[k], x_next)

        return jax.lax.fori_loop(0, nets.steps, step, x)

    arrays = jax.tree.map(jnp.asarray, plan_arrays)
    return (
        lambda: by_table(nets.state, arrays, x, noise, nets.steps).block_until_ready(),
        lambda: by_hand(nets.state, constants, x, noise).block_until_ready(),
    )


def plan_of(sampler: str, steps: int) -> Any:
    return sampler_plan(sampler, steps, schedule="linear", diffusion_steps=1000, objective="epsilon-learned-range")


def training_step(framework: str, name: str, objective: str, batch: int) -> Callable[[], None]:
    """One step of the trainer with `objective`, waited for."""
    spec = registry.backbones.get(name)
    recipe = override(Recipe(batch=batch), {"objective": objective})
    out = registry.objectives.get(recipe.objective).out_channels(CHANNELS)
    arguments = spec.arguments(**DIGITS, out_channels=out)
    generator = np.random.RandomState(0)
    images = generator.randint(0, 256, (512, SIDE, SIDE, CHANNELS)).astype(np.uint8)
    data = ImageSet(name="noise", images=images, labels=generator.randint(0, CLASSES, 512))
    threads = torch.get_num_threads() if framework == "torch" else devices.threads()
    resolved = Resolved(device="cpu", device_name="", precision="float32", micro_batch=batch, threads=threads)
    settings: dict[str, Any] = {
        "arguments": arguments, "recipe": recipe, "seed": 0, "resolved": resolved, "data": data,
    }  # fmt: skip
    net = build(spec, arguments, 0)
    engine: Any
    if framework == "torch":
        engine = TorchEngine(spec, net, **settings)
    else:
        weights = {key: value.numpy().copy() for key, value in net.state_dict().items()}
        flax_net = nnx.eval_shape(lambda: spec.build("jax", **arguments))
        nnx.update(flax_net, jax.tree.map(jnp.asarray, from_torch(flax_net, weights)))
        engine = JaxEngine(spec, flax_net, **settings)
    done = 0

    def step() -> None:
        nonlocal done
        for _ in range(5):
            done += 1
            engine.step(done, lambda: False)
        engine.pop_losses()

    return step


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """(median, low, high): the interval of order statistics that holds the median with a chance of at least 95 %; all
    values, of fewer than 6."""
    ordered, count = sorted(values), len(values)
    rank, below = 0, 0.0  # how many values are left out at each end
    while rank < (count - 1) // 2:
        below += math.comb(count, rank) / 2**count  # P(fewer than rank + 1 values lie below the median)
        if below > (1 - CONFIDENCE) / 2:
            break
        rank += 1
    rank = max(rank - 1, 0)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return middle, ordered[rank], ordered[count - 1 - rank]


def compare(what: str, first: Callable[[], Any], second: Callable[[], Any], runs: int) -> dict[str, Any]:
    """Time of `second` over time of `first`, of `runs` pairs: the speed of the first relative to the second."""
    for call in (first, second, first, second):  # compiled, and warm
        call()
    wall, processor, seconds = [], [], []
    for run in range(runs):
        spent = {}
        for side in (0, 1) if run % 2 else (1, 0):
            begin, used = time.perf_counter(), time.process_time()
            (first, second)[side]()
            spent[side] = (time.perf_counter() - begin, time.process_time() - used)
        wall.append(spent[1][0] / spent[0][0])
        processor.append(spent[1][1] / spent[0][1])
        seconds.append(spent[0][0])
    row: dict[str, Any] = {"what": what, "n": runs, "median_seconds": float(np.median(seconds))}
    for clock, ratios in (("wall", wall), ("processor", processor)):
        row[clock] = dict(zip(("ratio", "low", "high"), median_interval(ratios), strict=True))
    texts = [f"{clock} {row[clock]['ratio']:.3f} [{row[clock]['low']:.3f}, {row[clock]['high']:.3f}]" for clock in ("wall", "processor")]  # fmt: skip
    print(f"{what:<46} {texts[0]}   {texts[1]}   N {runs}, {1000 * row['median_seconds']:.1f} ms", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dit-xs-2")
    parser.add_argument("--batch", type=int, default=8, help="of sampling; training takes 4 times as many")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--threads", type=int, help="of torch [default: as many as it takes]")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = {
        "device": device_name(torch.device("cpu")), "torch": torch.__version__, "jax": jax.__version__,
        "threads": torch.get_num_threads(), "backbone": options.backbone, "batch": options.batch, "steps": options.steps,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    nets, rows = Networks(options.backbone, options.batch, options.steps), []
    for framework, pair in (("torch", torch_pair), ("jax", jax_pair)):
        for sampler in ("ddpm", "ddim"):
            ours, by_hand = pair(nets, sampler)
            found, expected = np.asarray(ours()), np.asarray(by_hand())
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
            rows.append(compare(f"{framework}, {sampler}: table loop / by hand", ours, by_hand, options.runs))
    for framework in ("torch", "jax"):
        steps = [training_step(framework, options.backbone, each, 4 * options.batch) for each in ("sit", "dit")]
        rows.append(compare(f"{framework}, 5 training steps: sit / dit", *steps, options.runs))
    if options.out:
        options.out.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
