"""Plans as text, as printed by `harness plan` and at the start of `harness run`."""

from __future__ import annotations

from harness.io.progress import duration
from harness.planning.plan import MeasuredCost, Plan
from harness.planning.request import Match, Request
from harness.protocols import Recipe


def headline(request: Request, by_default: bool) -> str:
    """The request in one line. by_default: whether the protocol is the default, because the user gave none."""
    text = f"{request.spec.name} on protocol {request.protocol.name} v{request.protocol.version}, seed {request.seed}"
    return text + ("  (the default protocol; the paper's: --protocol imagenet-256)" if by_default else "")


def costs_text(plan: Plan) -> str:
    """The calculated costs as text."""
    training = plan.training
    gflops = f"{gflops_text(plan.gflops)} a forward pass at {plan.input}"
    if plan.gflops_published_input is not None:
        gflops += f"; {plan.gflops_published_input:.2f} at the paper's input"
    forward = plan.gflops if training.forward_gflops is None else training.forward_gflops
    lines = [
        f"  parameters  {plan.params / 1e6:,.2f} M",
        f"  Gflops      {gflops}  ({plan.gflops_source})",
        f"  training    {training.steps:,} steps x {training.batch} images x {training.passes or 3} x {gflops_text(forward)} Gflops"
        f" = {training.gflops - (training.auxiliary or {}).get('gflops', 0.0):.4g} Gflops",
    ]
    if (extra := training.auxiliary) is not None:
        lines.append(
            f"  auxiliary   {plan.recipe['auxiliary']}: {training.images:,} images x ({gflops_text(extra['encoder_gflops'])} of the "
            f"encoder + 3 x {gflops_text(extra['heads_gflops'])} of the heads) = {extra['gflops']:.4g} Gflops; training in all "
            f"{training.gflops:.4g}"
        )
    for row in plan.sampling:
        guidance = f", guidance {row.guidance.short}" if row.guidance_scale != 1 else ""
        if row.gflops is None:
            lines.append(
                f"  sampling    {plan.samples:,} images by {row.sampler}{guidance}: Gflops are not known before sampling"
            )
            continue
        evaluations = round(row.gflops / (plan.samples * plan.gflops))
        counted = f" ({evaluations:,} evaluations)" if evaluations != row.steps else ""
        lines.append(
            f"  sampling    {plan.samples:,} images x {row.steps} {row.sampler} steps{guidance}{counted}"
            f" = {row.gflops:.4g} Gflops"
        )
    if plan.match is not None:
        lines.append(f"  matched     training: {match_text(plan.match)}")
    lines += [f"  matched     an image: {match_text(each)}" for each in plan.match_sampling]
    widths = len(Recipe(**plan.recipe).widths)
    saved = f", {plan.recipe['ema_snapshots']} x {widths} averages" if widths else ""
    lines.append(f"  disk        {plan.disk_bytes / 1e9:.2f} GB for two checkpoints{saved} and the samples")
    return "\n".join(lines)


def match_text(match: Match) -> str:
    """The matched steps, their target and the rounding error, as text."""
    target = f"the {match.gflops_target:.6g} Gflops of {match.to or '--budget'}"
    steps = "1 step" if match.steps == 1 else f"{match.steps:,} steps"
    text = f"{steps} for {target}; rounding to whole steps: {error_text(match.relative_error)}"
    return text + (" (one step costs more than that)" if one_is_too_much(match.steps, match.relative_error) else "")


def one_is_too_much(steps: int, relative_error: float) -> bool:
    """Whether one step already costs more than the target."""
    return steps == 1 and relative_error > 0


def error_text(relative: float) -> str:
    """A relative difference in percent, with its sign."""
    return f"{100 * relative:+.2g} %" if relative else "exact"


def gflops_text(gflops: float) -> str:
    """Gflops with two decimals, as in the paper; below 10 with four significant digits."""
    return f"{gflops:.2f}" if gflops >= 10 else f"{gflops:.4g}"


def measured_text(measured: MeasuredCost) -> str:
    """The measurements as text: device, memory, speed, time."""
    speeds = ", ".join(f"{name} {speed:.3g}" for name, speed in measured.images_per_second.items())
    compiled = [f"  compile     {measured.compile}"] if measured.compile else []
    return "\n".join(
        [
            f"  device      {measured.device}",
            f"  memory      needs {measured.memory_bytes / 1e9:.1f} GB, {measured.free_bytes / 1e9:.1f} GB are free; "
            f"micro-batches of {measured.micro_batch}",
            f"  speed       {measured.steps_per_second:.3g} it/s in {measured.precision} "
            f"(measured, images/s in training: {speeds})",
            *compiled,
            f"  time        training {duration(measured.training_seconds)}"
            + (f", sampling about {duration(measured.sampling_seconds)}" if measured.sampling_seconds else ""),
        ]
    )
