"""Small random autoencoders of diffusers, saved as their users save them."""

import torch


def save_vae(folder, *, seed=0, levels=4, channels=4, image_channels=3, width=8, **config):
    """An AutoencoderKL of factor 2 ** (levels - 1), drawn from `seed`, below `folder`; its posteriors are wide."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=image_channels, out_channels=image_channels, latent_channels=channels, layers_per_block=1,
        block_out_channels=(width,) * levels, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **config,
    )  # fmt: skip
    with torch.no_grad():
        vae.quant_conv.bias[channels:] -= 1.0  # standard deviations about 0.6
    vae.save_pretrained(folder)
    return folder
