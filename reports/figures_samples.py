"""Figure 7: samples of every model from the same noise and label."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.diffusion.guidance import Guidance
from harness.errors import UserError
from harness.images.npz import read_npz_head
from reports.charts import Figure, Grid, model_of
from reports.figures_study import DIT
from reports.render import one_line
from reports.texts import count_text
from results.checked_fields import canonical_json
from results.records import Record

COLUMNS = 10  # samples per model
MAX_ROWS = 16  # models per grid
MAX_SETS = 2000  # sidecars that are read
MAX_GRIDS = 4  # one grid per protocol
_MAX_BYTES = 1_000_000  # of a sidecar


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SampleSet:
    """A sample set of a run: its path and how it was made."""

    path: Path
    sha256: str
    model: str
    run: Mapping[str, Any]  # the identity of the run, as in its run.json
    steps: int  # training steps
    sampling: Mapping[str, Any]  # the settings of sampling, the seed included, as in the sidecar


def same_noise(folders: Sequence[Path], records: Iterable[Record]) -> Figure | None:
    """Figure 7: a row for each model, a column for each sample index; all with the same sampling settings and seed.

    folders: the folders of record files, with samples/*/samples.npz of runs. Sets that cannot be read are left out (other
    commands name them). None where no two models have such sets.
    """
    sets = _sets(folders)
    if not sets:
        return None
    records = list(records)
    wanted = {record.protocol for record in records}
    by_noise: dict[str, list[_SampleSet]] = {}  # noise key -> sets
    for each in sets:
        if each.run["protocol"].get("name") in wanted:
            by_noise.setdefault(_noise_key(each), []).append(each)
    gflops = {model_of(record): record.gflops or 0.0 for record in records}
    candidates = [(key, members) for key, members in by_noise.items() if len({each.model for each in members}) > 1]
    # A protocol's grid is its first candidate: the most models, and of several of these the most sampling steps.
    candidates.sort(key=lambda pair: (-len({each.model for each in pair[1]}), -_sampling_steps(pair[1][0]), pair[0]))
    grids: list[Grid] = []
    rows: list[dict[str, object]] = []
    protocols: set[str] = set()  # those that have a grid
    for _, members in candidates:
        protocol = canonical_json(members[0].run["protocol"])
        if protocol in protocols or len(grids) == MAX_GRIDS:
            continue
        grid_and_rows = _grid(members, gflops)
        if grid_and_rows is not None:
            grid, grid_rows = grid_and_rows
            protocols.add(protocol)
            grids.append(grid)
            rows += [{"grid": len(grids), **row} for row in grid_rows]
    if not grids:
        return None
    return Figure(
        name="figure-7", title="The same noise and label, drawn by every model", panels=(), rows=tuple(rows),
        grids=tuple(grids),
    )  # fmt: skip


def _grid(members: Sequence[_SampleSet], gflops: Mapping[str, float]) -> tuple[Grid, list[dict]] | None:
    """(grid, its rows of data) of sample sets with the same noise key; None if fewer than two models can be shown.

    gflops: model -> Gflops per forward pass.
    """
    lengths: dict[int, set[str]] = {}  # training steps -> models
    for each in members:
        lengths.setdefault(each.steps, set()).add(each.model)
    usual = max(lengths, key=lambda steps: (len(lengths[steps]), steps))  # the training length of most models
    chosen: dict[str, _SampleSet] = {}  # model -> its set: of the usual length, or else of the longest
    for each in sorted(
        members, key=lambda each: (each.steps != usual, -each.steps, each.run.get("seed", 0), each.sha256)
    ):
        chosen.setdefault(each.model, each)
    order = sorted(chosen.values(), key=lambda each: (gflops.get(each.model, 0.0), each.model))
    order = order[-MAX_ROWS:]  # the largest models
    families = list(dict.fromkeys(_family(each.model) for each in order))
    # The sort is stable, so sets of one family and patch size stay in the order of Gflops.
    order.sort(key=lambda each: (families.index(_family(each.model)), _negated_patch(each.model)))
    shown = []  # (set, its first images (COLUMNS, H, W, C), their labels (COLUMNS,))
    for each in order:
        try:
            images, labels = read_npz_head(each.path, COLUMNS)
        except UserError:
            continue
        if labels is not None:
            shown.append((each, images, labels))
    if not shown:
        return None
    # Samples of another shape or with other labels than those of the first model do not correspond to them.
    _, first_images, first_labels = shown[0]
    shape = first_images.shape
    shown = [row for row in shown if row[1].shape == shape and np.array_equal(row[2], first_labels)]
    if len(shown) < 2:
        return None
    first = shown[0][0]
    names = [
        each.model if each.steps == usual else f"{each.model}, {count_text(each.steps)} steps" for each, _, _ in shown
    ]
    protocol = first.run["protocol"]
    heading = (
        f"{protocol.get('dataset')} {protocol.get('resolution')}x{protocol.get('resolution')}, {first.sampling.get('sampler')} with "
        f"{_sampling_steps(first)} steps{_guidance(first)}, sampling seed {first.sampling.get('seed')}, after "
        f"{count_text(usual)} training steps"
    )
    grid = Grid(
        heading=one_line(heading),
        rows=tuple(names),
        columns=tuple(f"label {label}" for label in first_labels),
        tiles=np.stack([images for _, images, _ in shown]),
        note=f"samples 0 to {shape[0] - 1}; models by family, DiTs by patch size, then from the fewest Gflops (above) to the most",
    )
    rows = [
        {
            "model": each.model,
            "sample": index,
            "label": int(label),
            "training_steps": each.steps,
            "gflops": gflops.get(each.model),
            "training_seed": each.run.get("seed"),
            "sampler": each.sampling.get("sampler"),
            "sampling_steps": _sampling_steps(each),
            "sampling_seed": each.sampling.get("seed"),
            "samples_sha256": each.sha256,
        }
        for each, _, labels in shown
        for index, label in enumerate(labels)
    ]
    return grid, rows


def _family(model: str) -> str:
    """The part of a model's name before the first dash: `dit`, `adm`, ..."""
    return model.partition("-")[0]


def _negated_patch(model: str) -> int:
    """The patch size of a DiT, negated, so that the largest comes first; 0 for other models."""
    dit = DIT.fullmatch(model)
    return -int(dit["patch"]) if dit else 0


def _sets(folders: Sequence[Path]) -> list[_SampleSet]:
    """The sample sets of runs in these folders, without those whose sidecar cannot be read."""
    paths = sorted({path for folder in folders for path in folder.glob("samples/*/samples.json")})[:MAX_SETS]
    sample_sets = []
    for path in paths:
        try:
            if path.stat().st_size > _MAX_BYTES or not path.with_suffix(".npz").is_file():
                continue
            sidecar = json.loads(path.read_text(encoding="utf-8"))
            identity = sidecar["identity"]
            sample_set = _SampleSet(
                path=path.with_suffix(".npz"),
                sha256=str(sidecar["sha256"]),
                model=one_line(str(identity["run"]["backbone"])),
                run={**identity["run"], "protocol": dict(identity["run"]["protocol"])},
                steps=int(identity["training_steps"]),
                sampling=dict(identity["sampling"]),
            )
            _noise_key(sample_set)  # raises if it cannot be written as JSON
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # of another kind or version, or damaged
        sample_sets.append(sample_set)
    return sample_sets


def _noise_key(each: _SampleSet) -> str:
    """A key that is equal for sets with the same sampling settings, and the same noise and label at the same index."""
    return canonical_json([each.run["protocol"], each.run.get("recipe", {}).get("schedule"), each.sampling])


def _sampling_steps(each: _SampleSet) -> int:
    """The number of sampling steps; 0 if it is not known."""
    steps = each.sampling.get("steps")
    return steps if isinstance(steps, int) else 0


def _guidance(each: _SampleSet) -> str:
    """`, guidance 1.5`, or `, guidance 1.5@0.1-0.8`; "" without guidance."""
    scale = each.sampling.get("guidance_scale")
    interval, rule = (str(each.sampling.get(name, "")) for name in ("guidance_interval", "guidance_rule"))
    return (
        f", guidance {Guidance(scale, interval, rule).short}" if isinstance(scale, float | int) and scale != 1 else ""
    )
