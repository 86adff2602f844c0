"""Suites: named and versioned choices of features and metrics. Numbers of different suites do not share a table.

Importing this module loads no framework and none of the metrics' code.
"""

import importlib
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evaluators.features import EFFICIENTNET_LITE0_96, FASHION_MNIST_CNN, INCEPTION_2015, INCEPTION_2015_CLEAN
from evaluators.features.spec import FeatureSpec
from evaluators.features.vit_spec import CLIP_VIT_L_14_336, DINOV2_VIT_L_14
from evaluators.metrics import FID, METRICS, SFID, Metric
from harness import registry
from harness.errors import RunError, UserError, one_line
from harness.io.files import sha256_json
from harness.plugins.code import Code

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from evaluators.intervals import Estimate
    from evaluators.metric_inputs import MetricInputs
    from evaluators.reference import Progress, Reference
    from evaluators.sharded_extraction import ShardedExtraction


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named, versioned choice of features and metrics; the version rises whenever a number would change.

    mode: name of this variant of the metrics in records; None: the metrics' default definitions. note: one line that
    explains what the names of the numbers do not say; printed with them. reference_statistics: whether mu and sigma in
    the reference's file are used instead of the statistics of its images: "optional" (if there are any), "expected" (the
    same, but a file of 10,000 images without them is refused), "declared" (only if the file's metadata names the network
    that they are of: public files have statistics of another network, and no metadata) or "never".
    """

    name: str
    version: int
    features: FeatureSpec
    metrics: tuple[Metric, ...]
    mode: str | None = None
    note: str = ""
    reference_statistics: str = "optional"

    def __post_init__(self) -> None:
        known = ("optional", "expected", "declared", "never")
        assert self.reference_statistics in known, self.reference_statistics

    def plugins(self, metric: Metric) -> dict[str, Code]:
        """The code of plug-ins that measures a metric, by what it brings: "metric", "features", "suite". Empty: none."""
        codes = {
            "metric": registry.metrics.code(metric.key),
            "features": registry.features.code(self.features.name),
            "suite": registry.suites.code(self.name),
        }
        return {role: code for role, code in codes.items() if code is not None}

    def plugins_sha256(self, metric: Metric) -> str | None:
        """The hash by which records name `plugins`; None: all is built in."""
        codes = {role: code.sha256 for role, code in self.plugins(metric).items()}
        return sha256_json(codes) if codes else None

    def takes_statistics(self, *, declared: bool) -> bool:
        """Whether mu and sigma in the reference's file are used. declared: the file's metadata names their network."""
        return self.reference_statistics != "never" and (declared or self.reference_statistics != "declared")

    def without_reference_images(self, *, spatial: bool) -> "Suite":
        """The suite without the metrics that need images of the reference, or statistics that its file lacks.

        spatial: whether the file has mu_s and sigma_s, for sFID. Raises UserError if no metric is left.
        """
        metrics = tuple(
            metric
            for metric in self.metrics
            if not metric.needs_reference_images and (spatial or metric.key != SFID.key)
        )
        if not metrics:
            raise UserError(f"all metrics of suite {self.name} need images, and the reference holds statistics alone")
        return replace(self, metrics=metrics)

    @property
    def summary(self) -> str:
        """One line for lists."""
        groups = []
        for direction in ("lower", "higher"):
            keys = [metric.key for metric in self.metrics if metric.direction == direction]
            if keys:
                groups.append(f"{', '.join(keys)} ({direction} is better)")
        return f"{'; '.join(groups)} on {self.features.name}, from {self.minimum} samples"

    @property
    def minimum(self) -> int:
        """The smallest number of samples that all metrics of the suite accept."""
        return max(metric.minimum for metric in self.metrics)

    def check_count(self, n: int) -> None:
        """Raise UserError if a metric needs more than n samples; call it before sampling and before evaluation."""
        short = [metric for metric in self.metrics if n < metric.minimum]
        if short:
            needs = ", ".join(f"{metric.key} needs {metric.minimum}" for metric in short)
            raise UserError(
                f"{n} samples are too few for suite {self.name}: {needs}; draw at least {self.minimum} (too-few)"
            )


EMBEDDED = Suite(
    name="embedded",
    version=1,
    features=EFFICIENTNET_LITE0_96,
    metrics=tuple(METRICS[key] for key in ("fd", "kid", "is", "precision", "recall", "copies")),
)

FASHION_MNIST = Suite(
    name="fashion-mnist",
    version=1,
    features=FASHION_MNIST_CNN,
    metrics=tuple(METRICS[key] for key in ("fd", "kid", "is", "precision", "recall")),
)
"""A second opinion on images of Fashion-MNIST: features that were learned from them."""

_ADM_EVALUATOR = "Dhariwal and Nichol 2021, arXiv:2105.05233; openai/guided-diffusion evaluations/evaluator.py"
_TORCH_FIDELITY = "Obukhov et al. 2020, doi:10.5281/zenodo.4957738; torch-fidelity 0.4.0"


def _adm(metric: Metric) -> Metric:
    """A copy of the metric that is computed as in ADM's evaluator."""
    return replace(metric, paper=_ADM_EVALUATOR, compute="evaluators.adm_suite:compute")


ADM = Suite(
    name="adm",
    version=1,
    features=INCEPTION_2015,
    metrics=tuple(_adm(metric) for metric in (FID, SFID, METRICS["is"], METRICS["precision"], METRICS["recall"])),
    mode="adm",
    note="as ADM's evaluator: IS of splits of 5,000 in file order, precision and recall on float16 distances, k = 3",
    reference_statistics="expected",
)
"""The evaluation of the DiT paper. Only on this network's features are the metrics called FID and sFID."""

ADM_EXACT = Suite(
    name="adm-exact",
    version=1,
    features=INCEPTION_2015,
    metrics=(FID, SFID, METRICS["is"], METRICS["precision"], METRICS["recall"]),
    mode="exact",
    note="ADM's metrics without its roundings: no number depends on the order of the images; IS of all samples at once, "
    "precision and recall on float64 distances, k = 3",
    reference_statistics="expected",
)
"""Its numbers are not comparable with the paper's and share no table with them."""

CLEAN = Suite(
    name="clean",
    version=1,
    features=INCEPTION_2015_CLEAN,
    metrics=(replace(FID, paper="Parmar et al. 2022, arXiv:2104.11222"), METRICS["kid"]),
    mode="clean",
    note="clean-fid's mode clean (not legacy_pytorch, not legacy_tensorflow): its package resizes; the 2015 Inception is "
    "ours with the same weights, where it runs a TorchScript of them; FID by our Frechet distance, KID over all pairs, "
    "which is the mean of its random subsets",
    reference_statistics="declared",
)
"""Images are resized by the clean-fid package, which must be installed."""


def _fidelity(metric: Metric, minimum: int = 100) -> Metric:
    """A copy of the metric that is computed as in torch-fidelity."""
    return replace(metric, paper=_TORCH_FIDELITY, compute="evaluators.torch_fidelity_suite:compute", minimum=minimum)


TORCH_FIDELITY = Suite(
    name="torch-fidelity",
    version=1,
    features=INCEPTION_2015,
    metrics=(
        _fidelity(FID),
        _fidelity(METRICS["kid"], minimum=1000),
        *(_fidelity(METRICS[key]) for key in ("is", "precision", "recall")),
    ),
    mode="torch-fidelity",
    note="as torch-fidelity 0.4.0 by default, samples as its input 1: IS of 10 splits after RandomState(2020) has shuffled "
    "them, KID of 100 subsets of 1,000 drawn by RandomState(2020), precision and recall with k = 3; computed here, "
    "without that package",
    reference_statistics="never",
)
"""For comparison with that package's numbers. IS and KID depend on the order of the images through its random draws."""

EMBEDDED_MODERN = Suite(
    name="embedded-modern",
    version=1,
    features=EFFICIENTNET_LITE0_96,
    metrics=tuple(METRICS[key] for key in ("density", "coverage", "authenticity")),
)
"""Those of the newer metrics that need no download."""

DINOV2 = Suite(
    name="dinov2",
    version=1,
    features=DINOV2_VIT_L_14,
    metrics=tuple(
        METRICS[key]
        for key in ("fd", "fd_infinity", "kid", "precision", "recall", "density", "coverage", "mind", "authenticity")
    ),
)
"""FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675) and other metrics on DINOv2 features; from 5,000 samples."""

CLIP = Suite(name="clip", version=1, features=CLIP_VIT_L_14_336, metrics=(METRICS["cmmd"],))
"""CMMD on the features that it was published for."""

BUILT_IN = {
    suite.name: suite
    for suite in (EMBEDDED, EMBEDDED_MODERN, FASHION_MNIST, ADM, ADM_EXACT, CLEAN, TORCH_FIDELITY, DINOV2, CLIP)
}


def get_suite(text: str) -> Suite:
    """The suite of that name, or a suite of registered metrics on registered features, as FEATURES:METRIC,METRIC.

    The latter is named after its features alone, because a number does not depend on the other metrics.
    Raises UserError for unknown names, a repeated metric, and a metric of class scores on features without a classifier.
    """
    name, colon, keys = text.partition(":")
    if not colon:
        return registry.suites.get(name)
    features = registry.features.get(name)
    metrics = tuple(registry.metrics.get(key.strip()) for key in keys.split(","))
    if len(set(metrics)) < len(metrics):
        raise UserError(f"{text!r} names a metric twice; give every metric once")
    for metric in metrics:
        if metric.needs_logits and features.classes is None:
            raise UserError(f"{metric.key} needs class logits, but {features.name} has no classifier; leave it out")
    # mu and sigma without metadata, as in public files, are taken to be of the 2015 Inception
    use = "optional" if features == INCEPTION_2015 else "declared"
    return Suite(name=features.name, version=1, features=features, metrics=metrics, reference_statistics=use)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One metric of one sample set.

    low, high: 95 % interval; None: no interval. n: number of samples. interval: method, "jackknife-20",
    "jackknife-20+halves" (recall; with fewer blocks, another number), "clopper-pearson" (a share of 0 or 1), "jeffreys" (a
    share of fewer than 10 samples) or "none". warning: one line on why the value is
    doubtful; empty: no doubt.
    """

    metric: str
    higher_is_better: bool
    value: float
    low: float | None
    high: float | None
    n: int
    interval: str
    warning: str = ""


def evaluate_samples(
    images: "np.ndarray",
    reference: "Reference",
    suite: Suite,
    *,
    training: "np.ndarray | None" = None,  # images that may have been memorised; None: the reference's
    labels: "np.ndarray | None" = None,  # int64 (N,), if classes were drawn in equal numbers: for the intervals
    copies: "np.ndarray | None" = None,  # int64 (N,), equal for copies of one image: for the intervals
    progress: "Progress | None" = None,
    picture: "Path | None" = None,  # file for a picture of the samples nearest to training images; None: no picture
    sharding: "ShardedExtraction | None" = None,  # of several processes, in process 0; None: one process extracts all
) -> list[Measurement]:
    """All metrics of the suite for images uint8 (N, H, W, C), in the suite's order.

    The reference must have been built with the suite's features and have the same H, W and C.
    Raises UserError when the inputs do not fit together, RunError when a numerical check fails; then no metric is
    returned.
    """
    from evaluators.intervals import assign_blocks
    from evaluators.metric_inputs import MetricInputs
    from evaluators.reference import check_images, extract

    check_images(images, "the samples")
    suite.check_count(len(images))
    training = reference.images if training is None else training
    if reference.extractor.name != suite.features.name:
        raise UserError(
            f"suite {suite.name} uses features {suite.features.name}, but the reference was built with "
            f"{reference.extractor.name}: build it with {suite.features.name}"
        )
    if not len(training) and (picture is not None or any(metric.needs_training for metric in suite.metrics)):
        raise UserError(f"suite {suite.name} needs the training images, and the reference holds statistics alone")
    for other, what in ((reference.images, "the reference"), (training, "the training images")):
        if len(other) and images.shape[1:] != other.shape[1:]:  # none: a reference of statistics alone
            raise UserError(f"samples are {images.shape[1:]} but {what} {other.shape[1:]} (height, width, channels)")
    if any(metric.needs_logits for metric in suite.metrics) and suite.features.classes is None:
        raise UserError(f"suite {suite.name} needs class logits, but {suite.features.name} has no classifier")

    inputs = MetricInputs(
        images=images,
        features=extract(images, reference.extractor, "sample features", progress, sharding),
        reference=reference,
        training=training,
        block=assign_blocks(len(images), labels=labels, copies=copies),
        labels=labels,
        copies=copies,
    )
    measurements = _measure(inputs, suite, progress)
    if picture is not None:
        from evaluators.neighbours_picture import write_picture

        try:
            write_picture(inputs, picture)
        except RunError as error:  # the metrics, which took the time, are returned all the same
            logger.warning(str(error))
    return measurements


def _estimates(metric: Metric, inputs: "MetricInputs") -> "dict[str, Estimate]":
    """What the metric's function returns. Raises UserError in one line where that of a package fails, or returns another thing."""
    from evaluators.intervals import Estimate

    owner = registry.metrics.owner(metric.key) if metric.key in registry.metrics else ""
    module, _, attribute = metric.compute.partition(":")
    where = f"metric {metric.key}{owner and f' of {owner}'}: {metric.compute}"
    try:
        found = getattr(importlib.import_module(module), attribute)(inputs)
    except (UserError, RunError, MemoryError):
        raise
    except Exception as error:  # other people's code can raise anything
        if owner == registry.OWN_DISTRIBUTION:
            raise
        raise UserError(f"{where} failed: {one_line(error)}") from error
    if not isinstance(found, dict) or not isinstance(found.get(metric.key), Estimate):
        came = (
            f"a {type(found).__name__}"
            if not isinstance(found, dict)
            else f"a dictionary of {', '.join(map(str, found))}"
        )
        raise UserError(f"{where} gave {came}; it must give {{{metric.key!r}: evaluators.intervals.Estimate(...)}}")
    return found


def _measure(inputs: "MetricInputs", suite: Suite, progress: "Progress | None") -> list[Measurement]:
    """One measurement for each metric of the suite, in its order. Raises RunError for a value that is not finite."""
    import numpy as np

    from evaluators.intervals import independent, interval

    distinct = len(inputs.images) if inputs.copies is None else independent(inputs.copies)
    # Metric.compute -> metric key -> estimate: one call gives all metrics that share a function, as precision and recall do
    computed: dict[str, dict[str, Estimate]] = {}
    measurements = []
    if progress is not None:
        progress("metrics", 0, len(suite.metrics))
    for done, metric in enumerate(suite.metrics):
        if metric.compute not in computed:
            computed[metric.compute] = _estimates(metric, inputs)
        estimate = computed[metric.compute][metric.key]
        if not (np.isfinite(estimate.value) and np.isfinite(estimate.left_out).all()):
            raise RunError(f"metric {metric.key} is not finite; no number of suite {suite.name} is reported")
        if distinct < len(inputs.images):
            # Copies of an image are one trial. Halves of the set that both have a copy are not independent of each other, so
            # the jackknife counts alone.
            trials = None if estimate.trials is None else estimate.trials * distinct // len(inputs.images)
            estimate = replace(estimate, trials=trials, half_variance=None)
        error_bar = interval(estimate)
        low, high = error_bar.low, error_bar.high
        if metric.bounds is not None and low is not None and high is not None:
            low, high = max(low, metric.bounds[0]), min(high, metric.bounds[1])
        measurements.append(
            Measurement(
                metric=metric.key,
                higher_is_better=metric.higher_is_better,
                value=float(estimate.value),
                low=low,
                high=high,
                n=len(inputs.images),
                interval=error_bar.method,
                warning=estimate.warning,
            )
        )
        if progress is not None:
            progress("metrics", done + 1, len(suite.metrics))
    return measurements
