"""The code of plug-ins, told apart by hash: single files (`--plugin`) and packages with entry points."""

from __future__ import annotations

import functools
import hashlib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

SOURCES = frozenset(
    [".py", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".metal"]
)  # suffixes of the files that are hashed


class Code(NamedTuple):
    """The code that an item of a registry comes from.

    name: of the file or of the distribution. version: of the distribution; "" for a file. sha256: of the file's bytes, or
    of the paths and bytes of all sources (SOURCES) of the package that the entry point lies in. file: None for a package.
    """

    name: str
    version: str
    sha256: str
    file: Path | None = None

    def __str__(self) -> str:
        return f"{self.name}{self.version and f' {self.version}'} (sha256 {self.sha256[:12]})"


@functools.cache
def code_of_package(distribution: str, module: str) -> Code:
    """The code of the package in which `module` lies. Imports nothing; of one process the same at every call."""
    top = module.partition(".")[0]
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        version = ""
    spec = find_spec(top)
    paths: dict[str, Path] = {}  # by path inside the package, which does not depend on where it is installed
    if spec is not None and spec.submodule_search_locations is not None:
        for folder in map(Path, spec.submodule_search_locations):
            paths |= {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix in SOURCES}
    elif spec is not None and spec.origin:
        paths[Path(spec.origin).name] = Path(spec.origin)
    digest = hashlib.sha256()
    for name in sorted(paths):
        digest.update(f"{name}\0{hashlib.sha256(paths[name].read_bytes()).hexdigest()}\n".encode())
    return Code(distribution, version, digest.hexdigest())
