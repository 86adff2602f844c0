"""Images per second of the training step and of sampling, torch and jax beside each other, in one process.

    python benchmarks/frameworks.py [--backbones dit-s-8,adm-xs] [--precision float32] [--runs 5] [--profile] [--out FILE.json]

Each engine is the one that `harness run` uses, on the same random images, from the same weights. Ratios are the median
of interleaved runs; what jax compiles is timed apart. `--device cuda` takes an accelerator that both see. `--profile`
times what a step of DiT-S/2 at batch 16 is made of, with gradients: a matrix product, attention, an activation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from backbones.flax_layers import attend
from backbones.flax_weights import from_torch
from harness import registry
from harness.data.images import ImageSet
from harness.diffusion.sampler_plan import sampler_plan
from harness.engines.jax import mesh as devices
from harness.engines.jax.compiling import jit
from harness.engines.jax.sampling import Network, make_run_sampler
from harness.engines.jax.trainer import JaxEngine
from harness.engines.torch import resolve
from harness.engines.torch.sampling import TorchSampler
from harness.engines.torch.trainer import TorchEngine, build
from harness.protocols import Recipe, Sampling
from harness.runs.run import Resolved

LATENTS = {"input_size": 32, "in_channels": 4, "num_classes": 1000}  # the paper's at 256 pixels
DIGITS = {"input_size": 8, "in_channels": 1, "num_classes": 10}
# Enough images a step that it is arithmetic and not the optimiser's pass over the weights.
CASES = {
    "dit-b-2": (LATENTS, 64),
    "dit-s-8": (LATENTS, 64),
    "dit-s-2": (LATENTS, 16),
    "adm-xs": (DIGITS, 64),
    "ldm-xs": (DIGITS, 64),
}
SAMPLER_STEPS = 5


class Bench:
    """Both engines and both samplers of one backbone."""

    def __init__(self, name: str, precision: str, device: str):
        self.spec, (inputs, self.batch) = registry.backbones.get(name), CASES[name]
        arguments = self.spec.arguments(**inputs, out_channels=2 * inputs["in_channels"])
        size, channels = inputs["input_size"], inputs["in_channels"]
        generator = np.random.RandomState(0)
        data = ImageSet(
            name="noise",
            images=generator.randint(0, 256, (512, size, size, channels)).astype(np.uint8),
            labels=generator.randint(0, inputs["num_classes"], 512),
        )
        target = resolve.pick_device(device)
        net = build(self.spec, arguments, 0)
        weights = {key: value.numpy().copy() for key, value in net.state_dict().items()}
        flax_net = nnx.eval_shape(lambda: self.spec.build("jax", **arguments))
        nnx.update(flax_net, jax.tree.map(jnp.asarray, from_torch(flax_net, weights)))
        common: dict[str, Any] = {
            "device": device,
            "device_name": "",
            "precision": precision,
            "micro_batch": self.batch,
        }
        settings: dict[str, Any] = {"arguments": arguments, "recipe": Recipe(batch=self.batch), "seed": 0, "data": data}
        self.engines = {
            "torch": TorchEngine(
                self.spec, net, resolved=Resolved(**common, threads=torch.get_num_threads()), **settings
            ),
            "jax": JaxEngine(self.spec, flax_net, resolved=Resolved(**common, threads=devices.threads()), **settings),
        }
        plan = sampler_plan(
            "ddpm", SAMPLER_STEPS, schedule="linear", diffusion_steps=1000, objective="epsilon-learned-range"
        )
        mesh = devices.make_mesh(devices.pick_devices(device)[:1], None)
        again = self.spec.build("torch", **arguments)
        again.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
        network = Network.load(self.spec, arguments, weights, precision, mesh)
        self.samplers = {
            "torch": TorchSampler(
                self.spec, again, plan, Sampling(), arguments=arguments, precision=precision, device=target
            ),
            "jax": make_run_sampler(
                self.spec,
                network,
                plan,
                Sampling(),
                arguments=arguments,
                precision=precision,
                mesh=mesh,
                batch=self.batch,
            ),
        }
        self._step = dict.fromkeys(self.engines, 0)

    def train(self, framework: str) -> None:
        """Two steps, waited for."""
        for _ in range(2):
            self._step[framework] += 1
            self.engines[framework].step(self._step[framework], lambda: False)
        self.engines[framework].pop_losses()

    def sample(self, framework: str) -> None:
        """One batch in a few steps."""
        self.samplers[framework].draw(np.arange(self.batch), np.arange(self.batch) % 10)


def compare(work: Callable[[str], None], images: int, runs: int) -> dict[str, float]:
    """Images a second of both (medians), the ratio jax : torch, and what jax's first call took beyond a later one."""
    first = {}
    for framework in ("torch", "jax"):
        begin = time.perf_counter()
        work(framework)
        first[framework] = time.perf_counter() - begin
        work(framework)  # a sampler learns how many steps to give the device at once
    speeds: dict[str, list[float]] = {"torch": [], "jax": []}
    for _ in range(runs):
        for framework, found in speeds.items():
            begin = time.perf_counter()
            work(framework)
            found.append(images / (time.perf_counter() - begin))
    ratios = sorted(a / b for a, b in zip(speeds["jax"], speeds["torch"], strict=True))
    return {
        "torch_images_per_second": statistics.median(speeds["torch"]),
        "jax_images_per_second": statistics.median(speeds["jax"]),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "jax_compile_seconds": first["jax"] - images / statistics.median(speeds["jax"]),
    }


def profile(runs: int) -> list[dict[str, Any]]:
    """Forward and backward of single operations on the CPU, both frameworks: milliseconds, medians, interleaved."""
    tokens, heads = (16, 256, 384), (16, 6, 256, 64)
    operations: dict[str, tuple[Callable, Callable, tuple]] = {
        "matrix product 4096 x 384 x 1536": (torch.matmul, jnp.matmul, ((4096, 384), (384, 1536))),
        "attention, 16 x 6 x 256 x 64": (
            torch.nn.functional.scaled_dot_product_attention,
            lambda *qkv: attend(*(x.transpose(0, 2, 1, 3) for x in qkv)).transpose(0, 2, 1, 3),
            (heads, heads, heads),
        ),
        "GELU, 16 x 256 x 1536": (
            lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
            jax.nn.gelu,
            ((*tokens[:2], 1536),),
        ),
    }
    rows = []
    for name, (theirs, ours, shapes) in operations.items():
        arrays = [np.random.RandomState(0).standard_normal(shape).astype(np.float32) for shape in shapes]
        tensors = [torch.from_numpy(array).requires_grad_() for array in arrays]

        def loss(*values: jax.Array, ours: Callable = ours) -> jax.Array:
            return (ours(*values) ** 2).sum()

        gradient = jit(jax.grad(loss, argnums=tuple(range(len(arrays)))), "cpu")

        def work(framework: str, *, theirs=theirs, tensors=tensors, gradient=gradient, arrays=arrays) -> None:
            if framework == "torch":
                torch.autograd.grad((theirs(*tensors) ** 2).sum(), tensors)
            else:
                jax.block_until_ready(gradient(*arrays))

        found = compare(work, 1, runs)
        rows.append({"operation": name, **{k: found[k] for k in ("ratio", "ratio_low", "ratio_high")}})
        torch_ms, jax_ms = (1e3 / found[f"{each}_images_per_second"] for each in ("torch", "jax"))
        rows[-1] |= {"torch_ms": torch_ms, "jax_ms": jax_ms}
        print(f"{name:<34} torch {torch_ms:7.1f}  jax {jax_ms:7.1f} ms   ratio {found['ratio']:.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default="dit-s-8,dit-s-2,adm-xs")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = resolve.device_name(resolve.pick_device(options.device))
    threads = f"{torch.get_num_threads()} threads of torch, {devices.threads()} of jax"
    print(f"{name}, torch {torch.__version__}, jax {jax.__version__}, {threads}, {options.precision}")
    operations = profile(options.runs) if options.profile else []
    rows = []
    for backbone in options.backbones.split(","):
        bench = Bench(backbone, options.precision, options.device)
        for what, work, images in (("training", bench.train, 2 * bench.batch), ("sampling", bench.sample, bench.batch)):
            rows.append({"backbone": backbone, "batch": bench.batch, "what": what})
            rows[-1] |= compare(work, images, options.runs)
            row = rows[-1]
            print(
                f"{backbone:<8} batch {bench.batch:<3} {what:<9} torch {row['torch_images_per_second']:8.2f}  "
                f"jax {row['jax_images_per_second']:8.2f} images/s   ratio {row['ratio']:.2f} "
                f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]   compiled in {row['jax_compile_seconds']:.1f} s",
                flush=True,
            )
    if options.out:
        facts = {"device": name, "torch": torch.__version__, "jax": jax.__version__, "precision": options.precision}
        options.out.write_text(json.dumps({**facts, "rows": rows, "operations": operations}, indent=2))


if __name__ == "__main__":
    main()
