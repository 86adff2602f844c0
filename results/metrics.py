"""What is known of a metric by its key, and whether higher or lower is better: by the record, else by the registry.

Metrics are declared in `evaluators/metrics.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from harness import registry
from results.records import Record

LOSS = "loss_"  # the prefix of the keys of losses: loss_mse, loss_vb


class KnownMetric(Protocol):
    """The part of `evaluators.metrics.Metric` that tables use; its fields are described there."""

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
    rank: float = 500  # after the built-in metrics, before metrics without a rank
    higher_is_better: bool = False

    @property
    def title(self) -> str:
        """`Loss, MSE`."""
        return f"Loss, {self.key.removeprefix(LOSS).upper()}"


def known(key: str) -> KnownMetric | None:
    """The metric of that key: a registered one, else one that a registered suite measures, else a loss; None if unknown."""
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
    """Whether higher is better for records of one metric; None if none states it or two contradict each other."""
    stated = {higher_is_better(record) for record in records} - {None}
    return stated.pop() if len(stated) == 1 else None


def rank(key: str) -> tuple[float, str]:
    """A sort key that gives the order of metrics in the tables: by rank, then by key; unknown metrics last."""
    metric = known(key)
    return (math.inf if metric is None else metric.rank, key)


@functools.lru_cache(maxsize=1)
def _of_suites(names: tuple[str, ...]) -> dict[str, KnownMetric]:
    """Key -> metric of these suites. If several suites measure a key, it is the first suite's metric.

    The cache has the names as its key, so that suites which are registered later are found.
    """
    found: dict[str, KnownMetric] = {}
    for name in names:
        for metric in registry.suites.get(name).metrics:
            found.setdefault(metric.key, metric)
    return found
