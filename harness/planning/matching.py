"""Matched compute: the number of steps of one backbone that cost as much as steps of another one, or as a budget.

Training compute is Gflops x batch x steps x 3. Sampling compute of one image is Gflops x network evaluations: those of
the sampler's plan, doubled by guidance. Both backbones are counted at the input of the same protocol and with the same
recipe (`--set` included), and so with the same batch: the cost of the reference is what it would cost here, not what
its paper spent. The arithmetic uses whole flops, so the only error, which is reported, comes from rounding to whole
steps.
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

MAX_STEPS = 2**63 - 1  # largest value of a step counter


def request_from(options: TrainOptions | RunOptions | PlanOptions) -> Request:
    """The request that the options describe; if compute is matched, with the matching steps."""
    sampling: dict[str, Any] = {}
    samples, match_sampling_to = None, None
    if isinstance(options, SamplingSettings):
        flags = {"--sampling-steps": options.sampling_steps, "--match-sampling": options.match_sampling}
        only_one(flags, "the sampling steps")
        # Matched steps, computed below, replace the protocol's, which may then be invalid here.
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
    """The value of --steps. Raises `UserError` if more than one setting sets the training steps."""
    matching = {"--match": options.match, "--budget": options.budget}
    flags: dict[str, Any] = {"--steps": options.steps, **matching}
    if any(value is not None for value in matching.values()):
        flags["--set steps"] = options.set.get("steps")
    only_one(flags, "the training steps")
    return options.steps


def matched(
    request: Request, *, match: Reference | None = None, budget: float | None = None, sampling: Reference | None = None
) -> Request:
    """`request` with the training steps that cost as much as `match`, or as `budget` Gflops, and with the sampler steps
    that cost as much as `sampling`.

    Raises `UserError` if both `match` and `budget` are given, if a backbone does not exist or does not fit the
    protocol, or if no possible number of sampler steps matches.
    """
    if match is not None or budget is not None:
        to, target = training_target(request.protocol, request.recipe, match=match, budget=budget)
        solved = solve_training(request.compute, request.recipe, to, target)
        recipe = dataclasses.replace(request.recipe, steps=solved.steps)
        request = dataclasses.replace(request, recipe=recipe, match=solved)
    return request if sampling is None else match_sampling(request, sampling)


def training_target(
    protocol: Protocol, recipe: Recipe, *, match: Reference | None, budget: float | None
) -> tuple[str | None, Fraction]:
    """The name of the reference (None for a budget) and its training compute in flops."""
    if match is None or budget is not None:
        if match is not None or budget is None:
            raise UserError("--match and --budget both set the training steps; give one of them")
        return None, Fraction(budget) * 10**9
    (steps,) = match.steps
    text = match.name(steps)
    compute = compute_of(_reference_spec(match, f"--match {text}"), protocol, recipe, f"--match {text}: ")
    return text, Fraction(step_flops(compute, recipe) * steps)


def solve_training(compute: Compute, recipe: Recipe, to: str | None, target: Fraction) -> Match:
    """The whole number of steps, at least 1, whose training compute is nearest to `target` flops."""
    step = step_flops(compute, recipe)
    steps = max(1, nearest_count(target, step))
    if steps > MAX_STEPS:
        raise UserError(
            f"--budget {float(target / 10**9):g} Gflops are {float(steps):.3g} steps; give a smaller budget"
        )
    return Match.of(to, steps, target, steps * step)


def match_sampling(request: Request, reference: Reference) -> Request:
    """`request` with the sampler steps that cost as much per image as each of `reference`'s steps.

    Raises `UserError`, which gives the nearest possible steps, if steps round to 0 or to more than the diffusion has.
    """
    name, recipe, flag = request.spec.name, request.recipe, f"--match-sampling {reference.backbone}"
    other = _reference_spec(reference, flag)
    if reference.guidance_scale != 1 and other.null_label is None:
        raise UserError(f"{flag}: it has no null label, so it cannot use classifier-free guidance; leave out @cfg")
    if max(reference.steps) > recipe.diffusion_steps:
        raise UserError(
            f"{flag}@{max(reference.steps)}: more sampling steps than the {recipe.diffusion_steps} of the diffusion"
        )
    evaluation = evaluation_flops(request.compute, request.sampling.guidance_scale)
    compute = compute_of(other, request.protocol, recipe, f"{flag}: ")
    reference_evaluation = evaluation_flops(compute, reference.guidance_scale)
    evaluations = evaluation_counts(recipe, request.sampling)
    all_steps = range(1, MAX_STEPS)
    solved = []
    for each in reference.steps:
        target, text = Fraction(reference_evaluation * evaluations(each)), reference.name(each)
        steps = nearest_steps(target / evaluation, evaluations)
        if steps > recipe.diffusion_steps:
            spent = evaluation * evaluations(recipe.diffusion_steps)
            most = bisect.bisect_right(all_steps, spent, key=lambda steps: reference_evaluation * evaluations(steps))
            at_most = f"at most {reference.name(most)}" if most else "less than one of its steps"
            raise UserError(
                f"--match-sampling {text} needs {steps} sampling steps of {name!r}, but the diffusion has"
                f" {recipe.diffusion_steps}, which cost {at_most}"
            )
        one = evaluation * evaluations(1)
        if 2 * target <= one:
            least = bisect.bisect_left(all_steps, one, key=lambda steps: reference_evaluation * evaluations(steps)) + 1
            raise UserError(
                f"--match-sampling {text} costs less than half a sampling step of {name!r}; one step costs"
                f" as much as {reference.name(least)}"
            )
        solved.append(Match.of(text, steps, target, evaluation * evaluations(steps)))
    sampling = dataclasses.replace(request.sampling, steps=tuple(sorted({each.steps for each in solved})))
    check_plans(recipe, sampling)
    return dataclasses.replace(request, sampling=sampling, match_sampling=tuple(solved))


def nearest_count(target: Fraction, unit: int) -> int:
    """The whole number of units nearest to `target`; a tie is rounded down, so that it does not cost more."""
    return math.ceil(target / unit - Fraction(1, 2))


def nearest_steps(target: Fraction, evaluations: Callable[[int], int]) -> int:
    """The sampler steps, at least 1, whose network evaluations are nearest to `target`; a tie is rounded down.

    evaluations: function of the number of steps, not decreasing.
    """
    all_steps = range(1, MAX_STEPS)
    above = bisect.bisect_left(all_steps, math.ceil(target), key=evaluations) + 1
    nearest = min(range(max(1, above - 1), above + 1), key=lambda steps: (abs(evaluations(steps) - target), steps))
    return bisect.bisect_left(all_steps, evaluations(nearest), key=evaluations) + 1


def evaluation_counts(recipe: Recipe, sampling: Sampling) -> Callable[[int], int]:
    """The function from a number of sampler steps to the network evaluations of one image, without guidance.

    It is defined for all numbers, and not decreasing. Steps that the sampler refuses count in proportion between the
    nearest that it accepts; `check_plans` refuses them later. Each step beyond those of the diffusion counts as many
    evaluations as the last one of these.
    """
    limit = recipe.diffusion_steps

    @functools.cache
    def accepted(steps: int) -> int | None:
        try:
            return plan_of(recipe, sampling, steps).evaluations
        except UserError:
            return None

    @functools.cache
    def within(steps: int) -> int:
        if (own := accepted(steps)) is not None:
            return own
        below = next(((at, count) for at in range(steps - 1, 0, -1) if (count := accepted(at)) is not None), (0, 0))
        above = next(((at, count) for at in range(steps + 1, limit + 1) if (count := accepted(at)) is not None), None)
        if above is None:
            return below[1] * steps // below[0] if below[0] else steps
        return below[1] + (above[1] - below[1]) * (steps - below[0]) // (above[0] - below[0])

    def counted(steps: int) -> int:
        if steps <= limit:
            return within(steps)
        last = within(limit) - within(limit - 1) if limit > 1 else within(limit)
        return within(limit) + (steps - limit) * max(1, last)

    return counted


def step_flops(compute: Compute, recipe: Recipe) -> int:
    """Training compute of one optimiser step, in flops."""
    return compute.flops * recipe.batch * TRAINING_FACTOR


def evaluation_flops(compute: Compute, guidance_scale: float) -> int:
    """Sampling compute of one sampler evaluation for one image, in flops; guidance doubles it."""
    return compute.flops * guided_evaluations(1, guidance_scale)


def compute_of(spec: BackboneSpec, protocol: Protocol, recipe: Recipe, where: str = "") -> Compute:
    """Compute of a denoiser at the protocol's input, with the output channels that the recipe's objective needs."""
    objective = registry.objectives.get(recipe.objective)
    try:
        compute = spec.count(**build_arguments(spec, protocol, objective.out_channels(protocol.in_channels)))
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    if compute.flops < 1:
        raise UserError(f"{where}backbone {spec.name!r} has no compute, so nothing can be matched to it")
    return compute


def _reference_spec(reference: Reference, where: str) -> BackboneSpec:
    try:
        spec = registry.backbones.get(reference.backbone)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if spec.kind != "denoiser":
        raise UserError(f"{where}: {spec.name!r} is not a denoiser but of kind {spec.kind}; match denoisers")
    return spec


def budget_table(
    protocol: Protocol, recipe: Recipe, *, match: Reference | None, budget: float | None
) -> dict[str, Any]:
    """The training steps of all denoisers for one budget, ready for JSON; `left_out` lists those that do not fit."""
    to, target = training_target(protocol, recipe, match=match, budget=budget)
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    in_epoch = registry.datasets.get(protocol.dataset).images if protocol.dataset in registry.datasets else None
    for spec in registry.backbones:
        if spec.kind != "denoiser":
            continue
        try:
            compute = compute_of(spec, protocol, recipe)
            solved = solve_training(compute, recipe, to, target)
        except UserError as error:
            left_out.append({"name": spec.name, "reason": str(error)})
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
        "protocol": protocol.name,
        "input": f"{protocol.input_size}x{protocol.input_size}x{protocol.in_channels}",
        "batch": recipe.batch,
        "rows": rows,
        "left_out": left_out,
    }
