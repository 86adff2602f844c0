"""The command that reproduces a record, or the sentence that says what is wanting for one.

Names in capitals that end in _FILE or _FOLDER stand for what the reader has to bring; a note says so.
"""

import dataclasses
import functools
import re
import shlex
from collections.abc import Mapping

from backbones.autoencoders.spec import KNOWN
from harness import registry
from harness.errors import UserError
from harness.io.files import sha256_json
from harness.protocols import Protocol, override
from harness.runs.run import recipe_identity
from results.records import Record

OUT = "runs/again"  # where the run of a command goes, if a second command has to find its samples
ORIGIN = "arXiv:2212.09748"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
    """commands: for a shell, to be given one after the other; empty where there is none. notes: whole sentences to be
    said before them. brought: the sentence on what the reader has to name in them, "" where that is nothing."""

    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    brought: str = ""


def reproduction(record: Record, recipes: Mapping[str, Mapping[str, object]] | None = None) -> Reproduction:
    """How `record` is measured again.

    recipes: recipe hash -> the recipe's items without `steps`, as a run.json has them; a recipe that is neither among
    them nor the protocol's with what the record itself names is known by its hash alone, and then there is no command.
    Never raises for what a record says.
    """
    if record.provenance == "published":
        made = _published(record)
    elif record.sampling is not None and record.sampling.settings_hash is not None and not _is_of_a_run(record):
        made = _system(record)
    elif record.training is not None and record.training.steps is not None and record.sampling is not None:
        made = _run(record, recipes or {})
    else:
        made = _samples(record)
    if not all(command.isprintable() for command in made.commands):
        return Reproduction(notes=("A name in this record holds control characters, so no command is given.",))
    brought = sorted(
        {word for command in made.commands for word in re.findall(r"\b[A-Z_0-9]+_(?:FILE|FOLDER)\b", command)}
    )
    if brought:
        is_cache = "DATA_FOLDER" in brought and record.sampling is not None and record.sampling.decoder is not None
        made_by = " (DATA_FOLDER: latents, made by `harness data latents`)" if is_cache else ""
        text = f"In place of {', '.join(brought)} name what you have{made_by}."
        made = dataclasses.replace(made, brought=text)
    return made


def _is_of_a_run(record: Record) -> bool:
    """Rather than of a system, whose records do not say how the arithmetic of each part's training was."""
    training = record.training
    return training is not None and (training.micro_batch is not None or training.precision is not None)


def _run(record: Record, recipes: Mapping[str, Mapping[str, object]]) -> Reproduction:
    """`harness run`, and `harness evaluate` after it where the protocol would not judge so."""
    training, sampling = record.training, record.sampling
    task, notes = _task(record)
    if training.recipe_hash is None or sampling.steps is None or sampling.sampler is None or record.backbone is None:
        return Reproduction(notes=("The record does not say in full how it was trained and sampled.",))
    recipe, lack = _recipe(record, task, recipes)
    if lack:
        return Reproduction(notes=(lack,))
    words = ["harness", "run", "--backbone", record.backbone, "--protocol", _protocol_word(record, task)]
    words += ["--steps", str(training.steps), "--seed", str(training.seed or 0)]
    if record.framework not in (None, "torch"):
        words += ["--framework", record.framework]
    usual = dataclasses.asdict(task.recipe) if task else {}
    for name, value in recipe.items():
        if name not in usual or value != usual[name]:
            words += ["--set", f"{name}={_setting(value)}"]
    for flag, value in (("--precision", training.precision), ("--micro-batch", training.micro_batch)):
        words += [flag, str(value)] if value is not None else []
    words += _sampling_words(record, task)
    if task is not None:
        for name in ("clip_denoised", "uint8_rule"):
            drawn, ours = getattr(sampling, name), getattr(task.sampling, name)
            if drawn is not None and drawn != ours:
                text = f"It was sampled with {name} {drawn}, which protocol {task.name} fixes to {ours}"
                return Reproduction(notes=(f"{text}: a protocol file of your own can have it.",))
    if sampling.decoder is not None:
        words += ["--decoder", _decoder_word(sampling.decoder)]
    words += _data_words(record)
    if record.backbone not in registry.backbones:
        notes.append(f"Backbone {record.backbone!r} is not installed here: it needs the plug-in that brings it.")
    if _judges_alike(record, task) and record.system == record.backbone:
        return Reproduction(commands=(shlex.join([*words, *_judge_words(record)]),), notes=tuple(notes))
    name = f"step{training.steps}-{sampling.sampler}{sampling.steps}-*/samples.npz"
    return Reproduction(
        commands=(shlex.join([*words, "--out", OUT]), _evaluate(record, f"{OUT}/samples/{_glob(name)}", named=False)),
        notes=tuple(notes),
    )


def _recipe(
    record: Record, task: Protocol | None, recipes: Mapping[str, Mapping[str, object]]
) -> tuple[dict[str, object], str]:
    """The items of the recipe but `steps`, or why they are not known."""
    training = record.training
    if training.recipe_hash in recipes:
        return dict(recipes[training.recipe_hash]), ""
    if task is not None:
        named = ("batch", "learning_rate", "ema_decay", "objective", "schedule")
        said = tuple((name, getattr(training, name)) for name in named if getattr(training, name) is not None)
        digest, found = _overridden(task, said)
        if digest == training.recipe_hash:
            return found, ""
    short = training.recipe_hash[:12]
    return {}, (
        f"The recipe is known here by its hash alone ({short}): it is not the protocol's with what the record names. The "
        "run.json of the run has it; a report of that folder gives the command."
    )


@functools.lru_cache(maxsize=1024)
def _overridden(task: Protocol, said: tuple[tuple[str, object], ...]) -> tuple[str, dict[str, object]]:
    """Hash and items of the protocol's recipe with what is said of it; "" where no recipe can have that."""
    try:
        found = recipe_identity(override(task.recipe, dict(said)))
    except UserError:
        return "", {}
    return sha256_json(found), found


def _sampling_words(record: Record, task: Protocol | None) -> list[str]:
    """Flags of the sampling; what the protocol says anyway is left out."""
    sampling, usual = record.sampling, task.sampling if task else None
    words = ["--sampling-steps", str(sampling.steps), "--samples", str(record.n)]
    guided = sampling.guidance_scale not in (None, 1.0)
    for flag, value, default in (
        ("--sampler", sampling.sampler, usual and usual.sampler),
        ("--eta", sampling.eta, usual and usual.eta),
        ("--cfg", sampling.guidance_scale, usual.guidance_scale if usual else 1.0),
        ("--guidance-channels", sampling.guidance_channels if guided else None, usual and usual.guidance_channels),
        ("--labels", sampling.label_policy, usual and usual.label_policy),
        ("--sampling-seed", sampling.seed, usual.seed if usual else 0),
        ("--sampling-precision", sampling.precision, "float32"),
        ("--sampling-batch", sampling.batch, None),
    ):
        if value is not None and value != default:
            words += [flag, _setting(value)]
    return words


def _system(record: Record) -> Reproduction:
    """`harness sample --system` and `harness evaluate`."""
    commands, notes = _system_commands(record)
    if not commands:
        text = f"System {record.system!r} is not one of `harness list systems`: it needs the TOML file that names it."
        return Reproduction(notes=(text,))
    digest = record.training.checkpoint_sha256 if record.training else None
    if digest:
        notes += (f"Of the same weights: the hash of all of them is {digest[:12]}.",)
    return Reproduction(commands=commands, notes=notes)


def _system_commands(record: Record) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Commands for the registered system of the record's name, and the reason where it cannot be run."""
    if record.system not in registry.systems:
        return (), ()
    system, sampling = registry.systems.get(record.system), record.sampling
    if system.unavailable:
        return (), (f"{record.system} cannot be run here: {system.unavailable}.",)
    words = ["harness", "sample", "--system", record.system]
    for part in system.parts:
        words += ["--weights", f"{part}={part.replace('-', '_').upper()}_FILE"]
    if system.decoder:
        words += ["--weights", "decoder=DECODER_FILE"]
    words += ["--samples", str(record.n)]
    if sampling is not None and sampling.steps not in (None, system.base.steps):
        words += ["--sampling-steps", str(sampling.steps)]
    if sampling is not None and record.provenance == "measured":
        for flag, value, usual in (
            ("--sampling-seed", sampling.seed, 0),
            ("--sampling-precision", sampling.precision, "float32"),
            ("--batch", sampling.batch, None),
            ("--framework", record.framework, "torch"),
        ):
            words += [flag, str(value)] if value not in (None, usual) else []
    folder = f"runs/systems/{_glob(f'{record.system}-n{record.n}-*/samples.npz')}"
    return (shlex.join(words), _evaluate(record, folder, named=False)), ()


def _samples(record: Record) -> Reproduction:
    """`harness evaluate` of samples from elsewhere."""
    digest = record.sampling.samples_sha256 if record.sampling else None
    which = f"the samples with sha256 {digest[:12]}" if digest else "the samples, whose hash the record does not name"
    note = f"The record does not say how its samples were made. SAMPLES_FILE: {which}."
    if record.evaluation is None:
        return Reproduction(notes=("The record says neither how its samples were made nor who judged them.",))
    return Reproduction(commands=(_evaluate(record, "SAMPLES_FILE", named=True),), notes=(note,))


def _published(record: Record) -> Reproduction:
    """Where it is printed, and what would measure the same thing."""
    source = record.source
    printed = f"Printed in {ORIGIN}, {source.table}, row {source.row!r}, column {source.column!r}."
    commands, notes = _system_commands(record)
    training, sampling = record.training, record.sampling
    trainable = training is not None and training.steps is not None and record.backbone in registry.backbones
    if not commands and not notes and trainable:
        task, _ = _task(record)
        if _judges_alike(record, task):
            words = ["harness", "run", "--backbone", record.backbone, "--protocol", task.name]
            words += ["--steps", str(training.steps)]
            for name in ("batch", "learning_rate", "ema_decay"):
                value = getattr(training, name)
                if value not in (None, getattr(task.recipe, name)):
                    words += ["--set", f"{name}={_setting(value)}"]
            drawn = sampling is not None and sampling.steps is not None
            words += _sampling_words(record, task) if drawn else ["--samples", str(record.n)]
            decoder = ["--decoder", _decoder_word(sampling.decoder)] if drawn and sampling.decoder else []
            commands = (shlex.join([*words, *decoder, *_data_words(record), *_judge_words(record)]),)
    if commands:
        notes = ("The same would be measured by:",)
    return Reproduction(commands=commands, notes=(printed, *notes))


def _evaluate(record: Record, samples: str, *, named: bool) -> str:
    """`harness evaluate`; `samples` is shell text, already quoted where it needs to be."""
    words = []
    if named:
        task, _ = _task(record)
        words += ["--protocol", _protocol_word(record, task), *_data_words(record)]
    words += ["--suite", _suite_word(record), *_judge_words(record)]
    if named or record.system not in (record.backbone, None) and record.system not in registry.systems:
        words += ["--name", record.system]
    return f"harness evaluate {samples} {shlex.join(words)}"


def _judges_alike(record: Record, task: Protocol | None) -> bool:
    """Whether `harness run` itself measures what the record says."""
    return task is not None and record.evaluation is not None and record.evaluation.suite == task.suite


def _judge_words(record: Record) -> list[str]:
    """The files that the suite needs."""
    reference = _reference(record)
    return [*_weights_words(record), *(["--reference", reference] if reference else [])]


def _suite_word(record: Record) -> str:
    suite = record.evaluation.suite if record.evaluation else ""
    if suite not in registry.suites and suite in registry.features:
        return f"{suite}:{record.metric}"  # a suite put together on the command line is named after its features
    return suite


def _weights_words(record: Record) -> list[str]:
    """The file of a feature network that does not come with the harness."""
    suite = record.evaluation.suite if record.evaluation else None
    features = registry.suites.get(suite).features if suite in registry.suites else None
    if features is None and suite in registry.features:
        features = registry.features.get(suite)
    if features is None or not features.weights_option:
        return []
    inception = features.weights_option == "--inception"
    return [features.weights_option, "classify_image_graph_def.pb" if inception else "WEIGHTS_FILE"]


def _reference(record: Record) -> str:
    """The file that ADM's evaluator judges ImageNet by, whose name `harness data fetch` knows."""
    from harness.data.public_files import FILES

    known = FILES.get(f"{record.dataset}-{record.resolution}")
    return known.file if known is not None and _weights_words(record) else ""


def _decoder_word(name: str) -> str:
    """What --decoder takes for the decoder that records call so."""
    short = next((short for short, known in KNOWN.items() if known.record_name == name), None)
    return short or "DECODER_FOLDER"


def _data_words(record: Record) -> list[str]:
    needs = record.dataset in registry.datasets and registry.datasets.get(record.dataset).needs_folder
    return ["--data", "DATA_FOLDER"] if needs else []


def _task(record: Record) -> tuple[Protocol | None, list[str]]:
    """The protocol, None where it is not built in, and what is to be said of it."""
    if record.protocol not in registry.protocols:
        return None, [f"Protocol {record.protocol!r} is not built in."]
    task, version = registry.protocols.get(record.protocol), record.protocol_version
    if version not in (None, str(task.version)):
        return task, [f"Measured under version {version} of protocol {task.name}; here is version {task.version}."]
    return task, []


def _protocol_word(record: Record, task: Protocol | None) -> str:
    return record.protocol if task is not None else "PROTOCOL_FILE.toml"


def _setting(value: object) -> str:
    """Text that --set and the flags read back as the same value."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def _glob(pattern: str) -> str:
    """Quoted for a shell, but for the star."""
    return re.sub(r"[^*]+", lambda match: shlex.quote(match.group()), pattern)
