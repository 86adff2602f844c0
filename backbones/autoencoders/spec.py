"""Names, sizes and arguments of the autoencoders of latent diffusion.

Source: arXiv:2112.10752, appendix G; CompVis/latent-diffusion a506df5, first_stage_config of
configs/latent-diffusion/cin256-v2.yaml (VQ-f4) and of models/ldm/cin256/config.yaml (VQ-f8).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backbones.autoencoders.layout import RESOLUTION, factor
from harness.errors import UserError
from harness.spec import Compute, load_attribute


@dataclass(frozen=True, kw_only=True)
class AutoencoderSpec:
    """An autoencoder known by name. `defaults` holds every argument of the network:

    resolution: image side in pixels that attention_resolutions refer to; the network takes other sizes as well.
    image_channels: of images. width: channels of the first level. multipliers: channels of each level, divided by
    width; each level has half the side of the level before. blocks: residual blocks of an encoder level (a decoder
    level has one more). attention_resolutions: sides, in pixels, of the levels with attention after every block; the
    middle always has attention. latent_channels: output channels of the encoder (of each moment, if there are two) and
    input channels of the decoder. code_channels: channels of a latent, between the two 1x1 convolutions. codes: number
    of vectors in the codebook; None: no codebook but a Gaussian posterior (mean and log-variance).

    builders: framework to "module:attribute"; empty if the network is in another package.
    """

    name: str
    summary: str
    defaults: Mapping[str, Any]
    builders: Mapping[str, str]

    def arguments(self, **overrides: Any) -> dict[str, Any]:
        """The defaults, updated with `overrides`. Raises UserError for an unknown name."""
        if unknown := sorted(set(overrides) - set(self.defaults)):
            raise UserError(
                f"autoencoder {self.name!r} has no argument {unknown[0]!r}; it has {', '.join(self.defaults)}"
            )
        return {**self.defaults, **overrides}

    @property
    def factor(self) -> int:
        """Downsampling factor: image side over latent side."""
        return factor(self.defaults["multipliers"])

    def build(self, framework: str = "torch", **overrides: Any) -> Any:
        """The network with newly initialised weights. Raises UserError for a framework without a builder."""
        if framework not in self.builders:
            have = ", ".join(self.builders) or "none"
            raise UserError(f"autoencoder {self.name!r} is not implemented for {framework!r} here (frameworks: {have})")
        what = f"builder of autoencoder {self.name!r}"
        return load_attribute(self.builders[framework], what)(**self.arguments(**overrides))

    def count(self, direction: str = "decode", image_size: int = 256, **overrides: Any) -> Compute:
        """Compute for one image of side `image_size`; params are those of encoder and decoder together."""
        from backbones.autoencoders.compute import count

        return count(direction=direction, image_size=image_size, **self.arguments(**overrides))


_DIFFUSERS_NAMES = (  # (pattern in the public layout, replacement), applied in this order
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)


def diffusers_name(name: str, levels: int) -> str:
    """Diffusers' name of a parameter of the public layout, in a network of `levels` levels.

    Diffusers numbers the decoder's levels in their order of execution, and stores the weights of q, k, v and proj_out as
    matrices instead of 1x1 convolutions.
    """
    for pattern, replacement in _DIFFUSERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\.up\.(\d+)\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.", name)


# diffusers' older names of attention layers -> its current ones
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def diffusers_layout(tensors: Mapping[str, Any], levels: int) -> dict[str, Any]:
    """The tensors under diffusers' current names, from LDM's layout (kl-f8) or diffusers' older names of attention."""
    result = {}
    for name, value in tensors.items():
        name = diffusers_name(name, levels)  # leaves a name that is diffusers' already as it is
        path, _, kind = name.rpartition(".")  # kind: weight or bias
        parent, _, layer = path.rpartition(".")
        if ".attentions." in name:
            name = f"{parent}.{_OLD_ATTENTION.get(layer, layer)}.{kind}"
            value = value.flatten(1) if value.dim() == 4 else value  # from a 1x1 convolution to a matrix
        result[name] = value
    return result


FIRST_STAGE = "first_stage_model."  # prefix of the autoencoder's names in the checkpoint of an LDM


def own_tensors(tensors: dict[str, Any], path: object) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The autoencoder's own tensors in a file, without the prefix of an LDM checkpoint, and notes for the user.

    tensors: all tensors of the file, which is a checkpoint of a whole LDM or of an autoencoder alone. path: of the file,
    for messages. The notes are one line on the number of tensors that are not used, or empty. Raises UserError if there
    is no decoder.
    """
    in_ldm = {name.removeprefix(FIRST_STAGE): each for name, each in tensors.items() if name.startswith(FIRST_STAGE)}
    # loss.* are the perceptual network and the discriminator of the autoencoder's training.
    own = {name: value for name, value in (in_ldm or tensors).items() if not name.startswith("loss.")}
    if not any(name.startswith("decoder.") for name in own):
        first = next(iter(tensors), "nothing at all")
        raise UserError(
            f"{path} holds no autoencoder (no decoder.*; it begins with {first}); give one, or a model.ckpt"
        )
    unused = len(tensors) - len(own)
    notes = (f"tensors of other networks in the file, not used: {unused}",) if unused else ()
    return own, notes


_COMMON = {"resolution": RESOLUTION, "image_channels": 3, "width": 128, "blocks": 2}
_TORCH = {"torch": "backbones.autoencoders.vq_torch:VQAutoencoder"}


SPECS: tuple[AutoencoderSpec, ...] = (
    AutoencoderSpec(
        name="vq-f4",
        summary="LDM-4's first stage: factor 4, 3 channels, 8192 codes",
        defaults={
            **_COMMON,
            "multipliers": (1, 2, 4),
            "attention_resolutions": (),
            "latent_channels": 3,
            "code_channels": 3,
            "codes": 8192,
        },
        builders=_TORCH,
    ),
    AutoencoderSpec(
        name="vq-f8",
        summary="LDM-8's first stage: factor 8, 4 channels, 16384 codes",
        defaults={
            **_COMMON,
            "multipliers": (1, 2, 2, 4),
            "attention_resolutions": (32,),
            "latent_channels": 4,
            "code_channels": 4,
            "codes": 16384,
        },
        builders=_TORCH,
    ),
    AutoencoderSpec(
        name="kl-f8",
        summary="Stable Diffusion's autoencoder, DiT's: factor 8, 4 channels; diffusers' AutoencoderKL has the network",
        defaults={
            **_COMMON,
            "multipliers": (1, 2, 4, 4),
            "attention_resolutions": (),
            "latent_channels": 4,
            "code_channels": 4,
            "codes": None,
        },
        builders={},
    ),
)
"""The autoencoders behind the paper's latent models."""

BY_NAME = {spec.name: spec for spec in SPECS}

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""Weight files of an autoencoder in diffusers' layout. safetensors is preferred, because it cannot hold code."""

KL_CONFIG: dict[str, Any] = {  # stabilityai/sd-vae-ft-ema, config.json; assumed for a weight file without a config
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


KL_DEFAULTS = {  # of diffusers' AutoencoderKL, for items that are not in a config
    "act_fn": "silu",
    "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"],
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"],
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


def kl_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The items of an AutoencoderKL's config that define its network, with diffusers' defaults for missing ones.

    They are equal for two configs of the same network.
    """
    return {name: config.get(name, default) for name, default in KL_DEFAULTS.items()}


@dataclass(frozen=True, kw_only=True)
class Known:
    """A public decoder.

    record_name: its name in records. spec: name of its `AutoencoderSpec`. repository, subfolder: on the Hugging Face hub;
    empty: not there. place: where users can download it, for messages.
    """

    record_name: str
    spec: str
    place: str
    repository: str = ""
    subfolder: str = ""


_HUB, _LDM = "https://huggingface.co/", "https://ommer-lab.com/files/latent-diffusion/"


KNOWN: dict[str, Known] = {
    "ft-ema": Known(
        record_name="sd-vae-ft-ema",
        spec="kl-f8",
        repository="stabilityai/sd-vae-ft-ema",
        place=f"config.json and {WEIGHTS[0]} from {_HUB}stabilityai/sd-vae-ft-ema",
    ),
    "ft-mse": Known(
        record_name="sd-vae-ft-mse",
        spec="kl-f8",
        repository="stabilityai/sd-vae-ft-mse",
        place=f"config.json and {WEIGHTS[0]} from {_HUB}stabilityai/sd-vae-ft-mse",
    ),
    "original": Known(
        record_name="ldm-f8",
        spec="kl-f8",
        repository="CompVis/stable-diffusion-v1-4",
        subfolder="vae",
        place=f"the folder vae of {_HUB}CompVis/stable-diffusion-v1-4, or model.ckpt from {_LDM}kl-f8.zip",
    ),
    "vq-f4": Known(
        record_name="vq-f4", spec="vq-f4", place=f"LDM-4, {_LDM}nitro/cin/model.ckpt, or model.ckpt of {_LDM}vq-f4.zip"
    ),
    "vq-f8": Known(
        record_name="vq-f8", spec="vq-f8", place=f"model.ckpt of LDM-8, {_LDM}cin.zip, or of {_LDM}vq-f8.zip"
    ),
}
