"""The systems of the DiT paper's Tables 2, 3 and 5, with the settings behind their published numbers, and a few small or
new ones that the harness adds.

Sources: facebookresearch/DiT ed81ce2, README.md and sample_ddp.py; openai/guided-diffusion 22e0df8, README.md (scales of
the classifiers, 250 respaced DDPM steps, clip_denoised); CompVis/latent-diffusion a506df5, README.md;
huggingface/pytorch-pretrained-BigGAN. The names are those of `results/published`.
"""

from __future__ import annotations

from dataclasses import replace

from harness.systems.spec import Component, GuidanceClassifier, System, WeakNetwork

SAMPLES_ONLY = "; samples made elsewhere can be measured with `harness evaluate`"


def _dit(resolution: int, scale: float, decoder: str, *, suffix: str = "", row: str) -> System:
    """DiT-XL/2 with classifier-free guidance of `scale` (1: none). suffix: of the system's name. row: see `System.row`."""
    guidance = f"-cfg{scale:g}" if scale != 1 else ""
    words = f"classifier-free guidance {scale:g}" if scale != 1 else "no guidance"
    return System(
        name=f"dit-xl-2-{resolution}{guidance}{suffix}",
        summary=f"DiT-XL/2, 250 DDPM steps, {words}, VAE {decoder}",
        protocol=f"imagenet-{resolution}",
        base=Component(
            backbone="dit-xl-2",
            arguments={"input_size": resolution // 8},
            guidance_scale=scale,
            guidance_channels="first-3",
        ),
        decoder=decoder,
        row=row,
    )


def _sit(kind: str, scale: float) -> System:
    """SiT-XL/2 with its SDE or ODE sampler and classifier-free guidance of `scale` (1: none).

    willisma/SiT @947f95b, README.md, sample_ddp.py and train_utils.py. Its network is DiT-XL/2, of whose 2C output channels
    C are used. kind: "sde", or "ode": dopri5 over all of t (`harness.diffusion.adaptive` says in what it differs).
    """
    sampler, steps = {"sde": ("euler-maruyama", "250 Euler-Maruyama steps"), "ode": ("dopri5", "adaptive dopri5")}[kind]
    guidance = f"-cfg{scale:g}" if scale != 1 else ""
    words = f"classifier-free guidance {scale:g}" if scale != 1 else "no guidance"
    return System(
        name=f"sit-xl-2-256-{kind}{guidance}",
        summary=f"SiT-XL/2, {steps}, {words}, VAE ft-ema; not of the paper",
        protocol="imagenet-256",
        base=Component(
            backbone="dit-xl-2",
            arguments={"input_size": 32, "out_channels": 8},
            objective="velocity-sit",
            schedule="flow",
            sampler=sampler,
            guidance_scale=scale,
            guidance_channels="first-3",
        ),
        decoder="ft-ema",
    )


def _adm(resolution: int) -> tuple[System, ...]:
    """ADM plain, upsampled, guided, and both; a classifier guides the base, at the base's resolution."""
    table = f"Table {2 if resolution == 256 else 3}"
    low = {256: 64, 512: 128}[resolution]
    upsampler = Component(backbone=f"adm-u-{low}-{resolution}", clip_denoised=True)
    low_base = Component(backbone=f"adm-{low}", schedule="cosine" if low == 64 else "linear", clip_denoised=True)
    # scales of the classifiers that guide ADM at `resolution`, and ADM at `low` pixels below an upsampler
    scale = {256: 1.0, 512: 4.0}[resolution]
    low_scale = {64: 1.0, 128: 0.5}[low]
    plain = System(
        name=f"adm-{resolution}",
        summary=f"ADM at {resolution} pixels, 250 DDPM steps",
        protocol=f"imagenet-{resolution}",
        base=Component(backbone=f"adm-{resolution}", clip_denoised=True),
        uint8_rule="adm",
        row=f"{table}: ADM",
    )
    guided = replace(
        plain,
        name=f"adm-g-{resolution}",
        summary=f"{plain.summary}, guided by its classifier, scale {scale:g}",
        classifier=GuidanceClassifier(backbone=f"adm-classifier-{resolution}", scale=scale),
        row=f"{table}: ADM-G",
    )
    upsampled = replace(
        plain,
        name=f"adm-u-{resolution}",
        summary=f"ADM at {low} pixels and an upsampler, 250 DDPM steps each",
        base=low_base,
        upsamplers=(upsampler,),
        row=f"{table}: ADM-U",
    )
    both = replace(
        upsampled,
        name=f"adm-g-adm-u-{resolution}",
        summary=f"{upsampled.summary}, the base guided by its classifier, scale {low_scale:g}"
        + " (the authors give it for the base alone)",
        classifier=GuidanceClassifier(backbone=f"adm-classifier-{low}", schedule=low_base.schedule, scale=low_scale),
        row=f"{table}: ADM-G, ADM-U",
    )
    return plain, upsampled, guided, both


def _adm_in_pixels(resolution: int) -> tuple[System, System]:
    """ADM at 64 or 128 pixels, plain and guided by its classifier; the DiT paper has no row for them."""
    schedule, scale = {64: ("cosine", 1.0), 128: ("linear", 0.5)}[resolution]
    plain = System(
        name=f"adm-{resolution}",
        summary=f"ADM at {resolution} pixels, 250 DDPM steps; not of the paper",
        protocol=f"imagenet-{resolution}",
        base=Component(backbone=f"adm-{resolution}", schedule=schedule, clip_denoised=True),
        uint8_rule="adm",
    )
    guided = replace(
        plain,
        name=f"adm-g-{resolution}",
        summary=f"ADM at {resolution} pixels, 250 DDPM steps, guided by its classifier, scale {scale:g}; not of the paper",
        classifier=GuidanceClassifier(backbone=f"adm-classifier-{resolution}", schedule=schedule, scale=scale),
    )
    return plain, guided


def _adm_unconditional() -> tuple[System, System]:
    """ADM's network without classes at 256 pixels, plain and guided by the classifier with the scale of its README."""
    plain = System(
        name="adm-256-uncond",
        summary="unconditional ADM at 256 pixels, 250 DDPM steps; not of the paper",
        protocol="imagenet-256",
        base=Component(backbone="adm-256", arguments={"num_classes": 0}, clip_denoised=True),
        uint8_rule="adm",
    )
    guided = replace(
        plain,
        name="adm-g-256-uncond",
        summary="unconditional ADM at 256 pixels, 250 DDPM steps, guided by the classifier, scale 10; not of the paper",
        classifier=GuidanceClassifier(backbone="adm-classifier-256", scale=10.0),
    )
    return plain, guided


def _ldm(name: str, *, factor: int, scale: float, steps: int, row: str) -> System:
    """LDM with an autoencoder of `factor` and classifier-free guidance of `scale` (1: none). row: see `System.row`."""
    words = f"classifier-free guidance {scale:g}" if scale != 1 else "no guidance"
    return System(
        name=name,
        summary=f"LDM-{factor}, {steps} DDIM steps with eta 1 (not stated by the authors), {words}",
        protocol="imagenet-256",
        base=Component(
            backbone=f"ldm-{factor}",
            objective="epsilon-fixed",
            schedule="sqrt-linear",
            sampler="ddim-ldm",
            steps=steps,
            eta=1.0,
            guidance_scale=scale,
        ),
        decoder=f"vq-f{factor}",
        uint8_rule="ldm",
        label_policy="balanced",
        row=row,
    )


def _biggan(resolution: int) -> System:
    return System(
        name=f"biggan-deep-{resolution}",
        summary=f"BigGAN-deep at {resolution} pixels, truncation 1",
        protocol=f"imagenet-{resolution}",
        base=Component(backbone=f"biggan-deep-{resolution}"),
        uint8_rule="biggan",
        row=f"Table {2 if resolution == 256 else 3}: BigGAN-deep",
    )


def _stylegan(resolution: int) -> System:
    return System(
        name=f"stylegan-xl-{resolution}",
        summary=f"StyleGAN-XL at {resolution} pixels",
        protocol=f"imagenet-{resolution}",
        unavailable="its weights are pickles that embed code, and need its own repository and CUDA operators"
        + SAMPLES_ONLY,
        row=f"Table {2 if resolution == 256 else 3}: StyleGAN-XL",
    )


def _dits(resolution: int) -> tuple[System, ...]:
    table = f"Table {2 if resolution == 256 else 3}"
    rows = {1.0: "DiT-XL/2", 1.25: "DiT-XL/2-G (cfg=1.25)", 1.5: "DiT-XL/2-G (cfg=1.50)"}
    return tuple(_dit(resolution, scale, "ft-ema", row=f"{table}: {row}") for scale, row in rows.items())


def _augmented_cascade() -> System:
    """A cascade of ADM networks over 32, 64 and 256 pixels, after CDM (arXiv:2106.15282), for users to train.

    There are no public weights for it, and the networks are not those of CDM.
    """
    first = Component(backbone="adm-64", arguments={"input_size": 32}, schedule="cosine", clip_denoised=True)
    upsamplers = tuple(
        Component(backbone=name, clip_denoised=True, conditioning_noise=0.1) for name in ("adm-u-32-64", "adm-u-64-256")
    )
    return System(
        name="adm-cascade-32-64-256",
        summary="cascade of ADM networks with Gaussian conditioning augmentation, to be trained; of the harness",
        protocol="imagenet-256",
        base=first,
        upsamplers=upsamplers,
        uint8_rule="adm",
    )


def _small() -> tuple[System, ...]:
    """Systems of the digits at a size that a laptop trains: a guided ADM, two cascades, an autoguided DiT."""
    image = {"in_channels": 1, "num_classes": 10}
    base = Component(backbone="adm-xs", arguments={"input_size": 8, **image}, steps=50, clip_denoised=True)
    low = replace(base, arguments={"input_size": 4, **image})
    classifier = GuidanceClassifier(backbone="adm-classifier-xs", arguments=dict(base.arguments), scale=1.0)
    upsampler = Component(
        backbone="adm-u-xs", arguments={"low_res_size": 4, **base.arguments}, steps=50, clip_denoised=True
    )
    guided = System(
        name="digits-guided",
        summary="small ADM guided by a small classifier, 50 DDPM steps; of the harness, not of the paper",
        protocol="digits",
        base=base,
        classifier=classifier,
        uint8_rule="adm",
    )
    cascade = replace(
        guided,
        name="digits-cascade",
        summary="small ADM at 4x4 and an upsampler to 8x8; of the harness, not of the paper",
        base=low,
        classifier=None,
        upsamplers=(upsampler,),
    )
    augmented = replace(
        cascade,
        name="digits-cascade-augmented",
        summary="the same with Gaussian conditioning augmentation (after arXiv:2106.15282); of the harness",
        upsamplers=(replace(upsampler, conditioning_noise=0.1),),
    )
    autoguided = System(
        name="digits-autoguided",
        summary="DiT-XS/2 guided by a weaker DiT-XS/4, scale 2, 50 DDPM steps (after arXiv:2406.02507); of the harness",
        protocol="digits",
        base=Component(backbone="dit-xs-2", arguments=dict(base.arguments), steps=50, clip_denoised=True),
        weak=WeakNetwork(backbone="dit-xs-4", arguments=dict(base.arguments), scale=2.0),
    )
    return guided, cascade, augmented, autoguided


BUILT_IN: tuple[System, ...] = (
    _biggan(256),
    _stylegan(256),
    *_adm(256),
    System(
        name="cdm-256",
        summary="CDM, a cascade over 32, 64 and 256 pixels",
        protocol="imagenet-256",
        unavailable="neither code nor weights nor samples were released; only the numbers of its paper are there",
        row="Table 2: CDM",
    ),
    _ldm("ldm-8", factor=8, scale=1.0, steps=200, row="Table 2: LDM-8"),
    System(
        name="ldm-8-g",
        summary="LDM-8, 200 DDIM steps, guided by a classifier of latents, scale 10",
        protocol="imagenet-256",
        unavailable="the classifier of latents that guides it was not released" + SAMPLES_ONLY,
        row="Table 2: LDM-8-G",
    ),
    _ldm("ldm-4", factor=4, scale=1.0, steps=250, row="Table 2: LDM-4"),
    _ldm("ldm-4-cfg1.25", factor=4, scale=1.25, steps=250, row="Table 2: LDM-4-G (cfg=1.25)"),
    _ldm("ldm-4-cfg1.5", factor=4, scale=1.5, steps=250, row="Table 2: LDM-4-G (cfg=1.50)"),
    *_dits(256),
    _dit(256, 1.5, "original", suffix="-vae-original", row="Table 5: original"),
    _dit(256, 1.5, "ft-mse", suffix="-vae-ft-mse", row="Table 5: ft-MSE"),
    _biggan(512),
    _stylegan(512),
    *_adm(512),
    *_dits(512),
    *(_sit(kind, scale) for kind in ("sde", "ode") for scale in (1.0, 1.5)),
    *_adm_in_pixels(64),
    *_adm_in_pixels(128),
    *_adm_unconditional(),
    _augmented_cascade(),
    *_small(),
)
"""Rows in the order of the paper's tables. Table 5's ft-EMA is Table 2's `dit-xl-2-256-cfg1.5`."""
