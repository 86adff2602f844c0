"""The table of verdicts: who wins at the same training compute, or whether it is a tie."""

from collections.abc import Sequence

from reports.columns import count_text, features_of, key_text, measured_text, metric_title, quantity_text
from reports.rows import Cell
from reports.sections import Section, Table, aligned, make_line
from results.compare import SAMPLING_RULE, SEEDS_RULE, Group, Verdict, differing
from results.matched import TOLERANCE, Match, Matches, compute, matches
from results.records import Record

NAME = "table-verdicts"
MAX_LINES = 500  # of one section: more is read by nobody
COLUMNS = (
    *(
        "System",
        "Verdict",
        "Best rival",
        "Metric",
        "Sampling",
        "Training Gflops",
        "Value",
        "Rival's value",
        "Difference",
    ),
    *("It speaks of", "If trained again", "Rival differs in"),
)
RULE = (
    f"Each line sets an experiment against the best of the others whose training compute is within {100 * TOLERANCE:g} % of its own, "
    "at the same sampler, steps and guidance (of two that are each other's best rival, the better one). Difference: with the largest gap that is a tie. "
    f"Of training seeds: {SEEDS_RULE.partition(': ')[2]}. Of these checkpoints: {SAMPLING_RULE.partition(': ')[2]}. "
    "Each line stands by itself: of twenty ties one shows a win or a loss by chance, and the best of many rivals "
    "is the luckiest of them."
)


def verdict_table(records: Sequence[Record]) -> Table | None:
    """A section for each set of records that may share a table and has a match; None without any."""
    found = [each for each in matches(records, MAX_LINES) if each.matches]
    if not found:
        return None
    sections, data = [], []
    for each in found:
        judged = [(match, match.verdict()) for match in each.matches]
        sections.append(_section(each, judged))
        data += [_data(match, verdict, len(sections)) for match, verdict in judged]
    return Table(name=NAME, title="Who wins at the same training compute", sections=tuple(sections), data=aligned(data))


def _section(found: Matches, judged: Sequence[tuple[Match, Verdict]]) -> Section:
    lines = [make_line(_cells(match, verdict), published=False) for match, verdict in judged]
    remarks = [RULE]
    if found.alone:
        remarks.append(f"{found.alone} of {found.experiments} trained experiments have no rival of their compute.")
    if len(judged) == MAX_LINES:
        words = f" and {found.skipped} further metrics and ways of sampling" if found.skipped else ""
        remarks.append(
            f"Lines after the first {MAX_LINES}{words} are left out: `harness compare A B` judges any two runs."
        )
    return Section(
        heading=key_text(judged[0][0].own.records[0]),
        columns=COLUMNS,
        lines=tuple(lines),
        remarks=tuple(remarks),
    )


def _cells(match: Match, verdict: Verdict) -> tuple[Cell, ...]:
    record = match.own.records[0]
    noise = "" if verdict.noise is None else f" \u00b1 {verdict.noise:.2g}"
    return (
        Cell(_name(match.own)),
        Cell(verdict.verdict),
        Cell(_name(match.rival)),
        Cell(metric_title(match.metric, record.n, match.mode, features_of(record))),
        Cell(match.sampling),
        Cell(quantity_text(compute(match.own)), compute(match.own)),
        _value(match.own),
        _value(match.rival),
        Cell(f"{verdict.difference:+.3g}{noise}", verdict.difference),
        Cell(verdict.scope),
        Cell(verdict.again or "-"),
        Cell(_differences(match) or "-"),
    )


def _name(group: Group) -> str:
    training = group.records[0].training
    words = [f"{count_text(training.steps)} steps"] if training.steps is not None else []
    seeds = len(group.seeds)
    words.append(f"{seeds} seeds" if seeds > 1 else f"seed {training.seed}" if training.seed is not None else "1 seed")
    return f"{group.records[0].system} ({', '.join(words)})"


def _value(group: Group) -> Cell:
    """The mean over the seeds; of a single record the value with its interval."""
    if len(group.records) > 1:
        return Cell(f"{group.value:.4g}", group.value)
    (record,) = group.records
    return Cell(measured_text(record.value, record.low, record.high), record.value, record.id)


def _differences(match: Match) -> str:
    """What else than the system tells them apart; training steps follow from the compute."""
    own, rival = match.own.records[0], match.rival.records[0]
    found = {name: values for name, values in differing(own, rival).items() if name != "training steps"}
    if own.framework != rival.framework:
        found["framework"] = (own.framework, rival.framework)
    return ", ".join(f"{name} {theirs} (here {ours})" for name, (ours, theirs) in sorted(found.items()))


def _data(match: Match, verdict: Verdict, section: int) -> dict[str, object]:
    own, rival = match.own.records[0], match.rival.records[0]
    entry: dict[str, object] = {
        "section": section,
        "protocol": own.protocol,
        "dataset": own.dataset,
        "resolution": own.resolution,
        "n": own.n,
        "metric": f"{match.metric}_{match.mode}" if match.mode else match.metric,
        "sampling": match.sampling,
    }
    for name, group, record in (("", match.own, own), ("rival_", match.rival, rival)):
        entry |= {
            f"{name}system": record.system,
            f"{name}training_steps": record.training.steps,
            f"{name}training_gflops": record.training.gflops,
            f"{name}checkpoints": len(group.checkpoints),
            f"{name}value": group.value,
            f"{name}records": " ".join(sorted(each.id for each in group.records)),
        }
    return entry | {
        "difference": verdict.difference,
        "largest_tie": verdict.noise,
        "degrees_of_freedom": verdict.degrees,
        "verdict": verdict.verdict,
        "scope": verdict.scope,
        "if_trained_again": verdict.again,
        "rival_differs_in": _differences(match),
    }
