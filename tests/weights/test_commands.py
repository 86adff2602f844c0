"""`harness weights` as a command, and the memory that loading takes."""

import json
import subprocess
import sys

import torch
from click.testing import CliRunner
from safetensors import safe_open

from harness.cli.weights import command
from harness.errors import UserError
from harness.weights import known


def run(*words):
    return CliRunner().invoke(command, [str(word) for word in words])


def test_inspect_says_what_a_file_is(bare):
    text = run("inspect", bare)
    assert text.exit_code == 0
    for part in (
        "DiT state dict",
        "dit-xs-4, num_classes 10",
        "unknown file",
        "72 tensors (72 F32)",
        "yes, every tensor",
    ):
        assert part in text.output
    document = json.loads(run("inspect", bare, "--json").output)
    assert document["bytes"] == bare.stat().st_size and document["fits"] and document["values"] == 4_210_688


def test_a_known_hash_is_named(bare, monkeypatch):
    digest = json.loads(run("inspect", bare, "--json").output)["sha256"]
    monkeypatch.setitem(known.KNOWN, digest, known.Known("bare.pt", "the tests", "this one"))
    assert "bare.pt of the tests" in run("inspect", bare).output


def test_inspect_names_the_first_five_and_counts_the_rest(state, tmp_path):
    torch.save(
        {name: tensor for name, tensor in state.items() if ".mlp." not in name or "t_emb" in name}, tmp_path / "a.pt"
    )
    text = run("inspect", tmp_path / "a.pt").output
    assert "missing     24: blocks.0.mlp.fc1.weight" in text and "and 19 more" in text and "fits        no:" in text


def test_import_says_where_it_comes_from_and_nothing_is_overwritten(bare):
    done = run("import", bare)
    written = bare.with_suffix(".safetensors")
    assert done.exit_code == 0 and f"{written}: dit-xs-4, num_classes 10, from bare.pt (dit)" in done.output
    with safe_open(written, framework="pt") as file:
        about = json.loads(file.metadata()["harness"])
    assert about["source"]["name"] == "bare.pt" and len(about["source"]["sha256"]) == 64
    before = written.read_bytes()
    again = run("import", bare)
    assert isinstance(again.exception, UserError) and "exists and is not overwritten" in str(again.exception)
    assert written.read_bytes() == before
    assert "bare.pt (dit)" in run("inspect", written).output
    assert run("export", written, "--format", "dit").exit_code == 0
    unknown = run("export", written, "--format", "difusers")
    assert "did you mean diffusers" in str(unknown.exception)
    foreign = run("export", written, "--format", "ldm")
    assert "dit-xs-4 has no public layout 'ldm'; it has dit, diffusers" in str(foreign.exception)


def test_a_full_disk_leaves_nothing_half_written(bare, monkeypatch):
    from harness.errors import RunError
    from harness.weights import transfer

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer.os, "fsync", full)
    done = run("import", bare)
    assert isinstance(done.exception, RunError) and "the disk is full" in str(done.exception)
    assert [path.name for path in bare.parent.iterdir()] == ["bare.pt"]


MEMORY = """
import resource, sys, torch
from pathlib import Path
from harness.weights import load_into
import harness.weights.load
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024, bias=False) for _ in range(COUNT))
def peak():
    if Path("/proc/self/status").exists():  # Linux hands ru_maxrss on to the child of a larger process
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
path = Path(sys.argv[1])
with torch.device("meta"):
    net = Net()
before = peak()
load_into(net, path)
after = peak()
assert all(not p.is_meta and p.any() for p in net.parameters())
print((after - before) / path.stat().st_size)
"""


def test_loading_holds_the_weights_once(tmp_path):
    block = torch.ones(1024, 1024)
    torch.save({f"layers.{n}.weight": block.clone() for n in range(100)}, tmp_path / "a.pt")  # 420 MB
    words = [sys.executable, "-c", MEMORY.replace("COUNT", "100"), str(tmp_path / "a.pt")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3


def test_an_import_removes_nothing_that_it_did_not_make(tmp_path):
    from safetensors.torch import save_file

    from harness import registry
    from harness.weights.transfer import import_file

    source = tmp_path / "net.safetensors.partial"  # a name that an unfinished import might have had
    save_file(registry.backbones.get("dit-xs-2").build("torch").state_dict(), source)
    before = source.read_bytes()
    written, _ = import_file(source, tmp_path / "net.safetensors", "dit-xs-2")
    assert written.exists() and source.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["net.safetensors", "net.safetensors.partial"]
