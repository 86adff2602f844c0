"""`harness evaluate`: the third stage of run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.features import INCEPTION_BACKENDS
from harness.data.images import ImageSet
from harness.errors import UserError
from harness.images.open import open_images
from harness.images.source import ImageSource
from harness.pipeline.evaluate import EvaluationConfig
from harness.protocols import Protocol

SUITE_HELP = (
    "A name of `harness list suites`, or metrics on features of your choice, as in dinov2-vit-b-14:fd,kid (see `harness "
    "list features` and `metrics`). [default: the protocol's]"
)


WHERE = "classify_image_graph_def.pb of ADM's evaluator, 95,673,916 bytes"


def make_evaluator(
    task: Protocol, reference: Path | None, weights: Path | None
) -> tuple[EvaluationConfig, ImageSet | None] | None:
    """Who measures the samples of a run, and the images of --reference, if it was given. None: the suite's network needs
    weights, and nothing was given. Refused before anything is trained: files that are not there or of no use."""
    from evaluators.suites import get_suite

    suite = get_suite(task.suite)
    if weights is None and reference is None and suite.features.weights_option:
        return None
    if weights is not None and not weights.exists():
        raise UserError(f"{suite.features.weights_option or '--inception'} {weights}: no such file")
    source = None if reference is None else open_reference(reference)
    by = dataclasses.replace(evaluation_config(suite, weights, "torch", reference), reference=source)
    return by, None if source is None else reference_images(source)


def evaluation_config(
    suite: Any, weights: Path | None, backend: str, reference: Path | None, device: str = "cpu"
) -> EvaluationConfig:
    """The suite on the chosen backend, with what was brought; what has no use is refused."""
    from evaluators.reference_file import read_about

    torch, chosen = INCEPTION_BACKENDS["torch"], INCEPTION_BACKENDS[backend]
    flag = suite.features.weights_option
    if weights is not None and not flag:
        raise UserError(f"suite {suite.name!r} comes with its network's weights; leave out {weights}")
    if weights is None and flag == torch.weights_option:
        raise UserError(f"suite {suite.name!r} needs the weights of its network: give --inception FILE ({WHERE})")
    if chosen != torch:
        if suite.features != torch:
            raise UserError(
                f"--backend {backend} belongs to suite adm and others on {torch.name}, not to {suite.name!r}"
            )
        suite = dataclasses.replace(suite, features=chosen)
    elif device != "cpu":
        from harness.engines.torch.resolve import pick_device

        device = str(pick_device(device))  # refuses one that is absent; the other backends do so themselves
    statistics = reference if reference is not None and reference.suffix == ".npz" and reference.is_file() else None
    if statistics is not None and not suite.takes_statistics(declared=read_about(statistics) is not None):
        statistics = None
    return EvaluationConfig(suite=suite, weights=weights, statistics=statistics, device=device)


def open_reference(path: Path) -> ImageSource:
    """The images of a reference; one that was made of JPEG files still says so."""
    from evaluators.reference_file import read_about

    source, about = open_images(path), read_about(path)
    source.lossy = source.lossy or (about is not None and about.lossy)
    return source


def reference_images(source: ImageSource) -> ImageSet:
    """The images of a source; labels, where there are none, are all 0."""
    images = source.array()
    labels = np.zeros(len(images), np.int64) if source.labels is None else source.labels
    return ImageSet(name=Path(source.name).stem, images=images, labels=labels)
