"""Who is best at the same training compute: every experiment against its best opponent of about the same compute."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from results.compare import Group, Verdict, experiment, group_of, sampling_text, verdict_of
from results.metrics import rank, shared_direction
from results.records import ComparableKey, Record, comparable_key

TOLERANCE = 0.02  # by which the larger training compute of two may exceed the smaller one


@dataclass(frozen=True, kw_only=True)
class Matchup:
    """An experiment and its opponent: of the others with the same compute, metric, sampling and comparable key the best.

    Where two experiments are each other's opponent, only the better one has a matchup.
    """

    metric: str
    mode: str
    sampling: str
    group: Group
    opponent: Group

    @property
    def gflops(self) -> tuple[float, float]:
        """Training compute of both."""
        return compute(self.group), compute(self.opponent)

    def verdict(self) -> Verdict:
        """Win, tie or loss of the experiment, by the rule of `compare`."""
        return verdict_of(self.metric, self.sampling, self.group, self.opponent)


@dataclass(frozen=True, kw_only=True)
class Matchups:
    """The matchups of records that may share a table.

    experiments: number of trained experiments, however sampled, among the metrics and ways of sampling that were looked
    at. alone: number of those without an opponent. skipped: number of pairs of metric and way of sampling that were not
    looked at.
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
    records = list(records)  # held, so that the ids of their parts stay unique
    cells: dict[ComparableKey, dict[tuple[str, str, str], dict[tuple, list[Record]]]] = {}
    known: dict[tuple, tuple[ComparableKey, tuple, str, str]] = {}  # the metrics of one sample set share their parts
    for record in records:
        if record.provenance == "measured" and record.training and record.training.gflops:
            parts = (
                id(record.training), id(record.sampling), id(record.evaluation), record.system, record.backbone,
                record.framework, record.protocol, record.protocol_version, record.dataset, record.resolution, record.n,
            )  # fmt: skip
            if parts not in known:
                mode = (record.evaluation.mode if record.evaluation else None) or ""
                known[parts] = (comparable_key(record), experiment(record), mode, sampling_text(record))
            key, trained, mode, sampling = known[parts]
            cell = cells.setdefault(key, {}).setdefault((record.metric, mode, sampling), {})
            cell.setdefault(trained, []).append(record)
    result = []
    for key, found in cells.items():
        directions = {
            names: shared_direction(record for members in experiments.values() for record in members)
            for names, experiments in found.items()
        }
        ordered = sorted((names for names in found if directions[names] is not None), key=lambda names: _order(*names))
        if not ordered:
            continue
        made: list[Matchup] = []
        everyone: set[tuple] = set()
        looked_at = 0
        for metric, mode, sampling in ordered:
            if len(made) >= most:
                break
            looked_at += 1
            experiments = found[metric, mode, sampling]
            everyone |= {_run(members[0]) for members in experiments.values()}
            sign = -1 if directions[metric, mode, sampling] else 1
            made += [
                Matchup(metric=metric, mode=mode, sampling=sampling, group=group, opponent=opponent)
                for group, opponent in _pairs([group_of(members) for members in experiments.values()], sign)
            ]
        matched = {_run(group.records[0]) for each in made for group in (each.group, each.opponent)}
        result.append(
            Matchups(
                key=key,
                matchups=tuple(made[:most]),
                experiments=len(everyone),
                alone=len(everyone - matched),
                skipped=len(ordered) - looked_at,
            )
        )
    return sorted(result, key=lambda each: str(each.key))


def compute(group: Group) -> float:
    """Gflops of the whole training of one checkpoint of the group. Raises ValueError where a record does not state it."""
    training = group.records[0].training
    if training is None or training.gflops is None:
        raise ValueError(f"the training compute of {group.records[0].system} is not known")
    return training.gflops


def _pairs(groups: list[Group], sign: int) -> list[tuple[Group, Group]]:
    """Each group that has others within the tolerance, with the best of them. sign: 1 where lower is better, else -1."""
    groups = sorted(groups, key=lambda group: (compute(group), group.records[0].system, group.records[0].id))
    costs = [compute(group) for group in groups]
    window: list[tuple[float, int]] = []  # (how bad, index), best first
    first = last = 0
    opponents: dict[int, int] = {}
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


def _order(metric: str, mode: str, sampling: str) -> tuple:
    """Metrics as in the tables; ways of sampling by name and number of steps."""
    sampler, _, rest = sampling.partition("-")
    steps = rest.partition(",")[0]
    return (rank(metric), mode, sampler, int(steps) if steps.isdigit() else 0, sampling)


def _run(record: Record) -> tuple:
    """What was trained, however it was sampled: all of the experiment but the last entry."""
    return experiment(record)[:-1]
