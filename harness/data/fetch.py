"""Fetching the public files of evaluation: resumed, checked by size and hash, under their name only when whole.

Nothing that comes is executed, and no name in an archive becomes a path: of a gzipped tar the one member that is wanted
is read, whatever else it holds.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from harness.data import download
from harness.data.cache_dir import downloads
from harness.data.public_files import PublicDataset, PublicFile
from harness.errors import UserError
from harness.images.source import readable
from harness.io import files

UNPACKED_BYTES = 1 << 29  # most that is unpacked of an archive on the way to its member
GZIP = b"\x1f\x8b"


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A public file on disk. verified: it has the published hash; False: there is none. new: it was not there before."""

    path: Path
    bytes: int
    md5: str
    sha256: str
    verified: bool
    new: bool


def fetch(public: PublicFile, out: Path | None = None, url: str | None = None) -> Fetched:
    """Have `public` at `out` (None: its own name, in the working folder), from `url` or from where it is published.

    A file that is there already and right is left alone; another one is refused, and so is what comes if it has not the
    published size and hash.
    """
    out = Path(public.file) if out is None else out
    if out.is_dir():
        out = out / public.file
    with files.claimed(out) as partial:
        if out.exists():
            found = _known(public, out, new=False)
            download.forget(partial)  # of a process that was killed at the very end
            return found
        reasons = []
        for address in (url,) if url is not None else public.urls:
            try:
                download.download(
                    address,
                    partial,
                    title=public.file,
                    check=lambda head, total: _check_start(public, head, total),
                    most=download.MAX_BYTES if public.bytes is None else 2 * public.bytes,
                )
                return _finish(public, partial, out)
            except download.Unreachable as error:
                reasons.append(str(error))
            except _Wrong as error:
                download.forget(partial)
                reasons.append(f"{address}: {error}")
        raise UserError(
            f"{public.file} was not fetched: {'; '.join(reasons)}. Give another place with --url, or copy the file from a"
            f" machine that has it to {out}"
        )


def fetch_dataset(public: PublicDataset, out: Path | None = None, url: str | None = None) -> list[Fetched]:
    """Have the files of a data set in the folder `out` (None: where `harness run` looks for them), from below the
    address `url` or from where they are published. Files that are there are checked and not fetched again."""
    folder = downloads(public.name) if out is None else out
    if folder.is_file():
        raise UserError(f"{folder} is a file; data set {public.name!r} is several: name a folder with --out")
    base = None if url is None else url.rstrip("/")
    return [fetch(each, folder / each.file, base and f"{base}/{each.file}") for each in public.files]


class _Wrong(UserError):
    """What an address holds is not the file."""


def _check_start(public: PublicFile, head: bytes, total: int | None) -> None:
    if head.startswith(GZIP) and not _gzipped(public):
        return  # an archive: its own size says nothing
    text = f"what comes is not {public.file}: "
    if head[:1] in (b"<", b""):
        raise _Wrong(text + ("a web page" if head else "nothing"))
    if public.start and not head.startswith(public.start):
        raise _Wrong(text + "it begins otherwise")
    if public.bytes is not None and total is not None and total != public.bytes:
        raise _Wrong(text + f"{total:,} bytes instead of {public.bytes:,}")


def _gzipped(public: PublicFile) -> bool:
    """Whether the file itself is gzipped, so that such bytes are no archive around it."""
    return public.file.endswith(".gz")


def _finish(public: PublicFile, partial: Path, out: Path) -> Fetched:
    """Unpack where it is an archive, check, rename."""
    with partial.open("rb") as file:
        packed = file.read(2) == GZIP and not _gzipped(public)
    ready = out.with_name(f"{out.name}.unpacked{files.PARTIAL}") if packed else partial
    try:
        if packed:
            _unpack(public, partial, ready)
        found = _known(public, ready, new=True)
    except UserError as error:
        ready.unlink(missing_ok=True)
        raise _Wrong(str(error)) from error
    with files.explained(out):
        ready.replace(out)
        files.sync_folder(out.parent)
    download.forget(partial)
    return dataclasses.replace(found, path=out)


def _known(public: PublicFile, path: Path, *, new: bool) -> Fetched:
    """What `path` is, or the refusal of a file that is not `public`."""
    size = path.stat().st_size
    what = f"what comes is not {public.file}" if new else f"{path} is there and is not {public.file}"
    advice = "" if new else "; move it away, or give another --out"
    if public.bytes is not None and size != public.bytes:
        raise UserError(f"{what}: {size:,} bytes instead of {public.bytes:,}{advice}")
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            md5.update(data)
            sha256.update(data)
    if public.md5 is not None and md5.hexdigest() != public.md5:
        raise UserError(f"{what}: its md5 is {md5.hexdigest()} instead of {public.md5}{advice}")
    if public.md5 is None:
        try:
            _check_batch(path)
        except UserError as error:
            raise UserError(f"{what}: {error}{advice}") from error
    return Fetched(
        path=path, bytes=size, md5=md5.hexdigest(), sha256=sha256.hexdigest(), verified=public.md5 is not None, new=new
    )


def _check_batch(path: Path) -> None:
    """A file without a published hash must at least be a whole reference batch: every byte against the zip's checksums."""
    import zipfile

    with readable("it"), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        lacking = [name for name in ("arr_0", "mu", "sigma", "mu_s", "sigma_s") if name not in names]
        if lacking:
            raise UserError(f"it lacks {', '.join(lacking)}")
        if (bad := archive.testzip()) is not None:
            raise UserError(f"{bad} differs from its checksum")


class _Limited(io.RawIOBase):
    """A stream that refuses to give more than `most` bytes: an archive may be a bomb."""

    def __init__(self, stream, most: int):
        self._stream, self._left = stream, most

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise UserError("the archive unpacks to more than it can hold")
        return data


def _unpack(public: PublicFile, archive: Path, into: Path) -> None:
    """Write the member that is called like the file, and nothing else; links and folders of that name do not count."""
    with readable("the archive"), gzip.open(archive) as stream:
        try:
            with tarfile.open(fileobj=_Limited(stream, UNPACKED_BYTES), mode="r|") as tar:
                for member in tar:
                    if member.isreg() and member.name.removeprefix("./") == public.file:
                        with files.explained(into), into.open("wb") as out:
                            content = tar.extractfile(member)
                            while data := content.read(1 << 20):
                                out.write(data)
                        files.sync_file(into)
                        return
        except tarfile.TarError as error:
            raise UserError(f"the archive cannot be read ({error}); it is damaged") from error
    raise UserError(f"the archive holds no {public.file}")
