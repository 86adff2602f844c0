"""Speed of one backbone on one device: training, sampling and evaluation, beside the roofline of the device.

The timed code is that of a run: the trainer with optimiser, average and randomness; the sampler with guidance, from noise
to uint8; the feature extractor, from uint8 to features.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import registry
from harness.compute import TRAINING_FACTOR
from harness.compute.activations import activation_bytes_by_precision
from harness.data.images import ImageSet
from harness.diffusion.sampler_plan import sampler_plan
from harness.engines.memory import check_room, fit_micro_batch, one_image_error
from harness.engines.torch import compiling, resolve
from harness.engines.torch.roofline import RUNS, Roofline, measure_roofline, seconds_of, wait
from harness.engines.torch.sampling import TorchSampler
from harness.engines.torch.trainer import TorchEngine, build
from harness.errors import UserError
from harness.protocols import Recipe, Sampling
from harness.runs.run import Resolved
from harness.spec import BackboneSpec

logger = logging.getLogger(__name__)

CONVENTION = "a multiply-add is two operations, normalisations are none, training is three forward passes"
GUIDANCE = 4.0  # as in the paper's sample figures: the network then computes two images for each sample
LATENT_CHANNELS, LATENT_FACTOR = 4, 8  # a network with 4 channels works in latents of images 8 times as large
FEATURES = "efficientnet-lite0-96"  # suite embedded
TIMED_SECONDS = 0.5  # of each timing, about: see `seconds_of`
CUDA_BATCH, CPU_BATCH = 256, 64  # default batch: the paper's on a GPU, at most 64 on a CPU
CPU_STEP_SECONDS = 1.0  # of a training step on a CPU, about: sets the default batch
EVALUATED = 64  # images whose features are extracted
STAGES = ("training", "sampling", "evaluation")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The speed of one stage."""

    stage: str
    batch: int  # images of a training step, a batch of samples, or a batch of features
    micro_batch: int  # images in one call of the network
    precision: str
    images_per_second: float  # the median of the timings
    low: float  # images a second of the slowest timing
    high: float  # and of the fastest
    tflops: float | None  # TFLOP/s by CONVENTION; None: not counted
    utilisation: float | None  # tflops over the peak, as a share: model FLOPs utilisation (MFU)
    of_measured: float | None  # tflops over the TFLOP/s of the measured matrix product in this precision
    peak_memory_bytes: int | None
    note: str = ""


class PeakMemory:
    """The peak memory since this object was made: of the process on a CPU, of torch's allocator on a GPU."""

    def __init__(self, device: torch.device):
        # Without a reset, VmHWM is the peak since the process began, which is not what is asked for.
        self._device, self._was_reset = device, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        except OSError:  # not Linux, or not permitted
            self._was_reset = False

    def bytes(self) -> int | None:
        """The peak in bytes; None if the system does not report it since this object was made."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._was_reset:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One benchmark, with every choice resolved."""

    spec: BackboneSpec
    arguments: dict[str, Any]  # of the builder, complete
    device: torch.device
    roofline: Roofline
    precision: str
    batch: int
    sampler_steps: int
    compile: str = "off"
    runs: int = RUNS

    @property
    def macs(self) -> int:
        """Multiply-adds of one forward pass on one image."""
        return self.spec.count(**self.arguments).macs

    @property
    def objective(self) -> str:
        """The paper's; of a network whose number of output channels is its own and leaves none for a variance, epsilon."""
        learned, channels = "epsilon-learned-range", self.arguments.get("in_channels", 0)
        has_room = self.arguments.get("out_channels") in (None, registry.objectives.get(learned).out_channels(channels))
        return learned if has_room else "epsilon-fixed"

    def row(
        self, stage: str, work: Callable[[], object], operations: float | None, *, images: int, micro_batch: int,
        precision: str = "", note: str = "",
    ) -> Row:  # fmt: skip
        """Time `work`, which handles `images` images, and return its row.

        operations: floating-point operations for one image, two per multiply-add; None: not counted. precision: ""
        takes that of the benchmark. note: "" takes the seconds of the first call.
        """
        precision = precision or self.precision
        peak = PeakMemory(self.device)
        begin = time.perf_counter()
        work()  # includes set-up and compilation
        wait(self.device)
        first = time.perf_counter() - begin
        seconds = seconds_of(work, self.device, TIMED_SECONDS, self.runs)
        speeds = [images / duration for duration in seconds]
        speed = statistics.median(speeds)
        tflops = None if operations is None else operations * speed / 1e12
        return Row(
            stage=stage,
            batch=images,
            micro_batch=micro_batch,
            precision=precision,
            images_per_second=speed,
            low=min(speeds),
            high=max(speeds),
            tflops=tflops,
            utilisation=None if tflops is None else tflops / self.roofline.peak(precision)[0],
            of_measured=None if tflops is None else tflops / self.roofline.tflops[precision],
            peak_memory_bytes=peak.bytes(),
            note=note or f"first call {first:.1f} s",
        )

    def training(self) -> Row:
        """The row of the trainer's optimiser steps."""
        parameters = self.spec.count(**self.arguments).params
        free = resolve.free_bytes(self.device)
        check_room(self.spec.name, parameters, str(self.device), free)
        image_bytes = activation_bytes_by_precision(self.spec, **self.arguments)[self.precision]
        micro_batch = fit_micro_batch(self.batch, parameters, image_bytes, free, precision=self.precision)
        if not micro_batch:
            raise one_image_error(self.spec.name, parameters, image_bytes, str(self.device), free)
        engine = TorchEngine(
            self.spec,
            build(self.spec, self.arguments, 0),
            arguments=self.arguments,
            recipe=Recipe(batch=self.batch, objective=self.objective),
            seed=0,
            resolved=Resolved(
                device=str(self.device),
                device_name=self.roofline.device_name,
                precision=self.precision,
                micro_batch=micro_batch,
                threads=torch.get_num_threads(),
                compile=self.compile,
            ),
            data=noise_images(self.arguments),
        )
        done = 0  # optimiser steps

        def step() -> None:
            nonlocal done
            done += 1
            engine.step(done, interrupted=lambda: False)

        operations = 2 * self.spec.count(**self.arguments).in_training.macs * TRAINING_FACTOR
        return self.row("training", step, operations, images=self.batch, micro_batch=micro_batch)

    def sampling(self) -> Row:
        """The row of batches of samples, guided where the network has a null label."""
        null = self.spec.null_index(self.arguments["num_classes"])
        # copies: of each sample in the network's batch; guidance adds one without a label
        scale, copies = (1.0, 1) if null is None else (GUIDANCE, 2)
        images = max(1, self.batch // copies)
        plan = sampler_plan(
            "ddpm",
            self.sampler_steps,
            schedule="linear",
            diffusion_steps=1000,
            objective=self.objective,
            time=self.spec.time,
        )
        sampler = TorchSampler(
            self.spec,
            build(self.spec, self.arguments, 0),
            plan,
            Sampling(guidance_scale=scale),
            arguments=self.arguments,
            precision=self.precision,
            device=self.device,
            compile=self.compile,
            batch=images,
        )
        index = np.arange(images)
        labels = index % max(self.arguments["num_classes"], 1)  # all 0 if the network has no classes
        return self.row(
            "sampling", lambda: sampler.draw(index, labels), 2 * self.macs * plan.advances * copies,
            images=images, micro_batch=images * copies,
            note=f"{self.sampler_steps} steps" + ("" if null is None else f", guidance {scale:g}"),
        )  # fmt: skip

    def evaluation(self) -> Row:
        """The row of feature extraction, from images of the size of the network's samples."""
        side, channels = self.arguments["input_size"], self.arguments["in_channels"]
        if channels == LATENT_CHANNELS:
            side, channels = side * LATENT_FACTOR, 3
        extractor = registry.features.get(FEATURES).load(str(self.device))
        images = np.random.default_rng(0).integers(0, 256, (EVALUATED, side, side, channels), dtype=np.uint8)
        with FlopCounterMode(display=False) as counter:  # counts two operations per multiply-add
            extractor(images[:1])
        return self.row(
            "evaluation", lambda: extractor(images), float(counter.get_total_flops()), images=EVALUATED,
            micro_batch=getattr(extractor, "batch_size", EVALUATED), precision="float32",
            note=f"{FEATURES}, {side}x{side}",
        )  # fmt: skip


def noise_images(arguments: dict[str, Any], count: int = 512) -> ImageSet:
    """`count` random images of the network's input size, with labels: the content does not change the speed of a step.

    A network in latents gets them as images with the channels of its latents.
    """
    side, rng = arguments["input_size"], np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side, arguments["in_channels"]), dtype=np.uint8)
    return ImageSet(name="noise", images=images, labels=rng.integers(0, max(arguments["num_classes"], 1), count))


def measure(
    name: str | None,
    *,
    device: str | None,
    precision: str,
    batch: int | None,
    sampler_steps: int | None,
    compile: str,
    stages: tuple[str, ...],  # of STAGES
) -> dict[str, Any]:
    """The roofline of the device and the speed of a backbone's stages on it, as plain data for JSON.

    name, batch, sampler_steps: None takes a default for the device. Raises UserError for a backbone, precision or device
    that cannot be measured.
    """
    target = resolve.pick_device(device)
    cuda = target.type == "cuda"
    spec = registry.backbones.get(name or ("dit-xl-2" if cuda else "dit-s-8"))
    if spec.kind == "generator":
        raise UserError(f"backbone {spec.name!r} is a generator, which is not trained here; name a denoiser")
    if "torch" not in spec.builders:
        raise UserError(f"backbone {spec.name!r} has no torch network, and only torch's are measured")
    if spec.times == 2:
        raise UserError(f"backbone {spec.name!r} is given two times, and only networks of one time are measured")
    if spec.kind != "denoiser":
        stages = tuple(stage for stage in stages if stage == "training")
        if not stages:
            raise UserError(f"backbone {spec.name!r} is a {spec.kind}, of which only training is measured")
    resolve.check_precision(target, precision)
    if compile == "on":
        compiling.check_available(target)
    compile_mode = compile
    if compile == "auto":  # on a GPU, where it is available
        compile_mode = "on" if cuda and compiling.unavailable_reason(target) is None else "off"
    arguments = spec.arguments()
    if spec.kind in ("denoiser", "upsampler") and arguments.get("out_channels") is None:  # the paper's objective
        arguments["out_channels"] = 2 * arguments["in_channels"]
    roofline = measure_roofline(target)
    chosen = roofline.fastest if precision == "auto" else precision
    macs = spec.count(**arguments).macs
    if batch is None:
        # The images that a CPU trains in a step of CPU_STEP_SECONDS, at half the peak of this precision.
        images_per_step = roofline.tflops[chosen] * 1e12 / 2 * CPU_STEP_SECONDS / (2 * TRAINING_FACTOR * macs)
        batch = CUDA_BATCH if cuda else max(2, min(CPU_BATCH, int(images_per_step)))
    bench = Bench(
        spec=spec, arguments=arguments, device=target, roofline=roofline, precision=chosen, batch=batch,
        sampler_steps=sampler_steps or (10 if cuda else 2), compile=compile_mode,
    )  # fmt: skip
    rows = []
    for stage in stages:
        logger.info(f"measuring {stage} ...")
        resolve.set_arithmetic(target, chosen)  # `measure_roofline` has left another precision
        rows.append(dataclasses.asdict(getattr(bench, stage)()))
        if cuda:
            torch.cuda.empty_cache()
    peak, source = roofline.peak(chosen)
    counted = [row for row in rows if row["tflops"] is not None]
    warnings = [roofline.warning(row["stage"], row["precision"], row["tflops"]) for row in counted]
    return {
        "backbone": spec.name,
        "input": f"{arguments['input_size']}x{arguments['input_size']}x{arguments['in_channels']}",
        "params": spec.count(**arguments).params,
        "gmacs": macs / 1e9,
        "device": target.type,
        "compile": compile_mode,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "convention": CONVENTION,
        "peak_tflops": peak,
        "peak_from": source,
        "roofline": dataclasses.asdict(roofline),
        "rows": rows,
        "remarks": [warning for warning in warnings if warning],
    }
