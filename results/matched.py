"""Who is best at the same training compute: every experiment against the best rival that cost as much."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from results.compare import LOWER_IS_BETTER, ORDER, Group, Verdict, experiment, group_of, judge, sampling_text
from results.records import Record, comparable_key

TOLERANCE = 0.02  # the larger training compute is at most so much above the smaller


@dataclass(frozen=True, kw_only=True)
class Match:
    """An experiment and the best of the others of its training compute: same metric, sampling and comparable key.

    Of two that are each other's best rival only the better one has a match.
    """

    metric: str
    mode: str
    sampling: str
    own: Group
    rival: Group

    @property
    def gflops(self) -> tuple[float, float]:
        """Training compute of both."""
        return compute(self.own), compute(self.rival)

    def verdict(self) -> Verdict:
        """Win, tie or loss of the experiment, by the rule of `compare`."""
        return judge(self.metric, self.sampling, self.own, self.rival)


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Those of records that may share a table.

    experiments: what was trained, however sampled, of the metrics and ways of sampling looked at. alone: those of them
    without a rival. skipped: metrics and ways of sampling, a count of pairs, that were not looked at.
    """

    key: tuple
    matches: tuple[Match, ...]  # by metric, sampling, compute and name
    experiments: int
    alone: int
    skipped: int


def matches(records: Iterable[Record], most: int = sys.maxsize) -> list[Matches]:
    """The matches of measured records that know their training compute, for each comparable key.

    Metrics of which nobody knows which way is better are left out. Once `most` matches of a key are found, the rest of
    its metrics and ways of sampling is skipped.
    """
    records = list(records)  # kept, so that an object's id stays its own
    cells: dict[tuple, dict[tuple, dict[tuple, list[Record]]]] = {}
    known = LOWER_IS_BETTER.union(ORDER)
    told: dict[tuple, tuple[tuple, tuple, str, str]] = {}  # the metrics of one sample set have their parts in common
    for record in records:
        if record.metric in known and record.provenance == "measured" and record.training and record.training.gflops:
            parts = (
                id(record.training), id(record.sampling), id(record.evaluation), record.system, record.backbone,
                record.framework, record.protocol, record.protocol_version, record.dataset, record.resolution, record.n,
            )  # fmt: skip
            if parts not in told:
                mode = (record.evaluation.mode if record.evaluation else None) or ""
                told[parts] = (comparable_key(record), experiment(record), mode, sampling_text(record))
            key, trained, mode, sampling = told[parts]
            cell = cells.setdefault(key, {}).setdefault((record.metric, mode, sampling), {})
            cell.setdefault(trained, []).append(record)
    result = []
    for key, found in cells.items():
        made: list[Match] = []
        everyone: set[tuple] = set()
        ordered = sorted(found.items(), key=lambda item: _order(*item[0]))
        looked_at = 0
        for (metric, mode, sampling), experiments in ordered:
            if len(made) >= most:
                break
            looked_at += 1
            everyone |= {_run(records[0]) for records in experiments.values()}
            made += [
                Match(metric=metric, mode=mode, sampling=sampling, own=own, rival=rival)
                for own, rival in _rivals(metric, [group_of(members) for members in experiments.values()])
            ]
        matched = {_run(group.records[0]) for match in made for group in (match.own, match.rival)}
        result.append(
            Matches(
                key=key,
                matches=tuple(made[:most]),
                experiments=len(everyone),
                alone=len(everyone - matched),
                skipped=len(ordered) - looked_at,
            )
        )
    return sorted(result, key=lambda each: str(each.key))


def compute(group: Group) -> float:
    """Gflops of the whole training of one checkpoint."""
    return group.checkpoints[0][0].training.gflops


def _rivals(metric: str, groups: list[Group]) -> list[tuple[Group, Group]]:
    """Each group that has others within the tolerance, with the best of them."""
    sign = 1 if metric in LOWER_IS_BETTER else -1
    groups = sorted(groups, key=lambda group: (compute(group), group.records[0].system, group.records[0].id))
    costs = [compute(group) for group in groups]
    window: list[tuple[float, int]] = []  # (how bad, index), best first
    first = last = 0
    rivals: dict[int, int] = {}
    for index in range(len(groups)):
        while last < len(groups) and costs[last] <= costs[index] * (1 + TOLERANCE):
            bisect.insort(window, (sign * groups[last].value, last))
            last += 1
        while costs[first] * (1 + TOLERANCE) < costs[index]:
            window.remove((sign * groups[first].value, first))
            first += 1
        best = next((other for _, other in window[:2] if other != index), None)
        if best is not None:
            rivals[index] = best
    return [
        (groups[index], groups[other])
        for index, other in rivals.items()
        if rivals.get(other) != index or (sign * groups[index].value, index) < (sign * groups[other].value, other)
    ]


def _order(metric: str, mode: str, sampling: str) -> tuple:
    """Metrics as in the tables; ways of sampling by name and number of steps."""
    sampler, _, rest = sampling.partition("-")
    steps = rest.partition(",")[0]
    rank = ORDER.index(metric) if metric in ORDER else len(ORDER)
    return (rank, metric, mode, sampler, int(steps) if steps.isdigit() else 0, sampling)


def _run(record: Record) -> tuple:
    """What was trained, however it was sampled: all of the experiment but the last entry."""
    return experiment(record)[:-1]
