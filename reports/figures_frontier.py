"""Beyond the paper: the Pareto frontier of quality and compute, and the best size at a training budget."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from reports.charts import Axis, Figure, Mark, Panel, Series, model_of
from reports.figures_sampling import FIGURE_10_SOURCE
from reports.figures_study import (
    DIT,
    Study,
    block_of,
    cost_columns,
    cost_or_none,
    dit_title,
    name_of,
    steps_of,
    training_gflops,
)
from reports.fits import frontier, interpolate
from reports.means import is_distinguishable, sampling_half_width
from reports.points import (
    SIGNS,
    Line,
    RecordIndex,
    bars_note,
    better,
    comparable_groups,
    constant_x,
    figure_row,
    group_by_settings,
    left_out_note,
    marks_of,
    paper_name,
    quality,
    quality_axis,
)
from reports.texts import count_text, guidance_text, sampling_steps_text, states_guidance
from results.experiments import Group as SeedGroup
from results.experiments import group_of
from results.records import Record, Sampling

MAX_POINTS = 400  # settings drawn in a panel
BUDGETS = 5  # number of training budgets in a panel
NOT_RECORDED = "energy is not in the records"


def pareto(index: RecordIndex, published: Sequence[Record]) -> Figure | None:
    """`pareto`: quality against the cost of training and of an image, and the results that no other beats in both."""
    panels: list[Panel] = []
    rows: list[dict] = []
    # The points of Section 5.2 belong to Figure 10.
    printed = [record for record in published if record.metric == "fid" and record.table != FIGURE_10_SOURCE]
    groups, more = comparable_groups(index.quality, printed)
    for group in groups:
        records = quality(group.records)
        if not records:
            continue
        first = len(panels)  # index of the group's first panel
        settings = _groups_by_seed(records)
        training = _timed(records, _training_seconds, "training_device")
        sampling = _timed(records, _image_seconds, "sampling_device")
        # Of each panel: title and unit of the x axis, groups of records, function from a record to its x, function from a
        # record to its label, number of other devices.
        for title, unit, kept, cost, label, others in (
            ("Training compute", "Gflops", settings, training_gflops, _training_label, 0),
            ("Sampling compute", "Gflops per image, decoder not counted", settings, _image_gflops, _sampling_label, 0),
            ("Training time", f"seconds on {training.device}", _groups_by_seed(training.records), _training_seconds, _training_label, training.others),
            ("Sampling time", f"seconds an image on {sampling.device}", _groups_by_seed(sampling.records), _image_seconds, _sampling_label, sampling.others),
        ):  # fmt: skip
            found = _frontier_series(kept, cost, label)
            if found is None:
                continue
            series, drawn, omitted = found
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
                            left_out_note(0, more),
                            NOT_RECORDED,
                        )
                        if text
                    ),
                    starts_row=len(panels) == first,
                )
            )
            rows += [
                figure_row(record, len(panels), label(record), cost_columns(record) | _costs(record))
                | {"frontier": "yes" if on_frontier else "no"}
                for record, on_frontier in drawn
            ]
    if not panels:
        return None
    return Figure(name="pareto", title="The frontier of quality and compute", panels=tuple(panels), rows=tuple(rows))


class _Timed(NamedTuple):
    """The records that were timed on one device. Times on different devices cannot be compared."""

    device: str  # "": no record states a time
    records: list[Record]
    others: int  # number of other devices with times


def _timed(records: Sequence[Record], seconds: Callable[[Record], float | None], device: str) -> _Timed:
    """The records that were timed on the device on which most models were.

    seconds: function from a record to its time. device: name of the field of `Environment` that states the device.
    """
    by_device: dict[str, list[Record]] = {}
    for record in records:
        if (name := getattr(record.environment, device, None)) and seconds(record):
            by_device.setdefault(name, []).append(record)
    models = {name: len({model_of(record) for record in timed}) for name, timed in by_device.items()}
    usual = max(by_device, key=lambda name: (models[name], len(by_device[name]), name), default="")
    return _Timed(usual, by_device.get(usual, []), max(len(by_device) - 1, 0))


def _groups_by_seed(records: Sequence[Record]) -> list[list[Record]]:
    """Groups of records of one metric that differ only in seeds, in a fixed order."""
    settings = [sorted(members, key=lambda record: record.id) for members in group_by_settings(records, (), Sampling)]
    return sorted(settings, key=lambda members: (model_of(members[0]), members[0].provenance, members[0].id))


def _frontier_series(
    settings: Sequence[list[Record]], cost: Callable[[Record], float | None], label: Callable[[Record], str]
) -> tuple[tuple[Series, ...], list[tuple[Record, bool]], int] | None:
    """(series, [(drawn record, whether it is on the frontier)], number of settings not drawn).

    None for fewer than two models, or if it is not known which values are better.
    settings: groups of records that differ only in seeds; each is one mark. cost: function from a record to the x of its
    mark; None: not known. label: function from a record to the text of its mark, if it is on the frontier.
    """
    settings = [members for members in settings if cost(members[0])]  # seeds have the same Gflops, or are all timed
    direction = better(record for members in settings for record in members)
    if len({model_of(members[0]) for members in settings}) < 2 or not direction:
        return None
    places = []  # (cost, value) of each setting
    for members in settings:
        costs = [known for record in members if (known := cost(record)) is not None]
        places.append((_mean(costs), group_of(members).value))
    best = set(frontier(places, direction))
    # Of too many settings one in `every` is drawn, besides the frontier.
    every = max(1, -(-len(settings) // MAX_POINTS))
    marks: dict[tuple[str, str, bool], list[Mark]] = {}  # (model, provenance, not on the frontier) -> marks
    printed: dict[str, set[str]] = {}  # model -> what the paper calls it, with guidance and without
    drawn: list[tuple[Record, bool]] = []
    for index, members in enumerate(settings):
        if index in best or index % every == 0:
            first = members[0]
            (mark,) = marks_of(members, constant_x(places[index][0]))
            mark = dataclasses.replace(mark, text=label(first) if index in best else "")
            marks.setdefault((model_of(first), first.provenance, index not in best), []).append(mark)
            if first.source is not None:
                printed.setdefault(model_of(first), set()).add(paper_name(first))
            drawn += [(record, index in best) for record in members]
    series = [
        Series(
            label=_published_label(model, printed[model]) if origin == "published" else model,
            model=model,
            kind="points",
            provenance=origin,
            marks=tuple(sorted(marks_of_series, key=lambda mark: mark.x)),
            faint=faint,
        )
        # Faint ones first, behind the others.
        for (model, origin, faint), marks_of_series in sorted(marks.items(), key=lambda pair: not pair[0][2])
    ]
    corners = [Mark(x=places[index][0], y=places[index][1]) for index in sorted(best, key=lambda index: places[index])]
    line = Series(label="", model="", kind="fit", provenance="fit", marks=_stairs(corners))
    return (line, *series), drawn, len(settings) - sum(map(len, marks.values()))


def _published_label(model: str, printed: Collection[str]) -> str:
    """The label of a published model: of a DiT its size, patch and block, of others the shortest of the printed names.

    Some rows print only the name of a decoder, so a DiT's printed names are not used.
    """
    if DIT.fullmatch(model):
        return f"{dit_title(model)} {block_of(model)}".strip()
    return min(printed, key=lambda name: (len(name), name))


def _mean(costs: Sequence[float]) -> float:
    """The mean; of equal costs exactly this cost, without rounding."""
    return costs[0] if min(costs) == max(costs) else math.fsum(costs) / len(costs)


def _stairs(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """The frontier as a staircase: quality stays the same until the next mark's cost is reached."""
    places = []
    for index, mark in enumerate(marks):
        if index:
            places.append(Mark(x=mark.x, y=marks[index - 1].y))
        places.append(Mark(x=mark.x, y=mark.y))
    return tuple(places)


def _training_label(record: Record) -> str:
    """The text of a mark over training cost: `dit-xs-2, 400 steps`, or the printed name."""
    steps = steps_of(record)
    if record.source is not None:
        return paper_name(record)
    return f"{record.system}, {count_text(steps)} steps" if steps else record.system


def _sampling_label(record: Record) -> str:
    """The text of a mark over sampling cost: `dit-xs-2, 25 sampling steps, guidance 1.5`, or the printed name."""
    if record.source is not None:
        return paper_name(record)
    words = [record.system]
    if steps := sampling_steps_text(record):
        words.append(f"{steps} sampling steps")
    return ", ".join([*words, f"guidance {guidance_text(record)}"] if states_guidance(record) else words)


def _costs(record: Record) -> dict[str, object]:
    """Column -> value of the figure's data on the cost of sampling and the times."""
    return {
        "gflops_per_image": _image_gflops(record),
        "training_seconds": _training_seconds(record),
        "training_device": getattr(record.environment, "training_device", None),
        "seconds_per_image": _image_seconds(record),
        "sampling_device": getattr(record.environment, "sampling_device", None),
    }


def _image_gflops(record: Record) -> float | None:
    return cost_or_none(record.sampling.gflops_per_image) if record.sampling else None


def _training_seconds(record: Record) -> float | None:
    return cost_or_none(getattr(record.environment, "training_seconds", None))


def _image_seconds(record: Record) -> float | None:
    return cost_or_none(getattr(record.environment, "sampling_seconds_per_image", None))


def best_size(all_studies: Sequence[Study]) -> Figure | None:
    """`budget`: at several training budgets, quality against Gflops a forward pass, read from the training curves."""
    panels: list[Panel] = []
    rows: list[dict] = []
    for study in all_studies:
        curves = []  # (line, Gflops per forward pass, training Gflops of its marks, values of its marks)
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
            points = [  # (line, Gflops per forward pass, value at this budget)
                (line, gflops, value)
                for line, gflops, xs, ys in curves
                if (value := interpolate(xs, ys, budget)) is not None
            ]
            points.sort(key=lambda point: (point[1], point[0].label))
            leader = min(points, key=lambda point: sign * point[2])[0]
            # lines that would not lose to the leader again, itself among them
            leading = {line.label for line, _, _ in points if not _loses(line, leader, budget, len(points))}
            winner = leader if leading == {leader.label} else None
            budget_text = f"{_budget_text(budget)} Gflops"
            marks = tuple(
                Mark(
                    x=gflops,
                    y=value,
                    text=name_of(line) if line is winner else "",
                    facts=(("model", name_of(line)), ("budget", budget_text), ("read from its curve", f"{value:.4g}")),
                )
                for line, gflops, value in points
            )
            # "measured", for a solid line, also where some curves are the paper's: a published line would be dotted.
            series.append(Series(label=budget_text, model="", kind="line", provenance="measured", marks=marks))
            rows += [
                {"panel": len(panels) + 1, "budget_gflops": budget, "model": line.model, "system": name_of(line)}
                | {"gflops": gflops, "metric": line.records[0].metric, "n": line.records[0].n, "value": value}
                | {"best": "yes" if line is winner else "not distinguishable" if line.label in leading else "no"}
                for line, gflops, value in points
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
                        "a line a training budget; its best model is named where it would win again against every other "
                        "(not distinguishable else); values read between the points of the training "
                        "curves, straight in logarithms, never beyond them",
                    ]
                ),
            )
        )
    if not panels:
        return None
    return Figure(name="budget", title="The best size at a training budget", panels=tuple(panels), rows=tuple(rows))


def _loses(line: Line, leader: Line, budget: float, systems: int) -> bool:
    """Whether a line, one of `systems`, would lose to the leader at this budget again; False for the leader itself."""
    if line is leader:
        return False
    best, other = _group_at(leader, budget), _group_at(line, budget)
    return best is not None and other is not None and is_distinguishable(best, other, systems)


def _group_at(line: Line, budget: float) -> SeedGroup | None:
    """Records at a budget between those of the line, one for each training seed whose curve reaches it; None: no such seed.

    Value and interval are read from the seed's curve, as the figure reads those of the mean.
    """
    by_seed: dict[int | None, dict[float, list[Record]]] = {}
    for record in line.records:
        if (cost := training_gflops(record)) is not None:
            seed = record.training.seed if record.training else None
            by_seed.setdefault(seed, {}).setdefault(cost, []).append(record)
    found = []
    for curve in by_seed.values():
        costs = sorted(curve)
        groups = [group_of(curve[cost]) for cost in costs]
        values = [group.value for group in groups]
        if (value := interpolate(costs, values, budget)) is None:
            continue
        ends: list[float | None] = []
        for sign, upward in ((-1, False), (1, True)):
            halves = [sampling_half_width(group, upward=upward) for group in groups]
            known = [value + sign * half for value, half in zip(values, halves, strict=True) if half is not None]
            ends.append(interpolate(costs, known, budget) if len(known) == len(values) else None)
        low, high = ends if None not in ends else (None, None)
        first = curve[costs[0]][0]
        found.append(dataclasses.replace(first, value=value, low=low, high=high))
    return group_of(found) if found else None


def _budget_text(budget: float) -> str:
    """The budget as text, with three significant digits."""
    return f"{float(f'{budget:.3g}'):,.0f}" if 100 <= budget < 1e7 else f"{budget:.3g}"


def _budgets(ranges: Sequence[tuple[float, float]]) -> list[float]:
    """Budgets, evenly spaced in logarithms, that lie in the ranges of at least two curves; [] if there are none.

    ranges: (lowest, highest) training Gflops of each curve.
    """
    if len(ranges) < 2:
        return []
    # Below the second lowest start and above the second highest end there is at most one curve.
    low = sorted(start for start, _ in ranges)[1]
    high = sorted((end for _, end in ranges), reverse=True)[1]
    if not 0 < low < high:
        return []
    spaced = [low * (high / low) ** (place / (BUDGETS - 1)) for place in range(BUDGETS)]
    spaced[-1] = high  # exactly: rounded up, it would lie beyond the curve that ends there
    return [budget for budget in spaced if sum(start <= budget <= end for start, end in ranges) > 1]
