"""Means over seeds: a section of a table with a line for each experiment, and which of them can be told apart."""

import dataclasses
import math
from collections.abc import Sequence
from statistics import variance

from reports.best import BEST, TIE
from reports.rows import Cell, Row, column_title, columns_of, metrics_of
from reports.sections import Section, build_section, data_row
from reports.texts import key_text, measured_text
from results.cautions import cautions
from results.compare import verdict_of
from results.experiments import Group, experiment_key, group_of, student_t
from results.metrics import shared_direction

REMARK = (
    "Means over training seeds of their means over sampling seeds, with 95 % intervals: Student's t over the training "
    "seeds; of a single training seed that of sampling. Bold: the best mean; with =: not distinguishable from the best by "
    "the rule of `harness compare`, where a single training seed is compared with the noise of training again. All systems "
    "of a column are compared at once, as in the table of single seeds."
)
SEEDS_REMARK = (
    "Single seeds have no bold, for the more seeds a system has, the better its luckiest; see the means below."
)


def is_distinguishable(better: Group, other: Group, systems: int = 2) -> bool:
    """Whether the better group would win again: by Welch's test over training seeds or, of a single one, at the noise of
    training again. Published values have no interval and are compared with each other as printed.

    systems: how many are compared at once, of which these are two; the noise is then wider (`results.simultaneous`).
    """
    if all(record.provenance == "published" for record in (*better.records, *other.records)):
        return better.value != other.value
    verdict = verdict_of(better.records[0].metric, "", better, other, systems)
    return verdict.verdict == "win" and verdict.if_trained_again in (None, "win")


def sampling_half_width(group: Group, *, upward: bool) -> float | None:
    """95 % half-width of a group's mean from the randomness of sampling; None if it is not known. upward: its upper side."""
    noise = group.sampling_noise(upward=upward)
    return None if noise is None else noise.half_width


def mean_interval(group: Group) -> tuple[float | None, float | None, str]:
    """(low, high, method) of the 95 % interval of a group's mean; (None, None, "") if it is not known."""
    count, means = len(group.seeds), group.means
    if count > 1 and (spread := variance(means)) > 0:
        half = student_t(count - 1) * math.sqrt(spread / count)
        return group.value - half, group.value + half, f"Student's t over {count} training seeds"
    below, above = sampling_half_width(group, upward=False), sampling_half_width(group, upward=True)
    if below is None or above is None:
        return None, None, ""
    return group.value - below, group.value + above, "sampling"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Experiment:
    """The rows of one experiment, and the group of each of its metrics."""

    rows: list[Row]
    groups: dict[tuple[str, str], Group]  # (metric, mode) -> group


def _by_experiment(rows: Sequence[Row]) -> dict[tuple, list[Row]]:
    """The measured rows by experiment."""
    by_key: dict[tuple, list[Row]] = {}
    for row in rows:
        if not row.is_published:
            by_key.setdefault(experiment_key(row.representative), []).append(row)
    return by_key


def has_several_seeds(rows: Sequence[Row]) -> bool:
    """Whether a measured experiment has rows of several seeds, so that single rows are not compared.

    Rows of the same seeds, which differ in a micro-batch or a count of parameters, have no mean.
    """
    return any(
        len(group_of(row.representative for row in members).records) > 1 for members in _by_experiment(rows).values()
    )


def means_section(rows: Sequence[Row], number: int) -> tuple[Section, list[dict[str, object]]] | None:
    """(section, its rows of data) of the means of comparable measured rows; None if no experiment has several seeds.

    number: of the section, from 1.
    """
    if not has_several_seeds(rows):
        return None
    by_key = _by_experiment(rows)
    metrics = metrics_of(row for members in by_key.values() for row in members)
    experiments = [
        _Experiment(
            rows=members,
            groups={
                metric: group_of(found)
                for metric in metrics
                if (found := [row.records[metric] for row in members if metric in row.records])
            },
        )
        for members in by_key.values()
    ]
    marks = _marks(experiments, metrics)
    columns = [{**columns_of(each.rows[0]), "Seed": Cell(_seeds_text(each))} for each in experiments]
    titles = [title for title in columns[0] if any(cells[title].text != "-" for cells in columns)]
    cells = [
        (
            Cell(each.rows[0].representative.system),
            *(cells_of_row[title] for title in titles),
            *(_mean_cell(each.groups.get(metric), marks_of_row.get(metric, "")) for metric in metrics),
        )
        for each, cells_of_row, marks_of_row in zip(experiments, columns, marks, strict=True)
    ]
    first_rows = [each.rows[0] for each in experiments]
    heads = ("System", *titles, *(column_title(metric, rows) for metric in metrics))
    shown = ("training seed", "sampling seed", "protocol", "metric mode", *(title.lower() for title in titles))
    heading = f"{key_text(first_rows[0].representative)}: means over seeds"
    section = build_section(heading, heads, first_rows, cells, shown)
    mixed = [
        f"{each.rows[0].representative.system} ({_seeds_text(each)}): {text}."
        for each in experiments
        for text in cautions(row.representative for row in each.rows)
    ]
    section = dataclasses.replace(section, remarks=(REMARK, *mixed, *_without_intervals(section.remarks)))
    data = [_data(each, number, found) for each, found in zip(experiments, marks, strict=True)]
    return section, data


def _without_intervals(remarks: Sequence[str]) -> tuple[str, ...]:
    """The remarks without the one on the intervals of single records."""
    return tuple(remark for remark in remarks if not remark.startswith("Intervals in brackets"))


def _marks(experiments: Sequence[_Experiment], metrics: Sequence[tuple[str, str]]) -> list[dict[tuple[str, str], str]]:
    """For each experiment its marks, as `best_marks` gives them for rows."""
    marks: list[dict[tuple[str, str], str]] = [{} for _ in experiments]
    for metric in metrics:
        known = [(index, each.groups[metric]) for index, each in enumerate(experiments) if metric in each.groups]
        higher_is_better = shared_direction(record for _, group in known for record in group.records)
        if higher_is_better is None or len(known) < 2:
            continue
        leader = (max if higher_is_better else min)(known, key=lambda pair: pair[1].value)
        leading = [
            index
            for index, group in known
            if index == leader[0] or not is_distinguishable(leader[1], group, len(known))
        ]
        for index in leading:
            marks[index][metric] = BEST if len(leading) == 1 else TIE
    return marks


def _seeds_text(experiment: _Experiment) -> str:
    """`3 (0, 1, 2)`: the number of training seeds and the seeds; a dash if none is stated."""
    trainings = [row.representative.training for row in experiment.rows]
    seeds = sorted({training.seed for training in trainings if training is not None and training.seed is not None})
    return f"{len(seeds)} ({', '.join(map(str, seeds))})" if seeds else "-"


def _mean_cell(group: Group | None, mark: str) -> Cell:
    """The cell of a mean with its interval; of a single record with its id."""
    if group is None:
        return Cell("-")
    low, high, _ = mean_interval(group)
    record_id = group.records[0].id if len(group.records) == 1 else ""
    return Cell(measured_text(group.value, low, high), group.value, record_id, mark)


def _data(experiment: _Experiment, number: int, marks: dict[tuple[str, str], str]) -> dict[str, object]:
    """A row of data: that of the first row of the experiment with means in place of its values.

    `seeds` has the training seeds. What belongs to a single seed, such as hashes, is empty.
    """
    entry = data_row(experiment.rows[0], number, marks)
    for name in (
        "training_seed", "training_checkpoint_sha256", "training_parent_sha256", "training_forked_at", "sampling_seed",
        "sampling_samples_sha256",
    ):  # fmt: skip
        if name in entry:
            entry[name] = None
    for (key, mode), group in experiment.groups.items():
        name = f"{key}_{mode}" if mode else key
        low, high, method = mean_interval(group)
        entry |= {
            name: group.value, f"{name}_low": low, f"{name}_high": high, f"{name}_interval": method or None,
            f"{name}_mark": marks.get((key, mode)), f"{name}_record": None,
        }  # fmt: skip
    return {**entry, "seeds": _seeds_text(experiment)}
