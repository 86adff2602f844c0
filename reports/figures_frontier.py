"""Beyond the paper: the Pareto frontier of quality and compute, and the best size at a training budget."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

from reports.charts import Axis, Figure, Mark, Panel, Series, model_of
from reports.figures_study import Study, above_zero, block_of, name_of, places_of, pretty, steps_of, training_gflops
from reports.fits import between, frontier
from reports.points import (
    SIGNS,
    RecordIndex,
    at_place,
    bars_note,
    better,
    comparable_groups,
    data_row,
    left_out,
    marks_of,
    paper_name,
    quality,
    quality_axis,
    settings_of,
)
from reports.texts import count_text, guidance_text
from results.records import Record, Sampling

MAX_POINTS = 400  # of a panel
BUDGETS = 5
NOT_RECORDED = "energy is not in the records"


def pareto(index: RecordIndex, published: Sequence[Record]) -> Figure | None:
    """`pareto`: quality against the cost of training and of an image, and the results that no other beats in both."""
    panels: list[Panel] = []
    rows: list[dict] = []
    printed = [record for record in published if record.metric == "fid" and record.table != "Section 5.2"]
    groups, more = comparable_groups(index.quality, printed)
    for group in groups:
        records = quality(group.records)
        if not records:
            continue
        first = len(panels)
        settings = _settings(records)
        training = _timed(records, _training_seconds, "training_device")
        sampling = _timed(records, _image_seconds, "sampling_device")
        for title, unit, kept, cost, name, others in (
            ("Training compute", "Gflops", settings, training_gflops, _trained, 0),
            ("Sampling compute", "Gflops per image, decoder not counted", settings, _per_image, _sampled, 0),
            ("Training time", f"seconds on {training[0]}", _settings(training[1]), _training_seconds, _trained, training[2]),
            ("Sampling time", f"seconds an image on {sampling[0]}", _settings(sampling[1]), _image_seconds, _sampled, sampling[2]),
        ):  # fmt: skip
            made = _frontier_panel(kept, cost, name)
            if made is None:
                continue
            series, found, omitted = made
            panels.append(
                Panel(
                    heading=group.heading,
                    title=f"Quality against {title.lower()}",
                    x=Axis(title=title, unit=unit, scale="log"),
                    y=quality_axis(records),
                    series=series,
                    note="; ".join(
                        text
                        for text in (
                            "line: the frontier, where no other is both cheaper and better",
                            *bars_note(series),
                            f"{omitted} more results are not drawn" if omitted else "",
                            f"times on {others} more devices are not drawn" if others else "",
                            left_out(0, more),
                            NOT_RECORDED,
                        )
                        if text
                    ),
                    starts_row=len(panels) == first,
                )
            )
            rows += [
                data_row(record, len(panels), name(record), places_of(record) | _costs(record))
                | {"frontier": "yes" if on else "no"}
                for record, on in found
            ]
    if not panels:
        return None
    return Figure(name="pareto", title="The frontier of quality and compute", panels=tuple(panels), rows=tuple(rows))


def _timed(records: Sequence[Record], seconds: Callable[[Record], float | None], device: str):
    """(device on which most models were timed, records with their time on it, number of other devices).

    device: the field of the environment that names it. Times on different devices cannot be compared.
    """
    found: dict[str, list[Record]] = {}
    for record in records:
        if (name := getattr(record.environment, device, None)) and seconds(record):
            found.setdefault(name, []).append(record)
    models = {name: len({model_of(record) for record in own}) for name, own in found.items()}
    most = max(found, key=lambda name: (models[name], len(found[name]), name), default="")
    return most, found.get(most, []), max(len(found) - 1, 0)


def _settings(records: Sequence[Record]) -> list[list[Record]]:
    """Groups of records that differ in seeds alone."""
    settings = [sorted(own, key=lambda record: record.id) for own in settings_of(records, (), Sampling)]
    return sorted(settings, key=lambda own: (model_of(own[0]), own[0].provenance, own[0].id))


def _frontier_panel(
    settings: Sequence[list[Record]], cost: Callable[[Record], float | None], name: Callable[[Record], str]
):
    """(series, (record, on the frontier?) of each that is drawn, number not drawn); None for fewer than two models.

    A mark is one setting, or several of equal cost and value.
    """
    settings = [own for own in settings if cost(own[0])]
    direction = better(record for own in settings for record in own)
    if len({model_of(own[0]) for own in settings}) < 2 or not direction:
        return None
    places = []
    for own in settings:
        costs = [each for record in own if (each := cost(record)) is not None]
        places.append((_mean(costs), sum(record.value for record in own) / len(own)))
    best = set(frontier(places, direction))
    every = max(1, -(-len(settings) // MAX_POINTS))  # of too many settings only every so many, and the frontier
    marks: dict[tuple[str, str, bool], list[Mark]] = {}
    printed: dict[str, set[str]] = {}  # model -> what the paper calls it, with guidance and without
    found: list[tuple[Record, bool]] = []
    for index, own in enumerate(settings):
        if index in best or index % every == 0:
            (mark,) = marks_of(own, at_place(places[index][0]))
            mark = dataclasses.replace(mark, text=name(own[0]) if index in best else "")
            marks.setdefault((model_of(own[0]), own[0].provenance, index not in best), []).append(mark)
            if own[0].source is not None:
                printed.setdefault(model_of(own[0]), set()).add(paper_name(own[0]))
            found += [(record, index in best) for record in own]
    series = [
        Series(
            label=_called(model, printed[model]) if origin == "published" else model,
            model=model,
            kind="points",
            provenance=origin,
            marks=tuple(sorted(own, key=lambda mark: mark.x)),
            faint=faint,
        )
        for (model, origin, faint), own in sorted(marks.items(), key=lambda pair: not pair[0][2])
    ]
    corners = [Mark(x=places[index][0], y=places[index][1]) for index in sorted(best, key=lambda index: places[index])]
    line = Series(label="", model="", kind="fit", provenance="fit", marks=_stairs(corners))
    return (line, *series), found, len(settings) - sum(len(own) for own in marks.values())


def _called(model: str, printed: Collection[str]) -> str:
    """The name of a published model: a DiT's by size, patch and block, because some rows print only a decoder."""
    if (block := block_of(model)) or pretty(model) != model:
        return f"{pretty(model)} {block}".strip()
    return min(printed, key=lambda name: (len(name), name))


def _mean(costs: Sequence[float]) -> float:
    """The mean over seeds; equal costs stay equal to the last bit."""
    return costs[0] if min(costs) == max(costs) else math.fsum(costs) / len(costs)


def _stairs(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """The frontier as a staircase: quality stays the same until the next mark's cost is reached."""
    places = []
    for index, mark in enumerate(marks):
        if index:
            places.append(Mark(x=mark.x, y=marks[index - 1].y))
        places.append(Mark(x=mark.x, y=mark.y))
    return tuple(places)


def _trained(record: Record) -> str:
    """`dit-xs-2, 400 steps`."""
    steps = steps_of(record)
    if record.source is not None:
        return paper_name(record)
    return f"{record.system}, {count_text(steps)} steps" if steps else record.system


def _sampled(record: Record) -> str:
    """`dit-xs-2, 25 sampling steps, guidance 1.5`."""
    if record.source is not None:
        return paper_name(record)
    sampling = record.sampling or Sampling()
    words = [record.system, f"{sampling.stage_steps or sampling.steps} sampling steps"]
    guided = guidance_text(record) not in ("-", "none")
    return ", ".join([*words, f"guidance {guidance_text(record)}"] if guided else words)


def _costs(record: Record) -> dict[str, object]:
    return {
        "gflops_per_image": _per_image(record),
        "training_seconds": _training_seconds(record),
        "training_device": getattr(record.environment, "training_device", None),
        "seconds_per_image": _image_seconds(record),
        "sampling_device": getattr(record.environment, "sampling_device", None),
    }


def _per_image(record: Record) -> float | None:
    return above_zero(record.sampling.gflops_per_image) if record.sampling else None


def _training_seconds(record: Record) -> float | None:
    return above_zero(getattr(record.environment, "training_seconds", None))


def _image_seconds(record: Record) -> float | None:
    return above_zero(getattr(record.environment, "sampling_seconds_per_image", None))


def best_size(made: Sequence[Study]) -> Figure | None:
    """`budget`: at several training budgets, quality against Gflops a forward pass, read from the training curves."""
    panels: list[Panel] = []
    rows: list[dict] = []
    for study in made:
        curves = []
        for line in study.lines:
            marks, gflops = marks_of(line.records, training_gflops), line.records[0].gflops
            if len(marks) > 1 and gflops:
                curves.append((line, gflops, [mark.x for mark in marks], [mark.y for mark in marks]))
        budgets = _budgets([(xs[0], xs[-1]) for _, _, xs, _ in curves])
        sign = SIGNS[better(study.records)]
        if not budgets or not sign:
            continue
        series = []
        for budget in budgets:
            read = [
                (line, gflops, value)
                for line, gflops, xs, ys in curves
                if (value := between(xs, ys, budget)) is not None
            ]
            read.sort(key=lambda point: (point[1], point[0].label))
            winner = min(read, key=lambda point: sign * point[2])[0]
            facts = (("budget", f"{_round(budget)} Gflops"),)
            marks = tuple(
                Mark(
                    x=gflops,
                    y=value,
                    text=name_of(line) if line is winner else "",
                    facts=(("model", name_of(line)), *facts, ("read from its curve", f"{value:.4g}")),
                )
                for line, gflops, value in read
            )
            label = f"{_round(budget)} Gflops"
            series.append(Series(label=label, model="", kind="line", provenance="measured", marks=marks))
            rows += [
                {"panel": len(panels) + 1, "budget_gflops": budget, "model": line.model, "system": name_of(line)}
                | {"gflops": gflops, "metric": line.records[0].metric, "n": line.records[0].n, "value": value}
                | {"best": "yes" if line is winner else "no"}
                for line, gflops, value in read
            ]
        panels.append(
            Panel(
                heading=study.group.heading,
                x=Axis(title="Backbone compute", unit="Gflops a forward pass", scale="log"),
                y=quality_axis(study.records),
                series=tuple(series),
                note="; ".join(
                    [
                        *study.notes,
                        "a line a training budget; its best model is named; values read between the points of the training "
                        "curves, straight in logarithms, never beyond them",
                    ]
                ),
            )
        )
    if not panels:
        return None
    return Figure(name="budget", title="The best size at a training budget", panels=tuple(panels), rows=tuple(rows))


def _round(budget: float) -> str:
    """Three significant digits."""
    return f"{float(f'{budget:.3g}'):,.0f}" if 100 <= budget < 1e7 else f"{budget:.3g}"


def _budgets(ranges: Sequence[tuple[float, float]]) -> list[float]:
    """Budgets, evenly spaced in logarithm, at which at least two curves can be read."""
    if len(ranges) < 2:
        return []
    low = sorted(start for start, _ in ranges)[1]
    high = sorted((end for _, end in ranges), reverse=True)[1]
    if not 0 < low < high:
        return []
    spaced = [low * (high / low) ** (place / (BUDGETS - 1)) for place in range(BUDGETS)]
    spaced[-1] = high
    return [budget for budget in spaced if sum(start <= budget <= end for start, end in ranges) > 1]
