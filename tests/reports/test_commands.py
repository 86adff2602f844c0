"""Commands that reproduce a record: read by the real command line, they ask for what the record says."""

import dataclasses
import shlex

import pytest

from harness.cli import group
from harness.io.files import sha256_json
from harness.planning.matching import request_from
from harness.planning.request import Request
from harness.runs.run import recipe_identity
from harness.settings import RunOptions, SampleOptions
from reports.commands import OUT, reproduction
from results import paper
from results.records import Evaluation, Record, Sampling, Source, Training


def _parsed(command: str):
    """(name, options) of a command, as the command line itself reads it."""
    program, name, *words = shlex.split(command)
    assert program == "harness"
    found = group.get_command(None, name)
    with found.make_context(name, words) as context:
        return name, context.params


def _request(command: str) -> Request:
    name, options = _parsed(command)
    assert name == "run"
    return request_from(RunOptions(**options))


def _record(request: Request, *, sampling_precision="float32", batch=64, suite=None, **changes) -> Record:
    """What `harness run` records of a request, with one of its step counts."""
    recipe, drawn, task = request.recipe, request.sampling, request.protocol
    guided = drawn.guidance_scale != 1
    fields = {
        "provenance": "measured",
        "metric": "fd",
        "value": 12.5,
        "n": request.samples,
        "protocol": task.name,
        "protocol_version": str(task.version),
        "resolution": task.resolution,
        "dataset": task.dataset,
        "system": request.spec.name,
        "backbone": request.spec.name,
        "kind": "denoiser",
        "framework": request.framework,
        "training": Training(
            steps=recipe.steps,
            batch=recipe.batch,
            learning_rate=recipe.learning_rate,
            ema_decay=recipe.ema_decay,
            seed=request.seed,
            objective=recipe.objective,
            schedule=recipe.schedule,
            precision="float32",
            micro_batch=32,
            recipe_hash=sha256_json(recipe_identity(recipe)),
            checkpoint_sha256="cd" * 32,
        ),
        "sampling": Sampling(
            sampler=drawn.sampler,
            steps=drawn.steps[0],
            evaluations=request.evaluations(drawn.steps[0]),
            eta=drawn.eta,
            guidance_scale=drawn.guidance_scale,
            guidance_interval=drawn.guidance_interval or None,
            guidance_channels=drawn.guidance_channels if guided else None,
            uint8_rule=drawn.uint8_rule,
            label_policy=drawn.label_policy,
            clip_denoised=drawn.clip_denoised,
            precision=sampling_precision,
            batch=batch,
            seed=drawn.seed,
            samples_sha256="ef" * 32,
        ),
        "evaluation": Evaluation(suite=suite or task.suite, suite_version="1", reference_sha256="12" * 32),
    }
    return Record(**{**fields, **changes})


def _recipes(request: Request) -> dict:
    items = recipe_identity(request.recipe)
    return {sha256_json(items): items}


ASKED = [
    "--steps 800 --seed 1 --sampling-steps 25 --samples 1000",
    "--steps 1 --sampling-steps 10 --cfg 1.5 --guidance-channels first-3 --labels balanced --sampling-seed 7",
    "--steps 1 --sampling-steps 10 --cfg 3@0.50- --sampler ddim",
    "--steps 50 --sampling-steps 20 --sampler ddim --eta 0.3 --set learning_rate=1e-3 --set batch=64 --set ema_decay=0.5",
    "--steps 50 --sampling-steps 20 --set objective=epsilon-fixed --set schedule=cosine --samples 250",
    "--steps 50 --sampling-steps 20 --set weight_decay=0.1 --set flip=true --set ema_ramp=false --set warmup_steps=3",
]


@pytest.mark.parametrize("asked", ASKED)
def test_a_run_is_asked_for_again(asked):
    before = _request(f"harness run --backbone dit-xs-2 --protocol digits {asked}")
    record = _record(before, sampling_precision="bfloat16", batch=33)
    again = reproduction(record, _recipes(before))
    (command,) = again.commands
    assert again.notes == () and _request(command) == before
    _, options = _parsed(command)
    assert options["precision"] == "float32" and options["micro_batch"] == 32
    assert options["sampling_precision"] == "bfloat16" and options["sampling_batch"] == 33


def test_a_recipe_that_the_record_names_in_full_needs_no_run_beside_it():
    before = _request("harness run --backbone dit-xs-4 --steps 9 --set batch=16 --set ema_decay=0.9 --sampling-steps 5")
    (command,) = reproduction(_record(before)).commands
    assert _request(command) == before


def test_a_recipe_known_by_its_hash_alone_gives_a_sentence_and_no_command():
    before = _request("harness run --backbone dit-xs-2 --steps 9 --set weight_decay=0.1 --sampling-steps 5")
    record = _record(before)
    found = reproduction(record)
    assert found.commands == () and record.training.recipe_hash[:12] in found.notes[0] and "run.json" in found.notes[0]
    absurd = dataclasses.replace(record, training=dataclasses.replace(record.training, batch=-3, ema_decay=9.0))
    assert reproduction(absurd).commands == ()
    nothing = dataclasses.replace(record, training=dataclasses.replace(record.training, recipe_hash=None))
    assert reproduction(nothing).commands == () and "does not state all" in reproduction(nothing).notes[0]


def test_what_only_a_protocol_sets_is_no_flag():
    before = _request("harness run --backbone dit-xs-2 --steps 9 --sampling-steps 5")
    record = _record(before)
    other = dataclasses.replace(record, sampling=dataclasses.replace(record.sampling, clip_denoised=False))
    found = reproduction(other)
    assert found.commands == () and "clip_denoised False" in found.notes[0]


def test_another_protocol_version_plugin_and_protocol_file_are_said():
    before = _request("harness run --backbone dit-xs-2 --steps 9 --sampling-steps 5")
    record = _record(before, protocol_version="0", backbone="mine", system="mine")
    found = reproduction(record)
    assert len(found.commands) == 1 and "version 0" in found.notes[0] and "plug-in" in found.notes[1]
    of_file = _record(before, protocol="my-task")
    assert reproduction(of_file).commands == ()  # neither the protocol's recipe nor the run's is known
    found = reproduction(of_file, _recipes(before))
    name, options = _parsed(found.commands[0])
    assert options["protocol"] == "PROTOCOL_FILE.toml" and "my-task" in found.notes[0]
    assert RunOptions(**options).set["batch"] == "128"  # every item: nobody knows here what the file says


def test_another_suite_is_a_second_command_on_the_samples_of_the_first():
    before = _request("harness run --backbone dit-xs-2 --steps 9 --sampling-steps 5")
    for suite, metric, expected in (
        ("embedded-modern", "density", "embedded-modern"),
        ("efficientnet-lite0-96", "kid", "efficientnet-lite0-96:kid"),
        ("adm", "fid", "adm"),
    ):
        run, evaluate = reproduction(_record(before, suite=suite, metric=metric)).commands
        assert str(_parsed(run)[1]["out"]) == OUT
        name, options = _parsed(evaluate)
        assert name == "evaluate" and options["suite"] == expected
        assert str(options["samples"]) == f"{OUT}/samples/step9-ddpm5-*/samples.npz"
        assert (options["features_weights"] is not None) == (suite == "adm")
    renamed = reproduction(_record(before, system="a b;c"))
    assert _parsed(renamed.commands[1])[1]["name"] == "a b;c"


def test_a_system_is_sampled_and_evaluated():
    record = _record(
        _request("harness run --backbone dit-xs-2 --steps 9 --sampling-steps 5"),
        system="digits-cascade",
        backbone="adm-xs+adm-u-xs",
        training=Training(steps=9, recipe_hash="ab" * 32, checkpoint_sha256="cd" * 32),
        sampling=Sampling(
            sampler="ddpm",
            steps=20,
            seed=3,
            batch=50,
            precision="float32",
            settings_hash="aa" * 32,
            stage_steps="20 + 20",
        ),
    )
    found = reproduction(record)
    sample, evaluate = found.commands
    _, options = _parsed(sample)
    assert options["system"] == "digits-cascade" and SampleOptions(**options).weights.keys() == {"base", "upsampler"}
    assert options["sampling_steps"] == (20,) and options["sampling_seed"] == 3 and options["batch"] == 50
    assert options["samples"] == record.n and "cdcdcdcdcdcd" in found.notes[0]
    _, options = _parsed(evaluate)
    assert str(options["samples"]) == "runs/systems/digits-cascade-n1000-*/samples.npz" and options["name"] is None
    assert reproduction(dataclasses.replace(record, system="mine")).commands == ()


def test_a_run_in_latents_names_its_decoder_and_what_judges_it():
    before = _request("harness run --backbone dit-b-4 --protocol imagenet-256 --steps 9 --sampling-steps 5 --seed 4")
    record = _record(before, metric="fid")
    for name, word in (("sd-vae-ft-mse", "ft-mse"), ("vae-123456789abc", "DECODER_FOLDER")):
        drawn = dataclasses.replace(record.sampling, decoder=name, decoder_gflops=1.0, settings_hash="bb" * 32)
        again = reproduction(dataclasses.replace(record, sampling=drawn))
        (command,), note = again.commands, again.placeholders
        _, options = _parsed(command)
        assert options["decoder"] == word and str(options["data"]) == "DATA_FOLDER"
        assert (
            "DATA_FOLDER" in note
            and "harness data latents" in note
            and ("DECODER_FOLDER" in note) == (word != "ft-mse")
        )
        assert (
            options["reference"].name == "VIRTUAL_imagenet256_labeled.npz" and options["features_weights"] is not None
        )
        assert dataclasses.replace(_request(command), data=None) == before


def test_samples_from_elsewhere_are_evaluated_under_their_name():
    record = _record(
        _request("harness run --backbone dit-xs-2 --steps 9 --sampling-steps 5"),
        system="$(touch x) `y`",
        backbone=None,
        training=None,
        sampling=Sampling(samples_sha256="ab" * 32),
    )
    found = reproduction(record)
    name, options = _parsed(found.commands[0])
    assert name == "evaluate" and options["name"] == "$(touch x) `y`" and options["protocol"] == "digits"
    assert "abababababab" in found.notes[0]


def test_control_characters_give_no_command():
    before = _request("harness run --backbone dit-xs-2 --steps 9 --sampling-steps 5")
    found = reproduction(_record(before, backbone="a\nrm -r b", system="a\nrm -r b"))
    assert found.commands == () and "control characters" in found.notes[0]


def test_every_published_number_has_its_source_and_commands_that_parse():
    commands = set()
    for record in paper.records():
        found = reproduction(record)
        source = record.source
        assert all(text in found.notes[0] for text in (source.table, source.row, source.column, "2212.09748"))
        commands |= {(record.system, record.n, command) for command in found.commands}
    kinds = {}
    for system, n, command in commands:
        name, options = _parsed(command)
        kinds.setdefault(name, set()).add(system)
        if name == "sample":
            assert options["system"] == system and options["samples"] == n
        if name == "run":
            assert options["samples"] == n and options["protocol"].startswith("imagenet-") and options["data"]
            assert request_from(RunOptions(**options)).recipe.steps == 400_000
        if name == "evaluate":
            assert options["suite"] == "adm"
        if name != "sample":
            assert options["reference"].name.startswith("VIRTUAL_imagenet") and options["features_weights"] is not None
    assert {"dit-xl-2-256-cfg1.5", "adm-g-256", "ldm-4", "biggan-deep-512"} <= kinds["sample"]
    assert "dit-s-8-256" in kinds["run"] and kinds["evaluate"] == kinds["sample"]
    cdm = next(record for record in paper.records() if record.system == "cdm-256")
    assert reproduction(cdm).commands == () and "cannot be run" in reproduction(cdm).notes[1]
    made_up = dataclasses.replace(cdm, system="x", source=Source(table="T", row="r", column="c"))
    assert reproduction(made_up).commands == ()
