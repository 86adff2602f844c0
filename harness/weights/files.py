"""The weights in a file: which of its tensors they are, what else it holds, and hashing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.errors import UserError
from harness.io.progress import Bar
from harness.weights.containers import escaped, open_file
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
MAX_WRAPPERS = 8  # prefixes that are dropped from a name, at most
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

    path: Path  # the file that holds the tensors
    stat: tuple[int, ...]  # `_stat_numbers` of the file when it was opened, for `unchanged`
    container: str  # "torch zip", "TorchScript", "torch legacy" or "safetensors"
    wrapping: str  # "state dict", "train.py checkpoint" or "Lightning checkpoint"
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

    def refuse_code(self) -> None:
        """UserError for a file that names functions which run code when it is unpickled in the ordinary way."""
        if self.code:
            raise UserError(
                f"{self.path} holds more than weights: unpickling it would run {self.code[0]}. Nothing was run; fetch the"
                " file from a source that you trust"
            )


def open_weights(path: Path) -> WeightFile:
    """The weights in the file `path`, or in the folder `path` of diffusers or Hugging Face.

    Of a checkpoint the state dict is taken: "state_dict", else "ema", else "model". Prefixes of wrappers (WRAPPERS) are
    dropped from all names. UserError where there are no weights.
    """
    path = _find_file(path)
    stat = _stat_numbers(path)
    opened = open_file(path)
    value, wrapping = opened.value, "state dict"
    notes: list[str] = []
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no state dict, but {_describe(value)}; save net.state_dict()")
    # of a state dict: all that is no tensor; of a checkpoint (below): all but its state dict
    other_names = [_escaped_key(name) for name, item in value.items() if not isinstance(item, Stored)]
    part = next((name for name in ("state_dict", "ema", "model") if _holds_tensors(value.get(name))), None)
    if part is not None:
        wrapping = "Lightning checkpoint" if part == "state_dict" else "train.py checkpoint"
        other_names.remove(part)
        other_names += [_escaped_key(name) for name, item in value.items() if isinstance(item, Stored)]
        value = value[part]
        if part == "ema":
            notes.append("the weights are its moving average ('ema')")
        elif part == "model":
            notes.append("it has no moving average ('ema'): the weights are the trained ones ('model')")
    tensors: dict[str, Stored] = {}
    for key, item in value.items():
        if not isinstance(item, Stored):
            continue
        name = _escaped_key(key)
        if name in tensors:  # of keys that are not text only the type is known here
            raise UserError(f"{path} holds two tensors under the name {name}; save net.state_dict()")
        tensors[name] = item
    if not tensors:
        raise UserError(f"{path} holds no tensors by name; save net.state_dict()")
    if prefix := _wrapper_prefix(tensors):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        notes.append(f"the prefix {prefix!r} was dropped from every name")
    return WeightFile(
        path=path,
        stat=stat,
        container=opened.container,
        wrapping=wrapping,
        tensors=tensors,
        symbols=opened.symbols,
        other_names=tuple(other_names),
        notes=tuple(notes),
        config=_read_config(path),
        imported=_read_import(opened.metadata),
    )


@contextmanager
def unchanged(weights: WeightFile) -> Iterator[None]:
    """Context in which the tensors of `weights` are read. UserError where the file was changed after it was opened.

    The file is checked before and after the block.
    """
    refusal = UserError(f"{weights.path} was changed while it was read; give the same command again")
    if _stat_numbers(weights.path) != weights.stat:
        raise refusal
    try:
        yield
    except UserError:  # what looks like damage may be a mixture of two files
        if _stat_numbers(weights.path) != weights.stat:
            raise refusal from None
        raise
    if _stat_numbers(weights.path) != weights.stat:
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


def _find_file(path: Path) -> Path:
    """The weight file in the folder `path`; any other path is returned as it is. UserError if there is none."""
    if not path.is_dir():
        return path
    for name in IN_FOLDER:
        if (path / name).is_file():
            return path / name
        if (path / f"{name}.index.json").is_file():
            raise UserError(f"{path / name} is split into several files, which is not supported; save it as one")
    raise UserError(f"{path} is a folder without weights; expected {IN_FOLDER[0]} or {IN_FOLDER[3]} in it")


def _escaped_key(key: object) -> str:
    """A key of a dictionary in a file, for messages and records; its type in brackets if it is not text."""
    return escaped(key) if isinstance(key, str) else f"({type(key).__name__})"


def _wrapper_prefix(names: Collection[str]) -> str:
    """The prefix of all `names` that wrappers of the network have added, such as "module._orig_mod."; "" if there is none."""
    prefix = ""
    for _ in range(MAX_WRAPPERS):
        wrapper = next((each for each in WRAPPERS if all(name.startswith(prefix + each) for name in names)), None)
        if wrapper is None:
            break
        prefix += wrapper
    return prefix


def _holds_tensors(value: object) -> bool:
    """Whether `value` is a dictionary with at least one tensor in it."""
    return isinstance(value, dict) and any(isinstance(item, Stored) for item in value.values())


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
