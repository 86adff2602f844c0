"""LDM's class-conditional denoisers in Flax: the classes of `torch_model.py` in the same order, the same names.

Source: as there. The blocks are in `backbones.unet.flax_unet`.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax import Array

from backbones.flax_layers import channels_first, channels_last, initial_rngs
from backbones.ldm.layout import ldm_layout
from backbones.unet.flax_unet import UNet, check_input


class ClassEmbedder(nnx.Module):
    """One float32 vector per class. An invalid label gives NaN."""

    def __init__(self, labels: int, width: int, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(labels, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)

    def __call__(self, y: Array) -> Array:
        return self.embedding(y[:, None])  # (N, 1, context): the context is a single token


class LDM(nnx.Module):
    """Denoiser of latents: x (N, in_channels, input_size, input_size), t (N,) timesteps and y (N,) integer labels to (N,
    out_channels, input_size, input_size). With a null class, the label num_classes means "no class".

    Takes the arguments of `backbones.ldm.spec` by keyword, and `rngs` for the initial weights (None: seed 0). The output
    is exactly 0 before training.
    """

    def __init__(self, *, rngs: nnx.Rngs | None = None, **arguments: Any):
        rngs = rngs or initial_rngs(0)
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
            rngs=rngs,
        )
        self.model = nnx.Dict(diffusion_model=unet)
        labels = arguments["num_classes"] + arguments["null_class"]  # null_class is a bool
        self.cond_stage_model = ClassEmbedder(labels, arguments["context_width"], rngs)

    def __call__(self, x: Array, t: Array, y: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        check_input("LDM", x, self.input_shape)
        unet = self.model["diffusion_model"]
        out = unet(channels_last(x), unet.embed(t), self.cond_stage_model(y), rngs=rngs)  # (N, S, S, C_out)
        return channels_first(out)  # (N, C_out, S, S)
