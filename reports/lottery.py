"""The table of seeds: how much of the spread is the training's and how much the sampling's, and how many seeds that asks for."""

from collections.abc import Iterable, Sequence

from reports.rows import Cell
from reports.sections import Section, Table, aligned, make_line
from reports.texts import count_text, key_text, title_of
from results.experiments import Group, experiment_key, group_of, sampling_text
from results.metrics import rank
from results.records import Record, comparable_key
from results.variances import ALPHA, POWER, Components, components

NAME = "table-seeds"
MIN_SEEDS = 3  # of training and of sampling, of a system in the table
DIFFERENCES = (0.01, 0.02, 0.05)  # shares of the mean
COLUMNS = (
    "System", "Metric", "Sampling", "Training seeds", "Sampling seeds", "Mean", "Training noise", "Sampling noise",
    "Training / sampling", *(f"Seeds for {100 * each:g} %" for each in DIFFERENCES),
)  # fmt: skip
REMARK = (
    "Noise: standard deviation in % of the mean, over training seeds (without the part of sampling) and over samplings of "
    "one checkpoint; their ratio with its 95 % interval. Seeds for a difference: training seeds of each of two systems "
    f"with which a two-sided test at {100 * ALPHA:g} % finds a difference of that share of the mean with a chance of "
    f"{100 * POWER:g} %, each sampled once."
)


def seeds_table(records: Sequence[Record]) -> Table | None:
    """The table of measured systems with MIN_SEEDS or more training seeds and sampling seeds of all; None without any."""
    by_key: dict[tuple, list[tuple[Group, Components]]] = {}
    for group in _groups(records):
        by_seed = [
            {record.sampling.seed: record.value for checkpoint in seed for record in checkpoint if record.sampling}
            for seed in group.seeds
        ]
        shared = sorted(set.intersection(*map(set, by_seed)), key=str)  # sampling seeds that every training seed has
        if len(by_seed) < MIN_SEEDS or len(shared) < MIN_SEEDS:
            continue
        found = components([[values[seed] for seed in shared] for values in by_seed])
        if found is not None and found.mean != 0:
            by_key.setdefault(comparable_key(group.records[0]), []).append((group, found))
    sections, data = [], []
    for _, members in sorted(by_key.items(), key=lambda pair: str(pair[0])):
        members.sort(key=lambda pair: _order(pair[0]))
        lines = [make_line(_cells(group, found), published=False) for group, found in members]
        heading = key_text(members[0][0].records[0])
        sections.append(Section(heading=heading, columns=COLUMNS, lines=tuple(lines), remarks=(REMARK,)))
        data += [_csv_row(group, found, len(sections)) for group, found in members]
    if not sections:
        return None
    return Table(name=NAME, title="How many seeds a difference needs", sections=tuple(sections), data=aligned(data))


def _groups(records: Iterable[Record]) -> list[Group]:
    """The measured records by experiment, metric and comparable key."""
    by_experiment: dict[tuple, list[Record]] = {}
    for record in records:
        if record.provenance == "measured" and record.training is not None and record.training.seed is not None:
            mode = record.evaluation.mode if record.evaluation else None
            key = (record.metric, mode, comparable_key(record), experiment_key(record))
            by_experiment.setdefault(key, []).append(record)
    return [group_of(members) for members in by_experiment.values() if len(members) >= MIN_SEEDS**2]


def _order(group: Group) -> tuple:
    record = group.records[0]
    return (record.system, rank(record.metric), sampling_text(record), str(experiment_key(record)))


def _cells(group: Group, found: Components) -> tuple[Cell, ...]:
    """The cells of COLUMNS."""
    record = group.records[0]
    steps = record.training.steps if record.training else None
    name = record.system if steps is None else f"{record.system} ({count_text(steps)} steps)"
    ratio = found.training / found.sampling
    return (
        Cell(name),
        Cell(title_of(group.records)),
        Cell(sampling_text(record)),
        Cell(str(found.seeds), found.seeds),
        Cell(str(found.samplings), found.samplings),
        Cell(f"{found.mean:.4g}", found.mean),
        Cell(f"{100 * found.training_cv:.2g} %", found.training_cv),
        Cell(f"{100 * found.sampling_cv:.2g} %", found.sampling_cv),
        Cell(f"{ratio:.2g} [{found.ratio_low:.2g}, {found.ratio_high:.2g}]", ratio),
        *(_seeds_cell(found.seeds_needed(difference)) for difference in DIFFERENCES),
    )


def _seeds_cell(seeds: int | None) -> Cell:
    return Cell("over 1,000") if seeds is None else Cell(f"{seeds:,}", seeds)


def _csv_row(group: Group, found: Components, section: int) -> dict[str, object]:
    """A row of data, column -> value. section: number of the section, from 1."""
    record = group.records[0]
    mode = record.evaluation.mode if record.evaluation else None
    return {
        "section": section, "protocol": record.protocol, "system": record.system,
        "training_steps": record.training.steps if record.training else None, "n": record.n,
        "metric": f"{record.metric}_{mode}" if mode else record.metric, "sampling": sampling_text(record),
        "training_seeds": found.seeds, "sampling_seeds": found.samplings, "mean": found.mean,
        "training_variance": found.training, "sampling_variance": found.sampling,
        "ratio_low": found.ratio_low, "ratio_high": found.ratio_high,
        **{f"seeds_for_{difference:g}": found.seeds_needed(difference) for difference in DIFFERENCES},
        "records": " ".join(sorted(each.id for each in group.records)),
    }  # fmt: skip
