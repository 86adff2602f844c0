"""The images that copies are sought in: those that the samples' network was trained on, checked by their hash."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.data.images import ImageSet
from harness.errors import UserError
from harness.pipeline.evaluation_config import EvaluationConfig
from harness.protocols import Protocol
from harness.runs.samples import find_sidecar

logger = logging.getLogger(__name__)


def training_sha256(samples: Path) -> str | None:
    """The hash of the training images that the sidecar of a sample set states, of a system its base's; None: not stated."""
    data = find_sidecar(samples)
    # from before records stated it, the hash is in the identity of the run or, of a system, of the base's run
    for place in (
        ("record", "training", "dataset_sha256"),
        ("identity", "run", "dataset_sha256"),
        ("identity", "weights", "base", "run", "dataset_sha256"),
    ):
        found: Any = data
        for name in place:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, str):
            return found
    return None


def compared_with(protocol: Protocol, data: ImageSet, config: EvaluationConfig) -> tuple[ImageSet, EvaluationConfig]:
    """(the reference that is the protocol's of its data set, the config with the whole as training images, if need be)."""
    reference = data.reference(protocol.reference_images)
    if reference is data or config.training is not None:
        return reference, config
    return reference, dataclasses.replace(config, training=data)


def needs_training_images(config: EvaluationConfig) -> bool:
    """Whether a metric of the suite, or the picture, compares samples with training images."""
    return config.picture is not None or any(metric.needs_training for metric in config.suite.metrics)


def with_training_images(
    config: EvaluationConfig,
    reference: ImageSet,
    expected: str | None,
    candidates: Sequence[Callable[[], ImageSet]],
) -> EvaluationConfig:
    """`config` with the training images, or without the metrics that need them, which a warning names.

    expected: hash of the training images, as the samples' record names it; None: not known, so the first candidate is
    taken, whatever its hash. candidates: functions that load images, or raise UserError; the reference images come before
    them if their hash is `expected`. Raises UserError if the images are not available and a picture is wanted, or no
    metric is left.
    """
    if expected is not None and reference.sha256 == expected:
        return config
    for load in candidates:
        try:
            images = load()
        except UserError:
            continue
        if expected is None or images.sha256 == expected:
            return dataclasses.replace(config, training=images)
    which = f"the training images{f' ({expected[:12]})' if expected else ''} of these samples are not at hand"
    remedy = "name them with --data"
    if config.picture is not None:
        raise UserError(f"--neighbours shows training images, and {which}; {remedy}, or leave out --neighbours")
    kept = tuple(metric for metric in config.suite.metrics if not metric.needs_training)
    keys = ", ".join(metric.key for metric in config.suite.metrics if metric.needs_training)
    if not kept:
        raise UserError(f"suite {config.suite.name!r} measures {keys}, and {which}; {remedy}")
    logger.warning(f"{keys}: left out, because {which}; {remedy}")
    return dataclasses.replace(config, suite=dataclasses.replace(config.suite, metrics=kept))
