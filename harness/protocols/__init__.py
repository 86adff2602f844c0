"""Protocols: named, versioned definitions of what is generated and how it is evaluated, which make numbers comparable.

A protocol states the data set, the resolution, pixels or latents, the classes, the number of samples and the suite. It
also holds the default training recipe and sampling settings, which flags override. The built-in protocols are the TOML
files in this folder; users can write TOML files of the same form.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.diffusion.auxiliary import read_auxiliary
from harness.diffusion.guidance import Guidance, below_one, read_guidance
from harness.diffusion.samplers import canonical_sampler
from harness.errors import UserError, shown
from harness.io.text import MAX_INT, count, read_toml
from harness.registry import objectives, protocols, unknown

GUIDANCE_CHANNELS = ("first-3", "all")
LONGEST_NAME = 100
NO_PROTOCOL = "none"  # in records of samples that were compared with a reference without a protocol
# Marks an item that was added after runs had been made. At its default value it is not part of a run's identity, so
# that older runs keep their identity.
ADDED_LATER = {"added_later": True}

MAX_EMA_WIDTH = 1 / math.sqrt(12)  # sigma_rel of the plain mean of all steps

# name: (shift, factor, offset). A sample x, about in [-1, 1], becomes (x + shift) * factor + offset, clamped to 0 ... 255
# and truncated to an integer.
UINT8_RULES = {
    "dit": (0.0, 127.5, 128.0),  # facebookresearch/DiT sample_ddp.py; StyleGAN's too
    "adm": (1.0, 127.5, 0.0),  # openai/guided-diffusion scripts/*_sample.py: half a level darker
    "ldm": (1.0, 127.5, 0.0),  # CompVis/latent-diffusion: clamp((x + 1) / 2, 0, 1) x 255
    "biggan": (1.0, 128.0, 0.0),  # pytorch-pretrained-BigGAN utils.py: (x + 1) / 2 x 256
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained. The defaults are the paper's (DiT sec. 4 and its released train.py)."""

    steps: int = 400_000
    batch: int = 256  # images per step, over all devices
    learning_rate: float = 1e-4  # AdamW, constant
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = 0  # linear warm-up of the learning rate; 0 = none
    clip_norm: float = 0.0  # global gradient norm; 0 = no clipping
    ema_decay: float = 0.9999  # per step; the EMA starts at the initial weights, without bias correction
    ema_ramp: bool = False  # True: decay at step s is min(ema_decay, (1 + s) / (10 + s)), for short runs
    label_dropout: float = 0.1  # share of labels replaced by the null label; ignored by a backbone without one
    flip: bool = True  # horizontal mirror with probability 1/2
    objective: str = "epsilon-learned-range"
    schedule: str = "linear"
    diffusion_steps: int = 1000
    # An upsampler's low-resolution image gets noise of std U[0, this); 0 = none.
    conditioning_noise: float = field(default=0.0, metadata=ADDED_LATER)
    time_distribution: str = field(
        default="uniform", metadata=ADDED_LATER
    )  # or "logit-normal:0:1", "log-normal:-1.2:1.2"
    loss_weight: str = field(default="none", metadata=ADDED_LATER)  # of the squared error: "min-snr", "min-snr:5", ...
    noise_scale: float = field(default=1.0, metadata=ADDED_LATER)  # factor of the noise, in continuous time
    # Widths (sigma_rel) of further averages with a power-function profile, as in "0.05:0.10"; "": none.
    ema_widths: str = field(default="", metadata=ADDED_LATER)
    # How many times they are saved in a training, at even distances, for `harness sample --ema-width`.
    ema_snapshots: int = field(default=8, metadata=ADDED_LATER)
    # Auxiliary loss with trained heads, as in "repa:efficientnet-lite0-96:blocks.2:0.5" (`harness.diffusion.auxiliary`); "": none.
    auxiliary: str = field(default="", metadata=ADDED_LATER)

    @property
    def widths(self) -> tuple[float, ...]:
        """`ema_widths` as numbers, ascending."""
        return tuple(map(float, self.ema_widths.split(":"))) if self.ema_widths else ()

    def __post_init__(self) -> None:
        # One text for one set of widths: 0.10:0.05 is the same recipe, with the same identity, as 0.05:0.1.
        object.__setattr__(self, "ema_widths", ":".join(map(repr, _read_widths(self.ema_widths))))
        if self.auxiliary:  # in its one form, as the widths
            object.__setattr__(self, "auxiliary", str(read_auxiliary(self.auxiliary)))
        _check_finite(self, "recipe")
        for name in ("steps", "batch", "learning_rate", "diffusion_steps", "noise_scale", "ema_snapshots"):
            if not getattr(self, name) > 0:
                raise UserError(f"recipe: {name} must be positive, not {getattr(self, name)}")
        for name in ("ema_decay", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"recipe: {name} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"recipe: {name} must lie in [0, 1), not {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps", "clip_norm", "conditioning_noise"):
            if getattr(self, name) < 0:
                raise UserError(f"recipe: {name} must not be negative, but is {getattr(self, name)}")
        if not self.ema_widths and self.ema_snapshots != type(self).ema_snapshots:
            raise UserError("recipe: ema_snapshots saves the averages of ema_widths, of which there are none")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are made. The defaults are the paper's scaling study (sec. 4: 250 DDPM steps, no guidance)."""

    sampler: str = "ddpm"  # with values of its options, as in "edm-stochastic:20:0.05"
    steps: tuple[int, ...] = (250,)  # each number gives one sample set
    eta: float = 0.0  # share of fresh noise in DDIM; ignored by DDPM
    guidance_scale: float = 1.0  # classifier-free; 1 = none
    guidance_channels: str = "first-3"  # or "all"; the published DiT guides three of its four latent channels
    clip_denoised: bool = False  # clamp the predicted image to [-1, 1]; for images in pixels
    label_policy: str = "random"  # uniform at random, as published; or "balanced"
    seed: int = 0
    uint8_rule: str = "dit"
    # Of the times at which the network is asked: "trailing", "karras", "shift:3", ...; "": the usual one of the schedule.
    spacing: str = field(default="", metadata=ADDED_LATER)
    # Of noise levels sigma at which guidance is applied: "0.1-0.8", "0.3-" (`harness.diffusion.guidance`); "": at all.
    guidance_interval: str = field(default="", metadata=ADDED_LATER)
    # Name of a package's rule (`harness.diffusion.guidance_rules.GuidanceRule`); "": classifier-free guidance.
    guidance_rule: str = field(default="", metadata=ADDED_LATER)
    # Width (sigma_rel) of the average of the weights, reconstructed from a run with `ema_widths`; 0: the average "ema".
    ema_width: float = field(default=0.0, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        _check_finite(self, "sampling")
        object.__setattr__(self, "sampler", canonical_sampler(self.sampler))  # equal options have one identity
        for name, known in (
            ("guidance_channels", GUIDANCE_CHANNELS),
            ("label_policy", ("random", "balanced")),
            ("uint8_rule", UINT8_RULES),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"sampling: {unknown(name, getattr(self, name), known)}")
        if not self.steps or min(self.steps) < 1:
            raise UserError(f"sampling: steps must be positive counts, not {list(self.steps)}")
        if not 0 <= self.eta <= 1:
            raise UserError(f"sampling: eta must lie in [0, 1], not {self.eta:g}")
        if self.ema_width and not 0 < self.ema_width <= MAX_EMA_WIDTH:
            raise UserError(
                f"sampling: ema_width must lie between 0 and {MAX_EMA_WIDTH:.4f}, or be 0 for the EMA with one decay, not "
                f"{self.ema_width:g}"
            )
        if self.seed < 0:
            raise UserError(f"sampling: seed must not be negative, but is {self.seed}")
        if self.guidance_scale < 1:
            raise UserError(f"sampling: {below_one(self.guidance_scale)}")
        if self.guidance_interval or self.guidance_rule:
            item = "guidance_interval" if self.guidance_interval else "guidance_rule"
            try:
                guidance = read_guidance(str(self.guidance))
            except ValueError as error:
                raise UserError(f"sampling: {item}: {error}") from None
            object.__setattr__(self, "guidance_interval", guidance.interval)  # in its one form; the dataclass is frozen

    @property
    def guidance(self) -> Guidance:
        """The scale of guidance, its interval and its rule."""
        return Guidance(self.guidance_scale, self.guidance_interval, self.guidance_rule)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One protocol. `input_size` and `in_channels` describe the network's input: the image, or the latent."""

    name: str
    version: int = 1
    summary: str = ""
    dataset: str
    resolution: int
    image_channels: int = 3
    num_classes: int
    space: str = "pixels"  # or "latents"
    input_size: int
    in_channels: int
    samples: int  # N, the number of samples that a measurement uses
    suite: str
    reference_images: int = 0  # images of the data set that are the reference, drawn with a fixed seed; 0: all
    recipe: Recipe = field(default_factory=Recipe)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        check_name("protocol", self.name)
        _check_finite(self, f"protocol {self.name!r}")
        if self.space not in ("pixels", "latents"):
            raise UserError(f"protocol {self.name!r}: space {shown(self.space)} is not one of pixels, latents")
        if self.num_classes < 0:
            raise UserError(f"protocol {self.name!r}: num_classes must not be negative; 0 is without classes")
        if self.reference_images < 0:
            raise UserError(f"protocol {self.name!r}: reference_images must not be negative; 0 is all of the data set")
        for name in ("resolution", "image_channels", "input_size", "in_channels", "samples", "version"):
            if getattr(self, name) < 1:
                raise UserError(f"protocol {self.name!r}: {name} must be positive, not {getattr(self, name)}")
        if self.space == "pixels" and (self.input_size, self.in_channels) != (self.resolution, self.image_channels):
            raise UserError(
                f"protocol {self.name!r} is in pixels, so input_size and in_channels must equal "
                f"resolution and image_channels ({self.resolution}, {self.image_channels}); for latents set "
                'space = "latents"'
            )

    def as_dict(self) -> dict[str, Any]:
        """The protocol as plain data, ready for JSON."""
        data = dataclasses.asdict(self)
        data["sampling"]["steps"] = list(self.sampling.steps)
        return data


def from_dict(data: dict[str, Any], where: str) -> Protocol:
    """A `Protocol` from plain data. `where` names the file in messages.

    Raises `UserError`, which names the item, if an item is unknown, is missing or has another type.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where}: a protocol is a table of items, not {shown(data)}")
    data = dict(data)
    recipe_data = data.pop("recipe", {})
    if isinstance(recipe_data, dict) and isinstance(recipe_data.get("objective"), str):
        recipe_data = _with_preset(recipe_data)
    recipe = fill(Recipe, recipe_data, f"{where}: [recipe]")
    sampling_data = data.pop("sampling", {})
    # Anything else is passed on unchanged, and `fill` refuses it.
    if isinstance(sampling_data, dict) and isinstance(sampling_data.get("steps"), list):
        sampling_data = {**sampling_data, "steps": tuple(sampling_data["steps"])}
    sampling = fill(Sampling, sampling_data, f"{where}: [sampling]")
    return fill(Protocol, {**data, "recipe": recipe, "sampling": sampling}, where)


def protocol_of_files(dataset: str, shape: tuple[int, int, int], num_classes: int, suite: str) -> Protocol:
    """What an evaluation without a protocol takes from its files: sizes and classes. It has no recipe of its own.

    dataset: name of the reference. shape: (H, W, C) of the samples. num_classes: 1 if there are no labels.
    """
    height, _, channels = shape
    return Protocol(
        name=NO_PROTOCOL, dataset=dataset, resolution=height, image_channels=channels, num_classes=num_classes,
        input_size=height, in_channels=channels, samples=1, suite=suite,
    )  # fmt: skip


def load(path: Path) -> Protocol:
    """The protocol in a TOML file. Raises `UserError` if the file cannot be read or is not valid."""
    return from_dict(read_toml(path, "protocol"), str(path))


def get_protocol(name: str) -> Protocol:
    """The protocol of that name, or the one in the file if the name ends in .toml."""
    in_file = isinstance(name, str) and name.endswith(".toml")
    return load(Path(name)) if in_file else protocols.get(name)


def override(item: Recipe | Sampling, settings: dict[str, Any]) -> Any:
    """A copy of `item` with new values for some of its fields.

    settings: name -> text or value. Each is converted to the type of the old value, so 1, 1.0 and "1" are the same
    learning rate, with the same identity; only `Sampling.steps` must be a tuple already. Raises `UserError` for an
    unknown name, and for a value that cannot be converted.
    """
    known = {each.name: each for each in dataclasses.fields(item)}
    values = {}
    if isinstance(item, Recipe):
        settings = _with_preset(settings)
    for name, value in settings.items():
        if name not in known:
            raise UserError(unknown(f"{type(item).__name__.lower()} item", name, known))
        old = getattr(item, name)
        values[name] = value if type(value) is type(old) else _parse(name, value, old)
    return dataclasses.replace(item, **values)


def _with_preset(items: dict[str, Any]) -> dict[str, Any]:
    """Recipe items in which a preset's name as objective (sit, edm, ...) is replaced by the items that it stands for.

    Items that are given beside it stay as they are.
    """
    from harness.diffusion.objectives import PRESETS

    name = items.get("objective", "")
    if name and name not in PRESETS and name not in objectives:
        raise UserError(unknown("objective", str(name), [*PRESETS, *objectives.names()]))
    preset = PRESETS.get(name)
    return (
        items if preset is None else {**preset, **{name: value for name, value in items.items() if name != "objective"}}
    )


def _parse(name: str, value: object, old: Any) -> Any:
    """`value`, text or a number, as a value of the type of `old`, the present value of the item `name`."""
    text = str(value)  # a number, numpy's included, has the same text as on the command line
    try:
        if isinstance(old, bool):  # before int, of which bool is a subclass
            return {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}[text.lower()]
        if isinstance(old, int):
            return count(text)
        return type(old)(text)
    except (KeyError, ValueError) as error:
        raise UserError(f"{name}={shown(value)} cannot be read as {type(old).__name__}, as in {name}={old}") from error


def _read_widths(text: str) -> list[float]:
    """The widths of averages in `ema_widths`, ascending. Raises `UserError` if one is no sigma_rel."""
    try:
        widths = sorted({float(word) for word in text.split(":")} if text else ())
    except ValueError:
        widths = [math.nan]
    if not all(0 < width <= MAX_EMA_WIDTH for width in widths):
        raise UserError(
            f"recipe: ema_widths {shown(text)}: give widths between 0 and {MAX_EMA_WIDTH:.4f}, as in 0.05:0.10"
        )
    return widths


def check_name(noun: str, name: str) -> None:
    """Raise `UserError` for a name that cannot be used in a table or as the name of a folder."""
    if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
        raise UserError(f"{noun} {shown(name)}: a name must be printable text of at most {LONGEST_NAME} characters")


def _check_finite(item: Recipe | Sampling | Protocol, what: str) -> None:
    """Raise `UserError`, which begins with `what`, for a number that is infinite, NaN or too large."""
    for each in dataclasses.fields(item):
        value = getattr(item, each.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{what}: {each.name} must be a finite number, not {value}")
        if isinstance(value, int) and abs(value) > MAX_INT:
            raise UserError(f"{what}: {each.name} = {shown(value)} is out of range; at most {MAX_INT}")


def fill(cls: type, data: Any, where: str) -> Any:
    """An instance of the dataclass `cls` from a table of a file; `where` names the table in messages.

    Raises `UserError`, which names the item, if one is unknown, is missing or has another type.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where} must be a table, not {type(data).__name__}")
    fields = {each.name: each for each in dataclasses.fields(cls)}
    for name, value in data.items():
        if name not in fields:
            raise UserError(f"{where}: {unknown('item', name, fields)}")
        type_name = str(fields[name].type)  # the annotation as text
        fits = {
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, (int, float)) and not isinstance(value, bool),
            "str": isinstance(value, str),
            "bool": isinstance(value, bool),
            "tuple[int, ...]": isinstance(value, tuple) and all(type(each) is int for each in value),
        }.get(type_name, True)  # the other types, Recipe and Sampling, are made by `from_dict`
        if not fits:
            raise UserError(f"{where}: {name} = {shown(value)} must be of type {type_name}")
        if type_name == "float" and abs(value) > MAX_INT and isinstance(value, int):  # float() below could overflow
            raise UserError(f"{where}: {name} = {shown(value)} is out of range")
    # 0 and 0.0 are the same setting and must have the same hash
    data = {name: float(value) if fields[name].type == "float" else value for name, value in data.items()}
    for name, each in fields.items():
        if name not in data and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: {name} is missing")
    return cls(**data)


def built_in() -> tuple[Protocol, ...]:
    """The protocols in this folder: `digits` first, because it is the default."""
    paths = sorted(Path(__file__).parent.glob("*.toml"), key=lambda path: (path.stem != "digits", path.stem))
    return tuple(load(path) for path in paths)
