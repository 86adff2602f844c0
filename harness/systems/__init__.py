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
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.errors import Refusal, shown
from harness.protocols import GUIDANCE_CHANNELS, LONGEST_NAME, MOST, UINT8_RULES, Protocol, check_name, get_protocol
from harness.registry import unknown
from harness.spec import BackboneSpec, Compute

if TYPE_CHECKING:
    from harness.diffusion.objectives import Objective
    from harness.diffusion.plans import SamplerPlan

CLASSIFIER_PASSES = 2  # of a guiding classifier: forward, and backward to the image alone, taken as one more


@dataclass(frozen=True, kw_only=True)
class Stage:
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
class Guide:
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
    base: Stage | None = None
    classifier: Guide | None = None
    upsamplers: tuple[Stage, ...] = ()
    decoder: str = ""
    uint8_rule: str = "dit"
    label_policy: str = "random"
    unavailable: str = ""
    row: str = ""  # where it is published: "Table 2: ADM-G"

    def __post_init__(self) -> None:
        check_name("system", self.name)
        where = f"system {self.name!r}"
        if self.uint8_rule not in UINT8_RULES:
            raise Refusal(f"{where}: {unknown('uint8_rule', self.uint8_rule, UINT8_RULES)}")
        if self.label_policy not in ("random", "balanced"):
            raise Refusal(f"{where}: label_policy {shown(self.label_policy)} is not one of random, balanced")
        if self.base is None and not self.unavailable:
            raise Refusal(f"{where}: [base] is missing")

    @property
    def task(self) -> Protocol:
        return get_protocol(self.protocol)

    @property
    def parts(self) -> dict[str, Stage | Guide]:
        """The networks by the name that --weights gives them: base, classifier, upsampler (upsampler-2, ...)."""
        parts: dict[str, Stage | Guide] = {} if self.base is None else {"base": self.base}
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
    def stages(self) -> tuple[Stage, ...]:
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
            raise Refusal(f"{where} cannot be run: {self.unavailable}")
        assert self.base is not None
        kinds = {"base": ("denoiser", "generator"), "classifier": ("classifier",)}
        for name, part in self.parts.items():
            fitting = kinds.get(name, ("upsampler",))
            if part.spec.kind not in fitting:
                raise Refusal(
                    f"{where}: {name} is {part.backbone!r}, of kind {part.spec.kind}; it must be a {' or '.join(fitting)}"
                )
        for name, stage in self.parts.items():
            if isinstance(stage, Stage):
                check = _check_generator if stage.spec.kind == "generator" else _check_sampling
                check(f"{where}: {name}", stage)
        if self.classifier is not None and not self.classifier.scale > 0:
            raise Refusal(f"{where}: the classifier's scale {self.classifier.scale:g} must be positive; leave it out")
        if self.classifier is not None and self.base.spec.kind == "generator":
            raise Refusal(f"{where}: a generator cannot be guided by a classifier")
        if self.decoder and self.upsamplers:
            raise Refusal(f"{where}: upsamplers after a decoder are not supported; leave out one of them")
        if self.classifier is not None:
            for item in ("schedule", "diffusion_steps"):
                seen, guided = getattr(self.classifier, item), getattr(self.base, item)
                if seen != guided:
                    raise Refusal(
                        f"{where}: the classifier knows noise of {item} {_plain(seen)}, and the base that it guides has {guided}"
                    )
        self._check_sizes(where)

    def _check_sizes(self, where: str) -> None:
        """Classes, channels and sides of parts that meet must agree."""
        task = self.task
        full = {name: part.spec.arguments(**part.arguments) for name, part in self.parts.items()}
        for name, arguments in full.items():
            if arguments.get("num_classes", task.num_classes) != task.num_classes:
                raise Refusal(
                    f"{where}: {name} has {arguments['num_classes']} classes and protocol {task.name!r} has "
                    f"{task.num_classes}; choose weights, or arguments, of {task.num_classes}"
                )
        if self.classifier is not None:
            seen, guided = full["classifier"], full["base"]
            for name in ("input_size", "in_channels"):
                if seen[name] != guided[name]:
                    raise Refusal(
                        f"{where}: the classifier has {name} {seen[name]} and the base that it guides {guided[name]}"
                    )
        made = {name: arguments for name, arguments in full.items() if name != "classifier"}
        before = None
        for name, arguments in made.items():
            low = arguments.get("low_res_size")
            if before is not None and low is not None and low != made[before]["input_size"]:
                raise Refusal(
                    f"{where}: {name} was made for images of {low} pixels and {before} makes them of "
                    f"{made[before]['input_size']}"
                )
            channels = task.image_channels if before is None else made[before].get("in_channels", task.image_channels)
            if before is not None and arguments["in_channels"] != channels:
                raise Refusal(
                    f"{where}: {name} takes {arguments['in_channels']} channels and {before} makes {channels}"
                )
            before = name
        if not self.decoder:
            last = list(made.values())[-1]
            size, channels = last["input_size"], last.get("in_channels", task.image_channels)
            if (size, channels) != (task.resolution, task.image_channels):
                raise Refusal(
                    f"{where}: {before} makes images of {size}x{size}x{channels} and protocol {task.name!r} has "
                    f"{task.resolution}x{task.resolution}x{task.image_channels}; choose arguments or protocol to fit"
                )


def _check_generator(where: str, stage: Stage) -> None:
    """A generator has a truncation, and none of a diffusion's settings."""
    if not 0 < stage.truncation <= 1:
        raise Refusal(f"{where}: truncation {stage.truncation:g} must lie above 0 and be at most 1")
    for name in ("eta", "guidance_scale", "conditioning_noise", "clip_denoised"):
        default = Stage.__dataclass_fields__[name].default
        if getattr(stage, name) != default:
            raise Refusal(f"{where}: {name} is a diffusion's, and {stage.backbone!r} is a generator; leave it out")


def _check_sampling(where: str, stage: Stage) -> None:
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
            raise Refusal(f"{where}: {name} {getattr(stage, name):g} must {limit}")
    if stage.guidance_channels not in GUIDANCE_CHANNELS:
        raise Refusal(f"{where}: {unknown('guidance_channels', stage.guidance_channels, GUIDANCE_CHANNELS)}")
    if stage.truncation != 1:
        raise Refusal(f"{where}: truncation is a generator's, and {stage.backbone!r} is none; leave it out")
    if stage.conditioning_noise and stage.spec.kind != "upsampler":
        raise Refusal(f"{where}: conditioning_noise is an upsampler's, and {stage.backbone!r} is none")
    if stage.guidance_scale != 1 and (stage.spec.null_label is None or arguments.get("null_class") is False):
        raise Refusal(f"{where}: {stage.backbone!r} has no null label, so classifier-free guidance cannot be had")
    if not 1 <= stage.steps <= stage.diffusion_steps:
        raise Refusal(f"{where}: {stage.steps} sampling steps do not lie in 1 to {stage.diffusion_steps}")
    stage.plan(objective)


def from_dict(data: dict[str, Any], where: str) -> System:
    """A `System` from plain data; an unknown, missing or mistyped item is refused by name. `where` is the file."""
    data = dict(data)
    for name in ("row", "unavailable"):
        if name in data:
            raise Refusal(f"{where}: {name} is for the built-in systems; leave it out")
    if "base" in data:
        data["base"] = _fill(Stage, data["base"], f"{where}: [base]")
    if "classifier" in data:
        data["classifier"] = _fill(Guide, data["classifier"], f"{where}: [classifier]")
    upsamplers = data.get("upsamplers", [])
    if not isinstance(upsamplers, list):
        raise Refusal(f"{where}: upsamplers must be tables, written [[upsamplers]]")
    if isinstance(data.get("name"), str) and data["name"] in registry.systems:
        raise Refusal(f"{where}: the name {data['name']!r} is that of a built-in system; choose another")
    data["upsamplers"] = tuple(_fill(Stage, each, f"{where}: [[upsamplers]]") for each in upsamplers)
    return _fill(System, data, where)


def load(path: Path) -> System:
    """Read a system from a TOML file."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal(f"system file {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of TOML, of its encoding, of numbers too long, of brackets too deep
        raise Refusal(f"system file {path} is not valid TOML: {error}") from error
    return from_dict(data, str(path))


def get_system(name: str) -> System:
    """The system of that name, or in that file when the name ends in .toml."""
    return load(Path(name)) if name.endswith(".toml") else registry.systems.get(name)


def _fill(of: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise Refusal(f"{where} must be a table, not {type(data).__name__}")
    fields = {each.name: each for each in dataclasses.fields(of)}
    values = {}
    for name, value in data.items():
        if name not in fields:
            raise Refusal(f"{where}: {unknown('item', name, fields)}")
        wanted = str(fields[name].type)
        if type(value) is int and abs(value) > MOST:
            raise Refusal(f"{where}: {name} = {shown(value)} is out of range")
        if wanted == "float" and type(value) is int:
            value = float(value)
        fits = {"int": int, "float": float, "str": str, "bool": bool, "dict[str, Any]": dict}
        if wanted in fits and type(value) is not fits[wanted]:
            raise Refusal(f"{where}: {name} = {shown(value)} must be of type {wanted.partition('[')[0]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise Refusal(f"{where}: {name} must be a finite number, not {value}")
        if wanted.startswith("dict"):  # TOML has no tuples
            if strange := [key for key, each in value.items() if not _is_argument(each)]:
                raise Refusal(f"{where}: {name}: {strange[0]} = {shown(value[strange[0]])} is no argument of a network")
            value = {key: tuple(each) if isinstance(each, list) else each for key, each in value.items()}
        values[name] = value
    for name, each in fields.items():
        if name not in values and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise Refusal(f"{where}: {name} is missing")
    return of(**values)


def _plain(value: Any) -> str:
    return shown(value).strip("'")


def _is_argument(value: Any, depth: int = 2) -> bool:
    """Whether the builder of a network may be given it: a number, true or false, a name, or a list of such."""
    if isinstance(value, list):
        return depth > 0 and all(_is_argument(each, depth - 1) for each in value)
    if isinstance(value, str):
        return value.isprintable() and len(value) <= LONGEST_NAME
    return isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) <= MOST)
