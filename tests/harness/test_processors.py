"""Processors: a container's quota is known, and a command's threads wait without spinning."""

import os
import subprocess
import sys

import pytest

from harness.cli import doctor
from harness.io import processors as module
from harness.io.processors import processors, quota


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_quota_of_both_versions(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == expected


@pytest.mark.parametrize(("allowed", "expected"), [(None, 3), (2.9, 2), (0.4, 1), (64.0, 3)])
def test_processors_are_those_bound_or_fewer(monkeypatch, allowed, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5})
    monkeypatch.setattr(module, "quota", lambda: allowed)
    assert processors() == expected


def test_doctor_says_what_others_use(monkeypatch):
    monkeypatch.setattr(doctor, "processors", lambda: os.cpu_count())
    monkeypatch.setattr(doctor, "load", lambda: 0.1)
    assert doctor._sharing() == []
    monkeypatch.setattr(doctor, "processors", lambda: 0)
    monkeypatch.setattr(doctor, "load", lambda: 99.0)
    assert [each.status for each in doctor._sharing()] == ["note", "note"]


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_of_a_command_wait_without_spinning_unless_told_otherwise(given):
    code = "import os, sys; sys.argv[1:] = ['list', 'protocols']\nfrom harness.cli import main\ntry: main()\n"
    code += "finally: print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == (given or "PASSIVE")
