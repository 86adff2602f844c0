"""Printed and measured values of the same experiment, side by side."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from reports.rows import Cell, Row
from reports.sections import DEVIATION_PARTS, Section, make_line
from reports.texts import METADATA, count_text, key_text, metric_title, row_metadata, states_guidance
from results.records import Record, comparable_key

REMARK = (
    "Ours with the 95 % interval over the draw of the samples, which does not cover training again. Settings without a "
    "footnote agree with the paper or are not stated there."
)
# Fields (part of the record, name) that `_is_same_experiment` compares as they are, if the published record states them.
_EXPERIMENT = (("training", "steps"), ("training", "batch"), ("sampling", "sampler"), ("sampling", "steps"))


class Pair(NamedTuple):
    """A published row and a measured row of the same experiment."""

    published: Row
    measured: Row

    @property
    def metrics(self) -> list[tuple[tuple[str, str], tuple[str, str]]]:
        """The metrics that both rows have, as ((metric, mode) of the published row, (metric, mode) of the measured row).

        In the order of the published row. If the measured row has several modes of a metric, the first by name is taken.
        """
        matches: list[tuple[tuple[str, str], tuple[str, str]]] = []
        for key in self.published.records:
            modes = sorted(mode for metric, mode in self.measured.records if metric == key[0])
            if modes:
                matches.append((key, (key[0], modes[0])))
        return matches

    def deviation(self, published: tuple[str, str], measured: tuple[str, str]) -> float | None:
        """Deviation of the measured value from the printed one, in % of the printed one; None if the printed value is 0.

        published, measured: a pair of `metrics`, the (metric, mode) in the published and in the measured row.
        """
        printed = self.published.records[published].value
        return 100 * (self.measured.records[measured].value - printed) / printed if printed else None


def may_share(published: Record, record: Record) -> bool:
    """Whether a record may join a published table: its comparable key agrees in everything that the paper states.

    The paper names its suite, but not the hashes of the feature network and the reference.
    """
    keys = zip(comparable_key(published), comparable_key(record), strict=True)
    return all(stated is None or stated == measured for stated, measured in keys)


def matching_pairs(published: Iterable[Row], measured: Iterable[Row]) -> list[Pair]:
    """A pair for each measured row that has exactly one published row of the same experiment.

    published: may contain measured rows too, which are passed over.
    """
    published_rows = [row for row in published if row.is_published]
    pairs = []
    for row in measured:
        twins = [other for other in published_rows if _is_same_experiment(other.representative, row.representative)]
        if len(twins) == 1:
            pairs.append(Pair(twins[0], row))
    return pairs


def _is_same_experiment(published: Record, record: Record) -> bool:
    """Whether backbone, comparable key, training steps and batch, sampler, sampling steps, guidance and decoder agree.

    What the paper does not state agrees. What `record` does not state, such as the training of released weights, agrees if
    both have the same system name. Two exceptions: a backbone must be stated, and guidance that is not stated counts as no
    guidance, on either side.
    """
    if record.backbone is None or record.backbone != published.backbone or not may_share(published, record):
        return False
    is_same_system = record.system == published.system
    for part, name in _EXPERIMENT:
        printed, found = _stated(published, part, name), _stated(record, part, name)
        if printed is not None and printed != found and not (found is None and is_same_system):
            return False
    if published.sampling is None:  # the paper describes another paper's system by its name
        return is_same_system
    if guidance_scale(published) != guidance_scale(record) or has_guidance_interval(record):
        return False
    decoder = published.sampling.decoder
    found_decoder = record.sampling.decoder if record.sampling else None
    return decoder is None or decoder == found_decoder or (found_decoder is None and is_same_system)


def _stated(record: Record, part: str, name: str) -> Any:
    """The field `name` of a part of a record, such as "steps" of "training"; None if the record does not state it."""
    return getattr(getattr(record, part), name, None)


def guidance_scale(record: Record) -> float | None:
    """The guidance scale; None without guidance, or if it is not stated."""
    if record.sampling is None or not states_guidance(record):
        return None
    return record.sampling.guidance_scale


def has_guidance_interval(record: Record) -> bool:
    """Whether guidance was applied within an interval of noise levels only, as in none of the paper's rows."""
    return record.sampling is not None and record.sampling.guidance_interval is not None


def deviation_section(pairs: Sequence[Pair]) -> Section:
    """A section with a line for each metric of each pair: printed value, measured value with its interval, deviation in %.

    pairs: one or more, whose measured rows may share a table.
    """
    footnotes: dict[str, int] = {}  # text -> index
    lines = []
    for pair in pairs:
        differences = _differences(pair.published.representative, pair.measured.representative)
        notes = [footnotes.setdefault(differences, len(footnotes))] if differences else []
        for theirs, ours in pair.metrics:  # (metric, mode) in the paper's and in our row
            printed, measured = pair.published.records[theirs], pair.measured.records[ours]
            deviation = pair.deviation(theirs, ours)
            inside = "no interval"
            if measured.low is not None and measured.high is not None:
                inside = "inside" if measured.low <= printed.value <= measured.high else "outside"
            cells = (
                Cell(pair.published.representative.row),
                Cell(model_text(pair.measured)),
                Cell(metric_title(ours[0], measured.n, ours[1])),
                pair.published.cell(theirs),
                pair.measured.cell(ours),
                Cell("-") if deviation is None else Cell(f"{deviation:+z.1f} %", deviation),
                Cell(inside),
            )
            lines.append(make_line(cells, published=False, notes=notes))
    titles = ("Paper's row", "Our row", "Metric", "Paper", "Ours", "Deviation", "Paper's value in our interval")
    return Section(
        heading=f"Paper and ours: {key_text(pairs[0].measured.representative)}",
        columns=titles,
        lines=tuple(lines),
        footnotes=tuple(footnotes),
        remarks=(REMARK,),
    )


def deviation_data(pair: Pair) -> dict[str, object]:
    """The columns that a pair adds to the data of its measured row: "paper_row" and, for each metric, DEVIATION_PARTS."""
    entry: dict[str, object] = {"paper_row": pair.published.representative.row}
    for theirs, ours in pair.metrics:
        name = f"{ours[0]}_{ours[1]}" if ours[1] else ours[0]  # the metric's column in `sections.data_row`
        values = (pair.published.text(theirs), pair.deviation(theirs, ours))
        entry |= {f"{name}_{part}": value for part, value in zip(DEVIATION_PARTS, values, strict=True)}
    return entry


def model_text(row: Row) -> str:
    """For a published row its name in the paper; for a measured one `dit-b-4 (400K steps, seed 0)`."""
    if row.is_published:
        return row.representative.row
    training = row.representative.training
    words = []
    if training is not None and training.steps is not None:
        words.append(f"{count_text(training.steps)} steps")
    if training is not None and training.seed is not None:
        words.append(f"seed {training.seed}")
    return f"{row.representative.system} ({', '.join(words)})" if words else row.representative.system


def _differences(published: Record, record: Record) -> str:
    """The metadata that both state, and differently: `batch 128 (paper: 256), ...`; "" if there are none."""
    theirs, ours = row_metadata(published), row_metadata(record)
    names = [name for name in METADATA if name in theirs and name in ours and theirs[name] != ours[name]]
    return ", ".join(f"{name} {ours[name]} (paper: {theirs[name]})" for name in names)
