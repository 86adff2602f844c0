"""The best value of a column and the values tied with it, among published values and among measured ones."""

from collections.abc import Sequence

from reports.rows import Row
from results.compare import within_noise
from results.metrics import shared_direction

BEST, TIE = "best", "tie"
PUBLISHED_RULE = "of the published values the best as printed (they have no interval)"
MEASURED_RULE = (
    "of the measured values the best; a gap within the noise of sampling is a tie (of these checkpoints, not of the "
    "backbones; a value without an interval has no mark, as its noise is not known). All rows of a column are compared at once (Tukey's test in "
    "the form of Games and Howell: the root of the sum of the squared 95 % half-widths, times the ratio of 95 % quantiles of "
    "the studentized range of all rows and of two), so among equals some row is set behind the best in at most 5 % of tables, "
    "for each metric"
)


def best_marks(rows: Sequence[Row], metrics: Sequence[tuple[str, str]]) -> list[dict[tuple[str, str], str]]:
    """For each row a dict with its marked cells: (metric, mode) -> "best" or "tie".

    The best value of a column has the mark "best"; if others are tied with it, it and they have the mark "tie".
    metrics: (metric, mode) of the columns. Published values are compared as printed, measured values with their intervals,
    and the two kinds not with each other, because the noise of a published number is not known. Measured values without an
    interval are left out for the same reason. A kind has marks in a column if two values or more are left there and the
    metric's direction is known.
    """
    marks: list[dict[tuple[str, str], str]] = [{} for _ in rows]
    for metric in metrics:
        higher_is_better = shared_direction(row.records[metric] for row in rows if metric in row.records)
        if higher_is_better is None:
            continue
        for is_published in (True, False):
            candidates = [
                (index, row.records[metric])
                for index, row in enumerate(rows)
                if row.is_published == is_published and metric in row.records
                if is_published or row.records[metric].low is not None
            ]
            if len(candidates) < 2:
                continue
            values = [record.value for _, record in candidates]
            leader = candidates[values.index(max(values) if higher_is_better else min(values))][1]
            leading = [
                index
                for index, record in candidates
                if record.value == leader.value or (not is_published and within_noise(leader, record, len(candidates)))
            ]
            for index in leading:
                marks[index][metric] = BEST if len(leading) == 1 else TIE
    return marks


def bold_remark(rows: Sequence[Row], marks: Sequence[dict[tuple[str, str], str]]) -> str:
    """A sentence on what bold means in a section with these marks, those of `best_marks`; "" if there are none."""
    marked = [row for row, marks_of_row in zip(rows, marks, strict=True) if marks_of_row]
    if not marked:
        return ""
    rules = [PUBLISHED_RULE] if any(row.is_published for row in marked) else []
    rules += [MEASURED_RULE] if any(not row.is_published for row in marked) else []
    ties = " Bold with =: tied for the best." if any(TIE in marks_of_row.values() for marks_of_row in marks) else ""
    return f"Bold: {'; '.join(rules)}.{ties}"
