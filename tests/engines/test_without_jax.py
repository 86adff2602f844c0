"""Without jax, everything that does not need it works."""

import subprocess
import sys

import pytest

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("jax", "flax", "optax")))  # as if they were not installed
import reports.render_pool, reports.report
from harness.cli import main
made, reports.render_pool._processors = reports.report.figures, lambda: 1
reports.report.figures = lambda *given: made(*given)[:1]  # drawing all of them takes longer than all else
sys.argv = ["harness", *sys.argv[1:]]
main()
"""


def harness(*arguments):
    command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "words", [["run", "--backbone", "dit-xs-2"], ["sample", "--system", "digits-guided", "--weights", "base=x"]]
)
def test_jax_is_asked_for_in_one_line(words, tmp_path):
    done = harness(*words, "--framework", "jax")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1:] == done.stderr.splitlines()
    assert "--framework jax needs jax and flax and optax" in done.stderr
    assert "pip install 'backbone-harness[jax]'" in done.stderr


def test_the_main_job_needs_no_jax(tmp_path):
    out = tmp_path / "run"
    done = harness(
        "run", "--backbone", "dit-xs-4", "--steps", 2, "--samples", 100, "--sampling-steps", 2, "--out", out,
        "--precision", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (out / "records.jsonl").exists() and (out / "report").is_dir()
