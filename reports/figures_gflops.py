"""Quality against the Gflops of a forward pass: Figures 2 and 8, and the predictions of the scaling law."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from reports.charts import Axis, Figure, Mark, Panel, Series, model_of
from reports.figures_study import (
    DIT,
    SYSTEMS,
    Study,
    at_one_length,
    best_at_usual_length,
    cost_columns,
    cost_or_none,
    dit_title,
    figure_or_none,
    mark_rows,
    recipes_note,
    records_of,
    single_mark_series,
)
from reports.fits import FEWEST, PowerLaw, correlation, power_law
from reports.means import is_distinguishable
from reports.points import (
    BEYOND,
    SIGNS,
    Line,
    RecordIndex,
    bars_note,
    better,
    comparable_groups,
    constant_x,
    figure_row,
    group_by_settings,
    marks_of,
    quality,
    quality_axis,
)
from reports.texts import quantity_text
from results.experiments import group_of
from results.records import Record, Sampling

NEAR = 4.0  # predictions outside [lowest / 4, highest * 4] of a law's points are only in the CSV file
CURVE_PLACES = 40  # points of the curve of a fitted law
MAX_BARS = 20  # systems in a panel of bars, the best ones
MAX_BEND_P = 0.05  # p-value of a bend below which a law's lack of fit is stated
DITS = "DiTs"  # what a law is fitted to: DiTs with adaLN-Zero, or else models of every kind


def compute_efficiency(all_studies: Sequence[Study], index: RecordIndex, published: Sequence[Record]) -> Figure | None:
    """Figure 2: quality against Gflops with parameters as areas; and each system's best value with its Gflops."""
    parts: list[tuple[Panel, list[dict]]] = []  # (panel, its rows of data)
    for study in all_studies:
        study = study.without_published_blocks()
        marked, note = at_one_length(study)
        marked = [(line, mark) for line, mark in marked if mark.size]  # those whose number of parameters is known
        if len(marked) < 2:
            continue
        series = tuple(
            single_mark_series(line, dataclasses.replace(mark, text=_with_params(mark)), "bubbles")
            for line, mark in marked
        )
        panel = Panel(
            heading=study.group.heading,
            title="Quality against Gflops",
            x=Axis(title="Backbone compute", unit="Gflops a forward pass", scale="log"),
            y=quality_axis(records_of(marked)),
            series=series,
            note="; ".join(text for text in (*study.notes, note, "area: parameters", *bars_note(series)) if text),
            starts_row=True,
        )
        parts.append((panel, mark_rows(0, marked, {"shows": "bubble"})))  # 0: panels are numbered at the end
    for panel, bars in _system_bars(index, published):
        # After the panels of the same records, or at the end.
        same_records = [place for place, (other, _) in enumerate(parts) if other.heading == panel.heading]
        rows = [
            figure_row(record, 0, name, cost_columns(record) | {"shows": "bar"})
            for name, members in bars
            for record in members
        ]
        parts.insert(same_records[-1] + 1 if same_records else len(parts), (panel, rows))
    if not parts:
        return None
    rows = [row | {"panel": number} for number, (_, panel_rows) in enumerate(parts, start=1) for row in panel_rows]
    panels = [panel for panel, _ in parts]
    return figure_or_none("figure-2", "Quality and compute", panels, rows, columns=3)


def _system_bars(
    index: RecordIndex, published: Sequence[Record]
) -> Iterator[tuple[Panel, list[tuple[str, list[Record]]]]]:
    """Yields (panel, [(name, records) of each bar]) for each group of comparable records of two systems or more.

    A bar is the best setting of a system, a mean over its seeds, with its Gflops as size. Of single records the more a
    system has, the better its luckiest. Groups whose metric has no known direction are left out.
    """
    printed = [r for r in published if r.metric == "fid" and r.table in SYSTEMS and r.gflops]
    groups, _ = comparable_groups(index.quality, printed)
    for group in groups:
        best: dict[tuple, list[Record]] = {}  # (provenance, name) -> records that differ in seeds
        records = [
            record for record in quality(group.records) if cost_or_none(record.gflops) and abs(record.value) < BEYOND
        ]
        sign = SIGNS[better(records)]
        if not sign:  # which value is best is not known
            continue
        means: dict[tuple, float] = {}  # (provenance, name) -> sign * mean
        for unsorted in group_by_settings(records, (), Sampling):
            members = sorted(unsorted, key=lambda record: record.id)
            key = (members[0].provenance, members[0].row if members[0].source else members[0].system)
            mean = sign * group_of(members).value
            if key not in best or (mean, members[0].id) < (means[key], best[key][0].id):
                best[key], means[key] = members, mean
        if len(best) < 2:
            continue
        ranked = sorted(best.items(), key=lambda pair: (means[pair[0]], pair[0]))[:MAX_BARS]
        leader = group_of(ranked[0][1])
        tied = [
            name for (_, name), members in ranked[1:] if not is_distinguishable(leader, group_of(members), len(best))
        ]
        has_published = any(origin == "published" for (origin, _), _ in ranked)
        named = [
            (f"{name} (measured)" if has_published and origin == "measured" else name, members)
            for (origin, name), members in ranked
        ]
        series = tuple(
            Series(
                label=name,
                model=model_of(members[0]),
                kind="bars",
                provenance=members[0].provenance,
                marks=tuple(
                    dataclasses.replace(mark, text=name, size=members[0].gflops)
                    for mark in marks_of(members, constant_x(float(place)))
                ),
            )
            for place, (name, members) in enumerate(named)
        )
        axis = quality_axis([record for _, members in named for record in members])
        yield (
            Panel(
                heading=group.heading,
                title="Systems by quality, and their Gflops",
                x=Axis(title="System", scale="names"),
                y=dataclasses.replace(axis, scale="linear"),
                series=series,
                note="; ".join(
                    [
                        "each system's best setting; bubbles: Gflops a forward pass, without classifier and decoder",
                        *([f"not distinguishable from the first: {', '.join(tied)}"] if tied else []),
                        *bars_note(series),
                    ]
                ),
            ),
            named,
        )


def correlation_with_gflops(all_studies: Sequence[Study]) -> Figure | None:
    """Figure 8: quality against Gflops (log), Pearson's correlation, and a power law with its interval."""
    panels: list[Panel] = []
    rows: list[dict] = []
    for study in all_studies:
        study = study.without_published_blocks()
        marked, note = at_one_length(study)
        if len(marked) < 2:
            continue
        best = best_at_usual_length(marked)
        pearson = correlation([math.log10(mark.x) for _, mark in best], [mark.y for _, mark in best])
        series = [single_mark_series(line, mark, "points") for line, mark in marked]
        notes = [*study.notes, *([note] if note else []), *bars_note(series)]
        if pearson is not None:
            interval = f" [{pearson.low:z.2f}, {pearson.high:z.2f}]" if pearson.low is not None else ""
            notes.append(f"correlation with log Gflops {pearson.r:z.2f}{interval} ({pearson.n} models)")
            notes += recipes_note(marked)
        law, family = law_of(best)
        if law is not None:
            series = [*law_series(law), *series]
            notes.append(law_note(law, family))
        else:
            notes += missing_law_note(best)
        panels.append(
            Panel(
                heading=study.group.heading,
                x=Axis(title="Backbone compute", unit="Gflops a forward pass", scale="log"),
                y=quality_axis(records_of(marked)),
                series=tuple(series),
                note="; ".join(notes),
            )
        )
        rows += mark_rows(len(panels), marked, {})
    return figure_or_none("figure-8", "Gflops and quality", panels, rows)


def scaling_law(all_studies: Sequence[Study], dits: Callable[[Record], dict[str, float]]) -> Figure | None:
    """Beyond the paper: the law of Figure 8 on logarithmic axes, and its predictions for DiTs that were not trained.

    dits: function from a record to name -> Gflops of every DiT at the input size of its protocol. Those that have a line in
    the panel of the record are not predicted.
    """
    panels: list[Panel] = []
    rows: list[dict] = []
    for study in all_studies:
        study = study.without_published_blocks()
        marked, note = at_one_length(study)
        best = best_at_usual_length(marked)
        law, family = law_of(best)
        if law is None or family != DITS:
            continue
        trained = {line.model for line in study.lines}
        wanted = {name: cost for name, cost in dits(study.group.representative).items() if name not in trained}
        if not wanted:
            continue
        refused = [] if law.extrapolates else [name for name, cost in wanted.items() if not law.reaches(cost)]
        wanted = {name: cost for name, cost in wanted.items() if name not in refused}
        axis = dataclasses.replace(quality_axis(records_of(marked)), scale="log")
        # The names of predictions are written as those of the other models of the panel.
        name_text = dit_title if study.group.representative.provenance == "published" else str
        far = any(not law.reaches(cost) for cost in wanted.values())
        notes = [*study.notes, note, law_note(law, family), *recipes_note(marked)]
        if wanted:
            notes.append("crosses: predictions for backbones not trained, with 95 % prediction intervals")
        if far:
            notes.append("extrapolated ones lie outside the range of the points, where the law rests on its floor")
        if refused:
            notes.append(
                f"{len(refused)} outside the range of the points are not predicted, because the points do not show the floor "
                "of the law"
            )
        panels.append(
            Panel(
                heading=study.group.heading,
                x=Axis(title="Backbone compute", unit="Gflops a forward pass", scale="log"),
                y=axis,
                series=(
                    *law_series(law),
                    *(single_mark_series(*pair, "points") for pair in best),
                    *_predictions(law, wanted, name_text),
                ),
                note="; ".join(notes),
            )
        )
        rows += mark_rows(len(panels), best, {"shows": "mark"})
        rows += _prediction_rows(len(panels), law, wanted, best[0][0].records[0])
    return figure_or_none("scaling-law", "What the scaling law predicts", panels, rows)


def law_of(marked: Sequence[tuple[Line, Mark]]) -> tuple[PowerLaw | None, str]:
    """(power law of quality in Gflops, models that it is fitted to).

    marked: a (line, mark) for each model. The models are DITS, those with adaLN-Zero, if they are enough for a fit, else
    "models of every kind". The law is None if there are too few models.
    """
    dits = [mark for line, mark in marked if (dit := DIT.fullmatch(line.model)) and not dit["block"]]
    law, family = power_law([mark.x for mark in dits], [mark.y for mark in dits]), DITS
    if law is None:
        law, family = power_law([mark.x for _, mark in marked], [mark.y for _, mark in marked]), "models of every kind"
    return law, family


def law_series(law: PowerLaw, label: str = "") -> list[Series]:
    """[band of the law's 95 % interval, the law as a curve].

    Both reach over the range of the law's points, widened by 6 % at both ends in logarithms. label: of the curve.
    """
    ratio = (law.highest / law.lowest) ** 0.06
    low, high = law.lowest / ratio, law.highest * ratio
    xs = [low * (high / low) ** (place / (CURVE_PLACES - 1)) for place in range(CURVE_PLACES)]
    marks = [Mark(x=x, y=law.at(x), low=law.interval(x)[0], high=law.interval(x)[1]) for x in xs]
    bare = tuple(dataclasses.replace(mark, low=None, high=None) for mark in marks)
    return [
        Series(label="", model="", kind="band", provenance="fit", marks=tuple(marks)),
        Series(label=label, model="", kind="fit", provenance="fit", marks=bare),
    ]


def law_note(law: PowerLaw, family: str) -> str:
    """The note on the formula of a law and on its fit. family: the models that it is fitted to, as `law_of` returns them."""
    floor = f"{law.floor:.3g} + " if law.floor else ""
    words = [
        f"dashed: {floor}{law.factor:.3g} Gflops^{law.exponent:z.2f} [{law.low:z.2f}, {law.high:z.2f}], least squares in "
        f"logarithms over {law.n} {family}, which scatter by {100 * law.scatter:.2g} %; band: 95 % interval of the law"
    ]
    if law.bend is not None and law.bend < MAX_BEND_P:
        words.append(f"the points bend away from the law (p = {law.bend:.2g}): it and its intervals are doubtful")
    if law.left_out:
        words.append(f"{law.left_out} points at or below 0 have no logarithm and are not in the fit")
    return "; ".join(words)


def missing_law_note(marked: Sequence[tuple[Line, Mark]]) -> list[str]:
    """[why there is no law], where points without a logarithm leave too few of enough; else []."""
    lost = sum(mark.x <= 0 or mark.y <= 0 for _, mark in marked)
    if not lost or len(marked) < FEWEST:
        return []
    return [f"no power law: {lost} of {len(marked)} points are at or below 0 and have no logarithm"]


def _predictions(law: PowerLaw, wanted: dict[str, float], name_text: Callable[[str], str]) -> list[Series]:
    """A series of one mark, with its prediction interval, for each backbone (name -> Gflops) near the law's points."""
    series = []
    near = {name: cost for name, cost in wanted.items() if law.lowest / NEAR <= cost <= law.highest * NEAR}
    for name, cost in sorted(near.items(), key=lambda pair: pair[1]):
        low, high = law.prediction(cost)
        text = name_text(name) if law.reaches(cost) else f"{name_text(name)} (extrapolated)"
        facts = (("predicted", f"{law.at(cost):.4g} [{low:.4g}, {high:.4g}]"), ("Gflops", quantity_text(cost)))
        mark = Mark(x=cost, y=law.at(cost), low=low, high=high, text=text, facts=(("backbone", name), *facts))
        series.append(Series(label=name, model="", kind="points", provenance="fit", marks=(mark,)))
    return series


def _prediction_rows(panel: int, law: PowerLaw, wanted: dict[str, float], peer: Record) -> list[dict]:
    """The rows of data of all predictions, in the columns of the other rows.

    panel: number from 1. wanted: name -> Gflops. peer: any record of the panel; all of them have its metric and N.
    """
    # None in every column, because a prediction has no record.
    empty = dict.fromkeys(figure_row(peer, panel, "", cost_columns(peer) | {"shows": ""}))
    return [
        empty
        | {"panel": panel, "line": name, "provenance": "fit", "model": name, "gflops": cost, "metric": peer.metric}
        | {"n": peer.n, "value": law.at(cost), "low": law.prediction(cost)[0], "high": law.prediction(cost)[1]}
        | {"shows": "prediction" if law.reaches(cost) else "extrapolation"}
        for name, cost in sorted(wanted.items(), key=lambda pair: pair[1])
    ]


def _with_params(mark: Mark) -> str:
    """The text of a mark with its size, the number of parameters: `DiT-S/2, 33M`; without a size only the text."""
    if not mark.size:
        return mark.text
    millions = mark.size / 1e6
    return f"{mark.text}, {millions:.3g}M" if millions < 1 else f"{mark.text}, {millions:.1f}M".replace(".0M", "M")
