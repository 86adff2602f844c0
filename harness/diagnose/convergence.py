"""A run's values against a reference convergence point, and points made of runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from harness.diagnose.subject import read_losses
from harness.errors import UserError
from harness.runs.run import Run, open_run
from results.reference_points import (
    Convergence,
    Quantity,
    ReferencePoint,
    check,
    distances,
    losses_at,
    make,
    matching,
    packaged,
    read,
)
from results.store import find_record_files, load


def values_of(run: Run, marks: Iterable[int]) -> dict[Quantity, float]:
    """The losses of a run at these steps, as far as it has done them, and the distances of its records."""
    records = load(find_record_files([run.records])).records if run.records.is_file() else ()
    return {**losses_at(read_losses(run), marks), **distances(records)}


def check_convergence(folder: Path, point: Path | None = None) -> Convergence:
    """Whether the run in `folder` goes as healthy seeds do. point: a file; None: the packaged one of its backbone and protocol.

    UserError where there is no such point, or where it is of another backbone or protocol.
    """
    run = open_run(folder)
    recipe = run.identity["recipe"]
    if point is None:
        reference = matching(packaged(), backbone=run.backbone, protocol=run.protocol.name, recipe=recipe)
    else:
        reference = read(point)
        if (reference.backbone, reference.protocol) != (run.backbone, run.protocol.name):
            raise UserError(
                f"{point} is of {reference.backbone} on {reference.protocol}, and {folder} of {run.backbone} on "
                f"{run.protocol.name}"
            )
    steps = [quantity.step for quantity in reference.values if quantity.name == "loss"]
    found = check(reference, values_of(run, steps), recipe)
    if run.identity["dataset_sha256"] != reference.dataset_sha256:
        data = (run.identity["dataset_sha256"][:12], reference.dataset_sha256[:12])
        found = replace(found, recipe_differences={**found.recipe_differences, "training data": data})
    return found


def make_reference_point(folders: Sequence[Path], marks: Sequence[int], name: str | None = None) -> ReferencePoint:
    """The point of these runs, which must differ in their seeds alone. marks: steps at which the loss is kept.

    name: of the point; None: protocol and backbone. UserError for runs of different experiments, or too few seeds.
    """
    runs = [open_run(folder) for folder in folders]
    if not runs:
        raise UserError("a reference point needs runs")
    first = runs[0]
    for run in runs[1:]:
        if {**run.identity, "seed": 0} != {**first.identity, "seed": 0}:
            raise UserError(f"{run.folder} and {first.folder} are runs of different experiments, not seeds of one")
    for run in runs:
        if len(read_losses(run)) < max(marks):
            raise UserError(f"{run.folder} has done {len(read_losses(run))} steps, and the point needs {max(marks)}")
    versions = first.environment.get("versions", {})
    commits = {run.environment.get("git_commit") for run in runs} - {None}
    point = make(
        [(run.seed, values_of(run, marks)) for run in runs],
        backbone=first.backbone, protocol=first.protocol.name, framework=first.framework,
        dataset_sha256=first.identity["dataset_sha256"], recipe=first.identity["recipe"],
        made={
            "device": first.resolved.device_name, "precision": first.resolved.precision, "threads": first.resolved.threads,
            "harness": first.environment.get("harness_version"), "git_commits": sorted(commits),
            "versions": {name: versions[name] for name in ("python", first.framework, "numpy") if name in versions},
        },
    )  # fmt: skip
    return point if name is None else replace(point, name=name)
