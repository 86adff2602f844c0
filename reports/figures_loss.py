"""Figure 13: training loss, from the logs of runs in the folders of record files."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from harness import registry
from harness.diffusion.auxiliary import read_auxiliary
from harness.engines.loss_terms import LOSS_TERMS
from reports.charts import Axis, Figure, Mark, Panel, Series, model_of
from reports.points import MAX_LINES
from reports.render import one_line
from results.checked_fields import canonical_json
from results.records import Record

MAX_RUNS = 200  # the most runs whose logs are read
PLACES = 200  # points of a curve
WHOLE_BYTES = 4_000_000  # a longer log is not read whole, but in blocks
BLOCKS, BLOCK_BYTES = 400, 8192  # number and size of the blocks, which are evenly spaced in the log
SMOOTHED = 0.02  # share of a curve's points that its moving average reaches over
EARLY = 0.1  # share of the whole training that the panel of early training shows
_MAX_BYTES = 1_000_000  # of a run file

Terms = tuple[tuple[str, float], ...]  # (name, weight) of the logged terms that a loss is made of


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Curve:
    """The loss of one run."""

    model: str
    seed: int
    protocol: str
    key: str  # equal for runs that differ in the seed alone
    recipe: Mapping[str, object]
    terms: Terms
    steps: np.ndarray  # float64 (N,) ascending
    loss: np.ndarray  # float64 (N,), smoothed


def training_loss(folders: Sequence[Path], records: Iterable[Record]) -> Figure | None:
    """Figure 13: the training loss over steps, over the steps of early training, and over compute. None without curves.

    folders: the folders of record files; a run is read from its run.json and log.jsonl. Only runs of protocols with
    records have a curve. Seeds of one model are one line, their mean, in a band from the lowest to the highest.
    """
    curves = [curve for folder in folders[:MAX_RUNS] if (curve := _read_curve(folder)) is not None]
    if not curves:
        return None
    records = list(records)
    wanted = {record.protocol for record in records}
    curves = [curve for curve in curves if curve.protocol in wanted]
    step_gflops = {  # (model, protocol) -> training Gflops per step
        (model_of(record), record.protocol): record.training.gflops / record.training.steps
        for record in records
        if record.training is not None and record.training.gflops and record.training.steps
    }
    comparable: dict[tuple[str, Terms], list[_Curve]] = {}
    for curve in curves:
        comparable.setdefault((curve.protocol, curve.terms), []).append(curve)
    panels: list[Panel] = []
    rows: list[dict[str, object]] = []
    for (protocol, terms), members in sorted(comparable.items(), key=lambda pair: pair[0]):
        _add_panels(protocol, terms, members, step_gflops, panels, rows)
    if not panels:
        return None
    return Figure(name="figure-13", title="Training loss", panels=tuple(panels), rows=tuple(rows), columns=3)


def _add_panels(
    protocol: str,
    terms: Terms,
    curves: Sequence[_Curve],
    step_gflops: Mapping[tuple[str, str], float],  # (model, protocol) -> training Gflops per step
    panels: list[Panel],
    rows: list[dict[str, object]],
) -> None:
    """Append the panels of comparable curves to `panels`, and their data to `rows`."""
    lines: dict[str, list[_Curve]] = {}  # key -> curves of its seeds
    for curve in sorted(curves, key=lambda curve: (curve.model, curve.key, curve.seed)):
        lines.setdefault(curve.key, []).append(curve)
    kept = dict(list(lines.items())[:MAX_LINES])
    names = _names(kept)
    longest = max(float(seeds[0].steps[-1]) for seeds in kept.values())
    notes = [f"mean over about {100 * SMOOTHED:g} % of the steps drawn"]
    notes += (
        ["lines: means over seeds, bands: lowest to highest"] if any(len(seeds) > 1 for seeds in kept.values()) else []
    )
    notes += [f"{len(lines) - len(kept)} more lines are not drawn"] if len(lines) > len(kept) else []
    # Of each panel: title, last step, whether x is the compute of the steps instead of their number.
    shown = [("Whole training", longest, False), ("Early training", EARLY * longest, False)]
    if all((seeds[0].model, protocol) in step_gflops for seeds in kept.values()):
        shown.append(("Over training compute", longest, True))
    for number, (title, end, over_compute) in enumerate(shown):
        series: list[Series] = []
        for key, seeds in kept.items():
            factor = step_gflops[seeds[0].model, protocol] if over_compute else 1.0
            series += _series(names[key], seeds, end, factor)
        if not series:
            continue
        panels.append(
            Panel(
                heading=one_line(protocol),
                title=title,
                x=Axis(title="Training compute", unit="Gflops", scale="log")
                if over_compute
                else Axis(title="Training steps", from_zero=True),
                y=Axis(title=f"Training loss ({_terms_text(terms)})", scale="log", better="lower"),
                series=tuple(sorted(series, key=lambda each: each.kind != "band")),  # bands first, behind the lines
                note="; ".join(notes),
                starts_row=number == 0,
            )
        )
    for key, seeds in kept.items():
        rows += _rows(names[key], seeds, protocol, step_gflops.get((seeds[0].model, protocol)))


def _series(name: str, seeds: Sequence[_Curve], end: float, factor: float) -> list[Series]:
    """The series of a line: the mean over its seeds up to step `end`, and before it a band if there are several seeds.

    x is the step times `factor`. [] for fewer than two steps. Losses of the other seeds are interpolated at the steps of the
    first seed.
    """
    last_step = min(min(float(curve.steps[-1]) for curve in seeds), end)
    steps = seeds[0].steps[seeds[0].steps <= last_step]
    if len(steps) < 2:
        return []
    steps = steps[_evenly_spaced(len(steps))]
    heights = np.stack([np.interp(steps, curve.steps, curve.loss) for curve in seeds])  # (seeds, places)
    facts = (("backbone", seeds[0].model), ("seeds", ", ".join(str(curve.seed) for curve in seeds)))
    mean, low, high = heights.mean(axis=0), heights.min(axis=0), heights.max(axis=0)
    marks = tuple(
        Mark(x=float(x * factor), y=float(y), facts=(*facts, ("step", f"{x:g}"), ("loss", f"{y:.4g}")))
        for x, y in zip(steps, mean, strict=True)
    )
    line = Series(label=name, model=seeds[0].model, kind="line", provenance="measured", marks=marks)
    if len(seeds) == 1:
        return [line]
    ends = zip(marks, low, high, strict=True)
    band = tuple(Mark(x=mark.x, y=mark.y, low=float(below), high=float(above)) for mark, below, above in ends)
    return [Series(label="", model=seeds[0].model, kind="band", provenance="measured", marks=band), line]


def _evenly_spaced(count: int) -> np.ndarray:
    """The indices of at most PLACES of `count` points, evenly spaced, the first and the last included: int64 (N,)."""
    return np.unique(np.linspace(0, count - 1, PLACES).round().astype(int))


def _rows(name: str, seeds: Sequence[_Curve], protocol: str, step_gflops: float | None) -> list[dict[str, object]]:
    """The rows of data of a line's seeds. step_gflops: training Gflops per step; None: not known."""
    rows: list[dict[str, object]] = []
    for curve in seeds:
        for place in _evenly_spaced(len(curve.steps)):
            step = float(curve.steps[place])
            rows.append(
                {
                    "protocol": protocol,
                    "line": name,
                    "model": curve.model,
                    "training_seed": curve.seed,
                    "terms": _terms_text(curve.terms),
                    "step": step,
                    "loss": float(curve.loss[place]),
                    "training_gflops": None if step_gflops is None else step * step_gflops,
                }
            )
    return rows


def _names(lines: Mapping[str, Sequence[_Curve]]) -> dict[str, str]:
    """Key of a line -> its label: the model, with at most three items of the recipe in which the model's lines differ.

    Equal labels get " #2", " #3", ...
    """
    recipes: dict[str, list[Mapping[str, object]]] = {}
    for seeds in lines.values():
        recipes.setdefault(seeds[0].model, []).append(seeds[0].recipe)
    names: dict[str, str] = {}
    for key, seeds in lines.items():
        peers = recipes[seeds[0].model]
        items = [item for item in seeds[0].recipe if len({str(peer.get(item)) for peer in peers}) > 1]
        words = ", ".join(f"{item} {seeds[0].recipe[item]}" for item in sorted(items)[:3])
        name = f"{seeds[0].model} ({words})" if words else seeds[0].model
        # Number of lines before that have this name, with a number or without.
        taken = sum(other == name or other.startswith(f"{name} #") for other in names.values())
        names[key] = one_line(f"{name} #{taken + 1}" if taken else name)
    return names


def _read_curve(folder: Path) -> _Curve | None:
    """The curve of the run in a folder; None if there is no run, or fewer than two steps are logged."""
    path, run = folder / "log.jsonl", folder / "run.json"
    try:
        if not path.is_file() or run.stat().st_size > _MAX_BYTES:
            return None
        identity = json.loads(run.read_text(encoding="utf-8"))["identity"]
        recipe, seed = dict(identity["recipe"]), int(identity["seed"])
        model, protocol = str(identity["backbone"]), str(identity["protocol"]["name"])
        key = canonical_json([identity["backbone"], identity["protocol"], recipe, identity.get("framework")])
        terms, steps, loss = _losses(path, _term_weights(model, recipe))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # not a run of this harness
    if len(steps) < 2:
        return None
    return _Curve(
        model=one_line(model), seed=seed, protocol=protocol, key=key, recipe=recipe, terms=terms, steps=steps,
        loss=_smoothed(loss, max(2.0, SMOOTHED * len(loss))),
    )  # fmt: skip


def _term_weights(model: str, recipe: Mapping[str, object]) -> Mapping[str, float]:
    """Term -> weight of the terms in the loss of the backbone of that name; empty if it is not installed."""
    if model not in registry.backbones:
        return {}
    weights = LOSS_TERMS.get(registry.backbones.get(model).kind, {})
    if text := recipe.get("auxiliary"):
        wanted = read_auxiliary(str(text))
        known = wanted.name in registry.auxiliary_losses
        usual = registry.auxiliary_losses.get(wanted.name).weight if known else 1.0
        weights = {**weights, wanted.name: usual if wanted.weight is None else wanted.weight}
    return weights


def _terms_text(terms: Terms) -> str:
    """The terms as a formula: `mse + 0.5 vb`."""
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in terms)


def _losses(path: Path, weights: Mapping[str, float]) -> tuple[Terms, np.ndarray, np.ndarray]:
    """(terms of the loss, steps (N,), losses (N,)) of a log; for a long log, means over blocks of lines.

    weights: term -> weight in the loss. A term of weight 0 is left out; a term that is not in `weights` has weight 1. The
    terms are those of the first line that can be read; lines with other terms are left out.
    """
    size = path.stat().st_size
    blocks = [(0, size)]  # (offset, length) in bytes
    if size > WHOLE_BYTES:
        blocks = [(round(start), BLOCK_BYTES) for start in np.linspace(0, size - BLOCK_BYTES, BLOCKS)]
    names: tuple[str, ...] = ()
    points: list[tuple[float, float]] = []
    with path.open("rb") as file:
        for start, length in blocks:
            file.seek(start)
            lines = file.read(length).split(b"\n")
            complete = lines[1 if start else 0 : -1]  # the first and the last line of a block may be cut off
            block_points: list[tuple[float, float]] = []  # (step, loss)
            for line in complete:
                try:
                    row = json.loads(line)
                    values = {name: float(value) for name, value in row.items() if name != "step"}
                    step = float(row["step"])
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    continue  # a line that is incomplete, or not of this harness
                names = names or tuple(values)
                loss = sum(weights.get(name, 1.0) * value for name, value in values.items() if weights.get(name, 1.0))
                if tuple(values) == names and math.isfinite(loss) and math.isfinite(step):
                    block_points.append((step, loss))
            if len(blocks) > 1 and block_points:
                step, loss = np.mean(block_points, axis=0)
                block_points = [(float(step), float(loss))]
            points += block_points
    points.sort(key=lambda point: point[0])
    terms = tuple((name, weights.get(name, 1.0)) for name in names if weights.get(name, 1.0))
    return terms, np.array([step for step, _ in points]), np.array([loss for _, loss in points])


def _smoothed(values: np.ndarray, window: float) -> np.ndarray:
    """Exponential moving average with decay 1 - 1 / window, bias-corrected as in Adam. values, result: float64 (N,)."""
    keep = 1 - 1 / window
    mean, weight = 0.0, 0.0
    smooth = np.empty_like(values)
    for index, value in enumerate(values):
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth[index] = mean / weight
    return smooth
