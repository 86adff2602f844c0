"""The commands as functions: what the documentation shows, the same settings as the command line, typed results, nothing printed."""

import dataclasses
import inspect
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest

import harness
from harness.cli import group
from harness.errors import UserError
from harness.planning.plan import Plan
from harness.planning.reference import Reference
from harness.protocols import get_protocol, override
from harness.settings import (
    CompareOptions,
    EvaluateOptions,
    PlanOptions,
    ReportOptions,
    RunOptions,
    SampleOptions,
    TrainOptions,
    command_words,
    settings_of,
)
from results.records import Record

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "python.md"
OPTIONS = {
    "run": RunOptions, "train": TrainOptions, "sample": SampleOptions, "evaluate": EvaluateOptions, "plan": PlanOptions,
    "report": ReportOptions, "compare": CompareOptions,
}  # fmt: skip
SMALL = 'steps=2, samples=100, precision="float32", micro_batch=8, set={"batch": 8}, report=False'


def test_the_main_job_is_what_the_documentation_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    lines = [line for line in block.splitlines() if line.strip()]
    assert 2 <= len(lines) <= 5 and block.count("steps=800") == 1
    names = {}
    exec(
        compile(
            block.replace("steps=800", SMALL).replace("sampling_steps=[10, 50]", "sampling_steps=[2]"), "page", "exec"
        ),
        names,
    )
    result = names["result"]
    assert result.folder == next(Path("runs").glob("digits-dit-xs-2-seed0-*"))
    assert [path.exists() for path in result.samples] == [True] and result.report is None
    assert {record.metric for record in result.records} == {"fd", "kid", "is", "precision", "recall", "copies"}
    assert all(
        isinstance(record, Record) and record.n == 100 and record.sampling.steps == 2 for record in result.records
    )
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 6 and printed.startswith("fd 2 ")  # the page's own print, and nothing else

    again = harness.run(
        backbone="dit-xs-2", steps=2, samples=100, sampling_steps=2, precision="float32", set={"batch": 8}, report=False
    )
    assert again.records == result.records  # found, not measured anew
    table = harness.load_records("runs")
    assert (
        len(table) == 6
        and set(table.sampling_steps) == {2}
        and set(table.metric) == {each.metric for each in again.records}
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_function_command_and_table_have_the_same_settings(name):
    function, options = getattr(harness, name), OPTIONS[name]
    known = settings_of(options)
    assert list(inspect.signature(function).parameters) == list(known)
    command = group.get_command(None, name)
    assert [each.name for each in command.params if each.name != "as_json"] == list(known)
    for setting, about in known.items():
        assert f"\n    {setting}: {about.help.split('.')[0]}" in function.__doc__.replace("\n        ", " ")
        assert about.help.endswith("."), setting


def test_settings_are_read_alike_from_text_and_from_values():
    one = RunOptions(
        backbone="dit-xs-2", steps="400k", sampling_steps="32,16", set=["learning_rate=1e-3"], match_sampling=None
    )
    other = RunOptions(backbone="dit-xs-2", steps=400_000, sampling_steps=[16, 32], set={"learning_rate": "1e-3"})
    assert (
        one == other
        and one.sampling_steps == (16, 32)
        and one.given().keys() == {"backbone", "steps", "sampling_steps", "set"}
    )


ASKED = [
    {
        "steps": 5,
        "seed": 3,
        "cfg": 1.5,
        "labels": "balanced",
        "logger": ["wandb", "tensorboard"],
        "gradient_checkpointing": True,
    },
    {"match": "dit-xl-2@400k", "match_sampling": "dit-xl-2@250,16@cfg1.5", "report": False, "out": "runs/x y"},
    {
        "budget": "1e12",
        "set": {"flip": True, "learning_rate": 3e-4},
        "evaluate_at": "1k,50",
        "features_weights": "f.pb",
    },
]


@pytest.mark.parametrize("asked", ASKED)
def test_the_words_of_options_are_read_back_as_the_same_options(asked):
    before = RunOptions(backbone="dit-xs-2", **asked)
    program, name, *words = command_words("run", before)
    assert (program, name) == ("harness", "run")
    with group.get_command(None, "run").make_context("run", words) as context:
        after = RunOptions(**context.params)
    assert {k: str(v) for k, v in after.set.items()} == {
        k: str(v).replace("True", "true") for k, v in before.set.items()
    }
    assert {**vars(after), "set": None} == {**vars(before), "set": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "many"}, "--steps: 'many' is not a count such as 250, 400k or 7M"),
        ({"steps": "1e308k"}, "--steps: '1e308k' is not a count such as 250, 400k or 7M"),
        ({"seed": float("inf")}, "--seed: inf is not a valid integer"),
        ({"steps": 0}, "--steps: must be at least 1"),
        ({"samples": 10**15 + 1}, "--samples: must be at most 1,000,000,000,000,000"),
        ({"framework": "tensorflow"}, "--framework 'tensorflow': choose one of torch, jax"),
        ({"logger": ["mlflow"]}, "--logger: unknown logger 'mlflow'; known: tensorboard, wandb"),
        ({"eta": 2}, "--eta: 2.0 is not in the range"),
        ({"set": ["learning_rate"]}, "--set: 'learning_rate' is not of the form NAME=VALUE"),
        ({"match": "dit-xl-2"}, "--match: 'dit-xl-2' is not of the form BACKBONE@STEPS"),
        ({"steps": 5, "budget": 1.0}, "--steps and --budget both set the training steps"),
        ({"seed": -1}, "--seed: -1 is not in the range"),
    ],
)
def test_what_makes_no_sense_is_a_user_error_that_names_the_setting(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(harness.UserError, match=re.escape(message)):
        harness.run(backbone="dit-xs-2", **settings)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_setting_is_a_type_error_as_of_any_function():
    with pytest.raises(TypeError, match="stepz"):
        harness.run(backbone="dit-xs-2", stepz=5)


def test_a_plan_is_typed_and_says_what_is_missing(caplog):
    with caplog.at_level(logging.INFO, "harness"):
        found = harness.plan(backbone="dit-xl-2", protocol="imagenet-256", steps="400k")
    assert isinstance(found, Plan) and found.measured is None and found.training.steps == 400_000
    assert round(found.gflops, 2) == 118.64 and any("imagenet" in sentence for sentence in found.missing)
    assert found.as_dict()["training"]["gflops"] == found.training.gflops


@pytest.mark.parametrize("name", harness.__all__)
def test_every_public_name_is_reachable(name):
    value = getattr(harness, name)
    if name in harness._HOMES:
        assert value.__module__ == harness._HOMES[name]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"learning_rate": 1}, {"learning_rate": "1"}),
        ({"learning_rate": np.float64(0.5)}, {"learning_rate": "0.5"}),
        ({"weight_decay": 0, "label_dropout": 1}, {"weight_decay": "0", "label_dropout": "1"}),
        ({"batch": 64.0}, {"batch": "64"}),
        ({"batch": np.int64(64)}, {"batch": "64"}),
        ({"flip": 1, "ema_ramp": 0}, {"flip": "yes", "ema_ramp": "no"}),
    ],
)
def test_a_recipe_of_python_values_is_that_of_the_command_line(values, text):
    one, other = (override(get_protocol("digits").recipe, items) for items in (values, text))
    assert json.dumps(dataclasses.asdict(one)) == json.dumps(dataclasses.asdict(other))  # and so is its hash
    words = command_words("run", RunOptions(backbone="dit-xs-2", set=values))
    given = dict(word.split("=") for word in words if "=" in word)
    assert override(get_protocol("digits").recipe, given) == one


@pytest.mark.parametrize(
    "values", [{"batch": 64.5}, {"batch": True}, {"learning_rate": None}, {"learning_rate": [1]}, {"clip_norm": True}]
)
def test_a_recipe_refuses_python_values_of_another_type(values):
    with pytest.raises(UserError, match=f"{next(iter(values))}=.* cannot be read as"):
        override(get_protocol("digits").recipe, values)


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": None}, {"seed": float("inf")}, {"framework": None}, {"sampling_precision": None}, {"set": None},
        {"set": 5}, {"data": 5}, {"sampling_steps": 1.5}, {"cfg": True}, {"cfg": 10**400}, {"logger": 5},
        {"match": Reference(backbone="dit-xs-2", steps=(1, 2))},
        {"match": Reference(backbone="dit-xs-2", steps=(1,), guidance_scale=1.5)},
    ],
)  # fmt: skip
def test_values_that_no_setting_has_are_refused_by_its_name(settings):
    with pytest.raises(UserError, match=f"--{next(iter(settings)).replace('_', '-')}: "):
        RunOptions(backbone="dit-xs-2", **settings)
