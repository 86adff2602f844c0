"""Backbones and a protocol. Imports no framework."""

import dataclasses

from backbones.dit.spec import SPECS as DITS
from harness.protocols import Protocol, Recipe, Sampling

SPECS = tuple(
    # The network of SiT is DiT's, with adaLN-Zero blocks (Ma et al. 2024, sec. 3.4): the same builders and closed form.
    dataclasses.replace(
        dit,
        name=dit.name.replace("dit-", "sit-"),
        family="sit",
        summary=dit.summary.replace("DiT", "SiT"),
    )
    for dit in DITS
    if dit.defaults["block"] == "adaln-zero"
)

PROTOCOLS = Protocol(
    name="digits-sit",
    summary="The digits as in protocol digits, trained by flow matching",
    dataset="digits",
    resolution=8,
    image_channels=1,
    num_classes=10,
    input_size=8,
    in_channels=1,
    samples=1000,
    suite="embedded",
    recipe=Recipe(
        steps=800,
        batch=128,
        learning_rate=2e-3,
        ema_decay=0.999,
        ema_ramp=True,
        flip=False,
        objective="velocity",
        schedule="flow",
    ),
    sampling=Sampling(sampler="dpm++-2m", steps=(25,), clip_denoised=True, guidance_channels="all"),
)
