"""What is asked for, whether it can be had, and what it would cost: before anything expensive begins."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.data.public_files import FILES
from harness.engines import check_installed
from harness.errors import Refusal
from harness.protocols import Protocol, Recipe, Sampling, get_protocol, override
from harness.runs import Run, build_arguments
from harness.spec import BackboneSpec, Compute

if TYPE_CHECKING:
    from harness.matching import Match

TRAINING_FACTOR = 3  # forward and backward: the backward pass taken as two forward passes (DiT sec. 5)
CHECKPOINT_BYTES = 16  # a parameter: weight, EMA, two moments in float32


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run as it was asked for, all names resolved and every default filled in."""

    spec: BackboneSpec
    protocol: Protocol
    recipe: Recipe
    sampling: Sampling
    samples: int
    seed: int
    framework: str
    data: Path | None
    arguments: dict[str, Any]  # of the builder
    compute: Compute
    match: Match | None = None  # where the training steps come from, if they were solved for
    match_sampling: tuple[Match, ...] = ()  # the same for the sampler's steps

    @property
    def gflops_step(self) -> float:
        """Training compute of one optimiser step."""
        return self.compute.gflops * self.recipe.batch * TRAINING_FACTOR

    def gflops_image(self, sampler_steps: int) -> float:
        """Sampling compute of one image; guidance doubles it."""
        return self.compute.gflops * evaluations(sampler_steps, self.sampling.guidance_scale)


def evaluations(sampler_steps: int, guidance_scale: float) -> int:
    """Network evaluations for one image; guidance asks twice."""
    return sampler_steps * (2 if guidance_scale != 1 else 1)


def make_request(
    *,
    backbone: str,
    protocol: str,
    steps: int | None = None,
    seed: int = 0,
    framework: str = "torch",
    data: Path | None = None,
    settings: dict[str, str] | None = None,
    sampling: dict[str, Any] | None = None,
    samples: int | None = None,
    gradient_checkpointing: bool = False,
) -> Request:
    """Resolve names and fill in defaults; whatever does not fit together is refused. Imports no framework."""
    task = get_protocol(protocol)
    recipe = override(task.recipe, {**(settings or {}), **({"steps": steps} if steps else {})})
    return resolve_request(
        backbone, task, recipe, seed=seed, framework=framework, data=data, sampling=sampling, samples=samples,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip


def request_of_run(run: Run, *, sampling: dict[str, Any], samples: int | None = None) -> Request:
    """The request behind an existing run, with sampling settings laid over its protocol's."""
    return resolve_request(
        run.backbone, run.protocol, run.recipe, seed=run.seed, framework=run.framework, data=None, sampling=sampling,
        samples=samples, gradient_checkpointing=run.resolved.gradient_checkpointing,
    )  # fmt: skip


def resolve_request(
    backbone: str,
    task: Protocol,
    recipe: Recipe,
    *,
    seed: int,
    framework: str,
    data: Path | None,
    sampling: dict[str, Any] | None,
    samples: int | None,
    gradient_checkpointing: bool,
) -> Request:
    """Hold backbone, task, recipe and sampling settings against each other."""
    spec = registry.backbones.get(backbone)
    if spec.kind == "generator":
        raise Refusal(
            f"backbone {backbone!r} is a generator, which the harness samples and does not train; "
            "see `harness list systems` and `harness sample --system`"
        )
    if framework not in spec.builders:
        raise Refusal(f"backbone {backbone!r} has no {framework} network; use --framework {next(iter(spec.builders))}")
    check_installed(framework)
    drawing = override(task.sampling, {name: value for name, value in (sampling or {}).items() if value is not None})
    objective = registry.objectives.get(recipe.objective)
    if max(drawing.steps) > recipe.diffusion_steps:
        raise Refusal(
            f"{max(drawing.steps)} sampling steps are more than the {recipe.diffusion_steps} steps of the diffusion"
        )
    if drawing.guidance_scale != 1 and spec.null_label is None:
        raise Refusal(
            f"backbone {backbone!r} has no null label, so classifier-free guidance cannot be had; leave out --cfg"
        )
    if drawing.guidance_scale != 1 and recipe.label_dropout == 0:
        raise Refusal("guidance needs a network trained with label dropout, but label_dropout is 0; leave out --cfg")
    check_plans(recipe, drawing)
    arguments = build_arguments(spec, task, objective.out_channels(task.in_channels))
    if gradient_checkpointing:
        if "gradient_checkpointing" not in spec.defaults:
            raise Refusal(f"backbone {backbone!r} has no gradient checkpointing; leave out --gradient-checkpointing")
        arguments["gradient_checkpointing"] = True
    return Request(
        spec=spec, protocol=task, recipe=recipe, sampling=drawing, samples=samples or task.samples, seed=seed,
        framework=framework, data=data, arguments=arguments, compute=spec.count(**arguments),
    )  # fmt: skip


def check_plans(recipe: Recipe, sampling: Sampling) -> None:
    """Try the schedule and the sampler's plans: what does not fit is refused before anything is trained."""
    from harness.diffusion.schedule import Schedule

    schedule = Schedule.named(recipe.schedule, recipe.diffusion_steps)
    make, objective = registry.samplers.get(sampling.sampler).make, registry.objectives.get(recipe.objective)
    for steps in sampling.steps:
        make(schedule, steps, objective, sampling.eta, sampling.clip_denoised)


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
    except Refusal as error:
        lacks.append(f"suite {task.suite!r}: {error} (see `harness list suites`)")
    else:
        short = [each for each in suite.metrics if request.samples < each.minimum]
        if short:
            lacks.append(
                f"samples: {short[0].key} needs at least {short[0].minimum}, and {request.samples} are asked for"
            )
    return lacks


def lacking_decoder(request: Request) -> list[str]:
    """The auto-encoder that a run in latents would decode by, where it is a path and is not there any more."""
    from harness.data import latents

    if request.protocol.space != "latents" or latents.missing(request.data, request.protocol) is not None:
        return []
    place = latents.read_meta(request.data).places.get("vae", "")
    if not Path(place).is_absolute() or Path(place).exists():  # else a name, whose files the hub has
        return []
    return [f"the auto-encoder behind {request.data} is not at {place}; name it, or another, with --decoder DIR"]


def lacking_judge(task: Protocol) -> list[str]:
    """What the measurement at the end needs to be given, for want of which a run ends with samples."""
    flag = _weights_flag(task)
    if not flag:
        return []
    known = [name for name in ("inception", task.name) if name in FILES] if flag == "--inception" else []
    fetch = f" ({', '.join(f'`harness data fetch {name}`' for name in known)})" if known else ""
    return [f"suite {task.suite!r} measures with {flag} FILE and --reference FILE{fetch}"]


def judge_command(task: Protocol, samples: Path) -> str:
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
    except Refusal:  # named as missing
        return ""


def published_input_gflops(request: Request) -> float | None:
    """Gflops at the backbone's own default input (the paper's), where that differs from the protocol's."""
    defaults = request.spec.arguments()
    here = {name: defaults.get(name) for name in ("input_size", "in_channels")}
    if here == {name: request.arguments.get(name) for name in here}:
        return None
    return request.spec.count().gflops


def plan(request: Request) -> dict[str, Any]:
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
        "lacking_judge": lacking_judge(request.protocol),
    }
