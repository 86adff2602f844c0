"""Record files: append-only JSON lines (`records.jsonl`), safe against kills, duplicates and other versions."""

import contextlib
import dataclasses
import gc
import math
import os
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path

from harness.errors import UserError
from harness.io import files
from results.lines import LineReader
from results.records import BrokenRecord, NewerSchema, Record, to_json

RECORDS_FILE = "records.jsonl"


RELATIVE_TOLERANCE = 1e-5  # threads, processors and libraries move a metric by less; a conflict is a larger difference
ABSOLUTE_TOLERANCE = 1e-6  # for metrics near 0, such as KID


class Conflict(UserError):
    """Two records with one identity and different values."""


def same_value(one: float, other: float) -> bool:
    """Whether two values of one identity are the same measurement; float32 features differ between machines in low bits."""
    return math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A line of a record file that could not be used."""

    path: str
    line: int  # from 1; 0: the file itself
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}" if self.line else f"{self.path}: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """The records of some files, and what is wrong with the files.

    records: sorted by id, without duplicates and without records in conflict: a pure function of the set of lines.
    problems: broken and newer lines. conflicts: one line of text for each identity with several values.
    """

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    conflicts: tuple[str, ...]


def append(path: str | os.PathLike, records: Iterable[Record]) -> int:
    """Add records to a file with one write, flushed to disk; returns how many were new.

    A line torn by a crash at the end of the file is cut off first; a record that the file has is not added again.
    Raises Conflict where the file has another value of the same identity, and RunError (disk full, no permission); then
    nothing is written.
    """
    path = Path(path)
    with files.appending(path) as file:
        known = _repaired(file)
        new: list[str] = []
        for record in records:
            other = known.setdefault(record.identity_sha256, record)
            if not same_value(other.value, record.value):
                raise Conflict(_conflict_text([(other, str(path)), (record, "the new measurement")]))
            if other is record:  # else the file has it, perhaps with other low bits
                new.append(to_json(record) + "\n")
        if new:
            files.append(file, "".join(new).encode("ascii"))
    return len(new)


@contextlib.contextmanager
def collector_paused():
    """Pause the garbage collector around code that makes very many objects and no cycles of them.

    Otherwise the collector takes half as long as the code itself. At the end the new objects count as old, so that they
    are not traversed soon.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()
            gc.unfreeze()
            gc.enable()


@collector_paused()
def load(paths: Iterable[str | os.PathLike], progress: Callable[[str, int, int], None] | None = None) -> Loaded:
    """Read record files. Broken and newer lines and unreadable files are listed in `problems`.

    The same record in two places is one record. Records in conflict are listed in `conflicts` and left out, so that no
    table shows a disputed number. progress: called as ("records", files read, files in all).
    """
    reader = LineReader()
    problems: list[Problem] = []
    found: dict[str, dict[str, tuple[Record, str]]] = {}  # identity -> id -> (record, file)
    names = sorted({str(path) for path in paths})
    for done, path in enumerate(names):
        if progress is not None:
            progress("records", done, len(names))
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            problems.append(Problem(path=path, line=0, reason=f"cannot be read: {error.strerror or error}"))
            continue
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                record = _parse(line, reader)
            except (BrokenRecord, NewerSchema) as error:
                problems.append(Problem(path=path, line=number, reason=str(error)))
                continue
            same = found.setdefault(record.identity_sha256, {})
            other = same.setdefault(record.id, (record, path))[0]
            if other is not record and _preference(record) < _preference(other):
                same[record.id] = (record, path)
    if progress is not None:
        progress("records", len(names), len(names))
    records, disputed = [], []
    for same in found.values():
        if len(same) == 1:
            records += [record for record, _ in same.values()]
            continue
        pairs = sorted(same.values(), key=lambda pair: _preference(pair[0]))
        values = [record.value for record, _ in pairs]
        if same_value(min(values), max(values)):
            records.append(pairs[0][0])
        else:
            disputed.append(sorted(pairs, key=lambda pair: pair[0].id))
    return Loaded(
        records=tuple(sorted(records, key=lambda record: record.id)),
        problems=tuple(problems),
        conflicts=tuple(sorted(_conflict_text(pairs) for pairs in disputed)),
    )


def find_record_files(paths: Iterable[str | os.PathLike]) -> tuple[Path, ...]:
    """The record files among `paths`: files, and every `records.jsonl` below folders.

    A file that is reached by two names or through a link is listed once.
    Raises UserError for a path that does not exist.
    """
    found: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            found.update(path.rglob(RECORDS_FILE))
        elif path.exists():
            found.add(path)
        else:
            raise UserError(f"no record file or folder {path}: name a run, a folder of runs, or a records.jsonl")
    once: dict[Path, Path] = {}
    for path in sorted(found):
        once.setdefault(path.resolve(), path)
    return tuple(once.values())


def _parse(line: bytes, reader: LineReader) -> Record:
    try:
        return reader.read(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise BrokenRecord("not UTF-8 text") from None


def _preference(record: Record) -> tuple:
    """A sort key: of two copies of one measurement, the smaller is kept. One with interval and direction comes first."""
    return (record.low is None, record.higher_is_better is None, to_json(record))


def _conflict_text(pairs: list[tuple[Record, str]]) -> str:
    first = pairs[0][0]
    values = " and ".join(f"{record.value!r} (id {record.id[:12]}, {path})" for record, path in pairs)
    return (
        f"conflict: {first.metric} of {first.system} on {first.protocol} has one identity "
        f"({first.identity_sha256[:12]}) and the values {values}; remove the wrong one"
    )


def _repaired(file: FileIO) -> dict[str, Record]:
    """The records of an open file by identity, after a line torn at its end has been cut off or completed."""
    file.seek(0)
    content = file.read()
    *lines, tail = content.split(b"\n")
    known: dict[str, Record] = {}
    reader = LineReader()
    for line in lines:
        with contextlib.suppress(BrokenRecord, NewerSchema):  # `load` lists them; they are not repaired here
            record = _parse(line, reader)
            known.setdefault(record.identity_sha256, record)
    if tail:
        try:
            record = _parse(tail, reader)
        except (BrokenRecord, NewerSchema):
            file.truncate(len(content) - len(tail))
        else:  # only the newline is missing
            known.setdefault(record.identity_sha256, record)
            files.append(file, b"\n")
    return known
