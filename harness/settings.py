"""The settings of all stages: one table, from which all other lists of settings are made.

Each stage (run, train, sample, evaluate, plan, report, compare) has a frozen dataclass of options. Each field is a
setting. Its name is the keyword of the Python call (`harness.run(sampling_steps=...)`) and, with dashes, the flag of
the command line (`--sampling-steps`). The field's metadata (`Setting`) holds the rest: help, accepted values, key in a
study file, whether the setting is frozen when a run is created, and the field of a record that states it. This table
defines the options of the command line, the keys of study files, the commands of a study, the commands that reproduce a
record, and the names in footnotes.

Values are text as on the command line ("400k", "16,32,64") or Python values (400_000, [16, 32, 64]).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from harness.diffusion.guidance import Guidance, read_guidance
from harness.errors import UserError, shown
from harness.io.text import (
    GridSize,
    read_count,
    read_counts,
    read_fraction,
    read_grid,
    read_names,
    read_number,
    read_pairs,
    read_path,
    read_paths,
    read_seed,
    read_switch,
    read_text,
    read_texts,
)  # fmt: skip
from harness.planning.reference import Reference, parse_budget, parse_reference, parse_sampling_reference

DEFAULT_PROTOCOL = "digits"
PRECISIONS = ("float32", "tf32", "bfloat16")
FRAMEWORKS = ("torch", "jax")
EVALUATOR_BACKENDS = ("torch", "jax", "tensorflow")
LOGGERS = ("tensorboard", "wandb")  # names of harness.loggers


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The properties of a setting, besides its name, type and default.

    read: the function that parses text or a Python value; it raises ValueError. flags: its flags, if they are not
    `--name`; a switch may have "--x/--no-x". choices: the accepted words. repeat: the flag may be given several times.
    default_text: the default as text, for the help; show_default: the help shows the default itself. study: its key in
    a study file, "key" or "section.key"; empty: none. frozen_unless: None unless the setting is frozen when a run is
    created, because it decides bits; then the value that, like None, means "not given", such as "auto" (empty: only
    None and False do). item: the field or property of `protocols.Sampling` that it overrides. recorded: the field of
    `results.records.Record` that states it, such as "sampling.eta". footnote: its name in footnotes. argument: whether
    it is a positional argument of the command line.
    """

    help: str
    read: Callable[[Any], Any]
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    repeat: bool = False
    default_text: str = ""
    show_default: bool = False
    study: str = ""
    frozen_unless: str | None = None
    item: str = ""
    recorded: str = ""
    footnote: str = ""
    argument: bool = False
    type_name: str = ""  # name of the type, in usage messages and help

    def flag(self, name: str) -> str:
        """The flag of the setting, as used in messages and commands."""
        return self.flags[0].partition("/")[0] if self.flags else f"--{name.replace('_', '-')}"


REQUIRED: Any = dataclasses.MISSING


def setting(help: str, read: Callable[[Any], Any], default: Any = None, **properties: Any) -> Any:
    """A dataclass field for a setting; `properties` are further fields of `Setting`. default: REQUIRED if it has none."""
    metadata = {"setting": Setting(help=help, read=read, **properties)}
    if default is REQUIRED:
        # A positional argument of the command line is positional in a Python call, too.
        return dataclasses.field(metadata=metadata, kw_only=not properties.get("argument", False))
    if isinstance(default, dict):  # always {}; dataclasses refuse a mutable default
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(options: type | Options) -> dict[str, Setting]:
    """The settings of an options class by name, in the order of the help."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(options)}  # type: ignore[arg-type]


class Options:
    """Base of the options classes. Values are parsed and checked at construction; `UserError` names the setting."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name, info = field.name, field.metadata["setting"]
            value = getattr(self, name)
            if value is None and field.default is None:  # not given
                continue
            try:
                if value is None:  # None was given, and the setting has another default
                    raise TypeError
                parsed = info.read(value)
            except ValueError as error:
                raise UserError(f"{info.flag(name)}: {error}") from None
            except (TypeError, OverflowError):  # of a type that the reader does not know, or infinite
                raise UserError(f"{info.flag(name)}: {shown(value)} is not a value of this setting") from None
            words = parsed if isinstance(parsed, tuple) else (parsed,)
            for word in words if info.choices else ():
                if word not in info.choices:
                    raise UserError(f"{info.flag(name)} {shown(word)}: choose one of {', '.join(info.choices)}")
            object.__setattr__(self, name, parsed)  # the dataclass is frozen

    def given(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by name; required settings have no default and always differ."""
        changed = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            factory = field.default_factory
            default = factory() if factory is not dataclasses.MISSING else field.default
            if (value := getattr(self, field.name)) != default:
                changed[field.name] = value
        return changed


@dataclass(frozen=True, kw_only=True)
class _Backbone(Options):
    backbone: str = setting("A name from `harness list backbones`.", read_text, REQUIRED, metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class _OptionalBackbone(Options):
    backbone: str | None = setting(
        "A name from `harness list backbones`; on the command line, --budget or --match without it gives a table of all "
        "backbones.", read_text,
        metavar="NAME",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Options):
    """Settings of a run: the experiment, the training steps, and how this machine trains it."""

    protocol: str | None = setting(
        "The protocol: data set, evaluation, default recipe and sampling.", read_text, metavar="NAME|FILE.toml",
        default_text=f"{DEFAULT_PROTOCOL}; the paper's: imagenet-256",
    )  # fmt: skip
    steps: int | None = setting(
        "Training steps, as in 800 or 400k.", read_count, default_text="the protocol's", type_name="count",
        recorded="training.steps", footnote="training steps",
    )  # fmt: skip
    match: Reference | None = setting(
        "Instead of --steps: train for the compute of BACKBONE with STEPS steps of the same recipe, both counted at the "
        "protocol's input, as in dit-xl-2@400k.", parse_reference, metavar="BACKBONE@STEPS", type_name="reference",
    )  # fmt: skip
    budget: float | None = setting(
        "Instead of --steps: train for this compute (Gflops of the network x batch x steps x 3), as in 1e12.",
        parse_budget, metavar="GFLOPS", type_name="gflops",
    )  # fmt: skip
    seed: int = setting(
        "Seed of the training.", read_seed, 0, show_default=True, type_name="seed", recorded="training.seed",
        footnote="training seed",
    )  # fmt: skip
    data: Path | None = setting(
        "Path of the data set, if the protocol needs one.", read_path, metavar="PATH", study="data", type_name="path"
    )
    framework: str = setting(
        "Framework of the network and the training.", read_text, "torch", choices=FRAMEWORKS, show_default=True, study="framework",
        recorded="framework", footnote="framework",
    )  # fmt: skip
    set: dict[str, Any] = setting(
        "Override an item of the training recipe, as in --set learning_rate=3e-4 (repeatable; see `harness plan`).",
        read_pairs("NAME=VALUE", "learning_rate=1e-3"), {}, metavar="NAME=VALUE", repeat=True, type_name="name=value",
    )  # fmt: skip
    precision: str = setting(
        "Arithmetic of the network in training. auto: float32 or bfloat16, measured when the run is created; the faster one "
        "is used. tf32: NVIDIA GPUs.", read_text, "auto", choices=("auto", *PRECISIONS), show_default=True,
        study="precision", frozen_unless="auto", recorded="training.precision", footnote="training precision",
    )  # fmt: skip
    compile: str | None = setting(
        "torch.compile, for training and sampling. auto: compile if a measurement shows that a run of an hour or more ends "
        "sooner, including the compilation.", read_text, choices=("auto", "on", "off"), study="compile", frozen_unless="auto",
        default_text="off, or as the run was created",
    )  # fmt: skip
    micro_batch: int | None = setting(
        "Batch size of one forward pass in training.", read_count, default_text="as large as fits in free memory", type_name="count",
        study="micro_batch", frozen_unless="", recorded="training.micro_batch", footnote="micro-batch",
    )  # fmt: skip
    device: str | None = setting(
        "cpu, cuda, cuda:1, tpu.", read_text, metavar="NAME", default_text="an accelerator if there is one", study="device",
        frozen_unless="",
    )  # fmt: skip
    mesh: str | None = setting(
        "Device mesh DATAxMODEL: batch is sharded over DATA, weights over MODEL (FSDP). In torch the devices are processes "
        "started by torchrun.", read_text, metavar="DATAxMODEL", default_text="all x 1", study="mesh",
    )  # fmt: skip
    gradient_checkpointing: bool = setting(
        "Activation checkpointing: less memory, more compute.", read_switch, False, study="gradient_checkpointing",
        frozen_unless="",
    )  # fmt: skip
    out: Path | None = setting(
        "Folder of the run.", read_path, metavar="DIR", default_text="runs/NAME", type_name="path"
    )


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Options):
    """Settings of sample sets."""

    sampling_steps: tuple[int, ...] | None = setting(
        "Sampler steps; each number gives one sample set.", read_counts, metavar="N,N,...", default_text="the protocol's",
        study="sampling.steps", type_name="counts", recorded="sampling.steps", footnote="sampling steps",
    )  # fmt: skip
    samples: int | None = setting(
        "Number of samples N of each sample set.", read_count, default_text="the protocol's", study="sampling.samples",
        type_name="count", recorded="n",
    )  # fmt: skip
    sampler: str | None = setting(
        "A name from `harness list samplers`.", read_text, metavar="NAME", default_text="the protocol's",
        study="sampling.sampler", item="sampler", recorded="sampling.sampler", footnote="sampler",
    )  # fmt: skip
    eta: float | None = setting(
        "Share of fresh noise in DDIM, from 0 to 1.", read_fraction, study="sampling.eta", item="eta", type_name="float",
        recorded="sampling.eta", footnote="eta",
    )  # fmt: skip
    spacing: str | None = setting(
        "Spacing of the times at which the network is asked: respaced, trailing, linspace, uniform, karras, log-snr or "
        "shift:C.", read_text, metavar="NAME", default_text="the schedule's", study="sampling.spacing", item="spacing",
        recorded="sampling.spacing", footnote="spacing",
    )  # fmt: skip
    ema_width: float | None = setting(
        "Width (sigma_rel) of the average of the weights, reconstructed after a training with --set ema_widths=0.05:0.10; "
        "0: the EMA with one decay.", read_number, metavar="WIDTH", default_text="0", study="sampling.ema_width",
        item="ema_width", type_name="float", recorded="sampling.ema_width", footnote="EMA width",
    )  # fmt: skip
    cfg: Guidance | None = setting(
        "Scale of classifier-free guidance; 1 = no guidance. 1.5@0.1-0.8 guides only where the noise level sigma = s / a lies "
        "in the interval; 1.5@0.3- has no upper end.", read_guidance, metavar="SCALE[@LOW-HIGH]",
        study="sampling.guidance_scales", item="guidance", recorded="sampling.guidance", footnote="guidance",
    )  # fmt: skip
    guidance_channels: str | None = setting(
        "Which channels are guided.", read_text, metavar="first-3|all", study="sampling.guidance_channels", item="guidance_channels",
        recorded="sampling.guidance_channels",
    )  # fmt: skip
    labels: str | None = setting(
        "Label policy: how the labels of samples are chosen.", read_text, metavar="random|balanced",
        study="sampling.label_policy", item="label_policy", recorded="sampling.label_policy", footnote="label policy",
    )  # fmt: skip
    sampling_seed: int | None = setting(
        "Seed of the samples.", read_seed, default_text="0", study="sampling.seed", item="seed", type_name="seed",
        recorded="sampling.seed", footnote="sampling seed",
    )  # fmt: skip
    sampling_precision: str = setting(
        "Arithmetic of the network in sampling.", read_text, "float32", choices=PRECISIONS, show_default=True,
        study="sampling.precision", recorded="sampling.precision", footnote="sampling precision",
    )  # fmt: skip
    match_sampling: Reference | None = setting(
        "Instead of --sampling-steps: for each N, the steps that cost as much per image as N steps of BACKBONE; a step with "
        "guidance counts twice, as in dit-xl-2@250@cfg1.5.", parse_sampling_reference, metavar="BACKBONE@N,N,...[@cfgSCALE[@LOW-HIGH]]",
        type_name="reference",
    )  # fmt: skip

    def overrides(self) -> dict[str, Any]:
        """Item of a protocol's [sampling], except steps -> value of the setting that overrides it; None: not given."""
        items = {info.item: getattr(self, name) for name, info in settings_of(self).items() if info.item}
        guidance: Guidance | None = items.pop("guidance")
        scale, interval = (None, None) if guidance is None else (guidance.scale, guidance.interval)
        return {**items, "guidance_scale": scale, "guidance_interval": interval}


_LOGGER = {"choices": LOGGERS, "repeat": True, "study": "logger"}
_LOGGER_HELP = (
    "Also write the losses for this viewer, in the folder of the run (repeatable; needs the extra of the same name)."
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainingSettings, _Backbone):
    """Options of `harness train`."""

    logger: tuple[str, ...] = setting(_LOGGER_HELP, read_texts, (), **_LOGGER)
    fork: Path | None = setting(
        "Create the run from the newest checkpoint of this other run.", read_path, metavar="RUN", type_name="path"
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(SamplingSettings, TrainOptions):
    """Options of `harness run`."""

    decoder: str | None = setting(
        "Autoencoder that decodes the samples of a run in latents: a folder, or ft-ema, ft-mse.", read_text, metavar="DIR|NAME",
        default_text="the one that made the latents", study="decoder", recorded="sampling.decoder", footnote="decoder",
    )  # fmt: skip
    reference: Path | None = setting(
        "Reference images, as in `harness evaluate`.", read_path, metavar="PATH", default_text="the data set",
        study="reference", type_name="path",
    )  # fmt: skip
    features_weights: Path | None = setting(
        "Weights of the suite's network, if it needs them.", read_path, metavar="FILE", study="features_weights",
        flags=("--features-weights", "--inception"), type_name="path",
    )  # fmt: skip
    evaluate_at: tuple[int, ...] | None = setting(
        "Also sample and evaluate after these training steps.", read_counts, metavar="N,N,...", type_name="counts"
    )
    sampling_batch: int | None = setting(
        "Batch size of one forward pass in sampling.", read_count, default_text="by device and compute",
        study="sampling.batch", type_name="count", recorded="sampling.batch", footnote="sampling batch",
    )  # fmt: skip
    report: bool = setting(
        "Write the report at the end.", read_switch, True, flags=("--report/--no-report",), default_text="yes"
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(SamplingSettings, TrainingSettings, _OptionalBackbone):
    """Options of `harness plan`."""


@dataclass(frozen=True, kw_only=True)
class _SampleSource(Options):
    run: Path | None = setting("Folder of a trained run.", read_path, metavar="DIR", type_name="path")
    step: int | None = setting(
        "The training step whose checkpoint is sampled.", read_count, default_text="the last one", type_name="count"
    )
    system: str | None = setting(
        "Instead of --run: a name from `harness list systems`.", read_text, metavar="NAME|FILE.toml"
    )
    weights: dict[str, Path] = setting(
        "Weights of a part of the system (base, classifier, upsampler, upsampler-2, decoder): a checkpoint or a run "
        "(repeatable).", read_pairs("PART=PATH", "base=FILE"), {}, metavar="PART=PATH", repeat=True, type_name="part=path",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SampleOptions(SamplingSettings, _SampleSource):
    """Options of `harness sample`, for a trained run or for a system with its weights."""

    decoder: str | None = setting(
        "Autoencoder that decodes the samples of a run in latents: a folder, or ft-ema, ft-mse.", read_text, metavar="DIR|NAME",
        default_text="the one that made the latents",
    )  # fmt: skip
    batch: int | None = setting("Batch size of one forward pass.", read_count, type_name="count")
    compile: str | None = setting(
        "torch.compile, recorded with the samples.", read_text, choices=("on", "off"),
        default_text="as the run was created; off for a system",
    )  # fmt: skip
    framework: str | None = setting("Framework of a system.", read_text, choices=FRAMEWORKS, default_text="torch")
    device: str | None = setting(
        "Device for a system: cpu, cuda.", read_text, metavar="NAME", default_text="an accelerator if there is one"
    )
    out: Path | None = setting(
        "Folder of a system's sample sets.", read_path, metavar="DIR", default_text="runs/systems", type_name="path"
    )
    classes: tuple[str, ...] | None = setting(
        "Instead of a sample set: a picture of each of these classes, to look at. Classes are numbers, or names that the data "
        "set has for them.", read_names, metavar="CLASS,CLASS,...", type_name="names",
    )  # fmt: skip
    grid: GridSize | None = setting(
        "Rows and columns of a picture; its images are the samples 0, 1, 2, ... of the sampling seed.", read_grid,
        metavar="ROWSxCOLUMNS", default_text="4x8", type_name="grid",
    )  # fmt: skip
    trajectory: bool = setting(
        "Also a picture of the images that the first samples were predicted to be during sampling.", read_switch, False
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """Options of `harness evaluate`."""

    samples: Path = setting(
        "An .npz in the layout of ADM's evaluator, a folder with samples.npz, an .npy, a folder of PNG files, shards (.npz, "
        ".tar), or a pattern of these.", read_path, REQUIRED, argument=True, type_name="path",
    )  # fmt: skip
    protocol: str | None = setting(
        "The protocol of the samples.", read_text, metavar="NAME|FILE.toml",
        default_text="that of the run or sidecar, else " + DEFAULT_PROTOCOL,
    )  # fmt: skip
    data: Path | None = setting(
        "Path of the protocol's data set, if it needs one.", read_path, metavar="PATH", type_name="path"
    )
    suite: str | None = setting(
        "A name from `harness list suites`, or features with metrics, as in dinov2-vit-b-14:fd,kid (see `harness list "
        "features` and `harness list metrics`).", read_text, metavar="NAME|FEATURES:METRIC,..", default_text="the protocol's",
    )  # fmt: skip
    reference: Path | None = setting(
        "Reference images; mu and sigma are used if the file has them and the suite allows it.", read_path, metavar="PATH",
        type_name="path",
    )  # fmt: skip
    features_weights: Path | None = setting(
        "Weights of the suite's network; for suite adm: classify_image_graph_def.pb, or its torch port.", read_path,
        metavar="FILE", flags=("--features-weights", "--inception"), type_name="path",
    )  # fmt: skip
    backend: str = setting(
        "Framework of ADM's Inception network.", read_text, "torch", choices=EVALUATOR_BACKENDS, show_default=True
    )
    device: str = setting(
        "cpu, cuda, cuda:1; with --backend jax also tpu.", read_text, "cpu", metavar="NAME", show_default=True
    )
    name: str | None = setting("Row name for samples without a sidecar.", read_text, metavar="TEXT")
    out: Path | None = setting(
        "Record file.", read_path, metavar="FILE", default_text="the run's, or records.jsonl next to the samples",
        type_name="path",
    )  # fmt: skip
    neighbours: Path | None = setting(
        "Write a picture of the samples nearest to training images.", read_path, metavar="FILE.png", type_name="path"
    )
    allow: tuple[str, ...] = setting(
        "Only warn if this guard fails (repeatable).", read_texts, (), metavar="GUARD", repeat=True
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Options of `harness report`."""

    results: tuple[Path, ...] = setting(
        "Runs, folders of runs, or record files (repeatable).", read_paths, (), metavar="DIR", repeat=True,
        default_text="runs/", type_name="path",
    )  # fmt: skip
    out: Path | None = setting(
        "Folder of the report.", read_path, metavar="DIR", default_text="runs/report/", type_name="path"
    )
    protocol: str | None = setting(
        "Only the table, the verdicts and the figures of this protocol, beside Tables 1-6.", read_text, metavar="NAME",
        default_text="every protocol",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """Options of `harness compare`."""

    a: Path = setting(
        "A run, a folder of runs, or a record file.", read_path, REQUIRED, argument=True, type_name="path"
    )
    b: Path = setting("The other side.", read_path, REQUIRED, argument=True, type_name="path")
    step: int | None = setting(
        "Training steps of the records to compare, if a side has several.", read_count, type_name="count"
    )


P = ParamSpec("P")
Chosen = TypeVar("Chosen", bound=Options)
Result = TypeVar("Result")


def keyword_options(options: Callable[P, Chosen]) -> Callable[[Callable[[Chosen], Result]], Callable[P, Result]]:
    """Decorator: turns a function of one options object into a function that takes its fields as keyword arguments.

    The docstring gets one line for each setting.
    """

    def decorate(function: Callable[[Chosen], Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            return function(options(*args, **kwargs))

        assert isinstance(options, type)  # declared as a Callable, so that P takes its parameters
        parameters = inspect.signature(options).parameters.values()
        returns = inspect.signature(function).return_annotation
        call.__signature__ = inspect.Signature(list(parameters), return_annotation=returns)  # type: ignore[attr-defined]
        lines = [f"    {name}: {_help_text(info)}" for name, info in settings_of(options).items()]
        title = "Keyword arguments (--a-b is a_b; a repeatable flag takes a list, NAME=VALUE a dict):"
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{title}\n" + "\n".join(lines) + "\n"
        return call

    return decorate


def _help_text(info: Setting) -> str:
    """The help, the accepted values and the `default_text` of a setting; the signature shows the other defaults."""
    choices = f" One of {', '.join(info.choices)}." if info.choices else ""
    default = f" Default: {info.default_text}." if info.default_text else ""
    return f"{info.help}{choices}{default}"


def command_words(command: str, options: Options, always: Collection[str] = ()) -> tuple[str, ...]:
    """The command line of `options`: the settings that differ from their defaults, in the order of the table.

    Positional arguments come last. always: names of settings that are stated at their defaults too.
    """
    arguments: list[str] = []
    words = ["harness", command]
    changed = options.given()
    for name, info in settings_of(options).items():
        if name not in changed and name not in always:
            continue
        value = getattr(options, name)
        if info.argument:
            arguments.append(str(value))
        else:
            words += flag_words(name, info, value)
    return (*words, *arguments)


def flag_words(name: str, info: Setting, value: Any) -> list[str]:
    """The flag of one setting and its value, as words of a command line."""
    flag = info.flag(name)
    if isinstance(value, bool):
        # [--x, --no-x], or [--x] for a switch that is off without a flag
        on_off = info.flags[0].split("/") if info.flags and "/" in info.flags[0] else [flag]
        return on_off[:1] if value else on_off[1:]
    if isinstance(value, Mapping):
        return [word for item, each in value.items() for word in (flag, f"{item}={value_text(each)}")]
    if info.repeat:
        return [word for each in value for word in (flag, value_text(each))]
    return [flag, ",".join(map(str, value)) if isinstance(value, tuple) else value_text(value)]


def value_text(value: object) -> str:
    """The value as text that a flag or --set parses back to the same value."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(float(value)) if isinstance(value, float) else str(value)  # numpy's floats have another repr


def command_line(words: Iterable[str]) -> str:
    """The words as one line for a shell."""
    return shlex.join(words)


def frozen_settings(options: Options) -> dict[str, Any]:
    """The values of the settings that are frozen when a run is created, by name; None: not given."""
    values: dict[str, Any] = {}
    for name, info in settings_of(options).items():
        if info.frozen_unless is not None:
            value = getattr(options, name)
            # "Not given" is None, a switch that is off (False), or the setting's own text for it, such as "auto".
            values[name] = None if value in (None, False, info.frozen_unless) else value
    return values


def study_settings(options: type[Options], section: str) -> dict[str, str]:
    """Study-file key -> name of the setting, for one section of a study file ("" for the top level)."""
    names = {}
    for name, info in settings_of(options).items():
        key_section, _, key = info.study.rpartition(".")
        if key and key_section == section:
            names[key] = name
    return names


def only_one(flags: Mapping[str, Any], what: str) -> None:
    """Raise `UserError` if more than one of the flags (name: value), which all set `what`, is given."""
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} {'both' if len(given) == 2 else 'all'} set {what}; give one of them")


def recorded_settings(options: type[Options], record: object) -> dict[str, Any]:
    """The values of the settings that a record states, by name; settings that it does not state are left out."""
    values = {name: recorded_value(info, record) for name, info in settings_of(options).items()}
    return {name: value for name, value in values.items() if value is not None}


def recorded_value(info: Setting, record: object) -> Any:
    """The value of one setting in a record; None if the record does not state it, or if no record states the setting."""
    if not info.recorded:
        return None
    value = record
    for part in info.recorded.split("."):  # "sampling.eta": record.sampling.eta, where record.sampling may be None
        value = None if value is None else getattr(value, part)
    return value
