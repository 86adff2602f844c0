"""Matrix products of metrics, on the CPU by numpy or, while `products_on` says so, on a GPU by torch.

Only products whose result does not depend on who adds their terms, or in which order, are computed here: sums of integers
that a float64 holds exactly (`evaluators.statistics`), and tiles whose error bound holds for any order
(`evaluators.precision_recall`). So a metric has the same bits with and without a GPU.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_device: "torch.device | None" = None  # that multiplies instead of numpy


@contextlib.contextmanager
def products_on(device: str) -> Iterator[None]:
    """Context in which `product` works on `device`, if it is a GPU of a torch that this process has loaded.

    TF32 and autocast are off meanwhile. Of this process: it is not entered by two threads at once.
    """
    loaded = sys.modules.get("torch")
    if not device.startswith("cuda") or loaded is None or not loaded.cuda.is_available():
        yield
        return
    target = loaded.device(device)
    if target.index is None:  # other threads would take GPU 0
        target = loaded.device("cuda", loaded.cuda.current_device())
    with _multiplied_by(target):
        yield


@contextlib.contextmanager
def _multiplied_by(device: "torch.device") -> Iterator[None]:
    """Context in which torch computes `product` on `device`."""
    global _device
    from harness.frameworks.torch_float32 import exact_float32

    before, _device = _device, device
    try:
        with exact_float32(device.type):
            yield
    finally:
        _device = before


def on_device() -> bool:
    """Whether `product` works on a GPU now."""
    return _device is not None


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (n, D) times b (D, m), both float32 or both float64.

    Rounded as the dtype, in any order. Without a GPU, or where its memory does not suffice, it is numpy's `a @ b`.
    """
    if _device is not None:
        import torch

        with contextlib.suppress(torch.OutOfMemoryError), torch.inference_mode():
            left, right = (torch.from_numpy(each).to(_device) for each in (a, b))
            return (left @ right).cpu().numpy()
    return a @ b
