"""What the DiT benchmarks compare with, and how: diffusers' network and pipeline, the public recipe, interleaved runs.

The public recipe is that of facebookresearch/DiT ed81ce2 (train.py, sample.py, models.py, diffusion/): its operations in
its order, on our weights, whose names are the same. Its blocks are timm's, with the fused attention of timm 0.9 or newer.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from harness.data.images import ImageSet
from harness.diffusion.respacing import space_timesteps
from harness.diffusion.schedule import Schedule
from harness.diffusion.training import TrainingObjective
from harness.engines.torch.loss import DenoisingLoss
from harness.engines.torch.resolve import PRECISIONS, device_name, measure
from harness.engines.torch.trainer import build
from harness.protocols import Recipe

INPUT = {"input_size": 32, "in_channels": 4, "num_classes": 1000, "out_channels": 8}
CPU = torch.device("cpu")


def options(description: str, precision: str, **more: dict) -> argparse.Namespace:
    """The command line of a benchmark, read, and torch set up as it asks. more: options of this one alone, as argparse
    takes them; precision: what `--precision` means in it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default="dit-s-8,dit-s-2")
    parser.add_argument("--batch", type=int)
    for name, words in more.items():
        parser.add_argument(f"--{name}", **words)
    parser.add_argument("--precision", choices=PRECISIONS, help=precision)
    parser.add_argument("--threads", type=int, help="of torch [default: as many as it takes]")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    found = parser.parse_args()
    warnings.filterwarnings("ignore", module="diffusers")
    if found.threads is not None:
        torch.set_num_threads(found.threads)
    print(f"{device_name(CPU)}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    return found


def keep(rows: list[dict], out: Path | None) -> None:
    """The rows with what measured them, as JSON at `out`, if anywhere."""
    if out:
        facts = {"device": device_name(CPU), "torch": torch.__version__, "threads": torch.get_num_threads()}
        out.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


def diffusers_network(arguments: dict) -> torch.nn.Module:
    """diffusers' DiTTransformer2DModel of the same depth, width, heads and patch."""
    from harness.frameworks.torchvision import make_importable

    make_importable()
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=arguments["heads"],
        attention_head_dim=arguments["width"] // arguments["heads"],
        num_layers=arguments["depth"],
        patch_size=arguments["patch"],
        sample_size=32,
        in_channels=4,
        out_channels=8,
    )


def diffusers_dit(arguments: dict) -> torch.nn.Module:
    """The same, called as (x, t, y)."""
    net = diffusers_network(arguments)

    class Adapter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.net(x, timestep=t, class_labels=y).sample

    return Adapter().train()


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _attention(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    batch, tokens, width = x.shape
    qkv = layer.qkv(x).reshape(batch, tokens, 3, layer.heads, width // layer.heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return layer.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class PublicNetwork(torch.nn.Module):
    """The public network with the weights of ours (adaLN-Zero), called as (x, t, y)."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        net = self.net
        x = net.x_embedder(x) + net.pos_embed  # (N, T, D)
        c = net.t_embedder(t) + net.y_embedder(y)  # (N, D)
        for block in net.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
            x = x + gate1.unsqueeze(1) * _attention(block.attn, _modulate(block.norm1(x), shift1, scale1))
            hidden = block.mlp.fc1(_modulate(block.norm2(x), shift2, scale2))
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
            x = x + gate2.unsqueeze(1) * block.mlp.fc2(hidden)
        last = net.final_layer
        shift, scale = last.adaLN_modulation(c).chunk(2, dim=1)
        x = last.linear(_modulate(last.norm_final(x), shift, scale))  # (N, T, p * p * C)
        side, p = net.grid, net.patch
        x = x.reshape(x.shape[0], side, side, p, p, net.out_channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(x.shape[0], net.out_channels, side * p, side * p)


class _Undecoded:
    """In the place of the pipeline's VAE: latents leave as they are, so that the loop alone is timed."""

    class config:
        scaling_factor = 1.0

    class Output:
        def __init__(self, sample: torch.Tensor):
            self.sample = sample

    def decode(self, latents: torch.Tensor) -> Output:
        return self.Output(latents)


def diffusers_pipeline(
    arguments: dict, labels: Sequence[int], steps: int, guidance: float
) -> Callable[[], torch.Tensor]:
    """diffusers' DiTPipeline with its DDIM scheduler and guidance: latents (N, 4, 32, 32), in [0, 1]."""
    net = diffusers_network(arguments).eval()
    from diffusers import DDIMScheduler, DiTPipeline

    pipeline = DiTPipeline(transformer=net, vae=None, scheduler=DDIMScheduler(beta_start=1e-4, beta_end=0.02))
    pipeline.vae = _Undecoded()
    pipeline.set_progress_bar_config(disable=True)

    def call() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            class_labels=list(labels), guidance_scale=guidance, generator=generator, num_inference_steps=steps,
            output_type="pt",
        ).images  # fmt: skip

    return call


class PublicDiffusion:
    """p_sample_loop of the public recipe: learned range, no clipping, coefficients looked up for every image."""

    def __init__(self, steps: int):
        schedule = Schedule.named("linear", 1000)
        spaced = schedule.respaced(space_timesteps(1000, steps))
        self.steps, self.timesteps = len(spaced), spaced.timesteps.copy()  # copies: torch wants to write
        self.log_low, self.log_high = spaced.posterior_log_variance_clipped.copy(), spaced.log_betas.copy()
        self.from_x, self.from_eps = spaced.sqrt_recip_abar.copy(), spaced.sqrt_recipm1_abar.copy()
        self.mean_x0, self.mean_xt = spaced.posterior_mean_from_x0.copy(), spaced.posterior_mean_from_xt.copy()

    @staticmethod
    def _extract(values: np.ndarray, t: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        found = torch.from_numpy(values).to(device=t.device)[t].float()
        while len(found.shape) < len(shape):
            found = found[..., None]
        return found + torch.zeros(shape, device=t.device)

    def loop(
        self,
        net: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        x: torch.Tensor,  # (N, C, H, W): the initial noise
        y: torch.Tensor,  # (N,)
        guidance: float,
        null_label: int,
        noise: Callable[[int, torch.Tensor], torch.Tensor] = lambda k, x: torch.randn_like(x),
    ) -> torch.Tensor:
        """Samples (N, C, H, W): sample.py's loop over the doubled batch with forward_with_cfg."""
        x = torch.cat([x, x])  # (2 N, C, H, W)
        y = torch.cat([y, torch.full_like(y, null_label)])
        kept = torch.from_numpy(self.timesteps).to(x.device)
        with torch.no_grad():
            for k, i in enumerate(reversed(range(self.steps))):
                t = torch.tensor([i] * len(x), device=x.device)
                half = x[: len(x) // 2]
                out = net(torch.cat([half, half]), kept[t], y)  # (2 N, 2 C, H, W)
                eps, rest = out[:, :3], out[:, 3:]
                conditional, unconditional = torch.split(eps, len(eps) // 2)
                half_eps = unconditional + guidance * (conditional - unconditional)
                out = torch.cat([torch.cat([half_eps, half_eps]), rest], dim=1)
                output, values = torch.split(out, x.shape[1], dim=1)
                low, high = self._extract(self.log_low, t, x.shape), self._extract(self.log_high, t, x.shape)
                frac = (values + 1) / 2
                log_variance = frac * high + (1 - frac) * low
                x0 = self._extract(self.from_x, t, x.shape) * x - self._extract(self.from_eps, t, x.shape) * output
                mean = self._extract(self.mean_x0, t, x.shape) * x0 + self._extract(self.mean_xt, t, x.shape) * x
                nonzero = (t != 0).float().view(-1, 1, 1, 1)
                x = mean + nonzero * torch.exp(0.5 * log_variance) * noise(k, x)
        return x.chunk(2)[0]


def faster(spec, batch: int, precision: str | None) -> str:
    """`precision`, or the one that `auto` would find faster here."""
    if precision is not None:
        return precision
    net = build(spec, INPUT, 0).train()
    return min(PRECISIONS, key=lambda each: measure(net, min(batch, 16), INPUT, CPU, each))


def noise_images(count: int = 512) -> ImageSet:
    """Latent-shaped stand-ins: the speed of a step does not depend on what is on them."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 32, 32, 4), dtype=np.uint8)
    return ImageSet(name="noise", images=pixels, labels=rng.integers(0, 1000, count))


def recipe_step(spec, batch: int) -> Callable[[], None]:
    """A training step of the public recipe: float32, AdamW as torch makes it, EMA tensor by tensor."""
    net = PublicNetwork(build(spec, INPUT, 0)).train()
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0)
    loss = DenoisingLoss(TrainingObjective.from_recipe(Recipe()))
    data = noise_images()
    pixels = torch.from_numpy(data.images).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.labels)

    def step() -> None:
        rows = torch.randint(0, len(labels), (batch,))
        x = pixels[rows].float() / 127.5 - 1
        t = torch.randint(0, 1000, (batch,))
        noise = torch.randn_like(x)
        y = torch.where(torch.rand(batch) < 0.1, 1000, labels[rows])
        mse, vb = loss.terms(net(loss.noised(x, t, noise), t, y), x, t, noise)
        (mse + vb).mean().item()
        optimizer.zero_grad()
        (mse + vb).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), net.parameters(), strict=True):
                average.mul_(0.9999).add_(weight, alpha=1 - 0.9999)

    return step


def compare(ours: Callable[[], object], theirs: Callable[[], object], images: int, runs: int) -> dict[str, float]:
    """Medians of interleaved runs, images/s (`images` a call), and the median, least and most of the runs' ratios.

    `processor_ratio` is of processor time, which other programs on the machine hardly move when torch has one thread.
    """
    ours()
    theirs()
    speeds, busy = [], []
    for _ in range(runs):
        pair, processor = [], []
        for call in (ours, theirs):
            begin, used = time.perf_counter(), time.process_time()
            call()
            pair.append(images / (time.perf_counter() - begin))
            processor.append(time.process_time() - used)
        speeds.append(pair)
        busy.append(processor)
    ratios = sorted(a / b for a, b in speeds)
    return {
        "ours_images_per_second": statistics.median(a for a, _ in speeds),
        "theirs_images_per_second": statistics.median(b for _, b in speeds),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "processor_ratio": statistics.median(b / a for a, b in busy),
        "theirs_processor_seconds": min(b for _, b in busy),  # a call
    }


def ceiling(row: dict, operations: float) -> dict[str, float]:
    """How many times as fast as the public recipe float32 could be at most, for a row against it: were all else free,
    what is left are its matrix products at the speed of the best one. In operations a second of processor time.

    operations: of one call, a multiply-add being two.
    """
    x, weight = torch.randn(4096, 384), torch.randn(1536, 384)
    best = float("inf")
    for _ in range(20):
        used = time.process_time()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.process_time() - used)
    peak, theirs = 2 * x.numel() * len(weight) / best, operations / row["theirs_processor_seconds"]
    print(
        f"{row['backbone']:<8} matrix products reach {peak / 1e9:.1f} GFLOP a processor second, the public recipe "
        f"{theirs / 1e9:.1f}: in float32 nothing can be more than {peak / theirs:.2f} times as fast",
        flush=True,
    )
    return {"matrix_gflops": peak / 1e9, "theirs_gflops": theirs / 1e9, "float32_ceiling": peak / theirs}


def show(row: dict) -> None:
    """A row of `compare` with the backbone, batch and what was compared."""
    print(
        f"{row['backbone']:<8} batch {row['batch']:<3} against {row['against']:<48} {row['ours_images_per_second']:8.2f} : "
        f"{row['theirs_images_per_second']:8.2f} images/s   ratio {row['ratio']:.2f} "
        f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}], of processor time {row['processor_ratio']:.2f}",
        flush=True,
    )
