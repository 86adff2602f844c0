"""`harness.compare`: win, loss or tie between two sides."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.settings import CompareOptions, keyword_options
from results.compare import RULE, Verdict, differing
from results.compare import compare as compare_records
from results.records import Record
from results.store import find_record_files, load

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Verdicts by metric and way of sampling, for the first side; the settings in which the sides differ, each with its
    value on either side; and the rule behind the verdicts."""

    verdicts: tuple[Verdict, ...]
    differing: dict[str, tuple[Any, Any]]
    rule: str = RULE


@keyword_options(CompareOptions)
def compare(options: CompareOptions) -> Comparison:
    """Compare two results: win, loss or tie for the first, metric by metric.

    A side is a run, a folder of runs, or a record file; several training seeds, or sampling seeds, of one experiment belong
    together in one folder. UserError: a side without records, two sides that cannot be compared, a side that is
    ambiguous.
    """
    verdicts = compare_records(_records(options.a, options.step), _records(options.b, options.step))
    first = verdicts[0]
    return Comparison(verdicts=tuple(verdicts), differing=differing(first.a.records[0], first.b.records[0]))


def _records(path: Path, step: int | None) -> list[Record]:
    loaded = load(find_record_files([path]))
    for problem in (*loaded.problems, *loaded.conflicts):
        logger.warning(str(problem))
    found = [each for each in loaded.records if step is None or (each.training and each.training.steps == step)]
    if not found:
        raise UserError(f"{path} has no records{f' of step {step}' if step else ''}; `harness evaluate` makes them")
    return found
