"""The figures of a report, as data: which records are drawn, where, under which name."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from reports.charts import Axis, Figure, Panel, Series
from reports.columns import metric_title
from reports.points import (
    ALONG_SAMPLING,
    QUALITY_METRICS,
    Group,
    better,
    by_metric,
    comparable_groups,
    data_row,
    left_out,
    lines_of,
    longest_trained,
    marks_of,
)
from results import paper
from results.records import Record, Sampling

FIGURE_10_SOURCE = "Section 5.2"
FEW_LINES = 6  # up to here there is room for a text at every mark of a line


def figures(records: Iterable[Record], folders: Sequence[Path] = ()) -> tuple[Figure, ...]:
    """Every figure that the records have something to show in, in the order of their names in the paper.

    records: measured and published ones. folders: where the record files lay (a run's log and samples are beside them).
    """
    every = tuple(records)
    measured = [record for record in every if record.provenance == "measured"]
    published = [record for record in every if record.provenance == "published"]
    made = [sampling_compute(measured, published)]
    return tuple(figure for figure in made if figure is not None)


def sampling_compute(measured: Sequence[Record], published: Sequence[Record]) -> Figure | None:
    """Figure 10: Gflops per image (log) against quality, a line a model; with the decoder in a panel of its own."""

    def usable(record: Record) -> bool:
        return (
            record.metric in QUALITY_METRICS and record.sampling is not None and bool(record.sampling.gflops_per_image)
        )

    printed = [record for record in published if record.source.table == FIGURE_10_SOURCE]
    groups, more = comparable_groups(filter(usable, measured), printed)
    ours = [group for group in groups if group.speaker.provenance == "measured"]
    panels: list[Panel] = []
    rows: list[dict[str, object]] = []
    for group in ours or groups:  # the two points of the paper's text say little beside a curve of one's own
        for members in by_metric(group.records, QUALITY_METRICS).values():
            _sampling_panels(group, members, panels, rows, more)
    if not panels:
        return None
    return Figure(
        name="figure-10", title="Sampling compute against sample quality", panels=tuple(panels), rows=tuple(rows)
    )


def _sampling_panels(group: Group, records: list[Record], panels: list[Panel], rows: list[dict], more: int) -> None:
    lines, omitted = lines_of(records, ALONG_SAMPLING, Sampling)
    longest = len(lines) > FEW_LINES
    if longest:  # a line for each system and setting, not one more for each training length
        lines, omitted = lines_of(longest_trained(records), ALONG_SAMPLING, Sampling)
        longest = sum(len(line.records) for line in lines) < len(records) and not omitted
    choices = [("decoder not counted", _sampling_gflops)]
    if any(record.sampling.decoder_gflops for line in lines for record in line.records):
        choices.append(("decoder counted", _decoded_gflops))
    few = len(lines) <= FEW_LINES
    for title, gflops in choices:
        series = tuple(
            Series(
                label=line.label,
                model=line.model,
                kind="line",
                provenance=line.provenance,
                marks=marks_of(line.records, gflops, _steps_text if few else lambda record: ""),
            )
            for line in lines
        )
        notes = ["numbers at the marks: sampling steps"] if few else []
        notes += [_bars_note(series)] if _bars_note(series) else []
        notes += ["the longest training of each system"] if longest else []
        notes += [left_out(omitted, more)] if omitted or more else []
        panels.append(
            Panel(
                heading=group.heading,
                title=title if len(choices) > 1 else "",
                x=Axis(title="Sampling compute", unit=f"Gflops per image, {title}", scale="log"),
                y=quality_axis(records),
                series=series,
                note="; ".join(notes),
            )
        )
    for line in lines:
        for record in line.records:
            places = {name.replace(" ", "_"): gflops(record) for name, gflops in _GFLOPS.items()}
            rows.append(data_row(record, len(panels) - len(choices) + 1, line.label, places))


def quality_axis(records: Sequence[Record]) -> Axis:
    """The axis of a metric: logarithmic where its values are far apart."""
    first = records[0]
    mode = (first.evaluation.mode if first.evaluation else None) or ""
    features = first.evaluation.features if first.evaluation else None
    title = metric_title(first.metric, first.n, mode, features).rstrip("\u2191\u2193")
    values = [record.value for record in records]
    wide = min(values) > 0 and max(values) > 8 * min(values)
    return Axis(title=title, scale="log" if wide else "linear", better=better(first.metric))


def _bars_note(series: Sequence[Series]) -> str:
    marks = [mark for each in series for mark in each.marks if mark.low is not None]
    if any(len(mark.record_ids) > 1 for mark in marks):
        return "marks: means over seeds, bars: lowest and highest seed"
    return "bars: 95 % intervals" if marks else ""


def _sampling_gflops(record: Record) -> float:
    return record.sampling.gflops_per_image


def _decoded_gflops(record: Record) -> float | None:
    """None where there is a decoder whose cost is not known."""
    sampling = record.sampling
    if sampling.decoder is not None and sampling.decoder_gflops is None:
        return None
    return sampling.gflops_per_image + (sampling.decoder_gflops or 0.0)


_GFLOPS = {"gflops per image": _sampling_gflops, "gflops per image with decoder": _decoded_gflops}


def _steps_text(record: Record) -> str:
    sampling = record.sampling
    return sampling.stage_steps or ("" if sampling.steps is None else str(sampling.steps))


def published_records(protocols: Iterable[str] | None = None) -> list[Record]:
    """The paper's numbers; of the protocols named, if any."""
    wanted = None if protocols is None else set(protocols)
    return [record for record in paper.records() if wanted is None or record.protocol in wanted]
