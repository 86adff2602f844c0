"""`harness.compare`: win, loss or tie between two results."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.settings import CompareOptions, keyword_options, only_one
from results.cautions import Compute, cautions_on_sides, compute_of
from results.compare import RULE, Verdict, differing
from results.compare import compare as compare_records
from results.records import Record
from results.store import find_record_files, load
from results.time_to_target import RULE as TARGET_RULE
from results.time_to_target import TargetVerdict, compare_to_target

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison of two results.

    verdicts: for the first side, one for each metric and sampling setting. differing: the settings that differ (of
    `differing` in `results.compare`, without batch sizes) with their values on both sides. compute: of training and of
    sampling, of both sides. warnings: sentences on compute that is not matched within 2 %, and on mixed versions. rule: of
    the verdicts. to_target: with a target, its verdicts, one for each way of sampling; the others are empty then.
    """

    verdicts: tuple[Verdict, ...]
    differing: dict[str, tuple[Any, Any]]
    compute: tuple[Compute, ...]
    warnings: tuple[str, ...]
    rule: str = RULE
    to_target: tuple[TargetVerdict, ...] = ()


@keyword_options(CompareOptions)
def compare(options: CompareOptions) -> Comparison:
    """Compare two results: win, loss or tie for the first, for each metric.

    A side is a run, a folder of runs, or a record file. Several training seeds or sampling seeds of one experiment must
    be in one folder. With `target`, compare the training compute until a metric reaches a value. UserError: a side has no
    records or is ambiguous, or the two sides cannot be compared.
    """
    only_one({"--step": options.step, "--target": options.target}, "the training steps")
    if options.target is not None:
        sides = (_records(options.a, None), _records(options.b, None))
        to_target = compare_to_target(*sides, options.target)
        scale = "log" if to_target[0].log_scale else "value"
        return Comparison(
            verdicts=(), differing={}, compute=(), warnings=(), rule=TARGET_RULE.format(scale=scale), to_target=tuple(to_target)
        )  # fmt: skip
    verdicts = compare_records(_records(options.a, options.step), _records(options.b, options.step))
    first = verdicts[0]  # the settings that differ are those of its records, the first of each side
    compute = compute_of(verdicts)
    warnings = [each.warning for each in compute if each.warning]
    warnings += dict.fromkeys(text for verdict in verdicts for text in cautions_on_sides(verdict.a, verdict.b))
    return Comparison(
        verdicts=tuple(verdicts),
        differing=differing(first.a.records[0], first.b.records[0]),
        compute=tuple(compute),
        warnings=tuple(warnings),
    )


def _records(path: Path, step: int | None) -> list[Record]:
    """The records at `path` of training step `step` (None: of all). Raises `UserError` if there are none."""
    loaded = load(find_record_files([path]))
    for problem in (*loaded.problems, *loaded.conflicts):
        logger.warning(str(problem))
    selected = [
        record for record in loaded.records if step is None or (record.training and record.training.steps == step)
    ]
    if not selected:
        raise UserError(f"{path} has no records{f' of step {step}' if step else ''}; `harness evaluate` makes them")
    return selected
