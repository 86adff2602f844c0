"""The weights in a file: which of its tensors they are, what else it holds, and hashing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.errors import UserError
from harness.io import files
from harness.io.progress import Bar
from harness.weights.containers import escaped, open_file
from harness.weights.entries import ITSELF, Entry, Marks, choose_entry
from harness.weights.folders import find_file, is_index, open_parts, refuse_single_part
from harness.weights.holders import escaped_key
from harness.weights.maps import Shapes
from harness.weights.tensors import Stored

METADATA = "harness"  # key of the safetensors metadata in which an import says where it comes from
LONGEST_CONFIG = 1 << 20  # characters of config.json that are read

# Names that do not belong in a weight file: a file that has one was made to run something, and its tensors are not to be
# trusted either. The list protects nothing by itself, because no name is ever imported or called.
CODE = frozenset(
    [
        "os",
        "posix",
        "nt",
        "posixpath",
        "subprocess",
        "sys",
        "shutil",
        "runpy",
        "importlib",
        "imp",
        "pty",
        "socket",
        "ctypes",
        "commands",
        "webbrowser",
        "codeop",
        "timeit",
        "pdb",
        "bdb",
        "multiprocessing",
        "asyncio",
        "urllib",
        "requests",
        "ftplib",
        "smtplib",
        "pip",
        "venv",
        "eval",
        "exec",
        "execfile",
        "compile",
        "__import__",
        "system",
        "popen",
        "open",
        "breakpoint",
        "globals",
        "locals",
        "setattr",
        "delattr",
        "pickle",
        "_pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "marshal",
        "_load_from_bytes",
        "load",
    ]
)


class Sized(Protocol):
    """An array of numpy or a tensor of torch."""

    @property
    def nbytes(self) -> int: ...


Chunk = TypeVar("Chunk", bound=bytes | Sized)


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """The weights in a file, under the names that they have there, not read yet."""

    path: Path  # the file that holds the tensors, or the index of several
    container: str  # "torch zip", "TorchScript", "torch legacy" or "safetensors"
    wrapping: str  # "state dict", "train.py checkpoint", "Lightning checkpoint" or "checkpoint, entry ..."
    entry: str = ""  # name of the entry that was read; "": the file itself
    other_entries: tuple[str, ...] = ()  # names of further entries with such weights
    entry_in_identity: str = ""  # as `entry`; "" for the entries that were always read, whose samples do not name them
    files: tuple[Path, ...] = ()  # the files that hold the tensors
    stat: tuple[tuple[int, ...], ...]  # `_stat_numbers` of the files when they were opened, for `unchanged`
    tensors: dict[str, Stored]
    symbols: tuple[str, ...]  # classes and functions that the file names, tensors' own aside; none was loaded
    other_names: tuple[str, ...] = ()  # keys of what else is in the file: optimizer state, arguments, ...
    notes: tuple[str, ...] = ()
    config: dict[str, Any] | None = None  # config.json beside it
    imported: dict[str, Any] | None = None  # metadata that `harness weights import` wrote into it

    @property
    def shapes(self) -> Shapes:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def code(self) -> tuple[str, ...]:
        """Those of `symbols` with a part in CODE, such as "os" in "os.system"."""
        return tuple(name for name in self.symbols if CODE.intersection(name.split(".")))

    def sha256(self) -> str:
        """SHA-256 of the file, hexadecimal; of several files, of the JSON object of their names and hashes."""
        if len(self.files) == 1:
            return sha256(self.files[0])
        return files.sha256_json({each.name: sha256(each) for each in self.files})

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(each.stat().st_size for each in self.files)

    def changed(self) -> bool:
        """Whether one of the files was written to or replaced after it was opened."""
        return tuple(_stat_numbers(each) for each in self.files) != self.stat

    def refuse_code(self) -> None:
        """UserError for a file that names functions which run code when it is unpickled in the ordinary way."""
        if self.code:
            raise UserError(
                f"{self.path} holds more than weights: unpickling it would run {self.code[0]}. Nothing was run; fetch the"
                " file from a source that you trust"
            )


def open_weights(path: Path, *, entry: str | None = None, markings: Iterable[Marks] = ()) -> WeightFile:
    """The weights in the file `path`, or in the folder `path` of diffusers or Hugging Face.

    Of a checkpoint that has several entries (dictionaries of tensors, or prefixes of names), a moving average is taken
    before raw weights. entry: the one to take; None: the only one that fits. markings: marks of the networks that are
    looked for (`entries.choose_entry`). Components of names that wrappers add are dropped. UserError where there are no
    weights, or where several entries fit equally.
    """
    found, notes = find_file(path, entry)
    if found != path:  # the name may have chosen a file in the folder
        entry = None if entry is not None and (path / entry).exists() else entry
        path = found
    if is_index(path):
        opened, paths = open_parts(path)
    else:
        refuse_single_part(path)
        opened, paths = None, (path,)
    stat = tuple(_stat_numbers(each) for each in paths)
    opened = opened or open_file(path)
    value = opened.value
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no state dict, but {_describe(value)}; save net.state_dict()")
    chosen, entries = choose_entry(value, path, markings, entry)
    if chosen.duplicate:  # of keys that are not text only the type is known here
        raise UserError(f"{path} holds two tensors under the name {chosen.duplicate}; save net.state_dict()")
    name = chosen.name or ("" if chosen.is_whole else ITSELF)
    others = [each.name or ITSELF for each in entries if each.name != chosen.name]
    return WeightFile(
        path=path,
        files=paths,
        stat=stat,
        container=opened.container,
        wrapping=_wrapping(chosen),
        entry=chosen.name,
        other_entries=tuple(dict.fromkeys(others)),
        entry_in_identity="" if chosen.is_whole and chosen.keys == _former_keys(value) else name,
        tensors=chosen.tensors,
        symbols=opened.symbols,
        other_names=_other_names(value, chosen),
        notes=(*notes, *_entry_notes(chosen, others), *chosen.notes),
        config=_read_config(path),
        imported=_read_import(opened.metadata),
    )


def unusual_entry(entry: str | None, open_entry: Callable[[str | None], WeightFile]) -> str:
    """The name of the entry of a file that was asked for; "" where it is the one that is read without asking.

    It belongs beside the file's hash in an identity. open_entry: opens the file at an entry, as `open_weights` does.
    """
    if entry is None:
        return ""
    asked = open_entry(entry).entry
    try:
        return "" if open_entry(None).entry == asked else asked or ITSELF
    except UserError:  # several fit
        return asked or ITSELF


def _wrapping(entry: Entry) -> str:
    """How the weights are wrapped in the file, for people."""
    if not entry.keys:
        return "state dict"
    if entry.keys == ("state_dict",):
        return "Lightning checkpoint"
    return "train.py checkpoint" if entry.keys in (("ema",), ("model",)) else f"checkpoint, entry {entry.name}"


def _entry_notes(entry: Entry, others: Collection[str]) -> list[str]:
    """Which entry is read, if the file has any, and which it has besides."""
    if not entry.name:
        return []
    beside = f"; beside it: {', '.join(others)}" if others else ""
    if entry.averaged:
        return [f"the weights are its moving average ({entry.name!r}{beside})"]
    return [f"the weights are those of the entry {entry.name!r}{beside}"]


def _other_names(value: Mapping[Any, Any], entry: Entry) -> tuple[str, ...]:
    """Keys of what else is in the file: of a state dict all that is no tensor, of a checkpoint all but its entry."""
    if not entry.keys:
        return (*(escaped_key(name) for name, item in value.items() if not isinstance(item, Stored)), *entry.beside)
    names = [escaped_key(name) for name, item in value.items() if not isinstance(item, Stored)]
    tensors = [escaped_key(name) for name, item in value.items() if isinstance(item, Stored)]
    return (*(name for name in names if name != entry.keys[0]), *tensors, *entry.beside)


def _former_keys(value: Mapping[Any, Any]) -> tuple[str, ...]:
    """Keys of the entry that was read before there were others: identities of its samples do not name it."""
    for name in ("state_dict", "ema", "model"):
        item = value.get(name)
        if isinstance(item, dict) and any(isinstance(each, Stored) for each in item.values()):
            return (name,)
    return ()


@contextmanager
def unchanged(weights: WeightFile) -> Iterator[None]:
    """Context in which the tensors of `weights` are read. UserError where the file was changed after it was opened.

    The file is checked before and after the block.
    """
    refusal = UserError(f"{weights.path} was changed while it was read; give the same command again")
    if weights.changed():
        raise refusal
    try:
        yield
    except UserError:  # what looks like damage may be a mixture of two files
        if weights.changed():
            raise refusal from None
        raise
    if weights.changed():
        raise refusal


def _stat_numbers(path: Path) -> tuple[int, ...]:
    """Numbers that change when a file is written to or replaced; () where there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; with a progress bar for large files."""
    digest, block = hashlib.sha256(), 1 << 22
    with path.open("rb") as file:
        for chunk in with_progress(f"hash {path.name}", iter(lambda: file.read(block), b""), path.stat().st_size):
            digest.update(chunk)
    return digest.hexdigest()


def with_progress(title: str, chunks: Iterable[Chunk], nbytes: int) -> Iterator[Chunk]:
    """Yields the chunks (bytes, arrays or tensors), with a progress bar if they are half a gigabyte or more.

    nbytes: of all chunks.
    """
    if nbytes < 1 << 29:
        yield from chunks
        return
    with Bar(title, nbytes // 1_000_000, "MB") as bar:
        done = 0
        for chunk in chunks:
            yield chunk
            done += len(chunk) if isinstance(chunk, bytes) else int(chunk.nbytes)
            if done // 1_000_000 > bar.done:
                bar.advance(done // 1_000_000 - bar.done)


def _describe(value: object) -> str:
    """The type of a value, with an article, for messages; for a placeholder (`pickles.Call`), the name of its function."""
    name = getattr(getattr(value, "function", None), "full", None)
    name = escaped(name) if name else type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _read_config(path: Path) -> dict[str, Any] | None:
    """config.json beside the file `path`; None where it is missing or is no JSON object."""
    try:
        with (path.parent / "config.json").open(encoding="utf-8") as file:
            config = json.loads(file.read(LONGEST_CONFIG))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _read_import(metadata: dict[str, str]) -> dict[str, Any] | None:
    """What `harness weights import` wrote into the metadata of a safetensors file; None: nothing."""
    try:
        about = json.loads(metadata.get(METADATA, "null"))
    except (ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) else None
