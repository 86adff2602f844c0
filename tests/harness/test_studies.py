"""Studies: files read and refused, runs and their commands, and launchers that are killed."""

import dataclasses
import json
import logging
import os
import signal
import time
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness import protocols
from harness.cli import group
from harness.cli.run import command as run_command
from harness.cli.train import command as train_command
from harness.errors import UserError
from harness.planning.matching import request_from
from harness.settings import RunOptions
from harness.studies import from_dict, jobs, load
from harness.studies.expand import expand
from harness.studies.local import Launcher
from harness.studies.state import overview

STUDY = """
protocol = "digits"
backbones = ["dit-xs-4", "dit-xs-2"]
seeds = [0, 3]
budgets = { match = ["dit-xs-4@60", "dit-xs-4@0.6k"] }
evaluate_at = [7]
precision = "float32"

[sampling]
steps = [5, 2]
guidance_scales = [1, 1.5]
samples = 200
sampler = "ddim"

[recipe]
batch = 16
ema_ramp = false

[backbone.dit-xs-2]
learning_rate = 3e-4
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "both.toml"
    path.write_text(STUDY)
    return load(path)


def test_runs_are_seeds_by_backbones_and_each_command_asks_for_what_was_expanded(study):
    expansion = expand(study)
    assert expansion.runs == expand(study).runs
    assert [(each.spec.backbone, each.spec.seed) for each in expansion.runs] == [
        ("dit-xs-4", 0), ("dit-xs-2", 0), ("dit-xs-4", 3), ("dit-xs-2", 3),
    ]  # fmt: skip
    assert len({each.name for each in expansion.runs}) == 4
    for run in expansion.runs:
        assert [each.sampling.guidance_scale for each in run.requests] == [1, 1.5]
        for request, (program, verb, *words) in zip(run.requests, run.commands, strict=True):
            assert (program, verb) == ("harness", "run")
            options = run_command.make_context("run", list(words)).params  # as the command line would read it
            asked = request_from(RunOptions(**options))
            assert asked == request
            assert sorted({*(options["evaluate_at"] or ()), asked.recipe.steps}) == list(run.milestones)
            assert options["precision"] == "float32" and options["report"] is False and options["out"] is None
            assert (asked.samples, asked.sampling.steps, asked.recipe.ema_ramp) == (200, (2, 5), False)
            assert asked.recipe.learning_rate == (3e-4 if run.spec.backbone == "dit-xs-2" else 2e-3)


def test_seeds_of_the_samples_are_sets_of_the_same_runs(study):
    text = STUDY.replace("[sampling]", "[sampling]\nseeds = [4, 2]")
    many = expand(from_dict(tomllib.loads(text), study.file))
    assert [run.name for run in many.runs] == [run.name for run in expand(study).runs]
    for run in many.runs:
        asked = [(each.sampling.guidance_scale, each.sampling.seed) for each in run.requests]
        assert asked == [(1, 4), (1, 2), (1.5, 4), (1.5, 2)]
        for request, words in zip(run.requests, run.commands, strict=True):
            options = run_command.make_context("run", list(words[2:])).params
            assert request_from(RunOptions(**options)) == request
    with pytest.raises(UserError, match="seed or seeds, not both"):
        from_dict(tomllib.loads(text.replace("seeds = [4, 2]", "seeds = [4, 2]\nseed = 1")), study.file)


def test_files_of_the_suite_are_asked_for_before_anything_runs(tmp_path):
    text = (Path(protocols.__file__).parent / "digits.toml").read_text()
    text = text.replace('name = "digits"', 'name = "mine"').replace('suite = "embedded"', 'suite = "adm"')
    (tmp_path / "mine.toml").write_text(text)

    def expanded(**files):
        return expand(from_dict({"protocol": "mine.toml", "backbones": ["dit-xs-4"], **files}, tmp_path / "s.toml"))

    with pytest.raises(UserError, match="suite 'adm' needs --inception FILE and --reference FILE"):
        expanded()
    with pytest.raises(UserError, match=r"suite 'adm' needs --inception FILE \(`harness data fetch inception`\)$"):
        expanded(reference="reference.npz")
    assert expanded(features_weights="graph.pb").runs  # the reference is the data set then


@pytest.mark.parametrize(
    "items",
    [
        {"backbones": ["dit-xs-5"], "budgets": {"steps": [4]}},
        {"backbones": ["dit-xs-5"], "budgets": {"match": "dit-xs-4@60"}},
        {"backbones": ["dit-xs-4"], "budgets": {"match": "dit-xs-5@60"}},
    ],
)
def test_an_unknown_backbone_is_refused_with_the_file(items, tmp_path):
    with pytest.raises(UserError, match=r"/s\.toml: .*unknown backbone 'dit-xs-5'") as error:
        expand(from_dict({"protocol": "digits", **items}, tmp_path / "s.toml"))
    assert str(error.value).count("s.toml") == 1


def test_before_anything_runs_all_is_to_do_and_nothing_is_written(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = overview(expand(study)).as_dict()
    assert found["counts"]["to do"] == len(found["runs"]) == 4
    (small, _, _, _) = found["runs"]
    assert small["sample_sets"] == 3 * 2 * 2 and small["sample_sets_done"] == small["steps_done"] == 0
    run = expand(study).runs[0]
    images = 200 * 3 * (2 + 5) * (1 + 2)  # samples, milestones, sampler steps, guidance counted twice
    assert small["gflops_left"] == pytest.approx(run.gflops_step * 600 + run.requests[0].compute.gflops * images)
    assert found["gflops_left"] == pytest.approx(sum(row["gflops_left"] for row in found["runs"]))
    assert (found["seconds_left"], found["runs_of_unknown_speed"]) == (0, 4)
    assert small["commands"][0][:4] == ["harness", "run", "--backbone", "dit-xs-4"]
    assert [path.name for path in tmp_path.iterdir()] == ["both.toml"]


VARIANTS = """
protocol = "digits"
backbones = ["dit-xs-4", "dit-xs-2"]
seeds = [0, 1]
budgets = { match = "dit-xs-4@60" }
[sampling]
samples = 200
steps = [5]
[recipe]
batch = 16
[variant.paper]
[variant.flow]
recipe = { objective = "sit", batch = 32 }
sampling = { sampler = "heun", steps = [3, 13] }
[backbone.dit-xs-2]
learning_rate = 3e-4
"""


def test_variants_train_and_sample_every_backbone_in_their_way(tmp_path):
    path = tmp_path / "variants.toml"
    path.write_text(VARIANTS)
    runs = expand(load(path)).runs
    assert [(each.spec.seed, each.spec.recipe.schedule, each.spec.backbone) for each in runs] == [
        (seed, schedule, backbone)
        for seed in (0, 1)
        for schedule in ("linear", "flow")
        for backbone in ("dit-xs-4", "dit-xs-2")
    ]
    assert len({each.name for each in runs}) == 8
    for run in runs:
        recipe, (request,) = run.spec.recipe, run.requests
        if recipe.schedule == "flow":
            assert (recipe.objective, recipe.batch) == ("velocity", 32)
            assert (request.sampling.sampler, request.sampling.steps) == ("heun", (3, 13))
            assert [request.evaluations(steps) for steps in (3, 13)] == [5, 25]
        else:
            assert (recipe.objective, recipe.batch) == ("epsilon-learned-range", 16)
            assert (request.sampling.sampler, request.sampling.steps) == ("ddpm", (5,))
        assert recipe.learning_rate == (3e-4 if run.spec.backbone == "dit-xs-2" else 2e-3)
        # the budget is that of dit-xs-4@60 in the same variant, with its batch
        reference = next(each for each in runs if each.spec.recipe.batch == recipe.batch)
        assert abs(run.steps * run.gflops_step / (60 * reference.gflops_step) - 1) <= 0.5 / run.steps
        options = run_command.make_context("run", list(run.commands[0][2:])).params
        assert request_from(RunOptions(**options)) == request


def test_a_variant_is_named_wherever_its_run_is(tmp_path, monkeypatch, caplog):
    """In the table and the JSON of --status, when the run begins and when it fails; a study without variants has no such column."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "variants.toml").write_text(VARIANTS.replace("seeds = [0, 1]", "seeds = [9]"))
    monkeypatch.setitem(jobs.PROGRAMS, "harness", "stub_command")  # fails with the seed 9
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with caplog.at_level(logging.INFO, "harness"):
        failed = CliRunner().invoke(group, ["study", "variants.toml"])
    expansion = expand(load(tmp_path / "variants.toml"))
    names = {run.name: variant for run, variant in zip(expansion.runs, ["paper"] * 2 + ["flow"] * 2, strict=True)}
    for name, variant in names.items():
        assert [text for text in caplog.messages if text.startswith(f"started {name} ({variant})  (log ")]
        assert [text for text in caplog.messages if text.startswith(f"failed  {name} ({variant}): nine is too many")]
        assert f"{name} ({variant}): nine is too many" in str(failed.exception)
    shown = CliRunner().invoke(group, ["study", "variants.toml", "--status"]).output.splitlines()
    assert shown[0].split()[:3] == ["run", "variant", "state"]
    assert {tuple(line.split()[:3]) for line in shown[1:5]} == {(*each, "failed") for each in names.items()}
    assert shown[5].startswith(f"{next(iter(names))} (paper): nine is too many")
    found = json.loads(CliRunner().invoke(group, ["study", "variants.toml", "--status", "--json"]).output)
    assert {row["name"]: row["variant"] for row in found["runs"]} == names
    (tmp_path / "plain.toml").write_text(STUDY)
    shown = CliRunner().invoke(group, ["study", "plain.toml", "--status"]).output
    assert shown.splitlines()[0].split()[:2] == ["run", "state"] and "(" not in shown.splitlines()[1]
    found = json.loads(CliRunner().invoke(group, ["study", "plain.toml", "--status", "--json"]).output)
    assert all("variant" not in row for row in found["runs"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[variant]\nflow = 3", r"\[variant.flow\] must be a table"),
        ("[variant.flow]\nsampler = 'heun'", r"\[variant.flow\]: unknown item 'sampler'"),
        ("[variant.flow]\nrecipe = { steps = 3 }", "steps are set by budgets"),
        ("[variant.flow]\nsampling = { sampler = 3 }", "sampler = 3: must be text"),
        (
            "[variant.flow]\nrecipe = { objective = 'sit' }\nsampling = { sampler = 'ddpm' }",
            "needs a schedule of timesteps",
        ),
    ],
)
def test_variants_that_do_not_fit_are_refused(text, message, tmp_path):
    (tmp_path / "s.toml").write_text(f"protocol = 'digits'\nbackbones = ['dit-xs-4']\n{text}\n")
    with pytest.raises(UserError, match=message):
        expand(load(tmp_path / "s.toml"))


def test_budgets_spend_the_same(study):
    small, large = expand(study).runs[:2]
    assert small.milestones == (7, 60, 600)
    assert large.milestones[0] == 7
    for milestone, matched in zip(small.milestones[1:], large.milestones[1:], strict=True):
        spent = matched * large.gflops_step / (milestone * small.gflops_step)
        assert abs(spent - 1) <= 0.5 / matched

    def milestones(budgets, recipes):
        data = {"protocol": "digits", "backbones": ["dit-xs-4", "dit-xs-2"], "budgets": budgets, "backbone": recipes}
        return [run.milestones for run in expand(from_dict(data, Path("x.toml"))).runs]

    double = {"dit-xs-2": {"batch": 256}}  # the protocol's is 128
    assert milestones({"images": ["128k", 256]}, double) == [(2, 1000), (1, 500)]
    assert milestones({"steps": [5]}, double) == [(5,), (5,)]
    # What is matched is trained with its own batch, whoever is held against it.
    (_, (half,)), (_, (whole,)) = (
        milestones({"match": "dit-xs-4@800"}, double),
        milestones({"match": "dit-xs-4@800"}, {}),
    )
    assert abs(half - whole / 2) <= 1
    gflops = 400 * small.gflops_step / 16 * 128
    assert milestones({"gflops": gflops}, {})[0] == (400,)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("backbones =", "bakcbones =", "did you mean backbones"),
        ("seeds =", "seed =", "unknown item 'seed'; did you mean seeds"),
        ("[sampling]", "[samplig]", "did you mean sampling"),
        ("guidance_scales", "guidance_scale", "did you mean guidance_scales"),
        ('protocol = "digits"', "", "protocol is missing"),
        ('"digits"', '"digit"', "did you mean digits"),
        ('["dit-xs-4",', '["dit-xs4",', "did you mean dit-xs-4"),
        ('["dit-xs-4",', '["dit-xs-2",', "'dit-xs-2' is named twice"),
        ('["dit-xs-4", "dit-xs-2"]', "[]", "the list is empty"),
        ("[0, 3]", "[0, -3]", "0 or more"),
        ("[0, 3]", "[true]", "whole number"),
        ("match =", "matched =", "did you mean match"),
        ("{ match", "{ steps = 5, match", "one of steps, images, gflops, match"),
        ("dit-xs-4@60", "dit-xs-4", "BACKBONE@STEPS"),
        ("dit-xs-4@60", "dit-xs4@60", "did you mean dit-xs-4"),
        ("evaluate_at = [7]", "evaluate_at = [700]", "more than the 600 training steps of dit-xs-4"),
        ("batch = 16", "btach = 16", "did you mean batch"),
        ("batch = 16", "batch = -16", "batch='-16' cannot be read as int"),
        ("batch = 16", "steps = 16", "budgets"),
        ("[backbone.dit-xs-2]", "[backbone.dit-s-2]", "backbone of this study 'dit-s-2'"),
        ("samples = 200", "samples = 20", "needs at least 100"),
        ("samples = 200", 'samples = "many"', "samples = 'many'"),
        ('"ddim"', '"ddmi"', "did you mean ddpm or ddim"),
        ("[1, 1.5]", "[0.5]", "below 1"),
        ("steps = [5, 2]", "steps = [5000]", "more than the 1000 steps"),
        ('protocol = "digits"', 'protocol = "digits"\nname = "../up"', "names a folder"),
        ("batch = 16", "batch = [16", "not valid TOML"),
        (
            "evaluate_at",
            'logger = "tensorbord"\nevaluate_at',
            "did you mean tensorboard?",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named(old, new, message, tmp_path):
    assert STUDY.count(old) >= 1
    path = tmp_path / "odd.toml"
    path.write_text(STUDY.replace(old, new, 1))
    with pytest.raises(UserError) as refused:
        expand(load(path))
    text = str(refused.value)
    assert message in text and "\n" not in text


def test_a_reason_is_the_last_thing_said(tmp_path):
    log = tmp_path / "log"
    log.write_text("$ harness run\nharness: old\n$ harness run\nTraceback\n  File\nValueError: a\tb\n")
    assert jobs.reason_of(log, 1) == "ValueError: a b"
    log.write_text("$ harness run\nmuch\nharness: the loss is not finite\nnotes\n")
    assert jobs.reason_of(log, 1) == "the loss is not finite"
    log.write_text("$ harness run\nharness: old\n$ harness run\n")
    assert jobs.reason_of(log, 3) == "exit code 3"
    assert "signal 9 (SIGKILL)" in jobs.reason_of(log, -9)


def test_who_was_told_to_stop_has_not_failed(tmp_path):
    log = tmp_path / "log"
    log.write_text("$ harness run\nharness: interrupted\n$ harness run\nharness: the disk is full\n")
    assert jobs.interrupted(log, 130) and jobs.interrupted(log, -15) and not jobs.interrupted(log, 1)
    log.write_text("$ torchrun -m harness run\nharness: interrupted\nTraceback\nChildFailedError:\n")
    assert jobs.interrupted(log, 1) and not jobs.interrupted(log, 0)


def test_several_processes_of_a_run_are_started_by_torchrun(study):
    expansion = expand(dataclasses.replace(study, processes=4))
    start = ("torchrun", "--standalone", "--nproc-per-node", "4", "-m", "harness", "run")
    assert [run.commands[0][:7] for run in expansion.runs] == [start] * 4
    assert [run.name for run in expansion.runs] == [run.name for run in expand(study).runs]


def test_torchrun_takes_no_option_of_ours_for_its_own():
    from torch.distributed.run import parse_args

    for command in (run_command, train_command):
        flags = [flag for each in command.params for flag in (*each.opts, *each.secondary_opts) if flag[:1] == "-"]
        for flag in flags:
            words = ["-m", "harness", command.name, flag, "value"]
            found = parse_args(["--standalone", "--nproc-per-node", "2", *words])
            assert (found.training_script, found.training_script_args) == ("harness", words[2:]), flag
    found = parse_args(
        ["--nproc-per-node", "2", "-m", "--", "harness", "sample", "--run", "here"]
    )  # as docs/guides/clusters.md says
    assert (found.training_script, found.training_script_args) == ("harness", ["sample", "--run", "here"])


@pytest.fixture
def launched(tmp_path, monkeypatch, caplog):
    """A function that launches a study of five seeds whose commands are stubs; what happens is appended to `said`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(jobs.PROGRAMS, "harness", "stub_command")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    data = {"protocol": "digits", "backbones": ["dit-xs-4"], "seeds": [9, 1, 2, 3, 4], "sampling": {"samples": 100}}
    study = expand(from_dict(data, Path("stub.toml")))

    def launch(processes, **options):
        caplog.clear()
        launcher = Launcher(study, processes=processes, draw=lambda found: None, **{"retry_failed": False, **options})
        with caplog.at_level(logging.INFO, "harness"):
            return launcher, launcher.launch(), caplog.messages

    return launch


def during(condition, action, monkeypatch):
    """Do `action` once, from within the launcher's own loop, when `condition` holds."""
    sleep, done = time.sleep, []

    def watched(seconds):
        if not done and condition():
            done.append(True)
            action()
        sleep(min(seconds, 0.02))

    monkeypatch.setattr("harness.studies.local.time.sleep", watched)


def test_so_many_are_at_work_each_with_its_share_and_sigterm_reaches_all(launched, monkeypatch):
    begun = lambda: sorted(Path().glob("begun-*"))  # noqa: E731
    during(lambda: len(begun()) == 2, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    launcher, found, said = launched(2)
    assert launcher.stopping == 1
    assert [path.name for path in begun()] == ["begun-1", "begun-2"]  # two slots, and the first run has failed
    groups, *shares = zip(*(path.read_text().split() for path in begun()), strict=True)
    assert len({*groups, str(os.getpgid(0))}) == 3  # Ctrl-C at the terminal reaches none of them
    assert shares == [(str(max(1, os.cpu_count() // 2)),) * 2, ("5", "2")] or shares[1] == ("2", "5")
    assert [row.state for row in found.rows] == ["failed", "interrupted", "interrupted", "to do", "to do"]
    assert found.rows[0].reason == "nine is too many"
    assert "stopping: 2 processes, writing checkpoints" in said


def test_a_failed_run_is_begun_again_when_asked_and_one_that_ends_without_samples_is_no_success(launched):
    for seed in range(1, 5):
        Path(f"end-{seed}").touch()
    _, found, _ = launched(4)
    reasons = [row.reason for row in found.rows]
    assert reasons == ["nine is too many"] + ["ended without an error, but 3 sample sets are missing"] * 4
    assert launched(4)[2] == []
    said = launched(4, retry_failed=True)[2]
    assert sum(text.startswith("started") for text in said) == 5


def test_a_run_whose_log_another_process_takes_first_was_not_started(launched, monkeypatch):
    monkeypatch.setattr(jobs, "start", lambda *arguments: None)
    said = launched(1)[2]
    assert [text.partition(" ")[0] for text in said].count("waiting") == 10  # twice each: it is queued again once
    assert not any(text.startswith("started") for text in said)


def test_two_launchers_of_a_study_do_not_work_at_once(launched, monkeypatch):
    refused = []

    def second():
        with pytest.raises(UserError, match="another `harness study` is already running study 'stub'"):
            launched(1)
        refused.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    during(lambda: Path("begun-1").exists(), second, monkeypatch)
    launched(1)
    assert refused
