"""The commands that reproduce a record, or a sentence that says what is missing for them.

Names in capitals that end in _FILE or _FOLDER stand for files that the reader has to supply; a note says so.
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
from results.records import Record, Sampling, Training

OUT = "runs/again"  # the folder of the run, if a second command has to find its samples
ORIGIN = "arXiv:2212.09748"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Shell commands that measure a record again.

    commands: in their order; empty if there are none. notes: sentences to be shown before them. brought: a sentence on
    the files that the reader has to name in them, "" if there are none.
    """

    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    brought: str = ""


def reproduction(record: Record, recipes: Mapping[str, Mapping[str, object]] | None = None) -> Reproduction:
    """The commands that measure `record` again.

    recipes: recipe hash -> the recipe's items without `steps`, as in a run.json. A recipe that is neither among them nor
    the protocol's with the settings that the record states is known by its hash alone; then there is no command.
    Never raises, whatever the record states.
    """
    if record.provenance == "published":
        made = _published(record)
    elif record.sampling is not None and record.sampling.settings_hash is not None and not _is_of_a_run(record):
        made = _system(record)
    elif record.training is not None and record.training.steps is not None and record.sampling is not None:
        made = _run(record, record.training, record.sampling, recipes or {})
    else:
        made = _samples(record)
    if not all(command.isprintable() for command in made.commands):
        return Reproduction(notes=("A name in this record has control characters, so no command is given.",))
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
    """Whether it is of a run, not of a system: records of systems do not state the precision of training."""
    training = record.training
    return training is not None and (training.micro_batch is not None or training.precision is not None)


def _run(
    record: Record, training: Training, sampling: Sampling, recipes: Mapping[str, Mapping[str, object]]
) -> Reproduction:
    """`harness run`, followed by `harness evaluate` if the record's suite is not the protocol's."""
    protocol, notes = _protocol(record)
    if training.recipe_hash is None or sampling.steps is None or sampling.sampler is None or record.backbone is None:
        return Reproduction(notes=("The record does not state all of its training and sampling.",))
    recipe, missing = _recipe(training, training.recipe_hash, protocol, recipes)
    if missing:
        return Reproduction(notes=(missing,))
    words = ["harness", "run", "--backbone", record.backbone, "--protocol", _protocol_word(record, protocol)]
    words += ["--steps", str(training.steps), "--seed", str(training.seed or 0)]
    if record.framework is not None and record.framework != "torch":
        words += ["--framework", record.framework]
    usual = dataclasses.asdict(protocol.recipe) if protocol else {}
    for name, value in recipe.items():
        if name not in usual or value != usual[name]:
            words += ["--set", f"{name}={_setting(value)}"]
    for flag, value in (("--precision", training.precision), ("--micro-batch", training.micro_batch)):
        words += [flag, str(value)] if value is not None else []
    words += _sampling_words(record, sampling, protocol)
    if protocol is not None:
        for name in ("clip_denoised", "uint8_rule"):
            stated, fixed = getattr(sampling, name), getattr(protocol.sampling, name)
            if stated is not None and stated != fixed:
                text = f"It was sampled with {name} {stated}, but protocol {protocol.name} fixes {name} to {fixed}"
                return Reproduction(notes=(f"{text}; a protocol file of your own can set it.",))
    if sampling.decoder is not None:
        words += ["--decoder", _decoder_word(sampling.decoder)]
    words += _data_words(record)
    if record.backbone not in registry.backbones:
        notes.append(f"Backbone {record.backbone!r} is not installed: install the plug-in that provides it.")
    if _is_suite_of(protocol, record) and record.system == record.backbone:
        return Reproduction(commands=(shlex.join([*words, *_evaluator_words(record)]),), notes=tuple(notes))
    name = f"step{training.steps}-{sampling.sampler}{sampling.steps}-*/samples.npz"
    return Reproduction(
        commands=(shlex.join([*words, "--out", OUT]), _evaluate(record, f"{OUT}/samples/{_glob(name)}", named=False)),
        notes=tuple(notes),
    )


def _recipe(
    training: Training, recipe_hash: str, protocol: Protocol | None, recipes: Mapping[str, Mapping[str, object]]
) -> tuple[dict[str, object], str]:
    """The items of the recipe without `steps`, or a sentence on why they are not known."""
    if recipe_hash in recipes:
        return dict(recipes[recipe_hash]), ""
    if protocol is not None:
        named = ("batch", "learning_rate", "ema_decay", "objective", "schedule")
        stated = tuple((name, getattr(training, name)) for name in named if getattr(training, name) is not None)
        digest, found = _overridden(protocol, stated)
        if digest == recipe_hash:
            return found, ""
    return {}, (
        f"Only the hash of the recipe is known ({recipe_hash[:12]}): it is not the protocol's recipe with the settings that "
        "the record states. The run.json of the run has the recipe; a report of that folder gives the command."
    )


@functools.lru_cache(maxsize=1024)
def _overridden(protocol: Protocol, stated: tuple[tuple[str, object], ...]) -> tuple[str, dict[str, object]]:
    """Hash and items of the protocol's recipe with these items; ("", {}) if no recipe can have them."""
    try:
        found = recipe_identity(override(protocol.recipe, dict(stated)))
    except UserError:
        return "", {}
    return sha256_json(found), found


def _sampling_words(record: Record, sampling: Sampling, protocol: Protocol | None) -> list[str]:
    """Flags of the sampling that differ from the protocol's settings."""
    usual = protocol.sampling if protocol else None
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
        text = f"System {record.system!r} is not in `harness list systems`: its TOML file is needed."
        return Reproduction(notes=(text,))
    digest = record.training.checkpoint_sha256 if record.training else None
    if digest:
        notes += (f"The weights must be the same: their common hash is {digest[:12]}.",)
    return Reproduction(commands=commands, notes=notes)


def _system_commands(record: Record) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Commands for the registered system of the record's name, and the reason if it cannot be run."""
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
    """`harness evaluate` of samples that the harness did not make."""
    digest = record.sampling.samples_sha256 if record.sampling else None
    which = f"the samples with sha256 {digest[:12]}" if digest else "the samples, whose hash the record does not state"
    note = f"The record does not state how its samples were made. SAMPLES_FILE: {which}."
    if record.evaluation is None:
        return Reproduction(
            notes=("The record states neither how its samples were made nor which suite measured them.",)
        )
    return Reproduction(commands=(_evaluate(record, "SAMPLES_FILE", named=True),), notes=(note,))


def _published(record: Record) -> Reproduction:
    """Where the number is printed, and the commands that would measure it."""
    column = record.source.column if record.source else ""
    printed = f"Printed in {ORIGIN}, {record.table}, row {record.row!r}, column {column!r}."
    commands, notes = _system_commands(record)
    training, sampling = record.training, record.sampling
    is_trainable = training is not None and training.steps is not None and record.backbone in registry.backbones
    if not commands and not notes and is_trainable and training is not None and record.backbone is not None:
        protocol, _ = _protocol(record)
        if protocol is not None and _is_suite_of(protocol, record):
            words = ["harness", "run", "--backbone", record.backbone, "--protocol", protocol.name]
            words += ["--steps", str(training.steps)]
            for name in ("batch", "learning_rate", "ema_decay"):
                value = getattr(training, name)
                if value not in (None, getattr(protocol.recipe, name)):
                    words += ["--set", f"{name}={_setting(value)}"]
            if sampling is not None and sampling.steps is not None:
                words += _sampling_words(record, sampling, protocol)
                words += ["--decoder", _decoder_word(sampling.decoder)] if sampling.decoder else []
            else:
                words += ["--samples", str(record.n)]
            commands = (shlex.join([*words, *_data_words(record), *_evaluator_words(record)]),)
    if commands:
        notes = ("The same number would be measured by:",)
    return Reproduction(commands=commands, notes=(printed, *notes))


def _evaluate(record: Record, samples: str, *, named: bool) -> str:
    """`harness evaluate`. samples: already quoted for the shell. named: state protocol, data and name as well."""
    words = []
    if named:
        protocol, _ = _protocol(record)
        words += ["--protocol", _protocol_word(record, protocol), *_data_words(record)]
    words += ["--suite", _suite_word(record), *_evaluator_words(record)]
    if named or record.system not in (record.backbone, None) and record.system not in registry.systems:
        words += ["--name", record.system]
    return f"harness evaluate {samples} {shlex.join(words)}"


def _is_suite_of(protocol: Protocol | None, record: Record) -> bool:
    """Whether the record's suite is the protocol's, so that `harness run` itself measures it."""
    return protocol is not None and record.evaluation is not None and record.evaluation.suite == protocol.suite


def _evaluator_words(record: Record) -> list[str]:
    """Flags of the files that the suite needs."""
    reference = _reference(record)
    return [*_weights_words(record), *(["--reference", reference] if reference else [])]


def _suite_word(record: Record) -> str:
    suite = record.evaluation.suite if record.evaluation else ""
    if suite not in registry.suites and suite in registry.features:
        return f"{suite}:{record.metric}"  # suites given as FEATURES:METRICS are named after their features
    return suite


def _weights_words(record: Record) -> list[str]:
    """The flag of a feature network's weights that do not come with the harness."""
    suite = record.evaluation.suite if record.evaluation else ""
    features = registry.suites.get(suite).features if suite in registry.suites else None
    if features is None and suite in registry.features:
        features = registry.features.get(suite)
    if features is None or not features.weights_option:
        return []
    inception = features.weights_option == "--inception"
    return [features.weights_option, "classify_image_graph_def.pb" if inception else "WEIGHTS_FILE"]


def _reference(record: Record) -> str:
    """The name of ADM's reference batch of the record's data set, as in `harness data fetch`; "" if there is none."""
    from harness.data.public_files import FILES

    known = FILES.get(f"{record.dataset}-{record.resolution}")
    return known.file if known is not None and _weights_words(record) else ""


def _decoder_word(name: str) -> str:
    """The value of --decoder for the name of a decoder in records."""
    short = next((short for short, known in KNOWN.items() if known.record_name == name), None)
    return short or "DECODER_FOLDER"


def _data_words(record: Record) -> list[str]:
    needs = record.dataset in registry.datasets and registry.datasets.get(record.dataset).needs_folder
    return ["--data", "DATA_FOLDER"] if needs else []


def _protocol(record: Record) -> tuple[Protocol | None, list[str]]:
    """The record's protocol, None if it is not registered, and notes on it."""
    if record.protocol not in registry.protocols:
        return None, [f"Protocol {record.protocol!r} is not built in."]
    protocol, version = registry.protocols.get(record.protocol), record.protocol_version
    if version not in (None, str(protocol.version)):
        text = f"Measured under version {version} of protocol {protocol.name}; the installed version is {protocol.version}."
        return protocol, [text]
    return protocol, []


def _protocol_word(record: Record, protocol: Protocol | None) -> str:
    return record.protocol if protocol is not None else "PROTOCOL_FILE.toml"


def _setting(value: object) -> str:
    """The value as text that --set and the flags read back as the same value."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def _glob(pattern: str) -> str:
    """The pattern quoted for a shell, except for its stars."""
    return re.sub(r"[^*]+", lambda match: shlex.quote(match.group()), pattern)
