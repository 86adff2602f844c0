"""How names and numbers are written: metric titles, intervals, counts, and the metadata of rows for footnotes."""

import math
from collections.abc import Sequence

from harness.settings import RunOptions, recorded_value, settings_of
from results.metrics import known, shared_direction
from results.records import Evaluation, Record, Sampling

UP, DOWN = "\u2191", "\u2193"  # arrows in metric titles: higher is better, lower is better


# The keys of `row_metadata`, in their order in footnotes. METADATA is complete: it adds the footnote names of settings
# (`Setting.footnote`) that are neither here nor in DISTINGUISHING_METADATA.
_METADATA = (
    *("protocol version", "framework", "recipe", "batch", "learning rate", "EMA decay", "objective", "schedule"),
    *("time distribution", "loss weight", "noise scale", "auxiliary loss", "EMA widths", "EMA snapshots"),
    *("training data", "training latents", "plug-in code", "Gflops are", "Gflops of a training pass"),
    *(
        "training precision",
        "earlier precision",
        "training steps",
        "training seed",
        "sampler",
        "sampling steps",
        "eta",
        "spacing",
        "EMA width",
        "guidance",
    ),
    *("clip denoised", "decoder", "uint8 rule", "label policy", "sampling precision", "sampling seed", "suite version"),
    *("system settings", "metric mode", "protocol"),
)
# The keys of `distinguishing_metadata`. Footnotes state them only for rows that would otherwise look alike: hashes, and
# settings that change only low bits.
DISTINGUISHING_METADATA = (
    "backbone", "kind", "parameters", "Gflops", "training images", "training Gflops", "Gflops of the auxiliary loss", "micro-batch", "checkpoint",
    "forked at step", "parent checkpoint",
    "network evaluations", "sampling Gflops", "decoder Gflops", "sampling batch", "settings hash", "samples", "features",
    "published-input Gflops",
)  # fmt: skip
# Name in footnotes -> the setting whose value is stated under this name.
_FOOTNOTES = {
    setting.footnote: setting
    for setting in settings_of(RunOptions).values()
    if setting.footnote and setting.footnote not in DISTINGUISHING_METADATA
}
METADATA = (*_METADATA, *(name for name in _FOOTNOTES if name not in _METADATA))


def metric_name(key: str, n: int | None = None, mode: str = "", features: str | None = None) -> str:
    """`FID-50K`, `Precision (adm)`; the key itself for an unknown metric. n None: without N. mode "": without a mode.

    "-50K" stands for exactly 50,000 images.

    features: name of the feature network, None: Inception. Some metrics have another title on other features, because
    "KID" and "IS" mean those on Inception's.
    """
    metric = known(key)
    name = key
    if metric is not None:
        name = metric.title or key
        if metric.title_elsewhere and features is not None and not features.startswith("inception"):
            name = metric.title_elsewhere
        if metric.names_n and n is not None:
            name = f"{name}-{count_text(n)}"
    return f"{name} ({mode})" if mode else name


def metric_title(key: str, n: int | None, mode: str = "", features: str | None = None) -> str:
    """`metric_name` with an arrow, up if higher is better by the registry."""
    metric = known(key)
    return metric_name(key, n, mode, features) + _arrow(None if metric is None else metric.higher_is_better)


def title_of(records: Sequence[Record], *, names_n: bool = True) -> str:
    """`metric_name` of these comparable records of one metric, with an arrow if the direction is known.

    names_n: False leaves N out.
    """
    first = records[0]
    evaluation = first.evaluation
    mode, features = (evaluation.mode, evaluation.features) if evaluation is not None else (None, None)
    name = metric_name(first.metric, first.n if names_n else None, mode or "", features)
    return name + _arrow(shared_direction(records))


def _arrow(higher_is_better: bool | None) -> str:
    """The arrow after a metric's name; "" if the direction is not known."""
    if higher_is_better is None:
        return ""
    return UP if higher_is_better else DOWN


def features_of(record: Record) -> str | None:
    """The name of the feature network of a record's evaluation; None if it is not stated."""
    return record.evaluation.features if record.evaluation is not None else None


def measured_text(value: float, low: float | None, high: float | None) -> str:
    """`3.27 [3.21, 3.33]`, with as many decimals as show two digits of the interval's width.

    Without an interval, or if its width is 0: four significant digits.
    """
    if low is None or high is None:
        return f"{value:z.4g}"
    width = high - low
    if width <= 0:
        return f"{value:z.4g} [{low:z.4g}, {high:z.4g}]"
    decimals = min(max(1 - math.floor(math.log10(width)), 0), 8)
    # z: a value that rounds to zero has no sign, as an unbiased distance just below zero
    return f"{value:z.{decimals}f} [{low:z.{decimals}f}, {high:z.{decimals}f}]"


def count_text(count: int | None) -> str:
    """`400K`, `7M`, `1301K`, `800`; a dash for None."""
    if count is None:
        return "-"
    for unit, size in (("M", 1_000_000), ("K", 1000)):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def quantity_text(value: float | None) -> str:
    """`118.64`, `0.0312`, `1235`, `1.23e10`; a dash for None. For Gflops and similar quantities.

    Below 1 four significant digits, from 1 two decimals as in the paper, from 1,000 none, from 100,000 three digits.
    """
    if value is None:
        return "-"
    if abs(value) >= 1e5:
        return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4g}"


def params_text(params: int | None) -> str:
    """Millions of parameters: `32.9`, `675`; a dash for None."""
    if params is None:
        return "-"
    return f"{params / 1e6:.1f}" if params < 1e8 else f"{params / 1e6:.0f}"


def states_guidance(record: Record) -> bool:
    """Whether the record states that its images were sampled with guidance.

    A record without scale and sampling steps states nothing about guidance; one with steps alone states that there is none.
    """
    sampling = record.sampling
    if sampling is None or (sampling.guidance_scale is None and sampling.steps is None):
        return False
    return sampling.is_guided


def guidance_text(record: Record) -> str:
    """Scale, interval and channels as stated: `none`, `1.5`, `1.5@0.1-0.8 (first-3)`, `1 (classifier)`; a dash if not stated.

    What counts as stated: see `states_guidance`. A classifier's scale may be missing: `scale not stated (classifier)`.
    """
    sampling = record.sampling
    if sampling is None or (sampling.guidance_scale is None and sampling.steps is None):
        return "-"
    if not states_guidance(record):
        return "none"
    channels = f" ({sampling.guidance_channels})" if sampling.guidance_channels else ""
    scale = "scale not stated" if sampling.guidance is None else sampling.guidance.short
    return scale + channels


def sampling_steps_text(record: Record) -> str:
    """The number of sampling steps, `50`, or of each network of a cascade, `50 + 50`; "" if it is not stated."""
    sampling = record.sampling or Sampling()
    return sampling.stage_steps or ("" if sampling.steps is None else str(sampling.steps))


def row_metadata(record: Record) -> dict[str, str]:
    """Name (of METADATA) -> text, for the footnotes of a row. Names whose value is not known are absent."""
    training, sampling, evaluation = record.training, record.sampling, record.evaluation
    values: dict[str, object] = {name: recorded_value(setting, record) for name, setting in _FOOTNOTES.items()}
    values |= {
        "protocol": record.protocol,
        "protocol version": record.protocol_version,
    }
    if record.gflops_source is not None:
        values["Gflops are"] = record.gflops_source
    if training is not None:
        values |= {
            "recipe": _short(training.recipe_hash),
            "batch": training.batch,
            "learning rate": training.learning_rate,
            "EMA decay": training.ema_decay,
            "objective": training.objective,
            "schedule": training.schedule,
            "time distribution": training.time_distribution,
            "loss weight": training.loss_weight,
            "noise scale": training.noise_scale,
            "auxiliary loss": training.auxiliary,
            "Gflops of a training pass": training.forward_gflops,
            "EMA widths": training.ema_widths,
            "EMA snapshots": training.ema_snapshots,
            "training data": _short(training.dataset_sha256),
            "training latents": _short(training.latents_sha256),
            "plug-in code": _short(training.plugins_sha256),
            "earlier precision": training.earlier_precision,
            "training steps": count_text(training.steps) if training.steps is not None else None,
        }
    if sampling is not None:
        guidance = guidance_text(record)
        values |= {
            "sampling steps": sampling_steps_text(record) or None,
            "guidance": None if guidance == "-" else guidance,
            "uint8 rule": sampling.uint8_rule,
            "clip denoised": None if sampling.clip_denoised is None else ("yes" if sampling.clip_denoised else "no"),
            "system settings": _settings_text(sampling),
        }
    if evaluation is not None:
        values |= {"suite version": evaluation.suite_version, "metric mode": evaluation.mode}
    return _as_texts(values)


def distinguishing_metadata(record: Record) -> dict[str, str]:
    """Name (of DISTINGUISHING_METADATA) -> text. Names whose value is not known are absent."""
    training, sampling, evaluation = record.training, record.sampling, record.evaluation
    values: dict[str, object] = {
        "backbone": record.backbone,
        "kind": record.kind,
        "parameters": record.params,
        "Gflops": record.gflops,
        "published-input Gflops": record.gflops_published_input,
    }
    if training is not None:
        values |= {
            "training images": training.images,
            "training Gflops": training.gflops,
            "Gflops of the auxiliary loss": training.auxiliary_gflops,
            "micro-batch": training.micro_batch,
            "checkpoint": _short(training.checkpoint_sha256),
            "forked at step": training.forked_at,
            "parent checkpoint": _short(training.parent_sha256),
        }
    if sampling is not None:
        values |= {
            "network evaluations": _evaluations_text(sampling),
            "sampling Gflops": sampling.gflops_per_image,
            "decoder Gflops": sampling.decoder_gflops,
            "sampling batch": sampling.batch,
            "settings hash": sampling.settings_hash,
            "samples": _short(sampling.samples_sha256),
        }
    if evaluation is not None:
        values |= {"features": evaluation.features}
    return _as_texts(values)


def _evaluations_text(sampling: Sampling) -> str | None:
    """Network evaluations of an image: `250`, or of an adaptive sampler `62.5 in the mean, at most 86`."""
    if sampling.evaluations_mean is not None:
        return f"{sampling.evaluations_mean:.6g} in the mean, at most {sampling.evaluations_max}"
    return None if sampling.evaluations is None else str(sampling.evaluations)


def _as_texts(values: dict[str, object]) -> dict[str, str]:
    """The values as texts, floats with nine significant digits; without those that are None."""
    return {
        name: f"{value:.9g}" if isinstance(value, float) else str(value)
        for name, value in values.items()
        if value is not None
    }


def key_text(record: Record) -> str:
    """What all rows of one table have in common: `digits, 8x8, N = 1,000, suite ..., features (hash), reference (hash)`."""
    evaluation = record.evaluation
    text = f"{record.dataset}, {record.resolution}x{record.resolution}, N = {record.n:,}"
    if evaluation is None:
        return text
    features = evaluation.features or "features"
    return (
        f"{text}, suite {suite_text(evaluation)}, {features} ({_short(evaluation.features_sha256) or 'hash not stated'}), "
        f"reference {_short(evaluation.reference_sha256) or 'hash not stated'}"
    )


def suite_text(evaluation: Evaluation) -> str:
    """`embedded`, or `embedded version 2`: the version of a suite is named from the second on."""
    version = evaluation.suite_version
    return evaluation.suite if version in (None, "1") else f"{evaluation.suite} version {version}"


def _settings_text(sampling: Sampling) -> str | None:
    """The settings of a system in words, with the first digits of the hash of all of them; None if neither is stated."""
    digest = _short(sampling.settings_hash)
    return f"{sampling.settings} ({digest})" if sampling.settings else digest


def _short(digest: str | None) -> str | None:
    """The first 12 digits of a hash."""
    return None if digest is None else digest[:12]
