"""Files that are complete or absent: written under another name, synced, then renamed; locks, JSON and content hashes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

from harness.errors import RunError, UserError
from harness.io.text import LONGEST_JSON, check_plain, parse_json

PARTIAL = ".partial"  # suffix of a file or folder that is not complete yet
LOCK_ATTEMPTS, LOCK_SECONDS = 5, 0.25  # attempts, and the seconds they take together, before a lock counts as taken


def write_json(path: Path, data: object) -> None:
    """Write `data` as JSON under `path`, atomically."""
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write `data` under `path`, atomically; `shared` as in `replacing`."""
    with replacing(path, shared=shared) as file:
        file.write(data)


@contextmanager
def appending(path: Path) -> Iterator[FileIO]:
    """Yields the file at `path`, made if it is missing, open for reading and appending and locked for this process.

    A second process that opens it with this function waits until it is closed. RunError where the system cannot write.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        created = not path.exists()
        with FileIO(path, "a+") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)  # the kernel releases it when the file is closed
            yield file
        if created:
            sync_folder(path.parent)


def append(file: FileIO, data: bytes) -> None:
    """Append all of `data` to an open file and sync it. After an OSError the file is as it was before."""
    size = file.seek(0, os.SEEK_END)
    try:
        written = 0
        while written < len(data):  # one write in practice; a nearly full disk may take only a part
            written += file.write(data[written:])
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            os.ftruncate(file.fileno(), size)
        raise


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[IO[bytes]]:
    """Yields a binary file to write to. After the block it is synced to the disk and replaces `path`.

    shared: whether other processes may write the same path at the same time; then the incomplete file has a random name.
    After an error `path` is as it was before, and nothing else is left. RunError where the system cannot write.
    """
    ending = f".{secrets.token_hex(4)}{PARTIAL}" if shared else PARTIAL
    partial = path.with_name(path.name + ending)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """Yields the file `path`.partial, made if it is missing and locked for this process.

    UserError where another process holds the lock, which means that it is making `path`. The file may hold what a killed
    process wrote. The caller renames it when it is complete, or leaves it to be continued; an empty one is removed. The
    kernel releases the lock when the process ends, however it ends.
    """
    partial = path.with_name(path.name + PARTIAL)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with explained(path):
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock_or_refuse(descriptor, path)
            if _is_at(descriptor, partial):  # else its last holder removed or renamed it before it was locked here
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield partial
    finally:
        os.close(descriptor)  # releases the lock, which `_remove_empty` takes again
        _remove_empty(partial)


@contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """Within the block `folder`, made if it is missing, is locked for this process; UserError as in `claimed`."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock_or_refuse(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _remove_empty(path: Path) -> None:
    """Remove the file at `path` if it is empty and no process has locked it: the name may be another's by now."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if lock(descriptor) and _is_at(descriptor, path) and os.fstat(descriptor).st_size == 0:
                path.unlink()
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock_or_refuse(descriptor: int, path: Path) -> None:
    """Lock an open file or folder; UserError, which names `path`, where another process holds the lock."""
    if not lock(descriptor):
        raise UserError(f"another process is making {path}; wait for it or stop it")


def lock(descriptor: int) -> bool:
    """Lock an open file or folder exclusively, until the last copy of its descriptor is closed. Returns whether it is locked.

    False: another process holds the lock. The attempts take LOCK_SECONDS, because `is_locked` in another process holds
    the lock for an instant.
    """
    for attempt in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt + 1 < LOCK_ATTEMPTS:
                time.sleep(LOCK_SECONDS / LOCK_ATTEMPTS)
    return False


def is_locked(path: Path) -> bool:
    """Whether a process holds the exclusive lock of the file at `path`; False where the file cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # fails only if a process holds the exclusive lock
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def read_json(path: Path, what: str) -> Any:
    """The JSON document at `path`. UserError where it is missing or broken; `what` names it in the message."""
    check_plain(path, what, LONGEST_JSON)
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"), finite=True)
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{what} {path} is not valid JSON ({error}); it may have been edited or cut") from error


def sync_folder(path: Path) -> None:
    """Flush the entries of the folder `path` to the disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush the content of the file `path` to the disk, so that it survives a power cut."""
    sync_folder(path)  # the system calls are the same


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, streamed; hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(data: object) -> str:
    """SHA-256 of `data` as JSON with sorted keys; hexadecimal."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def check_output(path: Path, flag: str) -> None:
    """UserError where the file `path` cannot be written, before the work whose result it is to hold. flag: that named it."""
    try:
        if path.is_dir():
            raise UserError(f"{flag} {path} is a folder; name a file in it")
        if path.exists() and not path.is_file():
            raise UserError(f"{flag} {path} is a device or a pipe and no file; name another place")
        if path.is_symlink() and not path.exists():  # writing would replace the link
            raise UserError(f"{flag} {path} is a link to nothing; name another place")
        place = path if path.exists() else next(each for each in path.absolute().parents if each.exists())
        if place != path and not place.is_dir():
            raise UserError(f"{flag} {path}: {place} is a file and no folder; name another place")
        if not os.access(place, os.W_OK):
            raise UserError(
                f"{flag} {path} cannot be written: {place} is read-only, or yours to read alone; name another place"
            )
    except OSError as error:  # a name that is too long
        raise UserError(f"{flag} {path}: {error.strerror or error}; name another place") from error


def remove(path: Path) -> None:
    """Remove the file, link or folder `path`, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path` (disk full, no permission, ...) into a RunError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"the disk is full, {path} could not be written; free some space and repeat the command"
            ) from error
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error
