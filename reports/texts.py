"""How names and numbers are written: metric titles, intervals, counts, and the metadata of rows for footnotes."""

import math
from collections.abc import Sequence

from harness.settings import RunOptions, recorded_value, settings_of
from results.metrics import known, shared_direction
from results.records import Record, Sampling

UP, DOWN = "\u2191", "\u2193"  # which way is better


# The names of `row_metadata`, in the order in which notes state it. Footnotes of settings that are not named here or in
# DISTINGUISHING_METADATA follow.
_METADATA = (
    *("protocol version", "framework", "recipe", "batch", "learning rate", "EMA decay", "objective", "schedule"),
    *("training precision", "training steps", "training seed", "sampler", "sampling steps", "eta", "guidance"),
    *("clip denoised", "decoder", "uint8 rule", "label policy", "sampling precision", "sampling seed", "suite version"),
    *("system settings", "metric mode", "protocol"),
)
# What notes state only of rows that would look alike otherwise: hashes, and settings that move low bits.
DISTINGUISHING_METADATA = (
    *("backbone", "kind", "parameters", "Gflops", "training images", "training Gflops", "micro-batch", "checkpoint"),
    "network evaluations",
    *("sampling Gflops", "decoder Gflops", "sampling batch", "settings hash", "samples", "features"),
    "published-input Gflops",
)
# Footnote -> setting whose value records state under this name.
_FOOTNOTES = {
    known.footnote: known
    for known in settings_of(RunOptions).values()
    if known.footnote and known.footnote not in DISTINGUISHING_METADATA
}
METADATA = (*_METADATA, *(name for name in _FOOTNOTES if name not in _METADATA))


def metric_name(key: str, n: int | None = None, mode: str = "", features: str | None = None) -> str:
    """`FID-50K`, `Precision (adm)`. n None: without N; "-50K" stands for exactly 50,000.

    features: name of the feature network; KID and IS have these names only on Inception's features. None: Inception's.
    """
    metric = known(key)
    name = key
    if metric is not None:
        is_usual = features is None or features.startswith("inception")
        name = (not is_usual and metric.title_elsewhere) or metric.title or key
        if metric.names_n and n is not None:
            name = f"{name}-{count_text(n)}"
    return f"{name} ({mode})" if mode else name


def metric_title(key: str, n: int | None, mode: str = "", features: str | None = None) -> str:
    """The name of a metric with an arrow to the better side, as the registry states it."""
    metric = known(key)
    return metric_name(key, n, mode, features) + _arrow(None if metric is None else metric.higher_is_better)


def title_of(records: Sequence[Record], *, names_n: bool = True) -> str:
    """The title of the metric of these comparable records; without an arrow where its direction is not known."""
    first = records[0]
    evaluation = first.evaluation
    mode, features = (evaluation.mode, evaluation.features) if evaluation is not None else (None, None)
    name = metric_name(first.metric, first.n if names_n else None, mode or "", features)
    return name + _arrow(shared_direction(records))


def _arrow(higher_is_better: bool | None) -> str:
    return "" if higher_is_better is None else UP if higher_is_better else DOWN


def features_of(record: Record) -> str | None:
    """Name of the feature network of a record's evaluation."""
    return record.evaluation.features if record.evaluation is not None else None


def measured_text(value: float, low: float | None, high: float | None) -> str:
    """`3.27 [3.21, 3.33]`: as many decimals as show two digits of the interval's width, or four significant digits."""
    if low is None or high is None:
        return f"{value:.4g}"
    width = high - low
    if width <= 0:
        return f"{value:.4g} [{low:.4g}, {high:.4g}]"
    decimals = min(max(1 - math.floor(math.log10(width)), 0), 8)
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def count_text(count: int | None) -> str:
    """`400K`, `7M`, `1301K`, `800`; a dash for None."""
    if count is None:
        return "-"
    for unit, size in (("M", 1_000_000), ("K", 1000)):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def quantity_text(value: float | None) -> str:
    """Gflops and the like: two decimals as the paper prints them, four digits below 1, a dash for None."""
    if value is None:
        return "-"
    if abs(value) >= 1e5:
        return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4g}"


def params_text(params: int | None) -> str:
    """Millions of parameters."""
    return "-" if params is None else f"{params / 1e6:.1f}" if params < 1e8 else f"{params / 1e6:.0f}"


def guidance_text(record: Record) -> str:
    """`none`, `1.5`, `1.5 (first-3)` or `1 (classifier)`; a dash where it is not known."""
    sampling = record.sampling
    if sampling is None or (sampling.guidance_scale is None and sampling.steps is None):
        return "-"
    if sampling.guidance_scale in (None, 1.0) and sampling.guidance_channels != "classifier":
        return "none"
    channels = f" ({sampling.guidance_channels})" if sampling.guidance_channels else ""
    return f"{sampling.guidance_scale:g}{channels}"


def row_metadata(record: Record) -> dict[str, str]:
    """Name -> text of what a row's columns do not show: the material of footnotes. What is not known is absent."""
    training, sampling, evaluation = record.training, record.sampling, record.evaluation
    found: dict[str, object] = {footnote: recorded_value(known, record) for footnote, known in _FOOTNOTES.items()}
    found |= {
        "protocol": record.protocol,
        "protocol version": record.protocol_version,
    }
    if training is not None:
        found |= {
            "recipe": _short(training.recipe_hash),
            "batch": training.batch,
            "learning rate": training.learning_rate,
            "EMA decay": training.ema_decay,
            "objective": training.objective,
            "schedule": training.schedule,
            "training steps": count_text(training.steps) if training.steps is not None else None,
        }
    if sampling is not None:
        guidance = guidance_text(record)
        found |= {
            "sampling steps": sampling.stage_steps or sampling.steps,
            "guidance": None if guidance == "-" else guidance,
            "uint8 rule": sampling.uint8_rule,
            "clip denoised": None if sampling.clip_denoised is None else ("yes" if sampling.clip_denoised else "no"),
            "system settings": _settings_text(sampling),
        }
    if evaluation is not None:
        found |= {"suite version": evaluation.suite_version, "metric mode": evaluation.mode}
    return _words(found)


def distinguishing_metadata(record: Record) -> dict[str, str]:
    """Name -> text of DISTINGUISHING_METADATA. What is not known is absent."""
    training, sampling, evaluation = record.training, record.sampling, record.evaluation
    found: dict[str, object] = {
        "backbone": record.backbone,
        "kind": record.kind,
        "parameters": record.params,
        "Gflops": record.gflops,
        "published-input Gflops": record.gflops_published_input,
    }
    if training is not None:
        found |= {
            "training images": training.images,
            "training Gflops": training.gflops,
            "micro-batch": training.micro_batch,
            "checkpoint": _short(training.checkpoint_sha256),
        }
    if sampling is not None:
        found |= {
            "network evaluations": sampling.evaluations,
            "sampling Gflops": sampling.gflops_per_image,
            "decoder Gflops": sampling.decoder_gflops,
            "sampling batch": sampling.batch,
            "settings hash": sampling.settings_hash,
            "samples": _short(sampling.samples_sha256),
        }
    if evaluation is not None:
        found |= {"features": evaluation.features}
    return _words(found)


def _words(found: dict[str, object]) -> dict[str, str]:
    return {
        name: f"{value:.9g}" if isinstance(value, float) else str(value)
        for name, value in found.items()
        if value is not None
    }


def key_text(record: Record) -> str:
    """In words, what all rows of one table have in common."""
    evaluation = record.evaluation
    text = f"{record.dataset}, {record.resolution}x{record.resolution}, N = {record.n:,}"
    if evaluation is None:
        return text
    features = evaluation.features or "features"
    return (
        f"{text}, suite {evaluation.suite}, {features} ({_short(evaluation.features_sha256) or 'hash not stated'}), "
        f"reference {_short(evaluation.reference_sha256) or 'hash not stated'}"
    )


def _settings_text(sampling: Sampling) -> str | None:
    """The settings of a system in words, with the hash of all of them."""
    digest = _short(sampling.settings_hash)
    return f"{sampling.settings} ({digest})" if sampling.settings else digest


def _short(digest: str | None) -> str | None:
    return None if digest is None else digest[:12]
