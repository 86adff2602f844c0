"""Batches made one ahead, by a thread, while the batch before them is in use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class ReadAhead(Generic[Batch]):
    """Calls `make` of a range of positions in the stream of examples, one call ahead. The range alone decides the result.

    All calls are made by one thread, one after the other, so `make` may keep a state.
    """

    def __init__(self, make: Callable[[range], Batch]):
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: tuple[range, Future[Batch]] | None = None

    def take(self, positions: range, following: range | None) -> Batch:
        """`make(positions)`, and begin `make(following)` unless it is None. An error of `make` is raised where it is taken."""
        ahead, self._ahead = self._ahead, None
        future = ahead[1] if ahead is not None and ahead[0] == positions else self._thread.submit(self._make, positions)
        batch = future.result()
        if following is not None:
            self._ahead = following, self._thread.submit(self._make, following)
        return batch
