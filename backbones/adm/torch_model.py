"""ADM's denoisers, upsamplers and noisy classifiers in torch, with the names and shapes of the public checkpoints.

Source: arXiv:2105.05233; names after openai/guided-diffusion 22e0df8, guided_diffusion/unet.py (UNetModel,
SuperResModel, EncoderUNetModel). The blocks are in `backbones.unet.torch_unet`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.adm.layout import adm_layout
from backbones.torch_layers import attend
from backbones.unet.layout import Layout
from backbones.unet.torch_unet import Encoder, UNetBase, check_input, group_norm, split_heads


class _ADM(UNetBase):
    """The U-Net of denoisers and upsamplers."""

    kind: str

    def __init__(self, **arguments: Any):
        layout = adm_layout(self.kind, arguments)
        channels, size = arguments["in_channels"], arguments["input_size"]
        super().__init__(
            layout,
            arguments["out_channels"] or 2 * channels,
            scale_shift=True,
            dropout=arguments["dropout"],
            qkv_first=arguments["qkv_first"],
            labels=arguments["num_classes"],
            gradient_checkpointing=arguments["gradient_checkpointing"],
        )
        self.input_shape = (channels, size, size)

    def denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The U-Net's output (N, C_out, S, S) for its input channels x (N, C, S, S), timesteps t and labels y."""
        emb = self.embed(t)  # (N, E) float32
        if hasattr(self, "label_emb"):  # not if num_classes is 0
            emb = emb + self.label_emb(y)  # (N, E)
        return self.run_unet(x, emb)  # (N, C_out, S, S)


class ADM(_ADM):
    """Denoiser: from x (N, in_channels, input_size, input_size), t (N,) timesteps and y (N,) int64 labels to (N,
    out_channels, input_size, input_size). With the paper's objective, the first half of the output channels is the
    noise and the second half the variance.

    The class embedding is added to the timestep embedding. With num_classes 0 there is no class embedding, and y is not
    used. Takes the arguments of `backbones.adm.spec` by keyword. The output is exactly 0 before training.
    """

    kind = "denoiser"

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_input("ADM", x, self.input_shape)
        return self.denoise(x, t, y)  # (N, C_out, S, S)


class ADMUpsampler(_ADM):
    """As `ADM`, with one more input: a low-resolution image (N, in_channels, s, s), which is resized to input_size."""

    kind = "upsampler"

    def forward(self, x: Tensor, t: Tensor, y: Tensor, low_res: Tensor) -> Tensor:
        check_input("ADM", x, self.input_shape)
        resized = F.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False)  # (N, C, S, S)
        return self.denoise(torch.cat([x, resized.to(x.dtype)], dim=1), t, y)  # (N, C_out, S, S)


class AttentionPool(nn.Module):
    """Attention pooling as in CLIP: the mean of all positions is added as a token, which attends to all tokens.

    The published network uses the output of this token only, so only that one is computed. The channels of qkv_proj are
    always ordered as with qkv_first, whatever the order in the other layers.
    """

    def __init__(self, layout: Layout, heads: int, outputs: int):
        super().__init__()
        channels, tokens = layout.channels, layout.side**2
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, tokens + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)  # (N, C, T)
        x = torch.cat([x.mean(dim=2, keepdim=True), x], dim=2)  # (N, C, T + 1)
        x = x + self.positional_embedding.to(x.dtype)  # (N, C, T + 1)
        q, k, v = split_heads(self.qkv_proj(x), self.heads, qkv_first=True)  # (N, H, T + 1, C/H)
        pooled = attend(q[:, :, :1], k, v).transpose(2, 3).flatten(1, 2)  # (N, C, 1)
        return self.c_proj(pooled).squeeze(2)  # (N, num_classes)


class ADMClassifier(Encoder):
    """Classifier of noised images: from x (N, in_channels, input_size, input_size) and t (N,) timesteps to logits
    (N, num_classes). Takes the arguments of `backbones.adm.spec` by keyword."""

    def __init__(self, **arguments: Any):
        layout = adm_layout("classifier", arguments)
        super().__init__(
            layout,
            scale_shift=True,
            dropout=arguments["dropout"],
            qkv_first=arguments["qkv_first"],
            gradient_checkpointing=arguments["gradient_checkpointing"],
        )
        size = arguments["input_size"]
        self.input_shape = (arguments["in_channels"], size, size)
        _, attention, _ = layout.middle_block
        pool = AttentionPool(layout, attention.heads, arguments["num_classes"])
        self.out = nn.Sequential(group_norm(layout.channels), nn.SiLU(), pool)
        self.initialise()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        check_input("ADM", x, self.input_shape)
        x, _ = self.encode(x, self.embed(t), context=None)  # (N, C, S_min, S_min)
        return self.out(x)  # (N, num_classes)
