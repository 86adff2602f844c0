"""What is asked for, whether it can be had, and what it would cost: before anything expensive begins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from harness import registry
from harness.data.public_files import FILES
from harness.errors import UserError
from harness.planning.request import CHECKPOINT_BYTES, TRAINING_FACTOR, Request, published_input_gflops
from harness.protocols import Protocol


def missing(request: Request) -> list[str]:
    """What this machine lacks for the whole of the request, each with its fix, before any work is done."""
    from evaluators.suites import get_suite

    task, lacks = request.protocol, []
    if task.dataset not in registry.datasets:
        lacks.append(f"data set {task.dataset!r}: no reader of that name is installed (see `harness list datasets`)")
    elif task.space == "latents":
        from harness.data import latents

        if (lack := latents.missing(request.data, task)) is not None:
            lacks.append(f"data set {task.dataset!r} in latents: {lack}")
    elif (lack := registry.datasets.get(task.dataset).missing(request.data, task.resolution)) is not None:
        lacks.append(f"data set {task.dataset!r}: {lack}")
    try:
        suite = get_suite(task.suite)
    except UserError as error:
        lacks.append(f"suite {task.suite!r}: {error} (see `harness list suites`)")
    else:
        short = [each for each in suite.metrics if request.samples < each.minimum]
        if short:
            lacks.append(
                f"samples: {short[0].key} needs at least {short[0].minimum}, and {request.samples} are asked for"
            )
    return lacks


def missing_decoder(request: Request) -> list[str]:
    """The auto-encoder that a run in latents would decode by, where it is a path and is not there any more."""
    from harness.data import latents

    if request.protocol.space != "latents" or latents.missing(request.data, request.protocol) is not None:
        return []
    place = latents.read_meta(request.data).places.get("vae", "")
    if not Path(place).is_absolute() or Path(place).exists():  # else a name, whose files the hub has
        return []
    return [f"the auto-encoder behind {request.data} is not at {place}; name it, or another, with --decoder DIR"]


def missing_evaluator_files(task: Protocol) -> list[str]:
    """What the measurement at the end needs to be given, for want of which a run ends with samples."""
    flag = _weights_flag(task)
    if not flag:
        return []
    known = [name for name in ("inception", task.name) if name in FILES] if flag == "--inception" else []
    fetch = f" ({', '.join(f'`harness data fetch {name}`' for name in known)})" if known else ""
    return [f"suite {task.suite!r} measures with {flag} FILE and --reference FILE{fetch}"]


def evaluate_command(task: Protocol, samples: Path) -> str:
    """The command that measures a sample set whose suite lacked its files."""
    flag = _weights_flag(task)
    reference = FILES[task.name].file if task.name in FILES else "REFERENCE.npz"
    weights = FILES["inception"].file if flag == "--inception" else "FILE"
    return f"harness evaluate {samples} {flag} {weights} --reference {reference}"


def _weights_flag(task: Protocol) -> str:
    """The flag that names the weights of the suite's network; empty where it brings them, or is not known."""
    from evaluators.suites import get_suite

    try:
        return getattr(get_suite(task.suite).features, "weights_option", "")
    except UserError:  # named as missing
        return ""


def make_plan(request: Request) -> dict[str, Any]:
    """The costs that follow from arithmetic alone, JSON-ready. Speeds and memory are added by who measures them."""
    compute, recipe, sampling = request.compute, request.recipe, request.sampling
    images = recipe.steps * recipe.batch
    drawn = sampling.steps if request.spec.kind == "denoiser" else ()  # a part of a system makes no images by itself
    return {
        "backbone": request.spec.name,
        "protocol": request.protocol.name,
        "input": f"{request.protocol.input_size}x{request.protocol.input_size}x{request.protocol.in_channels}",
        "params": compute.params,
        "gflops": compute.gflops,
        "gflops_source": compute.source,
        "gflops_published_input": published_input_gflops(request),
        "training": {
            "steps": recipe.steps,
            "batch": recipe.batch,
            "images": images,
            "gflops": compute.gflops * images * TRAINING_FACTOR,
        },
        "sampling": [
            {
                "sampler": sampling.sampler,
                "steps": steps,
                "guidance_scale": sampling.guidance_scale,
                "gflops_per_image": request.gflops_image(steps),
                "gflops": request.gflops_image(steps) * request.samples,
            }
            for steps in drawn
        ],
        "match": None if request.match is None else dataclasses.asdict(request.match),
        "match_sampling": [dataclasses.asdict(each) for each in request.match_sampling],
        "samples": request.samples,
        "disk_bytes": 2 * CHECKPOINT_BYTES * compute.params
        + len(drawn) * request.samples * request.protocol.resolution**2 * request.protocol.image_channels,
        "recipe": dataclasses.asdict(recipe),
        "missing": missing(request),
        "lacking_judge": missing_evaluator_files(request.protocol),
    }
