"""Metrics: numbers computed from the features of a sample set, each with paper, direction and minimum number of samples.

The metrics in METRICS work on the features of any extractor. Importing this module loads none of the metrics' code.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric of a sample set. The object behind entry points of `harness.metrics`.

    compute: "module:attribute" of a function MetricInputs -> {key: Estimate}; metrics with the same one are computed
    together.
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
        """The key; registries find their items by the attribute `name`."""
        return self.key

    @property
    def summary(self) -> str:
        """One line for lists."""
        return f"{self.direction} is better, from {self.minimum} samples; {self.paper}"

    def __post_init__(self) -> None:
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
