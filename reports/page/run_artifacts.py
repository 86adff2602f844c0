"""Files of runs that belong on the page: recipes and grids of samples, from the folders of record files."""

import base64
import dataclasses
import io
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.errors import RunError, UserError
from harness.io.files import sha256_json
from harness.runs.run import open_run
from reports.render import one_line
from reports.texts import count_text, guidance_text, sampling_steps_text, states_guidance
from results.metrics import rank
from results.records import Record, Sampling, Training

GRID = "grid.png"
MAX_GRIDS = 36
MAX_GRID_BYTES = 300_000  # of one picture; a larger one is downsampled
MAX_PICTURE_BYTES = 6_000_000  # of all of them
MAX_FILE_BYTES = 64_000_000  # a larger file is not opened
WIDEST = 900  # width in pixels of a downsampled picture
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """A sample grid and the records of its samples."""

    path: Path
    records: tuple[Record, ...]

    @property
    def title(self) -> str:
        """`dit-b-4, 400 training steps, seed 0, ddim, 50 sampling steps, guidance 1.5`; without records the folder's name."""
        if not self.records:
            return one_line(self.path.parent.name)
        record = self.records[0]
        training, sampling = record.training, record.sampling
        words = [record.system]
        if training is not None and training.steps is not None:
            words.append(f"{count_text(training.steps)} training steps")
        if training is not None and training.seed is not None:
            words.append(f"seed {training.seed}")
        if sampling is not None and sampling.sampler:
            steps = sampling_steps_text(record)
            words += [sampling.sampler, f"{steps} sampling steps"] if steps else [sampling.sampler]
        if states_guidance(record):
            words.append(f"guidance {guidance_text(record)}")
        return one_line(", ".join(words))


def run_recipes(record_files: Iterable[Path]) -> dict[str, dict[str, object]]:
    """Recipe hash -> the recipe's items without `steps`, of the runs in the folders of these record files."""
    found = {}
    for folder in sorted({path.parent for path in record_files}):
        if (folder / "run.json").is_file():
            try:
                recipe = open_run(folder).identity["recipe"]
            except (UserError, RunError):  # its records are shown without the recipe
                continue
            found[sha256_json(recipe)] = recipe
    return found


def sample_grids(record_files: Iterable[Path], records: Iterable[Record]) -> list[SampleGrid]:
    """The grids of sample sets with records, from the folders of the record files.

    The first ones are kept if not all fit on the page: one seed of every model comes before the next seed.
    """
    pictures: set[Path] = set()
    for folder in {path.parent for path in record_files}:
        pictures.update(folder.glob(f"samples/*/{GRID}"))  # of a run
        pictures.update(folder.glob(GRID))  # of samples beside their records, as those of a system
    samples = {path: _samples_sha256(path.with_name("samples.json")) for path in sorted(pictures)}
    found: dict[str, list[Record]] = {digest: [] for digest in samples.values() if digest}  # hash of samples -> records
    for record in records if found else ():  # without grids, many records need not be read
        if record.sampling is not None and record.sampling.samples_sha256 in found:
            found[record.sampling.samples_sha256].append(record)
    for members in found.values():
        members.sort(key=lambda record: rank(record.metric))
    grids = [SampleGrid(path=path, records=tuple(found.get(digest, ()))) for path, digest in samples.items()]
    return sorted((grid for grid in grids if grid.records), key=_sort_key)


def pictures(grids: Sequence[SampleGrid]) -> tuple[list[tuple[SampleGrid, str]], str]:
    """([(grid, data URI)] in the order of Gflops, note on the grids that are left out or downsampled, "" if none).

    grids: in the order in which they are kept if not all fit, with records.
    """
    made: list[tuple[SampleGrid, str]] = []
    total = broken = downsampled = 0
    for grid in grids[:MAX_GRIDS]:
        read = _read_picture(grid.path)
        if read is None:
            broken += 1
            continue
        uri, was_downsampled = read
        if total + len(uri) > MAX_PICTURE_BYTES:
            break
        total += len(uri)
        downsampled += was_downsampled
        made.append((grid, uri))
    # By Gflops, then as `_sort_key` but with the seed last, so that the seeds of a model are side by side.
    made.sort(key=lambda pair: (pair[0].records[0].gflops or 0.0, *_sort_key(pair[0])[1:], *_sort_key(pair[0])[:1]))
    words = []
    if left_out := len(grids) - len(made) - broken:
        words.append(f"{left_out} of {len(grids)} grids have no room here; all lie beside their samples")
    if broken:
        words.append(f"{broken} could not be read as PNG")
    if downsampled:
        words.append(f"{downsampled} downsampled to {WIDEST} pixels")
    return made, f"{'; '.join(words)}." if words else ""


def _sort_key(grid: SampleGrid) -> tuple:
    """(training seed, system, training steps, sampling steps, path); what is not stated counts as 0."""
    record = grid.records[0]
    training, sampling = record.training or Training(), record.sampling or Sampling()
    return (training.seed or 0, record.system, training.steps or 0, sampling.steps or 0, str(grid.path))


def _samples_sha256(sidecar: Path) -> str:
    """The hash of the samples that the sidecar states; "" if it cannot be read."""
    try:
        return str(json.loads(sidecar.read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # the samples of the grid are not known
        return ""


def _read_picture(path: Path) -> tuple[str, bool] | None:
    """`_data_uri` of a file; None also if it cannot be read or is larger than MAX_FILE_BYTES."""
    try:
        return _data_uri(path.read_bytes()) if path.stat().st_size <= MAX_FILE_BYTES else None
    except OSError:
        return None


def picture_uri(content: bytes) -> str:
    """A PNG as a data URI, downsampled to a JPEG if it is large; "" if the content is not a PNG."""
    found = _data_uri(content)
    return found[0] if found else ""


def _data_uri(content: bytes) -> tuple[str, bool] | None:
    """(data URI, whether the picture was downsampled to a JPEG) of a PNG; None if the content is not a valid PNG."""
    from PIL import Image

    if not content.startswith(_PNG):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow warns of pictures that would fill the memory
            with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
                shrink = len(content) > MAX_GRID_BYTES
                if shrink:
                    picture.thumbnail((WIDEST, 4 * WIDEST))  # keeps the ratio of the sides
                    small = io.BytesIO()
                    picture.convert("RGB").save(small, format="JPEG", quality=85)
                    content = small.getvalue()
                else:
                    picture.verify()  # raises if the file is damaged
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError):
        return None
    return f"data:image/{'jpeg' if shrink else 'png'};base64,{base64.b64encode(content).decode('ascii')}", shrink
