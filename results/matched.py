"""Who is best at the same training compute: every experiment against its best opponent of about the same compute."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from results.compare import Group, Verdict, experiment_key, group_of, sampling_text, verdict_of
from results.metrics import rank, shared_direction
from results.records import ComparableKey, Record, comparable_key

TOLERANCE = 0.02  # the share by which the larger training compute of two may exceed the smaller one


@dataclass(frozen=True, kw_only=True)
class Matchup:
    """An experiment and its opponent: the best other experiment with the same compute, metric, sampling and comparable key.

    If two experiments are each other's opponent, only the better one has a matchup. "The same compute": within TOLERANCE.
    """

    metric: str
    mode: str  # "": none
    sampling: str  # of `sampling_text`
    group: Group
    opponent: Group

    @property
    def gflops(self) -> tuple[float, float]:
        """Training Gflops of (the experiment, its opponent)."""
        return compute(self.group), compute(self.opponent)

    def verdict(self) -> Verdict:
        """Win, tie or loss of the experiment, by the rule of `compare`."""
        return verdict_of(self.metric, self.sampling, self.group, self.opponent)


@dataclass(frozen=True, kw_only=True)
class Matchups:
    """The matchups of records that may share a table.

    A cell is a metric, its mode and a way of sampling. experiments: number of trainings in the cells that were looked at;
    one training that was sampled in several ways counts once. alone: number of those without an opponent in any of these
    cells. skipped: number of cells that were not looked at.
    """

    key: ComparableKey
    matchups: tuple[Matchup, ...]  # by metric, sampling, compute and name
    experiments: int
    alone: int
    skipped: int


def matchups(records: Iterable[Record], most: int = sys.maxsize) -> list[Matchups]:
    """The matchups of measured records whose training compute is known, for each comparable key.

    Metrics of unknown direction are left out. Once `most` matchups of a key are found, its remaining metrics and ways of
    sampling are skipped.
    """
    records = list(records)  # keeps the records alive, so that `id` of their parts stays unique
    # comparable key -> (metric, mode, sampling) -> experiment key -> records
    cells: dict[ComparableKey, dict[tuple[str, str, str], dict[tuple, list[Record]]]] = {}
    # A cache, because the metrics of one sample set share their parts: parts -> what is computed from them.
    known: dict[tuple, tuple[ComparableKey, tuple, str, str]] = {}
    for record in records:
        if record.provenance == "measured" and record.training and record.training.gflops:
            parts = (
                id(record.training), id(record.sampling), id(record.evaluation), record.system, record.backbone,
                record.framework, record.protocol, record.protocol_version, record.dataset, record.resolution, record.n,
            )  # fmt: skip
            if parts not in known:
                mode = (record.evaluation.mode if record.evaluation else None) or ""
                known[parts] = (comparable_key(record), experiment_key(record), mode, sampling_text(record))
            key, experiment, mode, sampling = known[parts]
            cell = cells.setdefault(key, {}).setdefault((record.metric, mode, sampling), {})
            cell.setdefault(experiment, []).append(record)
    result = []
    for key, cells_of_key in cells.items():
        directions = {
            cell: shared_direction(record for members in experiments.values() for record in members)
            for cell, experiments in cells_of_key.items()
        }
        ordered = sorted(
            (cell for cell in cells_of_key if directions[cell] is not None), key=lambda cell: _sort_key(*cell)
        )
        if not ordered:
            continue
        found: list[Matchup] = []
        trainings: set[tuple] = set()
        looked_at = 0
        for metric, mode, sampling in ordered:
            if len(found) >= most:
                break
            looked_at += 1
            experiments = cells_of_key[metric, mode, sampling]
            trainings |= {_training_key(members[0]) for members in experiments.values()}
            sign = -1 if directions[metric, mode, sampling] else 1
            found += [
                Matchup(metric=metric, mode=mode, sampling=sampling, group=group, opponent=opponent)
                for group, opponent in _pairs([group_of(members) for members in experiments.values()], sign)
            ]
        matched = {_training_key(group.records[0]) for matchup in found for group in (matchup.group, matchup.opponent)}
        result.append(
            Matchups(
                key=key,
                matchups=tuple(found[:most]),
                experiments=len(trainings),
                alone=len(trainings - matched),
                skipped=len(ordered) - looked_at,
            )
        )
    return sorted(result, key=lambda each: str(each.key))


def compute(group: Group) -> float:
    """Gflops of the whole training of the group's first checkpoint. Raises ValueError if its record does not state them."""
    training = group.records[0].training
    if training is None or training.gflops is None:
        raise ValueError(f"the training compute of {group.records[0].system} is not known")
    return training.gflops


def _pairs(groups: list[Group], sign: int) -> list[tuple[Group, Group]]:
    """(group, its best opponent) for each group that has others within TOLERANCE of its compute.

    Of two groups that are each other's best opponent, only the better one has a pair. sign: 1 if lower values are better,
    else -1. Groups are sorted by compute, and a window of the groups within TOLERANCE moves over them.
    """
    groups = sorted(groups, key=lambda group: (compute(group), group.records[0].system, group.records[0].id))
    costs = [compute(group) for group in groups]
    window: list[tuple[float, int]] = []  # (sign * value, index), best first
    first = last = 0  # the window has the groups first, ..., last - 1
    opponents: dict[int, int] = {}  # index of a group -> index of its opponent
    for index in range(len(groups)):
        while last < len(groups) and costs[last] <= costs[index] * (1 + TOLERANCE):
            bisect.insort(window, (sign * groups[last].value, last))
            last += 1
        while costs[first] * (1 + TOLERANCE) < costs[index]:
            window.remove((sign * groups[first].value, first))
            first += 1
        best = next((other for _, other in window[:2] if other != index), None)
        if best is not None:
            opponents[index] = best
    return [
        (groups[index], groups[other])
        for index, other in opponents.items()
        if opponents.get(other) != index or (sign * groups[index].value, index) < (sign * groups[other].value, other)
    ]


def _sort_key(metric: str, mode: str, sampling: str) -> tuple:
    """Sorts metrics as in the tables, then ways of sampling by sampler and number of steps."""
    sampler, _, rest = sampling.partition("-")
    steps = rest.partition(",")[0]
    return (rank(metric), mode, sampler, int(steps) if steps.isdigit() else 0, sampling)


def _training_key(record: Record) -> tuple:
    """A key that is equal for records of one training, however it was sampled: `experiment_key` without the sampling."""
    return experiment_key(record)[:-1]
