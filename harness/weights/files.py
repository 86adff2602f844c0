"""The weights in a file: which of its tensors they are, what else it holds, and hashing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.errors import UserError
from harness.io.progress import Bar
from harness.weights.containers import open_file, printable
from harness.weights.maps import Shapes
from harness.weights.tensors import Stored

# The weight file of a folder of diffusers or Hugging Face: the first of these that exists.
IN_FOLDER = tuple(
    f"{folder}{name}"
    for folder in ("", "transformer/")
    for name in (
        "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "model.safetensors", "pytorch_model.bin",
    )
)  # fmt: skip
METADATA = "harness"  # key of the safetensors metadata in which an import says where it comes from
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile
MAX_WRAPPERS = 8  # nested within one another
LONGEST_CONFIG = 1 << 20  # bytes

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

    path: Path  # the file that holds the tensors
    state: tuple[int, ...]  # of the file when it was opened, for `unchanged`
    container: str  # "torch zip", "torch legacy" or "safetensors"
    wrapping: str  # "state dict", "train.py checkpoint" or "Lightning checkpoint"
    tensors: dict[str, Stored]
    symbols: tuple[str, ...]  # classes and functions that the file names; none was loaded
    also: tuple[str, ...] = ()  # names of what else is in the file
    notes: tuple[str, ...] = ()
    config: dict[str, Any] | None = None  # config.json beside it
    imported: dict[str, Any] | None = None  # what `harness weights import` wrote into it

    @property
    def shapes(self) -> Shapes:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def code(self) -> tuple[str, ...]:
        """Those of `symbols` that run code."""
        return tuple(name for name in self.symbols if CODE.intersection(name.split(".")))

    def refuse_code(self) -> None:
        """UserError for a file that runs something when it is unpickled without care."""
        if self.code:
            raise UserError(
                f"{self.path} holds more than weights: unpickling it would run {self.code[0]}. Nothing was run; fetch the"
                " file from a source that you trust"
            )


def open_weights(path: Path) -> WeightFile:
    """The weights in the file `path`, or in the folder `path` of diffusers or Hugging Face; UserError without weights."""
    path = _file_of(path)
    state = _state(path)
    opened = open_file(path)
    value, wrapping = opened.value, "state dict"
    notes: list[str] = []
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no state dict, but {_described(value)}; save net.state_dict()")
    also = [_name(name) for name, item in value.items() if not isinstance(item, Stored)]
    part = next((name for name in ("state_dict", "ema", "model") if _holds_tensors(value.get(name))), None)
    if part is not None:
        wrapping = "Lightning checkpoint" if part == "state_dict" else "train.py checkpoint"
        also.remove(part)
        also += [_name(name) for name, item in value.items() if isinstance(item, Stored)]
        value = value[part]
        if part == "ema":
            notes.append("the weights are its moving average ('ema')")
        elif part == "model":
            notes.append("it has no moving average ('ema'): the weights are the trained ones ('model')")
    tensors = {_name(name): item for name, item in value.items() if isinstance(item, Stored)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name; save net.state_dict()")
    if prefix := _wrapped(tensors):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        notes.append(f"the prefix {prefix!r} was dropped from every name")
    return WeightFile(
        path=path,
        state=state,
        container=opened.container,
        wrapping=wrapping,
        tensors=tensors,
        symbols=opened.symbols,
        also=tuple(also),
        notes=tuple(notes),
        config=_config(path),
        imported=_imported(opened.metadata),
    )


@contextmanager
def unchanged(weights: WeightFile) -> Iterator[None]:
    """Within the block the tensors are read: UserError where the file has changed since it was opened, or changes."""
    refusal = UserError(f"{weights.path} was changed while it was read; give the same command again")
    if _state(weights.path) != weights.state:
        raise refusal
    try:
        yield
    except UserError:  # what looks like damage may be a mixture of two files
        if _state(weights.path) != weights.state:
            raise refusal from None
        raise
    if _state(weights.path) != weights.state:
        raise refusal


def _state(path: Path) -> tuple[int, ...]:
    """Numbers that change when a file is written to or replaced."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; with a progress bar for large files."""
    digest, block = hashlib.sha256(), 1 << 22
    with path.open("rb") as file:
        for chunk in watched(f"hash {path.name}", iter(lambda: file.read(block), b""), path.stat().st_size):
            digest.update(chunk)
    return digest.hexdigest()


def watched(title: str, chunks: Iterable[Chunk], nbytes: int) -> Iterator[Chunk]:
    """The chunks (bytes, arrays or tensors) one by one, with a progress bar if they are half a gigabyte or more."""
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


def _file_of(path: Path) -> Path:
    """The weight file of a folder; a file is returned as it is."""
    if not path.is_dir():
        return path
    for name in IN_FOLDER:
        if (path / name).is_file():
            return path / name
        if (path / f"{name}.index.json").is_file():
            raise UserError(f"{path / name} is split into several files, which is not supported; save it as one")
    raise UserError(f"{path} is a folder without weights; expected {IN_FOLDER[0]} or {IN_FOLDER[3]} in it")


def _name(key: object) -> str:
    return printable(key) if isinstance(key, str) else f"({type(key).__name__})"


def _wrapped(names: Iterable[str]) -> str:
    """The prefix of all names that wrappers of the network have added: of none, one or several, in any order."""
    found = ""
    for _ in range(MAX_WRAPPERS):
        more = next((each for each in WRAPPERS if all(name.startswith(found + each) for name in names)), None)
        if more is None:
            break
        found += more
    return found


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(item, Stored) for item in value.values())


def _described(value: object) -> str:
    """The type of a value with its article; of a placeholder the name of the function."""
    name = getattr(getattr(value, "function", None), "full", None)
    name = printable(name) if name else type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _config(path: Path) -> dict[str, Any] | None:
    try:
        with (path.parent / "config.json").open(encoding="utf-8") as file:
            config = json.loads(file.read(LONGEST_CONFIG))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _imported(metadata: dict[str, str]) -> dict[str, Any] | None:
    try:
        found = json.loads(metadata.get(METADATA, "null"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
