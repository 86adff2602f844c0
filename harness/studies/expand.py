"""From a study to its runs: what each is, where it goes, the commands that make it, and what it costs.

Budgets of one backbone and seed are one run that is sampled at several steps, for more steps continue a run. Runs go where
`harness run` puts them, so work that another study or a person has done is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness import registry
from harness.data.examples import Examples
from harness.data.load import training_data
from harness.errors import UserError
from harness.planning.matching import compute_of, nearest_count, request_from, solve_training, training_target
from harness.planning.plan import missing, missing_evaluator_files
from harness.planning.request import CHECKPOINT_BYTES, Request
from harness.protocols import Protocol, Recipe, get_protocol, override
from harness.runs.run import RUNS_FOLDER, RunSpec
from harness.settings import RunOptions, command_words
from harness.studies import Study

WEIGHT_BYTES = 4  # a parameter: the snapshot's float32


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study. The requests differ in their guidance alone; each has a command, which the user could give."""

    spec: RunSpec
    marks: tuple[int, ...]  # steps at which samples are drawn, ascending; the last one ends the training
    options: tuple[RunOptions, ...]  # one for each guidance scale
    requests: tuple[Request, ...]
    commands: tuple[tuple[str, ...], ...]  # as they are typed

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def folder(self) -> Path:
        return RUNS_FOLDER / self.name

    @property
    def steps(self) -> int:
        return self.marks[-1]

    @property
    def gflops_step(self) -> float:
        """Training compute of a step."""
        return self.requests[0].gflops_step

    @property
    def disk_bytes(self) -> int:
        """Of two checkpoints, the kept weights and the samples."""
        request, task = self.requests[0], self.requests[0].protocol
        sets = len(self.marks) * sum(len(each.sampling.steps) for each in self.requests)
        image = task.resolution**2 * task.image_channels
        weights = (2 * CHECKPOINT_BYTES + (len(self.marks) - 1) * WEIGHT_BYTES) * request.compute.params
        return weights + sets * request.samples * image


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """A study's protocol, its images and its runs, in the order in which they are launched: seed by seed."""

    study: Study
    protocol: Protocol
    data: Examples
    runs: tuple[StudyRun, ...]

    @property
    def folder(self) -> Path:
        """Logs, reasons of failures and the report."""
        return RUNS_FOLDER / "studies" / self.study.name


def expand(study: Study) -> Expansion:
    """Resolve every name, solve every budget and try every plan: what cannot be had is refused before anything runs."""
    where = str(study.file)
    task = get_protocol(study.protocol)
    steps = {name: _marks(study, name, task) for name in study.backbones}
    scales: tuple[float | None, ...] = study.guidance_scales or (None,)
    wanted = {
        (name, seed): [_options(study, name, seed, steps[name], scale) for scale in scales]
        for seed in study.seeds
        for name in study.backbones
    }
    requests = {run: [_request(study, options) for options in of_run] for run, of_run in wanted.items()}
    for (name, _), (request, *_) in requests.items():
        if request.spec.kind != "denoiser":
            raise UserError(f"{where}: backbone {name!r} is one part of a system and makes no images by itself")
    first = next(iter(requests.values()))[0]
    brought = {"features_weights", "reference"} & study.settings.keys()
    if reasons := [*missing(first), *([] if brought else missing_evaluator_files(task))]:
        raise UserError(f"{where}: protocol {task.name!r} cannot run here: {'; '.join(reasons)}")
    data = training_data(task, first.data)
    return Expansion(
        study=study, protocol=task, data=data,
        runs=tuple(
            StudyRun(
                spec=requests[name, seed][0].run_spec(data), marks=steps[name], options=tuple(of_run),
                requests=tuple(requests[name, seed]),
                commands=tuple(_words(study, options) for options in of_run),
            )
            for (name, seed), of_run in wanted.items()
        ),
    )  # fmt: skip


def _recipe(study: Study, name: str, task: Protocol) -> Recipe:
    try:
        return override(task.recipe, study.recipe_of(name))
    except UserError as refusal:
        raise UserError(f"{study.file}: recipe of {name}: {refusal}") from refusal


def _marks(study: Study, name: str, task: Protocol) -> tuple[int, ...]:
    """After how many steps the backbone is sampled, ascending."""
    recipe = _recipe(study, name, task)
    way, values = study.budgets or ("steps", (recipe.steps,))
    if way == "steps":
        solved = set(values)
    elif way == "images":
        solved = {max(1, nearest_count(value, recipe.batch)) for value in values}
    else:
        spec = registry.backbones.get(name)
        compute = compute_of(spec, task, recipe, f"{study.file}: ")
        solved = set()
        for value in values:
            # What is matched is trained with its own recipe, so that all of a study are held against one number.
            own = recipe if way == "gflops" else _recipe(study, value.backbone, task)
            sought = {"budget": value, "match": None} if way == "gflops" else {"match": value, "budget": None}
            target = training_target(task, own, **sought)
            solved.add(solve_training(compute, recipe, *target).steps)
    if study.evaluate_at and max(study.evaluate_at) > max(solved):
        raise UserError(
            f"{study.file}: evaluate_at {max(study.evaluate_at)} lies beyond the {max(solved)} steps of {name}; lower it"
        )
    return tuple(sorted({*solved, *study.evaluate_at}))


def _options(study: Study, name: str, seed: int, marks: tuple[int, ...], scale: float | None) -> RunOptions:
    """The settings of a run at one guidance scale: what the study sets, and nothing else. scale None: the protocol's."""
    try:
        return RunOptions(
            backbone=name, protocol=study.protocol, seed=seed, steps=marks[-1], evaluate_at=marks[:-1] or None,
            set=study.recipe_of(name), cfg=scale, report=False, **study.settings,
        )  # fmt: skip
    except UserError as refusal:
        raise UserError(f"{study.file}: {refusal}") from refusal


def _request(study: Study, options: RunOptions) -> Request:
    try:
        return request_from(options)
    except UserError as refusal:
        raise UserError(f"{study.file}: {refusal}") from refusal


def _words(study: Study, options: RunOptions) -> tuple[str, ...]:
    """The command of a run at one guidance scale."""
    words = command_words("run", options)
    if study.processes == 1:
        return words
    return ("torchrun", "--standalone", "--nproc-per-node", str(study.processes), "-m", *words)
