"""Records as a table of pandas: one row per record, a column for each field of the record and of its parts."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from results.checked_fields import field_types
from results.metrics import higher_is_better
from results.records import Environment, Evaluation, Record, Sampling, Source, Training
from results.store import find_record_files, load

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

PARTS = {
    "training": Training,
    "sampling": Sampling,
    "evaluation": Evaluation,
    "environment": Environment,
    "source": Source,
}
MAX_BITS = 63  # of the absolute value of an integer that fits Int64
_DTYPES = {str: "string", int: "Int64", float: "float64", bool: "boolean", Mapping: "object"}


def load_records(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """The records of record files as a DataFrame: one row per record, sorted by id, the same columns for every input.

    paths: a record file, a folder that is searched for every `records.jsonl` below it, or several of either.

    Columns, in this order, with pandas' nullable dtypes (text: string, integers: Int64, bools: boolean; floating
    point numbers are float64). What is not known is missing (NA or NaN), as is an integer that does not fit Int64.

    - `id`, `identity_sha256`: of the record; two values of one identity that differ by more than 1e-5
      (relative) are a conflict.
    - `metric`, `value`, `low`, `high`, `interval`: the measurement, the ends of its interval and the interval's method;
      `higher_is_better`: from the record, or else from the registered metric; missing where neither states it.
    - `n` (images evaluated), `provenance`, `protocol`, `protocol_version`, `resolution` (pixels per side), `dataset`,
      `system`, `backbone`, `kind`, `framework`, `params`, `gflops` and `gflops_published_input` (per forward
      pass), `gflops_source` (traced, or None).
    - the fields of `results.records.Training`, `Sampling`, `Evaluation`, `Environment` and `Source`, with the name of the
      part in front: `training_steps`, `training_seed`, `sampling_steps`, `sampling_evaluations`, `evaluation_suite`,
      `environment_device`, `source_table`, ... `environment_versions` holds a dict per record (library -> version).

    Lines that cannot be used and records in conflict are left out; each is logged as a warning.
    Raises UserError for a path that does not exist.

        frame = harness.load_records("runs")
        frame[frame.metric == "fd"].groupby(["system", "training_steps"]).value.agg(["mean", "min", "max"])
    """
    given = list(paths) if isinstance(paths, Iterable) and not isinstance(paths, str) else [paths]
    loaded = load(find_record_files(given))
    for problem in (*loaded.problems, *loaded.conflicts):
        logger.warning("%s", problem)
    return to_frame(loaded.records)


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Records as a DataFrame with the columns of `load_records`, in the order given."""
    import pandas as pd

    records = list(records)
    columns: dict[str, pd.Series] = {}

    def add(name: str, values: list[Any], kind: type) -> None:
        if kind is int:  # pandas raises OverflowError for integers that do not fit Int64
            values = [None if value is None or value.bit_length() > MAX_BITS else value for value in values]
        columns[name] = pd.Series(values, dtype=_DTYPES[kind])

    add("id", [record.id for record in records], str)
    add("identity_sha256", [record.identity_sha256 for record in records], str)
    types = field_types(Record)
    for name in RECORD_FIELDS:
        if name == "higher_is_better":
            add(name, [higher_is_better(record) for record in records], bool)
        else:
            add(name, [getattr(record, name) for record in records], types[name])
    for part, kind in PARTS.items():
        parts = [getattr(record, part) for record in records]
        for name, hint in field_types(kind).items():
            add(f"{part}_{name}", [None if value is None else getattr(value, name) for value in parts], hint)
    return pd.DataFrame(columns)


_FIRST = ("metric", "value", "low", "high", "interval", "higher_is_better", "n")
RECORD_FIELDS = (
    *_FIRST,
    *(field.name for field in dataclasses.fields(Record) if field.name not in (*_FIRST, *PARTS, "schema")),
)
"""The fields of `Record` itself, not of its parts, in the order of their columns."""
