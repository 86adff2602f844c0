"""`harness plan`: what a run would cost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from harness.cli.options import DEFAULT_PROTOCOL, json_option, run_options, sampling_options, settings_of
from harness.planning import Request, make_request, plan
from harness.progress import duration

if TYPE_CHECKING:
    from harness.engines.torch.resolve import Measured


def request_of(options: dict[str, Any]) -> Request:
    """The request that the shared options describe."""
    names = ("sampler", "eta", "guidance_scale", "guidance_channels", "label_policy")
    drawing = {name: options[name] for name in names}
    return make_request(
        backbone=options["backbone"],
        protocol=options["protocol"] or DEFAULT_PROTOCOL,
        steps=options["steps"],
        seed=options["seed"],
        framework=options["framework"],
        data=options["data"],
        settings=settings_of(options["settings"]),
        sampling={**drawing, "steps": options["sampling_steps"], "seed": options["sampling_seed"]},
        samples=options["samples"],
        gradient_checkpointing=options["gradient_checkpointing"],
    )


@click.command("plan")
@run_options
@sampling_options
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Say what a run would cost (compute, memory, disk, hours at the speed measured here), and write nothing.

    The speed is measured: the network is built and a few training steps are timed, which takes a minute or two for
    the largest.

    The recipe's items, which --set can override, are listed with their values.
    """
    request = request_of(options)
    costs = plan(request)
    if not as_json:
        click.echo(headline(request, options["protocol"] is None))
        click.echo(arithmetic(costs))
    costs["measured"] = measured(request, options)
    if as_json:
        click.echo(json.dumps(costs, indent=2))
        return
    click.echo(speeds(costs["measured"]))
    click.echo("recipe (override with --set NAME=VALUE)")
    for name, value in costs["recipe"].items():
        click.echo(f"  {name:<17} {value}")
    for lack in costs["missing"]:
        click.echo(f"missing  {lack}")


def headline(request: Request, by_default: bool) -> str:
    """What is asked for, in one line."""
    text = f"{request.spec.name} on protocol {request.protocol.name} v{request.protocol.version}, seed {request.seed}"
    return text + ("  (the default protocol; the paper's: --protocol imagenet-256)" if by_default else "")


def arithmetic(costs: dict[str, Any]) -> str:
    """The part of the plan that needs no measurement."""
    training, published = costs["training"], costs["gflops_published_input"]
    gflops = f"{gflops_text(costs['gflops'])} a forward pass at {costs['input']}"
    if published is not None:
        gflops += f"; {published:.2f} at the paper's input"
    lines = [
        f"  parameters  {costs['params'] / 1e6:,.2f} M",
        f"  Gflops      {gflops}  ({costs['gflops_source']})",
        f"  training    {training['steps']:,} steps x {training['batch']} images x 3 x {gflops_text(costs['gflops'])} Gflops"
        f" = {training['gflops']:.4g} Gflops",
    ]
    for row in costs["sampling"]:
        guidance = f", guidance {row['guidance_scale']:g}" if row["guidance_scale"] != 1 else ""
        lines.append(
            f"  sampling    {costs['samples']:,} images x {row['steps']} {row['sampler']} steps{guidance}"
            f" = {row['gflops']:.4g} Gflops"
        )
    lines.append(f"  disk        {costs['disk_bytes'] / 1e9:.2f} GB for two checkpoints and the samples")
    return "\n".join(lines)


def gflops_text(gflops: float) -> str:
    """Gflops as the paper prints them, two decimals; small ones with four digits."""
    return f"{gflops:.2f}" if gflops >= 10 else f"{gflops:.4g}"


def measured(request: Request, options: dict[str, Any]) -> dict[str, Any]:
    """Speed and memory on this machine: builds the network and times a few training steps."""
    from harness.stages import measure_request

    _, found = measure_request(
        request,
        device=options["device"],
        precision=options["precision"],
        micro_batch=options["micro_batch"],
        say=lambda text: click.echo(text, err=True),
    )
    return describe(request, found)


def describe(request: Request, found: Measured) -> dict[str, Any]:
    """What was measured, as plain data."""
    resolved, best = found.resolved, min(found.seconds.values())
    forward = best / 3  # the same ratio by which training compute is counted
    training = best * request.recipe.batch * request.recipe.steps
    sampling = sum(request.gflops_image(steps) for steps in request.sampling.steps) / request.compute.gflops
    return {
        "device": resolved.device_name,
        "precision": resolved.precision,
        "micro_batch": resolved.micro_batch,
        "memory_bytes": found.memory_bytes,
        "free_bytes": found.free_bytes,
        "images_per_second": {name: 1 / each for name, each in found.seconds.items()},
        "steps_per_second": 1 / (best * request.recipe.batch),
        "training_seconds": training,
        "sampling_seconds": sampling * forward * request.samples,
    }


def speeds(found: dict[str, Any]) -> str:
    """The measured part of the plan, in words."""
    each = ", ".join(f"{name} {speed:.3g}" for name, speed in found["images_per_second"].items())
    return "\n".join(
        [
            f"  device      {found['device']}",
            f"  memory      needs {found['memory_bytes'] / 1e9:.1f} GB, {found['free_bytes'] / 1e9:.1f} GB are free; "
            f"micro-batches of {found['micro_batch']}",
            f"  speed       {found['steps_per_second']:.3g} it/s in {found['precision']} "
            f"(measured, images/s in training: {each})",
            f"  time        training {duration(found['training_seconds'])}, sampling about {duration(found['sampling_seconds'])}",
        ]
    )
