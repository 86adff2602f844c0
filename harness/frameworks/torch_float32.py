"""Exact float32 arithmetic in torch, for networks whose outputs are published or recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Context without autocast and TF32. device_type: "cpu", "cuda" and so on.

    TF32 rounds each factor of a product to 10 bits; torch allows it in convolutions by default.
    """
    before = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if device_type == "cuda":
            cudnn = torch.backends.cudnn
            # cudnn.flags would reset all settings that it is not given.
            flags = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
            stack.enter_context(cudnn.flags(**flags, allow_tf32=False))
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
