"""What only a GPU can show, one check a process: each prints one line of JSON and exits with 1 if it does not hold.

    python benchmarks/gpu_checks.py generator|sync|memory|repeat|checkpoint|features|decoder [--device cuda] [--backbone NAME]

h200.sh runs all of them. With `--device cpu` and a small backbone they show that the script itself works.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))  # run as a file or imported by a path

from harness import registry
from harness.compute.activations import activation_bytes_by_precision
from harness.diffusion.sampler_plan import sampler_plan
from harness.engines.memory import state_bytes
from harness.engines.torch import resolve
from harness.engines.torch.bench import noise_images
from harness.engines.torch.roofline import wait
from harness.engines.torch.sampling import TorchSampler
from harness.engines.torch.trainer import TorchEngine, build
from harness.protocols import Recipe, Sampling
from harness.randomness import threefry_torch
from harness.runs.run import Resolved

GOLDEN = Path(__file__).parents[1] / "tests" / "randomness" / "golden.json"
PLANNED = 0.15  # the peak of memory may differ from the plan by this share
FEATURE_TOLERANCE = 1e-3  # of their root mean square, between a GPU and the CPU, both in float32
SAMPLER_STEPS = 5

Found = tuple[dict[str, Any], bool]  # what was measured, and whether the check holds


def engine_of(options: argparse.Namespace, micro_batch: int, precision: str) -> TorchEngine:
    """The trainer of `--backbone`, with one micro-batch a step."""
    spec = registry.backbones.get(options.backbone)
    given = {} if spec.kind == "classifier" else {"out_channels": 2 * spec.arguments()["in_channels"]}
    arguments = spec.arguments(**given)
    resolved = Resolved(
        device=options.device, device_name="", precision=precision, micro_batch=micro_batch,
        threads=torch.get_num_threads(), compile=options.compile, deterministic=options.deterministic,
    )  # fmt: skip
    return TorchEngine(
        spec, build(spec, arguments, 0), arguments=arguments, recipe=Recipe(batch=micro_batch), seed=0, resolved=resolved,
        data=noise_images(arguments),
    )  # fmt: skip


def train(engine: TorchEngine, steps: range) -> list[tuple[float, ...]]:
    for step in steps:
        engine.step(step, lambda: False)
    return engine.pop_losses()


@contextmanager
def without_synchronisation(device: str) -> Iterator[None]:
    """On a GPU, every call in the block that waits for the device raises RuntimeError."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")


def generator(options: argparse.Namespace) -> Found:
    """The generator's golden values, drawn on the device. Normals may differ in the last place of logarithm and cosine."""
    wrong, apart = 0, 0.0
    rows, device = json.loads(GOLDEN.read_text())["cases"], torch.device(options.device)
    for row in rows:
        where = (row["seed"], row["purpose"], torch.tensor(row["index"]), row["step"])  # the host derives the keys
        wrong += threefry_torch.bits(*where, 5, device).tolist() != row["bits"]
        wrong += threefry_torch.uniform(*where, (3,), device).tolist() != row["uniform"]
        wrong += threefry_torch.integers(*where, 10, device).tolist() != row["integers_10"]
        wrong += threefry_torch.integers(*where, 2**31, device).tolist() != row["integers_2147483648"]
        normal = threefry_torch.normal(*where, (3, 1), device).cpu().double().numpy()
        apart = max(apart, float(np.abs(normal - np.array(row["normal"])).max()))
    return {"cases": len(rows), "wrong": wrong, "normals_apart": apart}, wrong == 0 and apart < 1e-6


def sync(options: argparse.Namespace) -> Found:
    """A training step and five sampler steps that never wait for the device."""
    engine = engine_of(options, options.batch, options.precision)
    train(engine, range(1, 3))  # set-up may wait
    with without_synchronisation(options.device):
        engine.step(3, lambda: False)
    spec = registry.backbones.get(options.backbone)
    arguments = spec.arguments(out_channels=2 * spec.arguments()["in_channels"])
    plan = sampler_plan(
        "ddpm", SAMPLER_STEPS, schedule="linear", diffusion_steps=1000, objective="epsilon-learned-range"
    )
    sampler = TorchSampler(
        spec, build(spec, arguments, 0), plan, Sampling(guidance_scale=4.0), arguments=arguments,
        precision=options.precision, device=torch.device(options.device), batch=options.batch,
    )  # fmt: skip
    index = np.arange(options.batch)
    sampler.draw(index, index % arguments["num_classes"])  # set-up may wait
    steps_without: list[int] = []

    def advance() -> None:  # after each step: from the first to the last nothing may wait
        if torch.device(options.device).type == "cuda":
            steps_without.append(1)
            torch.cuda.set_sync_debug_mode("error" if len(steps_without) < SAMPLER_STEPS else "default")

    try:
        sampler.draw(index, index % arguments["num_classes"], advance)
    finally:
        if torch.device(options.device).type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return {"training_steps": 1, "sampler_steps": SAMPLER_STEPS}, True


def memory(options: argparse.Namespace) -> Found:
    """The peak of memory of a training step, beside the plan's."""
    engine = engine_of(options, options.batch, options.precision)
    train(engine, range(1, 3))
    spec = registry.backbones.get(options.backbone)
    arguments = spec.arguments(
        **({} if spec.kind == "classifier" else {"out_channels": 2 * spec.arguments()["in_channels"]})
    )
    parameters = sum(weight.numel() for weight in engine.net.parameters())
    image = activation_bytes_by_precision(spec, **arguments)[options.precision]
    planned = state_bytes(parameters, options.precision) + options.batch * image
    if torch.device(options.device).type != "cuda":
        return {"planned_bytes": planned, "peak_bytes": None}, True
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    found = {"planned_bytes": planned, "peak_bytes": peak, "ratio": peak / planned, "share_of_device": peak / total}
    return found, abs(peak / planned - 1) <= PLANNED


def repeat(options: argparse.Namespace) -> Found:
    """Whether two trainings have the same bits; if not, how far they are apart, which holds unless --deterministic is given."""
    both, seconds = [], []
    for _ in range(2):
        engine = engine_of(options, options.batch, options.precision)
        losses = train(engine, range(1, 6))
        wait(engine.device)
        begin = time.perf_counter()
        losses += train(engine, range(6, 11))
        wait(engine.device)
        seconds.append((time.perf_counter() - begin) / 5)
        both.append((losses, [weight.detach().cpu() for weight in engine.net.parameters()]))
    (one, first), (other, second) = both
    apart = max(float((a.double() - b.double()).abs().max()) for a, b in zip(first, second, strict=True))
    equal = one == other and apart == 0.0
    found = {"steps": 10, "losses_equal": one == other, "weights_apart": apart, "bits_equal": equal}
    return found | {"step_seconds": min(seconds)}, equal or not options.deterministic


def checkpoint(options: argparse.Namespace) -> Found:
    """Seconds of a checkpoint by part: the copy to the host, and writing with hashing."""
    from harness.runs import checkpoints

    engine = engine_of(options, options.batch, options.precision)
    train(engine, range(1, 3))
    copies: dict[str, float] = {}

    def timed(part: str, tensors: Callable[[], Any]) -> Callable[[], Any]:
        def get() -> Any:
            wait(torch.device(options.device))
            begin = time.perf_counter()
            found = tensors()
            copies[part] = time.perf_counter() - begin
            return found

        return get

    parts = [(part, timed(part, tensors)) for part, tensors in engine.state_dicts()]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        checkpoints.write(Path(folder), 2, parts, {"seconds": 0.0})
        seconds = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "bytes": size,
        "seconds": seconds,
        "copy_seconds": copies,
        "write_seconds": seconds - sum(copies.values()),
    }, True


def features(options: argparse.Namespace) -> Found:
    """Images per second of both feature networks, and how far their features are from the CPU's. Inception's are random."""
    import inception_peers

    from evaluators.features import INCEPTION_2015
    from evaluators.features.inception_v3 import InceptionFeatures

    images = np.random.default_rng(0).integers(0, 256, (options.images, 256, 256, 3), dtype=np.uint8)
    weights, _ = inception_peers.random_weights()
    loaders: dict[str, Callable[[str], Any]] = {
        "efficientnet-lite0-96": lambda device: registry.features.get("efficientnet-lite0-96").load(device),
        "inception-2015-12-05": lambda device: InceptionFeatures(INCEPTION_2015, weights, device=device),
    }
    found: dict[str, Any] = {}
    holds = True
    for name, load in loaders.items():
        extract = load(options.device)
        extract(images[:8])
        wait(torch.device(options.device))
        begin = time.perf_counter()
        here = extract(images).pooled
        seconds = time.perf_counter() - begin
        cpu = load("cpu")(images[:8]).pooled
        apart = float(np.abs(here[:8] - cpu).max() / np.sqrt(np.square(cpu, dtype=np.float64).mean()))
        found[name] = {"images_per_second": len(images) / seconds, "apart": apart}
        holds &= apart < FEATURE_TOLERANCE
    return found, holds


def decoder(options: argparse.Namespace) -> Found:
    """Images per second of the decoder of stable diffusion's auto-encoder, with random weights."""
    from harness.frameworks.torchvision import make_importable

    make_importable()
    from diffusers import AutoencoderKL

    net = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2, block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).to(options.device).eval()  # fmt: skip
    z = torch.randn(options.images, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(options.device)
    with torch.inference_mode():
        net.decode(z[:1])
        wait(torch.device(options.device))
        begin = time.perf_counter()
        for part in z.split(8):
            net.decode(part)
        wait(torch.device(options.device))
    return {"images_per_second": len(z) / (time.perf_counter() - begin), "precision": "float32"}, True


CHECKS = {check.__name__: check for check in (generator, sync, memory, repeat, checkpoint, features, decoder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backbone", default="dit-s-2")
    parser.add_argument("--batch", type=int, default=16, help="images of a step, which is one micro-batch")
    parser.add_argument("--images", type=int, default=512, help="of features and decoder")
    parser.add_argument("--precision", default="bfloat16", choices=resolve.NAMED_PRECISIONS)
    parser.add_argument("--compile", default="off", choices=("on", "off"))
    parser.add_argument("--deterministic", action="store_true")
    options = parser.parse_args()
    device = resolve.pick_device(options.device)
    resolve.set_arithmetic(device, options.precision)
    found, holds = CHECKS[options.check](options)
    where = {"device": resolve.device_name(device), "torch": torch.__version__, "python": platform.python_version()}
    settings = {
        "backbone": options.backbone,
        "batch": options.batch,
        "precision": options.precision,
        "compile": options.compile,
        "deterministic": options.deterministic,
    }
    print(json.dumps({"check": options.check, "holds": holds, **found, **settings, **where}))
    sys.exit(not holds)


if __name__ == "__main__":
    main()
