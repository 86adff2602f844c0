"""Systems: ways to make samples that a row of a table stands for.

A system is one backbone or several, with the sampler, steps, guidance and decoder behind a number: a base; perhaps a
classifier that guides it; perhaps upsamplers, each given the image before it; perhaps a decoder of latents. The ones
of the DiT paper's Tables 2, 3 and 5 are in `paper.py`; a user's own is a TOML file:

    name = "my-cascade"
    protocol = "digits"
    [base]
    backbone = "adm-xs"
    steps = 50
    clip_denoised = true
    arguments = { input_size = 4, in_channels = 1, num_classes = 10 }
    [[upsamplers]]
    backbone = "adm-u-xs"
    conditioning_noise = 0.1

Weights are given when it is sampled: as files, or as the folders of runs, whose arguments, schedule and objective then
take the place of the system's.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.errors import UserError, shown
from harness.protocols import GUIDANCE_CHANNELS, UINT8_RULES, Protocol, check_name, get_protocol
from harness.registry import unknown
from harness.spec import BackboneSpec, Compute

if TYPE_CHECKING:
    from harness.diffusion.objectives import Objective
    from harness.diffusion.plans import SamplerPlan

CLASSIFIER_PASSES = 2  # of a guiding classifier: forward, and backward to the image alone, taken as one more


@dataclass(frozen=True, kw_only=True)
class Component:
    """A network that makes images: a denoiser or a generator as base, an upsampler after it, and how it is sampled."""

    backbone: str
    arguments: dict[str, Any] = field(default_factory=dict)  # of the builder, where they differ from its defaults
    objective: str = "epsilon-learned-range"
    schedule: str = "linear"
    diffusion_steps: int = 1000
    sampler: str = "ddpm"
    steps: int = 250
    eta: float = 0.0
    clip_denoised: bool = False
    guidance_scale: float = 1.0  # classifier-free; 1 = none
    guidance_channels: str = "all"
    truncation: float = 1.0  # a generator's
    conditioning_noise: float = 0.0  # an upsampler's: std of Gaussian noise on the image it is given

    @property
    def spec(self) -> BackboneSpec:
        return registry.backbones.get(self.backbone)

    @property
    def passes(self) -> int:
        """Forward passes for one image."""
        if self.spec.kind == "generator":
            return 1
        return self.steps * (2 if self.guidance_scale != 1 else 1)

    def compute(self) -> Compute:
        """Of one forward pass on one image."""
        return self.spec.count(**self.build_arguments())

    def plan(self, objective: Objective) -> SamplerPlan:
        """The plan of its sampler; refused where sampler, schedule and steps do not fit each other."""
        from harness.diffusion.schedule import Schedule

        schedule = Schedule.named(self.schedule, self.diffusion_steps)
        make = registry.samplers.get(self.sampler).make
        return make(schedule, self.steps, objective, self.eta, self.clip_denoised)

    def build_arguments(self) -> dict[str, Any]:
        """Arguments of the builder, the output channels set by the objective."""
        arguments = dict(self.arguments)
        full = self.spec.arguments(**arguments)
        if self.spec.kind != "generator" and full.get("out_channels") is None:
            objective = registry.objectives.get(self.objective)
            arguments["out_channels"] = objective.out_channels(full["in_channels"])
        return arguments


@dataclass(frozen=True, kw_only=True)
class GuidanceClassifier:
    """A classifier of noised images that guides the base."""

    backbone: str
    arguments: dict[str, Any] = field(default_factory=dict)
    schedule: str = "linear"  # of the noise that it was trained on: the base's
    diffusion_steps: int = 1000
    scale: float = 1.0

    @property
    def spec(self) -> BackboneSpec:
        return registry.backbones.get(self.backbone)

    def build_arguments(self) -> dict[str, Any]:
        return dict(self.arguments)

    def compute(self) -> Compute:
        return self.spec.count(**self.arguments)


@dataclass(frozen=True, kw_only=True)
class System:
    """A way to make samples. `decoder` names what turns latents into images; "" where there is nothing to decode.

    `unavailable` says why the harness cannot run it: then it is there as published rows and as evaluated samples.
    """

    name: str
    summary: str = ""
    protocol: str
    base: Component | None = None
    classifier: GuidanceClassifier | None = None
    upsamplers: tuple[Component, ...] = ()
    decoder: str = ""
    uint8_rule: str = "dit"
    label_policy: str = "random"
    unavailable: str = ""
    row: str = ""  # where it is published: "Table 2: ADM-G"

    def __post_init__(self) -> None:
        check_name("system", self.name)
        where = f"system {self.name!r}"
        if self.uint8_rule not in UINT8_RULES:
            raise UserError(f"{where}: {unknown('uint8_rule', self.uint8_rule, UINT8_RULES)}")
        if self.label_policy not in ("random", "balanced"):
            raise UserError(f"{where}: label_policy {shown(self.label_policy)} is not one of random, balanced")
        if self.base is None and not self.unavailable:
            raise UserError(f"{where}: [base] is missing")

    @property
    def task(self) -> Protocol:
        return get_protocol(self.protocol)

    @property
    def parts(self) -> dict[str, Component | GuidanceClassifier]:
        """The networks by the name that --weights gives them: base, classifier, upsampler (upsampler-2, ...)."""
        parts: dict[str, Component | GuidanceClassifier] = {} if self.base is None else {"base": self.base}
        if self.classifier is not None:
            parts["classifier"] = self.classifier
        for number, stage in enumerate(self.upsamplers, start=1):
            parts["upsampler" if number == 1 else f"upsampler-{number}"] = stage
        return parts

    @property
    def backbone(self) -> str:
        """Its networks joined by "+", as records name them."""
        return "+".join(part.backbone for part in self.parts.values())

    @property
    def stages(self) -> tuple[Component, ...]:
        """What makes images, in order."""
        return () if self.base is None else (self.base, *self.upsamplers)

    @property
    def evaluations(self) -> int:
        """Forward passes of denoisers and generators for one image; a guiding classifier's are not among them."""
        return sum(stage.passes for stage in self.stages)

    def gflops_forward(self) -> float:
        """One forward pass of each network but the classifier, as the paper's Table 6 counts."""
        return sum(stage.compute().gflops for stage in self.stages)

    def gflops_image(self) -> float:
        """Sampling compute of one image, guidance of either sort included, decoding not."""
        total = sum(stage.compute().gflops * stage.passes for stage in self.stages)
        if self.classifier is not None and self.base is not None:
            total += self.classifier.compute().gflops * CLASSIFIER_PASSES * self.base.steps
        return total

    def params(self) -> int:
        """Parameters of all networks."""
        return sum(part.compute().params for part in self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready: what decides the images, without what describes them. The decoder speaks for itself."""
        data = dataclasses.asdict(self)
        for name in ("summary", "row", "unavailable", "decoder"):
            del data[name]
        return data

    def check(self) -> None:
        """Hold the parts against each other; the first that does not fit is refused."""
        where = f"system {self.name!r}"
        if self.unavailable:
            raise UserError(f"{where} cannot be run: {self.unavailable}")
        assert self.base is not None
        kinds = {"base": ("denoiser", "generator"), "classifier": ("classifier",)}
        for name, part in self.parts.items():
            fitting = kinds.get(name, ("upsampler",))
            if part.spec.kind not in fitting:
                raise UserError(
                    f"{where}: {name} is {part.backbone!r}, of kind {part.spec.kind}; it must be a {' or '.join(fitting)}"
                )
        for name, stage in self.parts.items():
            if isinstance(stage, Component):
                check = _check_generator if stage.spec.kind == "generator" else _check_sampling
                check(f"{where}: {name}", stage)
        if self.classifier is not None and not self.classifier.scale > 0:
            raise UserError(f"{where}: the classifier's scale {self.classifier.scale:g} must be positive; leave it out")
        if self.classifier is not None and self.base.spec.kind == "generator":
            raise UserError(f"{where}: a generator cannot be guided by a classifier")
        if self.decoder and self.upsamplers:
            raise UserError(f"{where}: upsamplers after a decoder are not supported; leave out one of them")
        if self.classifier is not None:
            for item in ("schedule", "diffusion_steps"):
                seen, guided = getattr(self.classifier, item), getattr(self.base, item)
                if seen != guided:
                    raise UserError(
                        f"{where}: the classifier knows noise of {item} {_plain(seen)}, and the base that it guides has {guided}"
                    )
        self._check_sizes(where)

    def _check_sizes(self, where: str) -> None:
        """Classes, channels and sides of parts that meet must agree."""
        task = self.task
        full = {name: part.spec.arguments(**part.arguments) for name, part in self.parts.items()}
        for name, arguments in full.items():
            if arguments.get("num_classes", task.num_classes) != task.num_classes:
                raise UserError(
                    f"{where}: {name} has {arguments['num_classes']} classes and protocol {task.name!r} has "
                    f"{task.num_classes}; choose weights, or arguments, of {task.num_classes}"
                )
        if self.classifier is not None:
            seen, guided = full["classifier"], full["base"]
            for name in ("input_size", "in_channels"):
                if seen[name] != guided[name]:
                    raise UserError(
                        f"{where}: the classifier has {name} {seen[name]} and the base that it guides {guided[name]}"
                    )
        made = {name: arguments for name, arguments in full.items() if name != "classifier"}
        before = None
        for name, arguments in made.items():
            low = arguments.get("low_res_size")
            if before is not None and low is not None and low != made[before]["input_size"]:
                raise UserError(
                    f"{where}: {name} was made for images of {low} pixels and {before} makes them of "
                    f"{made[before]['input_size']}"
                )
            channels = task.image_channels if before is None else made[before].get("in_channels", task.image_channels)
            if before is not None and arguments["in_channels"] != channels:
                raise UserError(
                    f"{where}: {name} takes {arguments['in_channels']} channels and {before} makes {channels}"
                )
            before = name
        if not self.decoder:
            last = list(made.values())[-1]
            size, channels = last["input_size"], last.get("in_channels", task.image_channels)
            if (size, channels) != (task.resolution, task.image_channels):
                raise UserError(
                    f"{where}: {before} makes images of {size}x{size}x{channels} and protocol {task.name!r} has "
                    f"{task.resolution}x{task.resolution}x{task.image_channels}; choose arguments or protocol to fit"
                )


def _check_generator(where: str, stage: Component) -> None:
    """A generator has a truncation, and none of a diffusion's settings."""
    if not 0 < stage.truncation <= 1:
        raise UserError(f"{where}: truncation {stage.truncation:g} must lie above 0 and be at most 1")
    for name in ("eta", "guidance_scale", "conditioning_noise", "clip_denoised"):
        default = Component.__dataclass_fields__[name].default
        if getattr(stage, name) != default:
            raise UserError(f"{where}: {name} is a diffusion's, and {stage.backbone!r} is a generator; leave it out")


def _check_sampling(where: str, stage: Component) -> None:
    """Settings that no sampler can be made from; the plan itself is tried, so that it is not found out late."""
    objective = registry.objectives.get(stage.objective)
    arguments = stage.spec.arguments(**stage.arguments)
    for name, least, most in (
        ("eta", 0.0, 1.0),
        ("guidance_scale", 1.0, math.inf),
        ("conditioning_noise", 0.0, math.inf),
    ):
        if not least <= getattr(stage, name) <= most:
            limit = f"lie in {least:g} to {most:g}" if most < math.inf else f"be at least {least:g}"
            raise UserError(f"{where}: {name} {getattr(stage, name):g} must {limit}")
    if stage.guidance_channels not in GUIDANCE_CHANNELS:
        raise UserError(f"{where}: {unknown('guidance_channels', stage.guidance_channels, GUIDANCE_CHANNELS)}")
    if stage.truncation != 1:
        raise UserError(f"{where}: truncation is a generator's, and {stage.backbone!r} is none; leave it out")
    if stage.conditioning_noise and stage.spec.kind != "upsampler":
        raise UserError(f"{where}: conditioning_noise is an upsampler's, and {stage.backbone!r} is none")
    if stage.guidance_scale != 1 and (stage.spec.null_label is None or arguments.get("null_class") is False):
        raise UserError(f"{where}: {stage.backbone!r} has no null label, so classifier-free guidance cannot be had")
    if not 1 <= stage.steps <= stage.diffusion_steps:
        raise UserError(f"{where}: {stage.steps} sampling steps do not lie in 1 to {stage.diffusion_steps}")
    stage.plan(objective)


def _plain(value: Any) -> str:
    return shown(value).strip("'")
