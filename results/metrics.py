"""What is known of a metric by its key, and which way it is better: as the record states it, else as the registry does."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from harness import registry
from results.records import Record

LOSS = "loss_"  # what the keys of losses begin with: loss_mse, loss_vb


class KnownMetric(Protocol):
    """The part of `evaluators.metrics.Metric` that tables use."""

    @property
    def key(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def title_elsewhere(self) -> str: ...
    @property
    def names_n(self) -> bool: ...
    @property
    def rank(self) -> float: ...
    @property
    def higher_is_better(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A term of a training loss. No evaluator measures it, and lower is better by definition."""

    key: str
    title_elsewhere: str = ""
    names_n: bool = False
    rank: float = 500  # behind the built-in metrics, before metrics without a rank
    higher_is_better: bool = False

    @property
    def title(self) -> str:
        """`Loss, MSE`."""
        return f"Loss, {self.key.removeprefix(LOSS).upper()}"


def known(key: str) -> KnownMetric | None:
    """The metric of that key: a registered one, one that a registered suite measures, or a loss. None: not known."""
    if key in registry.metrics:
        return registry.metrics.get(key)
    found = _of_suites(tuple(registry.suites.names())).get(key)
    if found is None and key.startswith(LOSS):
        return Loss(key=key)
    return found


def higher_is_better(record: Record) -> bool | None:
    """Whether a higher value is better; None where neither the record nor the registry states it."""
    if record.higher_is_better is not None:
        return record.higher_is_better
    metric = known(record.metric)
    return None if metric is None else metric.higher_is_better


def shared_direction(records: Iterable[Record]) -> bool | None:
    """Whether higher is better for records of one metric; None where none of them states it or two contradict."""
    stated = {higher_is_better(record) for record in records} - {None}
    return stated.pop() if len(stated) == 1 else None


def rank(key: str) -> tuple[float, str]:
    """A sort key: the metrics in the order of the tables, by rank and then by key."""
    metric = known(key)
    return (math.inf if metric is None else metric.rank, key)


@functools.lru_cache(maxsize=1)
def _of_suites(names: tuple[str, ...]) -> dict[str, KnownMetric]:
    """Key -> metric of these suites; the first suite that measures a key wins."""
    found: dict[str, KnownMetric] = {}
    for name in names:
        for metric in registry.suites.get(name).metrics:
            found.setdefault(metric.key, metric)
    return found
