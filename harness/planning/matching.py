"""Matched compute: how many steps of a backbone cost as much as given steps of a reference backbone, or as a budget.

Training compute is Gflops x batch x steps x 3. Sampling compute of one image is Gflops x network evaluations: the rows
of the sampler's plan, those with guidance counted twice. Both backbones are counted at the input of the same protocol and with the same
recipe (`--set` included), hence with the same batch: the cost of the reference is its cost in this protocol, not in its
paper. The arithmetic uses integer flops, so the only error comes from rounding to whole steps, and it is reported.
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
from harness.diffusion.auxiliary import AuxiliaryCompute
from harness.diffusion.sampler_plan import check_times, guided_evaluations, not_known
from harness.diffusion.samplers import is_adaptive
from harness.errors import UserError
from harness.planning.reference import Reference
from harness.planning.request import (
    Match,
    Request,
    auxiliary_compute,
    check_guidance_interval,
    check_plans,
    make_request,
    plan_of,
    training_passes,
)
from harness.protocols import Protocol, Recipe, Sampling
from harness.runs.run import build_arguments
from harness.settings import DEFAULT_PROTOCOL, PlanOptions, RunOptions, SamplingSettings, TrainOptions, only_one
from harness.spec import BackboneSpec, Compute

MAX_STEPS = 2**63 - 1  # largest value of a step counter
ALL_STEPS = range(1, MAX_STEPS)  # for bisection over numbers of steps


def request_from(options: TrainOptions | RunOptions | PlanOptions) -> Request:
    """The request that the options describe. If compute is matched, the request has the matched steps."""
    sampling: dict[str, Any] = {}
    samples, match_sampling_to = None, None
    if isinstance(options, SamplingSettings):  # not the options of `harness train`
        flags = {"--sampling-steps": options.sampling_steps, "--match-sampling": options.match_sampling}
        only_one(flags, "the sampling steps")
        # (1,) is a placeholder that always passes the checks; `matched` below replaces it. The protocol's own steps might
        # not pass.
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
    request = matched(request, match=options.match, budget=options.budget, sampling=match_sampling_to)
    check_guidance_interval(request)
    return request


def checked_steps(options: TrainOptions | RunOptions | PlanOptions) -> int | None:
    """The value of --steps; None if not given. Raises `UserError` if more than one setting sets the training steps."""
    matching = {"--match": options.match, "--budget": options.budget}
    flags: dict[str, Any] = {"--steps": options.steps, **matching}
    # --steps and --set steps=... may both be given: --steps counts then.
    if any(value is not None for value in matching.values()):
        flags["--set steps"] = options.set.get("steps")
    only_one(flags, "the training steps")
    return options.steps


def matched(
    request: Request, *, match: Reference | None = None, budget: float | None = None, sampling: Reference | None = None
) -> Request:
    """A copy of `request` with matched steps: training steps that cost as much as `match`, or as `budget` Gflops, and
    sampler steps that cost as much as `sampling`. None: these steps are not changed.

    Raises `UserError` if both `match` and `budget` are given, if a backbone does not exist or does not fit the
    protocol, or if no possible number of sampler steps matches.
    """
    if match is not None or budget is not None:
        reference, target = training_target(request.protocol, request.recipe, match=match, budget=budget)
        result = solve_training(request.spec, request.compute, request.recipe, reference, target, request.auxiliary)
        recipe = dataclasses.replace(request.recipe, steps=result.steps)
        request = dataclasses.replace(request, recipe=recipe, match=result)
    return request if sampling is None else match_sampling(request, sampling)


def training_target(
    protocol: Protocol, recipe: Recipe, *, match: Reference | None, budget: float | None
) -> tuple[str | None, Fraction]:
    """(name of the reference, or None for a budget; the training compute to match, in flops).

    budget: in Gflops. Raises `UserError` unless exactly one of `match` and `budget` is given.
    """
    if (match is None) == (budget is None):
        raise UserError("--match and --budget both set the training steps; give one of them")
    if budget is not None:
        return None, Fraction(budget) * 10**9
    assert match is not None
    (steps,) = match.steps  # `parse_reference` accepts one number only
    name = match.name(steps)
    spec = _reference_spec(match, f"--match {name}")
    if spec.times == 2:  # a network of one time is counted as one that an objective of one time trains
        check_times(spec, registry.objectives.get(recipe.objective))
    compute = compute_of(spec, protocol, recipe, f"--match {name}: ")
    return name, Fraction(step_flops(spec, compute, recipe) * steps)


def solve_training(
    spec: BackboneSpec,
    compute: Compute,
    recipe: Recipe,
    reference: str | None,
    target: Fraction,
    auxiliary: AuxiliaryCompute | None = None,
) -> Match:
    """The whole number of steps, at least 1, whose training compute is nearest to `target` flops.

    reference, target: as `training_target` returns them, whose reference has no auxiliary loss. auxiliary: of the recipe.
    """
    flops_of_step = step_flops(spec, compute, recipe)
    if auxiliary is not None:
        flops_of_step += auxiliary.training_flops * recipe.batch
    steps = max(1, nearest_count(target, flops_of_step))
    if steps > MAX_STEPS:
        raise UserError(
            f"--budget {float(target / 10**9):g} Gflops are {float(steps):.3g} steps; give a smaller budget"
        )
    return Match.of(reference, steps, target, steps * flops_of_step)


def match_sampling(request: Request, reference: Reference) -> Request:
    """A copy of `request` with the sampler steps that cost as much per image as the steps of `reference`.

    Raises `UserError`, which names the nearest possible steps, if matched steps are 0 or more than the diffusion has.
    """
    name, recipe, flag = request.spec.name, request.recipe, f"--match-sampling {reference.backbone}"
    if is_adaptive(request.sampling.sampler):
        raise UserError(f"{flag}: {not_known(request.sampling.sampler)}")
    other = _reference_spec(reference, flag)
    if reference.guidance_scale != 1 and other.null_label is None:
        raise UserError(f"{flag}: it has no null label, so it cannot use classifier-free guidance; leave out @cfg")
    if max(reference.steps) > recipe.diffusion_steps:
        raise UserError(
            f"{flag}@{max(reference.steps)}: more sampling steps than the {recipe.diffusion_steps} of the diffusion"
        )
    own_flops = request.compute.flops  # of one evaluation
    evaluations = evaluation_counts(recipe, request.sampling)
    reference_flops = compute_of(other, request.protocol, recipe, f"{flag}: ").flops
    # The reference is sampled by the sampler of this request, with a classifier-free guidance of its own.
    reference_sampling = dataclasses.replace(
        request.sampling,
        guidance_scale=reference.guidance_scale,
        guidance_interval=reference.guidance_interval,
        guidance_rule="",
    )
    reference_evaluations = evaluation_counts(recipe, reference_sampling)

    def reference_cost(steps: int) -> int:
        """Flops of an image with `steps` steps of the reference."""
        return reference_flops * reference_evaluations(steps)

    matches = []
    for reference_steps in reference.steps:
        target, reference_name = Fraction(reference_cost(reference_steps)), reference.name(reference_steps)
        steps = nearest_steps(target / own_flops, evaluations)
        if steps > recipe.diffusion_steps:
            limit = own_flops * evaluations(recipe.diffusion_steps)
            # the number of entries that cost at most `limit`, which is also the largest such number of steps
            most = bisect.bisect_right(ALL_STEPS, limit, key=reference_cost)
            at_most = f"at most {reference.name(most)}" if most else "less than one of its steps"
            raise UserError(
                f"--match-sampling {reference_name} needs {steps} sampling steps of {name!r}, but the diffusion has"
                f" {recipe.diffusion_steps}, which cost {at_most}"
            )
        one_step = own_flops * evaluations(1)
        if 2 * target <= one_step:  # would be rounded to 0 steps
            least = _first_steps(one_step, reference_cost)
            raise UserError(
                f"--match-sampling {reference_name} costs less than half a sampling step of {name!r}; one step costs"
                f" as much as {reference.name(least)}"
            )
        matches.append(Match.of(reference_name, steps, target, own_flops * evaluations(steps)))
    sampling = dataclasses.replace(request.sampling, steps=tuple(sorted({match.steps for match in matches})))
    check_plans(recipe, sampling, request.spec.time)
    return dataclasses.replace(request, sampling=sampling, match_sampling=tuple(matches))


def nearest_count(target: Fraction, unit: int) -> int:
    """The whole number n for which n * unit is nearest to `target`; a tie is rounded down, so that it costs less."""
    return math.ceil(target / unit - Fraction(1, 2))


def nearest_steps(target: Fraction, evaluations: Callable[[int], int]) -> int:
    """The sampler steps, at least 1, whose network evaluations are nearest to `target`; a tie is rounded down.

    evaluations: function of the number of steps, not decreasing.
    """
    above = _first_steps(math.ceil(target), evaluations)
    nearest = min(range(max(1, above - 1), above + 1), key=lambda steps: (abs(evaluations(steps) - target), steps))
    return _first_steps(evaluations(nearest), evaluations)  # several numbers of steps may have the same evaluations


def _first_steps(least: int, function: Callable[[int], int]) -> int:
    """The smallest number of steps, from 1, at which `function`, which does not decrease, is at least `least`."""
    return bisect.bisect_left(ALL_STEPS, least, key=function) + 1  # the entry at index i is i + 1


def evaluation_counts(recipe: Recipe, sampling: Sampling) -> Callable[[int], int]:
    """Returns a function from a number of sampler steps to the network evaluations of one image, guidance included.

    The function is defined for all numbers and does not decrease, as the bisection in `nearest_steps` needs. Numbers of
    steps that the sampler refuses are interpolated between the nearest that it accepts; `check_plans` raises later. A
    step beyond the diffusion's steps counts as much as the last one of these, and at least 1.
    """
    limit = recipe.diffusion_steps

    @functools.cache
    def of_plan(steps: int) -> int | None:
        """The evaluations by the sampler's plan; None if the sampler refuses this number of steps."""
        try:
            return guided_evaluations(plan_of(recipe, sampling, steps), sampling.guidance)
        except UserError:
            return None

    def first_accepted(candidates: range) -> tuple[int, int] | None:
        """(steps, evaluations) of the first of `candidates` that the sampler accepts; None if it refuses all."""
        return next(((steps, count) for steps in candidates if (count := of_plan(steps)) is not None), None)

    @functools.cache
    def up_to_limit(steps: int) -> int:
        """The evaluations of 1 ... `limit` steps, interpolated where the sampler refuses them."""
        if (count := of_plan(steps)) is not None:
            return count
        fewer, at_fewer = first_accepted(range(steps - 1, 0, -1)) or (0, 0)  # 0 steps need 0 evaluations
        above = first_accepted(range(steps + 1, limit + 1))
        if above is None:  # in proportion to the last accepted number; 1 per step if the sampler refuses all
            return at_fewer * steps // fewer if fewer else steps
        more, at_more = above
        return at_fewer + (at_more - at_fewer) * (steps - fewer) // (more - fewer)

    def evaluations(steps: int) -> int:
        if steps <= limit:
            return up_to_limit(steps)
        at_limit = up_to_limit(limit)
        last_step = at_limit - up_to_limit(limit - 1) if limit > 1 else at_limit
        return at_limit + (steps - limit) * max(1, last_step)

    return evaluations


def step_flops(spec: BackboneSpec, compute: Compute, recipe: Recipe) -> int:
    """Training compute of one optimiser step, in flops."""
    return compute.in_training.flops * recipe.batch * training_passes(spec, recipe)


def compute_of(spec: BackboneSpec, protocol: Protocol, recipe: Recipe, where: str = "") -> Compute:
    """Compute of a denoiser at the protocol's input, with the output channels that the recipe's objective needs.

    where: begins the messages of `UserError`.
    """
    try:
        compute = spec.count(**_arguments(spec, protocol, recipe))
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    if compute.flops < 1:
        raise UserError(f"{where}backbone {spec.name!r} has no compute, so nothing can be matched to it")
    return compute


def _arguments(spec: BackboneSpec, protocol: Protocol, recipe: Recipe) -> dict[str, Any]:
    """The builder's arguments of a denoiser at the protocol's input."""
    objective = registry.objectives.get(recipe.objective)
    return build_arguments(spec, protocol, objective.out_channels(protocol.in_channels))


def auxiliary_of(spec: BackboneSpec, protocol: Protocol, recipe: Recipe) -> AuxiliaryCompute | None:
    """The compute of the recipe's auxiliary loss on that backbone at the protocol's input; None: it has none."""
    return auxiliary_compute(spec, _arguments(spec, protocol, recipe), protocol, recipe)


def _reference_spec(reference: Reference, where: str) -> BackboneSpec:
    """The backbone of a reference. Raises `UserError`, which names the flag `where`, unless it is a denoiser."""
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
    """The training steps of all denoisers for the compute of `match`, or for `budget` Gflops, ready for JSON.

    Its `left_out` lists the denoisers that do not fit the protocol or the budget, with the reasons.
    """
    reference, target = training_target(protocol, recipe, match=match, budget=budget)
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    epoch_images = registry.datasets.get(protocol.dataset).images if protocol.dataset in registry.datasets else None
    for spec in registry.backbones:
        if spec.kind != "denoiser":
            continue
        try:
            check_times(spec, registry.objectives.get(recipe.objective))
            compute = compute_of(spec, protocol, recipe)
            auxiliary = auxiliary_of(spec, protocol, recipe)
            match_of_backbone = solve_training(spec, compute, recipe, reference, target, auxiliary)
        except UserError as error:
            left_out.append({"name": spec.name, "reason": str(error)})
            continue
        images = match_of_backbone.steps * recipe.batch
        rows.append(
            {
                "name": spec.name,
                "params": compute.params,
                "gflops": compute.gflops,
                "gflops_source": compute.source,
                **({} if compute.training is None else {"gflops_in_training": compute.training.gflops}),
                "steps": match_of_backbone.steps,
                "images": images,
                "epochs": None if epoch_images is None else images / epoch_images,
                "training_gflops": match_of_backbone.gflops,
                "relative_error": match_of_backbone.relative_error,
            }
        )
    return {
        "to": reference,
        "gflops_target": float(target / 10**9),
        "protocol": protocol.name,
        "input": f"{protocol.input_size}x{protocol.input_size}x{protocol.in_channels}",
        "batch": recipe.batch,
        "rows": rows,
        "left_out": left_out,
    }
