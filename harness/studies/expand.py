"""Expands a study into its runs, each with its identity, folder, commands and cost.

All budgets of one backbone and seed belong to one run, which is sampled at several training steps, because a longer
training continues a shorter one. The runs are in the folders of `harness run`, so that work which another study or a user
has done is not repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness import registry
from harness.data.examples import Examples
from harness.data.load import check_labels, training_data
from harness.diffusion.guidance import Guidance
from harness.errors import UserError
from harness.planning.matching import (
    auxiliary_of,
    compute_of,
    nearest_count,
    request_from,
    solve_training,
    training_target,
)
from harness.planning.plan import missing, missing_evaluator_files
from harness.planning.request import WEIGHT_BYTES, Request
from harness.protocols import Protocol, Recipe, get_protocol, override
from harness.runs import checkpoints
from harness.runs.run import RUNS_FOLDER, RunSpec
from harness.settings import RunOptions, command_words
from harness.studies import Study


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study. It has one request, and one command that a user can also run, for each guidance scale and
    each seed of the samples.
    """

    spec: RunSpec
    milestones: tuple[int, ...]  # training steps that are sampled, ascending; the last one ends the training
    options: tuple[
        RunOptions, ...
    ]  # one for each scale and sampling seed; `requests` and `commands` are in the same order
    requests: tuple[Request, ...]
    commands: tuple[tuple[str, ...], ...]  # as words of a command line
    variant: str = ""  # name of the variant of the study; "": the study has none

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def label(self) -> str:
        """The name for messages, with the variant, which the name of a run does not tell."""
        return f"{self.name} ({self.variant})" if self.variant else self.name

    @property
    def folder(self) -> Path:
        return RUNS_FOLDER / self.name

    @property
    def steps(self) -> int:
        """Training steps in all."""
        return self.milestones[-1]

    @property
    def gflops_step(self) -> float:
        """Training compute of one optimiser step, in Gflops."""
        return self.requests[0].gflops_step

    @property
    def disk_bytes(self) -> int:
        """Disk space of the checkpoints that are kept at the end, the EMA checkpoints, other averages and the samples."""
        request, protocol = self.requests[0], self.requests[0].protocol
        sets = len(self.milestones) * sum(len(each.sampling.steps) for each in self.requests)
        image_bytes = protocol.resolution**2 * protocol.image_channels
        # The EMA checkpoint of the last milestone is a hard link into the newest checkpoint.
        ema_bytes = (len(self.milestones) - 1) * WEIGHT_BYTES  # per parameter
        weight_bytes = checkpoints.KEPT * request.checkpoint_bytes + ema_bytes * request.compute.params
        weight_bytes += request.snapshot_bytes(self.milestones)
        return weight_bytes + sets * request.samples * image_bytes


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """A study with its protocol, its data and its runs, in launch order: all runs of a seed before the next seed."""

    study: Study
    protocol: Protocol
    data: Examples
    runs: tuple[StudyRun, ...]

    @property
    def folder(self) -> Path:
        """The folder of logs, failures and the report."""
        return RUNS_FOLDER / "studies" / self.study.name


def expand(study: Study) -> Expansion:
    """Resolve all names, solve all budgets and check all plans.

    Raises `UserError`, which names the study's file, before anything runs if something is unknown or is missing.
    """
    try:
        return _expand(study)
    except UserError as error:
        if str(study.file) in str(error):
            raise
        raise UserError(f"{study.file}: {error}") from error


def _expand(study: Study) -> Expansion:
    where = str(study.file)
    protocol = get_protocol(study.protocol)
    milestones = {
        (variant, name): _milestones(study, variant, name, protocol)
        for variant in study.variants
        for name in study.backbones
    }
    scales: tuple[Guidance | None, ...] = study.guidance_scales or (None,)
    # by variant, backbone and seed of a run, in launch order: its options, one for each guidance scale and sampling seed
    options_of = {
        (variant, name, seed): [
            _options(study, variant, name, seed, milestones[variant, name], scale, sampling_seed)
            for scale in scales
            for sampling_seed in study.sampling_seeds or (None,)
        ]
        for seed in study.seeds
        for variant in study.variants
        for name in study.backbones
    }
    requests = {key: [request_from(options) for options in of_run] for key, of_run in options_of.items()}
    for (_, name, _), (request, *_) in requests.items():
        if request.spec.kind != "denoiser":
            raise UserError(f"{where}: backbone {name!r} is one part of a system and cannot generate images alone")
    first = next(iter(requests.values()))[0]  # stands for all: protocol and data are those of the study
    reasons = missing(first)
    if "features_weights" not in study.settings:  # with them the reference may be the data set
        reasons += missing_evaluator_files(protocol, reference_given="reference" in study.settings)
    if reasons:
        raise UserError(f"{where}: protocol {protocol.name!r} cannot run here: {'; '.join(reasons)}")
    data = training_data(protocol, first.data)
    data.check(protocol)
    check_labels(data, protocol.num_classes)
    return Expansion(
        study=study, protocol=protocol, data=data,
        runs=tuple(
            StudyRun(
                spec=requests[key][0].run_spec(data), milestones=milestones[key[:2]], options=tuple(of_run),
                requests=tuple(requests[key]),
                commands=tuple(_command(study, options) for options in of_run), variant=key[0],
            )
            for key, of_run in options_of.items()
        ),
    )  # fmt: skip


def _recipe(study: Study, variant: str, name: str, protocol: Protocol) -> Recipe:
    """The recipe of the backbone `name` in that variant of the study."""
    try:
        return override(protocol.recipe, study.recipe_of(name, variant))
    except UserError as error:
        raise UserError(f"{study.file}: recipe of {f'{variant}, ' if variant else ''}{name}: {error}") from error


def _milestones(study: Study, variant: str, name: str, protocol: Protocol) -> tuple[int, ...]:
    """The training steps at which the backbone `name` is sampled in that variant, ascending."""
    recipe = _recipe(study, variant, name, protocol)
    kind, values = study.budgets or ("steps", (recipe.steps,))
    if kind == "steps":
        budget_steps = set(values)
    elif kind == "images":
        budget_steps = {max(1, nearest_count(value, recipe.batch)) for value in values}
    else:
        spec = registry.backbones.get(name)
        compute = compute_of(spec, protocol, recipe, f"{study.file}: ")
        auxiliary = auxiliary_of(spec, protocol, recipe)
        budget_steps = set()
        for value in values:
            if kind == "gflops":
                reference_name, target = training_target(protocol, recipe, match=None, budget=value)
            else:
                # The reference is counted with its own recipe in this study: the same target for all backbones.
                reference_recipe = _recipe(study, variant, value.backbone, protocol)
                reference_name, target = training_target(protocol, reference_recipe, match=value, budget=None)
            budget_steps.add(solve_training(spec, compute, recipe, reference_name, target, auxiliary).steps)
    if study.evaluate_at and max(study.evaluate_at) > max(budget_steps):
        raise UserError(
            f"{study.file}: evaluate_at {max(study.evaluate_at)} is more than the {max(budget_steps)} training steps of {name}; lower it"
        )
    return tuple(sorted({*budget_steps, *study.evaluate_at}))


def _options(
    study: Study,
    variant: str,
    name: str,
    seed: int,
    milestones: tuple[int, ...],
    scale: Guidance | None,
    sampling_seed: int | None,
) -> RunOptions:
    """The options of a run at one guidance scale and sampling seed, with only the settings that the study sets.

    scale, sampling_seed: None: that of the study's settings or of the protocol.
    """
    settings = {**study.settings, **study.variants[variant].settings}
    if sampling_seed is not None:
        settings["sampling_seed"] = sampling_seed
    return RunOptions(
        backbone=name, protocol=study.protocol, seed=seed, steps=milestones[-1], evaluate_at=milestones[:-1] or None,
        set=study.recipe_of(name, variant), cfg=scale, report=False,
        **settings,
    )  # fmt: skip


def _command(study: Study, options: RunOptions) -> tuple[str, ...]:
    """The command of a run at one guidance scale and sampling seed, as words."""
    words = command_words("run", options, always=("seed",))  # begins with "harness"
    if study.processes == 1:
        return words
    return ("torchrun", "--standalone", "--nproc-per-node", str(study.processes), "-m", *words)
