"""Matched compute: how many steps of one backbone cost as much as steps of another, or as a budget.

Training compute is Gflops x batch x steps x 3. Sampling compute of an image is Gflops x network evaluations: those of the
sampler's plan, doubled by guidance. Both sides are counted at the input of the same protocol. The other backbone is taken to be
trained with the recipe of this one, `--set` included, and so with the same batch: what it would cost here, not what its
own paper spent. The arithmetic is in whole flops, so that only the rounding to whole steps is left to be told.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from harness import registry
from harness.compute import TRAINING_FACTOR
from harness.diffusion.sampler_plan import guided_evaluations
from harness.errors import UserError
from harness.planning.reference import Reference
from harness.planning.request import Match, Request, check_plans, make_request, plan_of
from harness.protocols import Protocol, Recipe, Sampling
from harness.runs.run import build_arguments
from harness.settings import DEFAULT_PROTOCOL, PlanOptions, RunOptions, SamplingSettings, TrainOptions, only_one
from harness.spec import BackboneSpec, Compute

MAX_STEPS = 2**63 - 1  # what a step's counter holds


def request_from(options: TrainOptions | RunOptions | PlanOptions) -> Request:
    """The request that the options describe, with steps solved for where they are matched."""
    sampling: dict[str, Any] = {}
    samples, match_sampling_to = None, None
    if isinstance(options, SamplingSettings):
        ways = {"--sampling-steps": options.sampling_steps, "--match-sampling": options.match_sampling}
        only_one(ways, "the sampling steps")
        # Steps that are solved for below take the place of the protocol's, which need not fit then.
        steps = (1,) if options.match_sampling else options.sampling_steps
        sampling, samples = {**options.overrides(), "steps": steps}, options.samples
        match_sampling_to = options.match_sampling
    assert options.backbone is not None
    request = make_request(
        backbone=options.backbone,
        protocol=options.protocol or DEFAULT_PROTOCOL,
        steps=checked_steps(options),
        seed=options.seed,
        framework=options.framework,
        data=options.data,
        settings=options.set,
        sampling=sampling,
        samples=samples,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    return matched(request, match=options.match, budget=options.budget, sampling=match_sampling_to)


def checked_steps(options: TrainOptions | RunOptions | PlanOptions) -> int | None:
    """--steps; refused where more than one setting says how long to train."""
    solved = {"--match": options.match, "--budget": options.budget}
    ways: dict[str, Any] = {"--steps": options.steps, **solved}
    if any(value is not None for value in solved.values()):
        ways["--set steps"] = options.set.get("steps")
    only_one(ways, "the training steps")
    return options.steps


def matched(
    request: Request, *, match: Reference | None = None, budget: float | None = None, sampling: Reference | None = None
) -> Request:
    """`request` with the steps that cost as much as `match` or as `budget` Gflops, and the sampler's as `sampling`.

    Refused: both `match` and `budget`; a backbone that does not exist or fit; sampler steps that cannot be had.
    """
    if match is not None or budget is not None:
        to, target = training_target(request.protocol, request.recipe, match=match, budget=budget)
        solved = solve_training(request.compute, request.recipe, to, target)
        recipe = dataclasses.replace(request.recipe, steps=solved.steps)
        request = dataclasses.replace(request, recipe=recipe, match=solved)
    return request if sampling is None else match_sampling(request, sampling)


def training_target(
    task: Protocol, recipe: Recipe, *, match: Reference | None, budget: float | None
) -> tuple[str | None, Fraction]:
    """What is to be matched, by name (None for a budget), and its training compute in flops."""
    if match is None or budget is not None:
        if match is not None or budget is None:
            raise UserError("--match and --budget both set the training steps; give one of them")
        return None, Fraction(budget) * 10**9
    (steps,) = match.steps
    text = match.name(steps)
    compute = compute_of(_reference_spec(match, f"--match {text}"), task, recipe, f"--match {text}: ")
    return text, Fraction(step_flops(compute, recipe) * steps)


def solve_training(compute: Compute, recipe: Recipe, to: str | None, target: Fraction) -> Match:
    """The whole number of steps, at least 1, whose training compute is nearest to `target` flops."""
    step = step_flops(compute, recipe)
    steps = max(1, nearest_count(target, step))
    if steps > MAX_STEPS:
        raise UserError(f"--budget {float(target / 10**9):g} Gflops are {float(steps):.3g} steps; ask for less")
    return Match.of(to, steps, target, steps * step)


def match_sampling(request: Request, reference: Reference) -> Request:
    """`request` with the sampler steps, one for each of `reference`'s, that cost as much an image.

    Steps that round to none, or to more than the diffusion has, are refused with the nearest ones that can be had.
    """
    name, recipe, flag = request.spec.name, request.recipe, f"--match-sampling {reference.backbone}"
    other = _reference_spec(reference, flag)
    if reference.guidance_scale != 1 and other.null_label is None:
        raise UserError(f"{flag}: it has no null label, so classifier-free guidance cannot be had; leave out @cfg")
    if max(reference.steps) > recipe.diffusion_steps:
        raise UserError(
            f"{flag}@{max(reference.steps)}: more sampling steps than the {recipe.diffusion_steps} of the diffusion"
        )
    own = evaluation_flops(request.compute, request.sampling.guidance_scale)
    compute = compute_of(other, request.protocol, recipe, f"{flag}: ")
    others = evaluation_flops(compute, reference.guidance_scale)
    evaluations = evaluation_counts(recipe, request.sampling)
    all_steps = range(1, MAX_STEPS)
    solved = []
    for each in reference.steps:
        target, text = Fraction(others * evaluations(each)), reference.name(each)
        steps = nearest_steps(target / own, evaluations)
        if steps > recipe.diffusion_steps:
            spent = own * evaluations(recipe.diffusion_steps)
            most = bisect.bisect_right(all_steps, spent, key=lambda steps: others * evaluations(steps))
            at_most = f"at most {reference.name(most)}" if most else "less than one of its steps"
            raise UserError(
                f"--match-sampling {text} asks for {steps} sampling steps of {name!r}, but the diffusion has"
                f" {recipe.diffusion_steps}, which cost {at_most}"
            )
        one = own * evaluations(1)
        if 2 * target <= one:
            least = bisect.bisect_left(all_steps, one, key=lambda steps: others * evaluations(steps)) + 1
            raise UserError(
                f"--match-sampling {text} costs less than half a sampling step of {name!r}; one step costs"
                f" as much as {reference.name(least)}"
            )
        solved.append(Match.of(text, steps, target, own * evaluations(steps)))
    drawing = dataclasses.replace(request.sampling, steps=tuple(sorted({each.steps for each in solved})))
    check_plans(recipe, drawing)
    return dataclasses.replace(request, sampling=drawing, match_sampling=tuple(solved))


def nearest_count(target: Fraction, each: int) -> int:
    """How many of `each` come nearest to `target`; half-way goes down, so that a tie does not overspend."""
    return math.ceil(target / each - Fraction(1, 2))


def nearest_steps(target: Fraction, evaluations: Callable[[int], int]) -> int:
    """The sampler steps, at least 1, whose network evaluations come nearest to `target`; half-way goes down.

    evaluations: by number of steps; must not fall with them.
    """
    above = bisect.bisect_left(range(1, MAX_STEPS), math.ceil(target), key=evaluations) + 1
    return min(range(max(1, above - 1), above + 1), key=lambda steps: (abs(evaluations(steps) - target), steps))


def evaluation_counts(recipe: Recipe, sampling: Sampling) -> Callable[[int], int]:
    """The function from a number of sampler steps to its network evaluations for one image, without guidance.

    It has a value for every number: steps that the sampler refuses count one each (`check_plans` refuses them in the
    sampler's words), and beyond the steps of the diffusion each costs what the last one of them does.
    """
    most = recipe.diffusion_steps

    @functools.cache
    def within(steps: int) -> int:
        try:
            return plan_of(recipe, sampling, steps).evaluations
        except UserError:
            return steps

    def counted(steps: int) -> int:
        if steps <= most:
            return within(steps)
        last = within(most) - within(most - 1) if most > 1 else within(most)
        return within(most) + (steps - most) * max(1, last)

    return counted


def step_flops(compute: Compute, recipe: Recipe) -> int:
    """Training compute of one optimiser step, in flops."""
    return compute.flops * recipe.batch * TRAINING_FACTOR


def evaluation_flops(compute: Compute, guidance_scale: float) -> int:
    """Sampling compute of one evaluation for one image, in flops; guidance doubles it."""
    return compute.flops * guided_evaluations(1, guidance_scale)


def compute_of(spec: BackboneSpec, task: Protocol, recipe: Recipe, where: str = "") -> Compute:
    """Compute of a denoiser at the protocol's input, with the output channels that the recipe's objective asks for."""
    objective = registry.objectives.get(recipe.objective)
    try:
        compute = spec.count(**build_arguments(spec, task, objective.out_channels(task.in_channels)))
    except UserError as refusal:
        raise UserError(f"{where}{refusal}") from refusal
    if compute.flops < 1:
        raise UserError(f"{where}backbone {spec.name!r} counts no compute, so nothing can be matched to it")
    return compute


def _reference_spec(reference: Reference, where: str) -> BackboneSpec:
    try:
        spec = registry.backbones.get(reference.backbone)
    except UserError as refusal:
        raise UserError(f"{where}: {refusal}") from refusal
    if spec.kind != "denoiser":
        raise UserError(f"{where}: {spec.name!r} is not a denoiser but of kind {spec.kind}; match denoisers")
    return spec


def budget_table(task: Protocol, recipe: Recipe, *, match: Reference | None, budget: float | None) -> dict[str, Any]:
    """What every registered denoiser would get from one training budget, JSON-ready; who does not fit is named."""
    to, target = training_target(task, recipe, match=match, budget=budget)
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    in_epoch = registry.datasets.get(task.dataset).images if task.dataset in registry.datasets else None
    for spec in registry.backbones:
        if spec.kind != "denoiser":
            continue
        try:
            compute = compute_of(spec, task, recipe)
            solved = solve_training(compute, recipe, to, target)
        except UserError as refusal:
            left_out.append({"name": spec.name, "reason": str(refusal)})
            continue
        images = solved.steps * recipe.batch
        rows.append(
            {
                "name": spec.name,
                "params": compute.params,
                "gflops": compute.gflops,
                "gflops_source": compute.source,
                "steps": solved.steps,
                "images": images,
                "epochs": None if in_epoch is None else images / in_epoch,
                "training_gflops": solved.gflops,
                "relative_error": solved.relative_error,
            }
        )
    return {
        "to": to,
        "gflops_target": float(target / 10**9),
        "protocol": task.name,
        "input": f"{task.input_size}x{task.input_size}x{task.in_channels}",
        "batch": recipe.batch,
        "rows": rows,
        "left_out": left_out,
    }
