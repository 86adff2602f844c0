"""`harness.plan`: what a run would cost, with the speed and memory of this machine."""

from __future__ import annotations

import dataclasses

from harness.engines.backend import get_backend
from harness.engines.memory import Measured, NotEnoughMemory
from harness.errors import UserError
from harness.planning.matching import request_from
from harness.planning.plan import MeasuredCost, Plan, make_plan
from harness.planning.request import Request
from harness.settings import PlanOptions, keyword_options


@keyword_options(PlanOptions)
def plan(options: PlanOptions) -> Plan:
    """What the run with these settings would cost: compute, memory, disk, hours at the speed measured here.

    Nothing is written. What would stop the run is listed in `missing`; UserError only where nothing can be planned (an
    unknown name, a setting that makes no sense here). The measurement builds the network and times a few training steps.
    """
    if options.backbone is None:
        raise UserError("name a --backbone, or give --budget GFLOPS for a table of what each backbone would get")
    request = request_from(options)
    return with_measurement(make_plan(request, decoder_given=False), request, options)


def with_measurement(plan: Plan, request: Request, options: PlanOptions) -> Plan:
    """The plan with speed and memory measured here; where memory is missing, that is added to `missing`."""
    wanted = options.compile or "off"  # auto: a plan does not compile to find out whether compiling pays off
    try:
        _, found = get_backend(request.framework).measure(
            request,
            device=options.device,
            precision=options.precision,
            micro_batch=options.micro_batch,
            mesh=options.mesh,
            compile="off" if wanted == "auto" and request.framework == "torch" else wanted,
        )
    except NotEnoughMemory as error:
        return dataclasses.replace(plan, missing=(*plan.missing, str(error)))
    return dataclasses.replace(
        plan, measured=measured_cost(request, found if wanted != "auto" else found._replace(compiled=""))
    )


def measured_cost(request: Request, found: Measured) -> MeasuredCost:
    """A measurement of one image, extended to the request."""
    resolved, best = found.resolved, min(found.seconds.values())
    if resolved.compile == "on" and found.compiled_seconds is not None:
        best = found.compiled_seconds
    forward = best / 3  # the ratio by which training compute is counted
    sampled = request.sampling.steps if request.spec.kind == "denoiser" else ()
    passes = sum(request.gflops_image(steps) for steps in sampled) / request.compute.gflops
    return MeasuredCost(
        device=resolved.device_name,
        precision=resolved.precision,
        micro_batch=resolved.micro_batch,
        compile=found.compiled or None,
        memory_bytes=found.memory_bytes,
        free_bytes=found.free_bytes,
        images_per_second={name: 1 / seconds for name, seconds in found.seconds.items()},
        steps_per_second=1 / (best * request.recipe.batch),
        training_seconds=best * request.recipe.batch * request.recipe.steps,
        sampling_seconds=passes * forward * request.samples,
    )
