"""Configuration of an evaluation: suite, weights of its network, reference, guards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluators.features import INCEPTION_BACKENDS
from harness.data.images import ImageSet
from harness.errors import UserError
from harness.images.open import open_images
from harness.images.source import ImageSource
from harness.protocols import Protocol

if TYPE_CHECKING:
    from evaluators.sharded_extraction import ShardedExtraction
    from evaluators.suites import Suite

INCEPTION_FILE = "classify_image_graph_def.pb of ADM's evaluator, 95,673,916 bytes"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """A suite and everything that it needs.

    weights: file of the network's weights, if the user gives it. statistics: file of the reference, if its mu and sigma
    are used. device: for the features, in the notation of their framework. reference: the reference as an image source,
    for the guards. allow: guards that only warn. picture: file for the picture of the samples nearest to training
    images. sharding: how processes share the extraction; only the main one returns records.
    """

    suite: Suite
    weights: Path | None = None
    statistics: Path | None = None
    device: str = "cpu"
    reference: ImageSource | None = None
    allow: tuple[str, ...] = ()
    sharding: ShardedExtraction | None = None
    picture: Path | None = None

    @classmethod
    def of(cls, protocol: Protocol) -> EvaluationConfig:
        """The protocol's suite, without files from the user."""
        from evaluators.suites import get_suite

        return cls(suite=get_suite(protocol.suite))


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """A configuration with its reference images; images None: the images of the run's data set."""

    config: EvaluationConfig
    images: ImageSet | None


def make_evaluator(protocol: Protocol, reference: Path | None, weights: Path | None) -> Evaluator | None:
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
    source = None if reference is None else open_reference(reference)
    config = dataclasses.replace(make_config(suite, weights, "torch", reference), reference=source)
    return Evaluator(config=config, images=None if source is None else reference_images(source))


def make_config(
    suite: Suite, weights: Path | None, backend: str, reference: Path | None, device: str = "cpu"
) -> EvaluationConfig:
    """The configuration of a suite on a backend: "torch", "jax" or "tensorflow".

    weights: file of the network's weights. reference: path of the reference images; mu and sigma are used if the file has
    them and the suite allows it. Raises `UserError` if Inception's weights are not given, or if weights are given to a
    suite that takes none.
    """
    from evaluators.reference_file import read_about

    inception_torch, inception = INCEPTION_BACKENDS["torch"], INCEPTION_BACKENDS[backend]
    flag = suite.features.weights_option
    if weights is not None and not flag:
        raise UserError(f"suite {suite.name!r} includes the weights of its network; leave out {weights}")
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
    return EvaluationConfig(suite=suite, weights=weights, statistics=statistics, device=device)


def open_reference(path: Path) -> ImageSource:
    """The images of a reference, marked as lossy if they were made of JPEG files."""
    from evaluators.reference_file import read_about

    source, about = open_images(path), read_about(path)
    source.lossy = source.lossy or (about is not None and about.lossy)
    return source


def reference_images(source: ImageSource) -> ImageSet:
    """The images of a source as a data set; all labels are 0 if the source has none."""
    images = source.array()
    labels = np.zeros(len(images), np.int64) if source.labels is None else source.labels
    path = Path(source.name)
    return ImageSet(name=path.name if path.is_dir() else path.stem, images=images, labels=labels)
