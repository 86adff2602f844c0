"""Record files: append-only JSON lines (`records.jsonl`), safe against kills, duplicates and other versions."""

import contextlib
import dataclasses
import gc
import math
import os
import re
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path

from harness.errors import UserError, shown
from harness.io import files
from harness.io.text import check_plain
from results.checked_fields import BrokenRecord
from results.lines import LineReader
from results.records import NewerSchema, Record, to_json

RECORDS_FILE = "records.jsonl"
LONGEST = 1 << 32  # bytes of a record file, which is read as a whole
HEAD_BYTES = 1 << 20  # of a file that are read to tell whether it holds records

# Threads, processors and libraries change a metric by less; a larger difference is a conflict.
RELATIVE_TOLERANCE = 1e-5
ABSOLUTE_TOLERANCE = 1e-6  # for metrics near 0, such as KID


class Conflict(UserError):
    """Two records with one identity and different values."""


def same_value(one: float, other: float) -> bool:
    """Whether two values of one identity count as equal: float32 features differ between machines in low bits."""
    return math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A line of a record file that could not be used."""

    path: str
    line: int  # from 1; 0: the whole file
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}" if self.line else f"{self.path}: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """The records of some files, and what is wrong with the files.

    records: sorted by id, without duplicates and without records in conflict: a pure function of the set of lines.
    problems: unreadable files, broken lines, and lines of a newer schema. conflicts: a sentence for each identity with
    conflicting values.
    """

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    conflicts: tuple[str, ...]


def append(path: str | os.PathLike, records: Iterable[Record]) -> int:
    """Append records to a file with one write, flushed to disk; returns how many were new.

    An incomplete last line, left by a crash, is cut off first. A record whose identity the file already has is not added
    again. Raises Conflict if the file has a different value of the same identity (see `same_value`), and RunError (disk
    full, no permission); then no record is written.
    """
    path = Path(path)
    check_record_file(path)
    with files.appending(path) as file:
        known = _repair_and_read(file)
        new: list[str] = []
        for record in records:
            other = known.setdefault(record.identity_sha256, record)
            if not same_value(other.value, record.value):
                raise Conflict(_conflict_text([(other, str(path)), (record, "the new measurement")]))
            if other is record:  # else the file has this identity already, perhaps with other low bits of the value
                new.append(to_json(record) + "\n")
        if new:
            files.append(file, "".join(new).encode("ascii"))
    return len(new)


def check_record_file(path: Path) -> None:
    """UserError where the file at `path` holds something else than records, which nothing may be appended to."""
    check_plain(path, "record file")
    try:
        if not path.is_file() or path.stat().st_size == 0 or _holds_records(path):
            return
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return  # writing will say it
    # a first record that a crash has cut, or records that were edited
    first = re.match(rb'\s*{"([a-z_]+)":', head)
    names = {"id", "interval_check", "schema", *(field.name for field in dataclasses.fields(Record))}
    if head.strip() and (first is None or first[1].decode() not in names):
        raise UserError(f"{path} holds something else than records and is left as it is; name another record file")


@contextlib.contextmanager
def collector_paused():
    """Pause the garbage collector around code that makes very many objects and no reference cycles.

    Otherwise the collector takes half as long as the code itself. At the end the new objects are moved to the oldest
    generation, so that they are not traversed soon.
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

    Copies of a record are loaded once, and values of one identity that `same_value` counts as equal are one record.
    Records in conflict are listed in `conflicts` and left out, so that no table shows a disputed number. A share of copies
    that was sought in the reference images is left out if it was sought in the training images too. progress: called
    as ("records", files read, files in all).
    """
    reader = LineReader()
    problems: list[Problem] = []
    found: dict[str, dict[str, tuple[Record, str]]] = {}  # identity -> id -> (record, file)
    names = sorted({str(path) for path in paths})
    for done, path in enumerate(names):
        if progress is not None:
            progress("records", done, len(names))
        try:
            check_plain(Path(path), "record file", LONGEST)
            content = Path(path).read_bytes()
        except OSError as error:
            problems.append(Problem(path=path, line=0, reason=f"cannot be read: {error.strerror or error}"))
            continue
        except UserError as error:  # no plain file
            problems.append(Problem(path=path, line=0, reason=str(error)))
            continue
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                record = _parse(line, reader)
            except (BrokenRecord, NewerSchema) as error:
                problems.append(Problem(path=path, line=number, reason=str(error)))
                continue
            by_id = found.setdefault(record.identity_sha256, {})
            other = by_id.setdefault(record.id, (record, path))[0]
            # Two records of one id may still differ in interval, direction and environment.
            if other is not record and _preference(record) < _preference(other):
                by_id[record.id] = (record, path)
    if progress is not None:
        progress("records", len(names), len(names))
    _drop_superseded(found)
    records, disputed = [], []
    for by_id in found.values():
        if len(by_id) == 1:
            records += [record for record, _ in by_id.values()]
            continue
        pairs = sorted(by_id.values(), key=lambda pair: _preference(pair[0]))
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
    """The record files in `paths`: files as they are; below folders every `records.jsonl`, and every other *.jsonl that
    holds records, as `harness evaluate --out` writes it; sorted.

    A file that is reached by two names or through a link is listed once.
    Raises UserError for a path that does not exist.
    """
    found: set[Path] = set()
    for given in paths:
        if not isinstance(given, str | os.PathLike):
            raise UserError(f"{shown(given)} is no path of records: name a run, a folder of runs, or a records.jsonl")
        path = Path(given)
        if os.path.isdir(path):  # noqa: PTH112  # of a name that is too long, Path.is_dir raises OSError
            try:
                logs = (
                    each for each in path.rglob("*.jsonl") if each.is_file() or each.is_dir()
                )  # opening a pipe may wait for ever
                found.update(each for each in logs if each.name == RECORDS_FILE or _holds_records(each))
            except OSError as error:  # such as a folder that changes meanwhile
                where = error.filename or path
                raise UserError(f"{path} cannot be searched for records: {where}: {error.strerror or error}") from error
        elif os.path.exists(path):  # noqa: PTH110
            found.add(path)
        else:
            raise UserError(f"no record file or folder {path}: name a run, a folder of runs, or a records.jsonl")
    by_target: dict[Path, Path] = {}  # resolved path -> the first path that leads to it
    for path in sorted(found):
        by_target.setdefault(path.resolve(), path)
    return tuple(by_target.values())


def _holds_records(path: Path) -> bool:
    """Whether a file has a record, of this or of a newer schema, in its first HEAD_BYTES; other logs are *.jsonl, too."""
    try:
        with path.open("rb") as file:
            lines = file.read(HEAD_BYTES).split(b"\n")
    except OSError:
        return False
    reader = LineReader()
    for line in lines:
        if b'"metric"' not in line:
            continue
        try:
            _parse(line, reader)
        except BrokenRecord:  # such as a line that a crash has cut
            continue
        except NewerSchema:
            return True
        return True
    return False


def _parse(line: bytes, reader: LineReader) -> Record:
    """The record of a line. Raises BrokenRecord and NewerSchema, also for a line that is not UTF-8."""
    try:
        return reader.read(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise BrokenRecord("not UTF-8 text") from None


def _preference(record: Record) -> tuple:
    """A sort key: of two records of one identity the smaller is kept. One with an interval and a direction comes first."""
    return (record.low is None, record.higher_is_better is None, to_json(record))


def _drop_superseded(found: dict[str, dict[str, tuple[Record, str]]]) -> None:
    """Remove from `found` (see `load`) what was sought in the reference images before it was sought in the training images,
    and what was measured with other code of a plug-in than the newest measurement."""
    by_code: dict[str, list[tuple[str, str]]] = {}  # identity without the code -> (time, identity) of measurements
    for identity, by_id in found.items():
        record = next(iter(by_id.values()))[0]
        if record.evaluation is not None and record.evaluation.code_sha256 is not None:
            evaluation = dataclasses.replace(record.evaluation, code_sha256=None)
            time = record.environment.time if record.environment else None
            without_code = dataclasses.replace(record, evaluation=evaluation).identity_sha256
            by_code.setdefault(without_code, []).append((time or "", identity))
    for without_code, measured in by_code.items():
        found.pop(without_code, None)  # from before the code was recorded
        for _, identity in sorted(measured)[:-1]:
            del found[identity]
    for by_id in list(found.values()):
        record = next(iter(by_id.values()))[0]
        if record.evaluation is not None and record.evaluation.training_sha256 is not None:
            evaluation = dataclasses.replace(record.evaluation, training_sha256=None)
            found.pop(dataclasses.replace(record, evaluation=evaluation).identity_sha256, None)


def _conflict_text(pairs: list[tuple[Record, str]]) -> str:
    """The message for records of one identity with conflicting values. pairs: (record, its file)."""
    first = pairs[0][0]
    values = " and ".join(f"{record.value!r} (id {record.id[:12]}, {path})" for record, path in pairs)
    return (
        f"conflict: {first.metric} of {first.system} on {first.protocol} has one identity "
        f"({first.identity_sha256[:12]}) and the values {values}; remove the wrong one"
    )


def _repair_and_read(file: FileIO) -> dict[str, Record]:
    """Repair the end of an open file in place, and return its records: identity_sha256 -> record.

    Without a newline at the end, the last line was left by a crash: a whole record gets its newline, also one of a newer
    schema, and anything else is cut off.
    """
    file.seek(0)
    content = file.read()
    *lines, tail = content.split(b"\n")
    known: dict[str, Record] = {}
    reader = LineReader()
    for line in lines:
        with contextlib.suppress(BrokenRecord, NewerSchema):  # `load` reports such lines; here they stay in the file
            record = _parse(line, reader)
            known.setdefault(record.identity_sha256, record)
    if tail:
        try:
            record = _parse(tail, reader)
        except BrokenRecord:
            file.truncate(len(content) - len(tail))
        except NewerSchema:
            files.append(file, b"\n")
        else:  # only the newline is missing
            known.setdefault(record.identity_sha256, record)
            files.append(file, b"\n")
    return known
