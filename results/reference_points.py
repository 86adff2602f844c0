"""Reference convergence points: how a healthy training goes, from several seeds, and whether a run goes as they do.

A point is of one backbone, protocol and recipe. It holds, for fixed training steps, the loss (mean of the last steps
before) and the distances of sample sets, one value for each training seed. Files are JSON; those in
`results/reference_points/` are packaged. The idea is MLPerf Training's reference convergence points; here both sides are
named, because a run that is too good is no better sign than one that is too bad.

The test: in the logs of the values, a new seed lies within mean +- t s sqrt(1 + 1/n) of the n seeds (prediction interval
of Student's t with n - 1 degrees of freedom). The level of 5 % is divided by the number of values looked at (Bonferroni), so
that at most one healthy run in twenty is called worse or better.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from harness.errors import UserError
from harness.io import files
from results.experiments import sampling_text, student_t
from results.metrics import known
from results.records import Record, comparable_key

SCHEMA = 1
LEVEL = 0.05  # of all values of a run together
MIN_SEEDS = 5
WINDOW = 0.2  # share of the steps until a mark over whose end the loss is averaged
# Values that are 0 or below, as of a distance of images to themselves, have no log: a share of the mean takes their place.
SMALLEST = 1e-6


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What is looked at: the loss, or a metric of a way of sampling, after `step` steps.

    key: equal for values that may be compared: empty of the loss, else data set, N, suite, features, reference.
    """

    step: int
    name: str  # "loss", or the metric's key
    sampling: str = ""  # `sampling_text`; "": the loss
    key: tuple = ()

    def __str__(self) -> str:
        return f"{self.name}{f' ({self.sampling})' if self.sampling else ''} at step {self.step}"


@dataclass(frozen=True, kw_only=True)
class ReferencePoint:
    """The values of several seeds. recipe: as in the identity of a run. values: a value for each seed, in their order."""

    name: str
    backbone: str
    protocol: str
    framework: str
    dataset_sha256: str
    recipe: Mapping[str, Any]
    seeds: tuple[int, ...]
    values: Mapping[Quantity, tuple[float, ...]]
    made: Mapping[str, Any]  # versions and device

    def recipe_differences(self, recipe: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Item -> (value of `recipe`, value here), where they differ."""
        return {
            name: (recipe.get(name), self.recipe.get(name))
            for name in dict.fromkeys([*self.recipe, *recipe])
            if recipe.get(name) != self.recipe.get(name)
        }

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it, with mean and standard deviation for readers."""
        rows = [
            {
                "step": quantity.step, "quantity": quantity.name,
                **({"sampling": quantity.sampling, "key": list(quantity.key)} if quantity.sampling else {}),
                "mean": fmean(values), "standard_deviation": stdev(values), "values": list(values),
            }
            for quantity, values in self.values.items()
        ]  # fmt: skip
        head = {name: getattr(self, name) for name in ("name", "backbone", "protocol", "framework", "dataset_sha256")}
        return {
            "schema": SCHEMA, **head, "recipe": dict(self.recipe), "seeds": list(self.seeds), "made": dict(self.made),
            "window": WINDOW, "rows": rows,
        }  # fmt: skip

    def write(self, path: Path) -> None:
        files.write_json(path, self.as_dict())


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One value of a run against the seeds of a point. side: "as expected", "worse" or "better"."""

    quantity: Quantity
    value: float
    mean: float  # geometric
    low: float
    high: float
    side: str


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """The verdict on a run: "as expected", "worse", "suspiciously better" or, if both occur, "worse and suspiciously better"."""

    point: str
    seeds: int
    deviations: tuple[Deviation, ...]
    recipe_differences: Mapping[str, tuple[Any, Any]]

    @property
    def verdict(self) -> str:
        sides = {each.side for each in self.deviations}
        words = ["worse"] if "worse" in sides else []
        words += ["suspiciously better"] if "better" in sides else []
        return " and ".join(words) or "as expected"

    @property
    def passed(self) -> bool:
        """Whether the run is one more seed of the point: as expected, and of its recipe and training data."""
        return self.verdict == "as expected" and not self.recipe_differences


def check(
    point: ReferencePoint, values: Mapping[Quantity, float], recipe: Mapping[str, Any], level: float = LEVEL
) -> Convergence:
    """Whether a run with these values goes as the seeds of the point. UserError where they have no value in common.

    level: share of healthy runs that are called worse or better.
    """
    shared = [quantity for quantity in point.values if quantity in values]
    if not shared:
        marks = sorted({quantity.step for quantity in point.values})
        raise UserError(f"the run has none of the values of {point.name}: train it to step {marks[0]} at least")
    count = len(point.seeds)
    threshold = student_t(count - 1, 1 - level / 2 / len(shared)) * math.sqrt(1 + 1 / count)
    deviations = []
    for quantity in shared:
        seeds = point.values[quantity]
        floor = SMALLEST * fmean(map(abs, seeds))
        logs = [math.log(max(value, floor)) for value in seeds]
        mean, half = fmean(logs), threshold * stdev(logs)
        value = values[quantity]
        log = math.log(max(value, floor))
        side = "as expected" if abs(log - mean) <= half else "better" if (log < mean) else "worse"
        if side != "as expected" and _higher(quantity.name):
            side = "worse" if side == "better" else "better"
        deviations.append(
            Deviation(
                quantity=quantity, value=value, mean=math.exp(mean), low=math.exp(mean - half),
                high=math.exp(mean + half), side=side,
            )
        )  # fmt: skip
    return Convergence(
        point=point.name, seeds=count, deviations=tuple(deviations), recipe_differences=point.recipe_differences(recipe)
    )


def _higher(name: str) -> bool:
    metric = known(name)
    return metric is not None and metric.higher_is_better


def distances(records: Iterable[Record]) -> dict[Quantity, float]:
    """The Frechet distances of the records of one run: lower is better, and they are above 0.

    Shares, such as precision, are left out: a log has no meaning near 1. Sample sets of several sampling seeds: the first.
    """
    found: dict[Quantity, float] = {}
    for record in sorted(records, key=lambda each: ((each.sampling and each.sampling.seed) or 0, each.id)):
        if record.metric in ("fid", "fd") and record.training and record.training.steps:
            quantity = Quantity(
                step=record.training.steps,
                name=record.metric,
                sampling=sampling_text(record),
                key=comparable_key(record),
            )
            found.setdefault(quantity, record.value)
    return found


def loss_at(losses: Sequence[float], step: int) -> float:
    """The mean loss of the last WINDOW of the steps until `step`. losses: of the steps from 1, at least `step` of them."""
    first = step - max(1, round(WINDOW * step))
    return fmean(losses[first:step])


def losses_at(losses: Sequence[float], steps: Iterable[int]) -> dict[Quantity, float]:
    """The loss after each of these steps that the run has done."""
    return {Quantity(step=step, name="loss"): loss_at(losses, step) for step in steps if 0 < step <= len(losses)}


def make(
    runs: Sequence[tuple[int, Mapping[Quantity, float]]],
    *,
    backbone: str,
    protocol: str,
    framework: str,
    dataset_sha256: str,
    recipe: Mapping[str, Any],
    made: Mapping[str, Any],
) -> ReferencePoint:
    """The point of these runs: (seed, values). Only what all seeds have is kept. UserError for fewer than MIN_SEEDS seeds."""
    runs = sorted(runs, key=lambda run: run[0])
    seeds = tuple(seed for seed, _ in runs)
    if len(set(seeds)) < len(seeds) or len(seeds) < MIN_SEEDS:
        raise UserError(
            f"a reference point needs {MIN_SEEDS} runs or more with different seeds, and has seeds {list(seeds)}"
        )
    shared = [quantity for quantity in runs[0][1] if all(quantity in values for _, values in runs)]
    return ReferencePoint(
        name=f"{protocol}-{backbone}", backbone=backbone, protocol=protocol, framework=framework,
        dataset_sha256=dataset_sha256, recipe=dict(recipe), seeds=seeds,
        values={quantity: tuple(values[quantity] for _, values in runs) for quantity in shared}, made=dict(made),
    )  # fmt: skip


def read(path: Path) -> ReferencePoint:
    """The point in a file. UserError for another document, or one of a newer harness."""
    return _from_dict(files.read_json(path, "reference point"), str(path))


def is_point(path: Path) -> bool:
    """Whether a file looks like a reference point."""
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and {"seeds", "rows", "backbone"} <= data.keys()


def find(path: Path) -> ReferencePoint | None:
    """The point in a file, or the packaged one of this name; None: neither."""
    if is_point(path):
        return read(path)
    return None if path.exists() else next((point for point in packaged() if point.name == str(path)), None)


def packaged() -> list[ReferencePoint]:
    """The points that are packaged, by name."""
    folder = resources.files("results").joinpath("reference_points")
    with resources.as_file(folder) as found:
        return [read(path) for path in sorted(found.glob("*.json"))]


def _from_dict(data: Any, where: str) -> ReferencePoint:
    try:
        if data["schema"] > SCHEMA:
            raise UserError(f"{where} was written by a newer harness (schema {data['schema']}); update this one")
        values = {
            Quantity(
                step=row["step"], name=row["quantity"], sampling=row.get("sampling", ""), key=tuple(row.get("key", ()))
            ): tuple(map(float, row["values"]))
            for row in data["rows"]
        }  # fmt: skip
        seeds = tuple(data["seeds"])
        if any(len(each) != len(seeds) for each in values.values()) or len(seeds) < 2:
            raise ValueError("a row needs one value for each seed")
        head = {name: data[name] for name in ("name", "backbone", "protocol", "framework", "dataset_sha256")}
        return ReferencePoint(**head, recipe=dict(data["recipe"]), seeds=seeds, values=values, made=dict(data["made"]))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is not a reference point ({error})") from error


def matching(
    points: Iterable[ReferencePoint], *, backbone: str, protocol: str, recipe: Mapping[str, Any]
) -> ReferencePoint:
    """The point of this backbone and protocol, of several the one whose recipe is nearest. UserError if there is none."""
    points = list(points)
    fitting = [point for point in points if (point.backbone, point.protocol) == (backbone, protocol)]
    if not fitting:
        have = ", ".join(dict.fromkeys(f"{point.backbone} on {point.protocol}" for point in points)) or "none"
        raise UserError(
            f"no reference point of {backbone} on {protocol} (there are: {have}); make one from {MIN_SEEDS} seeds with "
            "studies/make_reference_point.py, and name it with --reference-point"
        )
    return min(fitting, key=lambda point: (len(point.recipe_differences(recipe)), point.name))
