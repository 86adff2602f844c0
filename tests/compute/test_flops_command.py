"""`harness flops`: figures, footnotes, options and refusals."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from harness.cli.flops import command
from harness.compute import CONVENTION
from harness.errors import UserError
from harness.registry import backbones


def flops(*arguments):
    return CliRunner().invoke(command, list(arguments), catch_exceptions=False)


def document(*arguments):
    done = flops(*arguments, "--json")
    assert done.exit_code == 0
    return json.loads(done.stdout)


def test_every_backbone_and_every_published_figure():
    report = document()
    rows = report["rows"]
    names = {row["name"] for row in rows} | {each["name"] for each in report["refused"]}
    assert names == {*backbones.names(), "adm-u-256", "adm-u-512"}  # the cascades of Table 6 beside the backbones
    table_6 = {row["name"]: row["published_gflops"] for row in rows if row["name"].startswith(("adm-", "ldm-"))}
    assert {name: figure for name, figure in table_6.items() if figure} == {
        "adm-64": 110, "adm-128": 307, "adm-256": 1120, "adm-512": 1983, "adm-u-64-256": 632, "adm-u-128-512": 2506,
        "adm-u-256": 742, "adm-u-512": 2813, "ldm-4": 104, "ldm-8": 57,
    }  # fmt: skip
    assert all(row["difference"] == 0 for row in rows if row["name"] in table_6 and row["published_gflops"])
    published = [row for row in rows if row["published_gflops"] is not None and row["name"].startswith("dit-")]
    assert len(published) == 16
    assert {row["name"]: row["difference"] for row in published if row["difference"]} == {"dit-b-4": 0.01}
    assert all(round(row["params"] / 1e6) == row["published_params_m"] for row in published)
    assert [row["gflops"] for row in rows if row["input_size"] == 64 and row["name"] == "dit-xl-2"] == [524.604358656]
    assert report["convention"] == CONVENTION
    assert len(report["footnotes"]) == 1 and "5.57" in report["footnotes"][0] and "5.56" in report["footnotes"][0]


def test_published_figures_stand_only_beside_the_network_that_they_are_of():
    (row,) = document("dit-xl-2", "--protocol", "digits")["rows"]
    assert (row["input_size"], row["in_channels"], row["num_classes"]) == (8, 1, 10)
    assert row["published_gflops"] is None and row["difference"] is None
    (row,) = document("dit-xl-2", "--protocol", "imagenet-512")["rows"]
    assert row["published_gflops"] == 524.6 and row["difference"] == 0


def test_breakdown_adds_up_and_takes_blocks_together():
    (row,) = document("dit-s-2", "--breakdown")["rows"]
    assert sum(part["flops"] for part in row["breakdown"]) == row["flops"]
    parts = {(part["part"], part["kind"]): part["times"] for part in row["breakdown"]}
    assert parts["blocks.*.mlp.fc1", "linear"] == 12
    assert parts["t_embedder.mlp.0", "linear"] == parts["t_embedder.mlp.2", "linear"] == 1


def test_table_for_people():
    done = flops("dit-xl-2", "dit-b-4", "--breakdown")
    assert done.exit_code == 0
    line = next(line for line in done.stdout.splitlines() if line.startswith("dit-xl-2"))
    assert " ".join(line.split()) == "dit-xl-2 32x32x4 674.83 675 118.64 118.64 0 118.6214 closed form"
    assert "+0.01" in done.stdout and CONVENTION in done.stdout and "blocks.*.attn.qkv" in done.stdout


def test_fvcore_agrees():
    pytest.importorskip("fvcore")
    for block in ("", "-in-context", "-cross-attention", "-adaln"):
        (row,) = document(f"dit-xs-4{block}", "--check", "fvcore")["rows"]
        assert row["fvcore_gflops"] == row["gflops"]


def test_fvcore_missing_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(UserError, match=r"pip install 'backbone-harness\[fvcore\]'"):
        flops("dit-xs-4", "--check", "fvcore")


def test_unknown_backbone_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="dit-xl-2"):
        flops("dit-xl-22")


def test_closed_forms_need_no_framework():
    code = (
        "import sys; from harness.cli import group; group(['flops', 'dit-xl-2'], standalone_mode=False);"
        "print(sorted({'torch', 'jax', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
