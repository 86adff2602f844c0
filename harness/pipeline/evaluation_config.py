"""Configuration of an evaluation: suite, weights of its network, reference, guards."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluators.features import INCEPTION_BACKENDS
from harness.data.images import ImageSet
from harness.errors import UserError, shown
from harness.images.npz import holds_statistics_alone, open_npz_file
from harness.images.open import open_images
from harness.images.source import ImageSource
from harness.protocols import Protocol

if TYPE_CHECKING:
    from evaluators.sharded_extraction import ShardedExtraction
    from evaluators.suites import Suite

logger = logging.getLogger(__name__)

INCEPTION_FILE = "classify_image_graph_def.pb of ADM's evaluator, 95,673,916 bytes"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """A suite and everything that it needs.

    weights: file of the network's weights, if the user gives it. entry: of that file, where several fit. statistics: file
    of the reference, if its mu and sigma are used. device: for the features, in the notation of their framework. reference: the reference as an image source,
    for the guards. allow: guards that only warn. picture: file for the picture of the samples nearest to training
    images. training: images that copies are sought in; None: the reference images are the training images. sharding: how
    processes share the extraction; only the main one returns records.
    """

    suite: Suite
    weights: Path | None = None
    entry: str | None = None
    statistics: Path | None = None
    device: str = "cpu"
    reference: ImageSource | None = None
    allow: tuple[str, ...] = ()
    sharding: ShardedExtraction | None = None
    picture: Path | None = None
    training: ImageSet | None = None

    @property
    def training_sha256(self) -> str | None:
        """The hash of `training`."""
        return None if self.training is None else self.training.sha256

    @classmethod
    def of(cls, protocol: Protocol) -> EvaluationConfig:
        """The protocol's suite, without files from the user."""
        from evaluators.suites import get_suite

        return cls(suite=get_suite(protocol.suite))


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """A configuration with its reference images; none for statistics alone; None: the images of the run's data set."""

    config: EvaluationConfig
    images: ImageSet | None


def make_evaluator(
    protocol: Protocol, reference: Path | None, weights: Path | None, entry: str | None = None
) -> Evaluator | None:
    """The evaluator of a run's samples; None if its suite's network takes a weight file and no file at all is given.

    A reference without weights goes to `make_config`, which refuses it if the suite's network is Inception. Raises
    `UserError`, before anything is trained, for a file that does not exist or that the suite does not use.
    """
    from evaluators.suites import get_suite

    suite = get_suite(protocol.suite)
    if weights is None and reference is None and suite.features.weights_option:
        return None
    if weights is not None and not weights.exists():
        raise UserError(f"{suite.features.weights_option or '--inception'} {weights}: no such file")
    config = make_config(suite, weights, "torch", reference, entry=entry)
    if weights is not None:  # for its errors only: the network is needed after the training, which takes long
        config.suite.features.load("cpu", weights=weights, entry=entry)
    if reference is None:
        return Evaluator(config=config, images=None)
    source = open_reference(reference)
    return Evaluator(config=dataclasses.replace(config, reference=source), images=reference_images(source, reference))


def make_config(
    suite: Suite, weights: Path | None, backend: str, reference: Path | None, device: str = "cpu",
    entry: str | None = None,
) -> EvaluationConfig:  # fmt: skip
    """The configuration of a suite on a backend: "torch", "jax" or "tensorflow".

    weights: file of the network's weights. entry: of that file. reference: path of the reference images; mu and sigma are
    used if the file has them and the suite allows it. Raises `UserError` if Inception's weights are not given, or if weights are given to a
    suite that takes none.
    """
    from evaluators.reference_file import read_about

    inception_torch, inception = INCEPTION_BACKENDS["torch"], INCEPTION_BACKENDS[backend]
    flag = suite.features.weights_option
    if weights is not None and not flag:
        raise UserError(f"suite {suite.name!r} includes the weights of its network; leave out {weights}")
    if entry is not None and not flag:
        raise UserError(f"suite {suite.name!r} includes the weights of its network; leave out --entry {shown(entry)}")
    # Without a file, the other networks that take one look for it in torch.hub's cache; Inception's is nowhere else.
    if weights is None and flag == inception_torch.weights_option:
        raise UserError(
            f"suite {suite.name!r} needs the weights of its network: give --inception FILE ({INCEPTION_FILE})"
        )
    if inception != inception_torch:
        if suite.features != inception_torch:
            raise UserError(
                f"--backend {backend} is for suites on {inception_torch.name}, such as adm, not for {suite.name!r}"
            )
        suite = dataclasses.replace(suite, features=inception)
    elif device != "cpu":
        from harness.engines.torch.resolve import pick_device

        device = str(pick_device(device))  # raises if the device does not exist; the other backends check it themselves
    statistics = reference if reference is not None and reference.suffix == ".npz" and reference.is_file() else None
    # A file of `harness data reference` declares the network of its statistics.
    if statistics is not None and not suite.takes_statistics(declared=read_about(statistics) is not None):
        statistics = None
    if reference is not None and holds_statistics_alone(reference):
        suite = _without_images(suite, reference, used=statistics is not None)
    return EvaluationConfig(suite=suite, weights=weights, entry=entry, statistics=statistics, device=device)


def _without_images(suite: Suite, reference: Path, used: bool) -> Suite:
    """The suite for a reference of statistics alone; a warning says which metrics are left out.

    used: whether the suite uses the statistics of this file.
    """
    if not used:
        text = f"{reference} holds statistics (mu, sigma) and no images, and does not say of which network"
        raise UserError(f"{text}; suite {suite.name} needs images or a file of `harness data reference`")
    with open_npz_file(reference) as file:
        spatial = {"mu_s", "sigma_s"} <= set(file.names)
    narrowed = suite.without_reference_images(spatial=spatial)
    left_out = [metric.key for metric in suite.metrics if metric not in narrowed.metrics]
    if left_out:
        logger.warning(f"{reference} holds statistics and no images; left out: {', '.join(left_out)}")
    return narrowed


def open_reference(path: Path) -> ImageSource | None:
    """The images of a reference, marked as lossy if they were made of JPEG files; None: it holds statistics alone."""
    from evaluators.reference_file import read_about

    if holds_statistics_alone(path):
        return None
    source, about = open_images(path, any_arr_1=True), read_about(path)
    source.lossy = source.lossy or (about is not None and about.lossy)
    return source


def reference_images(source: ImageSource | None, path: Path) -> ImageSet:
    """The images of a reference as a data set; all labels are 0 if it has none. Empty for statistics alone (None)."""
    if source is None:
        return ImageSet(name=path.stem, images=np.empty((0, 1, 1, 3), np.uint8), labels=np.empty(0, np.int64))
    images = source.array()
    labels = np.zeros(len(images), np.int64) if source.labels is None else source.labels
    return ImageSet(name=path.name if path.is_dir() else path.stem, images=images, labels=labels)
