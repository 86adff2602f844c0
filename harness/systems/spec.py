"""Systems: one or several networks with all settings that make the samples of a table row.

A system has a base and, optionally, a weaker network or a classifier that guides it, upsamplers (each takes the image of
the component before it) and a decoder of latents; each component has its sampler, steps and guidance. The systems of the
DiT paper's Tables 2, 3 and 5 are in `paper.py`; a user writes a TOML file:

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

Autoguidance of a base at 8x8 pixels has:

    [weak]
    backbone = "adm-xs"
    scale = 2.0
    interval = "0.3-5"
    arguments = { input_size = 8, in_channels = 1, num_classes = 10 }

Weights are given when the system is sampled (`binding.py`): as files, or as the folders of runs, whose arguments, objective,
schedule and noise scale replace the system's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.diffusion.guidance import Guidance
from harness.diffusion.sampler_plan import (
    NOMINAL_EVALUATIONS,
    AnyPlan,
    check_times,
    guided_evaluations,
    not_known,
    reference_plan,
    sampler_plan,
)
from harness.diffusion.samplers import canonical_sampler, is_adaptive
from harness.errors import UserError, shown
from harness.protocols import UINT8_RULES, check_name
from harness.registry import unknown
from harness.spec import BackboneSpec, Compute

if TYPE_CHECKING:
    from harness.diffusion.plans import SamplerPlan

CLASSIFIER_PASSES = 2  # of a guiding classifier: one forward, and one for the gradient with respect to the image


@dataclass(frozen=True, kw_only=True)
class Component:
    """A network that makes images, and how it is sampled: the base (a denoiser or a generator) or an upsampler."""

    backbone: str
    arguments: dict[str, Any] = field(default_factory=dict)  # of the builder, where they differ from its defaults
    objective: str = "epsilon-learned-range"
    schedule: str = "linear"
    diffusion_steps: int = 1000
    noise_scale: float = 1.0  # factor of the noise that it was trained with, in continuous time
    sampler: str = "ddpm"
    steps: int = 250
    eta: float = 0.0
    spacing: str = ""  # of the times, as --spacing; "": the schedule's
    clip_denoised: bool = False
    guidance_scale: float = 1.0  # classifier-free; 1 = none
    guidance_interval: str = ""  # of noise levels at which guidance is applied, as "0.1-0.8"; "": at all
    guidance_channels: str = "all"
    guidance_rule: str = ""  # of a package, by name; "": classifier-free guidance
    truncation: float = 1.0  # for a generator
    conditioning_noise: float = 0.0  # for an upsampler: std of the Gaussian noise that is added to its input image

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", canonical_sampler(self.sampler))  # equal options have one identity

    @property
    def spec(self) -> BackboneSpec:
        """The backbone."""
        return registry.backbones.get(self.backbone)

    @property
    def is_adaptive(self) -> bool:
        """Whether the sampler chooses its own steps, so that evaluations are not known before sampling."""
        return self.spec.kind != "generator" and is_adaptive(self.sampler)

    @property
    def advances(self) -> int:
        """Progress-bar units for one batch: the rows of the sampler's plan, or 1 for a generator."""
        return 1 if self.spec.kind == "generator" else self.plan().advances

    @property
    def evaluations(self) -> int:
        """Network evaluations for one image without guidance: those of the sampler's plan, or 1 for a generator.

        Raises UserError if the sampler is adaptive.
        """
        if self.is_adaptive:
            raise not_known(self.sampler)
        return self.advances

    @property
    def guidance(self) -> Guidance:
        """The scale of guidance by the network itself, its interval and its rule."""
        return Guidance(self.guidance_scale, self.guidance_interval, self.guidance_rule)

    @property
    def passes(self) -> int:
        """Forward passes for one image, with those of guidance by the network itself.

        Raises UserError if the sampler is adaptive.
        """
        passes = 1 if self.spec.kind == "generator" else guided_evaluations(self.plan(), self.guidance)
        if passes is None:
            raise not_known(self.sampler)
        return passes

    def compute(self) -> Compute:
        """Compute of one forward pass on one image."""
        return self.spec.count(**self.build_arguments())

    def plan(self) -> AnyPlan:
        """The plan of the sampler. Raises `UserError` if sampler, schedule and steps do not fit together."""
        check_times(self.spec, registry.objectives.get(self.objective))
        return sampler_plan(
            self.sampler, self.steps, schedule=self.schedule, diffusion_steps=self.diffusion_steps,
            objective=self.objective, eta=self.eta, clip_denoised=self.clip_denoised, noise_scale=self.noise_scale,
            spacing=self.spacing, time=self.spec.time,
        )  # fmt: skip

    def build_arguments(self) -> dict[str, Any]:
        """Arguments of the builder, with the output channels that the objective needs."""
        return dict(self.arguments) if self.spec.kind == "generator" else _with_out_channels(self)


@dataclass(frozen=True, kw_only=True)
class WeakNetwork:
    """A weaker network that guides the base: autoguidance (Karras et al. 2024, arXiv:2406.02507).

    The image that the base predicts becomes D = D_weak + scale (D_base - D_weak). The weak network, smaller or trained less,
    is trained for the same task: it is evaluated on the same x and t with the same label. The two may have different
    objectives on one process, because their predicted images are combined; where the objectives are equal, this is
    the combination of their outputs, as D is linear in the output. Variance channels of the weak network are not used.
    """

    backbone: str
    arguments: dict[str, Any] = field(default_factory=dict)  # of the builder, where they differ from its defaults
    objective: str = "epsilon-learned-range"
    schedule: str = "linear"  # which must be the base's, as must the number of its steps and the noise scale
    diffusion_steps: int = 1000
    noise_scale: float = 1.0
    scale: float  # above 1
    interval: str = ""  # of noise levels at which the base is guided, as "0.1-0.8"; "": at all

    @property
    def spec(self) -> BackboneSpec:
        """The backbone."""
        return registry.backbones.get(self.backbone)

    @property
    def guidance(self) -> Guidance:
        """The scale of autoguidance and its interval."""
        return Guidance(self.scale, self.interval)

    def build_arguments(self) -> dict[str, Any]:
        """Arguments of the builder, with the output channels that the objective needs."""
        return _with_out_channels(self)

    def compute(self) -> Compute:
        """Compute of one forward pass on one image."""
        return self.spec.count(**self.build_arguments())


def _with_out_channels(part: Component | WeakNetwork) -> dict[str, Any]:
    """The arguments of the builder, with the output channels that the objective needs unless they are given."""
    arguments = dict(part.arguments)
    full = part.spec.arguments(**arguments)
    if full.get("out_channels") is None:
        arguments["out_channels"] = registry.objectives.get(part.objective).out_channels(full["in_channels"])
    return arguments


@dataclass(frozen=True, kw_only=True)
class GuidanceClassifier:
    """A classifier of noised images that guides the base."""

    backbone: str
    arguments: dict[str, Any] = field(default_factory=dict)
    schedule: str = "linear"  # of the noise that it was trained on, which must be the base's
    diffusion_steps: int = 1000
    noise_scale: float = 1.0
    scale: float = 1.0

    @property
    def spec(self) -> BackboneSpec:
        """The backbone."""
        return registry.backbones.get(self.backbone)

    def build_arguments(self) -> dict[str, Any]:
        """Arguments of the builder."""
        return dict(self.arguments)

    def compute(self) -> Compute:
        """Compute of one forward pass on one image."""
        return self.spec.count(**self.arguments)


@dataclass(frozen=True, kw_only=True)
class System:
    """One or several networks with all settings that make samples.

    decoder: name of the decoder of latents; "": the system is in pixels. unavailable: why the harness cannot run the
    system, which then has only published rows, and samples made elsewhere can be evaluated; "": it can be run.
    """

    name: str
    summary: str = ""
    protocol: str
    base: Component | None = None
    weak: WeakNetwork | None = None
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
    def parts(self) -> dict[str, Component | WeakNetwork | GuidanceClassifier]:
        """The networks by their names in --weights: base, weak, classifier, upsampler, upsampler-2, ..."""
        parts: dict[str, Component | WeakNetwork | GuidanceClassifier] = {}
        if self.base is not None:
            parts["base"] = self.base
        if self.weak is not None:
            parts["weak"] = self.weak
        if self.classifier is not None:
            parts["classifier"] = self.classifier
        return parts | self.named_upsamplers

    @property
    def named_upsamplers(self) -> dict[str, Component]:
        """The upsamplers by their names in `parts`: upsampler, upsampler-2, ..."""
        numbered = enumerate(self.upsamplers, start=1)
        return {"upsampler" if number == 1 else f"upsampler-{number}": part for number, part in numbered}

    @property
    def backbone(self) -> str:
        """The names of the backbones of all parts, joined by "+", as in records."""
        return "+".join(part.backbone for part in self.parts.values())

    @property
    def named_components(self) -> dict[str, Component]:
        """The base and the upsamplers by their names in `parts`, in the order in which they make images."""
        return {} if self.base is None else {"base": self.base, **self.named_upsamplers}

    @property
    def components(self) -> tuple[Component, ...]:
        """The base and the upsamplers, in the order in which they make images."""
        return tuple(self.named_components.values())

    @property
    def guidance(self) -> Guidance:
        """The guidance of the base: autoguidance if there is a weak network, else guidance by itself."""
        assert self.base is not None
        return self.base.guidance if self.weak is None else self.weak.guidance

    def weak_plan(self) -> SamplerPlan:
        """The plan of the weak network, with the rows of the base's. Raises UserError if it cannot be sampled there."""
        from harness.diffusion.plans import SamplerPlan

        assert self.base is not None and self.weak is not None
        plan = self.base.plan()
        check_times(self.weak.spec, registry.objectives.get(self.weak.objective))
        assert isinstance(plan, SamplerPlan)  # `check_system` has refused a weak network beside an adaptive sampler
        return reference_plan(
            plan, objective=self.weak.objective, schedule=self.weak.schedule,
            diffusion_steps=self.weak.diffusion_steps, noise_scale=self.weak.noise_scale, time=self.weak.spec.time,
        )  # fmt: skip

    @property
    def weak_evaluations(self) -> int:
        """Evaluations of the weak network for one image: one for each guided row of the base's plan.

        Raises UserError if the base's sampler is adaptive.
        """
        if self.base is None or self.weak is None:
            return 0
        plan = self.base.plan()
        evaluations = guided_evaluations(plan, self.weak.guidance)
        if evaluations is None:
            raise not_known(self.base.sampler)
        return evaluations - self.base.evaluations

    @property
    def is_adaptive(self) -> bool:
        """Whether forward passes for an image are not known before sampling."""
        return any(part.is_adaptive for part in self.components)

    @property
    def evaluations(self) -> int | None:
        """Forward passes of the components for one image, as in `passes`, and of the weak network.

        Those of a guiding classifier are not included. None: not known before sampling.
        """
        return None if self.is_adaptive else sum(part.passes for part in self.components) + self.weak_evaluations

    def gflops_forward(self) -> float:
        """Gflops of one forward pass of every component, in sum, as in the paper's Table 6."""
        return sum(part.compute().gflops for part in self.components)

    def estimated_gflops_image(self) -> float:
        """As `gflops_image`, and that of NOMINAL_EVALUATIONS where it is not known: to divide work, and for nothing else."""
        gflops = self.gflops_image()
        return self.gflops_forward() * NOMINAL_EVALUATIONS if gflops is None else gflops

    def gflops_image(self) -> float | None:
        """Sampling compute of one image in Gflops: with every kind of guidance, without decoding.

        None: not known before sampling.
        """
        if self.is_adaptive:
            return None
        total = sum(part.compute().gflops * part.passes for part in self.components)
        if self.weak is not None:
            total += self.weak.compute().gflops * self.weak_evaluations
        if self.classifier is not None and self.base is not None:
            total += self.classifier.compute().gflops * CLASSIFIER_PASSES * self.base.evaluations
        return total

    def params(self) -> int:
        """Number of parameters of all networks."""
        return sum(part.compute().params for part in self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        """All that decides the images, as plain data, except the decoder, which has an identity of its own."""
        data = dataclasses.asdict(self)
        for name in ("summary", "row", "unavailable", "decoder"):
            del data[name]
        # Items that were added later are left out at their defaults: older identities stay.
        if self.weak is None:
            del data["weak"]
        for part in (data["base"], data.get("weak"), data["classifier"], *data["upsamplers"]):
            for name, default in _ADDED_LATER:
                if part is not None and part.get(name) == default:
                    del part[name]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> System:
        """The system of which `as_dict` is `data`, read from JSON; fields that `as_dict` leaves out have their defaults.

        Raises KeyError or TypeError for data of another form.
        """
        classifier, weak = data["classifier"], data.get("weak")
        parts = {
            "weak": None if weak is None else WeakNetwork(**_with_tuples(weak)),
            "base": Component(**_with_tuples(data["base"])),
            "classifier": None if classifier is None else GuidanceClassifier(**_with_tuples(classifier)),
            "upsamplers": tuple(Component(**_with_tuples(each)) for each in data["upsamplers"]),
        }
        return cls(**{**data, **parts})


_ADDED_LATER = (("guidance_interval", ""), ("guidance_rule", ""), ("noise_scale", 1.0), ("spacing", ""))


def _with_tuples(part: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the fields of a part, read from JSON, with tuples instead of lists in its network arguments."""
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in part["arguments"].items()}
    return {**part, "arguments": arguments}
