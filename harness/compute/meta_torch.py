"""Torch networks on the meta device: shapes only, no memory and no arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from harness.errors import UserError
from harness.spec import BackboneSpec


def build_on_meta(spec: BackboneSpec, overrides: dict[str, Any]) -> nn.Module:
    """The torch network on the meta device. Draws no random numbers. overrides: arguments of the builder."""
    with torch.device("meta"):
        net = spec.build("torch", **overrides)
    return net.to("meta")  # for tensors that a builder created from a numpy array


def example_inputs(spec: BackboneSpec, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Meta tensors for one image, in the order in which a network of `spec.kind` is called (`harness.spec.KINDS`).

    Images are float32 (1, C, H, W), t and y int64 (1,) (t float32 where `spec.time` says so, float32 (1, 2) of two times), z
    float32 (1, Z). Sizes come from the network's arguments input_size and in_channels, low_res_size of an upsampler (default input_size // 4), and latent_size of a generator
    (default 128, BigGAN's). Raises UserError if input_size or in_channels is missing.
    """

    def need(name: str) -> int:
        if name not in arguments:
            raise UserError(
                f"backbone {spec.name!r} ({spec.kind}) has no argument {name!r}, which gives the shape of its inputs;"
                " add it to the spec's defaults"
            )
        return arguments[name]

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    integer = zeros(1, dtype=torch.int64)  # for t and for y
    t = integer if spec.time == "timestep" else zeros(1)
    if spec.times == 2:
        t = zeros(1, 2)
    if spec.kind == "generator":
        return zeros(1, arguments.get("latent_size", 128)), integer
    channels, size = need("in_channels"), need("input_size")
    x = zeros(1, channels, size, size)
    if spec.kind == "classifier":
        return x, integer
    if spec.kind == "upsampler":
        low_size = arguments.get("low_res_size", size // 4)
        return x, t, integer, zeros(1, channels, low_size, low_size)
    return x, t, integer


class FusedAttention(TorchFunctionMode):
    """Mode in which scaled_dot_product_attention is one fused operator on the meta device too, as on a real device.

    Without it, the meta device decomposes attention, and autograd saves the (T, T) scores. Calls that are not plain
    4-dimensional attention with positional query, key and value, such as those with a mask, are decomposed as before.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and len(args) == 3 and args[0].dim() == 4:
            default = {"dropout_p": 0.0, "is_causal": False, "attn_mask": None, "enable_gqa": False}
            if all(name in default and kwargs[name] == default[name] for name in kwargs):
                return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **kwargs)


def _named(*names: str) -> frozenset[Callable[..., Any]]:
    """The functions of these names in torch, torch.nn.functional and torch.Tensor."""
    homes = (torch, torch.nn.functional, torch.Tensor)
    return frozenset(getattr(home, name) for home in homes for name in names if hasattr(home, name))


class GpuAutocast(TorchFunctionMode):
    """Mode in which meta tensors get the dtypes that torch.autocast gives them on a GPU in bfloat16, which knows no meta device.

    casts: the weights in bfloat16, which autocast keeps until the backward pass.
    """

    # Of torch's own lists, what occurs in networks.
    LOWER = _named(
        "linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d",
        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention",
    )  # fmt: skip
    FLOAT32 = _named("layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "exp", "pow", "__pow__", "norm")

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, Tensor] = {}  # by id of the weight

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.LOWER:
            args, kwargs = tree_map(self._lowered, (args, kwargs))
        elif func in self.FLOAT32:
            args, kwargs = tree_map(self._raised, (args, kwargs))
        return func(*args, **kwargs)

    def _lowered(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(torch.bfloat16)
        if id(value) not in self.casts:
            self.casts[id(value)] = value.to(torch.bfloat16)
        return self.casts[id(value)]

    @staticmethod
    def _raised(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


@contextlib.contextmanager
def neutral_state() -> Iterator[None]:
    """Context with torch's default settings: float32 as default dtype, no autocast, no inference mode."""
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
