"""From a study to its runs: what each is, where it goes, the commands that make it, and what it costs.

Budgets of one backbone and seed are one run that is sampled at several steps, for more steps continue a run. Runs go where
`harness run` puts them, so work that another study or a person has done is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import registry
from harness.data.examples import Examples
from harness.data.load import training_data
from harness.errors import UserError
from harness.pipeline.train import run_spec
from harness.planning.matching import compute_of, nearest_count, solve_training, training_target
from harness.planning.plan import missing, missing_evaluator_files
from harness.planning.request import CHECKPOINT_BYTES, Request, make_request
from harness.protocols import Protocol, Recipe, get_protocol, override
from harness.runs.run import RUNS, RunSpec
from harness.studies import Study

WEIGHT_BYTES = 4  # a parameter: the snapshot's float32


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study. The requests differ in their guidance alone; each has a command, which the user could give."""

    spec: RunSpec
    marks: tuple[int, ...]  # steps at which samples are drawn, ascending; the last one ends the training
    requests: tuple[Request, ...]
    commands: tuple[tuple[str, ...], ...]  # as they are typed

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def folder(self) -> Path:
        return RUNS / self.name

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
        return RUNS / "studies" / self.study.name


def expand(study: Study) -> Expansion:
    """Resolve every name, solve every budget and try every plan: what cannot be had is refused before anything runs."""
    where = str(study.file)
    task = get_protocol(study.protocol)
    steps = {name: _marks(study, name, task) for name in study.backbones}
    wanted = {
        (name, seed): [_request(study, name, seed, steps[name][-1], scale) for scale in _scales(study, task)]
        for seed in study.seeds
        for name in study.backbones
    }
    requests = [each for some in wanted.values() for each in some]
    for name, request in zip(study.backbones, requests[:: len(_scales(study, task))], strict=False):
        if request.spec.kind != "denoiser":
            raise UserError(f"{where}: backbone {name!r} is one part of a system and makes no images by itself")
    if lacks := [*missing(requests[0]), *missing_evaluator_files(task)]:
        raise UserError(f"{where}: protocol {task.name!r} cannot run here: {'; '.join(lacks)}")
    data = training_data(task, requests[0].data)
    return Expansion(
        study=study, protocol=task, data=data,
        runs=tuple(
            StudyRun(
                spec=run_spec(some[0], data), marks=steps[name], requests=tuple(some),
                commands=tuple(_words(study, name, seed, steps[name], each) for each in some),
            )
            for (name, seed), some in wanted.items()
        ),
    )  # fmt: skip


def _scales(study: Study, task: Protocol) -> tuple[float, ...]:
    return study.sampling.get("guidance_scales", (task.sampling.guidance_scale,))


def _recipe(study: Study, name: str, task: Protocol) -> Recipe:
    try:
        return override(task.recipe, study.settings(name))
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


def _request(study: Study, name: str, seed: int, steps: int, scale: float) -> Request:
    drawing = {key: value for key, value in study.sampling.items() if key not in ("guidance_scales", "samples")}
    data = study.options.get("data")
    try:
        return make_request(
            backbone=name, protocol=study.protocol, steps=steps, seed=seed,
            framework=study.options.get("framework", "torch"), data=None if data is None else Path(data),
            settings=study.settings(name), sampling={**drawing, "guidance_scale": scale},
            samples=study.sampling.get("samples"),
        )  # fmt: skip
    except UserError as refusal:
        raise UserError(f"{study.file}: {refusal}") from refusal


FLAGS = {  # of [sampling], where they are not called the same
    "sampler": "--sampler",
    "eta": "--eta",
    "guidance_channels": "--guidance-channels",
    "label_policy": "--labels",
    "seed": "--sampling-seed",
    "samples": "--samples",
}


def _words(study: Study, name: str, seed: int, marks: tuple[int, ...], request: Request) -> tuple[str, ...]:
    """The command of a run at one guidance scale: every item that the study sets, and nothing else."""
    processes = study.processes
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", processes, "-m"] if processes > 1 else []
    words: list[Any] = [
        *torchrun,
        "harness",
        "run",
        "--backbone",
        name,
        "--protocol",
        study.protocol,
        "--seed",
        seed,
        "--steps",
        marks[-1],
    ]
    if marks[:-1]:
        words += ["--evaluate-at", ",".join(map(str, marks[:-1]))]
    for item, value in study.settings(name).items():
        words += ["--set", f"{item}={value}"]
    if "steps" in study.sampling:
        words += ["--sampling-steps", ",".join(map(str, study.sampling["steps"]))]
    if "guidance_scales" in study.sampling:
        words += ["--cfg", repr(float(request.sampling.guidance_scale))]
    for item, flag in FLAGS.items():
        if item in study.sampling:
            words += [flag, study.sampling[item]]
    for item, value in study.options.items():
        for each in value if isinstance(value, tuple) else (value,):
            words += [f"--{item.replace('_', '-')}", each]
    return tuple(map(str, [*words, "--no-report"]))
