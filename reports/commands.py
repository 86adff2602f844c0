"""The commands that reproduce a record, or a sentence that says what is missing for them.

Names in capitals that end in _FILE or _FOLDER stand for files that the reader has to supply; a note says so.
"""

import dataclasses
import functools
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbones.autoencoders.spec import KNOWN
from harness import registry
from harness.diffusion.guidance import Guidance
from harness.diffusion.samplers import name_with_steps
from harness.errors import UserError
from harness.io.files import sha256_json
from harness.protocols import NO_PROTOCOL, Protocol, override
from harness.runs.run import recipe_identity
from harness.settings import (
    EvaluateOptions,
    RunOptions,
    SampleOptions,
    command_line,
    command_words,
    recorded_settings,
    settings_of,
)  # fmt: skip
from reports.sections import PAPER
from results.records import Record, Training

OUT = "runs/again"  # the folder of the run, if a second command has to find its samples
# Those that a record states; one with its usual value is None there.
RECIPE_ITEMS = (
    "batch", "learning_rate", "ema_decay", "objective", "schedule", "time_distribution", "loss_weight", "noise_scale",
    "ema_widths", "ema_snapshots",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Shell commands that measure a record again.

    commands: in the order to run them; empty if the record cannot be reproduced. notes: sentences to show before them.
    placeholders: a sentence to show after them, on the names in the commands that the reader replaces by files or folders;
    "" if there are none.
    """

    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    placeholders: str = ""


def reproduction(record: Record, recipes: Mapping[str, Mapping[str, object]] | None = None) -> Reproduction:
    """The commands that measure `record` again.

    recipes: recipe hash -> the recipe's items without `steps`, as in a run.json. There is no command for a recipe that is
    neither one of them, nor the protocol's recipe with the settings that the record states.
    Raises no UserError: if the record states something that no command can ask for, a note says so.
    """
    try:
        made = _reproduction(record, recipes or {})
    except UserError as error:
        return Reproduction(notes=(f"No command can ask for what this record says: {error}.",))
    if not all(command.isprintable() for command in made.commands):
        return Reproduction(notes=("A name in this record has control characters, so no command is given.",))
    names = sorted(
        {word for command in made.commands for word in re.findall(r"\b[A-Z_0-9]+_(?:FILE|FOLDER)\b", command)}
    )
    if names:
        # A run with a decoder is trained on latents, not on images.
        needs_latents = "DATA_FOLDER" in names and record.sampling is not None and record.sampling.decoder is not None
        made_by = " (DATA_FOLDER: latents, made by `harness data latents`)" if needs_latents else ""
        text = f"In place of {', '.join(names)} name what you have{made_by}."
        made = dataclasses.replace(made, placeholders=text)
    return made


def _reproduction(record: Record, recipes: Mapping[str, Mapping[str, object]]) -> Reproduction:
    """`reproduction` without the sentence on placeholders. Raises UserError for settings that no command accepts."""
    if record.provenance == "published":
        return _published_reproduction(record)
    if record.sampling is not None and record.sampling.settings_hash is not None and not _is_from_run(record):
        return _system_reproduction(record)
    if record.training is not None and record.training.steps is not None and record.sampling is not None:
        return _run_reproduction(record, recipes)
    return _samples_reproduction(record)


def _is_from_run(record: Record) -> bool:
    """Whether the record was made by a run, and not by a system of several networks.

    Told by the training: only records of runs state its precision or micro-batch.
    """
    training = record.training
    return training is not None and (training.micro_batch is not None or training.precision is not None)


def _run_reproduction(record: Record, recipes: Mapping[str, Mapping[str, object]]) -> Reproduction:
    """`harness run`; followed by `harness evaluate` if the record has another suite or name than the run itself would use.

    recipes: as for `reproduction`.
    """
    training, sampling = record.training, record.sampling
    assert training is not None and sampling is not None
    protocol, notes = _protocol_and_notes(record)
    has_steps = (
        sampling.steps is not None or sampling.evaluations_mean is not None
    )  # an adaptive sampler has none to set
    if training.recipe_hash is None or not has_steps or sampling.sampler is None or record.backbone is None:
        return Reproduction(notes=("The record does not state all of its training and sampling.",))
    if training.earlier_precision:
        text = f"It was trained in {training.earlier_precision}, then in {training.precision}, by a fork (--fork)"
        return Reproduction(notes=(f"{text}: no single command does that.",))
    recipe, reason = _recipe_items(training, protocol, recipes)
    if reason:
        return Reproduction(notes=(reason,))
    if protocol is not None:
        for name in ("clip_denoised", "uint8_rule"):
            used, fixed = getattr(sampling, name), getattr(protocol.sampling, name)
            if used is not None and used != fixed:
                text = f"It was sampled with {name} {used}, but protocol {protocol.name} fixes {name} to {fixed}"
                return Reproduction(notes=(f"{text}; a protocol file of your own can set it.",))
    if record.backbone not in registry.backbones:
        notes.append(
            f"Backbone {record.backbone!r} is not installed: install the plug-in that provides it, or name its file with --plugin."
        )
    defaults = dataclasses.asdict(protocol.recipe) if protocol else {}
    settings = _recorded(record, protocol)
    settings["set"] = {name: value for name, value in recipe.items() if name not in defaults or value != defaults[name]}
    if _has_suite_of_protocol(record, protocol) and record.system == record.backbone:
        return Reproduction(commands=(_run_command(record, settings | _evaluator_files(record)),), notes=tuple(notes))
    # A sample set of the run. The star stands for the rest of its name: guidance, number of images, hash of all settings.
    name = f"step{training.steps}-{name_with_steps(sampling.sampler, sampling.steps)}-*/samples.npz"
    return Reproduction(
        commands=(
            _run_command(record, settings | {"out": OUT}),
            _evaluate_command(record, f"{OUT}/samples/{_glob(name)}", named=False),
        ),
        notes=tuple(notes),
    )


def _run_command(record: Record, settings: Mapping[str, Any]) -> str:
    """`harness run` with the record's backbone, its data and these settings. settings: name in RunOptions -> value."""
    file = registry.backbones.code_file(record.backbone or "")  # of a plug-in that the user has named
    if file is not None:
        settings = {**settings, "plugin": (file,)}
    options = RunOptions(**{"backbone": record.backbone, **settings, **_data_setting(record)})
    return command_line(command_words("run", options))


def _recorded(record: Record, protocol: Protocol | None) -> dict[str, Any]:
    """The settings of a run that the record states, without those equal to the protocol's: name in RunOptions -> value."""
    stated = recorded_settings(RunOptions, record)
    table = settings_of(RunOptions)
    neutral = {"cfg": Guidance(1.0), "sampling_seed": 0}  # defaults if the protocol is not known
    settings = {}
    for name, value in stated.items():
        item = table[name].item  # of the protocol's [sampling]; "": the protocol has no such item
        usual = getattr(protocol.sampling, item) if item and protocol is not None else neutral.get(name)
        if not item or value != usual:
            settings[name] = value
    if stated.get("cfg") in (None, Guidance(1.0)):  # without guidance there are no guided channels
        settings.pop("guidance_channels", None)
    if "decoder" in settings:
        settings["decoder"] = _decoder_word(settings["decoder"])
    return {**settings, "protocol": _protocol_word(record, protocol)}


def _recipe_items(
    training: Training, protocol: Protocol | None, recipes: Mapping[str, Mapping[str, object]]
) -> tuple[dict[str, object], str]:
    """(items of the recipe without `steps`, ""), or ({}, a sentence on why they are not known).

    The record has only the hash of its recipe. The items are those of the recipe in `recipes` with this hash, or else of
    the protocol's recipe changed as the record states, if that has this hash.
    """
    digest = training.recipe_hash or ""
    if digest in recipes:
        return dict(recipes[digest]), ""
    if protocol is not None:
        stated = tuple((name, getattr(training, name)) for name in RECIPE_ITEMS if getattr(training, name) is not None)
        hash_with_them, found = _recipe_with(protocol, stated)
        if hash_with_them == digest:
            return found, ""
    short = digest[:12]
    return {}, (
        f"The recipe is known here by its hash alone ({short}): it is not the protocol's with what the record names. The "
        "run.json of the run has it; a report of that folder gives the command."
    )


@functools.lru_cache(maxsize=1024)
def _recipe_with(protocol: Protocol, stated: tuple[tuple[str, object], ...]) -> tuple[str, dict[str, object]]:
    """(hash, items) of the protocol's recipe with these (name, value) items; ("", {}) if no recipe can have them."""
    try:
        found = recipe_identity(override(protocol.recipe, dict(stated)))
    except UserError:
        return "", {}
    return sha256_json(found), found


def _system_reproduction(record: Record) -> Reproduction:
    """`harness sample --system` and `harness evaluate`, for a record of a system of several networks."""
    commands, notes = _system_commands(record)
    if not commands:
        text = f"System {record.system!r} is not in `harness list systems`: its TOML file is needed."
        return Reproduction(notes=(text,))
    digest = record.training.checkpoint_sha256 if record.training else None
    if digest:
        notes += (f"Of the same weights: the hash of all of them is {digest[:12]}.",)
    return Reproduction(commands=commands, notes=notes)


def _system_commands(record: Record) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(commands for the registered system of the record's name, notes).

    No commands if there is none (then no notes either), or if it cannot be run (then a note says why).
    """
    if record.system not in registry.systems:
        return (), ()
    system, sampling = registry.systems.get(record.system), record.sampling
    if system.unavailable:
        return (), (f"{record.system} cannot be run here: {system.unavailable}.",)
    settings: dict[str, Any] = {}
    if sampling is not None and record.provenance == "measured":
        stated = {"sampling_seed": sampling.seed, "sampling_precision": sampling.precision, "batch": sampling.batch}
        settings = {name: value for name, value in stated.items() if value is not None}
        settings["framework"] = None if record.framework == "torch" else record.framework  # torch is the default
    steps = sampling.steps if sampling is not None else None
    weights = {part: Path(f"{part.replace('-', '_').upper()}_FILE") for part in system.parts}
    settings["sampling_seed"] = settings.get("sampling_seed") or None  # 0 is the default
    options = SampleOptions(
        system=record.system,
        weights=weights | ({"decoder": Path("DECODER_FILE")} if system.decoder else {}),
        samples=record.n,
        sampling_steps=None if steps is None or steps == system.base.steps else (steps,),  # None: the system's own
        **settings,
    )
    folder = f"runs/systems/{_glob(f'{record.system}-n{record.n}-*/samples.npz')}"
    return (command_line(command_words("sample", options)), _evaluate_command(record, folder, named=False)), ()


def _samples_reproduction(record: Record) -> Reproduction:
    """`harness evaluate` of samples that the harness did not make."""
    digest = record.sampling.samples_sha256 if record.sampling else None
    which = f"the samples with sha256 {digest[:12]}" if digest else "the samples, whose hash the record does not state"
    note = f"The record does not state how its samples were made. SAMPLES_FILE: {which}."
    if record.evaluation is None:
        return Reproduction(
            notes=("The record states neither how its samples were made nor which suite measured them.",)
        )
    return Reproduction(commands=(_evaluate_command(record, "SAMPLES_FILE", named=True),), notes=(note,))


def _published_reproduction(record: Record) -> Reproduction:
    """Where the number is printed, and the commands that would measure the same if there are any."""
    source = record.source
    assert source is not None  # of every published record
    printed = f"Printed in {PAPER}, {source.table}, row {source.row!r}, column {source.column!r}."
    commands, notes = _system_commands(record)
    training = record.training
    trainable = training is not None and training.steps is not None and record.backbone in registry.backbones
    if not commands and not notes and trainable:
        assert training is not None
        protocol, _ = _protocol_and_notes(record)
        if protocol is not None and _has_suite_of_protocol(record, protocol):
            stated = {name: getattr(training, name) for name in RECIPE_ITEMS}
            recipe = {
                name: value for name, value in stated.items() if value not in (None, getattr(protocol.recipe, name))
            }
            settings = {**_recorded(record, protocol), "set": recipe}
            commands = (_run_command(record, settings | _evaluator_files(record)),)
    if commands:
        notes = ("The same would be measured by:",)
    return Reproduction(commands=commands, notes=(printed, *notes))


def _evaluate_command(record: Record, samples: str, *, named: bool) -> str:
    """The `harness evaluate` command.

    samples: their path, already quoted for the shell. named: True states protocol, data and name too, as samples without a
    sidecar require.
    """
    settings = {"suite": _suite_word(record), **_evaluator_files(record)}
    if named:
        settings |= {"protocol": _protocol_word(record, _protocol_and_notes(record)[0]), **_data_setting(record)}
    # The sidecar gives samples the name of their backbone or system; any other name has to be stated.
    if named or (record.system != record.backbone and record.system not in registry.systems):
        settings["name"] = record.system
    # Without `harness evaluate` and the samples, because `command_line` would quote the stars in their path.
    _, _, *flags, _samples = command_words("evaluate", EvaluateOptions(samples=Path("SAMPLES"), **settings))
    return f"harness evaluate {samples} {command_line(flags)}"


def _has_suite_of_protocol(record: Record, protocol: Protocol | None) -> bool:
    """Whether `harness run` itself measures with the record's suite."""
    return protocol is not None and record.evaluation is not None and record.evaluation.suite == protocol.suite


def _evaluator_files(record: Record) -> dict[str, Any]:
    """The settings that name the files which the suite needs: features_weights and reference; None: not needed."""
    weights, reference = _weights_file(record), _reference(record)
    return {"features_weights": weights or None, "reference": reference or None}


def _suite_word(record: Record) -> str:
    """The value of --suite."""
    suite = record.evaluation.suite if record.evaluation else ""
    if suite not in registry.suites and suite in registry.features:
        return f"{suite}:{record.metric}"  # a suite put together on the command line is named after its features
    return suite


def _weights_file(record: Record) -> str:
    """The weights file of the suite's feature network, or a placeholder for it; "" if the network needs no file.

    The weights of Inception (option --inception) are a public file, so they have its name.
    """
    suite = record.evaluation.suite if record.evaluation else ""
    features = registry.suites.get(suite).features if suite in registry.suites else None
    if features is None and suite in registry.features:
        features = registry.features.get(suite)
    if features is None or not features.weights_option:
        return ""
    return "classify_image_graph_def.pb" if features.weights_option == "--inception" else "WEIGHTS_FILE"


def _reference(record: Record) -> str:
    """The file name of the reference batch of ADM's evaluator, as `harness data fetch` saves it; "" if none is needed.

    A placeholder for samples that were evaluated without a protocol, which are compared with a reference alone.
    """
    from harness.data.public_files import FILES

    if record.protocol == NO_PROTOCOL:
        return "REFERENCE_FILE"
    known = FILES.get(f"{record.dataset}-{record.resolution}")
    # A suite without a weights file measures against the images of the data set.
    return known.file if known is not None and _weights_file(record) else ""


def _decoder_word(name: str) -> str:
    """The value of --decoder for the name of a decoder in records; a placeholder for unknown decoders."""
    short = next((short for short, known in KNOWN.items() if known.record_name == name), None)
    return short or "DECODER_FOLDER"


def _data_setting(record: Record) -> dict[str, Any]:
    """The setting `data`, with a placeholder, if the data set needs a folder; else {}."""
    needs = record.dataset in registry.datasets and registry.datasets.get(record.dataset).needs_folder
    return {"data": "DATA_FOLDER"} if needs else {}


def _protocol_and_notes(record: Record) -> tuple[Protocol | None, list[str]]:
    """(the record's protocol, or None if it is not registered; notes on it)."""
    if record.protocol == NO_PROTOCOL:
        return None, []
    if record.protocol not in registry.protocols:
        return None, [f"Protocol {record.protocol!r} is not built in."]
    protocol, version = registry.protocols.get(record.protocol), record.protocol_version
    if version not in (None, str(protocol.version)):
        text = f"Measured under version {version} of protocol {protocol.name}; the installed version is {protocol.version}."
        return protocol, [text]
    return protocol, []


def _protocol_word(record: Record, protocol: Protocol | None) -> str | None:
    """The value of --protocol; a placeholder for a protocol that is not registered. protocol: of `_protocol_and_notes`.

    None: the samples were evaluated without a protocol.
    """
    if record.protocol == NO_PROTOCOL:
        return None
    return record.protocol if protocol is not None else "PROTOCOL_FILE.toml"


def _glob(pattern: str) -> str:
    """The pattern quoted for a shell, except its stars."""
    return re.sub(r"[^*]+", lambda match: shlex.quote(match.group()), pattern)
