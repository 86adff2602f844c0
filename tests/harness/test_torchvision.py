"""torchvision beside a CPU build of torch: imported where it can be, left alone where it needs no help."""

import subprocess
import sys
import types

import pytest
import torch

from harness.frameworks.torchvision import importlib, make_importable


def alone(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    return done.returncode, (done.stdout + done.stderr).strip()


def test_torchvision_and_what_imports_it_can_be_imported():
    pytest.importorskip("torchvision")
    code, text = alone(
        "from harness.frameworks.torchvision import make_importable; make_importable(); make_importable();"
        "import torchvision, cleanfid.fid, torch_fidelity, torchvision.transforms; print(torchvision.__version__)"
    )
    assert code == 0, text


def test_diffusers_decoder_is_built_where_torchvision_is_installed():
    """In a process of its own: this one was helped when the tests began."""
    code, text = alone(
        "from pathlib import Path; from harness.autoencoders.load import _build;"
        "print(type(_build('kl', {'block_out_channels': [32]}, Path('x/y'))).__name__)"
    )
    assert (code, text) == (0, "AutoencoderKL")


def forbidden(*arguments):
    raise AssertionError("an operator was declared")


@pytest.mark.parametrize("module", [types.ModuleType("torchvision"), None])
def test_nothing_is_done_where_it_imports_by_itself_or_is_absent(module, monkeypatch):
    if module is not None:
        module.__spec__ = types.SimpleNamespace(name="torchvision")
        monkeypatch.setitem(sys.modules, "torchvision", module)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.library, "Library", forbidden)
    make_importable()


@pytest.mark.parametrize("fault", [RuntimeError("CUDA versions differ"), ImportError("libjpeg"), OSError("cut short")])
def test_another_fault_is_left_to_who_meets_it(fault, monkeypatch):
    def fail(name):
        raise fault

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.library, "Library", forbidden)
    make_importable()
