"""Downloads one file over HTTP and continues a download that broke off.

The bytes received are stored in a partial file, and their origin (`_Origin`) in a JSON file beside it. A download is
continued by a Range request, with If-Range if the server gave a strong ETag or a date. It begins again if the total
length was not known or has changed. The caller checks that the result is the right file.
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
TIMEOUT_SECONDS = 30.0  # to wait for the next byte
TRIES = 5  # attempts in a row before giving up; an attempt that receives bytes begins a new row
PAUSE_SECONDS = 1.0  # before the second attempt, doubled before each further one
MAX_BYTES = 64 << 30
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)  # HTTP status codes after which another attempt may succeed
START_BYTES = 16  # enough of a file to recognise it


class Unreachable(UserError):
    """An address cannot be reached, or the server does not give the file."""


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Where the bytes of a partial file came from.

    validator: for If-Range; None: the server gave none. total: bytes of the whole file; None: unknown.
    """

    url: str
    validator: str | None
    total: int | None


def download(
    url: str,
    partial: Path,
    *,
    title: str,
    check: Callable[[bytes, int | None], object],
    max_bytes: int = MAX_BYTES,
) -> None:
    """Download `url` into `partial`, continuing it if its bytes came from the same address.

    title: of the progress bar. check: check(first bytes, number of bytes in all or None) raises UserError if this is
    another file than the one wanted. Raises Unreachable if the address gives nothing, and RunError if the download
    breaks off repeatedly; the same call then continues it.
    """
    if re.match(r"https?://[^/\s]", url, re.IGNORECASE) is None:
        raise UserError(f"{url!r} is no address: give one that begins with https:// or http://")
    job = _Job(url, partial, title, check, max_bytes)
    tries, pause = 0, PAUSE_SECONDS
    while True:
        before = job.received
        try:
            with files.explained(partial):
                job.attempt()
            return
        except _Interrupted as error:
            progressed = job.received > before
            tries, pause = (1, PAUSE_SECONDS) if progressed else (tries + 1, pause)
            if not job.connected:  # not tried again: the caller may know another address
                raise Unreachable(f"{url} cannot be reached ({error})") from error
            if tries >= TRIES:
                total = "" if job.total is None else f" of {job.total:,}"
                raise RunError(
                    f"{url} broke off at {job.received:,}{total} bytes ({error}); the same command continues from there"
                ) from error
        time.sleep(pause)
        pause *= 2


class _Interrupted(Exception):
    """The connection broke, or the server is busy: try again."""


class _Job:
    """A download and its state; arguments as in `download`.

    connected: whether the server has answered, so that another attempt makes sense. total: bytes of the whole file;
    None: unknown.
    """

    def __init__(
        self, url: str, partial: Path, title: str, check: Callable[[bytes, int | None], object], max_bytes: int
    ):
        self.url, self.partial, self.title, self.check, self.max_bytes = url, partial, title, check, max_bytes
        self.connected = False
        self.total: int | None = None

    @property
    def received(self) -> int:
        """Bytes of the partial file."""
        return self.partial.stat().st_size if self.partial.exists() else 0

    def attempt(self) -> None:
        """Download the missing bytes over one connection; raises _Interrupted if it ends early.

        If the server cannot continue the partial file, the file is requested again from the start.
        """
        origin, received = _read_origin(self.partial), self.received
        if origin is None or origin.url != self.url or origin.total is None or received > origin.total or not received:
            origin, received = None, 0  # from the start
        request = urllib.request.Request(self.url, headers={"User-Agent": f"backbone-harness/{VERSION}"})
        if origin is not None:
            if received == origin.total:
                return  # complete: an earlier process was killed after the last byte
            request.add_header("Range", f"bytes={received}-")
            if origin.validator:
                request.add_header("If-Range", origin.validator)
        try:
            response = _OPENER.open(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                self._handle_status(error, received)
            return self.attempt()  # only after 416: the origin is forgotten, so this one begins at the start
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(_reason(error)) from error
        with response:
            self.connected = True
            start, self.total = _span(response, received)
            if start and (origin is None or start != received or self.total != origin.total):
                start = None  # the file has changed, or the server's counts are wrong
            if start is None:
                if not received:
                    raise Unreachable(f"{self.url} answers with a part of the file where all of it was requested")
                _origin_path(self.partial).unlink(missing_ok=True)  # so that the next attempt begins at the start
                return self.attempt()
            if self.total is not None and self.total > self.max_bytes:
                raise UserError(f"{self.url} is {self.total:,} bytes, more than the {self.max_bytes:,} it may be")
            self._receive(response, start)

    def _handle_status(self, error: urllib.error.HTTPError, received: int) -> None:
        """For 416 (the range does not exist): forget the origin, so that the download begins again. Other errors raise.

        _Interrupted for a status that may pass (TEMPORARY), Unreachable for the others. received: bytes that were not
        requested because the partial file has them.
        """
        if error.code == 416 and received:
            _origin_path(self.partial).unlink(missing_ok=True)
            return
        text = f"HTTP {error.code} {error.reason}".strip()
        if error.code in TEMPORARY:
            self.connected = True
            raise _Interrupted(text) from None
        raise Unreachable(f"{self.url} is not available ({text})") from None

    def _receive(self, response: http.client.HTTPResponse, start: int) -> None:
        """Cut the partial file to `start` bytes and append the response to it."""
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
        """Append the response to `file` until it ends; _Interrupted if bytes are missing then.

        UserError from `check`, and where the file is larger than `max_bytes`. done: bytes of the file so far. head: b""
        at the start of the file, where the first bytes are collected and given to `check`; None: they were checked
        before.
        """
        try:
            while True:
                try:
                    data = response.read1(CHUNK_BYTES)
                except (OSError, http.client.HTTPException) as error:
                    raise _Interrupted(_reason(error)) from error
                if head is not None and len(head) < START_BYTES:
                    head += data[:START_BYTES]
                    if len(head) >= START_BYTES or not data:
                        self.check(head, self.total)
                file.write(data)
                done += len(data)
                if done > self.max_bytes:
                    raise UserError(f"{self.url} is more than the {self.max_bytes:,} bytes it may be")
                bar.total = max(bar.total, _megabytes(done))  # grows if the server did not state the total
                bar.advance(_megabytes(done) - bar.done)
                if not data:
                    break
        finally:
            file.flush()
        if self.total is not None and done < self.total:
            raise _Interrupted("the connection was closed")
        files.sync_file(self.partial)


def forget(partial: Path) -> None:
    """Drop the bytes of a partial file and their origin. The file itself stays, because it may be locked."""
    _origin_path(partial).unlink(missing_ok=True)
    if partial.exists():
        os.truncate(partial, 0)


def _opener() -> urllib.request.OpenerDirector:
    """An opener of http:// and https:// alone; urllib's default one opens file:, ftp: and data: as well."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.UnknownHandler, urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


_OPENER = _opener()


def _span(response: http.client.HTTPResponse, received: int) -> tuple[int | None, int | None]:
    """(position of the response's first byte in the file, bytes of the whole file).

    The position is 0 if the server sends the whole file, whether or not a part was requested, and None if it sends
    something else than what was requested. The number of bytes is None if it is unknown. received: bytes that were not
    requested because the partial file has them.
    """
    length = response.headers.get("Content-Length", "")
    if response.status != 206:
        return 0, int(length) if length.isdigit() else None
    match = re.fullmatch(r"bytes ([0-9]+)-([0-9]+)/([0-9]+)", response.headers.get("Content-Range", "").strip())
    if match is None or not received:
        return None, None
    return int(match[1]), int(match[3])


def _validator(response: http.client.HTTPResponse) -> str | None:
    """The value for If-Range: the response's strong ETag or else its date; None: it has neither."""
    tag = response.headers.get("ETag", "").strip()  # a weak one begins with W/ and is not allowed in If-Range
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _origin_path(partial: Path) -> Path:
    """The JSON file beside a partial file."""
    return partial.with_name(partial.name + ".json")


def _read_origin(partial: Path) -> _Origin | None:
    """Where the bytes of a partial file came from; None: unknown."""
    try:
        data = files.read_json(_origin_path(partial), "")  # "": the error is not shown, so it needs no name
        return _Origin(url=str(data["url"]), validator=data["validator"], total=data["total"])
    except (UserError, KeyError, TypeError):
        return None


def _megabytes(count: int) -> int:
    """Bytes in megabytes, rounded up."""
    return -(-count // 1_000_000)


def _reason(error: Exception) -> str:
    """What failed, in one line."""
    reason = getattr(error, "reason", None) or error  # urllib's URLError has the original error as `reason`
    if isinstance(reason, TimeoutError):
        return f"no answer in {TIMEOUT_SECONDS:.0f} s"
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return " ".join(str(text).split())
