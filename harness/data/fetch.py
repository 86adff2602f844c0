"""Fetches public files of evaluation and data sets: continued after a break, checked by size and hash, then renamed.

Nothing in a file is executed, and no name in an archive becomes a path: only the wanted member of a gzipped tar is read.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from evaluators.reference_file import STATISTICS
from harness.data import download
from harness.data.cache_dir import downloads
from harness.data.public_files import PublicDataset, PublicFile
from harness.errors import UserError
from harness.images.npz import open_npz_file
from harness.images.source import readable
from harness.io import files

UNPACKED_BYTES = 1 << 29  # an archive is unpacked up to so many bytes to reach its member
GZIP = b"\x1f\x8b"


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A public file on disk.

    bytes: its size. md5, sha256: hexadecimal. verified: True: it has the published hash; False: no hash is published.
    new: whether it was downloaded by this call.
    """

    path: Path
    bytes: int
    md5: str
    sha256: str
    verified: bool
    new: bool


def fetch(public: PublicFile, out: Path | None = None, url: str | None = None) -> Fetched:
    """Download `public` to `out`, unless it is there already.

    out: a file or folder; None: the file's published name in the working folder. url: an address to use instead of the
    published ones. UserError where no address gives a file of the published size and hash, and for another file at `out`.
    """
    out = Path(public.file) if out is None else out
    if out.is_dir():
        out = out / public.file
    with files.claimed(out) as partial:
        if out.exists():
            found = _check_file(public, out, new=False)
            download.forget(partial)  # left by a process that was killed after it had renamed the file
            return found
        reasons = []
        # an address may give an archive that holds the file, so the download may be larger than the file
        max_bytes = download.MAX_BYTES if public.size is None else 2 * public.size
        for address in (url,) if url is not None else public.urls:
            try:
                download.download(
                    address,
                    partial,
                    title=public.file,
                    check=lambda head, total: _check_start(public, head, total),
                    max_bytes=max_bytes,
                )
                return _finish(public, partial, out)
            except download.Unreachable as error:
                reasons.append(str(error))
            except _WrongFile as error:
                download.forget(partial)
                reasons.append(f"{address}: {error}")
        raise UserError(
            f"{public.file} was not fetched: {'; '.join(reasons)}. Give another address with --url, or copy the file from"
            f" a machine that has it to {out}"
        )


def fetch_dataset(public: PublicDataset, out: Path | None = None, url: str | None = None) -> list[Fetched]:
    """Download the files of a data set that are not there yet; those that are there are checked.

    out: a folder; None: the one where `harness run` looks for them. url: address of a folder with the files; None: the
    published ones. Otherwise as `fetch`.
    """
    folder = downloads(public.name) if out is None else out
    if folder.is_file():
        raise UserError(f"{folder} is a file; data set {public.name!r} has several files: name a folder with --out")
    base = None if url is None else url.rstrip("/")
    return [fetch(each, folder / each.file, base and f"{base}/{each.file}") for each in public.files]


class _WrongFile(UserError):
    """An address gives another file."""


def _check_start(public: PublicFile, head: bytes, total: int | None) -> None:
    """_WrongFile where the first bytes or the total size of a download are not those of the file or of an archive."""
    if head.startswith(GZIP) and not _gzipped(public):
        return  # an archive, which has another size
    text = f"the download is not {public.file}: "
    if head[:1] in (b"<", b""):
        raise _WrongFile(text + ("it is a web page" if head else "it is empty"))
    if public.start and not head.startswith(public.start):
        raise _WrongFile(text + "it begins with other bytes")
    if public.size is not None and total is not None and total != public.size:
        raise _WrongFile(text + f"{total:,} bytes instead of {public.size:,}")


def _gzipped(public: PublicFile) -> bool:
    """Whether the file itself is gzipped; otherwise gzipped bytes are an archive that holds it."""
    return public.file.endswith(".gz")


def _finish(public: PublicFile, partial: Path, out: Path) -> Fetched:
    """Unpack the download if it is an archive, check the file, and rename it to `out`; _WrongFile for another file."""
    with partial.open("rb") as file:
        is_archive = file.read(2) == GZIP and not _gzipped(public)
    ready = out.with_name(f"{out.name}.unpacked{files.PARTIAL}") if is_archive else partial
    try:
        if is_archive:
            _unpack(public, partial, ready)
        found = _check_file(public, ready, new=True)
    except UserError as error:
        if is_archive:  # else it is `partial`, which stays because it is locked; the caller drops its bytes
            ready.unlink(missing_ok=True)
        raise _WrongFile(str(error)) from error
    with files.explained(out):
        ready.replace(out)
        files.sync_folder(out.parent)
    download.forget(partial)
    return dataclasses.replace(found, path=out)


def _check_file(public: PublicFile, path: Path, *, new: bool) -> Fetched:
    """Read the file at `path` and return its size and hashes; UserError where it is not `public`.

    new: whether it was just downloaded; otherwise messages say that it exists.
    """
    size = path.stat().st_size
    what = f"the download is not {public.file}" if new else f"{path} exists and is not {public.file}"
    advice = "" if new else "; move it away, or give another --out"
    if public.size is not None and size != public.size:
        raise UserError(f"{what}: {size:,} bytes instead of {public.size:,}{advice}")
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            md5.update(data)
            sha256.update(data)
    if public.md5 is not None and md5.hexdigest() != public.md5:
        raise UserError(f"{what}: its md5 is {md5.hexdigest()} instead of {public.md5}{advice}")
    if public.md5 is None:  # only ADM's reference batches; every other public file has a published hash
        try:
            _check_batch(path)
        except UserError as error:
            raise UserError(f"{what}: {error}{advice}") from error
    return Fetched(
        path=path, bytes=size, md5=md5.hexdigest(), sha256=sha256.hexdigest(), verified=public.md5 is not None, new=new
    )


def _check_batch(path: Path) -> None:
    """UserError unless `path` is a complete reference batch, every byte compared with the zip's checksums."""
    with open_npz_file(path) as file:
        missing = [name for name in ("arr_0", *STATISTICS) if name not in file.names]
        if missing:
            raise UserError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing in it")
        if (damaged := file.damaged_member()) is not None:
            raise UserError(f"{damaged} differs from its checksum")


class _Limited(io.RawIOBase):
    """A stream of which at most `limit` bytes can be read; then `read` raises UserError. An archive may be a zip bomb."""

    def __init__(self, stream: gzip.GzipFile, limit: int):
        self._stream, self._left = stream, limit  # _left: bytes that may still be read

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        # one byte beyond the limit is requested, to see whether there is one
        data = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise UserError("the archive unpacks to more than it can hold")
        return data


def _unpack(public: PublicFile, archive: Path, into: Path) -> None:
    """Write the member that has the public file's name to `into`. Links and folders of that name are ignored."""
    with readable("the archive"), gzip.open(archive) as stream:
        try:
            with tarfile.open(fileobj=_Limited(stream, UNPACKED_BYTES), mode="r|") as tar:
                for member in tar:
                    if member.isreg() and member.name.removeprefix("./") == public.file:
                        content: IO[bytes] | None = tar.extractfile(member)
                        assert content is not None  # a regular member has content
                        with files.explained(into), into.open("wb") as out:
                            while data := content.read(1 << 20):
                                out.write(data)
                        files.sync_file(into)
                        return
        except tarfile.TarError as error:
            raise UserError(f"the archive cannot be read ({error}); it is damaged") from error
    raise UserError(f"{public.file} is not in the archive")
