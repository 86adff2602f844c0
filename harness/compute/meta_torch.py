"""Running a torch network on the meta device: shapes only, no memory and no arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.errors import UserError
from harness.spec import BackboneSpec


def build_on_meta(spec: BackboneSpec, overrides: dict[str, Any]) -> nn.Module:
    """The torch network without storage. Draws nothing from torch's random generators."""
    with torch.device("meta"):
        net = spec.build("torch", **overrides)
    return net.to("meta")  # for what a builder made from a numpy table


def example_inputs(spec: BackboneSpec, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Meta tensors for one image in the order of the call of `spec.kind`, by the arguments the network was built with.

    Images (1, C, H, W) float32, t and y (1,) int64, z (1, Z) float32. Needs the arguments input_size and in_channels;
    an upsampler may give low_res_size (else input_size // 4) and a generator latent_size alone (else BigGAN's 128).
    """

    def need(name: str) -> int:
        if name not in arguments:
            raise UserError(
                f"backbone {spec.name!r} ({spec.kind}) has no argument {name!r}, which its inputs are built from;"
                " add it to the spec's defaults"
            )
        return arguments[name]

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    integer = zeros(1, dtype=torch.int64)
    if spec.kind == "generator":
        return zeros(1, arguments.get("latent_size", 128)), integer
    channels, size = need("in_channels"), need("input_size")
    x = zeros(1, channels, size, size)
    if spec.kind == "classifier":
        return x, integer
    if spec.kind == "upsampler":
        low_size = arguments.get("low_res_size", size // 4)
        return x, integer, integer, zeros(1, channels, low_size, low_size)
    return x, integer, integer


class FusedAttention(TorchFunctionMode):
    """Keeps attention one operator, as on a real device; the meta device would take it apart and save (T, T) scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and len(args) == 3 and args[0].dim() == 4:
            plain = {"dropout_p": 0.0, "is_causal": False, "attn_mask": None, "enable_gqa": False}
            if all(name in plain and kwargs[name] == plain[name] for name in kwargs):
                return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def neutral_state() -> Iterator[None]:
    """Hides what the calling thread may have set: the default dtype, autocast, inference mode."""
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)
