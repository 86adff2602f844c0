"""One file over HTTP, in pieces if need be: what has come is kept beside the final name and continued.

A download is continued with Range and, where the server gave a strong ETag or a date, If-Range; without either it is
continued only if the whole length is still the same. Whether the result is the right file is the caller's to decide.
"""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from harness._version import VERSION
from harness.errors import RunError, UserError
from harness.io import files
from harness.io.progress import Bar

CHUNK_BYTES = 1 << 18
TIMEOUT_SECONDS = 30.0  # without a byte
TRIES = 5  # in a row without a byte
PAUSE_SECONDS = 1.0  # before the second try, doubled before each further one
MAX_BYTES = 64 << 30
PASSING = (408, 425, 429, 500, 502, 503, 504)  # what a server says when it may be better later


class Unreachable(UserError):
    """Nothing could be had from this address."""


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """What the bytes that are there came from. total: of the whole file; None: not said."""

    url: str
    validator: str | None
    total: int | None


def download(
    url: str,
    partial: Path,  # what has come; continued if it is of this address
    *,
    title: str,
    check: Callable[[bytes, int | None], object],  # (first bytes, whole length) -> UserError where it is another file
    most: int = MAX_BYTES,
) -> None:
    """Fetch `url` into `partial`. Unreachable when nothing can be had, RunError when it breaks off and stays so: then the
    same call continues."""
    if re.match(r"https?://[^/\s]", url, re.IGNORECASE) is None:
        raise UserError(f"{url!r} is no address: give one that begins with https:// or http://")
    job = _Job(url, partial, title, check, most)
    tries, pause = 0, PAUSE_SECONDS
    while True:
        before = job.have
        try:
            with files.explained(partial):
                job.attempt()
            return
        except _Interrupted as error:
            moved = job.have > before
            tries, pause = (1, PAUSE_SECONDS) if moved else (tries + 1, pause)
            if not job.connected:
                raise Unreachable(f"{url} cannot be reached ({error})") from error
            if tries >= TRIES:
                whole = "" if job.total is None else f" of {job.total:,}"
                raise RunError(
                    f"{url} broke off at {job.have:,}{whole} bytes ({error}); the same command continues from there"
                ) from error
        time.sleep(pause)
        pause *= 2


class _Interrupted(Exception):
    """The connection did not hold, or the server is busy: try again."""


class _Job:
    def __init__(self, url: str, partial: Path, title: str, check: Callable, most: int):
        self.url, self.partial, self.title, self.check, self.most = url, partial, title, check, most
        self.connected = False
        self.total: int | None = None

    @property
    def have(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    def attempt(self) -> None:
        origin = _read_origin(self.partial)
        have = self.have
        if have and (origin is None or origin.url != self.url or origin.total is None or have > origin.total):
            have = 0
        if have and have == origin.total:
            return  # killed between the last byte and the end
        request = urllib.request.Request(self.url, headers={"User-Agent": f"backbone-harness/{VERSION}"})
        if have:
            request.add_header("Range", f"bytes={have}-")
            if origin.validator:
                request.add_header("If-Range", origin.validator)
        try:
            response = _OPENER.open(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                self._said_no(error, have)
            return self.attempt()  # 416: from the start
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(_reason(error)) from error
        with response:
            self.connected = True
            start, self.total = _span(response, have)
            if start and (start != have or self.total != origin.total):
                start = None  # another file by now, or a server that does not count
            if start is None:
                if not have:
                    raise Unreachable(f"{self.url} answers with a part of the file where the whole was asked for")
                _origin_path(self.partial).unlink(missing_ok=True)
                return self.attempt()
            if self.total is not None and self.total > self.most:
                raise UserError(f"{self.url} is {self.total:,} bytes, more than the {self.most:,} it may be")
            self._receive(response, start)

    def _said_no(self, error: urllib.error.HTTPError, have: int) -> None:
        if error.code == 416 and have:
            _origin_path(self.partial).unlink(missing_ok=True)
            return
        text = f"HTTP {error.code} {error.reason}".strip()
        if error.code in PASSING:
            self.connected = True
            raise _Interrupted(text) from None
        raise Unreachable(f"{self.url} cannot be had ({text})") from None

    def _receive(self, response: http.client.HTTPResponse, start: int) -> None:
        head = b"" if start == 0 else None
        with self.partial.open("r+b" if self.partial.exists() else "wb") as file:
            file.truncate(start)
            file.seek(start)
            if start == 0:
                origin = _Origin(url=self.url, validator=_validator(response), total=self.total)
                files.write_json(_origin_path(self.partial), asdict(origin))
            with Bar(self.title, _megabytes(self.total or 0), "MB", done=_megabytes(start)) as bar:
                self._copy(response, file, start, head, bar)

    def _copy(
        self, response: http.client.HTTPResponse, file: IO[bytes], done: int, head: bytes | None, bar: Bar
    ) -> None:
        try:
            while True:
                try:
                    data = response.read1(CHUNK_BYTES)
                except (OSError, http.client.HTTPException) as error:
                    raise _Interrupted(_reason(error)) from error
                if head is not None and len(head) < 16:
                    head += data[:16]
                    if len(head) >= 16 or not data:
                        self.check(head, self.total)
                file.write(data)
                done += len(data)
                if done > self.most:
                    raise UserError(f"{self.url} is more than the {self.most:,} bytes it may be")
                bar.total = max(bar.total, _megabytes(done))  # where the server did not say
                bar.advance(_megabytes(done) - bar.done)
                if not data:
                    break
        finally:
            file.flush()
        if self.total is not None and done < self.total:
            raise _Interrupted("the connection was closed")
        files.sync_file(self.partial)


def forget(partial: Path) -> None:
    """Begin anew: drop what has come, and where it came from. The file stays, for somebody may hold a claim on it."""
    _origin_path(partial).unlink(missing_ok=True)
    if partial.exists():
        os.truncate(partial, 0)


def _opener() -> urllib.request.OpenerDirector:
    # urllib's own opener reads file:, ftp: and data: as well
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.UnknownHandler, urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


_OPENER = _opener()


def _span(response: http.client.HTTPResponse, have: int) -> tuple[int | None, int | None]:
    """(place of the first byte that comes, length of the whole file); place None: not what was asked for."""
    length = response.headers.get("Content-Length", "")
    if response.status != 206:
        return 0, int(length) if length.isdigit() else None
    match = re.fullmatch(r"bytes ([0-9]+)-([0-9]+)/([0-9]+)", response.headers.get("Content-Range", "").strip())
    if match is None or not have:
        return None, None
    return int(match[1]), int(match[3])


def _validator(response: http.client.HTTPResponse) -> str | None:
    """What If-Range takes: a strong ETag, or a date."""
    tag = response.headers.get("ETag", "").strip()
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _origin_path(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _read_origin(partial: Path) -> _Origin | None:
    try:
        found = files.read_json(_origin_path(partial), "")
        return _Origin(url=str(found["url"]), validator=found["validator"], total=found["total"])
    except (UserError, KeyError, TypeError):
        return None


def _megabytes(count: int) -> int:
    return -(-count // 1_000_000)


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return f"no answer in {TIMEOUT_SECONDS:.0f} s"
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return " ".join(str(text).split())
