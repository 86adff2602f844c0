"""Suites: which features and which metrics, under a name and a version. Numbers of different suites do not share a
table.

Importing this module loads no framework and none of the metrics' code.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluators.features import EFFICIENTNET_LITE0_96, INCEPTION_2015, FeatureSpec
from evaluators.features.vit_spec import CLIP_VIT_L_14_336, DINOV2_VIT_L_14
from harness.errors import Failure, Refusal

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from evaluators.reference import Progress, Reference


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that judges a sample set. The object behind entry points of `harness.metrics`.

    compute: "module:attribute" of a function Evidence -> {key: Estimate}; metrics that share one are computed together.
    """

    key: str
    direction: str  # "lower" or "higher" is better
    minimum: int  # fewest samples that it accepts
    paper: str
    compute: str
    needs_logits: bool = False
    bounds: tuple[float, float] | None = None  # what the value cannot leave: its interval is cut there

    @property
    def name(self) -> str:
        """The key, under the attribute by which registries know their items."""
        return self.key

    def __post_init__(self):
        assert self.direction in ("lower", "higher"), self.direction


# 100 samples are 5 for each block of the jackknife; far more are needed for a number worth publishing.
METRICS = {
    metric.key: metric
    for metric in (
        Metric(
            key="fd",
            direction="lower",
            minimum=100,
            paper="Heusel et al. 2017, arXiv:1706.08500",
            compute="evaluators.frechet:compute",
        ),
        Metric(
            key="kid",
            direction="lower",
            minimum=100,
            paper="Binkowski et al. 2018, arXiv:1801.01401",
            compute="evaluators.kernel_distance:compute",
        ),
        Metric(
            key="is",
            direction="higher",
            minimum=100,
            paper="Salimans et al. 2016, arXiv:1606.03498",
            compute="evaluators.inception_score:compute",
            needs_logits=True,
        ),
        Metric(
            key="precision",
            direction="higher",
            minimum=100,
            paper="Kynkaanniemi et al. 2019, arXiv:1904.06991",
            compute="evaluators.precision_recall:compute",
            bounds=(0.0, 1.0),
        ),
        Metric(
            key="recall",
            direction="higher",
            minimum=100,
            paper="Kynkaanniemi et al. 2019, arXiv:1904.06991",
            compute="evaluators.precision_recall:compute",
            bounds=(0.0, 1.0),
        ),
        Metric(
            key="copies",
            direction="lower",
            minimum=20,
            paper="nearest training image in pixels; fresh real images score about 0.01",
            compute="evaluators.copies:compute",
            bounds=(0.0, 1.0),
        ),
        Metric(
            key="density",
            direction="higher",
            minimum=100,
            paper="Naeem et al. 2020, arXiv:2002.09797",
            compute="evaluators.density_coverage:compute",
        ),
        Metric(
            key="coverage",
            direction="higher",
            minimum=100,
            paper="Naeem et al. 2020, arXiv:2002.09797",
            compute="evaluators.density_coverage:compute",
            bounds=(0.0, 1.0),
        ),
        Metric(
            key="cmmd",
            direction="lower",
            minimum=100,
            paper="Jayasumana et al. 2024, arXiv:2401.09603",
            compute="evaluators.cmmd:compute",
        ),
        Metric(
            key="mind",
            direction="lower",
            minimum=5000,
            paper="Berthet et al. 2026, arXiv:2605.06797",
            compute="evaluators.sliced_wasserstein:compute",
        ),
        Metric(
            key="fd_infinity",
            direction="lower",
            minimum=5000,
            paper="Chong and Forsyth 2020, arXiv:1911.07023",
            compute="evaluators.extrapolation:compute",
        ),
        Metric(
            key="authenticity",
            direction="higher",
            minimum=100,
            paper="Alaa et al. 2022, arXiv:2102.08921",
            compute="evaluators.authenticity:compute",
            bounds=(0.0, 1.0),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named, versioned choice of features and metrics; the version rises whenever a number would change."""

    name: str
    version: int
    features: FeatureSpec
    metrics: tuple[Metric, ...]

    @property
    def summary(self) -> str:
        """One line for lists."""
        return f"{', '.join(each.key for each in self.metrics)} on {self.features.name}, from {self.minimum} samples"

    @property
    def minimum(self) -> int:
        """The fewest samples that every metric of the suite accepts."""
        return max(metric.minimum for metric in self.metrics)

    def check_count(self, n: int) -> None:
        """Refuse n samples if a metric needs more; call it before sampling as well as before judging."""
        short = [metric for metric in self.metrics if n < metric.minimum]
        if short:
            needs = ", ".join(f"{metric.key} needs {metric.minimum}" for metric in short)
            raise Refusal(f"{n} samples are too few for suite {self.name}: {needs}; draw at least {self.minimum}")


EMBEDDED = Suite(
    name="embedded",
    version=1,
    features=EFFICIENTNET_LITE0_96,
    metrics=tuple(METRICS[key] for key in ("fd", "kid", "is", "precision", "recall", "copies")),
)

_ADM_EVALUATOR = "Dhariwal and Nichol 2021, arXiv:2105.05233; openai/guided-diffusion evaluations/evaluator.py"


def _adm(key: str, direction: str, bounds: tuple[float, float] | None = None) -> Metric:
    return Metric(
        key=key, direction=direction, minimum=100, paper=_ADM_EVALUATOR, compute="evaluators.adm_suite:compute",
        needs_logits=key == "is", bounds=bounds,
    )  # fmt: skip


ADM = Suite(
    name="adm",
    version=1,
    features=INCEPTION_2015,
    metrics=(
        _adm("fid", "lower"),
        _adm("sfid", "lower"),
        _adm("is", "higher"),
        _adm("precision", "higher", (0.0, 1.0)),
        _adm("recall", "higher", (0.0, 1.0)),
    ),
)
"""What the DiT paper's numbers were measured with. FID and its like are named so only on this network's features."""

EMBEDDED_MODERN = Suite(
    name="embedded-modern",
    version=1,
    features=EFFICIENTNET_LITE0_96,
    metrics=tuple(METRICS[key] for key in ("density", "coverage", "authenticity")),
)
"""What can be had without a download of the newer metrics."""

DINOV2 = Suite(
    name="dinov2",
    version=1,
    features=DINOV2_VIT_L_14,
    metrics=tuple(
        METRICS[key]
        for key in ("fd", "fd_infinity", "kid", "precision", "recall", "density", "coverage", "mind", "authenticity")
    ),
)
"""FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675) and its like; from 5,000 samples."""

CLIP = Suite(name="clip", version=1, features=CLIP_VIT_L_14_336, metrics=(METRICS["cmmd"],))
"""CMMD on the features that it was published for."""

BUILT_IN = {suite.name: suite for suite in (EMBEDDED, EMBEDDED_MODERN, ADM, DINOV2, CLIP)}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One metric of one sample set: value, 95 % interval (low and high, None where none can be given), and how it was
    made.

    n: number of samples. interval: "jackknife-20", "jackknife-20+halves" (recall), "clopper-pearson" (a share of 0 or
    1) or "none".
    """

    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    interval: str


def evaluate_samples(
    images: "np.ndarray",
    reference: "Reference",
    suite: Suite,
    *,
    training: "np.ndarray | None" = None,  # images that may have been learnt by heart; None: the reference's
    progress: "Progress | None" = None,
    picture: "Path | None" = None,  # of the samples nearest to training images, written beside the numbers
) -> list[Measurement]:
    """Every metric of the suite for uint8 images (N, H, W, C), in the suite's order.

    The reference must have been built with the suite's features and have the same H, W and C.
    Raises Refusal when the input does not fit, Failure when a numerical check fails; then no metric at all is returned.
    """
    from evaluators.evidence import Evidence
    from evaluators.intervals import assign_blocks
    from evaluators.reference import check_images, extract

    check_images(images, "the samples")
    suite.check_count(len(images))
    training = reference.images if training is None else training
    if reference.extractor.name != suite.features.name:
        raise Refusal(
            f"suite {suite.name} judges by {suite.features.name}, but the reference was built with "
            f"{reference.extractor.name}: build it with {suite.features.name}"
        )
    for other, what in ((reference.images, "the reference"), (training, "the training images")):
        if images.shape[1:] != other.shape[1:]:
            raise Refusal(f"samples are {images.shape[1:]} but {what} {other.shape[1:]} (height, width, channels)")
    if any(metric.needs_logits for metric in suite.metrics) and suite.features.classes is None:
        raise Refusal(f"suite {suite.name} scores classes, but {suite.features.name} has no classifier")

    evidence = Evidence(
        images=images,
        features=extract(images, reference.extractor, "sample features", progress),
        reference=reference,
        training=training,
        block=assign_blocks(len(images)),
    )
    measurements = _measure(evidence, suite, progress)
    if picture is not None:
        from evaluators.neighbours_picture import draw

        draw(evidence, picture)
    return measurements


def _measure(evidence, suite: Suite, progress) -> list[Measurement]:
    import numpy as np

    from evaluators.intervals import interval

    computed: dict[str, dict] = {}  # by compute function: precision and recall come from one
    measurements = []
    if progress is not None:
        progress("metrics", 0, len(suite.metrics))
    for done, metric in enumerate(suite.metrics):
        if metric.compute not in computed:
            module, _, attribute = metric.compute.partition(":")
            computed[metric.compute] = getattr(importlib.import_module(module), attribute)(evidence)
        estimate = computed[metric.compute][metric.key]
        if not (np.isfinite(estimate.value) and np.isfinite(estimate.left_out).all()):
            raise Failure(f"metric {metric.key} is not finite; no number of suite {suite.name} is reported")
        bar = interval(estimate)
        low, high = bar.low, bar.high
        if low is not None and metric.bounds is not None:
            low, high = max(low, metric.bounds[0]), min(high, metric.bounds[1])
        measurements.append(
            Measurement(
                metric=metric.key,
                value=float(estimate.value),
                low=low,
                high=high,
                n=len(evidence.images),
                interval=bar.method,
            )
        )
        if progress is not None:
            progress("metrics", done + 1, len(suite.metrics))
    return measurements
