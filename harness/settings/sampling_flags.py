"""Settings of sample sets, which runs, plans and `harness sample` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.diffusion.guidance import Guidance, read_guidance
from harness.io.text import read_count, read_fraction, read_number, read_sampler_steps, read_seed, read_text
from harness.planning.reference import Reference, parse_sampling_reference
from harness.settings.plugin_flags import PluginFiles
from harness.settings.setting import setting, settings_of
from harness.settings.training_flags import PRECISIONS


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(PluginFiles):
    """Settings of sample sets."""

    sampling_steps: tuple[int, ...] | None = setting(
        "Sampler steps; each number gives one sample set.", read_sampler_steps, metavar="N,N,...", default_text="the protocol's",
        study="sampling.steps", type_name="counts", recorded="sampling.steps", footnote="sampling steps",
    )  # fmt: skip
    samples: int | None = setting(
        "Number of samples N of each sample set.", read_count, default_text="the protocol's", study="sampling.samples",
        type_name="count", recorded="n",
    )  # fmt: skip
    sampler: str | None = setting(
        "A name from `harness list samplers`.", read_text, metavar="NAME", default_text="the protocol's",
        study="sampling.sampler", item="sampler", recorded="sampling.sampler", footnote="sampler",
    )  # fmt: skip
    eta: float | None = setting(
        "Share of fresh noise in DDIM, from 0 to 1.", read_fraction, study="sampling.eta", item="eta", type_name="float",
        recorded="sampling.eta", footnote="eta",
    )  # fmt: skip
    spacing: str | None = setting(
        "Spacing of the times at which the network is asked: respaced, trailing, linspace, uniform, karras, log-snr, "
        "shift:C, whole-stride (N steps as guided-diffusion's ddimN), or 10:10:20, steps of equal sections.", read_text, metavar="NAME", default_text="the schedule's", study="sampling.spacing", item="spacing",
        recorded="sampling.spacing", footnote="spacing",
    )  # fmt: skip
    ema_width: float | None = setting(
        "Width (sigma_rel) of the average of the weights, reconstructed after a training with --set ema_widths=0.05:0.10; "
        "0: the EMA with one decay.", read_number, metavar="WIDTH", default_text="0", study="sampling.ema_width",
        item="ema_width", type_name="float", recorded="sampling.ema_width", footnote="EMA width",
    )  # fmt: skip
    cfg: Guidance | None = setting(
        "Scale of classifier-free guidance; 1 = no guidance. 1.5@0.1-0.8 guides only where the noise level sigma = s / a lies "
        "in the interval; 1.5@0.3- has no upper end. 1.5:NAME guides by the rule NAME of a package.",
        read_guidance, metavar="SCALE[:RULE][@LOW-HIGH]",
        study="sampling.guidance_scales", item="guidance", recorded="sampling.guidance", footnote="guidance",
    )  # fmt: skip
    guidance_channels: str | None = setting(
        "Which channels are guided.", read_text, metavar="first-3|all", study="sampling.guidance_channels", item="guidance_channels",
        recorded="sampling.guidance_channels",
    )  # fmt: skip
    labels: str | None = setting(
        "Label policy: how the labels of samples are chosen.", read_text, metavar="random|balanced",
        study="sampling.label_policy", item="label_policy", recorded="sampling.label_policy", footnote="label policy",
    )  # fmt: skip
    sampling_seed: int | None = setting(
        "Seed of the samples.", read_seed, default_text="0", study="sampling.seed", item="seed", type_name="seed",
        recorded="sampling.seed", footnote="sampling seed",
    )  # fmt: skip
    sampling_precision: str = setting(
        "Arithmetic of the network in sampling. auto: as the run was trained, which measured it; of a system, bfloat16 on a GPU "
        "whose matrix products are faster in it.", read_text, "float32", choices=("auto", *PRECISIONS), show_default=True,
        study="sampling.precision", recorded="sampling.precision", footnote="sampling precision",
    )  # fmt: skip
    match_sampling: Reference | None = setting(
        "Instead of --sampling-steps: for each N, the steps that cost as much per image as N steps of BACKBONE; a step with "
        "guidance counts twice, as in dit-xl-2@250@cfg1.5.", parse_sampling_reference, metavar="BACKBONE@N,N,...[@cfgSCALE[@LOW-HIGH]]",
        type_name="reference",
    )  # fmt: skip

    def overrides(self) -> dict[str, Any]:
        """Item of a protocol's [sampling], except steps -> value of the setting that overrides it; None: not given."""
        items = {info.item: getattr(self, name) for name, info in settings_of(self).items() if info.item}
        guidance: Guidance | None = items.pop("guidance")
        given = (None, None, None) if guidance is None else (guidance.scale, guidance.interval, guidance.rule)
        names = ("guidance_scale", "guidance_interval", "guidance_rule")
        return {**items, **dict(zip(names, given, strict=True))}
