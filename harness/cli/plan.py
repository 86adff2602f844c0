"""`harness plan`: what a run would cost."""

from __future__ import annotations

import json
from typing import Any

import click
from click.core import ParameterSource

from harness.cli.options import (
    DEFAULT_PROTOCOL,
    json_option,
    match_sampling_option,
    only_one,
    plan_options,
    sampling_options,
    settings_of,
)
from harness.engines.memory import Measured, NotEnoughMemory
from harness.errors import UserError
from harness.io.progress import duration
from harness.planning.matching import budget_table, matched
from harness.planning.plan import make_plan, missing_decoder
from harness.planning.request import Request, make_request
from harness.protocols import get_protocol, override

TABLE_OPTIONS = {"protocol", "match", "budget", "settings", "as_json"}  # what the table of a budget listens to


def request_of(options: dict[str, Any]) -> Request:
    """The request that the shared options describe."""
    names = ("sampler", "eta", "guidance_scale", "guidance_channels", "label_policy")
    drawing = {name: options[name] for name in names}
    steps, settings = sources_of_steps(options)
    sampling = {"--sampling-steps": options["sampling_steps"], "--match-sampling": options["match_sampling"]}
    only_one(sampling, "the sampling steps")
    # Steps that are solved for below take the place of the protocol's, which need not fit then.
    sampling_steps = (1,) if options["match_sampling"] else options["sampling_steps"]
    request = make_request(
        backbone=options["backbone"],
        protocol=options["protocol"] or DEFAULT_PROTOCOL,
        steps=steps,
        seed=options["seed"],
        framework=options["framework"],
        data=options["data"],
        settings=settings,
        sampling={**drawing, "steps": sampling_steps, "seed": options["sampling_seed"]},
        samples=options["samples"],
        gradient_checkpointing=options["gradient_checkpointing"],
    )
    return matched(request, match=options["match"], budget=options["budget"], sampling=options["match_sampling"])


def sources_of_steps(options: dict[str, Any]) -> tuple[int | None, dict[str, str]]:
    """--steps and --set, of which no more than one of the ways to say how long to train is given."""
    settings = settings_of(options["settings"])
    solved = {"--match": options["match"], "--budget": options["budget"]}
    ways = {"--steps": options["steps"], **solved}
    if any(value is not None for value in solved.values()):
        ways["--set steps"] = settings.get("steps")
    only_one(ways, "the training steps")
    return options["steps"], settings


@click.command("plan")
@plan_options
@sampling_options
@match_sampling_option
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool, **options: Any) -> None:
    """Say what a run would cost (compute, memory, disk, hours at the speed measured here), and write nothing.

    What would stop the run (data, auto-encoder, memory that this machine lacks) is said in a line each that begins with
    "missing", and in --json's "missing"; the plan is made all the same, with exit code 0. Only what cannot be planned (a
    name that is not known, a flag that makes no sense here) is refused, with 2.

    The speed is measured last: the network is built and a few training steps are timed, which takes a minute or two for
    the largest.

    The recipe's items, which --set can override, are listed with their values.

    Without --backbone, --budget GFLOPS (or --match BACKBONE@STEPS) lists what every backbone would get from it:

        harness plan --budget 1e6
    """
    if options["backbone"] is None:
        show_table(ctx, options, as_json)
        return
    request = request_of(options)
    costs = make_plan(request)
    costs["missing"] += missing_decoder(request)  # which run may be given
    if not as_json:
        click.echo(headline(request, options["protocol"] is None))
        click.echo(arithmetic(costs))
        click.echo("recipe (override with --set NAME=VALUE)")
        for name, value in costs["recipe"].items():
            click.echo(f"  {name:<18} {value}")
        for lack in costs["lacking_judge"]:
            click.echo(f"note     {lack}; without them a run ends with samples")
        for lack in costs["missing"]:  # before the measurement, which takes its time
            click.echo(f"missing  {lack}")
    costs["measured"] = None
    try:
        costs["measured"] = measured(request, options)
    except NotEnoughMemory as lack:
        costs["missing"].append(str(lack))
        if not as_json:
            click.echo(f"missing  {lack}")
    if as_json:
        click.echo(json.dumps(costs, indent=2))
    elif costs["measured"] is not None:
        click.echo(speeds(costs["measured"]))


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
    match, others = costs["match"], costs["match_sampling"]
    if match is not None:
        lines.append(f"  matched     training: {matched_text(match)}")
    lines += [f"  matched     an image: {matched_text(each)}" for each in others]
    lines.append(f"  disk        {costs['disk_bytes'] / 1e9:.2f} GB for two checkpoints and the samples")
    return "\n".join(lines)


def matched_text(match: dict[str, Any]) -> str:
    """What was matched, and what the rounding to whole steps costs."""
    aim = f"the {match['gflops_target']:.6g} Gflops of {match['to'] or '--budget'}"
    steps = "1 step" if match["steps"] == 1 else f"{match['steps']:,} steps"
    text = f"{steps} for {aim}; rounding to whole steps: {error_text(match['relative_error'])}"
    return text + (" (one step costs more than that)" if one_is_too_much(match) else "")


def one_is_too_much(match: dict[str, Any]) -> bool:
    """Whether a single step already overspends."""
    return match["steps"] == 1 and match["relative_error"] > 0


def error_text(relative: float) -> str:
    """A relative difference in per cent, with its sign."""
    return f"{100 * relative:+.2g} %" if relative else "exact"


def show_table(ctx: click.Context, options: dict[str, Any], as_json: bool) -> None:
    """What every backbone would get from one budget."""
    if options["match"] is None and options["budget"] is None:
        raise UserError("name a --backbone, or give --budget GFLOPS for a table of what each backbone would get")
    _, settings = sources_of_steps(options)
    for parameter in ctx.command.params:
        name, flag = parameter.name or "", parameter.opts[0]
        if name not in TABLE_OPTIONS and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise UserError(f"{flag} has no part in the table of a budget; name a --backbone with it")
    task = get_protocol(options["protocol"] or DEFAULT_PROTOCOL)
    document = budget_table(task, override(task.recipe, settings), match=options["match"], budget=options["budget"])
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    print_table(document)


def print_table(document: dict[str, Any]) -> None:
    """The rows on the terminal."""
    from rich.console import Console
    from rich.table import Table

    named = f", those of {document['to']}" if document["to"] else ""
    click.echo(
        f"{document['gflops_target']:.6g} Gflops of training{named}, on protocol {document['protocol']}"
        f" in batches of {document['batch']} (Gflops x batch x steps x 3)"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("backbone", no_wrap=True)
    for heading in ("params (M)", f"Gflops at {document['input']}", "steps", "images", "epochs", "rounding"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in document["rows"]:
        table.add_row(
            row["name"],
            f"{row['params'] / 1e6:.2f}",
            gflops_text(row["gflops"]) + (" traced" if row["gflops_source"] == "traced" else ""),
            f"{row['steps']:,}",
            f"{row['images']:,}",
            "-"
            if row["epochs"] is None
            else f"{row['epochs']:,.0f}"
            if row["epochs"] >= 100
            else f"{row['epochs']:.3g}",
            error_text(row["relative_error"]),
        )
    Console(width=None if Console().is_terminal else 140, highlight=False).print(table)
    if any(one_is_too_much(row) for row in document["rows"]):
        click.echo("1 step, and more than 0 % over: a single step costs more than the budget.")
    for each in document["left_out"]:
        click.echo(f"{each['name']}: left out; {each['reason']}")


def gflops_text(gflops: float) -> str:
    """Gflops as the paper prints them, two decimals; small ones with four digits."""
    return f"{gflops:.2f}" if gflops >= 10 else f"{gflops:.4g}"


def measured(request: Request, options: dict[str, Any]) -> dict[str, Any]:
    """Speed and memory on this machine: builds the network and times a few training steps."""
    from harness.engines.backend import get_backend

    wanted = options["compile"] or "off"  # auto: a plan does not compile to find out whether that repays
    _, found = get_backend(request.framework).measure(
        request,
        device=options["device"],
        precision=options["precision"],
        micro_batch=options["micro_batch"],
        mesh=options["mesh"],
        compile="off" if wanted == "auto" and request.framework == "torch" else wanted,
        say=lambda text: click.echo(text, err=True),
    )
    return describe(request, found if wanted != "auto" else found._replace(compiled=""))


def describe(request: Request, found: Measured) -> dict[str, Any]:
    """What was measured, as plain data."""
    resolved, best = found.resolved, min(found.seconds.values())
    if resolved.compile == "on" and found.compiled_seconds is not None:
        best = found.compiled_seconds
    forward = best / 3  # the same ratio by which training compute is counted
    training = best * request.recipe.batch * request.recipe.steps
    drawn = request.sampling.steps if request.spec.kind == "denoiser" else ()
    sampling = sum(request.gflops_image(steps) for steps in drawn) / request.compute.gflops
    return {
        "device": resolved.device_name,
        "precision": resolved.precision,
        "micro_batch": resolved.micro_batch,
        "compile": found.compiled or None,
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
    compiled = [f"  compile     {found['compile']}"] if found["compile"] else []
    return "\n".join(
        [
            f"  device      {found['device']}",
            f"  memory      needs {found['memory_bytes'] / 1e9:.1f} GB, {found['free_bytes'] / 1e9:.1f} GB are free; "
            f"micro-batches of {found['micro_batch']}",
            f"  speed       {found['steps_per_second']:.3g} it/s in {found['precision']} "
            f"(measured, images/s in training: {each})",
            *compiled,
            f"  time        training {duration(found['training_seconds'])}"
            + (f", sampling about {duration(found['sampling_seconds'])}" if found["sampling_seconds"] else ""),
        ]
    )
