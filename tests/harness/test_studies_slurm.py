"""Studies on SLURM: the scripts that submitit writes, what a job does, and a job that is pre-empted (by a stand-in)."""

import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from harness.errors import RunError, UserError
from harness.studies import jobs, load, slurm
from harness.studies.expand import expand
from harness.studies.state import overview

STUDY = """
name = "s"
protocol = "digits"
backbones = ["dit-xs-4", "dit-xs-2"]
budgets = { steps = [4] }
precision = "float32"
micro_batch = 16

[sampling]
steps = [2]
guidance_scales = [1, 1.5]
samples = 100

[recipe]
batch = 16

[slurm]
partition = "gpu"
time = "1-12:30:00"
gpus_per_node = 1
mem = "32G"
setup = ["module load cuda"]
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    (tmp_path / "s.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return expand(load(Path("s.toml")))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    made = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", made.path)
    return made


def settings(script):
    """The #SBATCH lines of a script, by name."""
    found = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, flags=re.M))
    return {name: value.strip("'") for name, value in found.items()}


def check_script(script, study, run):
    asked = settings(script)
    assert asked["partition"] == "gpu" and asked["time"] == str(36 * 60 + 30) and asked["gpus-per-node"] == "1"
    assert asked["mem"] == "32G" and asked["signal"] == "USR2@120" and asked["requeue"] == ""
    assert asked["job-name"] == f"harness-s-{run.name}" and asked["open-mode"] == "append"
    assert "\nmodule load cuda\n" in script
    folder = (study.folder / "slurm").absolute()
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert line.endswith(f"{sys.executable} -u -m submitit.core._submit {folder}/%j")


def test_without_slurm_the_scripts_are_written_and_nothing_is_run(study):
    assert shutil.which("sbatch") is None
    with pytest.raises(UserError, match="sbatch is not on this machine; the 2 scripts that it would get are in"):
        slurm.submit(study, {}, retry_failed=False)
    for run in study.runs:
        check_script((study.folder / "slurm" / f"{run.name}.sh").read_text(), study, run)
        assert not run.folder.exists()


def test_settings_of_the_command_line_are_laid_over_the_files(study):
    with pytest.raises(UserError):
        slurm.submit(study, {"time": 90, "partition": "cpu", "qos": "low"}, retry_failed=False)
    asked = settings((study.folder / "slurm" / f"{study.runs[0].name}.sh").read_text())
    assert (asked["time"], asked["partition"], asked["qos"], asked["mem"]) == ("90", "cpu", "low", "32G")


def test_false_leaves_an_option_out(study):
    given = {"exclusive": False, "use_srun": False, "additional_parameters": {"requeue": False, "overcommit": True}}
    with pytest.raises(UserError):
        slurm.submit(study, given, retry_failed=False)
    script = (study.folder / "slurm" / f"{study.runs[0].name}.sh").read_text()
    asked = settings(script)
    assert not {"exclusive", "requeue"} & set(asked) and asked["overcommit"] == "" and "srun" not in script


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"partiton": "gpu"}, "unknown setting 'partiton'; did you mean partition"),
        ({"time": "soon"}, "time = 'soon' is not a time limit"),
        ({"time": 0}, "less than a minute"),
        ({"job_name": "mine"}, "unknown setting 'job_name'"),
        ({"signal_delay_s": 5}, "signal_delay_s must be more than 20 seconds"),
        (
            {"partition": "gpu\ncurl evil"},
            r"partition = 'gpu\ncurl evil' must be a number, true, false or printable text",
        ),
        ({"comment": "\x1b[31m"}, "comment = '\\x1b[31m' must be"),
        ({"setup": ["true\nfalse"]}, "must be a list of printable text, one line an item"),
        ({"setup": "true"}, "must be a list of printable text, one line an item"),
        ({"additional_parameters": {"a\nb": 1}}, r"additional_parameters: 'a\nb' is not the name of an option"),
        ({"additional_parameters": {"a": "\n"}}, r"additional_parameters.a = '\n' must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(study, given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        slurm.submit(study, given, retry_failed=False)
    assert not study.folder.exists()


@pytest.mark.parametrize(
    ("text", "minutes"),
    [(90, 90), ("90", 90), ("90:01", 91), ("12:00:00", 720), ("2-0", 2880), ("1-2:3", 1563), ("1-2:3:4", 1564)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text, minutes):
    assert slurm.time_limit_minutes(text) == minutes


def test_each_run_is_a_job_that_carries_words_and_is_submitted_once(study, fake, caplog):
    fake.spool.joinpath("begin").write_text("#!/bin/bash\n")  # jobs that do nothing and never end
    caplog.set_level(logging.INFO, "harness")
    found = slurm.submit(study, {}, retry_failed=False)
    assert [row.state for row in found.rows] == ["running", "running"]  # by squeue alone: nothing is locked
    assert [text.split()[:2] for text in caplog.messages] == [["submitted", run.name] for run in study.runs]
    for number, run in enumerate(study.runs, start=1):
        check_script(fake.script(number), study, run)
        (path,) = study.folder.glob(f"slurm/{number}/*_submitted.pkl")
        delayed = pickle.loads(path.read_bytes())  # our own, just written
        assert type(delayed.function) is slurm.Command and not delayed.args and not delayed.kwargs
        assert delayed.function.commands == [list(words) for words in run.commands] and len(run.commands) == 2
    slurm.submit(study, {}, retry_failed=False)  # what is in the queue is not submitted again
    assert len(caplog.messages) == 2
    fake.spool.joinpath("1.alive").unlink()  # the first has died without a trace
    found = slurm.submit(study, {}, retry_failed=False)
    assert (
        caplog.messages[2].split()[:4] == ["submitted", study.runs[0].name, "as", "job"] and len(caplog.messages) == 3
    )


def test_what_sbatch_says_is_passed_on(study, fake):
    fake.spool.joinpath("refusing").touch()
    with pytest.raises(RunError, match=f"sbatch has refused the job of {study.runs[0].name}: .*Invalid partition"):
        slurm.submit(study, {}, retry_failed=False)


def command(tmp_path, *commands):
    return slurm.Command(
        commands=[list(words) for words in commands], log=str(tmp_path / "log"), failure=str(tmp_path / "failure.json"),
        seconds=30,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit leaves logs of jobs open
@pytest.mark.parametrize("cluster", ["debug", "local"])
def test_a_job_runs_its_commands_until_one_fails_and_says_why(cluster, tmp_path):
    import submitit

    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster=cluster)
    done = executor.submit(command(tmp_path, ["harness", "list", "samplers"], ["harness", "list", "protocols"]))
    assert done.result() == 0
    log = (tmp_path / "log").read_text()
    assert log.index("$ harness list samplers") < log.index("ddpm") < log.index("$ harness list protocols")
    assert not (tmp_path / "failure.json").exists()
    failed = executor.submit(command(tmp_path, ["harness", "list", "protocol"], ["harness", "list", "metrics"]))
    assert failed.result() == 2
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert failure["command"] == "harness list protocol" and failure["exit_code"] == 2
    assert "'protocol' is not one of" in failure["reason"]
    assert "list metrics" not in (tmp_path / "log").read_text()


def test_a_process_is_stopped_from_within_a_wait_for_it():
    """As submitit does: its handler of signals interrupts the wait, in the same thread."""
    code = "import time, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, lambda *_: jobs.stop(process, 30))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert process.wait() == 130
    finally:
        signal.signal(signal.SIGALRM, before)
        process.stdout.close()
    assert time.monotonic() - began < 25


@pytest.mark.slow
def test_a_job_that_is_preempted_writes_its_checkpoint_and_goes_on_in_the_next(tmp_path, study, fake):
    steps = 150
    (tmp_path / "s.toml").write_text(STUDY.replace("[4]", f"[{steps}]").replace(', "dit-xs-2"', ""))
    study = expand(load(Path("s.toml")))
    (run,) = study.runs
    environment = {**os.environ, "PATH": fake.path, "OMP_NUM_THREADS": "1"}

    def harness(*words):
        return subprocess.run(
            [sys.executable, "-m", "harness", "study", "s.toml", *words],
            capture_output=True, text=True, env=environment, timeout=300,
        )  # fmt: skip

    done = harness("--launcher", "slurm")
    assert done.returncode == 0, done.stderr
    assert "as job 1" in done.stdout
    log = run.folder / "log.jsonl"
    end = time.monotonic() + 300
    while not (log.exists() and log.stat().st_size > 100):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert json.loads(harness("--status", "--json").stdout)["counts"]["running"] == 1
    fake.preempt(1)
    while fake.begun(1) < 2:
        assert time.monotonic() < end, "".join(map(Path.read_text, study.folder.glob("slurm/1/*log*")))
        time.sleep(0.1)
    said = (study.folder / "logs" / f"{run.name}.log").read_text()
    assert "stopping: writing a checkpoint" in said
    stopped = int(re.search(r"checkpoint of step (\d+) is in", said).group(1))
    assert 0 < stopped < steps
    fake.wait(1)
    said = (study.folder / "logs" / f"{run.name}.log").read_text()
    assert f"continues from the checkpoint of step {stopped}" in said
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, steps + 1))
    assert [row.state for row in overview(study).rows] == ["done"]
    assert not list(study.folder.glob("failures/*"))
    assert fake.begun(1) == 2
    done = harness("--launcher", "slurm")  # nothing is left: the report
    assert done.returncode == 0 and "submitted" not in done.stdout and "dit-xs-4" in done.stdout, done.stderr
    assert (study.folder / "report" / "table-digits.csv").exists()
