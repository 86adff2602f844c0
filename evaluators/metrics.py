"""Metrics: numbers that judge a sample set by its features, and all that is known of each by its key.

The metrics in METRICS work on the features of any extractor. Importing this module loads none of the metrics' code.
"""

import math
import re
from dataclasses import dataclass

KEY = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric of a sample set. The object behind entry points of `harness.metrics`.

    Raises ValueError for a direction that is neither "lower" nor "higher", and for a key that no record can have.
    """

    key: str
    direction: str  # "lower" or "higher" is better
    minimum: int  # fewest samples that it accepts
    paper: str
    compute: str  # "module:attribute" of a function MetricInputs -> {key: Estimate}; called once for all metrics that name it
    needs_logits: bool = False
    needs_training: bool = False  # it reads `MetricInputs.training`: left out where the training images are not at hand
    bounds: tuple[float, float] | None = None  # smallest and largest possible value; the interval is clipped to them
    title: str = ""  # in tables and figures; "": the key
    title_elsewhere: str = ""  # on features other than Inception's, where `title` would mislead; "": `title`
    names_n: bool = False  # the estimate depends on N, so N belongs to its title: FID-50K
    needs_reference_images: bool = True  # False: the reference's statistics are enough, or it needs no reference
    rank: float = math.inf  # its place in tables, ascending; metrics without one stand last, by key

    @property
    def name(self) -> str:
        """The key; registries find their items by the attribute `name`."""
        return self.key

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value is better; records state the direction in this form."""
        return self.direction == "higher"

    @property
    def summary(self) -> str:
        """One line for lists."""
        return f"{self.direction} is better, from {self.minimum} samples; {self.paper}"

    def __post_init__(self) -> None:
        if self.direction not in ("lower", "higher"):
            raise ValueError(f"metric {self.key}: direction {self.direction!r} is neither 'lower' nor 'higher'")
        if not KEY.fullmatch(self.key):  # as records do, but before anything is sampled and measured
            raise ValueError(
                f"metric {self.key!r}: a key is of lower-case letters, digits and _, and begins with a letter"
            )


# 100 samples are 5 for each block of the jackknife; far more are needed for a number worth publishing.
METRICS = {
    metric.key: metric
    for metric in (
        Metric(
            key="fd",
            needs_reference_images=False,
            title="FD",
            names_n=True,
            rank=20,
            direction="lower",
            minimum=100,
            paper="Heusel et al. 2017, arXiv:1706.08500",
            compute="evaluators.frechet:compute",
        ),
        Metric(
            key="kid",
            title="KID",
            title_elsewhere="KD",
            rank=50,
            direction="lower",
            minimum=100,
            paper="Binkowski et al. 2018, arXiv:1801.01401",
            compute="evaluators.kernel_distance:compute",
        ),
        Metric(
            key="is",
            needs_reference_images=False,
            title="IS",
            title_elsewhere="IS-style",
            rank=60,
            direction="higher",
            minimum=100,
            paper="Salimans et al. 2016, arXiv:1606.03498",
            compute="evaluators.inception_score:compute",
            needs_logits=True,
        ),
        Metric(
            key="precision",
            title="Precision",
            rank=70,
            direction="higher",
            minimum=100,
            paper="Kynkaanniemi et al. 2019, arXiv:1904.06991",
            compute="evaluators.precision_recall:compute",
            bounds=(0.0, 1.0),
        ),
        Metric(
            key="recall",
            title="Recall",
            rank=80,
            direction="higher",
            minimum=100,
            paper="Kynkaanniemi et al. 2019, arXiv:1904.06991",
            compute="evaluators.precision_recall:compute",
            bounds=(0.0, 1.0),
        ),
        Metric(
            key="copies",
            title="Copies",
            rank=140,
            direction="lower",
            minimum=20,
            paper="nearest training image in pixels; fresh real images score about 0.01",
            compute="evaluators.copies:compute",
            needs_training=True,
            needs_reference_images=False,
            bounds=(0.0, 1.0),
        ),
        Metric(
            key="density",
            title="Density",
            rank=90,
            direction="higher",
            minimum=100,
            paper="Naeem et al. 2020, arXiv:2002.09797",
            compute="evaluators.density_coverage:compute",
        ),
        Metric(
            key="coverage",
            title="Coverage",
            rank=100,
            direction="higher",
            minimum=100,
            paper="Naeem et al. 2020, arXiv:2002.09797",
            compute="evaluators.density_coverage:compute",
            bounds=(0.0, 1.0),
        ),
        Metric(
            key="cmmd",
            title="CMMD",
            rank=110,
            direction="lower",
            minimum=100,
            paper="Jayasumana et al. 2024, arXiv:2401.09603",
            compute="evaluators.cmmd:compute",
        ),
        Metric(
            key="mind",
            title="MIND",
            rank=120,
            direction="lower",
            minimum=5000,
            paper="Berthet et al. 2026, arXiv:2605.06797",
            compute="evaluators.sliced_wasserstein:compute",
        ),
        Metric(
            key="fd_infinity",
            needs_reference_images=False,
            title="FD-inf",
            rank=30,
            direction="lower",
            minimum=5000,
            paper="Chong and Forsyth 2020, arXiv:1911.07023",
            compute="evaluators.extrapolation:compute",
        ),
        Metric(
            key="authenticity",
            title="Authenticity",
            rank=130,
            direction="higher",
            minimum=100,
            paper="Alaa et al. 2022, arXiv:2102.08921",
            compute="evaluators.authenticity:compute",
            needs_training=True,
            needs_reference_images=False,
            bounds=(0.0, 1.0),
        ),
    )
}

# The names FID and sFID are for Inception's features alone. So they are not in METRICS, which work on any features;
# suites measure them, and some replace `compute` by their own definition.
FID = Metric(
    key="fid",
    needs_reference_images=False,
    title="FID",
    names_n=True,
    rank=10,
    direction="lower",
    minimum=100,
    paper=METRICS["fd"].paper,
    compute=METRICS["fd"].compute,
)
SFID = Metric(
    key="sfid",
    needs_reference_images=False,
    title="sFID",
    names_n=True,
    rank=40,
    direction="lower",
    minimum=100,
    paper="Nash et al. 2021, arXiv:2103.03841",
    compute=METRICS["fd"].compute,
)
