"""The page of the project's own study: its tables are what the kept measurements say, without torch."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reports.report import packaged_runs
from results.store import load

ROOT = Path(__file__).parents[2]
CODE = """
import runpy, sys

class WithoutFrameworks:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "jax"):
            raise ImportError(name)

sys.meta_path.insert(0, WithoutFrameworks())
sys.argv = ["findings", "--check"]
runpy.run_path(sys.path.pop(0), run_name="__main__")
"""


def checked(root):
    script = str(root / "studies" / "findings.py")
    code = f"import sys; sys.path.insert(0, {script!r})\n{CODE}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_tables_of_the_page_are_computed_from_what_is_kept():
    done = checked(ROOT)
    assert done.returncode == 0, done.stderr


def test_a_table_that_differs_is_found(tmp_path):
    (tmp_path / "studies").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "evaluators").symlink_to(ROOT / "evaluators")
    (tmp_path / "studies" / "findings.py").write_text((ROOT / "studies" / "findings.py").read_text())
    page = (ROOT / "docs" / "findings.md").read_text()
    (tmp_path / "docs" / "findings.md").write_text(page.replace("| 1,280 |", "| 1,281 |"))
    done = checked(tmp_path)
    assert done.returncode == 1 and "differs from the measurements" in done.stderr


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("results/measured", ("fashion-mnist", 16, 2000)), ("examples/measured", ("digits", 8, 1000))],
)
def test_what_is_kept_is_whole_and_small_and_names_no_machine(folder, kind):
    with packaged_runs() as files:
        if folder == "examples/measured":
            files = sorted((ROOT / folder).glob("*/records.jsonl"))
        loaded = load(files)
        if not files:
            pytest.fail(f"nothing is kept in {folder}")
        assert not loaded.problems and not loaded.conflicts and len(loaded.records) > 100
        folders = [path.parent for path in files]
    kept = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 10_000_000
    for path in kept:
        if path.suffix in (".json", ".jsonl"):
            assert not re.search(r'"/[^"]*/[^"]*"', path.read_text()), path
    # each protocol's reference, suites and training data are of one kind
    assert {(record.dataset, record.resolution, record.n) for record in loaded.records} == {kind}


def table(page, name):
    """The rows of a table of the page, as dictionaries by column; columns of equal names are numbered (against, against 2)."""
    text = page.split(f"<!-- table: {name} -->\n")[1].split("<!-- end -->")[0]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    names = [name if head[:i].count(name) == 0 else f"{name} 2" for i, name in enumerate(head)]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_the_prose_says_what_the_tables_say():
    page = (ROOT / "docs" / "findings.md").read_text()
    prose = " ".join(page.split())
    judges = ("EfficientNet-Lite0", "Fashion-MNIST classifier")

    unets = table(page, "unets")
    assert [row["model"] for row in unets] == ["dit-2xs-2", "adm-2xs", "ldm-2xs"]
    lower = [
        100 * (1 - number(row[f"FD, {judge}"]) / number(unets[0][f"FD, {judge}"]))
        for row in unets[1:]
        for judge in judges
    ]
    noise = [number(row["Training noise"]) for row in table(page, "lottery") if row["Metric"].startswith("FD")]
    assert f"differences, {min(lower):.0f} to {max(lower):.0f} %" in prose
    assert f"the {min(noise):.0f} to {max(noise):.0f} % by which training again moves a distance" in prose
    assert {row[column] for row in unets[1:] for column in row if column.startswith("against")} == {"win"}

    models = len(table(page, "scaling"))
    (rho,) = [
        row["Spearman's rho"]
        for row in table(page, "correlation")
        if row["features"] == judges[1] and row["models"] == str(models)
    ]
    assert rho == "-1.00" and models == 6
    assert (
        f"all six are in the order of their Gflops, which chance alone does once in {math.factorial(models)}" in prose
    )

    examples = {row["model"]: row for row in table(page, "examples")}
    verdicts = {name: (row["against dit-2xs-2"], row["against dit-2xs-2 2"]) for name, row in examples.items()}
    assert {name for name, each in verdicts.items() if each == ("win", "win")} == {
        "adm-2xs", "ldm-2xs", "gated-conv-2xs-2", "jit-2xs-4",
    }  # fmt: skip
    assert verdicts["u-vit-2xs-2"] == verdicts["sit-2xs-2"] == ("loss", "loss")
    assert max(examples, key=lambda name: number(examples[name]["FD"])) == "sit-2xs-2"
    assert f"leaves it {examples['sit-2xs-2']['training steps']} steps" in prose


def number(cell):
    return float(cell.split()[0].replace(",", ""))
