"""Who is best at the same training compute: every experiment against its best opponent of about the same compute."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from results.compare import Verdict, verdict_of
from results.experiments import Group, experiment_key, group_of, sampling_text
from results.metrics import rank, shared_direction
from results.records import ComparableKey, Record, comparable_key

TOLERANCE = 0.02  # the share by which the larger training compute of two may exceed the smaller one
# (metric, mode, sampling) -> experiment key -> records
_RecordsByCell = dict[tuple[str, str, str], dict[tuple, list[Record]]]


@dataclass(frozen=True, kw_only=True)
class Matchup:
    """An experiment and its opponent: the best other experiment with the same compute, metric, sampling and comparable key.

    If two experiments are each other's opponent, only the better one has a matchup. "The same compute": within TOLERANCE.
    """

    metric: str
    mode: str  # variant of the metric (`Evaluation.mode`); "": none
    sampling: str  # how the images were sampled (`sampling_text`)
    group: Group
    opponent: Group
    systems: int  # number of experiments of this metric, mode and sampling that have an opponent

    @property
    def gflops(self) -> tuple[float, float]:
        """Training Gflops of (the experiment, its opponent)."""
        return compute(self.group), compute(self.opponent)

    def verdict(self) -> Verdict:
        """Win, tie or loss of the experiment, by the rule of `compare`, for all `systems` at once."""
        return verdict_of(self.metric, self.sampling, self.group, self.opponent, self.systems)


@dataclass(frozen=True, kw_only=True)
class Matchups:
    """The matchups of records that may share a table.

    A cell is a metric, its mode and a way of sampling. experiments: number of trainings in the cells that were searched
    for matchups; one training that was sampled in several ways counts once. alone: number of those without an opponent in
    any of these cells. left_out: number of matchups beyond the limit. skipped: number of cells that were not searched,
    because there were enough matchups.
    """

    key: ComparableKey
    matchups: tuple[Matchup, ...]  # by metric, sampling, compute and name
    experiments: int
    alone: int
    left_out: int
    skipped: int


def matchups(records: Iterable[Record], limit: int = sys.maxsize) -> list[Matchups]:
    """The matchups of measured records whose training compute is known, for each comparable key.

    Metrics of unknown direction are left out, and so is a comparable key without any other metric. A key has at most
    `limit` matchups; once they are found, its remaining metrics and ways of sampling are skipped.
    """
    found = (_matchups_of_key(key, cells, limit) for key, cells in _cells_by_key(list(records)).items())
    return sorted((each for each in found if each is not None), key=lambda each: str(each.key))


def _cells_by_key(records: list[Record]) -> dict[ComparableKey, _RecordsByCell]:
    """The cells of the measured records whose training compute is known, by comparable key."""
    cells: dict[ComparableKey, _RecordsByCell] = {}
    # A cache, because the metrics of one sample set share their parts: parts -> what is computed from them. `records`
    # keeps the parts alive, so that their `id` stays unique.
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
    return cells


def _matchups_of_key(key: ComparableKey, cells: _RecordsByCell, limit: int) -> Matchups | None:
    """The matchups in the cells of one comparable key; None if no metric has a known direction."""
    directions = {
        cell: shared_direction(record for members in experiments.values() for record in members)
        for cell, experiments in cells.items()
    }
    ordered = sorted((cell for cell in cells if directions[cell] is not None), key=lambda cell: _sort_key(*cell))
    if not ordered:
        return None
    found: list[Matchup] = []
    trainings: set[tuple] = set()
    searched = 0  # number of cells
    for metric, mode, sampling in ordered:
        if len(found) >= limit:
            break
        searched += 1
        experiments = cells[metric, mode, sampling]
        trainings |= {_training_key(members[0]) for members in experiments.values()}
        groups = [group_of(members) for members in experiments.values()]
        pairs = _pairs(groups, higher_is_better=directions[metric, mode, sampling] is True)
        systems = len({id(group) for pair in pairs for group in pair})
        found += [
            Matchup(metric=metric, mode=mode, sampling=sampling, group=group, opponent=opponent, systems=systems)
            for group, opponent in pairs
        ]
    matched = {_training_key(group.records[0]) for matchup in found for group in (matchup.group, matchup.opponent)}
    return Matchups(
        key=key,
        matchups=tuple(found[:limit]),
        experiments=len(trainings),
        alone=len(trainings - matched),
        left_out=max(len(found) - limit, 0),
        skipped=len(ordered) - searched,
    )


def compute(group: Group) -> float:
    """Gflops of the whole training of the group's first checkpoint. Raises ValueError if its record does not state them."""
    training = group.records[0].training
    if training is None or training.gflops is None:
        raise ValueError(f"the training compute of {group.records[0].system} is not known")
    return training.gflops


def _pairs(groups: list[Group], *, higher_is_better: bool) -> list[tuple[Group, Group]]:
    """(group, its best opponent) for each group that has others within TOLERANCE of its compute, by compute.

    Of two groups that are each other's best opponent, only the better one has a pair.
    """
    sign = -1 if higher_is_better else 1  # sign * value is lower for the better group
    # A window of the groups within TOLERANCE of the current one moves over the groups, which are sorted by compute.
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
        # The best other group is among the first two, of which the group itself may be one.
        best = next((other for _, other in window[:2] if other != index), None)
        if best is not None:
            opponents[index] = best
    return [
        (groups[index], groups[other])
        for index, other in opponents.items()
        if opponents.get(other) != index or (sign * groups[index].value, index) < (sign * groups[other].value, other)
    ]


def _sort_key(metric: str, mode: str, sampling: str) -> tuple:
    """A sort key: metrics as in the tables, then modes, then sampler and number of steps, read from `sampling_text`."""
    sampler, _, rest = sampling.partition("-")  # "ddim-50, eta 0.5" -> "ddim", "50, eta 0.5"
    steps = rest.partition(",")[0]
    return (rank(metric), mode, sampler, int(steps) if steps.isdigit() else 0, sampling)


def _training_key(record: Record) -> tuple:
    """A key that is equal for records of one training, however it was sampled: `experiment_key` without the sampling."""
    return experiment_key(record)[:-1]
