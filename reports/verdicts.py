"""The table of verdicts: which experiment wins at the same training compute."""

from collections.abc import Sequence

from reports.rows import Cell
from reports.sections import Section, Table, aligned, make_line
from reports.texts import count_text, key_text, measured_text, quantity_text, title_of
from results.cautions import cautions, sampling_gflops
from results.compare import SAMPLING_RULE, SEEDS_RULE, Verdict, differing
from results.experiments import Group
from results.matched import TOLERANCE, Matchup, Matchups, compute, matchups
from results.records import Record, Training

NAME = "table-verdicts"
MAX_LINES = 500  # of one section
COLUMNS = (
    "System", "Verdict", "Best opponent", "Metric", "Sampling", "Training Gflops", "Gflops an image", "Value",
    "Opponent's value",
    "Difference", "Scope", "If trained again", "Opponent differs in",
)  # fmt: skip
# The rules of `results.compare` without the condition before their colon, for which this sentence has its own words.
RULE = (
    f"Each line compares an experiment with its best opponent: of the others whose training compute differs by at most "
    f"{100 * TOLERANCE:g} %, at the same sampler, steps and guidance, the best one (where two are each other's best "
    "opponent, only the better one has a line). Training compute is matched; sampling compute is not: the Gflops an image "
    "have the opponent's in brackets where they differ by more. Difference: with the largest gap that is a tie. "
    f"Of training seeds: {SEEDS_RULE.partition(': ')[2]}. Of these checkpoints: {SAMPLING_RULE.partition(': ')[2]}. "
    "Where a metric and way of sampling has more than two experiments with an opponent, all of them are compared at once "
    "(Tukey's test in the form of Games and Howell: the noise of a pair times the ratio of 95 % quantiles of the "
    "studentized range of all and of two), so among equals some line shows a win or a loss in at most 5 % of tables, for "
    "each metric and way of sampling."
)


def verdict_table(records: Sequence[Record]) -> Table | None:
    """The table, with a section for each set of comparable records that has a matchup; None without matchups."""
    comparable = [each for each in matchups(records, MAX_LINES) if each.matchups]
    if not comparable:
        return None
    sections, data = [], []
    for each in comparable:
        verdicts = [(matchup, matchup.verdict()) for matchup in each.matchups]
        sections.append(_section(each, verdicts))
        data += [_csv_row(matchup, verdict, len(sections)) for matchup, verdict in verdicts]
    return Table(name=NAME, title="Who wins at the same training compute", sections=tuple(sections), data=aligned(data))


def _section(comparable: Matchups, verdicts: Sequence[tuple[Matchup, Verdict]]) -> Section:
    """The section of comparable records, with a line for each matchup."""
    lines = [make_line(_cells(matchup, verdict), published=False) for matchup, verdict in verdicts]
    remarks = [RULE]
    if comparable.alone:
        remarks.append(
            f"{comparable.alone} of {comparable.experiments} trained experiments have no opponent of the same compute."
        )
    groups = {
        _name(ours, theirs): ours
        for each, _ in verdicts
        for ours, theirs in ((each.group, each.opponent), (each.opponent, each.group))
    }
    remarks += [f"{name}: {text}." for name, group in groups.items() for text in cautions(group.records)]
    if comparable.left_out or comparable.skipped:
        words = f" and {comparable.skipped} further metrics and ways of sampling" if comparable.skipped else ""
        remarks.append(
            f"Lines after the first {MAX_LINES}{words} are left out: `harness compare A B` compares any two runs."
        )
    return Section(
        heading=key_text(verdicts[0][0].group.records[0]),
        columns=COLUMNS,
        lines=tuple(lines),
        remarks=tuple(remarks),
    )


def _cells(matchup: Matchup, verdict: Verdict) -> tuple[Cell, ...]:
    """The cells of COLUMNS."""
    largest_tie = "" if verdict.largest_tie is None else f" \u00b1 {verdict.largest_tie:.2g}"
    return (
        Cell(_name(matchup.group, matchup.opponent)),
        Cell(verdict.verdict),
        Cell(_name(matchup.opponent, matchup.group)),
        Cell(title_of([*matchup.group.records, *matchup.opponent.records])),
        Cell(matchup.sampling),
        Cell(quantity_text(compute(matchup.group)), compute(matchup.group)),
        _gflops_an_image(matchup),
        _value(matchup.group),
        _value(matchup.opponent),
        Cell(f"{verdict.difference:+z.3g}{largest_tie}", verdict.difference),
        Cell(verdict.scope),
        Cell(verdict.if_trained_again or "-"),
        Cell(_differences(matchup) or "-"),
    )


def _gflops_an_image(matchup: Matchup) -> Cell:
    """The cell of the sampling compute, with the opponent's if it differs by more than TOLERANCE."""
    ours, theirs = sampling_gflops(matchup.group), sampling_gflops(matchup.opponent)
    is_matched = ours == theirs or (ours and theirs and max(ours, theirs) <= min(ours, theirs) * (1 + TOLERANCE))
    return Cell(quantity_text(ours) + ("" if is_matched else f" (opponent {quantity_text(theirs)})"), ours)


def _name(group: Group, other: Group) -> str:
    """`dit-b-4 (400 steps, 3 seeds)`, `dit-b-4 (velocity on flow, 400 steps, seed 0)`; `1 seed` if the only seed is not stated.

    The objective is named where that of `other`, which stands in the same line, is another one.
    """
    training, others = (each.records[0].training or Training() for each in (group, other))
    words = [f"{count_text(training.steps)} steps"] if training.steps is not None else []
    if (training.objective, training.schedule) != (others.objective, others.schedule) and training.objective:
        words.insert(0, training.objective + (f" on {training.schedule}" if training.schedule else ""))
    if len(group.seeds) > 1:
        words.append(f"{len(group.seeds)} seeds")
    else:
        words.append("1 seed" if training.seed is None else f"seed {training.seed}")
    return f"{group.records[0].system} ({', '.join(words)})"


def _value(group: Group) -> Cell:
    """The cell of a group's value: the mean of several records, without an interval, or one value with its interval."""
    if len(group.records) > 1:
        return Cell(f"{group.value:z.4g}", group.value)
    (record,) = group.records
    return Cell(measured_text(record.value, record.low, record.high), record.value, record.id)


def _differences(matchup: Matchup) -> str:
    """The settings in which the opponent differs: `sampling eta 1.0 (here 0.0), ...`; "" if there are none.

    Without the training steps: at equal compute, models of different cost always differ in them.
    """
    first, other = matchup.group.records[0], matchup.opponent.records[0]
    found = {name: values for name, values in differing(first, other).items() if name != "training steps"}
    if first.framework != other.framework:  # `differing` has settings of training and sampling only
        found["framework"] = (first.framework, other.framework)
    return ", ".join(f"{name} {theirs} (here {ours})" for name, (ours, theirs) in sorted(found.items()))


def _csv_row(matchup: Matchup, verdict: Verdict, section: int) -> dict[str, object]:
    """A row of data, column -> value. section: number of the section, from 1."""
    first, other = matchup.group.records[0], matchup.opponent.records[0]
    entry: dict[str, object] = {
        "section": section,
        "protocol": first.protocol,
        "dataset": first.dataset,
        "resolution": first.resolution,
        "n": first.n,
        "metric": f"{matchup.metric}_{matchup.mode}" if matchup.mode else matchup.metric,
        "sampling": matchup.sampling,
    }
    for name, group, record in (("", matchup.group, first), ("opponent_", matchup.opponent, other)):
        entry |= {
            f"{name}system": record.system,
            f"{name}training_steps": record.training.steps if record.training else None,
            f"{name}training_gflops": compute(group),
            f"{name}sampling_gflops": sampling_gflops(group),
            f"{name}checkpoints": len(group.checkpoints),
            f"{name}value": group.value,
            f"{name}records": " ".join(sorted(each.id for each in group.records)),
        }
    return entry | {
        "difference": verdict.difference,
        "largest_tie": verdict.largest_tie,
        "degrees_of_freedom": verdict.degrees_of_freedom,
        "verdict": verdict.verdict,
        "scope": verdict.scope,
        "if_trained_again": verdict.if_trained_again,
        "opponent_differs_in": _differences(matchup),
    }
