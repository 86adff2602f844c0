"""Pictures of samples: PNG files to look at, each with a JSON sidecar. They are no sample set, and no record is made of them.

    FOLDER/class-0207.png               the grid of class 207
    FOLDER/class-0207-trajectory.png    the images that its first samples were predicted to be, step by step

A sidecar states how its picture was made. It is written last: a picture is complete when its sidecar names its hash.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.io import files
from harness.io.text import parse_json

SCHEMA = 1
KIND = "pictures"  # item "kind" of a sidecar, which no sample set has
PREFIX = "class-"


def picture_path(folder: Path, label: int, suffix: str = "") -> Path:
    """The path of the picture of a class. suffix: of the name, such as "-trajectory"."""
    return folder / f"{PREFIX}{label:04d}{suffix}.png"


def is_complete(picture: Path, identity: dict[str, Any]) -> bool:
    """Whether the picture exists with its sidecar. Raises UserError if another one is there.

    identity: everything that decides the picture, as JSON reads it back.
    """
    side = picture.with_suffix(".json")
    if not (side.exists() and picture.exists()):
        return False
    found = files.read_json(side, "sidecar")
    if (
        not isinstance(found, dict)
        or found.get("identity") != identity
        or found.get("sha256") != files.sha256_file(picture)
    ):
        raise UserError(f"{picture} is another picture than its sidecar says; move both away and sample again")
    return True


def write_sidecar(picture: Path, identity: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the sidecar of a picture that is written. facts: further JSON data."""
    about = {"schema": SCHEMA, "kind": KIND, "identity": identity, "sha256": files.sha256_file(picture), **facts}
    files.write_json(picture.with_suffix(".json"), about)


def is_picture(path: Path) -> bool:
    """Whether the image file at `path` is such a picture, and no sample: its name and its sidecar say so."""
    side = path.with_suffix(".json")
    if not path.name.startswith(PREFIX) or not side.is_file():
        return False
    try:
        found = parse_json(side.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("kind") == KIND
