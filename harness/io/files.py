"""Files that are either whole or not there: written under another name, synced, then renamed."""

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

PARTIAL = ".partial"  # ending of a name that is not final yet
LOCK_ATTEMPTS, LOCK_SECONDS = 5, 0.25  # until a lock is believed to be another's


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON under `path`, atomically."""
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write `data` under `path`, atomically; `shared` as in `replacing`."""
    with replacing(path, shared=shared) as file:
        file.write(data)


@contextmanager
def appending(path: Path) -> Iterator[FileIO]:
    """The file at `path`, open to be read and appended to, for this process alone; another one waits until it is closed.

    It is created where it is missing. RunError for what the system refuses.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        created = not path.exists()
        with FileIO(path, "a+") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)  # the kernel drops it when the file is closed
            yield file
        if created:
            sync_folder(path.parent)


def append(file: FileIO, data: bytes) -> None:
    """Append all of `data` to an open file and sync it, or leave the file as it was."""
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
    """A file to write, which appears as `path` when it is complete and on the disk; after an error nothing is left.

    shared: other processes may write the same path at the same time, so the incomplete file gets a name of its own.
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
    """The name under which `path` is made, for this process alone: another one that wants it is refused at once.

    What a killed process left is found there. The kernel drops the claim on any death; the caller renames the file, or
    leaves it to be continued.
    """
    partial = path.with_name(path.name + PARTIAL)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is making {path}; wait for it or stop it") from None
        yield partial
    finally:
        if partial.exists() and partial.stat().st_size == 0:
            partial.unlink(missing_ok=True)
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Take the lock of an open file, until the last copy of its descriptor is closed; False where another has it."""
    for attempt in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:  # perhaps only somebody who looks
            if attempt + 1 < LOCK_ATTEMPTS:
                time.sleep(LOCK_SECONDS / LOCK_ATTEMPTS)
    return False


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of the file at `path`. Takes it for an instant, which `lock` allows for."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def read_json(path: Path, what: str) -> Any:
    """The JSON document at `path`; `what` names it in the refusal when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{what} {path} is not valid JSON ({error}); it may have been edited or cut") from error


def sync_folder(path: Path) -> None:
    """Make a rename in `path` last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of `path` last through a power cut."""
    sync_folder(path)  # the same two calls serve a file


def sha256_file(path: Path) -> str:
    """Content hash of a file, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(data: Any) -> str:
    """Hash of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def remove(path: Path) -> None:
    """Remove a file or a folder that is ours, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says about writing `path` into one line: disk full, no permission, and the like."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"the disk is full, {path} could not be written; free some space and repeat the command"
            ) from error
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error
