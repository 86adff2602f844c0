"""LDM's class-conditional denoisers in torch, with the names and shapes of the public checkpoints.

Source: arXiv:2112.10752; names after CompVis/latent-diffusion a506df5: `model.diffusion_model` is the U-Net of
ldm/modules/diffusionmodules/openaimodel.py, `cond_stage_model` the ClassEmbedder of ldm/modules/encoders/modules.py.
The blocks are in `backbones.unet.torch_unet`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from backbones.ldm.layout import ldm_layout
from backbones.unet.torch_unet import UNet, check_input


class ClassEmbedder(nn.Module):
    """One vector per class."""

    def __init__(self, labels: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(labels, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding(y[:, None])  # (N, 1, context): the context is a single token


class LDM(nn.Module):
    """Denoiser of latents: x (N, in_channels, input_size, input_size), t (N,) timesteps and y (N,) int64 labels to (N,
    out_channels, input_size, input_size). With a null class, the label num_classes means "no class".

    Takes the arguments of `backbones.ldm.spec` by keyword. The output is exactly 0 before training.
    """

    def __init__(self, **arguments: Any):
        super().__init__()
        layout = ldm_layout(arguments)
        channels, size = arguments["in_channels"], arguments["input_size"]
        self.input_shape = (channels, size, size)
        unet = UNet(
            layout,
            arguments["out_channels"] or channels,
            scale_shift=False,
            dropout=arguments["dropout"],
            context=(arguments["context_width"], arguments["transformer_depth"]),
            gradient_checkpointing=arguments["gradient_checkpointing"],
        )
        self.model = nn.ModuleDict({"diffusion_model": unet})
        labels = arguments["num_classes"] + arguments["null_class"]  # null_class is a bool
        self.cond_stage_model = ClassEmbedder(labels, arguments["context_width"])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_input("LDM", x, self.input_shape)
        unet = self.model["diffusion_model"]
        assert isinstance(unet, UNet)
        return unet(x, unet.embed(t), self.cond_stage_model(y))  # (N, C_out, S, S)
