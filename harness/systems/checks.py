"""Checks that the parts of a system fit together and fit its protocol, before anything is sampled."""

from __future__ import annotations

import math

from harness import registry
from harness.diffusion.guidance import Guidance, below_one, read_guidance
from harness.diffusion.sampler_plan import AnyPlan, check_guided_rows
from harness.errors import UserError, shown
from harness.protocols import GUIDANCE_CHANNELS, get_protocol
from harness.registry import unknown
from harness.systems.spec import Component, GuidanceClassifier, System, WeakNetwork


def check_system(system: System) -> None:
    """Check that the parts of a system fit together and fit the protocol. Raises `UserError` for the first that does not."""
    where = f"system {system.name!r}"
    if system.unavailable:
        raise UserError(f"{where} cannot be run: {system.unavailable}")
    assert system.base is not None
    kinds = {"base": ("denoiser", "generator"), "weak": ("denoiser",), "classifier": ("classifier",)}
    for name, part in system.parts.items():
        allowed = kinds.get(name, ("upsampler",))  # all other parts are upsamplers: see `named_upsamplers`
        if part.spec.kind not in allowed:
            raise UserError(
                f"{where}: {name} is {part.backbone!r}, of kind {part.spec.kind}; it must be a {' or '.join(allowed)}"
            )
    for name, part in system.parts.items():
        if isinstance(part, Component):
            check_settings = _check_generator if part.spec.kind == "generator" else _check_sampling
            check_settings(f"{where}: {name}", part)
    if system.is_adaptive and len(system.parts) > 1:
        raise UserError(
            f"{where}: an adaptive sampler is for systems of one network, because the evaluations of each are counted "
            "apart; take heun, say, or leave out the other networks"
        )
    if system.weak is not None:
        _check_weak(system, where, system.base, system.weak)
    if system.classifier is not None and not system.classifier.scale > 0:
        raise UserError(f"{where}: the classifier's scale {system.classifier.scale:g} must be positive; leave it out")
    if system.classifier is not None and system.base.spec.kind == "generator":
        raise UserError(f"{where}: a generator cannot be guided by a classifier")
    if system.decoder and system.upsamplers:
        raise UserError(f"{where}: upsamplers after a decoder are not supported; leave out one of them")
    if system.classifier is not None:
        _check_process(f"{where}: the classifier", system.classifier, system.base)
        objective = registry.objectives.get(system.base.objective)
        if objective.input_scale is not None or objective.network_time is not None:
            raise UserError(
                f"{where}: the objective {objective.name} gives its network x and t in other units than a classifier was "
                "trained in; a classifier cannot guide it"
            )
        if system.base.spec.time != "timestep" or system.base.spec.times == 2:
            end = ", and the end of a step" if system.base.spec.times == 2 else ""
            raise UserError(
                f"{where}: {system.base.backbone} takes another time ({system.base.spec.time}{end}) than a classifier was "
                "trained with; a classifier cannot guide it"
            )
    _check_sizes(system, where)


def _check_weak(system: System, where: str, base: Component, weak: WeakNetwork) -> None:
    """Raise `UserError` for a weak network that cannot guide the base."""
    if base.spec.kind == "generator":
        raise UserError(f"{where}: a generator cannot be guided by a weak network")
    others = {
        "classifier-free guidance of the base": base.guidance_scale != 1,
        "a classifier": system.classifier is not None,
    }
    if given := [name for name, is_given in others.items() if is_given]:
        raise UserError(f"{where}: autoguidance by a weak network excludes {given[0]}; leave out one of them")
    if not weak.scale > 1:
        raise UserError(f"{where}: weak: scale {weak.scale:g} must be above 1, which is no guidance")
    _check_process(f"{where}: the weak network", weak, base)
    system.weak_plan()  # for its UserError
    _check_guidance(f"{where}: weak", base.plan(), weak.guidance, interval="interval")


def _check_sizes(system: System, where: str) -> None:
    """Compare classes, channels and image sizes of the parts with each other and with the protocol."""
    protocol = get_protocol(system.protocol)
    arguments_of = {name: part.spec.arguments(**part.arguments) for name, part in system.parts.items()}
    for name, arguments in arguments_of.items():
        # 0: an unconditional network, which fits every protocol; 1: one whose table of labels has a single class
        fitting = (0, protocol.num_classes, max(protocol.num_classes, 1))
        if arguments.get("num_classes", protocol.num_classes) not in fitting:
            raise UserError(
                f"{where}: {name} has {arguments['num_classes']} classes and protocol {protocol.name!r} has "
                f"{protocol.num_classes}; choose weights, or arguments, of {protocol.num_classes}"
            )
    base = arguments_of["base"]
    for part, words in (("classifier", "the classifier"), ("weak", "the weak network")):
        guiding = arguments_of.get(part, base)
        for name in ("input_size", "in_channels"):
            if part in arguments_of and guiding[name] != base[name]:
                raise UserError(f"{where}: {words} has {name} {guiding[name]} and the base that it guides {base[name]}")
    components = {name: arguments_of[name] for name in system.named_components}
    previous = None  # name of the component whose image this one takes
    for name, arguments in components.items():
        if previous is not None:
            made = components[previous]
            low = arguments.get("low_res_size")
            if low is not None and low != made["input_size"]:
                raise UserError(
                    f"{where}: {name} was made for images of {low} pixels and {previous} makes them of "
                    f"{made['input_size']}"
                )
            channels = made.get("in_channels", protocol.image_channels)  # a generator has no in_channels
            if arguments["in_channels"] != channels:
                raise UserError(
                    f"{where}: {name} takes {arguments['in_channels']} channels and {previous} makes {channels}"
                )
        previous = name
    if not system.decoder:
        last_name, last = list(components.items())[-1]
        size, channels = last["input_size"], last.get("in_channels", protocol.image_channels)
        if (size, channels) != (protocol.resolution, protocol.image_channels):
            raise UserError(
                f"{where}: {last_name} makes images of {size}x{size}x{channels} and protocol {protocol.name!r} has "
                f"{protocol.resolution}x{protocol.resolution}x{protocol.image_channels}; choose arguments or "
                "protocol to fit"
            )


def _check_generator(where: str, part: Component) -> None:
    """Raise `UserError` for a truncation out of range, and for settings that only a diffusion has."""
    if not 0 < part.truncation <= 1:
        raise UserError(f"{where}: truncation {part.truncation:g} must lie above 0 and be at most 1")
    diffusion = ("eta", "guidance_scale", "guidance_interval", "guidance_rule", "conditioning_noise", "clip_denoised")
    for name in (*diffusion, "noise_scale", "spacing"):
        default = Component.__dataclass_fields__[name].default
        if getattr(part, name) != default:
            raise UserError(f"{where}: {name} is a diffusion's, and {part.backbone!r} is a generator; leave it out")


def _check_sampling(where: str, part: Component) -> None:
    """Raise `UserError` for invalid sampler settings. The sampler's plan is made here, before anything expensive begins."""
    arguments = part.spec.arguments(**part.arguments)
    for name, least, most in (
        ("eta", 0.0, 1.0),
        ("conditioning_noise", 0.0, math.inf),
    ):
        if not least <= getattr(part, name) <= most:
            limit = f"lie in {least:g} to {most:g}" if most < math.inf else f"be at least {least:g}"
            raise UserError(f"{where}: {name} {getattr(part, name):g} must {limit}")
    if not (math.isfinite(part.guidance_scale) and part.guidance_scale >= 1):
        raise UserError(f"{where}: {below_one(part.guidance_scale)}")
    if not part.noise_scale > 0:
        raise UserError(f"{where}: noise_scale {part.noise_scale:g} must be positive")
    if part.guidance_channels not in GUIDANCE_CHANNELS:
        raise UserError(f"{where}: {unknown('guidance_channels', part.guidance_channels, GUIDANCE_CHANNELS)}")
    if part.truncation != 1:
        raise UserError(f"{where}: truncation is a generator's, and {part.backbone!r} is none; leave it out")
    if part.conditioning_noise and part.spec.kind != "upsampler":
        raise UserError(f"{where}: conditioning_noise is an upsampler's, and {part.backbone!r} is none")
    # null_class: an argument of LDM's networks; False: this one is built without the null label
    if part.guidance.needs_null_label and (part.spec.null_label is None or arguments.get("null_class") is False):
        raise UserError(f"{where}: {part.backbone!r} has no null label, which classifier-free guidance needs")
    if not 1 <= part.steps <= part.diffusion_steps:
        raise UserError(f"{where}: {part.steps} sampling steps do not lie in 1 to {part.diffusion_steps}")
    if part.is_adaptive and part.steps != Component.steps:
        raise UserError(f"{where}: {part.sampler} chooses its own steps; leave out steps, and --sampling-steps")
    _check_guidance(where, part.plan(), part.guidance, interval="guidance_interval")


def _check_guidance(where: str, plan: AnyPlan, guidance: Guidance, *, interval: str) -> None:
    """Raise `UserError` for a rule or an interval that cannot be read or that guides nothing. interval: name of its item."""
    item, value = (interval, guidance.interval) if guidance.interval else ("guidance_rule", guidance.rule)
    try:
        found = read_guidance(str(guidance)) if value else guidance
    except ValueError as error:
        raise UserError(f"{where}: {item}: {error}") from None
    if found != guidance:  # equal systems have one identity
        raise UserError(f"{where}: {item} {shown(value)}: write {found.interval!r}")
    check_guided_rows(plan, guidance)


def _check_process(where: str, guiding: WeakNetwork | GuidanceClassifier, base: Component) -> None:
    """Raise `UserError` if a network that guides the base was trained on another process than the base."""
    for item in ("schedule", "diffusion_steps", "noise_scale"):
        of_guiding, of_base = getattr(guiding, item), getattr(base, item)
        if of_guiding != of_base:
            raise UserError(
                f"{where} was trained on noise of {item} {_plain(of_guiding)}, and the base that it guides has {of_base}"
            )


def _plain(value: object) -> str:
    """The value as in messages (`shown`: cut if a file gives a long one), without quotes."""
    return shown(value).strip("'")
