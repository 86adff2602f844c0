"""Image files in tars, as webdataset packs them: KEY.png beside KEY.cls, its label."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from harness.errors import UserError
from harness.images.files import SUFFIXES, Entry, is_system_member, source_of_files
from harness.images.source import Damaged, ImageSource, class_labels, printable

MAX_EXTENDED_BYTES = 1 << 20  # of an extended header, which holds a name and a size


def tar_members(path: Path, begin: int = 0, span: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Yields (name, offset in `path`, size in bytes) of each file in a tar.

    The tar is `span` bytes of the file `path` from byte `begin` on; span None: all bytes from there on.

    Formats: POSIX.1-1988, pax and GNU long names. Stricter than `tarfile`, which takes a broken header for the end of
    the archive: checksums of headers, sizes and closing zeros must all be right, otherwise `Damaged`. Links, devices and
    names that lead out of the archive are a UserError.
    """
    end, offset = path.stat().st_size if span is None else begin + span, begin
    extended_name: str | None = None  # name and size from an extended header, for the next file
    extended_size: int | None = None
    with path.open("rb") as file:
        while True:
            file.seek(offset)
            block = file.read(512)
            if len(block) < 512 or offset + 512 > end:
                raise Damaged("it is cut off")
            if not any(block):
                # a tar ends with at least two blocks of zeros, and `block` was the first
                if end - offset < 1024 or not _zeros_follow(file, end - offset - 512):
                    raise Damaged("it does not end as a tar does")
                return
            # the checksum is the sum of the header's bytes, with its own field (148 to 155) as 8 spaces: 8 * 32 = 256
            if sum(block[:148]) + 256 + sum(block[156:]) != _tar_number(block[148:156]):
                raise Damaged(f"the header at byte {offset} differs from its checksum")
            kind, start = block[156:157], offset + 512
            # extended headers: x (pax) and L (GNU) describe the next file; g (pax, for all files) is skipped
            extended = kind in b"xgL"
            size = _tar_number(block[124:136]) if extended or extended_size is None else extended_size
            if start + size > end:
                raise Damaged("it is cut off")
            offset = start + -(-size // 512) * 512
            if extended:
                if kind == b"g":
                    continue
                if size > MAX_EXTENDED_BYTES:
                    raise Damaged(f"the extended header at byte {start - 512} has {size:,} bytes")
                data = file.read(size)
                if kind == b"L":
                    extended_name = data.rstrip(b"\0").decode("utf-8", "replace")
                else:
                    records = _pax_records(data)
                    extended_name = records.get("path", extended_name)
                    extended_size = _pax_size(records["size"]) if "size" in records else extended_size
                continue
            name = _tar_name(block) if extended_name is None else extended_name
            extended_name, extended_size = None, None
            if kind == b"5" or (kind in b"0\0" and name.endswith("/")):  # a folder
                continue
            if kind not in (b"0", b"\0", b"7"):  # the kinds of a plain file
                raise UserError(
                    f"{path}: {printable(name)} is a link or a device, which is never followed; pack files only"
                )
            if name.startswith("/") or ".." in name.split("/"):
                raise UserError(
                    f"{path}: the name {printable(name)} leads out of the archive; pack it with plain names"
                )
            yield name.removeprefix("./"), start, size


def _zeros_follow(file: IO[bytes], count: int) -> bool:
    """Whether the next `count` bytes exist and are all zero."""
    while count:
        part = file.read(min(count, 1 << 16))
        if not part or part.count(0) != len(part):
            return False
        count -= len(part)
    return True


def _tar_number(field: bytes) -> int:
    """The number in a field of a header: octal digits (none: 0), or the byte 0x80 and a big-endian number (GNU)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    if re.fullmatch(rb"[0-7]*", text) is None:
        raise Damaged("a header holds no number where one belongs")
    return int(text or b"0", 8)


def _tar_name(block: bytes) -> str:
    """The name in a header, with ustar's prefix."""
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    whole = prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name
    return whole.decode("utf-8", "replace")


def _pax_records(data: bytes) -> dict[str, str]:
    """The values of a pax header's records, "LENGTH KEY=VALUE\\n", by key."""
    records = {}
    while data:
        match = re.match(rb"([0-9]{1,7}) ([^=]+)=", data)
        length = int(match[1]) if match else 0
        if match is None or length <= match.end() or data[length - 1 : length] != b"\n":
            raise Damaged("an extended header is broken")
        records[match[2].decode("utf-8", "replace")] = data[match.end() : length - 1].decode("utf-8", "replace")
        data = data[length:]
    return records


def _pax_size(text: str) -> int:
    """The size of a file, in bytes, from a pax header."""
    if re.fullmatch("[0-9]{1,15}", text) is None:  # a negative one would lead back to members already read
        raise Damaged("an extended header holds no size where one belongs")
    return int(text)


LABEL_KEYS = ("label", "cls", "class", "class_id", "label_id")  # of a .json beside an image, the first that it has


def json_label(entry: Entry) -> int | None:
    """The label in a .json of webdataset: a whole number of at least 0, or an object with one; None: it has none."""
    try:
        data = json.loads(entry.read(limit=MAX_EXTENDED_BYTES))
    except (ValueError, RecursionError):
        return None
    if isinstance(data, dict):
        data = next((data[key] for key in LABEL_KEYS if key in data), None)
    return data if type(data) is int and 0 <= data < 10**9 else None  # not isinstance, which accepts true


def class_of_member(names: Sequence[str]) -> list[str] | None:
    """The class folder of each image of an archive by their names: the last folder, as in train/cat/1.png.

    None where there are no classes: fewer than two folders, or folders at different places.
    """
    folders = [name.rpartition("/")[0] for name in names]
    parents = {folder.rpartition("/")[0] for folder in folders}
    if len(set(folders)) < 2 or len(parents) > 1 or "" in folders:
        return None
    return [folder.rpartition("/")[2] for folder in folders]


def open_tar(path: Path) -> ImageSource:
    """The images of a tar in stored order. Labels: from .cls members, else .json members, else class folders, else none."""
    entries: list[Entry] = []
    keys: list[tuple[str, str]] = []  # of the entries: folder, and name up to the first dot
    images: list[str] = []  # names of the entries
    classes: dict[tuple[str, str], int] = {}
    described: dict[tuple[str, str], Entry] = {}  # the .json members
    ignored, names = 0, set()
    for name, offset, size in tar_members(path):
        if name in names:
            raise Damaged(f"it holds {name} twice")
        names.add(name)
        folder, _, base = name.rpartition("/")
        key, _, kind = base.partition(".")  # webdataset: members that agree up to the first dot are one example
        entry = Entry(name=printable(f"{path}:{name}"), path=path, offset=offset, size=size)
        if is_system_member(name):
            ignored += 1
        elif base.lower().endswith(SUFFIXES):
            entries.append(entry)
            images.append(name)
            keys.append((folder, key))
        elif kind == "cls":
            text = entry.read(limit=20).strip()
            if re.fullmatch(rb"-?[0-9]{1,18}", text) is None:
                raise UserError(f"{entry.name}: a label must be one whole number")
            classes[folder, key] = int(text)
        elif kind == "json":
            described[folder, key] = entry
        else:
            ignored += 1
    if not entries:
        raise UserError(f"{path}: no images in it; wanted .png members and, if there are labels, .cls beside them")
    labels = None
    if not classes and described:
        found = {key: json_label(described[key]) for key in keys if key in described}
        if len(found) == len(set(keys)) and None not in found.values():
            classes = {key: label for key, label in found.items() if label is not None}
    if not classes:
        ignored += len(described)
    names_of_classes: tuple[str, ...] = ()
    folders = None if classes else class_of_member(images)
    if folders is not None:
        by_name, numbered = class_labels(set(folders))
        labels = [by_name[each] for each in folders]
        names_of_classes = () if numbered else tuple(by_name)
    if classes:
        if len(set(keys)) != len(keys):
            raise UserError(f"{path}: two images share a name up to the first dot, so one .cls would label both")
        unlabelled = next((e.name for e, key in zip(entries, keys, strict=True) if key not in classes), None)
        if unlabelled is not None or len(classes) != len(keys):
            raise UserError(
                f"{path}: {unlabelled or 'a .cls'} has no partner; every image needs one .cls, or none has any"
            )
        labels = [classes[key] for key in keys]
    notes = [] if labels is None else ["a tar has no checksum for labels"]
    if folders is not None:
        meaning = "positions of the folders in sorted order" if names_of_classes else "names of the folders"
        notes.append(f"labels are the {meaning}")
    if ignored:
        notes.append(f"{path.name}: {ignored} members that are not images were left out")
    source = source_of_files(str(path), entries, labels, notes)
    source.classes = names_of_classes
    return source
