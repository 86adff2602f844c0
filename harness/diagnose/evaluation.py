"""Stages evaluator, reference and N: the same samples measured again, as they were and as they should be."""

from __future__ import annotations

import math

import numpy as np

from harness.data.images import ImageSet
from harness.diagnose.expectation import Expectation
from harness.diagnose.finding import FAULT, OK, SUSPECT, UNKNOWN, Finding
from harness.diagnose.subject import Subject
from harness.errors import RunError, UserError

# The features of the built-in images, root mean square of all of them: what a network with these weights gives. Threads and
# processors move it by 1e-6.
KNOWN_FEATURES = {"efficientnet-lite0-96": 1.15513}
FEATURES_TOLERANCE = 1e-3
VALUE_TOLERANCE = 1e-3  # relative, of a metric that is measured again
SIDE = 32


def built_in_images(channels: int) -> np.ndarray:
    """Four built-in pictures of waves and texture, uint8 (4, 32, 32, channels)."""
    y, x = np.mgrid[:SIDE, :SIDE]
    pictures = []
    for k in range(4):
        waves = [128 + 90 * np.sin((x + 7 * k) / (3 + c)) * np.cos(y / (5 + k + c)) for c in range(channels)]
        texture = (x * 37 + y * 59 + x * y * (1 + k)) % 41
        pictures.append(np.clip(np.stack(waves, axis=-1) + texture[..., None] - 20, 0, 255))
    return np.stack(pictures).astype(np.uint8)


def check_evaluator(subject: Subject, expected: Expectation) -> Finding:
    """The feature network's self-test on built-in images, and the recorded value measured again."""
    stage = "evaluator"
    extractor = subject.extractor
    images = built_in_images(3)
    together = extractor(images).pooled
    alone = np.concatenate([extractor(images[index : index + 1]).pooled for index in range(len(images))])
    scale = float(np.sqrt((together.astype(np.float64) ** 2).mean())) or 1.0
    apart = float(np.abs(together - alone).max()) / scale
    faults, words = [], [f"features of the built-in images do not depend on their batch ({apart:.0e})"]
    if not np.isfinite(together).all() or apart > FEATURES_TOLERANCE:
        faults.append(f"features of the built-in images depend on their batch ({apart:.2g} of their size)")
    known = KNOWN_FEATURES.get(extractor.name)
    if known and abs(scale / known - 1) > FEATURES_TOLERANCE:
        faults.append(f"features of the built-in images are {scale:.6g}, expected {known:.6g}")
    faults += _other_backend(subject)
    wanted = expected.evaluation
    if wanted is not None and wanted.features_sha256 not in (None, extractor.sha256):
        faults.append(
            f"features {extractor.name} ({extractor.sha256[:12]}), expected {wanted.features} ({(wanted.features_sha256 or '')[:12]})"
        )
    record = subject.record
    if record is not None and record.evaluation is not None:
        from evaluators.reference import images_sha256

        if record.evaluation.features_sha256 not in (None, extractor.sha256):
            faults.append(
                f"the record has features {(record.evaluation.features_sha256 or '')[:12]}, here they are {extractor.sha256[:12]}"
            )
        elif record.evaluation.reference_sha256 == images_sha256(subject.reference.images):
            again = subject.own_distance.value
            if math.isclose(again, record.value, rel_tol=VALUE_TOLERANCE, abs_tol=1e-6):
                words.append(f"{record.metric} {again:.6g} again")
            else:
                faults.append(f"{record.metric} is recorded as {record.value:.6g} and is {again:.6g}")
    text = "; ".join(faults or words)
    return Finding(stage=stage, status=FAULT if faults else OK, measured=text, expected="the same numbers again")


def _other_backend(subject: Subject) -> list[str]:
    """A fault if the original graph in TensorFlow, where it is installed, gives other features than torch."""
    from evaluators.features import INCEPTION_BACKENDS
    from harness.frameworks.installed import check_installed

    config = subject.config
    if config.weights is None or config.suite.features != INCEPTION_BACKENDS["torch"]:
        return []
    try:
        check_installed("tensorflow")
        other = INCEPTION_BACKENDS["tensorflow"].load("cpu", weights=config.weights)
    except (UserError, RunError):
        return []
    images = built_in_images(3)
    ours, theirs = subject.extractor(images).pooled, other(images).pooled
    apart = float(np.abs(ours - theirs).max() / np.sqrt((theirs.astype(np.float64) ** 2).mean()))
    return [f"TensorFlow's features differ from torch's by {apart:.2g} of their size"] if apart > 1e-2 else []


def check_reference(subject: Subject, expected: Expectation) -> Finding:
    """The reference that the samples were compared with, against the one that is expected."""
    from evaluators.reference import images_sha256

    stage = "reference"
    record, right = subject.record, images_sha256(subject.reference.images)
    wanted_hash = expected.evaluation.reference_sha256 if expected.evaluation else None
    wanted = f"{_name(subject.reference)}, {len(subject.reference)} images ({right[:12]})"
    if record is None or record.evaluation is None or record.evaluation.reference_sha256 is None:
        if wanted_hash not in (None, right):
            text = f"the reference here is {right[:12]}"
            return Finding(stage=stage, status=SUSPECT, measured=text, expected=f"{(wanted_hash or '')[:12]}")
        return Finding(stage=stage, status=OK, measured=f"measured here against {wanted}", expected=wanted)
    used = record.evaluation.reference_sha256
    if used == right and wanted_hash in (None, used):
        return Finding(stage=stage, status=OK, measured=f"{used[:12]}", expected=wanted)
    if used == right:
        text = f"{used[:12]}; {expected.source} was measured against {(wanted_hash or '')[:12]}"
        return Finding(stage=stage, status=FAULT, measured=text, expected=(wanted_hash or "")[:12])
    own = subject.own_distance
    text = f"{used[:12]}, with {record.metric} {record.value:.4g}; against the right one {own.value:.4g}"
    return Finding(stage=stage, status=FAULT, measured=text, expected=wanted, mended=own.value)


def _name(images: ImageSet) -> str:
    return f"data set {images.name}"


def check_count(subject: Subject, expected: Expectation) -> Finding:
    """N: a Frechet distance falls with it as FD + b / N; b comes from half of the samples (Chong and Forsyth, arXiv:1911.07023)."""
    stage = "N"
    n = len(subject.images)
    if expected.n is None:
        return Finding(stage=stage, status=UNKNOWN, measured=f"N = {n:,}")
    wanted = f"N = {expected.n:,}"
    if n == expected.n:
        return Finding(stage=stage, status=OK, measured=f"N = {n:,}", expected=wanted)
    text, mended = f"N = {n:,}", None
    if subject.can_count(n // 2) and subject.metric.key in ("fid", "fd"):
        own = subject.own_distance.value
        halves = [subject.distance(subject.images[start::2]).value for start in (0, 1)]
        slope = (sum(halves) / 2 - own) * n  # halves: FD + 2 b / n, all: FD + b / n
        mended = own + slope * (1 / expected.n - 1 / n)
        text += f": {subject.metric.key} {own:.4g}, at N = {expected.n:,} about {mended:.4g}"
    return Finding(stage=stage, status=FAULT, measured=text, expected=wanted, mended=mended)
