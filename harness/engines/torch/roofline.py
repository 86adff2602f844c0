"""The roofline of a device: its matrix products in each precision and its memory, measured, beside its data sheet."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from harness.engines.torch.resolve import NAMED_PRECISIONS, device_name, set_arithmetic

logger = logging.getLogger(__name__)

RUNS = 5
SIDES = {"cpu": 1024, "cuda": 8192}  # of square matrices; smaller where that would take too long
SECONDS = {"cpu": 0.05, "cuda": 0.02}  # of one timing, about: the clock is too coarse for less
SLOW_SECONDS = 0.2  # a larger product is not timed if one of twice the side would take longer than this
BANDWIDTH_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}  # of each of three arrays: far more than caches hold

# Dense peak TFLOP/s from NVIDIA's data sheets (H100 and H200, 2024; A100, 2021; without sparsity), by the full name that the
# driver reports. A similar name belongs to another card (H200 NVL) or to a slice of one (MIG), with other peaks. float32 is
# the peak outside the tensor cores.
_HOPPER_SXM = {"bfloat16": 989.4, "tf32": 494.7, "float32": 66.9}
_AMPERE = {"bfloat16": 312.0, "tf32": 156.0, "float32": 19.5}
DATA_SHEETS = {
    "NVIDIA H100 PCIe": {"bfloat16": 756.0, "tf32": 378.0, "float32": 51.0},
    "NVIDIA H100 NVL": {"bfloat16": 835.5, "tf32": 417.5, "float32": 60.0},
    "NVIDIA H100 80GB HBM3": _HOPPER_SXM,
    "NVIDIA H200": _HOPPER_SXM,
    "NVIDIA A100-SXM4-40GB": _AMPERE,
    "NVIDIA A100-SXM4-80GB": _AMPERE,
    "NVIDIA A100-PCIE-40GB": _AMPERE,
    "NVIDIA A100 80GB PCIe": _AMPERE,
}


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Peaks of one device. A multiply-add is two operations.

    A peak is the best of a few timings, because other programs on the machine can only slow them. Medians are given too.
    """

    device_name: str
    tflops: dict[str, float]  # of matrix products, measured, by precision
    tflops_median: dict[str, float]
    gbytes_per_second: float  # of reading two arrays and writing a third, measured
    gbytes_per_second_median: float
    data_sheet_tflops: dict[str, float]  # empty where the device is not in the table

    def peak(self, precision: str) -> tuple[float, str]:
        """The TFLOP/s that utilisation is a share of, and their source."""
        if precision in self.data_sheet_tflops:
            return self.data_sheet_tflops[precision], "data sheet"
        return self.tflops[precision], "measured matrix product"

    def warning(self, stage: str, precision: str, tflops: float) -> str:
        """A warning that a stage was faster than a peak, with the likely reason; "" if it was not. tflops: of the stage."""
        peak, source = self.peak(precision)
        measured = self.tflops[precision]
        if tflops <= min(peak, measured):
            return ""
        if tflops > measured:
            return (
                f"{stage} came to {tflops:.3g} TFLOP/s, more than the {measured:.3g} of the matrix products measured here: "
                "that is a timing and not a bound; other programs or a lower clock may have slowed it, and the network's "
                "smaller operands may fit in a cache"
            )
        return (
            f"{stage} came to {tflops:.3g} TFLOP/s, more than the {peak:.3g} of the {source}: the clock is higher here"
        )

    @property
    def fastest(self) -> str:
        """The precision with the fastest matrix products. Never tf32, which has to be asked for."""
        return max((name for name in self.tflops if name != "tf32"), key=lambda name: self.tflops[name])


def precisions_of(device: torch.device) -> tuple[str, ...]:
    """The precisions to measure on a device: tf32 only on cuda."""
    return tuple(name for name in NAMED_PRECISIONS if name != "tf32" or device.type == "cuda")


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, min_seconds: float, runs: int = RUNS) -> list[float]:
    """Seconds of one call, one number for each of `runs` timings.

    A timing is a loop of calls that takes about `min_seconds`, or of one call if that takes longer. Two calls precede the
    timings: one to warm up, and one from which the number of calls in the loop follows.
    """
    call()
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    calls = max(1, int(min_seconds / max(time.perf_counter() - begin, 1e-9)))
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
        seconds.append((time.perf_counter() - begin) / calls)
    return seconds


@torch.inference_mode()
def matrix_tflops(device: torch.device, precision: str) -> list[float]:
    """TFLOP/s of a square matrix product, one for each timing.

    On a CPU the side doubles from 256 up to that in SIDES, as long as the next product takes at most SLOW_SECONDS. Other
    devices go from 256 to that in SIDES at once, unless twice the side would already take longer. The matrices hold normal
    random numbers: with ones a GPU draws less power, and so keeps a higher clock than in training.
    """
    set_arithmetic(device, precision)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    side, max_side = 256, SIDES.get(device.type, 1024)
    while True:
        generator = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
        seconds = seconds_of(partial(torch.matmul, a, b), device, SECONDS.get(device.type, 0.05))
        if side >= max_side or min(seconds) * 8 > SLOW_SECONDS:  # twice the side: 8 times as long
            return [2 * side**3 / duration / 1e12 for duration in seconds]
        side = min(2 * side, max_side) if device.type == "cpu" else max_side


@torch.inference_mode()
def memory_gbytes(device: torch.device) -> list[float]:
    """GB/s of c = a + 2 b on arrays larger than any cache, one for each timing."""
    count = BANDWIDTH_BYTES.get(device.type, 1 << 26) // 4  # float32 elements of each array
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    seconds = seconds_of(lambda: torch.add(a, b, alpha=2.0, out=c), device, SECONDS.get(device.type, 0.05))
    # Three arrays of 4-byte elements.
    return [3 * 4 * count / duration / 1e9 for duration in seconds]


def measure_roofline(device: torch.device) -> Roofline:
    """The roofline of `device`, measured in a few seconds."""
    name = device_name(device)
    tflops: dict[str, list[float]] = {}  # precision -> one number for each timing
    for precision in precisions_of(device):
        logger.info(f"measuring matrix products in {precision} ...")
        tflops[precision] = matrix_tflops(device, precision)
    logger.info("measuring memory ...")
    memory = memory_gbytes(device)
    return Roofline(
        device_name=name,
        tflops={precision: max(timings) for precision, timings in tflops.items()},
        tflops_median={precision: statistics.median(timings) for precision, timings in tflops.items()},
        gbytes_per_second=max(memory),
        gbytes_per_second_median=statistics.median(memory),
        data_sheet_tflops=dict(DATA_SHEETS.get(name, {})),
    )
