"""Options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from harness.errors import UserError
from harness.loggers import LOGGERS
from harness.planning.matching import parse_budget, parse_reference, parse_sampling_reference
from harness.protocols import count

DEFAULT_PROTOCOL = "digits"


class Count(click.ParamType):
    """A count such as 250, 400k or 7M."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = value if isinstance(value, int) else count(value)
        except (ValueError, IndexError):
            self.fail(f"{value!r} is not a count such as 250, 400k or 7M", param, ctx)
        if number < 1:
            self.fail("must be at least 1", param, ctx)
        return number


class Counts(click.ParamType):
    """Counts separated by commas: 16,32,64 or 50k,100k."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(sorted({Count().convert(part.strip(), param, ctx) for part in value.split(",")}))


class Setting(click.ParamType):
    """NAME=VALUE, or another pair of the form `form`, as in `example`."""

    def __init__(self, form: str = "NAME=VALUE", example: str = "learning_rate=1e-3"):
        self.name, self.form, self.example = form.lower(), form, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, text = value.partition("=")
        if not equals or not name or not text:
            self.fail(f"{value!r} is not of the form {self.form}, as in {self.example}", param, ctx)
        return name, text


class Parsed(click.ParamType):
    """What a function of the harness makes of the text; its ValueError says what is wrong."""

    def __init__(self, name: str, parse: Callable[[str], Any]):
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


FOLDER = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
protocol_option = click.option(
    "--protocol", metavar="NAME|FILE.toml", help=f"The task. [default: {DEFAULT_PROTOCOL}; the paper's: imagenet-256]"
)

_run_options = (
    protocol_option,
    click.option("--steps", type=Count(), help="Training steps, as in 800 or 400k. [default: the protocol's]"),
    click.option(
        "--match", type=Parsed("reference", parse_reference), metavar="BACKBONE@STEPS",
        help="Instead of --steps: train for the compute of that backbone with that many steps of the same recipe, "
        "both counted at the protocol's input, as in dit-xl-2@400k.",
    ),
    click.option(
        "--budget", type=Parsed("gflops", parse_budget), metavar="GFLOPS",
        help="Instead of --steps: train for so many Gflops (Gflops of the network x batch x steps x 3), as in 1e12.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True),
    click.option("--data", type=FOLDER, metavar="PATH", help="Where the data set is, if the protocol needs one."),
    click.option("--framework", type=click.Choice(["torch", "jax"]), default="torch", show_default=True),
    click.option(
        "--set", "settings", type=Setting(), multiple=True, metavar="NAME=VALUE",
        help="Override an item of the training recipe, as in --set learning_rate=3e-4 (repeatable; see `harness plan`).",
    ),
    click.option(
        "--precision", type=click.Choice(["auto", "float32", "tf32", "bfloat16"]), default="auto", show_default=True,
        help="auto measures once whether float32 or bfloat16 is faster, when the run is created. tf32: of NVIDIA's GPUs.",
    ),
    click.option(
        "--compile", type=click.Choice(["auto", "on", "off"]),
        help="torch.compile, for sampling too. auto takes it where it measures that a run of an hour or more is done "
        "sooner, compiling included. [default: off, or as the run was created]",
    ),
    click.option("--micro-batch", type=Count(), help="Images a forward pass. [default: what fits free memory]"),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, tpu. [default: an accelerator if there is one]"),
    click.option(
        "--mesh", metavar="DATAxMODEL",
        help="Devices along which the batch alone, and along which weights too are divided; in torch processes, which "
        "torchrun starts. [default: all x 1]",
    ),
    click.option("--gradient-checkpointing", is_flag=True, help="Less memory for one more forward pass."),
    click.option("--out", type=FOLDER, metavar="DIR", help="Folder of the run. [default: runs/NAME]"),
)  # fmt: skip

_sampling_options = (
    click.option("--sampling-steps", type=Counts(), metavar="N,N,...", help="One sample set each. [protocol's]"),
    click.option("--samples", type=Count(), help="Number of samples N. [default: the protocol's]"),
    click.option("--sampler", metavar="NAME", help="A name of `harness list samplers`. [default: the protocol's]"),
    click.option("--eta", type=click.FloatRange(0, 1), help="DDIM's share of fresh noise."),
    click.option("--cfg", "guidance_scale", type=float, metavar="SCALE", help="Classifier-free guidance; 1 = none."),
    click.option("--guidance-channels", metavar="first-3|all", help="Which channels are guided."),
    click.option("--labels", "label_policy", metavar="random|balanced", help="How labels of samples are drawn."),
    click.option("--sampling-seed", type=click.IntRange(0, 2**63 - 1), help="Seed of the samples. [default: 0]"),
    click.option(
        "--sampling-precision", type=click.Choice(["float32", "tf32", "bfloat16"]), default="float32", show_default=True,
        help="Arithmetic of the network while sampling.",
    ),
)  # fmt: skip


decoder_option = click.option(
    "--decoder", metavar="DIR|NAME",
    help="What decodes the latents of a run: a folder, or ft-ema, ft-mse. [default: the auto-encoder they were made by]",
)  # fmt: skip


match_sampling_option = click.option(
    "--match-sampling", type=Parsed("reference", parse_sampling_reference),
    metavar="BACKBONE@N,N,...[@cfgSCALE]",
    help="Instead of --sampling-steps: as many as cost what an image of that backbone does with N steps each, "
    "guidance counted twice, as in dit-xl-2@250@cfg1.5.",
)  # fmt: skip


def run_options(function):
    """The options that define a run, and who watches its training."""
    backbone = click.option("--backbone", required=True, metavar="NAME", help="A name of `harness list backbones`.")
    watched = click.option(  # torchrun takes --log, wherever it stands, for one of its own
        "--logger", "loggers", type=click.Choice(list(LOGGERS)), multiple=True,
        help="Also write the losses for this viewer, below the run's folder (repeatable; extra of the same name).",
    )  # fmt: skip
    return _apply(function, (backbone, *_run_options, watched))


def plan_options(function):
    """The options that define a run, where no backbone means a table of them all."""
    text = "A name of `harness list backbones`; without it --budget or --match gives a table of them all."
    return _apply(function, (click.option("--backbone", metavar="NAME", help=text), *_run_options))


def sampling_options(function):
    """The options that define a sample set."""
    return _apply(function, _sampling_options)


def _apply(function, options):
    for option in reversed(options):
        function = option(function)
    return function


def settings_of(pairs: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """--set pairs as a dictionary; the same name twice is refused."""
    settings = dict(pairs)
    if len(settings) != len(pairs):
        raise UserError("--set names the same item twice; give each once")
    return settings


def only_one(flags: dict[str, Any], what: str) -> None:
    """Flags (by name, with their values) that set the same thing: more than one given is refused."""
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} {'both' if len(given) == 2 else 'all'} set {what}; give one of them")
