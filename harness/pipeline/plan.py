"""`harness.plan`: the cost of a run; on request with the speed and memory measured on this machine."""

from __future__ import annotations

import dataclasses

from harness.compute import TRAINING_FACTOR
from harness.engines.backend import get_backend
from harness.engines.memory import Measured, NotEnoughMemory
from harness.errors import UserError, shown
from harness.pipeline.evaluation_config import make_evaluator
from harness.planning.matching import request_from
from harness.planning.plan import MeasuredCost, Plan, make_plan
from harness.planning.request import Request, training_passes
from harness.settings import PlanOptions, keyword_options


@keyword_options(PlanOptions)
def plan(options: PlanOptions) -> Plan:
    """The cost of a run with these settings: compute and disk space; with `measure` also memory, and hours at the speed here.

    Nothing is written. `missing` lists what would prevent the run. UserError: nothing can be planned (an unknown name,
    a setting that is not valid here). `measure` builds the network and times a few training steps.
    """
    if options.backbone is None:
        raise UserError("name a --backbone, or give --budget GFLOPS for a table of what each backbone would get")
    request = request_from(options)
    planned = plan_with_files(request, options)
    return with_measurement(planned, request, options) if options.measure else planned


def plan_with_files(request: Request, options: PlanOptions) -> Plan:
    """The plan of a request, without measurements. `missing` names the files of the options that a run refuses, too."""
    decoder, entries = options.decoder, options.entry
    if "decoder" in entries and decoder is None:
        raise UserError(f"--entry decoder={shown(entries['decoder'])} is of --decoder: name its folder or file")
    if decoder is not None and request.protocol.space != "latents":
        raise UserError(
            f"--decoder belongs to runs in latents, and protocol {request.protocol.name!r} is in pixels; leave it out"
        )
    planned = make_plan(request, check_files=True, decoder=decoder, decoder_entry=entries.get("decoder"))
    if options.reference is None and options.features_weights is None and "features" not in entries:
        return planned
    try:
        evaluator = make_evaluator(
            request.protocol, options.reference, options.features_weights, entries.get("features")
        )
    except UserError as error:
        unknown_suite = any(str(error) in reason for reason in planned.missing)
        reasons = planned.missing if unknown_suite else (*planned.missing, str(error))
        return dataclasses.replace(planned, missing=reasons, missing_evaluator_files=())
    return planned if evaluator is None else dataclasses.replace(planned, missing_evaluator_files=())


def with_measurement(plan: Plan, request: Request, options: PlanOptions) -> Plan:
    """A copy of the plan with speed and memory measured here. If memory is too small, `missing` says so."""
    requested = options.compile or "off"
    # Compiling takes too long for a plan. So with auto only the network that is not compiled is measured, and the plan
    # does not say whether the run will compile (compiled="").
    try:
        _, measured = get_backend(request.framework).measure(
            request,
            device=options.device,
            precision=options.precision,
            micro_batch=options.micro_batch,
            mesh=options.mesh,
            compile="off" if requested == "auto" else requested,
            deterministic=options.deterministic,
        )
    except NotEnoughMemory as error:
        return dataclasses.replace(plan, missing=(*plan.missing, str(error)))
    if requested == "auto":
        measured = measured._replace(compiled="")
    return dataclasses.replace(plan, measured=measured_cost(request, measured))


def measured_cost(request: Request, measured: Measured) -> MeasuredCost:
    """The cost of the whole request, from the measured time of one image."""
    # Seconds of training on one image. If several precisions were measured, the run uses the fastest.
    resolved, image_seconds = measured.resolved, min(measured.seconds.values())
    if resolved.compile == "on" and measured.compiled_seconds is not None:
        image_seconds = measured.compiled_seconds
    # The passes of a target that evaluates the network were not measured.
    passes = training_passes(request.spec, request.recipe)
    image_seconds, measured_seconds = image_seconds * passes / TRAINING_FACTOR, image_seconds
    forward_seconds = measured_seconds / TRAINING_FACTOR * (request.compute.flops / request.compute.in_training.flops)
    sampler_steps = request.sampling.steps if request.spec.kind == "denoiser" else ()
    # of one image in each of the sample sets, in sum; 0 if that is not known, and then no time of sampling is stated
    costs = [request.gflops_image(steps) for steps in sampler_steps]
    forward_passes = 0.0 if None in costs else sum(cost for cost in costs if cost is not None) / request.compute.gflops
    return MeasuredCost(
        device=resolved.device_name,
        precision=resolved.precision,
        micro_batch=resolved.micro_batch,
        compile=measured.compiled or None,
        memory_bytes=measured.memory_bytes,
        free_bytes=measured.free_bytes,
        images_per_second={name: 1 / seconds for name, seconds in measured.seconds.items()},
        steps_per_second=1 / (image_seconds * request.recipe.batch),
        training_seconds=image_seconds * request.recipe.batch * request.recipe.steps,
        sampling_seconds=forward_passes * forward_seconds * request.samples,
    )
