"""Files that appear whole or not at all."""

import os
import tempfile
from pathlib import Path

from harness.errors import RunError


def write_whole(path: Path, data: bytes) -> Path:
    """Writes `data` under a temporary name in the same folder, syncs and renames; RunError names what went wrong."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)  # mkstemp's files are for their owner alone; a report is for others
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    return path
