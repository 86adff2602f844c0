"""Exact float32 arithmetic in torch, for networks whose outputs are published or recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Switch off autocast and TF32 within the block.

    TF32 rounds each factor of a product to 10 bits; torch allows it in convolutions by default.
    """
    before = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if device_type == "cuda":
            cudnn = torch.backends.cudnn
            kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
            stack.enter_context(cudnn.flags(**kept, allow_tf32=False))
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
